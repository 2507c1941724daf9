//! One line of the log, and its parts.
//!
//! The values are quoted so that a shell reads them back: a line's parameters are assignments, which is also how a
//! script gets them. A name that a client made up can thus neither break a line nor run a command.

use std::{
    ffi::OsStr,
    fmt,
    time::{SystemTime, UNIX_EPOCH},
};

use nbdkit_core::{Errno, Error, Exports, Extents};

/// What an entry says about its action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It begins.
    Enter,
    /// It has ended.
    Leave,
    /// It happened.
    Print,
}

/// An entry. `params` are assignments, each with a space before it.
pub(super) struct Entry<'a> {
    pub(super) kind: Kind,
    pub(super) action: &'a str,
    pub(super) connection: Option<u64>,
    pub(super) id: Option<u64>,
    pub(super) params: fmt::Arguments<'a>,
}

impl fmt::Display for Entry<'_> {
    /// The line of the log file, without time and newline.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(connection) = self.connection {
            write!(f, "connection={connection} ")?;
        }
        if self.kind == Kind::Leave {
            f.write_str("...")?;
        }
        f.write_str(self.action)?;
        if let Some(id) = self.id {
            write!(f, " id={id}")?;
        }
        f.write_fmt(self.params)?;
        if self.kind == Kind::Enter {
            f.write_str(" ...")?;
        }
        Ok(())
    }
}

impl Entry<'_> {
    /// The shell variables that a script gets, as assignments.
    pub(super) fn assignments(&self) -> String {
        let kind = match self.kind {
            Kind::Enter => "ENTER",
            Kind::Leave => "LEAVE",
            Kind::Print => "PRINT",
        };
        let mut text = format!("act={} type={kind}", self.action);
        for (name, value) in [("connection", self.connection), ("id", self.id)] {
            if let Some(value) = value {
                text += &format!(" {name}={value}");
            }
        }
        text + &self.params.to_string()
    }
}

/// A time in UTC, to the microsecond.
pub(super) struct Time(pub(super) SystemTime);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = self.0.duration_since(UNIX_EPOCH).unwrap_or_default();
        let (day, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
        let (y, m, d) = date(day);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        let micros = since.subsec_micros();
        write!(f, "{y:04}-{m:02}-{d:02} {hour:02}:{minute:02}:{second:02}.{micros:06}")
    }
}

/// Year, month and day of a day since 1970-01-01 (Gregorian).
fn date(day: u64) -> (u64, u64, u64) {
    // Years are counted from 1 March, so that the leap day is the last of its year; 719,468 days lead from
    // 0000-03-01 to 1970-01-01.
    let day = day + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // Five months from March or August on have 153 days.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + next, month, day)
}

/// A string as a word of the shell.
pub(super) struct Quoted<'a>(pub(super) &'a OsStr);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0.as_encoded_bytes();
        let plain = |b: &u8| b.is_ascii_alphanumeric() || b",-./:=_".contains(b);
        match self.0.to_str() {
            Some(text) if !text.is_empty() && bytes.iter().all(plain) => f.write_str(text),
            Some(text) if !text.chars().any(char::is_control) => {
                f.write_str("\"")?;
                for c in text.chars() {
                    if matches!(c, '"' | '\\' | '$' | '`') {
                        f.write_str("\\")?;
                    }
                    write!(f, "{c}")?;
                }
                f.write_str("\"")
            }
            // Newlines and bytes that are no text: bash's own form, all in ASCII.
            _ => {
                f.write_str("$'")?;
                for &b in bytes {
                    match b {
                        b'\'' | b'\\' => write!(f, "\\{}", char::from(b))?,
                        b' '..=b'~' => write!(f, "{}", char::from(b))?,
                        _ => write!(f, "\\x{b:02x}")?,
                    }
                }
                f.write_str("'")
            }
        }
    }
}

/// A list as an array of the shell.
pub(super) struct List<'a, T>(pub(super) &'a T);

impl fmt::Display for List<'_, Exports> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(")?;
        for (i, export) in self.0.into_iter().enumerate() {
            let space = if i > 0 { " " } else { "" };
            write!(f, "{space}{}", Quoted(&export.name))?;
        }
        f.write_str(")")
    }
}

impl fmt::Display for List<'_, Extents> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(")?;
        for (i, extent) in self.0.as_slice().iter().enumerate() {
            let space = if i > 0 { " " } else { "" };
            let kind = match (extent.hole, extent.zero) {
                (true, true) => "hole,zero",
                (true, false) => "hole",
                (false, true) => "zero",
                (false, false) => "",
            };
            write!(f, "{space}{:#x} {:#x} \"{kind}\"", extent.offset, extent.length)?;
        }
        f.write_str(")")
    }
}

/// How an action ended.
pub(super) struct Outcome<'a>(pub(super) Option<&'a Error>);

impl fmt::Display for Outcome<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(error) = self.0 else {
            return f.write_str(" return=0");
        };
        // Those that NBD has one name for get it.
        let errno = match error.errno() {
            Errno::EROFS => Errno::EPERM,
            Errno::EDQUOT | Errno::EFBIG => Errno::ENOSPC,
            errno => errno,
        };
        match errno {
            Errno::EOPNOTSUPP => f.write_str(" return=-1 error=ENOTSUP"),
            errno => write!(f, " return=-1 error={errno:?}"),
        }
    }
}
