//! Requests that hold no thread while they wait: a chain that can starts one and says later how it ended.
//!
//! A door offers a request with [`Session::submit`](crate::Session::submit); layers that only look on or shift pass
//! it down, and a plugin that can have many requests under way at once takes it. Whoever does not want it gives it
//! back, and it is run as any other. So nothing depends on its being taken.

use std::{fmt, sync::Arc};

use crate::{Errno, Error, Flags, Op, Result};

/// What to do.
#[derive(Clone, Copy, Debug)]
pub enum Io<'a> {
    /// Read so many bytes.
    Read(usize),
    /// Write these bytes. Flags: FUA.
    Write(&'a [u8], Flags),
}

impl Io<'_> {
    /// The kind of request.
    pub fn op(&self) -> Op {
        match self {
            Io::Read(_) => Op::Read,
            Io::Write(..) => Op::Write,
        }
    }

    /// How many bytes it is about.
    pub fn length(&self) -> u64 {
        match self {
            Io::Read(length) => *length as u64,
            Io::Write(data, _) => data.len() as u64,
        }
    }

    /// The flags.
    pub fn flags(&self) -> Flags {
        match self {
            Io::Read(_) => Flags::empty(),
            Io::Write(_, flags) => *flags,
        }
    }
}

/// What is to be done after some completions: replies leave together.
pub trait Flush: Send + Sync {
    /// Sends what completions have left. May wait for the client.
    fn flush(&self);
}

/// To be called after a completion; see [`Completion::complete`].
pub type Flusher = Option<Arc<dyn Flush>>;

type Done = Box<dyn FnOnce(Result<&[u8]>) -> Flusher + Send>;
type Look = Box<dyn FnOnce(Option<&Error>) + Send>;

/// The duty to say how a request ended, once. Dropping it says `EIO`; whoever offered the request and gets it back
/// [withdraws](Self::withdraw) it.
pub struct Completion {
    done: Option<Done>,
    /// The layers that look on, the innermost last.
    looks: Vec<Look>,
}

impl Completion {
    /// `done` gets the data that was read, or nothing after a write, or the error. It is called on some other thread,
    /// which has more to do: what may wait for the client is left to the [`Flush`] that it returns.
    pub fn new(done: impl FnOnce(Result<&[u8]>) -> Flusher + Send + 'static) -> Self {
        Completion { done: Some(Box::new(done)), looks: Vec::new() }
    }

    /// Lets a layer look at how it ended, before those above.
    pub fn look(&mut self, look: impl FnOnce(Option<&Error>) + Send + 'static) {
        self.looks.push(Box::new(look));
    }

    /// Takes the last [`look`](Self::look) back, for the layer below did not take the request.
    pub fn unlook(&mut self) {
        self.looks.pop();
    }

    /// Says how the request ended: with the data that was read, with nothing after a write, or with an error. The
    /// caller then flushes what it gets, once for many completions if they come together.
    #[must_use = "replies may be left to be sent by it"]
    pub fn complete(mut self, result: Result<&[u8]>) -> Flusher {
        self.finish(result)
    }

    /// Says nothing: the request was not taken, and will be run and answered in another way.
    pub fn withdraw(mut self) {
        self.done = None;
    }

    fn finish(&mut self, result: Result<&[u8]>) -> Flusher {
        while let Some(look) = self.looks.pop() {
            look(result.as_ref().err());
        }
        self.done.take().and_then(|done| done(result))
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        if self.done.is_some() {
            let lost = Error::new(Errno::EIO, "a layer forgot about the request");
            if let Some(flush) = self.finish(Err(lost)) {
                flush.flush();
            }
        }
    }
}

impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Completion({} look on)", self.looks.len())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn it_is_told_once_and_the_innermost_layer_first() {
        let (tell, told) = channel();
        let note = |what: &'static str| {
            let tell = tell.clone();
            move |e: Option<&Error>| tell.send((what, e.map(Error::errno))).unwrap()
        };
        let done = note("door");
        let mut completion = Completion::new(move |result| {
            done(result.err().as_ref());
            None
        });
        completion.look(note("outer"));
        completion.look(note("gave it back"));
        completion.unlook();
        completion.look(note("inner"));
        assert!(completion.complete(Ok(b"data")).is_none());
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [("inner", None), ("outer", None), ("door", None)]);
    }

    #[test]
    fn one_that_is_dropped_has_failed_and_is_flushed() {
        struct Tell(std::sync::mpsc::Sender<Errno>);
        impl Flush for Tell {
            fn flush(&self) {
                self.0.send(Errno::UnknownErrno).unwrap();
            }
        }
        Completion::new(|_| panic!("it was withdrawn")).withdraw();
        let (tell, told) = channel();
        drop(Completion::new(move |result| {
            tell.send(result.unwrap_err().errno()).unwrap();
            Some(Arc::new(Tell(tell)))
        }));
        assert_eq!(told.iter().collect::<Vec<_>>(), [Errno::EIO, Errno::UnknownErrno]);
    }
}
