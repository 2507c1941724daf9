//! Runs a program to its end: feeds its input, collects its output, and kills it when its result is not wanted any more.
//!
//! All three pipes are served in one loop, so neither side can wait for the other for ever. What is kept of the output
//! is bounded. The program has ended when its process has and its standard output is closed: a process that it leaves
//! in the background must send its output elsewhere, one that it waits for need not.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn},
    sys::signal::{SigSet, Signal as NixSignal},
};
use rustix::{
    buffer::spare_capacity,
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{OFlags, fcntl_setfl},
    io::{Errno, read, write},
    pipe::{PipeFlags, fcntl_setpipe_size, pipe_with},
    process::{
        Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, kill_process_group, pidfd_open, waitid,
    },
};

use super::alarm::Patience;

/// How much is kept of what goes to standard error.
const MAX_STDERR: usize = 64 << 10;
/// What a pipe holds unless it is asked to hold more, and the most that is asked for.
const PIPE: usize = 64 << 10;
const MAX_PIPE: usize = 1 << 20;
/// How long a program has to end after SIGTERM.
const TERMINATION: Duration = Duration::from_millis(500);
/// How long the kernel has to end a program after SIGKILL.
const KILLING: Duration = Duration::from_secs(5);

/// Where standard output goes.
#[derive(Debug)]
pub(crate) enum Output<'a> {
    /// It fills the buffer.
    Into(&'a mut [u8]),
    /// It is kept, up to this number of bytes.
    Kept(usize),
    /// Nobody is interested.
    Ignored,
}

/// A program to run, and how.
#[derive(Debug)]
pub(crate) struct Job<'a> {
    /// The path of the program, and all its words from the zeroth on.
    pub(crate) program: &'a CStr,
    pub(crate) words: &'a [&'a CStr],
    pub(crate) environment: &'a [CString],
    pub(crate) input: Option<&'a [u8]>,
    pub(crate) output: Output<'a>,
    /// Without a terminal: in a process group of its own, that can be ended as a whole.
    pub(crate) own_group: bool,
    pub(crate) patience: Patience<'a>,
}

/// What came of a program.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) how: How,
    /// What it printed, unless that went into a buffer.
    pub(crate) stdout: Vec<u8>,
    /// How many bytes that was.
    pub(crate) printed: usize,
    /// It printed more, and was ended.
    pub(crate) too_much: bool,
    /// The beginning of what it said on standard error.
    pub(crate) stderr: Vec<u8>,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// By itself, with this code.
    Exited(i32),
    /// By this signal.
    Killed(i32),
    /// It was not wanted any more and did not end in time.
    GivenUp,
}

/// Runs a program. Its standard input is empty unless something is given.
///
/// # Errors
/// If it cannot be started.
pub(crate) fn run(job: Job<'_>, null: BorrowedFd<'_>) -> io::Result<Ended> {
    let start = Instant::now();
    if job.patience.deadline(start).is_some_and(|deadline| deadline <= start) {
        return Ok(Ended {
            how: How::GivenUp,
            stdout: Vec::new(),
            printed: 0,
            too_much: false,
            stderr: Vec::new(),
        });
    }
    let expected = match &job.output {
        Output::Into(buf) => buf.len(),
        Output::Kept(_) | Output::Ignored => 0,
    };
    let (stdin, feed) = match job.input {
        Some(bytes) => {
            let (ours, theirs) = pipe(bytes.len(), Side::Write)?;
            (Some(theirs), Some((ours, bytes)))
        }
        None => (None, None),
    };
    let (stdout, their_stdout) = pipe(expected, Side::Read)?;
    let (stderr, their_stderr) = pipe(0, Side::Read)?;
    let theirs = [stdin.as_ref().map_or(null, AsFd::as_fd), their_stdout.as_fd(), their_stderr.as_fd()];
    let child = Child::spawn(&job, theirs)?;
    drop((stdin, their_stdout, their_stderr));
    let conversation = Conversation {
        child,
        feed,
        stdout: Some(stdout),
        stderr: Some(stderr),
        output: job.output,
        kept: Vec::new(),
        printed: 0,
        too_much: false,
        errors: Vec::new(),
    };
    conversation.finish(start, &job.patience)
}

enum Side {
    Read,
    Write,
}

