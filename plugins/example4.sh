# A disk of zeroes that all clients share, as a script for nbdkit: nbdkit example4 size=1M
#
# It is run for each call of the server, with the name of the method and its arguments. See nbdkit-sh-plugin(3).
# $tmpdir is a directory for the script, which the server removes at the end.

disk=$tmpdir/disk

case "$1" in
config)
    # Called once for each parameter: $2 is the key, $3 the value.
    if [ "$2" != size ]; then
        echo "unknown parameter $2" >&2
        exit 1
    fi
    truncate -s "$3" "$disk"
    ;;
get_size)
    stat -c %s "$disk"
    ;;
pread)
    # $3 is the count, $4 the offset.
    dd if="$disk" skip="$4" count="$3" iflag=skip_bytes,count_bytes bs=1M status=none
    ;;
can_write)
    # It can: pwrite is there.
    exit 0
    ;;
pwrite)
    # The data comes on standard input.
    dd of="$disk" seek="$4" oflag=seek_bytes iflag=fullblock bs=1M conv=notrunc status=none
    ;;
*)
    # Nothing else is here. The server knows what to do without it.
    exit 2
    ;;
esac
