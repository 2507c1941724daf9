//! The pidfile: its existence says that the server is ready.

use std::{io::Write, path::Path};

use anyhow::{Context as _, Result};

use crate::replace;

/// Writes "PID\n" with mode 0644, less the umask. A reader never sees half of it.
///
/// # Errors
/// If the file cannot be written.
pub fn write(path: &Path) -> Result<()> {
    let text = format!("{}\n", std::process::id());
    let written = if std::fs::metadata(path).map_or(true, |m| m.is_file()) {
        replace::write(path, text.as_bytes(), 0o644)
    } else {
        // A device or a pipe is written to, not replaced.
        let file = std::fs::OpenOptions::new().write(true).open(path);
        file.and_then(|mut file| file.write_all(text.as_bytes()))
    };
    written.with_context(|| format!("cannot write the pidfile {}", path.display()))
}
