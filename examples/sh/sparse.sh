#!/bin/sh
# A terabyte with a line of text at the beginning of each 256 GiB and holes between.
#
#   nbdkit sh sparse.sh --run 'nbdinfo --map "$uri"'
part=$((256 << 30)) block=4096 size=$((1 << 40))

# The bytes of one block of text.
text() { printf '%-4095s\n' "This is part $1 of $((size / part))."; }

case $1 in
thread_model) echo parallel ;;
get_size)     echo $size ;;
pread)
    at=$4 end=$(($4 + $3))
    while [ $at -lt $end ]; do
        start=$((at % part))
        if [ $start -lt $block ]; then
            next=$((at - start + block))
        else
            next=$((at - start + part))
        fi
        [ $next -gt $end ] && next=$end
        if [ $start -lt $block ]; then
            text $((at / part)) | tail -c +$((start + 1)) | head -c $((next - at))
        else
            head -c $((next - at)) /dev/zero
        fi
        at=$next
    done ;;
can_extents) exit 0 ;;
extents)
    at=$(($4 - $4 % part)) end=$(($4 + $3))
    while [ $at -lt $end ]; do
        echo $at $block
        echo $((at + block)) $((part - block)) hole,zero
        at=$((at + part))
    done ;;
*) exit 2 ;;
esac
