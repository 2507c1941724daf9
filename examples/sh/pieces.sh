#!/usr/bin/env bash
# The pieces of a disk image that was cut by `split -b 1M disk.img piece.`, without putting them together.
#
#   nbdkit sh pieces.sh dir=/path/to/pieces
pieces=("$tmpdir"/dir/*)
case $1 in
config)       ln -s "$(realpath "$3")" "$tmpdir/$2" ;;
thread_model) echo parallel ;;
get_size)     cat "${pieces[@]}" | wc -c ;;
pread)        first=$(($4 >> 20))
              cat "${pieces[@]:first}" |
              tail -c "+$(($4 - (first << 20) + 1))" | head -c "$3" ;;
*)            exit 2 ;;
esac
