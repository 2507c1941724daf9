//! Plugins that run a script in a language that the distribution brings.

use std::fs;

use super::*;

/// A script for the plugin; DISK is a file of 100,000 bytes.
fn of<'a>(name: &'a str, script: &'a str) -> Disk<'a> {
    Disk::new(move |dir| {
        let disk = word(&crate::util::patterned(dir, "disk", 100_000));
        let path = dir.join("script");
        fs::write(&path, script.replace("DISK", &disk)).expect("write a script");
        words([plugin(name), word(&path)])
    })
    .writable()
}

#[test]
fn python() {
    let script = "
import os
API_VERSION = 2
def open(readonly):
    return os.open('DISK', os.O_RDWR)
def close(fd):
    os.close(fd)
def get_size(fd):
    return os.fstat(fd).st_size
def pread(fd, buf, offset, flags):
    assert os.preadv(fd, [buf], offset) == len(buf)
def pwrite(fd, buf, offset, flags):
    os.pwrite(fd, buf, offset)
def flush(fd, flags):
    os.fsync(fd)
";
    of("python", script).through_both_doors();
}

#[test]
fn lua() {
    let script = "
function open(readonly)
  return io.open('DISK', 'r+b')
end
function close(f)
  f:close()
end
function get_size(f)
  return f:seek('end')
end
function pread(f, count, offset)
  f:seek('set', offset)
  return f:read(count)
end
function pwrite(f, buf, offset)
  f:seek('set', offset)
  f:write(buf)
end
function flush(f)
  f:flush()
end
";
    of("lua", script).through_both_doors();
}

#[test]
fn perl() {
    let script = "
use strict;
sub open { my $f; CORE::open($f, '+<', 'DISK') or die $!; binmode $f; return { f => $f }; }
sub close { CORE::close($_[0]->{f}); }
sub get_size { return -s $_[0]->{f}; }
sub pread {
  my ($h, $count, $offset, $flags) = @_;
  my $buf;
  sysseek($h->{f}, $offset, 0);
  sysread($h->{f}, $buf, $count) == $count or die;
  return $buf;
}
sub pwrite {
  my ($h, $buf, $offset, $flags) = @_;
  sysseek($h->{f}, $offset, 0);
  syswrite($h->{f}, $buf) == length $buf or die;
}
sub can_write { return 1; }
sub flush { }
1;
";
    of("perl", script).through_both_doors();
}

#[test]
fn tcl() {
    let script = "
proc plugin_open {readonly} {
    set f [open DISK r+]
    fconfigure $f -translation binary
    return $f
}
proc plugin_close {f} { close $f }
proc get_size {f} { return [file size DISK] }
proc pread {f count offset} {
    seek $f $offset
    return [read $f $count]
}
proc pwrite {f buf offset} {
    seek $f $offset
    puts -nonewline $f $buf
    flush $f
}
";
    of("tcl", script).through_both_doors();
}
