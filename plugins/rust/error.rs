//! What a method fails with: an errno for the client, an error with its text for the log.

use std::{fmt, io};

type Source = Box<dyn std::error::Error + 'static>;

/// Why a method failed.
///
/// The client gets the errno; the server logs the message, which is the [`Display`](fmt::Display) of the source.
/// The NBD protocol knows `EPERM`, `EIO`, `ENOMEM`, `EINVAL`, `ENOSPC`, `EOVERFLOW`, `ENOTSUP` and `ESHUTDOWN`; the
/// server turns any other into the nearest of them.
#[derive(Debug)]
pub struct Error {
    errno: i32,
    source: Source,
}

/// What every fallible method of a plugin returns.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error with an errno, such as `libc::ENOSPC`, and a text or another error that explains it.
    ///
    /// An errno of 0 or less says nothing: the client then gets what [`set_error`](crate::set_error) set during the
    /// call, or else `EIO`.
    ///
    /// ```
    /// let error = nbdkit::Error::new(libc::ENOSPC, "the pool is full");
    /// assert_eq!(error.errno(), libc::ENOSPC);
    /// assert_eq!(error.to_string(), "the pool is full");
    /// ```
    pub fn new<E>(errno: i32, error: E) -> Error
    where
        E: Into<Source>,
    {
        Error { errno, source: error.into() }
    }

    /// The errno that the client gets.
    pub fn errno(&self) -> i32 {
        self.errno
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.source)
    }
}

/// Keeps the errno of a failed system call; other errors get the errno nearest to their kind.
impl From<io::Error> for Error {
    fn from(error: io::Error) -> Error {
        let errno = error.raw_os_error().unwrap_or_else(|| errno_of(error.kind()));
        Error { errno, source: Box::new(error) }
    }
}

fn errno_of(kind: io::ErrorKind) -> i32 {
    use io::ErrorKind;
    match kind {
        ErrorKind::InvalidInput | ErrorKind::InvalidData => libc::EINVAL,
        ErrorKind::NotFound => libc::ENOENT,
        ErrorKind::OutOfMemory => libc::ENOMEM,
        ErrorKind::PermissionDenied => libc::EPERM,
        ErrorKind::ReadOnlyFilesystem => libc::EROFS,
        ErrorKind::StorageFull => libc::ENOSPC,
        ErrorKind::Unsupported => libc::EOPNOTSUPP,
        _ => libc::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn a_system_call_keeps_its_errno_and_text() {
        let error = Error::from(io::Error::from_raw_os_error(libc::EDQUOT));
        assert_eq!(error.errno(), libc::EDQUOT);
        assert!(error.to_string().contains("quota"), "{error}");
        assert!(error.source().expect("the I/O error").is::<io::Error>());
    }

    #[test]
    fn an_error_without_errno_gets_one_from_its_kind() {
        for (kind, errno) in [
            (io::ErrorKind::UnexpectedEof, libc::EIO),
            (io::ErrorKind::InvalidData, libc::EINVAL),
            (io::ErrorKind::StorageFull, libc::ENOSPC),
            (io::ErrorKind::Unsupported, libc::EOPNOTSUPP),
        ] {
            assert_eq!(Error::from(io::Error::new(kind, "x")).errno(), errno, "{kind:?}");
        }
    }
}
