//! Handing an unchanged file to the kernel: reads then go to it with no server in between.
//!
//! Only for mounts that are read-only. The kernel lets a write through such a handle pass the end of the file that we
//! promise, and so would let anyone grow the disk image; nor does it keep writers that it serves itself and readers
//! that we serve apart. A file that others make shorter meanwhile gives an error when it is closed, since the kernel gives
//! none when it is read.

use fuser::{BackingId, Errno, InitFlags, KernelConfig, ReplyOpen};
use log::debug;
use nbdkit_core::{Loan, Session, sync::Mutex};

/// Layers of file systems below ours that the kernel allows at most: the image may lie on an overlay.
const MAX_STACK_DEPTH: u32 = 2;

/// Whether files are handed to the kernel, and the handle once there is one.
#[derive(Debug)]
pub(crate) enum Passthrough {
    /// No.
    Off,
    /// Yes; all opens of the file share one handle, which lives as long as the mount.
    On(Mutex<State>),
}

#[derive(Debug)]
pub(crate) enum State {
    /// Nobody has opened the file.
    Untried,
    /// The kernel has the file.
    Ready(BackingId),
    /// The kernel did not want it.
    Refused,
}

/// Asks the kernel for the feature.
pub(crate) fn negotiate(config: &mut KernelConfig) -> bool {
    let has = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
        && config.set_max_stack_depth(MAX_STACK_DEPTH).is_ok();
    if !has {
        debug!("passthrough: off, the kernel has none");
    }
    has
}

impl Passthrough {
    /// Decides for a session; the reason goes to the debug log.
    pub(crate) fn decide(wanted: bool, session: &Session) -> Self {
        match reason_against(wanted, session) {
            Some(reason) => {
                debug!("passthrough: off, {reason}");
                Passthrough::Off
            }
            None => Passthrough::On(Mutex::new(State::Untried)),
        }
    }

    /// Answers an open with a handle of the kernel's; gives the reply back when that cannot be.
    pub(crate) fn open(&self, session: &Session, reply: ReplyOpen) -> Result<(), ReplyOpen> {
        let Passthrough::On(state) = self else { return Err(reply) };
        let mut state = state.lock();
        if matches!(*state, State::Untried) {
            *state = match unwatched(session).map(|loan| reply.open_backing(loan.fd)) {
                Some(Ok(id)) => {
                    debug!("passthrough: on");
                    State::Ready(id)
                }
                Some(Err(e)) => {
                    debug!("passthrough: off, the kernel does not take the file: {e}");
                    State::Refused
                }
                None => State::Refused,
            };
        }
        match &*state {
            State::Ready(id) => {
                reply.opened_passthrough(fuser::FileHandle(0), fuser::FopenFlags::empty(), id);
                Ok(())
            }
            _ => Err(reply),
        }
    }

    /// Whether the kernel may read the file by itself.
    pub(crate) fn is_on(&self) -> bool {
        matches!(self, Passthrough::On(_))
    }

    /// Checks, when somebody closes the file, that it has not become shorter. The kernel ends a read there as if it were
    /// the end of the disk, so this is the last chance to say that bytes were missing: cp(1) and others look at what
    /// close(2) returns.
    pub(crate) fn check(&self, session: &Session) -> Result<(), Errno> {
        let Passthrough::On(state) = self else { return Ok(()) };
        if !matches!(*state.lock(), State::Ready(_)) {
            return Ok(());
        }
        let size = session.whole_file().and_then(|(loan, _)| rustix::fs::fstat(loan.fd).ok());
        let size = size.map_or(0, |stat| stat.st_size.cast_unsigned());
        if size >= session.size() {
            return Ok(());
        }
        log::error!(
            "the image has become shorter, {size} bytes instead of {}: what was read of it is not all",
            session.size()
        );
        Err(Errno::EIO)
    }
}

/// The file that holds the whole disk, if no layer has to see the requests.
fn unwatched(session: &Session) -> Option<Loan<'_>> {
    session.whole_file().and_then(|(loan, watched)| (!watched).then_some(loan))
}

/// Why the kernel may not have the file; None: it may.
fn reason_against(wanted: bool, session: &Session) -> Option<String> {
    if !wanted {
        return Some("not wanted".into());
    }
    if session.caps().write {
        return Some("the mount is writable".into());
    }
    if !rustix::process::geteuid().is_root() {
        return Some("only root may".into());
    }
    let Some(loan) = unwatched(session) else {
        return Some("the chain has to see the requests".into());
    };
    if loan.offset != 0 {
        return Some(format!("the disk starts at byte {} of the file", loan.offset));
    }
    match rustix::fs::fstat(loan.fd) {
        Ok(stat) if u64::try_from(stat.st_size).is_ok_and(|size| size == session.size()) => None,
        Ok(stat) => Some(format!("the file has {} bytes and the disk {}", stat.st_size, session.size())),
        Err(e) => Some(format!("the file tells no size: {e}")),
    }
}
