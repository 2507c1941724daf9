#!/usr/sbin/nbdkit python
"""A disk in memory. size=SIZE is its size, 1M by default."""

import nbdkit

API_VERSION = 2

disk = bytearray(1 << 20)


def config(key, value):
    global disk
    if key != "size":
        raise ValueError("unknown parameter: " + key)
    disk = bytearray(nbdkit.parse_size(value))


def open(readonly):
    return None


def get_size(h):
    return len(disk)


# Every client sees the one disk, and what is written is there for all at once.
def can_multi_conn(h):
    return True


def pread(h, buf, offset, flags):
    buf[:] = disk[offset:offset + len(buf)]


def pwrite(h, buf, offset, flags):
    disk[offset:offset + len(buf)] = buf


def zero(h, count, offset, flags):
    disk[offset:offset + count] = bytes(count)


def flush(h, flags):
    pass
