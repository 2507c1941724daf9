//! What a script's exit code and its standard error mean.

use nbdkit_core::{Client, Errno, Error, Result, ShutdownFlag};

use super::process::{Ended, How};

/// The highest exit code with a meaning of its own.
pub(super) const MAX_KNOWN_STATUS: i32 = 8;

/// The answer of a script that did not fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It did what was asked, and printed this.
    Done(Vec<u8>),
    /// It has no such method.
    Missing,
    /// "No", in a method that asks.
    No,
}

/// Something that a script wants besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    ShutDown,
    Disconnect { force: bool },
}

impl Wish {
    /// Does it. Outside any connection there is nothing to disconnect; before there is a server, the caller keeps the
    /// wish to shut it down.
    pub(super) fn fulfil(self, client: Option<&Client>, server: Option<&ShutdownFlag>) {
        match self {
            Wish::ShutDown => {
                if let Some(server) = server {
                    server.raise();
                }
            }
            Wish::Disconnect { force } => {
                if let Some(client) = client {
                    client.disconnect(force);
                }
            }
        }
    }
}

/// Splits what came of a script into its wish and its answer.
pub(super) fn judge(method: &str, ended: Ended) -> (Option<Wish>, Result<Answer>) {
    let wish = match ended.how {
        How::Exited(4 | 5) => Some(Wish::ShutDown),
        How::Exited(6) => Some(Wish::Disconnect { force: true }),
        How::Exited(7 | 8) => Some(Wish::Disconnect { force: false }),
        _ => None,
    };
    let answer = match ended.how {
        // Whatever it would have come to.
        _ if ended.too_much => Err(Error::new(
            Errno::EIO,
            format!("the {method} script printed more than the {} bytes that there may be", ended.printed),
        )),
        How::GivenUp => Err(Error::new(
            Errno::ESHUTDOWN,
            format!("the {method} script did not end in time and was killed: the client or the server stops"),
        )),
        How::Exited(0 | 4 | 7) => Ok(Answer::Done(ended.stdout)),
        How::Exited(2) => Ok(Answer::Missing),
        How::Exited(3) => Ok(Answer::No),
        How::Exited(code) => {
            // What a script that ends the server or the connection refuses, it refuses for that reason.
            let unnamed = if matches!(code, 5 | 8) { Errno::ESHUTDOWN } else { Errno::EIO };
            Err(error(&ended.stderr, unnamed, || {
                format!("the {method} script failed with exit code {code} and said nothing on stderr")
            }))
        }
        How::Killed(signal) => {
            let said = error(&ended.stderr, Errno::EIO, String::new);
            Err(Error::new(
                said.errno(),
                format!("the {method} script was killed by signal {signal}: {said}"),
            ))
        }
    };
    (wish, answer)
}

/// The errors that scripts can ask for by name.
const NAMES: [(&str, Errno); 12] = [
    ("EPERM", Errno::EPERM),
    ("EIO", Errno::EIO),
    ("ENOMEM", Errno::ENOMEM),
    ("EINVAL", Errno::EINVAL),
    ("ENOSPC", Errno::ENOSPC),
    ("EDQUOT", Errno::EDQUOT),
    ("EFBIG", Errno::EFBIG),
    ("EROFS", Errno::EROFS),
    ("EOVERFLOW", Errno::EOVERFLOW),
    ("ESHUTDOWN", Errno::ESHUTDOWN),
    ("ENOTSUP", Errno::EOPNOTSUPP),
    ("EOPNOTSUPP", Errno::EOPNOTSUPP),
];

/// Reads the first line of standard error: `ERRNO message`, where either may be missing; `unnamed` is the errno then.
fn error(stderr: &[u8], unnamed: Errno, nothing: impl FnOnce() -> String) -> Error {
    let line = stderr.split(|b| *b == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let (word, rest) = line.split_once(|c: char| c.is_ascii_whitespace()).unwrap_or((&*line, ""));
    let named = NAMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(word)).map(|(_, errno)| *errno);
    let text = if named.is_some() { rest } else { &*line };
    match (named, text.trim()) {
        (Some(errno), "") => errno.into(),
        (None, "") => Error::new(unnamed, nothing()),
        (errno, text) => Error::new(errno.unwrap_or(unnamed), text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(how: How, stderr: &str) -> Ended {
        let (stdout, stderr) = (b"out".to_vec(), stderr.into());
        Ended { how, stdout, printed: 3, too_much: false, stderr }
    }

    fn failure(how: How, stderr: &str) -> (Errno, String) {
        let error = judge("pread", ended(how, stderr)).1.unwrap_err();
        (error.errno(), error.to_string())
    }

    #[test]
    fn exit_codes() {
        let done = || Ok(Answer::Done(b"out".to_vec()));
        let code = |code| {
            let (wish, answer) = judge("pread", ended(How::Exited(code), ""));
            (wish, answer.map_err(|e| e.errno()))
        };
        assert_eq!(code(0), (None, done()));
        assert_eq!(code(1), (None, Err(Errno::EIO)));
        assert_eq!(code(2), (None, Ok(Answer::Missing)));
        assert_eq!(code(3), (None, Ok(Answer::No)));
        assert_eq!(code(4), (Some(Wish::ShutDown), done()));
        assert_eq!(code(5), (Some(Wish::ShutDown), Err(Errno::ESHUTDOWN)));
        assert_eq!(code(6), (Some(Wish::Disconnect { force: true }), Err(Errno::EIO)));
        assert_eq!(code(7), (Some(Wish::Disconnect { force: false }), done()));
        assert_eq!(code(8), (Some(Wish::Disconnect { force: false }), Err(Errno::ESHUTDOWN)));
        for other in [9, 15, 16, 127, 255] {
            assert_eq!(code(other), (None, Err(Errno::EIO)));
        }
    }

    #[test]
    fn the_first_line_names_the_error() {
        let said = |stderr| failure(How::Exited(1), stderr);
        assert_eq!(said("ENOSPC  Out of space\nmore\n"), (Errno::ENOSPC, "Out of space".into()));
        assert_eq!(said("eRofs\n"), (Errno::EROFS, Errno::EROFS.desc().into()));
        assert_eq!(said("ENOTSUP\tno"), (Errno::EOPNOTSUPP, "no".into()));
        assert_eq!(said("noise\nENOSPC foo\n"), (Errno::EIO, "noise".into()));
        assert_eq!(said("enospc:foo"), (Errno::EIO, "enospc:foo".into()));
        assert_eq!(said("EPIPE broken\n"), (Errno::EIO, "EPIPE broken".into()));
        assert_eq!(said("28 x"), (Errno::EIO, "28 x".into()));
        let (errno, text) = said("\n");
        assert!(errno == Errno::EIO && text.contains("exit code 1 and said nothing"), "{text}");
        let (errno, text) = failure(How::Killed(9), "ENOSPC full\n");
        assert!(errno == Errno::ENOSPC && text.contains("signal 9: full"), "{text}");
        assert_eq!(failure(How::GivenUp, "").0, Errno::ESHUTDOWN);
    }

    #[test]
    fn one_that_was_cut_off_printed_too_much() {
        let cut = Ended { too_much: true, ..ended(How::Killed(13), "") };
        let error = judge("pread", cut).1.unwrap_err();
        assert!(error.to_string().contains("more than the 3 bytes"), "{error}");
    }
}
