//! Refuses to start with a closed standard input, output or error.
//!
//! With one of them closed, the first file that is opened takes its number, and an error message would be written
//! into a disk. Rust's runtime fills the gap with /dev/null before `main`, so whether there was one has
//! to be seen before the runtime starts: this module's function runs from the ELF initialisers.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};

static CLOSED: AtomicBool = AtomicBool::new(false);

extern "C" fn look() {
    for fd in 0..3 {
        // SAFETY: the number is only asked about, not used as a file.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        if rustix::io::fcntl_getfd(fd).is_err() {
            CLOSED.store(true, Ordering::Relaxed);
        }
    }
}

// SAFETY: the section holds pointers to functions of this type, which the loader calls once before main; the
// function makes system calls and stores to an atomic, and needs nothing of the runtime.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

/// Fails if one of the three was closed when the process started.
///
/// # Errors
/// Then.
pub fn check() -> anyhow::Result<()> {
    anyhow::ensure!(
        !CLOSED.load(Ordering::Relaxed),
        "stdin, stdout or stderr is closed: open all three, to /dev/null if need be"
    );
    Ok(())
}
