//! Passwords and the like: as they are, from a file, from an open descriptor, or asked for.

use std::{
    ffi::OsStr,
    fs::File,
    io::{BufRead, BufReader, IsTerminal as _, Write as _},
    os::unix::ffi::OsStrExt as _,
};

use anyhow::{Context as _, ensure};

use crate::inherit::inherited;

/// The secret that a parameter stands for: the first line of `+FILE`, of descriptor `-N` or of standard input (`-`), and
/// anything else as it is.
///
/// # Errors
/// What cannot be read.
pub(crate) fn secret(key: &str, value: &OsStr) -> anyhow::Result<Vec<u8>> {
    match value.as_bytes() {
        [b'+', file @ ..] => {
            let file = OsStr::from_bytes(file);
            let open = || format!("{key}={}: cannot read {}", value.display(), file.display());
            first_line(File::open(file).with_context(open)?).with_context(open)
        }
        [b'-'] => {
            if std::io::stdin().is_terminal() {
                eprint!("{key}: ");
                let _ = std::io::stderr().flush();
            }
            first_line(std::io::stdin()).with_context(|| format!("{key}=-: cannot read standard input"))
        }
        [b'-', number @ ..] if number.iter().all(u8::is_ascii_digit) => {
            let fd = inherited(key, OsStr::from_bytes(number))?;
            first_line(File::from(fd)).with_context(|| format!("{key}={}", value.display()))
        }
        plain => Ok(plain.to_vec()),
    }
}

fn first_line(from: impl std::io::Read) -> anyhow::Result<Vec<u8>> {
    let mut line = Vec::new();
    BufReader::new(from.take(64 << 10)).read_until(b'\n', &mut line)?;
    if line.last() == Some(&b'\n') {
        line.pop();
    }
    ensure!(!line.contains(&0), "there is a zero byte in it");
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn from_a_file_or_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, "a secret\nand more").unwrap();
        let of = |text: &str| secret("password", OsStr::new(text)).map(|s| String::from_utf8(s).unwrap());
        assert_eq!(of(&format!("+{}", path.display())).unwrap(), "a secret");
        assert_eq!(of("plain").unwrap(), "plain");
        assert_eq!(of("-x").unwrap(), "-x");
        assert!(of("+/nonexistent").is_err());
        assert!(of("-77").is_err());
    }
}
