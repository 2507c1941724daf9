#!/usr/sbin/nbdkit python
"""A large disk that takes memory only for what is written. size=SIZE is its size, 1T by default."""

import nbdkit

API_VERSION = 2

BLOCK = 64 << 10
size = 1 << 40
# Blocks that were written to, by number.
blocks = {}


def config(key, value):
    global size
    if key != "size":
        raise ValueError("unknown parameter: " + key)
    size = nbdkit.parse_size(value)


def pieces(offset, count):
    """The parts of a range: number of the block, where in it, and how much."""
    while count > 0:
        number, start = divmod(offset, BLOCK)
        length = min(BLOCK - start, count)
        yield number, start, length
        offset += length
        count -= length


def open(readonly):
    return None


def get_size(h):
    return size


def can_multi_conn(h):
    return True


def pread(h, buf, offset, flags):
    done = 0
    for number, start, length in pieces(offset, len(buf)):
        block = blocks.get(number)
        buf[done:done + length] = block[start:start + length] if block else bytes(length)
        done += length


def pwrite(h, buf, offset, flags):
    done = 0
    for number, start, length in pieces(offset, len(buf)):
        block = blocks.setdefault(number, bytearray(BLOCK))
        block[start:start + length] = buf[done:done + length]
        done += length


def zero(h, count, offset, flags):
    for number, start, length in pieces(offset, count):
        if length == BLOCK:
            blocks.pop(number, None)
        elif number in blocks:
            blocks[number][start:start + length] = bytes(length)


def trim(h, count, offset, flags):
    zero(h, count, offset, flags)


def flush(h, flags):
    pass


def extents(h, count, offset, flags):
    """Each run of blocks that are there, or are not, is one extent."""
    kind = start = None
    for number, _, _ in pieces(offset, count):
        this = 0 if number in blocks else nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO
        if kind is None:
            kind, start = this, number
        elif this != kind:
            yield start * BLOCK, (number - start) * BLOCK, kind
            if flags & nbdkit.FLAG_REQ_ONE:
                return
            kind, start = this, number
    yield start * BLOCK, (offset + count - 1) // BLOCK * BLOCK + BLOCK - start * BLOCK, kind
