//! What may happen outside, and how to find out whether it has.

use std::{
    ffi::OsString,
    fs::File,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FileType, Mode, OFlags, fstat, open},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};

pub(super) enum Event {
    Created(PathBuf),
    Deleted(PathBuf),
    /// The end of a pipe to read from.
    PipeClosed(File),
    /// None: it had ended before.
    ProcessExits(Option<OwnedFd>),
    Script(OsString),
}

/// The exit status of a script that has seen its event.
const HAPPENED: i32 = 88;

impl Event {
    /// Nobody can write to the pipe any more whose read end is this file descriptor.
    pub(super) fn pipe(fd: u32) -> anyhow::Result<Self> {
        let cannot = || format!("exit-when-pipe-closed={fd} is not the end of a pipe to read from");
        // Opened anew, the end belongs to this filter.
        let path = format!("/proc/self/fd/{fd}");
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let end = open(path, flags, Mode::empty()).map_err(std::io::Error::from).with_context(cannot)?;
        let stat = fstat(&end).map_err(std::io::Error::from).with_context(cannot)?;
        ensure!(FileType::from_raw_mode(stat.st_mode) == FileType::Fifo, cannot());
        Ok(Event::PipeClosed(end.into()))
    }

    /// The process ends. One that takes its number afterwards is not mistaken for it.
    pub(super) fn process(pid: i32) -> anyhow::Result<Self> {
        let pid = (pid > 0)
            .then(|| Pid::from_raw(pid))
            .flatten()
            .with_context(|| format!("exit-when-process-exits={pid} is no process: its number is over 0"))?;
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => Ok(Event::ProcessExits(Some(fd))),
            Err(Errno::SRCH) => Ok(Event::ProcessExits(None)),
            Err(e) => Err(std::io::Error::from(e))
                .with_context(|| format!("cannot watch exit-when-process-exits={pid}")),
        }
    }

    /// What can be waited for, and how.
    pub(super) fn fd(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match self {
            // A hang-up is always reported.
            Event::PipeClosed(pipe) => Some((pipe.as_fd(), PollFlags::empty())),
            Event::ProcessExits(process) => Some((process.as_ref()?.as_fd(), PollFlags::IN)),
            Event::Created(_) | Event::Deleted(_) | Event::Script(_) => None,
        }
    }

    pub(super) fn has_happened(&self) -> bool {
        match self {
            Event::Created(path) => path.symlink_metadata().is_ok(),
            Event::Deleted(path) => {
                path.symlink_metadata().is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)
            }
            Event::ProcessExits(None) => true,
            Event::PipeClosed(_) | Event::ProcessExits(Some(_)) => self.fd().is_some_and(|(fd, flags)| {
                let mut fds = [PollFd::from_borrowed_fd(fd, flags)];
                let now = Timespec { tv_sec: 0, tv_nsec: 0 };
                poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
            }),
            Event::Script(script) => {
                let status = Command::new("/bin/sh").arg("-c").arg(script).stdin(Stdio::null()).status();
                match status.as_ref().map(std::process::ExitStatus::code) {
                    Ok(Some(HAPPENED)) => return true,
                    Ok(Some(0)) => {}
                    Ok(_) => {
                        let status = status.map(|status| status.to_string()).unwrap_or_default();
                        log::error!("exit-when-script: the command ended with {status}: use 0 or {HAPPENED}");
                    }
                    Err(e) => log::error!("exit-when-script: cannot run the command: {e}"),
                }
                false
            }
        }
    }
}
