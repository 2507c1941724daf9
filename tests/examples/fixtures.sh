# The files that examples of the documentation name, made once in the current directory.
set -e
export PATH=/usr/bin:/usr/sbin:/bin:/sbin:$PATH
truncate -s 16M small.img
mkfs.ext4 -q small.img
truncate -s 1G disk.img
sfdisk -q disk.img <<<$'start=2048, size=204800, type=83\nstart=206848, size=204800, type=83'
for at in 1 101; do
    truncate -s 100M part
    mkfs.ext4 -q part
    dd if=part of=disk.img bs=1M seek=$at conv=notrunc,sparse status=none
done
rm part
for name in precious golden scratch root swap esp boot falcon part1 part2 part3 one two; do cp small.img $name.img; done
for n in 0 1 2; do cp small.img disk.img.0$n; done
head -c 100000 /dev/zero >boot.bin
truncate -s 1M firmware.bin
echo "some notes" >notes.txt
cat >script.lua <<-'END'
	function open(readonly) return {} end
	function get_size(h) return 1024 * 1024 end
	function pread(h, count, offset) return string.rep("A", count) end
END
