//! What is stored through a shared mapping waits in the kernel, where no front end sees it. Writes by another way and
//! questions for holes must not go past it.

use std::path::Path;

use super::two_front_ends::both;
use crate::util::{Mount, image, nbdsh, run, sh, temp};

/// Runs a Python script with the file's path in `path`.
fn python(path: &Path, script: &str) {
    let script = format!("path = {:?}\n{script}", path.to_str().expect("UTF-8"));
    run(["python3", "-c", &script]).ok();
}

#[test]
fn a_write_over_nbd_and_a_store_in_the_same_page_both_stay() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 1 << 20);
    let disk = disk.to_str().expect("UTF-8");
    for words in [
        &["memory", "1M"][..],
        &["file", disk],
        &["file", disk, "cache=none"],
        &["--filter=cow", "file", disk],
        &["--filter=noparallel", "memory", "1M", "serialize=all-requests"],
    ] {
        let (mount, uri, _dir) = both(words);
        nbdsh(
            &uri,
            &format!(
                "
import mmap, os
fd = os.open({:?}, os.O_RDWR)
m = mmap.mmap(fd, 1 << 20)
for i in range(200):
    at, stored, sent = i * 4096, bytes([1 + i]), bytes([255 - i]) * 64
    m[at + 10:at + 11] = stored
    [lambda: h.pwrite(sent, at + 2000), lambda: h.pwrite(sent, at + 2000, nbd.CMD_FLAG_FUA),
     lambda: h.zero(64, at + 2000)][i % 3]()
    expected = bytes(64) if i % 3 == 2 else sent
    assert h.pread(64, at + 2000) == expected, ('lost', i)
    assert m[at + 2000:at + 2064] == expected, ('stale', i)
    m.flush()
    assert h.pread(1, at + 10) == stored, ('the store was lost', i)
# Of many pages, large enough to be spliced where nobody looks.
m[0:1 << 20] = b'm' * (1 << 20)
h.pwrite(b'w' * 300000, 100100)
assert h.pread(300000, 100100) == b'w' * 300000
m.flush()
assert h.pread(1 << 20, 0) == b'm' * 100100 + b'w' * 300000 + b'm' * ((1 << 20) - 400100)
",
                mount.file()
            ),
        );
    }
}

/// A store needs its page, and that is not read while a write of the page is under way elsewhere.
#[test]
fn stores_without_end_undo_no_write() {
    let (mount, uri, _dir) = both(&["memory", "1M"]);
    nbdsh(
        &uri,
        &format!(
            "
import subprocess, sys
store = '''
import mmap, os, sys
m = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 1 << 20)
print('ready', flush=True)
while True:
    for i in range(8):
        m[i * 4096] = (m[i * 4096] + 1) & 255
'''
child = subprocess.Popen([sys.executable, '-c', store, {:?}], stdout=subprocess.PIPE)
assert child.stdout.readline() == b'ready\\n'
try:
    for i in range(4000):
        at, sent = i % 8 * 4096 + 2000, bytes([i & 255]) * 64
        h.pwrite(sent, at)
        assert h.pread(64, at) == sent, ('lost', i)
finally:
    child.kill()
    child.wait()
",
            mount.file()
        ),
    );
}

#[test]
fn a_write_to_a_partition_and_a_store_to_the_disk_both_stay() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 8 << 20);
    sh(&format!("printf 'label: dos\\n2048,8192,83\\n' | sfdisk -q {}", disk.display()));
    for words in [&[][..], &["-t", "1"], &["--cache=none"], &["--filter=noparallel"]] {
        let mount = Mount::start(
            ["--partitions"].iter().chain(words).copied().chain(["file", disk.to_str().expect("UTF-8")]),
        );
        for (mapped, written, skew) in [("nbd", "nbd1", 1 << 20), ("nbd1", "nbd", -(1 << 20))] {
            python(
                mount.path(),
                &format!(
                    "
import mmap, os
fd = os.open(path + '/{mapped}', os.O_RDWR)
other = os.open(path + '/{written}', os.O_RDWR)
m = mmap.mmap(fd, 0)
for i in range(200):
    at = max({skew}, 0) + i * 4096
    stored, sent = bytes([1 + i]), bytes([255 - i]) * 64
    m[at + 10:at + 11] = stored
    os.pwrite(other, sent, at + 2000 - {skew})
    if i % 10 == 0:
        os.fsync(other)
    assert m[at + 2000:at + 2064] == sent, ('lost', i)
    assert os.pread(other, 64, at + 2000 - {skew}) == sent, ('lost', i)
    m.flush()
    assert os.pread(other, 1, at + 10 - {skew}) == stored, ('the store was lost', i)
"
                ),
            );
        }
    }
}

