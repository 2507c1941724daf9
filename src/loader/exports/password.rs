//! `nbdkit_read_password`: a password that is given, typed, or read from a file.

use std::{
    ffi::{CStr, c_char, c_int},
    fs::File,
    io::{BufRead, BufReader, IsTerminal, Write},
    os::fd::{FromRawFd, OwnedFd, RawFd},
    path::Path,
    ptr,
};

use anyhow::{Context as _, Result, ensure};
use nbdkit_core::params;
use nix::sys::termios::{LocalFlags, SetArg, tcgetattr, tcsetattr};

use super::{messages::error, server::stdio_is_safe, strings::allocate};
use crate::{
    panic::boundary,
    strings::{c_string, os, text},
};

/// Reads a password as the value of a parameter says. The caller frees it.
///
/// # Safety
/// A terminated string or null; room for a pointer.
#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn nbdkit_read_password(
    value: *const c_char,
    password: *mut *mut c_char,
) -> c_int {
    boundary(-1, || {
        if password.is_null() {
            error("nbdkit_read_password: there is no place for the password");
            return -1;
        }
        // SAFETY: not null, and the caller promises it.
        unsafe { password.write(ptr::null_mut()) };
        // SAFETY: the caller promises it.
        let Some(value) = (unsafe { text(value) }) else {
            error("nbdkit_read_password: there is no value");
            return -1;
        };
        match read(value) {
            Ok(line) => {
                let copy = allocate(&c_string(&line));
                // SAFETY: as above.
                unsafe { password.write(copy) };
                if copy.is_null() { -1 } else { 0 }
            }
            Err(e) => {
                error(format!("{e:#}"));
                -1
            }
        }
    })
}

fn read(value: &CStr) -> Result<Vec<u8>> {
    match value.to_bytes() {
        b"-" => typed(),
        [b'-', number @ ..] => {
            let fd: RawFd = params::integer("password file descriptor", os(&c_string(number)))?;
            ensure!(fd > 2, "password: -FD cannot be stdin, stdout or stderr: open another one for it");
            // SAFETY: the number is only asked about.
            let is_open = unsafe { nix::libc::fcntl(fd, nix::libc::F_GETFD) } != -1;
            ensure!(is_open, "password: file descriptor {fd} is not open");
            // SAFETY: it is open, and the user handed it over for this.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            line(BufReader::new(File::from(fd))).context("cannot read the password's file descriptor")
        }
        [b'+', path @ ..] => {
            let path = c_string(path);
            let path = Path::new(os(&path));
            let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
            line(BufReader::new(file)).with_context(|| format!("cannot read {}", path.display()))
        }
        password => Ok(password.to_vec()),
    }
}

/// The first line, without its end.
fn line(mut from: impl BufRead) -> Result<Vec<u8>> {
    let mut line = Vec::new();
    from.read_until(b'\n', &mut line)?;
    if line.last() == Some(&b'\n') {
        line.pop();
    }
    Ok(line)
}

/// Asks at the terminal, which does not show what is typed.
fn typed() -> Result<Vec<u8>> {
    ensure!(stdio_is_safe(), "stdin is in use: give the password by +FILE or -FD");
    let stdin = std::io::stdin();
    ensure!(stdin.is_terminal(), "stdin is not a terminal: give the password by +FILE or -FD");
    let shown = tcgetattr(&stdin)?;
    let mut hidden = shown.clone();
    hidden.local_flags.remove(LocalFlags::ECHO);
    // Before the prompt, on which a program at the other end types at once; and nothing that was typed is dropped.
    tcsetattr(&stdin, SetArg::TCSANOW, &hidden)?;
    print!("password: ");
    let typed = std::io::stdout().flush().map_err(Into::into).and_then(|()| line(stdin.lock()));
    tcsetattr(&stdin, SetArg::TCSADRAIN, &shown)?;
    println!();
    typed.context("cannot read the password")
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn the_four_forms() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"secret\nsecond line").unwrap();
        let by_name = c_string(format!("+{}", file.path().display()).as_bytes());
        assert_eq!(read(&by_name).unwrap(), b"secret");
        let fd = file.reopen().unwrap().into_raw_fd();
        assert_eq!(read(&c_string(format!("-{fd}").as_bytes())).unwrap(), b"secret");
        assert_eq!(read(c"plain").unwrap(), b"plain");
        assert_eq!(read(c"").unwrap(), b"");
        for bad in [c"-0", c"-2", c"-x", c"-98765", c"+/no/such/file"] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
    }
}
