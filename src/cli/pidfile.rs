//! The pidfile: its existence says that the server is ready.

use std::{io::Write, os::unix::fs::OpenOptionsExt, path::Path};

use anyhow::{Context as _, Result};

/// Writes "PID\n" with mode 0644, under a temporary name first so that a reader never sees half of it.
///
/// # Errors
/// If the file cannot be written.
pub fn write(path: &Path) -> Result<()> {
    let text = format!("{}\n", std::process::id());
    let write_to = |file: &mut std::fs::File| file.write_all(text.as_bytes());
    let context = || format!("cannot write the pidfile {}", path.display());
    let plain = std::fs::metadata(path).map_or(true, |m| m.is_file());
    let temporary = path.with_added_extension(format!("{}.tmp", std::process::id()));
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o644);
    if !plain {
        // A device or a pipe is written to, not replaced.
        return options.open(path).and_then(|mut f| write_to(&mut f)).with_context(context);
    }
    let done = options
        .open(&temporary)
        .and_then(|mut file| write_to(&mut file))
        .and_then(|()| std::fs::rename(&temporary, path));
    if done.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    done.with_context(context)
}
