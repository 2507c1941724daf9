//! What `<FILE` and `<(SCRIPT)` stand for.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read, Seek as _, SeekFrom, Write as _},
    ops::Range,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use nbdkit_core::Error;
use rustix::fs::MemfdFlags;

use super::value::{Value, size_in_range};

/// Up to here, data is kept as bytes.
const SMALL: u64 = 4096;

/// A range of a file, or as much of it as there is. Regular files are read only when the disk is made; others, and those
/// of no size, as /proc has them, at once.
///
/// # Errors
/// Those of the system, with the name.
pub(super) fn file(path: &Path, range: Range<u64>) -> Result<Value> {
    let fail = |e: io::Error| Error::from(e).context(path.display());
    let mut file = File::open(path).map_err(fail)?;
    let metadata = file.metadata().map_err(fail)?;
    if metadata.is_file() && metadata.len() > 0 {
        let end = range.end.min(metadata.len());
        let from = range.start.min(end);
        return Ok(Value::file(file, from, end - from));
    }
    // A pipe cannot seek.
    if file.seek(SeekFrom::Start(range.start)).is_err() {
        io::copy(&mut Read::by_ref(&mut file).take(range.start), &mut io::sink()).map_err(fail)?;
    }
    keep(file.take(range.end - range.start)).with_context(|| path.display().to_string())
}

/// The output of a shell script, up to `limit` bytes of it. It may fail where there is a limit, since it may have been
/// ended by that.
///
/// # Errors
/// Those of the system, and the failure of a script without a limit.
pub(super) fn script(script: &OsStr, limit: Option<u64>, stdin: Stdio) -> Result<Value> {
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(script).stdin(stdin).stdout(Stdio::piped());
    let cannot = |what: &str, e: io::Error| Error::from(e).context(format!("data parameter: cannot {what}"));
    let mut child = command.spawn().map_err(|e| cannot("run /bin/sh", e))?;
    let output = child.stdout.take().context("no output")?;
    let value = keep(output.take(limit.unwrap_or(u64::MAX)));
    // The pipe is closed by now, which ends a script that has more to say.
    let status = child.wait().map_err(|e| cannot("wait for a script", e))?;
    ensure!(
        status.success() || limit.is_some(),
        "data parameter: external command failed ({status}): {}",
        script.display()
    );
    value.context("data parameter: cannot read the output of a script")
}

/// Reads all there is; in a file in memory, if it is much.
fn keep(mut input: impl Read) -> Result<Value> {
    let fail = |e: io::Error| Error::from(e);
    let mut start = Vec::new();
    Read::by_ref(&mut input).take(SMALL).read_to_end(&mut start).map_err(fail)?;
    if start.len() < SMALL as usize {
        return Ok(Value::bytes(&start));
    }
    let memory = rustix::fs::memfd_create("nbdkit-data", MemfdFlags::CLOEXEC);
    let memory = memory.map_err(|e| fail(e.into()))?;
    let mut memory = File::from(memory);
    memory.write_all(&start).map_err(fail)?;
    let rest = io::copy(&mut input, &mut memory).map_err(fail)?;
    Ok(Value::file(memory, 0, size_in_range(SMALL.checked_add(rest))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: &Value) -> Vec<u8> {
        let mut bytes = vec![0; value.size() as usize];
        value.write(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn parts_of_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "hello").unwrap();
        for (range, want) in
            [(0..u64::MAX, "hello"), (1..3, "el"), (3..9, "lo"), (5..9, ""), (7..9, ""), (2..2, "")]
        {
            assert_eq!(read(&file(&path, range.clone()).unwrap()), want.as_bytes(), "{range:?}");
        }
        let none = file(Path::new("/nonexistent"), 0..1).err().unwrap();
        assert!(format!("{none:#}").starts_with("/nonexistent: No such file"), "{none:#}");
    }

    #[test]
    fn what_has_no_size_is_read() {
        assert_eq!(read(&file(Path::new("/dev/zero"), 5..100_000).unwrap()), [0; 99_995]);
        assert!(file(Path::new("/proc/self/status"), 0..u64::MAX).unwrap().size() > 100);
    }

    #[test]
    fn scripts() {
        let run = |text: &str, limit| script(OsStr::new(text), limit, Stdio::null());
        assert_eq!(read(&run("echo hi", None).unwrap()), b"hi\n");
        assert_eq!(read(&run("yes | head -c 100000", None).unwrap()), b"y\n".repeat(50_000));
        assert_eq!(read(&run("yes", Some(10_000)).unwrap()), b"y\n".repeat(5000));
        assert_eq!(read(&run("echo hi; exit 3", Some(1)).unwrap()), b"h");
        let failed = run("exit 3", None).err().unwrap().to_string();
        assert!(failed.contains("external command failed") && failed.contains("exit 3"), "{failed}");
    }
}