/// A pipe for about `expected` bytes: our side, which never blocks, and the program's.
fn pipe(expected: usize, ours: Side) -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    let (ours, theirs) = match ours {
        Side::Read => (reader, writer),
        Side::Write => (writer, reader),
    };
    fcntl_setfl(&ours, OFlags::NONBLOCK)?;
    if expected > PIPE {
        // There is a limit for all pipes of a user; a smaller one does as well, only slower.
        let _ = fcntl_setpipe_size(&ours, expected.next_power_of_two().min(MAX_PIPE));
    }
    Ok((ours, theirs))
}

/// A running program, never left as a zombie.
#[derive(Debug)]
struct Child {
    pid: Pid,
    pidfd: OwnedFd,
    own_group: bool,
    how: Option<How>,
}

impl Child {
    fn spawn(job: &Job<'_>, standard: [BorrowedFd<'_>; 3]) -> io::Result<Self> {
        let mut actions = PosixSpawnFileActions::init()?;
        for (fd, number) in standard.iter().zip(0..) {
            actions.add_dup2(fd.as_raw_fd(), number)?;
        }
        let mut attributes = PosixSpawnAttr::init()?;
        // Programs expect signals to be as they are for those started by a shell; here some are blocked and one ignored.
        let mut flags = PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF;
        attributes.set_sigmask(&SigSet::empty())?;
        attributes.set_sigdefault(&[NixSignal::SIGPIPE].into_iter().collect())?;
        if job.own_group {
            flags |= PosixSpawnFlags::POSIX_SPAWN_SETPGROUP;
            attributes.set_pgroup(nix::unistd::Pid::from_raw(0))?;
        }
        attributes.set_flags(flags)?;
        let pid = posix_spawn(job.program, &actions, &attributes, job.words, job.environment)?;
        let pid = Pid::from_raw(pid.as_raw()).ok_or(Errno::SRCH)?;
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Child { pid, pidfd, own_group: job.own_group, how: None }),
            Err(e) => {
                let _ = rustix::process::kill_process(pid, Signal::KILL);
                let _ = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED);
                Err(e.into())
            }
        }
    }

    fn kill(&self, signal: Signal) {
        // It may have ended this moment: then there is nothing to do.
        let _ = match self.own_group {
            true => kill_process_group(self.pid, signal),
            false => rustix::process::pidfd_send_signal(&self.pidfd, signal),
        };
    }

    /// Looks whether it has ended.
    fn look(&mut self) -> io::Result<()> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        self.how = waitid(WaitId::PidFd(self.pidfd.as_fd()), options)?.map(how);
        Ok(())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.how.is_none() {
            self.kill(Signal::KILL);
            let fds = &mut [PollFd::new(&self.pidfd, PollFlags::IN)];
            let _ = poll(fds, timespec(KILLING).as_ref());
            if self.look().is_err() || self.how.is_none() {
                log::error!("the kernel does not end process {}", self.pid.as_raw_nonzero());
            }
        }
    }
}

fn how(status: WaitIdStatus) -> How {
    match status.exit_status() {
        Some(code) => How::Exited(code),
        None => How::Killed(status.terminating_signal().unwrap_or_default()),
    }
}

fn timespec(duration: Duration) -> Option<Timespec> {
    duration.try_into().ok()
}

struct Conversation<'a> {
    child: Child,
    feed: Option<(OwnedFd, &'a [u8])>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    output: Output<'a>,
    kept: Vec<u8>,
    printed: usize,
    too_much: bool,
    errors: Vec<u8>,
}

/// What is polled.
#[derive(Clone, Copy)]
enum Event {
    Child,
    Feed,
    Stdout,
    Stderr,
    Alarm,
}

