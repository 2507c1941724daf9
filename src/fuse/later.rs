//! Reads and writes that wait without a thread of ours: the chain says when they have ended, and is answered there.

use std::sync::Arc;

use fuser::{ReplyData, ReplyWrite};
use nbdkit_core::{Completion, Result};

use crate::{
    answer::{Answer, Reply, Watch},
    door::{Door, errno},
    fs::Write,
    pool::Pool,
};

/// A reply that several can have: whoever ends the request, whoever runs it if nobody wants it, and the watch.
pub(crate) fn share<R: Reply>(reply: R, what: &'static str, watch: Option<&Watch>) -> Answer<R> {
    match watch {
        Some(watch) => watch.over(reply, what),
        None => Answer::shared(reply),
    }
}

/// Starts a read within a file. False: it has to be run.
pub(crate) fn read(
    pool: &Pool,
    answer: &Answer<ReplyData>,
    door: &Arc<Door>,
    offset: u64,
    length: usize,
) -> bool {
    let end = |_: &Door, reply: ReplyData, data: &[u8]| reply.data(data);
    let Some(done) = completion(pool, answer, door, end) else { return false };
    is_taken(door.submit_read(length, offset, done))
}

/// As [`read`], for a write that no other file has to be told of.
pub(crate) fn write(
    pool: &Pool,
    answer: &Answer<ReplyWrite>,
    door: &Arc<Door>,
    data: &[u8],
    write: &Write,
) -> bool {
    let length = data.len() as u32;
    let end = move |door: &Door, reply: ReplyWrite, _: &[u8]| {
        door.attributes.touch();
        reply.written(length);
    };
    let Some(done) = completion(pool, answer, door, end) else { return false };
    is_taken(door.submit_write(data, write.offset, write.synchronous, done))
}

fn completion<R: Reply>(
    pool: &Pool,
    answer: &Answer<R>,
    door: &Arc<Door>,
    end: impl FnOnce(&Door, R, &[u8]) + Send + 'static,
) -> Option<Completion> {
    let answer = answer.share()?;
    let (door, entered) = (door.clone(), pool.enter());
    Some(Completion::new(move |result: Result<&[u8]>| {
        match result {
            Ok(data) => {
                if let Some(reply) = answer.take() {
                    end(&door, reply, data);
                }
            }
            Err(e) => answer.fail(errno(&e)),
        }
        // The mount may end after this, with everything that is in it.
        drop(door);
        drop(entered);
        None
    }))
}

fn is_taken(back: Option<Completion>) -> bool {
    back.map(Completion::withdraw).is_none()
}
