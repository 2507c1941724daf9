#!/bin/sh
# A RAM disk, as large as asked for: a sparse file in the script's own directory.
#
#   nbdkit sh ramdisk.sh size=64M
disk=$tmpdir/disk
case $1 in
config)
    [ "$2" = size ] || { echo "unknown parameter $2" >&2; exit 1; }
    truncate -s "$3" "$disk" || exit 1 ;;
config_complete)
    [ -e "$disk" ] || { echo "give a size, as in size=64M" >&2; exit 1; } ;;
get_size)  stat -c %s "$disk" ;;
pread)     dd if="$disk" iflag=skip_bytes,count_bytes skip="$4" count="$3" bs=64k status=none ;;
pwrite)    dd of="$disk" oflag=seek_bytes seek="$4" bs=64k conv=notrunc status=none ;;
zero|trim) fallocate -p -o "$4" -l "$3" "$disk" ;;
flush|can_write|can_flush|can_trim|can_zero) exit 0 ;;
*)         exit 2 ;;
esac
