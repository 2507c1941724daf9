//! A server that the plugin runs: it gets a listening socket as systemd would pass it (sd_listen_fds(3)), so it is ready as
//! soon as it runs, and nobody else can reach it.

use std::{
    ffi::{CString, OsStr, OsString},
    fmt,
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::{ffi::OsStrExt as _, net::UnixListener},
    },
    path::PathBuf,
    time::Instant,
};

use anyhow::{Context as _, ensure};
use nbdkit_core::{Errno, Error, Result, sync::Mutex};
use nix::{
    fcntl::OFlag,
    spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn},
    sys::{
        signal::{SigSet, Signal as NixSignal},
        stat::Mode,
    },
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid},
};

use super::target::unix;

/// The first descriptor that is passed.
const FIRST: i32 = 3;
/// How long the server has to end after it was asked to, before it is killed.
const GRACE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
/// The shell knows the process ID that the server will have, and where the words of the command are relative to.
const SCRIPT: &std::ffi::CStr =
    c"cd \"$1\" && shift && command -v \"$1\" > /dev/null || exit 127; export LISTEN_PID=$$; exec \"$@\"";

/// See the module.
#[derive(Debug)]
pub(super) struct Command {
    words: Vec<OsString>,
    directory: PathBuf,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    pidfd: OwnedFd,
    /// With the socket.
    directory: tempfile::TempDir,
    /// How it ended, once it did.
    ended: Option<String>,
}

impl Command {
    /// `words` are the program and its arguments.
    ///
    /// # Errors
    /// There is no current directory.
    pub(super) fn new(words: Vec<OsString>) -> anyhow::Result<Self> {
        ensure!(words.first().is_some_and(|program| !program.is_empty()), "command= needs a program");
        let directory = std::env::current_dir().context("cannot find the current directory")?;
        Ok(Command { words, directory, running: Mutex::new(None) })
    }

    /// Starts the server, unless it runs.
    ///
    /// # Errors
    /// It cannot be started.
    pub(super) fn start(&self) -> Result<()> {
        let mut running = self.running.lock();
        if running.is_some() {
            return Ok(());
        }
        let started = self.spawn().map_err(|e| {
            Error::new(Errno::ENOTCONN, format!("cannot run {}: {e:#}", self.words[0].display()))
        })?;
        *running = Some(started);
        Ok(())
    }

    fn spawn(&self) -> anyhow::Result<Running> {
        let directory = tempfile::Builder::new().prefix("nbdkit").tempdir()?;
        let listener = UnixListener::bind(directory.path().join("nbd"))?;
        let mut actions = PosixSpawnFileActions::init()?;
        // What we have there may be a client's.
        actions.add_open(0, c"/dev/null", OFlag::O_RDONLY, Mode::empty())?;
        actions.add_dup2(2, 1)?;
        actions.add_dup2(listener.as_raw_fd(), FIRST)?;
        let mut attributes = PosixSpawnAttr::init()?;
        attributes.set_sigmask(&SigSet::empty())?;
        attributes.set_sigdefault(&[NixSignal::SIGPIPE].into_iter().collect())?;
        // A ^C at the terminal is ours alone: what is in flight is to be written first.
        attributes.set_pgroup(nix::unistd::Pid::from_raw(0))?;
        attributes.set_flags(
            PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK
                | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF
                | PosixSpawnFlags::POSIX_SPAWN_SETPGROUP,
        )?;
        let shell = [c"/bin/sh".to_owned(), c"-c".to_owned(), SCRIPT.to_owned(), c"sh".to_owned()];
        let words = std::iter::once(self.directory.as_os_str()).chain(self.words.iter().map(|w| &**w));
        let words = shell.into_iter().map(Ok).chain(words.map(|word| CString::new(word.as_bytes())));
        let words = words.collect::<std::result::Result<Vec<_>, _>>()?;
        let ours = |name: &OsStr| name.as_bytes().starts_with(b"LISTEN_");
        let environment = std::env::vars_os()
            .filter(|(name, _)| !ours(name))
            .chain([("LISTEN_FDS".into(), "1".into())])
            .map(|(name, value)| CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()));
        let environment = environment.collect::<std::result::Result<Vec<_>, _>>()?;
        let pid = posix_spawn(c"/bin/sh", &actions, &attributes, &words, &environment)?;
        let pid = Pid::from_raw(pid.as_raw()).context("it has no process ID")?;
        Ok(Running { pidfd: pidfd_open(pid, PidfdFlags::empty())?, directory, ended: None })
    }

    /// A connection to the server, which is started if it was not.
    ///
    /// # Errors
    /// `ENOTCONN`: it cannot be started, or has ended.
    pub(super) fn connect(&self, deadline: Instant) -> Result<OwnedFd> {
        self.start()?;
        let path = match &*self.running.lock() {
            Some(running) => running.directory.path().join("nbd"),
            None => return Err(Errno::ENOTCONN.into()),
        };
        unix(&path, deadline).map_err(|e| self.fate().unwrap_or(e))
    }

    /// What has become of the server, if it has ended.
    pub(super) fn fate(&self) -> Option<Error> {
        let mut running = self.running.lock();
        let running = running.as_mut()?;
        // It closes its connections before it has ended.
        running.look(Timespec { tv_sec: 0, tv_nsec: 200_000_000 });
        let how = running.ended.as_ref()?;
        Some(Error::new(Errno::ENOTCONN, format!("{self} {how}")))
    }

    /// Ends the server.
    pub(super) fn stop(&self) {
        self.running.lock().take();
    }
}

impl Running {
    /// Looks whether it has ended, or ends within `patience`.
    fn look(&mut self, patience: Timespec) {
        if self.ended.is_some() {
            return;
        }
        let _ = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&patience));
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        if let Ok(Some(status)) = waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
            self.ended = Some(match (status.exit_status(), status.terminating_signal()) {
                (Some(127), _) => "was not found".into(),
                (Some(code), _) => format!(
                    "has ended with exit code {code}: it has to serve the socket that it is passed, as by systemd"
                ),
                (None, signal) => format!("was ended by signal {}", signal.unwrap_or_default()),
            });
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for signal in [Signal::TERM, Signal::KILL] {
            self.look(Timespec { tv_sec: 0, tv_nsec: 0 });
            if self.ended.is_some() {
                return;
            }
            let _ = pidfd_send_signal(&self.pidfd, signal);
            self.look(GRACE);
        }
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the server of command={}", self.words[0].display())
    }
}
