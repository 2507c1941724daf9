//! Pauses all requests on command, through a socket, to take a snapshot of what is below.

mod gate;

use std::{
    ffi::OsStr,
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, ensure};
use nbdkit_core::{
    Below, Call, Client, Filter, Handle, Info, Next, NextConfig, NextConfigComplete, Open, Outcome, Request,
    Result, ThreadModel,
};
use rustix::net::{Shutdown, shutdown};

use self::gate::Gate;

const HELP: &str = "pause-control=<SOCKET>   The Unix socket for commands: p pauses, r resumes (required).";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Pause { path: None, control: None, gate: Arc::default() })
}

struct Pause {
    /// Absolute, since the server leaves its directory when it goes to the background.
    path: Option<PathBuf>,
    control: Option<Control>,
    gate: Arc<Gate>,
}

/// The socket for commands. Dropping it ends the thread that listens, and removes it.
struct Control {
    path: PathBuf,
    listener: Arc<UnixListener>,
}

impl Control {
    fn bind(path: &Path) -> anyhow::Result<Self> {
        let listener = UnixListener::bind(path).or_else(|e| {
            // What a server left that was killed is in nobody's use.
            let left = e.kind() == std::io::ErrorKind::AddrInUse
                && UnixStream::connect(path)
                    .is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused);
            if left && std::fs::remove_file(path).is_ok() { UnixListener::bind(path) } else { Err(e) }
        });
        let listener =
            listener.with_context(|| format!("cannot listen on pause-control='{}'", path.display()))?;
        Ok(Control { path: path.to_owned(), listener: Arc::new(listener) })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Ends the accept in the thread.
        let _ = shutdown(&*self.listener, Shutdown::Both);
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Takes callers until the listener is shut down.
fn listen(listener: &UnixListener, gate: &Arc<Gate>) {
    while let Ok((caller, _)) = listener.accept() {
        let gate = gate.clone();
        let answering = std::thread::Builder::new().name("pause".into()).spawn(move || {
            if let Err(e) = answer(caller, &gate) {
                log::debug!("pause: the caller is gone: {e}");
            }
        });
        if let Err(e) = answering {
            log::error!("pause: cannot start a thread: {e}");
        }
    }
}

/// Does what a caller says, and answers each command with one byte when it is done.
fn answer(mut caller: UnixStream, gate: &Gate) -> std::io::Result<()> {
    let mut command = [0];
    while caller.read(&mut command)? > 0 {
        let done = match command[0] {
            b'p' => {
                gate.pause();
                b'P'
            }
            b'r' => {
                gate.resume();
                b'R'
            }
            // Commands typed by hand end in a newline.
            b'\n' | b'\r' | b'\t' | b' ' => continue,
            _ => b'X',
        };
        caller.write_all(&[done])?;
    }
    Ok(())
}

impl Filter for Pause {
    fn info(&self) -> Info {
        Info::bundled("pause", "nbdkit pause filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        if key != "pause-control" {
            return next(key, value);
        }
        let path = std::path::absolute(PathBuf::from(value))
            .with_context(|| format!("pause-control='{}' is not a path", value.display()))?;
        self.path = Some(path);
        Ok(())
    }

    fn config_complete(&mut self, next: &mut NextConfigComplete<'_>) -> anyhow::Result<()> {
        ensure!(self.path.is_some(), "the pause filter needs pause-control=SOCKET");
        next()
    }

    fn get_ready(&mut self, _: ThreadModel) -> anyhow::Result<()> {
        if let Some(path) = &self.path {
            self.control = Some(Control::bind(path)?);
        }
        Ok(())
    }

