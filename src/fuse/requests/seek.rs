//! Questions for data and holes. What the kernel keeps of a file and has not written yet is data, although the chain
//! knows nothing of it: where somebody may have changed pages, it is asked to write those of a hole before the hole is
//! believed.

use std::{ops::Range, sync::Arc};

use fuser::{Errno, ReplyLseek};

use super::{Requests, Shared};
use crate::{
    coherence::Stale,
    export_file::{ExportFile, Found},
    reply::Answer,
    transfer::ThreadJob,
};

/// A question on its way.
struct Seek {
    shared: Arc<Shared>,
    file: Arc<ExportFile>,
    offset: i64,
    whence: i32,
    /// The kernel keeps nothing of it.
    written: Range<u64>,
    answer: Answer<ReplyLseek>,
}

impl Requests {
    /// Answers lseek(2) for data and holes.
    pub(crate) fn seek(&self, file: &Arc<ExportFile>, offset: i64, whence: i32, reply: ReplyLseek) {
        let mut received = self.receivers.receive();
        let alone = self.serial && self.timeout.is_none();
        let found = file.seek(offset, whence, alone);
        let answer = match found {
            Some(found) if !is_doubtful(file, &found, &(0..0)) => {
                return Answer::Own(reply).give(found.at, ReplyLseek::offset);
            }
            _ => self.answer("extents", reply),
        };
        received.handed_over();
        let (shared, file) = (self.shared.clone(), file.clone());
        let seek = Seek { shared, file, offset, whence, written: 0..0, answer };
        match found {
            Some(found) => seek.write(found.hole),
            None => seek.run_on_thread(),
        }
    }
}

/// Whether the hole that an answer relies on may be none.
fn is_doubtful(file: &ExportFile, found: &Found, written: &Range<u64>) -> bool {
    let hole = &found.hole;
    let known = written.start <= hole.start && hole.end <= written.end;
    file.may_be_kept() && !hole.is_empty() && !known
}

impl Seek {
    fn run_on_thread(self) {
        let shared = self.shared.clone();
        shared.run_on_thread(ThreadJob::Other(Box::new(move || self.run())));
    }

    fn run(self) {
        if !self.answer.is_open() {
            return;
        }
        match self.file.seek(self.offset, self.whence, true) {
            Some(found) if is_doubtful(&self.file, &found, &self.written) => self.write(found.hole),
            Some(found) => self.answer.give(found.at, ReplyLseek::offset),
            None => self.answer.give(Err(Errno::EIO), |_, ()| ()),
        }
    }

    /// Has the kernel write what it keeps of a hole, and asks again.
    fn write(mut self, hole: Range<u64>) {
        let kept = Stale { file: self.file.ino, range: hole.clone() };
        self.written = hole;
        self.shared.clone().volume.coherence.launder(kept, move || self.run_on_thread());
    }
}
