//! Servers and mounts under test. Ready means that the pidfile was written: it is a FIFO here, so that a test
//! waits for the write itself.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::Read,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{CWD, FileType, Mode, mknodat},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};

/// The server under test.
pub(crate) const NBDKIT: &str = env!("CARGO_BIN_EXE_nbdkit");
/// The bridge under test.
pub(crate) const NBDKIT_MOUNT: &str = env!("CARGO_BIN_EXE_nbdkit-mount");

/// How long a program may take to start or to end.
const DEADLINE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };

/// A child that is killed when the test is over, and whose messages are shown when the test failed.
struct Process {
    child: Child,
    stderr: PathBuf,
    dir: tempfile::TempDir,
}

impl Process {
    /// Starts `program -f -P FIFO words…` and waits until it is ready.
    #[track_caller]
    fn start(program: &str, words: &[&OsStr], dir: tempfile::TempDir) -> Self {
        let fifo = dir.path().join("ready");
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("make a FIFO");
        let mut ready = File::options().read(true).write(true).open(&fifo).expect("open the FIFO");
        let stderr = dir.path().join("stderr");
        let child = Command::new(program)
            .arg("-f")
            .arg("-P")
            .arg(&fifo)
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&stderr).expect("create a file"))
            .spawn()
            .expect("start the program");
        let process = Process { child, stderr, dir };
        let pidfd = pidfd_open(process.pid(), PidfdFlags::empty()).expect("a pidfd");
        let mut fds = [PollFd::new(&ready, PollFlags::IN), PollFd::new(&pidfd, PollFlags::IN)];
        let n = poll(&mut fds, Some(&DEADLINE)).expect("poll");
        let is_ready = fds[0].revents().contains(PollFlags::IN);
        assert!(n > 0 && is_ready, "{program} {words:?} did not get ready: {}", process.stderr());
        let mut pid = [0; 16];
        let n = ready.read(&mut pid).expect("read the pidfile");
        assert_eq!(String::from_utf8_lossy(&pid[..n]), format!("{}\n", process.child.id()));
        process
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn stderr(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Sends a signal and waits for the end. Returns the exit code, or 128+N.
    #[track_caller]
    fn end(&mut self, signal: Option<Signal>) -> i32 {
        if let Some(signal) = signal {
            kill_process(self.pid(), signal).expect("kill");
        }
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).expect("a pidfd");
        let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
        let n = poll(&mut fds, Some(&DEADLINE)).expect("poll");
        assert!(n > 0, "the program does not end: {}", self.stderr());
        use std::os::unix::process::ExitStatusExt;
        let status = self.child.wait().expect("wait");
        status.code().or(status.signal().map(|n| 128 + n)).expect("a status")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- messages of the program under test ---\n{}", self.stderr());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A running nbdkit on a Unix socket.
pub(crate) struct Server {
    process: Process,
    socket: PathBuf,
}

impl Server {
    /// Starts `nbdkit -U SOCKET words…`.
    #[track_caller]
    pub(crate) fn start<S: AsRef<OsStr>>(words: impl IntoIterator<Item = S>) -> Self {
        let dir = super::temp();
        let socket = dir.path().join("sock");
        let words: Vec<OsString> = words.into_iter().map(|w| w.as_ref().to_owned()).collect();
        let mut all = vec![OsStr::new("-U"), socket.as_os_str()];
        all.extend(words.iter().map(OsString::as_os_str));
        let process = Process::start(NBDKIT, &all, dir);
        Server { process, socket }
    }

    /// The URI of the default export.
    pub(crate) fn uri(&self) -> String {
        self.uri_of("")
    }

    /// The URI of an export.
    pub(crate) fn uri_of(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    /// The socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The server's directory, for files of the test.
    pub(crate) fn dir(&self) -> &Path {
        self.process.dir.path()
    }

    /// The process ID.
    pub(crate) fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// What it has said so far.
    pub(crate) fn stderr(&self) -> String {
        self.process.stderr()
    }

    /// Sends SIGTERM and waits for the end. Returns the exit code, or 128+N.
    #[track_caller]
    pub(crate) fn terminate(&mut self) -> i32 {
        self.process.end(Some(Signal::TERM))
    }

    /// Sends a signal and waits for the end. Returns the exit code, or 128+N.
    #[track_caller]
    pub(crate) fn signal(&mut self, signal: Signal) -> i32 {
        self.process.end(Some(signal))
    }

    /// Waits until it ends by itself.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> i32 {
        self.process.end(None)
    }
}

/// A running nbdkit-mount on a directory of its own.
pub(crate) struct Mount {
    process: Process,
    mountpoint: PathBuf,
}

impl Mount {
    /// Starts `nbdkit-mount words… MOUNTPOINT`.
    #[track_caller]
    pub(crate) fn start<S: AsRef<OsStr>>(words: impl IntoIterator<Item = S>) -> Self {
        let dir = super::temp();
        let mountpoint = dir.path().join("mnt");
        std::fs::create_dir(&mountpoint).expect("make the mountpoint");
        Self::on(mountpoint, words, dir)
    }

    /// As [`start`](Self::start), on a mountpoint of the test's in `dir`.
    #[track_caller]
    pub(crate) fn on<S: AsRef<OsStr>>(
        mountpoint: PathBuf,
        words: impl IntoIterator<Item = S>,
        dir: tempfile::TempDir,
    ) -> Self {
        let mut all: Vec<OsString> = words.into_iter().map(|w| w.as_ref().to_owned()).collect();
        all.push(mountpoint.clone().into());
        let all: Vec<&OsStr> = all.iter().map(OsString::as_os_str).collect();
        let process = Process::start(NBDKIT_MOUNT, &all, dir);
        Mount { process, mountpoint }
    }

    /// The mountpoint.
    pub(crate) fn path(&self) -> &Path {
        &self.mountpoint
    }

    /// The process ID.
    pub(crate) fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// The disk.
    pub(crate) fn file(&self) -> PathBuf {
        self.mountpoint.join("nbd")
    }

    /// What it has said so far.
    pub(crate) fn stderr(&self) -> String {
        self.process.stderr()
    }

    /// Unmounts with fusermount3 and waits for the end. Returns the exit code.
    #[track_caller]
    pub(crate) fn unmount(&mut self) -> i32 {
        super::run_ok([OsStr::new("fusermount3"), OsStr::new("-u"), self.mountpoint.as_os_str()]);
        self.process.end(None)
    }

    /// Sends a signal and waits for the end. Returns the exit code, or 128+N.
    #[track_caller]
    pub(crate) fn signal(&mut self, signal: Signal) -> i32 {
        self.process.end(Some(signal))
    }

    /// Waits until it ends by itself.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> i32 {
        self.process.end(None)
    }

    /// Kills the server and leaves the mount stale.
    #[track_caller]
    pub(crate) fn kill(&mut self) {
        assert_eq!(self.process.end(Some(Signal::KILL)), 128 + 9);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Before the process is killed: a mount without a server cannot be cleared by anybody's test directory.
        let _ = Command::new("fusermount3").args(["-u", "-z", "-q"]).arg(&self.mountpoint).output();
    }
}
