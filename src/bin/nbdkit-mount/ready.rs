//! The descriptor of `--ready-fd`, and the notifications of a mount to the service manager.

use std::{fs::File, io::Write, os::fd::RawFd};

use anyhow::{Context as _, Result, ensure};
use nbdkit_cli::readiness;

/// The descriptor of `--ready-fd`.
#[derive(Debug)]
pub(crate) struct ReadyFd(File);

impl ReadyFd {
    /// Takes the descriptor over. To be called once for a number, before files are opened that could get it.
    ///
    /// # Errors
    /// A number that is no open file, or that of standard input, output or error.
    pub(crate) fn take(number: RawFd) -> Result<Self> {
        ensure!(number > 2, "--ready-fd {number}: give the number of an open file from 3 up");
        let fd =
            readiness::take_fd(number).with_context(|| format!("--ready-fd {number} is not an open file"))?;
        Ok(ReadyFd(fd.into()))
    }

    /// Writes a newline and closes it.
    pub(crate) fn tell(mut self) {
        if let Err(e) = self.0.write_all(b"\n") {
            log::warn!("--ready-fd: {e}");
        }
    }
}

/// Tells the service manager, if one waits. The mount goes on without one that cannot be told.
pub(crate) fn notify(message: &str) {
    if let Err(e) = readiness::notify(message) {
        log::warn!("{e:#}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_are_not_open() {
        for number in [-1, 0, 2, 9999] {
            assert!(ReadyFd::take(number).is_err(), "{number}");
        }
    }
}
