//! The passphrase, as the value of its parameter says: itself, or where to read it.

use std::{
    ffi::OsStr,
    fs::File,
    io::{BufRead, BufReader, IsTerminal as _, Write as _},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use nbdkit_core::params;
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

/// Reads it: `-` asks at the terminal, `-FD` and `+FILE` have it in their first line.
///
/// # Errors
/// There is no such file, or no terminal.
pub(super) fn read(value: &OsStr) -> Result<Zeroizing<Vec<u8>>> {
    let file = |path: &Path| {
        let file = File::open(path).with_context(|| format!("passphrase: cannot open {}", path.display()))?;
        line(BufReader::new(file)).with_context(|| format!("passphrase: cannot read {}", path.display()))
    };
    match value.as_bytes() {
        b"-" => typed(),
        [b'-', number @ ..] => {
            let fd: u32 = params::integer("passphrase file descriptor", OsStr::from_bytes(number))?;
            ensure!(fd > 2, "passphrase: -FD cannot be stdin, stdout or stderr: open another one for it");
            file(&PathBuf::from(format!("/dev/fd/{fd}")))
        }
        [b'+', path @ ..] => file(Path::new(OsStr::from_bytes(path))),
        passphrase => Ok(passphrase.to_vec().into()),
    }
}

/// The first line, without its end.
fn line(from: impl BufRead) -> Result<Zeroizing<Vec<u8>>> {
    // It does not grow, for that would leave copies behind.
    let mut line = Zeroizing::new(Vec::with_capacity(8 << 10));
    from.take(8 << 10).read_until(b'\n', &mut line)?;
    if line.last() == Some(&b'\n') {
        line.pop();
    }
    Ok(line)
}

/// Asks at the terminal, which does not show what is typed.
fn typed() -> Result<Zeroizing<Vec<u8>>> {
    let stdin = std::io::stdin();
    ensure!(stdin.is_terminal(), "stdin is not a terminal: give the passphrase by +FILE or -FD");
    let shown = tcgetattr(&stdin)?;
    let mut hidden = shown.clone();
    hidden.local_flags.remove(LocalFlags::ECHO);
    tcsetattr(&stdin, SetArg::TCSANOW, &hidden)?;
    print!("passphrase: ");
    let typed = std::io::stdout().flush().map_err(Into::into).and_then(|()| line(stdin.lock()));
    tcsetattr(&stdin, SetArg::TCSADRAIN, &shown)?;
    println!();
    typed.context("cannot read the passphrase")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forms_but_the_terminal() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "secret\nsecond line\n").unwrap();
        let read = |value: &str| read(OsStr::new(value)).map(|line| line.to_vec());
        assert_eq!(read("plain").unwrap(), b"plain");
        assert_eq!(read(&format!("+{}", file.path().display())).unwrap(), b"secret");
        let fd = std::os::fd::AsRawFd::as_raw_fd(file.as_file());
        assert_eq!(read(&format!("-{fd}")).unwrap(), b"secret");
        for bad in ["+/nonexistent", "-0", "-x", "-99999"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
