#!/usr/bin/env python3
"""Turns a disk image into the language of nbdkit's data plugin.

    disk2data.py disk.img          prints a command line of nbdkit that serves the same disk
    disk2data.py --text disk.img   prints the text for data= alone

Zeroes are left out, and so are holes, without being read: a sparse image of a terabyte takes as long as what is in it.
The text means the same to nbdkit 1.24 and later.
"""

import argparse
import os
import sys

# A run of zeroes that is worth an offset of its own, in bytes.
GAP = 16
# A run of one byte that is worth *N, and printable text that is worth quotes.
RUN = 5
TEXT = 4
# A pattern that is worth (...)*N is at most that long, and there at least so many times.
PERIOD = 64
TIMES = 4
WIDTH = 100
CHUNK = 1 << 20


def data_ranges(fd, size):
    """The ranges of a file that are not holes."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            # ENXIO: nothing but a hole is left. Otherwise the file system or the device cannot tell.
            if error.errno != 6:
                yield at, size
            return
        yield start, min(end, size)
        at = end


def chunks(fd, size):
    """What is neither a hole nor a chunk of zeroes: offset and bytes."""
    for start, end in data_ranges(fd, size):
        while start < end:
            data = os.pread(fd, min(CHUNK, end - start), start)
            if not data:
                raise SystemExit("disk2data: the image became shorter while it was read")
            if data.count(0) != len(data):
                yield start, data
            start += len(data)


def run_length(data, at):
    """How often the byte at `at` is repeated."""
    byte = data[at : at + 1]
    end = at
    while end < len(data) and data[end : end + 256] == byte * len(data[end : end + 256]):
        end += 256
    end = min(end, len(data))
    while end < len(data) and data[end : end + 1] == byte:
        end += 1
    return end - at


def repeats(data, at):
    """A pattern that is repeated from `at` on: its length and how often it is there; or None."""
    start = data[at : at + TIMES]
    next_start = at + 1
    # find is quick, and in most data has nothing to find.
    while (next_start := data.find(start, next_start + 1, at + PERIOD + TIMES)) > at:
        period = next_start - at
        pattern = data[at : at + period]
        if data[next_start : at + period * TIMES] == pattern * (TIMES - 1):
            times = TIMES
            while data[at + times * period : at + (times + 1) * period] == pattern:
                times += 1
            return period, times
    return None


def printable(data, at):
    """How many characters of text start at `at`."""
    end = at
    while end < len(data) and 32 <= data[end] < 127:
        end += 1
    return end - at


def quoted(data):
    """A string. Neither quote is left bare, so that a shell takes the text between single quotes."""
    special = {34: '\\"', 92: "\\\\", 39: "\\x27"}
    return '"' + "".join(special.get(byte, chr(byte)) for byte in data) + '"'


def expressions(data):
    """The words for some bytes that do not end with zeroes; None: a gap of so many zeroes."""
    at = 0
    while at < len(data):
        run = run_length(data, at)
        text = printable(data, at)
        if data[at] == 0 and run >= GAP:
            yield run, None
            at += run
        elif run >= RUN:
            yield run, f"{data[at]}*{run}"
            at += run
        elif (found := repeats(data, at)) and data[at : at + found[0]].count(0) < found[0]:
            period, times = found
            inner = " ".join(word for _, word in plain(data[at : at + period]))
            yield period * times, f"({inner})*{times}"
            at += period * times
        elif text >= TEXT:
            yield text, quoted(data[at : at + text])
            at += text
        else:
            yield 1, str(data[at])
            at += 1


def plain(data):
    """The words for a few bytes, without repeats."""
    at = 0
    while at < len(data):
        text = printable(data, at)
        length = text if text >= TEXT else 1
        yield length, quoted(data[at : at + text]) if text >= TEXT else str(data[at])
        at += length


def words(fd, size):
    """The words of the whole disk."""
    # Where the next expression would be written.
    here = 0
    for start, data in chunks(fd, size):
        at = start
        for length, word in expressions(data.rstrip(b"\0")):
            if word is not None:
                if at != here:
                    yield f"@{at:#x}"
                yield word
                here = at + length
            at += length


def lines(all_words):
    """The words in lines, each offset at the start of one."""
    line = ""
    for word in all_words:
        if line and (word.startswith("@") or len(line) + len(word) >= WIDTH):
            yield line
            line = ""
        line += (" " if line else "") + word
    if line:
        yield line


def main():
    parser = argparse.ArgumentParser(description="Turn a disk image into the language of nbdkit's data plugin.")
    parser.add_argument("--text", action="store_true", help="print the text for data= instead of a command line")
    parser.add_argument("image", help="a file or block device")
    arguments = parser.parse_args()
    try:
        fd = os.open(arguments.image, os.O_RDONLY | os.O_CLOEXEC)
        size = os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        raise SystemExit(f"disk2data: {arguments.image}: {error.strerror}")
    try:
        if arguments.text:
            for line in lines(words(fd, size)):
                print(line)
        else:
            print("nbdkit data '")
            for line in lines(words(fd, size)):
                print(f"  {line}")
            print(f"  ' size={size}")
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:
        raise SystemExit(f"disk2data: {arguments.image}: {error.strerror}")


if __name__ == "__main__":
    main()
