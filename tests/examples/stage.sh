# The stage on which one example of the documentation runs, as root in namespaces of its own: sourced by
# tests/examples/mod.rs with bash. The paths that examples use are private here, and nothing outlives the process.
#
# $stage      a directory to cover
# $programs   the folder of the programs under test
# $source     the source tree
# $fixtures   images that each example gets copies of
set -e
mount --make-rprivate /
ip link set lo up
mount -t tmpfs -o mode=1777 stage "$stage"
mkdir "$stage"/{bin,programs,work,images,fixtures,include}
for file in nbdkit nbdkit-mount libnbdkit_lua_plugin.so libnbdkit_python_plugin.so; do
    [ ! -e "$programs/$file" ] || { touch "$stage/programs/$file"; mount --bind "$programs/$file" "$stage/programs/$file"; }
done
cp -r "$source/examples" "$stage/work/examples"
mount --bind "$source/include" "$stage/include"
mount --bind "$fixtures" "$stage/fixtures"
mount --rbind "$stage" /tmp
mount -t tmpfs -o mode=1777 mnt /mnt
mount -t tmpfs -o mode=1777 run /run
mkdir /mnt/x /mnt/y
# What an ordinary user needs in a container too.
if mknod -m 666 /tmp/fuse c 10 229 2>/dev/null; then mount --bind /tmp/fuse /dev/fuse; fi

# A server in the foreground goes on beside the commands that follow it.
for program in nbdkit nbdkit-mount; do
    cat >/tmp/bin/$program <<-SHIM
	#!/bin/bash
	case " \$* " in
	*" --run "* | *" -s "*) ;;
	*" -f "* | *" --foreground "*)
	    pipe=\$(mktemp -u)
	    mkfifo "\$pipe"
	    /tmp/programs/$program -P "\$pipe" "\$@" <&0 &
	    exec 9<>"\$pipe"
	    read -r -t 30 ready <&9 && [ -n "\$ready" ]
	    exit ;;
	esac
	exec /tmp/programs/$program "\$@"
	SHIM
done
printf '#!/bin/sh\n[ "$(id -u)" != 0 ] || exec "$@"\nexec /usr/bin/sudo "$@"\n' >/tmp/bin/sudo
if [ -e /etc/sudoers ]; then
    printf 'Defaults !secure_path\nDefaults env_keep += "PATH TMPDIR"\nALL ALL=(ALL) NOPASSWD: ALL\n' >/tmp/sudoers
    chmod 440 /tmp/sudoers
    mount --bind /tmp/sudoers /etc/sudoers
fi
# What puts the helper of mount(8) where it looks.
cat >/tmp/bin/install-helper <<-HELPER
	#!/bin/sh
	umask 022
	mkdir -p /tmp/upper /tmp/work.upper
	mount -t overlay -o lowerdir=/usr/sbin,upperdir=/tmp/upper,workdir=/tmp/work.upper overlay /usr/sbin
	cp /tmp/bin/nbdkit-mount /usr/sbin
	sed "s|@prefix@/bin|/usr/sbin|" "$source/contrib/mount.nbdkit.in" >/usr/sbin/mount.nbdkit
	chmod 755 /usr/sbin/mount.nbdkit
HELPER

chmod 755 /tmp/bin/*
cp --sparse=always /tmp/fixtures/* /tmp/work/
cp --sparse=always /tmp/fixtures/small.img /tmp/images/a.img
cp /tmp/images/a.img /tmp/images/b.img
cp /tmp/images/a.img /tmp/images/main.img
for directory in /tmp/images/srv/drivers /tmp/images/srv/floppy /tmp/images/srv/files /tmp/images/srv/root /tmp/work/efi /tmp/work/seed; do
    mkdir -p "$directory"
    echo "a file" >"$directory/a.txt"
done
cp /tmp/images/a.img /tmp/images/srv/root.img
cd /tmp/work
export PATH=/tmp/bin:/usr/bin:/usr/sbin:/bin:/sbin:$PATH HOME=/tmp/work TMPDIR=/tmp CPATH=/tmp/include