    fn after_fork(&self, _: &Below) -> anyhow::Result<()> {
        if let Some(control) = &self.control {
            let (listener, gate) = (control.listener.clone(), self.gate.clone());
            std::thread::Builder::new()
                .name("pause".into())
                .spawn(move || listen(&listener, &gate))
                .context("pause: cannot start a thread")?;
        }
        Ok(())
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        let gate = self.gate.clone();
        open.client.gone.on_raise({
            let gate = gate.clone();
            move || gate.wake()
        });
        Ok(Box::new(Pausable { gate, client: open.client.clone(), next }))
    }
}

struct Pausable {
    gate: Arc<Gate>,
    client: Arc<Client>,
    next: Next,
}

impl Handle for Pausable {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        // A client may take any time to use a loan, and would hold up a pause.
        if request.may_lend() {
            return Outcome::NeedsThread;
        }
        let inside = if request.may_wait() {
            match self.gate.enter(&self.client) {
                Ok(inside) => inside,
                Err(e) => return Outcome::Done(Err(e)),
            }
        } else {
            let Some(inside) = self.gate.enter_nowait() else { return Outcome::NeedsThread };
            inside
        };
        let outcome = self.next.watch(self, request, inside.ticket());
        if matches!(outcome, Outcome::Started(_)) {
            inside.stay();
        }
        outcome
    }

    fn ended(&self, _: &Call, ticket: u64, _: &mut Result<()>) {
        self.gate.leave(ticket);
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::{Completed, Completions, Errno, Flags, Op, Session, Task};
    use parking_lot::Mutex;

    use super::*;
    use crate::testing::{
        Disk, Spec, View, chain, client, config_error, lent, needs_thread, open, read_inline,
    };

    struct Server {
        dir: tempfile::TempDir,
        disk: Disk,
        chain: Arc<nbdkit_core::Chain>,
    }

    impl Server {
        fn new() -> Self {
            Self::over(Spec::default())
        }

        fn over(spec: Spec) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let disk = spec.disk();
            let path = dir.path().join("control");
            let params = [("pause-control", path.to_str().unwrap())];
            let chain = chain(&disk, &["pause"], &params).unwrap();
            Server { dir, disk, chain }
        }

        fn session(&self) -> Session {
            open(&self.chain, client(), false).unwrap()
        }

        fn caller(&self) -> UnixStream {
            let caller = UnixStream::connect(self.dir.path().join("control")).unwrap();
            caller.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
            caller
        }

        fn say(&self, commands: &[u8]) -> Vec<u8> {
            let mut caller = self.caller();
            caller.write_all(commands).unwrap();
            caller.shutdown(std::net::Shutdown::Write).unwrap();
            let mut answer = Vec::new();
            caller.read_to_end(&mut answer).unwrap();
            answer
        }
    }

    #[test]
    fn model() {
        let dir = tempfile::tempdir().unwrap();
        // The same socket for one server after the other.
        let path = dir.path().join("control");
        let params = [("pause-control", path.to_str().unwrap())];
        crate::testing::check_model(&["pause"], &params, 20_000, &View::same(20_000));
    }

    #[test]
    fn commands_are_answered() {
        let server = Server::new();
        assert_eq!(server.say(b"p"), b"P");
        assert_eq!(server.say(b"r\n"), b"R");
        assert_eq!(server.say(b" p\tp r?R"), b"PPRXX");
        assert_eq!(server.say(b"r"), b"R");
        assert_eq!(server.say(b""), b"");
    }

    #[test]
    fn requests_wait_until_they_may_go_on() {
        let server = Server::new();
        let session = server.session();
        assert_eq!(server.say(b"p"), b"P");
        assert!(!read_inline(&session, &mut [0], 0).unwrap());
        std::thread::scope(|scope| {
            let waiting = [
                scope.spawn(|| session.pread(&mut [0], 0)),
                scope.spawn(|| session.pwrite(&[0], 0, Flags::empty())),
                scope.spawn(|| session.zero(1, 0, Flags::empty())),
                scope.spawn(|| session.trim(1, 0, Flags::empty())),
                scope.spawn(|| session.flush()),
                scope.spawn(|| session.cache(1, 0)),
                scope.spawn(|| session.extents(1, 0, Flags::empty()).map(drop)),
            ];
            std::thread::yield_now();
            assert!(server.disk.calls().is_empty() && !waiting.iter().any(|thread| thread.is_finished()));
            assert_eq!(server.say(b"r"), b"R");
            for thread in waiting {
                thread.join().unwrap().unwrap();
            }
        });
        assert_eq!(server.disk.calls().len(), 7);
        assert!(read_inline(&session, &mut [0], 0).unwrap());
    }

