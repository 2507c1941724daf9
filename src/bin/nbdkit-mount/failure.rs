//! What went wrong, and the exit code that says so: the codes of libfuse's own programs.

use std::fmt;

/// At which step the program failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The command line, the plugin, the filters and their parameters.
    Arguments = 1,
    /// No mountpoint was given.
    NoMountpoint = 2,
    /// The chain does not get ready, or the export does not open.
    Setup = 3,
    /// The mountpoint is not usable, or the kernel refuses the mount.
    Mount = 4,
    /// It cannot go to the background.
    Daemon = 5,
    /// Signals cannot be set up.
    Signals = 6,
    /// While it was mounted or at the end: data may be lost.
    Life = 7,
}

/// An error with its exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) stage: Stage,
    pub(crate) error: anyhow::Error,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

impl From<anyhow::Error> for Failure {
    /// Unless said otherwise, the arguments are to blame.
    fn from(error: anyhow::Error) -> Self {
        Failure { stage: Stage::Arguments, error }
    }
}

/// Says at which step an error happened.
pub(crate) trait At<T> {
    fn at(self, stage: Stage) -> Result<T, Failure>;
}

impl<T, E: Into<anyhow::Error>> At<T> for Result<T, E> {
    fn at(self, stage: Stage) -> Result<T, Failure> {
        self.map_err(|e| Failure { stage, error: e.into() })
    }
}
