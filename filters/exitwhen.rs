//! Shuts the server down when something happens outside: it takes no more clients then, and ends after the last one.
//!
//! Events are looked for when a client comes or goes, and by a thread for the times between. The thread sleeps on what
//! the kernel can tell at once (a process, a pipe) and looks at the rest from time to time.

mod event;

use std::{
    ffi::OsStr,
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use nbdkit_core::{
    Below, Client, Errno, Error, Filter, Handle, Info, NextConfig, Open, Result, ShutdownFlag, ThreadModel,
    params,
};
use parking_lot::Mutex;
use rustix::{
    event::{PollFd, Timespec, poll},
    io::Errno as SystemError,
};

use self::event::Event;
use crate::passthrough::Passthrough;

const HELP: &str = "\
exit-when-file-created=<FILE>   End when this file is there.
exit-when-file-deleted=<FILE>   End when this file is not there.
exit-when-pipe-closed=<FD>      End when nobody can write to this pipe any more.
exit-when-process-exits=<PID>   End when this process ends.
exit-when-script=<COMMAND>      End when this shell command exits with status 88.
exit-when-poll=<SECS>           How often to look while there is no client (default 60).";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(ExitWhen { events: Vec::new(), every: Duration::from_secs(60), watch: None })
}

struct ExitWhen {
    events: Vec<Event>,
    every: Duration,
    /// From `get_ready` on, if there is an event to wait for.
    watch: Option<Arc<Watch>>,
}

/// What connections and the thread share.
struct Watch {
    events: Vec<Event>,
    every: Duration,
    state: Mutex<State>,
    /// Known from `after_fork` on, and so before any client.
    server: OnceLock<Arc<ShutdownFlag>>,
}

#[derive(Default)]
struct State {
    clients: usize,
    /// An event has happened: no more clients.
    exiting: bool,
    /// The server ends, for whatever reason.
    over: bool,
}

impl Watch {
    /// Looks for events, unless one was found before.
    fn look(&self) {
        if !self.state.lock().exiting && self.events.iter().any(Event::has_happened) {
            self.state.lock().exiting = true;
        }
    }

    /// Shuts the server down if it is time.
    fn exit_if_idle(&self) {
        let mut state = self.state.lock();
        if !state.exiting || state.clients > 0 || state.over {
            return;
        }
        state.over = true;
        drop(state);
        log::debug!("exitwhen: the event has happened and no client is left, the server shuts down");
        if let Some(server) = self.server.get() {
            server.raise();
        }
    }

    fn enter(self: &Arc<Self>, client: &Client) -> Result<()> {
        self.look();
        let mut state = self.state.lock();
        if state.exiting {
            drop(state);
            self.exit_if_idle();
            return Err(Error::new(Errno::ESHUTDOWN, "the server is about to end (exit-when-...)"));
        }
        state.clients += 1;
        drop(state);
        let watch = self.clone();
        client.gone.on_raise(move || watch.leave());
        Ok(())
    }

    fn leave(&self) {
        self.state.lock().clients -= 1;
        self.look();
        self.exit_if_idle();
    }

    /// The thread: until an event has happened or the server ends.
    fn run(&self) {
        loop {
            if self.state.lock().over {
                return;
            }
            self.look();
            self.exit_if_idle();
            if self.state.lock().exiting {
                return;
            }
            if let Err(e) = self.wait() {
                log::error!("exitwhen: cannot wait for events: {e}");
                return;
            }
        }
    }

    fn wait(&self) -> std::result::Result<(), SystemError> {
        let fds: Vec<_> = self.events.iter().filter_map(Event::fd).collect();
        let mut fds: Vec<_> = fds.iter().map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
        let timeout = Timespec::try_from(self.every).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(SystemError::INTR) => Ok(()),
            Err(e) => Err(e),
        }
    }
}

impl Filter for ExitWhen {
    fn info(&self) -> Info {
        Info::bundled("exitwhen", "nbdkit exitwhen filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        // The server leaves its directory when it goes to the background.
        let path = || {
            std::path::absolute(PathBuf::from(value))
                .with_context(|| format!("{key}='{}' is not a path", value.display()))
        };
        let event = match key {
            "exit-when-file-created" => Event::Created(path()?),
            "exit-when-file-deleted" => Event::Deleted(path()?),
            "exit-when-pipe-closed" | "exit-when-fd-closed" => Event::pipe(params::integer(key, value)?)?,
            "exit-when-process-exits" | "exit-when-pid-exits" => {
                Event::process(params::integer(key, value)?)?
            }
            "exit-when-script" => Event::Script(value.to_owned()),
            "exit-when-poll" => {
                let seconds: u32 = params::integer(key, value)?;
                ensure!(seconds > 0, "{key}=0 would look without a pause: use at least 1");
                self.every = Duration::from_secs(seconds.into());
                return Ok(());
            }
            _ => return next(key, value),
        };
        self.events.push(event);
        Ok(())
    }

    fn dump(&self) -> Vec<(String, String)> {
        ["file_created", "file_deleted", "process_exits", "pipe_closed", "script"]
            .map(|event| (format!("exitwhen_{event}"), "yes".into()))
            .into()
    }

    fn get_ready(&mut self, _: ThreadModel) -> anyhow::Result<()> {
        if !self.events.is_empty() {
            self.watch = Some(Arc::new(Watch {
                events: std::mem::take(&mut self.events),
                every: self.every,
                state: Mutex::default(),
                server: OnceLock::new(),
            }));
        }
        Ok(())
    }

    fn after_fork(&self, next: &Below) -> anyhow::Result<()> {
        if let Some(watch) = self.watch.clone() {
            let _ = watch.server.set(next.server().clone());
            std::thread::Builder::new()
                .name("exitwhen".into())
                .spawn(move || watch.run())
                .context("exitwhen: cannot start a thread")?;
        }
        Ok(())
    }

    fn cleanup(&self, _: &Below) {
        if let Some(watch) = &self.watch {
            watch.state.lock().over = true;
        }
    }

    fn preconnect(&self, next: &Below, readonly: bool) -> Result<()> {
        if let (Some(watch), Some(client)) = (&self.watch, next.client()) {
            watch.enter(client)?;
        }
        next.preconnect(readonly)
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Passthrough(next.open(open)?)))
    }
}

#[cfg(test)]
mod tests;