/// Writers at both files, on neighbouring sectors: none of them is lost, and none waits for ever.
#[test]
fn writers_at_a_disk_and_its_partition() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 8 << 20);
    sh(&format!("printf 'label: dos\\n2048,8192,83\\n' | sfdisk -q {}", disk.display()));
    let mount = Mount::start(["--partitions", "file", disk.to_str().expect("UTF-8")]);
    python(
        mount.path(),
        "
import os, threading
failed = []
def write(name, skew, lane):
    try:
        fd = os.open(path + '/' + name, os.O_RDWR)
        for i in range(1500):
            at = (1 << 20) + i % 50 * 4096 + lane * 512 - skew
            data = bytes([i & 255, lane]) * 256
            os.pwrite(fd, data, at)
            assert os.pread(fd, 512, at) == data, (name, i)
    except BaseException as e:
        failed.append(e)
lanes = [threading.Thread(target=write, args=('nbd1' if lane % 2 else 'nbd', lane % 2 << 20, lane))
         for lane in range(6)]
[t.start() for t in lanes]
[t.join() for t in lanes]
assert not failed, failed
",
    );
}

/// Copies that leave out holes have what another process has written and the kernel still keeps.
#[test]
fn what_the_kernel_keeps_is_data_and_takes_space() {
    let store = "m = mmap.mmap(fd, 0)\nfor at in places: m[at:at + 5000] = data";
    let write = "for at in places: os.pwrite(fd, data, at)";
    for (words, change) in [
        (&["--cache=writeback"][..], write),
        (&["--cache=writeback"], store),
        (&["--cache=writeback", "-t", "1"], write),
        (&["--cache=writeback", "--timeout=30"], write),
        (&[], store),
        (&["--cache=none"], store),
        (&["--filter=cow"], store),
    ] {
        let mount = Mount::start(words.iter().copied().chain(["memory", "64M"]));
        python(
            &mount.file(),
            &format!(
                "
import errno, mmap, os, subprocess, tempfile
before = os.stat(path).st_blocks
assert before == 0
fd = os.open(path, os.O_RDWR)
places, data = [3 << 20, (20 << 20) + 123, (40 << 20) - 2500], b'kept!' * 1000
{change}
assert os.stat(path).st_blocks > 0
other = os.open(path, os.O_RDONLY)
at, found = 0, []
while True:
    try:
        at = os.lseek(other, at, os.SEEK_DATA)
    except OSError as e:
        assert e.errno == errno.ENXIO
        break
    hole = os.lseek(other, at, os.SEEK_HOLE)
    found.append(range(at, hole))
    at = hole
for place in places:
    assert any(place in r and place + 4999 in r for r in found), found
with tempfile.TemporaryDirectory() as copies:
    for tool in [['cp', '--sparse=auto', path, copies + '/copy'],
                 ['tar', '-C', os.path.dirname(path), '-cSf', copies + '/tar', os.path.basename(path)]]:
        for at in places: {again}
        subprocess.run(tool, check=True)
    subprocess.run(['tar', '-C', copies, '-xf', copies + '/tar'], check=True)
    subprocess.run(['cmp', path, copies + '/copy'], check=True)
    subprocess.run(['cmp', path, copies + '/' + os.path.basename(path)], check=True)
# When nobody can change it any more, it is as sparse as the disk.
if 'm' in globals(): m.close()
os.close(fd)
assert os.stat(path).st_blocks < 1000, os.stat(path).st_blocks
",
                again = if change == store { "m[at:at + 5000] = data" } else { "os.pwrite(fd, data, at)" },
            ),
        );
    }
}
