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
mkdir "$stage"/{bin,programs,work,images,fixtures} "$stage"/work/examples
for file in nbdkit nbdkit-mount libnbdkit_lua_plugin.so libnbdkit_python_plugin.so; do
    [ ! -e "$programs/$file" ] || { touch "$stage/programs/$file"; mount --bind "$programs/$file" "$stage/programs/$file"; }
done
mount --bind "$source/examples" "$stage/work/examples"
mount --bind "$fixtures" "$stage/fixtures"
mount --rbind "$stage" /tmp
mount -t tmpfs -o mode=1777 mnt /mnt
mount -t tmpfs -o mode=1777 run /run
mkdir -m 1777 /mnt/x /mnt/y
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
chmod 755 /tmp/bin/*
if [ -e /etc/sudoers ]; then
    printf 'Defaults !secure_path\nDefaults env_keep += "PATH TMPDIR"\nALL ALL=(ALL) NOPASSWD: ALL\n' >/tmp/sudoers
    chmod 440 /tmp/sudoers
    mount --bind /tmp/sudoers /etc/sudoers
fi
# Where mount(8) looks for the helper.
cp "$source/contrib/mount.nbdkit" /tmp/bin/mount.nbdkit

cp --sparse=always /tmp/fixtures/* /tmp/work/
cp --sparse=always /tmp/fixtures/small.img /tmp/images/a.img
cp /tmp/images/a.img /tmp/images/b.img
cp /tmp/images/a.img /tmp/images/main.img
cd /tmp/work
export PATH=/tmp/bin:/usr/bin:/usr/sbin:/bin:/sbin:$PATH HOME=/tmp/work TMPDIR=/tmp
