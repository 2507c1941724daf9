//! A client whose bytes are all there at once: no socket, no thread of its own. This is what fuzz targets and embedders
//! that record a conversation use.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use nbdkit_core::{Chain, Client, Peer, ShutdownFlag};
use nbdkit_dispatch::Awake;
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{
    Config, connection,
    stream::{Interest, Ready, Stream},
};

/// More replies than that, in bytes, are not taken.
const OUTPUT_MAX: usize = 64 << 20;

/// Serves a client that has said all of `input` and then nothing more. Returns what it was answered.
pub fn converse(chain: &Arc<Chain>, config: &Config, input: &[u8]) -> Vec<u8> {
    let stream = Arc::new(Conversation {
        input: Mutex::new(Input { bytes: input.to_vec(), at: 0 }),
        output: Mutex::default(),
    });
    let client = Arc::new(Client::new(1, Peer::Other, Arc::new(ShutdownFlag::new())));
    let connection: Arc<dyn Stream> = stream.clone();
    connection::run(chain, config, &client, &connection, "memory", Awake::default());
    std::mem::take(&mut *stream.output.lock())
}

struct Conversation {
    input: Mutex<Input>,
    output: Mutex<Vec<u8>>,
}

struct Input {
    bytes: Vec<u8>,
    at: usize,
}

impl Stream for Conversation {
    fn recv(&self, buf: &mut [u8], _: bool) -> io::Result<usize> {
        let mut input = self.input.lock();
        let rest = &input.bytes[input.at..];
        let length = rest.len().min(buf.len());
        buf[..length].copy_from_slice(&rest[..length]);
        input.at += length;
        Ok(length)
    }

    fn send(&self, buf: &[u8], _: bool) -> io::Result<usize> {
        let mut output = self.output.lock();
        if output.len() + buf.len() > OUTPUT_MAX {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        output.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn wait(&self, interest: Interest<'_>, timeout: Option<Duration>) -> io::Result<Ready> {
        let Interest { read, write, wake, .. } = interest;
        let Some(wake) = wake.filter(|_| !read && !write) else {
            return Ok(Ready { read, write, ..Ready::default() });
        };
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let left =
                left.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
            let mut fds = [PollFd::from_borrowed_fd(wake, PollFlags::IN)];
            match poll(&mut fds, left.as_ref()) {
                Ok(ready) => return Ok(Ready { woken: ready > 0, ..Ready::default() }),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn close_input(&self) {
        let mut input = self.input.lock();
        input.at = input.bytes.len();
    }

    fn close(&self) {
        self.close_input();
    }
}