impl Conversation<'_> {
    /// Talks until the program has ended or is given up.
    fn finish(mut self, start: Instant, patience: &Patience<'_>) -> io::Result<Ended> {
        while self.child.how.is_none() || self.stdout.is_some() {
            let deadline = patience.deadline(start);
            let wait = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if self.too_much || wait.is_some_and(|wait| wait.is_zero()) {
                self.give_up()?;
                break;
            }
            for event in self.wait(patience, wait)? {
                match event {
                    Event::Child => self.child.look()?,
                    Event::Feed => self.feed()?,
                    Event::Stdout => self.take()?,
                    Event::Stderr => self.listen()?,
                    Event::Alarm => {}
                }
            }
        }
        // Its output is in the pipe; other processes that hold the pipe open are not waited for.
        self.listen()?;
        Ok(Ended {
            how: self.child.how.unwrap_or(How::GivenUp),
            stdout: std::mem::take(&mut self.kept),
            printed: self.printed,
            too_much: self.too_much,
            stderr: std::mem::take(&mut self.errors),
        })
    }

    /// Waits until something can be done.
    fn wait(&self, patience: &Patience<'_>, time: Option<Duration>) -> io::Result<Vec<Event>> {
        let mut events = Vec::with_capacity(6);
        let mut fds = Vec::with_capacity(6);
        let mut add = |event, fd, flags| {
            events.push(event);
            fds.push(PollFd::from_borrowed_fd(fd, flags));
        };
        if self.child.how.is_none() {
            add(Event::Child, self.child.pidfd.as_fd(), PollFlags::IN);
        }
        if let Some((fd, _)) = &self.feed {
            add(Event::Feed, fd.as_fd(), PollFlags::OUT);
        }
        if let Some(fd) = &self.stdout {
            add(Event::Stdout, fd.as_fd(), PollFlags::IN);
        }
        if let Some(fd) = &self.stderr {
            add(Event::Stderr, fd.as_fd(), PollFlags::IN);
        }
        for fd in patience.fds() {
            add(Event::Alarm, fd, PollFlags::IN);
        }
        match poll(&mut fds, time.and_then(timespec).as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let ready = fds.iter().map(|fd| !fd.revents().is_empty());
        Ok(events.into_iter().zip(ready).filter(|(_, ready)| *ready).map(|(event, _)| event).collect())
    }

    /// Writes to its standard input, which is closed when all is written or nobody reads any more.
    fn feed(&mut self) -> io::Result<()> {
        let Some((fd, rest)) = &mut self.feed else { return Ok(()) };
        match write(fd, rest) {
            Ok(n) => *rest = rest.get(n..).unwrap_or_default(),
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            // Whether that is an error is for the program to say, with its exit code.
            Err(Errno::PIPE) => *rest = &[],
            Err(e) => return Err(e.into()),
        }
        if rest.is_empty() {
            self.feed = None;
        }
        Ok(())
    }

    /// Reads from its standard output.
    fn take(&mut self) -> io::Result<()> {
        let Some(fd) = &self.stdout else { return Ok(()) };
        let mut rest = [0; 4096];
        let (room, got) = match &mut self.output {
            Output::Into(buf) if self.printed < buf.len() => (true, read(fd, &mut buf[self.printed..])),
            Output::Kept(limit) if self.printed < *limit => {
                self.kept.reserve((*limit - self.printed).min(PIPE));
                (true, read(fd, spare_capacity(&mut self.kept)))
            }
            Output::Ignored => (true, read(fd, &mut rest)),
            Output::Into(_) | Output::Kept(_) => (false, read(fd, &mut rest[..1])),
        };
        match got {
            Ok(0) => self.stdout = None,
            Ok(n) if room => self.printed += n,
            Ok(_) => self.too_much = true,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        Ok(())
    }

    /// Reads what there is on its standard error and keeps the beginning.
    fn listen(&mut self) -> io::Result<()> {
        let mut buf = [0; 4096];
        while let Some(fd) = &self.stderr {
            match read(fd, &mut buf) {
                Ok(0) => self.stderr = None,
                Ok(n) => {
                    let room = MAX_STDERR - self.errors.len();
                    self.errors.extend_from_slice(&buf[..n.min(room)]);
                    // The others have their turn.
                    if self.child.how.is_none() || room == 0 {
                        break;
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Ends the program and whatever it has started.
    fn give_up(&mut self) -> io::Result<()> {
        self.feed = None;
        self.stdout = None;
        if self.child.how.is_none() {
            self.child.kill(Signal::TERM);
            let fds = &mut [PollFd::new(&self.child.pidfd, PollFlags::IN)];
            poll(fds, timespec(TERMINATION).as_ref())?;
            // Before it is waited for: until then its process group cannot be somebody else's.
            self.child.kill(Signal::KILL);
            let fds = &mut [PollFd::new(&self.child.pidfd, PollFlags::IN)];
            poll(fds, timespec(KILLING).as_ref())?;
            self.child.look()?;
            if self.child.how.is_none() {
                log::error!("the kernel does not end process {}", self.child.pid.as_raw_nonzero());
            }
        }
        self.child.how = Some(How::GivenUp);
        Ok(())
    }
}
