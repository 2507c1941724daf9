//! SIGINT, SIGTERM, SIGHUP and SIGQUIT ask for a clean end, as the end of the `--run` command does. Where a log file can be
//! opened again, SIGHUP does that instead; SIGUSR1 asks for a report.
//!
//! Both are events of one descriptor, so a thread that waits for clients can wait for them too; where the main thread
//! waits for something else, a thread does.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, OnceLock},
};

use anyhow::{Context as _, Result};
use nbdkit_core::ShutdownFlag;
use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};
use parking_lot::Mutex;
use rustix::{
    buffer::spare_capacity,
    event::{
        PollFd, PollFlags, Timespec,
        epoll::{self, CreateFlags, EventData, EventFlags},
        poll,
    },
    io::Errno,
};

use crate::logger;

/// What has the events.
static EPOLL: OnceLock<OwnedFd> = OnceLock::new();
type Hook<T> = Mutex<Option<Box<dyn FnOnce(T) + Send>>>;
/// What is done with the signal.
static ON_SIGNAL: Hook<Signal> = Mutex::new(None);
/// What makes the report.
static REPORT: Mutex<Option<Box<dyn Fn() -> String + Send>>> = Mutex::new(None);
/// What is done when the command has ended.
static ON_END: Hook<()> = Mutex::new(None);

/// The events.
const SIGNAL: u64 = 0;
const END: u64 = 1;

/// The signals that are handled.
fn set() -> SigSet {
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1].into_iter().collect()
}

/// Blocks the signals in this thread and those it starts. Call it before the first thread is started.
///
/// # Errors
/// If the kernel refuses.
pub fn block() -> Result<()> {
    set().thread_block().context("cannot block signals")
}

/// Makes an event of something to read from `fd`.
fn add(fd: impl AsFd, event: u64) -> Result<()> {
    let epoll = match EPOLL.get() {
        Some(epoll) => epoll,
        None => {
            let made = epoll::create(CreateFlags::CLOEXEC).context("cannot wait for events")?;
            EPOLL.get_or_init(|| made)
        }
    };
    // Signals may come again, until the descriptor has been read empty; a command ends once and stays readable.
    let flags = if event == SIGNAL { EventFlags::IN } else { EventFlags::IN | EventFlags::ONESHOT };
    let event = EventData::new_u64(event);
    epoll::add(epoll, fd, event, flags).context("cannot wait for events")
}

/// The first of the signals, and the end of the command. A process has one of this.
#[derive(Debug)]
pub struct Events {
    epoll: &'static OwnedFd,
    signals: SignalFd,
    stop: Arc<ShutdownFlag>,
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl Events {
    /// Events that raise `stop`. Call it in the process that stays.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn new(stop: Arc<ShutdownFlag>) -> Result<Self> {
        let signals =
            SignalFd::with_flags(&set(), SfdFlags::SFD_CLOEXEC).context("cannot wait for signals")?;
        add(&signals, SIGNAL)?;
        Ok(Events { epoll: EPOLL.get().context("there are no events")?, signals, stop })
    }

    /// Does what has to be done for an event that came, if one did.
    pub fn handle(&self) {
        let mut list = Vec::with_capacity(1);
        if epoll::wait(self.epoll, spare_capacity(&mut list), Some(&Timespec::default())).is_err() {
            return;
        }
        match list.first().map(|event| event.data.u64()) {
            Some(SIGNAL) => self.received(),
            Some(_) => {
                let hook = ON_END.lock().take();
                hook.into_iter().for_each(|hook| hook(()));
                self.stop.raise();
            }
            None => {}
        }
    }

    fn received(&self) {
        let Ok(Some(info)) = self.signals.read_signal() else { return };
        let Ok(signal) = Signal::try_from(info.ssi_signo.cast_signed()) else { return };
        match signal {
            Signal::SIGUSR1 => {
                let report = REPORT.lock().as_ref().map(|report| report());
                logger::report(
                    report.as_deref().unwrap_or("requests are not counted: --metrics counts them"),
                );
                return;
            }
            Signal::SIGHUP if logger::reopen() => return,
            _ => {}
        }
        log::debug!("received {signal}: shutting down");
        self.stop.raise();
        let hook = ON_SIGNAL.lock().take();
        hook.into_iter().for_each(|hook| hook(signal));
    }

    /// Waits for an event, at most for `timeout`.
    pub fn wait(&self, timeout: Option<&Timespec>) {
        match poll(&mut [PollFd::new(self.epoll, PollFlags::IN)], timeout) {
            Ok(_) | Err(Errno::INTR) => self.handle(),
            Err(e) => log::error!("cannot wait for signals: {e}"),
        }
    }

    /// Lets a thread handle them, for as long as the process runs.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn handle_on_thread(self) -> Result<()> {
        let handle = move || {
            loop {
                self.wait(None);
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(handle).context("cannot start a thread")?;
        Ok(())
    }
}

/// Prints what `report` returns at each SIGUSR1.
pub fn on_report(report: impl Fn() -> String + Send + 'static) {
    *REPORT.lock() = Some(Box::new(report));
}

/// Runs `hook` with the signal that comes, after the server was told to stop.
pub fn on_signal(hook: impl FnOnce(Signal) + Send + 'static) {
    *ON_SIGNAL.lock() = Some(Box::new(hook));
}

/// Runs `hook` when the process of a `pidfd` has ended, before the server is told to stop.
///
/// # Errors
/// If the kernel refuses.
pub fn on_end(pidfd: impl AsFd, hook: impl FnOnce() + Send + 'static) -> Result<()> {
    *ON_END.lock() = Some(Box::new(|()| hook()));
    add(pidfd, END)
}