    #[test]
    fn a_pause_begins_when_the_last_request_is_done() {
        let server = Server::new();
        let session = server.session();
        server.disk.hold();
        std::thread::scope(|scope| {
            scope.spawn(|| session.pread(&mut [0], 0).unwrap());
            server.disk.wait_inside(1);
            let paused = scope.spawn(|| server.say(b"p"));
            std::thread::yield_now();
            assert!(!paused.is_finished());
            server.disk.release();
            assert_eq!(paused.join().unwrap(), b"P");
        });
    }

    #[test]
    fn a_client_that_goes_away_ends_its_wait() {
        let server = Server::new();
        let session = server.session();
        server.say(b"p");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| session.pread(&mut [0], 0));
            session.client().gone.raise();
            assert_eq!(waiting.join().unwrap().unwrap_err().errno(), Errno::ESHUTDOWN);
        });
        assert!(server.disk.calls().is_empty());
    }

    #[test]
    fn while_it_is_paused_all_need_a_thread_and_nothing_is_ever_lent() {
        let server = Server::new();
        let session = server.session();
        let lent = || lent(&session, Op::Read, 0, 512).or_else(|| lent(&session, Op::Write, 0, 512));
        assert!(!needs_thread(&session, Op::Flush) && lent().is_none());
        assert_eq!(server.say(b"p"), b"P");
        for op in [Op::Read, Op::Write, Op::Flush, Op::Trim, Op::Zero, Op::Cache, Op::Extents] {
            assert!(needs_thread(&session, op), "{op:?}");
        }
        assert!(lent().is_none());
    }

    #[test]
    fn a_pause_begins_when_what_was_started_has_ended() {
        let server = Server::over(Spec { later: true, ..Spec::default() });
        let session = server.session();
        let (ends, ended) = std::sync::mpsc::channel();
        let mut task = Task::new(Arc::new(Ends(Mutex::new(ends))));
        task.arm(0);
        let mut read = [0];
        let mut request = Request::read(&mut read, 0).startable(task);
        assert!(matches!(session.submit(&mut request), Outcome::Started(_)));
        let mut completed = ended.recv().unwrap();
        std::thread::scope(|scope| {
            let paused = scope.spawn(|| server.say(b"p"));
            while read_inline(&session, &mut [0], 0).unwrap() {
                std::thread::yield_now();
            }
            // It has closed the gate. If it did not wait, it would end now.
            for _ in 0..1000 {
                std::thread::yield_now();
            }
            assert!(!paused.is_finished(), "the request has not gone back through the filter");
            session.finish(&mut completed);
            assert_eq!(paused.join().unwrap(), b"P");
        });
    }

    /// A front end that takes what has ended from a channel.
    struct Ends(Mutex<std::sync::mpsc::Sender<Completed>>);

    impl Completions for Ends {
        fn post(&self, completed: Completed) -> bool {
            self.0.lock().send(completed).unwrap();
            false
        }

        fn wake(&self) {}
    }

    #[test]
    fn the_socket_goes_with_the_server_and_stays_while_another_uses_it() {
        let server = Server::new();
        let path = server.dir.path().join("control");
        let error = config_error("pause", &[("pause-control", path.to_str().unwrap())]);
        assert!(error.contains("cannot listen on pause-control='"), "{error}");
        assert_eq!(server.say(b"p"), b"P", "the other one was not removed");
        let Server { dir, chain, .. } = server;
        drop(chain);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "what was left by a server that was killed");
        drop(Control::bind(&path).unwrap());
        drop(dir);
    }

    #[test]
    fn the_socket_is_required() {
        assert!(config_error("pause", &[]).contains("needs pause-control=SOCKET"));
    }
}
