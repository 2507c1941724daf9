//! A read or a write under way: what it is about, and how it is answered when it has ended, wherever that is.

use std::sync::Arc;

use fuser::{Errno, ReplyData, ReplyWrite};
use nbdkit_dispatch::{InlinePolicy, Job};

use crate::{
    buffer,
    export_file::ExportFile,
    reply::Answer,
    volume::{PendingWrite, Volume},
};

/// See the module.
pub(crate) struct Transfer {
    pub(crate) file: Arc<ExportFile>,
    pub(crate) offset: u64,
    pub(crate) length: usize,
    pub(crate) kind: Kind,
}

/// Which way the data goes.
pub(crate) enum Kind {
    Read(Answer<ReplyData>),
    Write(Answer<ReplyWrite>, Write),
}

/// What is peculiar to a write.
pub(crate) struct Write {
    /// It is durable when it is answered.
    pub(crate) synchronous: bool,
    /// The kernel writes pages that it kept.
    pub(crate) from_cache: bool,
    /// Other files have to be told of it.
    pub(crate) pending: Option<PendingWrite>,
}

impl Transfer {
    /// Whether there still is somebody to answer.
    fn is_open(&self) -> bool {
        match &self.kind {
            Kind::Read(answer) => answer.is_open(),
            Kind::Write(answer, _) => answer.is_open(),
        }
    }

    /// The range of the disk that it is about.
    fn on_disk(&self) -> std::ops::Range<u64> {
        self.file.on_disk(self.offset, self.length as u64)
    }

    /// Whether it is a read that has to wait for a write by another way.
    pub(crate) fn must_wait(&self, volume: &Volume) -> bool {
        volume.coherence.must_wait_to_read(self.file.disk, self.file.ino, &self.on_disk())
    }

    /// Runs a read into `buffer` on this thread, which may wait.
    pub(crate) fn read(self, volume: &Volume, policy: &InlinePolicy, buffer: &mut [u8]) {
        let mut result = Ok(());
        policy.measure(|| result = self.file.read(buffer, self.offset));
        self.end(volume, result.map(|()| &*buffer));
    }

    /// Runs a write of `data` on this thread, which may wait.
    pub(crate) fn write(self, volume: &Volume, policy: &InlinePolicy, data: &[u8]) {
        let synchronous = matches!(self.kind, Kind::Write(_, Write { synchronous: true, .. }));
        let mut result = Ok(());
        policy.measure(|| result = self.file.write(data, self.offset, synchronous));
        self.end(volume, result.map(|()| &[][..]));
    }

    /// Answers: with what was read, or how it failed.
    pub(crate) fn end(self, volume: &Volume, result: Result<&[u8], Errno>) {
        let length = self.length;
        match self.kind {
            Kind::Read(answer) => answer.give(result, |reply, data| {
                if data.len() == length { reply.data(data) } else { reply.error(Errno::EIO) }
            }),
            Kind::Write(answer, write) => {
                self.file.attributes.touch();
                let result = result.map(|_| length as u32);
                let reply = move || answer.give(result, ReplyWrite::written);
                match write.pending {
                    None => reply(),
                    Some(pending) => volume.end_write(pending, write.from_cache, reply),
                }
            }
        }
    }
}

/// A request for a thread that may wait. One whose caller was answered before it has begun is not run.
pub(crate) enum ThreadJob {
    /// With a copy of what is to be written; none for a read.
    Transfer(Transfer, Vec<u8>),
    Other(Box<dyn FnOnce() + Send>),
}

impl Job for ThreadJob {
    fn bytes(&self) -> usize {
        match self {
            ThreadJob::Transfer(transfer, _) => transfer.length,
            ThreadJob::Other(_) => 0,
        }
    }
}

impl ThreadJob {
    /// Runs it. What held the data comes back, to be used again.
    pub(crate) fn run(self, volume: &Volume, policy: &InlinePolicy) -> Vec<u8> {
        match self {
            ThreadJob::Transfer(transfer, data) => {
                match &transfer.kind {
                    _ if !transfer.is_open() => {}
                    Kind::Read(_) => {
                        let (file, range) = (&transfer.file, transfer.on_disk());
                        volume.coherence.wait_to_read(file.disk, file.ino, &range);
                        buffer::with(transfer.length, |buffer| transfer.read(volume, policy, buffer));
                    }
                    Kind::Write(..) => transfer.write(volume, policy, &data),
                }
                data
            }
            ThreadJob::Other(job) => {
                job();
                Vec::new()
            }
        }
    }
}
