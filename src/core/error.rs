//! The error of the data path: an errno that survives every layer, with a message for people.
//!
//! `anyhow` is for configuration and life cycle; a request fails with this type, because what reaches the
//! client is the errno and, at most, one line of text.

use std::{borrow::Cow, fmt, io};

/// The errno of a failed request, as in errno(3).
pub use nix::errno::Errno;

/// The result of a request.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a request failed.
#[derive(Debug)]
pub struct Error {
    errno: Errno,
    message: Option<Cow<'static, str>>,
    logged: bool,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error with a message of its own.
    pub fn new(errno: Errno, message: impl Into<Cow<'static, str>>) -> Self {
        Error { errno, message: Some(message.into()), logged: false, source: None }
    }

    /// The errno that the client sees.
    pub fn errno(&self) -> Errno {
        self.errno
    }

    /// Puts `what` before the message; the errno stays.
    #[must_use]
    pub fn context(mut self, what: impl fmt::Display) -> Self {
        self.message = Some(Cow::Owned(match self.message {
            Some(message) => format!("{what}: {message}"),
            None => format!("{what}: {}", self.errno.desc()),
        }));
        self
    }

    /// The same error once more, without what caused it.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        Error { errno: self.errno, message: self.message.clone(), logged: self.logged, source: None }
    }

    /// Keeps the error that caused this one.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Marks an error whose message the layer itself has logged already.
    #[must_use]
    pub fn logged(mut self) -> Self {
        self.logged = true;
        self
    }

    /// Whether the message was logged already, so that it need not be again.
    pub fn is_logged(&self) -> bool {
        self.logged
    }

    /// Whether the layer said that it does not have the operation (`ENOTSUP`, `EOPNOTSUPP`), which for zero
    /// means "write zeroes instead".
    pub fn is_unsupported(&self) -> bool {
        self.errno == Errno::EOPNOTSUPP // ENOTSUP is the same number on Linux
    }
}

/// A message without the numbers that the standard library puts behind the system's errors, "(os error 2)": the words
/// before it say the same to people. Everything that the programs say passes through here.
pub fn without_numbers(message: &str) -> Cow<'_, str> {
    const START: &str = " (os error ";
    if !message.contains(START) {
        return message.into();
    }
    let mut parts = message.split(START);
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let digits = part.len() - part.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        match part[digits..].strip_prefix(')') {
            Some(rest) if digits > 0 => text += rest,
            _ => {
                text += START;
                text += part;
            }
        }
    }
    text.into()
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.message {
            Some(message) => f.write_str(&without_numbers(message)),
            None => f.write_str(self.errno.desc()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Error { errno, message: None, logged: false, source: None }
    }
}

impl From<io::Error> for Error {
    /// The errno of a system call; `EIO` where the error did not come from one.
    fn from(e: io::Error) -> Self {
        match e.raw_os_error() {
            Some(raw) => Errno::from_raw(raw).into(),
            None => Error::new(Errno::EIO, e.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_survives_context() {
        let e = Error::from(io::Error::from_raw_os_error(28)).context("pwrite").context("file");
        assert_eq!(e.errno(), Errno::ENOSPC);
        assert_eq!(e.to_string(), "file: pwrite: No space left on device");
    }

    #[test]
    fn numbers_of_errors_are_not_shown() {
        let e = io::Error::from_raw_os_error(2);
        assert_eq!(
            without_numbers(&format!("/a: {e}: {e}, b")),
            "/a: No such file or directory: No such file or directory, b"
        );
        for same in ["plain", "a (os error x)", "a (os error 2", " (os error )"] {
            assert_eq!(without_numbers(same), same);
        }
        assert_eq!(
            Error::new(Errno::EIO, format!("open: {e}")).to_string(),
            "open: No such file or directory"
        );
    }

    #[test]
    fn an_error_without_errno_is_eio() {
        assert_eq!(Error::from(io::Error::other("odd")).errno(), Errno::EIO);
    }
}
