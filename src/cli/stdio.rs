//! Standard input and output: the user's while the program starts, the `--run` command's or the client's afterwards.
//!
//! From `after_fork` on a layer that prints, or reads, must reach neither, so the program's own point to /dev/null then.

use std::{
    fs::File,
    io::Write as _,
    os::fd::{AsFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};

/// What standard input and output were when the program was started. Closed in commands, unless they are handed on.
#[derive(Debug)]
pub struct Stdio {
    /// Standard input.
    pub input: OwnedFd,
    /// Standard output.
    pub output: OwnedFd,
}

impl Stdio {
    /// Takes both, after what has been printed so far was written. The program's own point to /dev/null from now on.
    ///
    /// # Errors
    /// If /dev/null cannot be opened, or no descriptor is left.
    pub fn take() -> Result<Self> {
        // Nobody may be there to read it.
        let _ = std::io::stdout().flush();
        nbdkit_loader::flush_stdio();
        let (stdin, stdout) = (std::io::stdin(), std::io::stdout());
        let taken = Stdio {
            input: stdin.as_fd().try_clone_to_owned()?,
            output: stdout.as_fd().try_clone_to_owned()?,
        };
        let null =
            File::options().read(true).write(true).open("/dev/null").context("cannot open /dev/null")?;
        nix::unistd::dup2_stdin(&null)?;
        nix::unistd::dup2_stdout(&null)?;
        Ok(taken)
    }
}
