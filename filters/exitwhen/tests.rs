use std::{
    os::fd::AsRawFd as _,
    process::{Command, Stdio},
};

use nbdkit_core::{Chain, Connection, Peer};
use rustix::event::PollFlags;

use super::*;
use crate::testing::{Spec, View, chain, check_model, config_error};

struct Server {
    chain: Arc<Chain>,
}

impl Server {
    fn new(key: &str, value: &str) -> Self {
        let chain = chain(&Spec::default().disk(), &["exitwhen"], &[(key, value)]).unwrap();
        Server { chain }
    }

    fn connect(&self) -> Result<Connection> {
        self.chain.connect(Arc::new(Client::new(1, Peer::Local, self.chain.server().clone())), false)
    }

    fn stops(&self) -> bool {
        self.chain.server().is_raised()
    }

    /// With two clients, makes the event happen: no more come in, and the server stops with the last one.
    fn check(self, happen: impl FnOnce()) {
        drop(self.connect().unwrap());
        assert!(!self.stops(), "nothing has happened");
        let (first, second) = (self.connect().unwrap(), self.connect().unwrap());
        happen();
        assert_eq!(self.connect().unwrap_err().errno(), Errno::ESHUTDOWN);
        drop(first);
        assert!(!self.stops(), "one client is left");
        drop(second);
        assert!(self.stops());
        self.chain.cleanup();
    }
}

#[test]
fn model() {
    check_model(&["exitwhen"], &[], 20_000, &View::same(20_000));
}

#[test]
fn a_file_is_created() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stop");
    Server::new("exit-when-file-created", path.to_str().unwrap())
        .check(|| std::fs::write(&path, "").unwrap());
}

#[test]
fn a_file_is_deleted() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_owned();
    Server::new("exit-when-file-deleted", path.to_str().unwrap()).check(|| file.close().unwrap());
}

#[test]
fn a_pipe_is_closed() {
    let (read, write) = std::io::pipe().unwrap();
    Server::new("exit-when-pipe-closed", &read.as_raw_fd().to_string()).check(|| {
        drop(write);
        // A process that another test is about to start may still hold a copy.
        let mut fds = [PollFd::new(&read, PollFlags::empty())];
        poll(&mut fds, None).unwrap();
    });
}

#[test]
fn a_process_exits() {
    let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let server = Server::new("exit-when-process-exits", &child.id().to_string());
    server.check(|| {
        drop(child.stdin.take());
        child.wait().unwrap();
    });
}

#[test]
fn a_script_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stop");
    let script = format!("test ! -e '{}' || exit 88", path.display());
    Server::new("exit-when-script", &script).check(|| std::fs::write(&path, "").unwrap());
}

#[test]
fn a_script_that_fails_says_nothing() {
    for script in ["exit 1", "exit 87", "exit 89", "kill -9 $$"] {
        assert!(!Event::Script(script.into()).has_happened(), "{script}");
    }
    assert!(Event::Script("exit 88".into()).has_happened());
}

#[test]
fn an_event_is_not_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stop");
    let server = Server::new("exit-when-file-created", path.to_str().unwrap());
    let inside = server.connect().unwrap();
    std::fs::write(&path, "").unwrap();
    server.connect().unwrap_err();
    std::fs::remove_file(&path).unwrap();
    server.connect().unwrap_err();
    drop(inside);
    assert!(server.stops());
}

#[test]
fn what_happened_before_counts() {
    let dir = tempfile::tempdir().unwrap();
    let watch = Watch {
        events: vec![Event::Deleted(dir.path().join("never"))],
        every: Duration::from_secs(1),
        state: Mutex::default(),
        server: OnceLock::from(Arc::new(ShutdownFlag::new())),
    };
    watch.run();
    assert!(watch.server.get().unwrap().is_raised());
    let mut child = Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    assert!(Event::process(pid).unwrap().has_happened());
}

#[test]
fn the_thread_hears_of_pipes_and_processes_at_once() {
    let (read, write) = std::io::pipe().unwrap();
    let fd = u32::try_from(read.as_raw_fd()).unwrap();
    let server = Arc::new(ShutdownFlag::new());
    let watch = Arc::new(Watch {
        events: vec![Event::pipe(fd).unwrap()],
        every: Duration::from_secs(100_000),
        state: Mutex::default(),
        server: OnceLock::from(server.clone()),
    });
    let thread = std::thread::spawn(move || watch.run());
    drop(write);
    thread.join().unwrap();
    assert!(server.is_raised());
}

#[test]
fn values_that_cannot_be_are_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let fd = file.as_file().as_raw_fd().to_string();
    for (key, value, message) in [
        ("exit-when-poll", "0", "use at least 1"),
        ("exit-when-poll", "x", "could not parse number 'x'"),
        ("exit-when-pipe-closed", fd.as_str(), "is not the end of a pipe"),
        ("exit-when-pipe-closed", "999999", "is not the end of a pipe"),
        ("exit-when-process-exits", "0", "is no process"),
        ("exit-when-process-exits", "-1", "is no process"),
    ] {
        let error = config_error("exitwhen", &[(key, value)]);
        assert!(error.contains(message), "{key}={value}: {error}");
    }
}
