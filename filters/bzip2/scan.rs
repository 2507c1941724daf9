//! Finds the blocks of a .bz2 file and how long the data of each is.
//!
//! The thread that reads cuts the file at the marks; others decode. A mark may also come up by chance within a block, once in
//! some thousand terabytes: a block that cannot be decoded is tried again together with the next.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

use nbdkit_core::{Errno, Error, Result};
use parking_lot::Mutex;

use super::{
    bits::{Finder, MARK, Mark},
    decode,
};
use crate::decompress::{Reader, Source, damaged};

/// Blocks that are remembered, at most.
const MOST_BLOCKS: usize = 8 << 20;
/// Length of a stream's header in bytes.
const HEADER: u64 = 4;
/// The longest a block can be in the file, in bytes, and more.
const MOST_COMPRESSED: usize = 2 << 20;

/// A block that was cut out: its place in the file in bits, and the bytes it is in.
struct Cut {
    number: usize,
    bits: Range<u64>,
    bytes: Vec<u8>,
}

type Answer = (Cut, Option<u64>);

/// The blocks with the lengths of their data in bytes, and their places in the file in bits.
///
/// # Errors
/// `EIO`: a block is damaged or the file is cut off; `E2BIG`: too many blocks; those of the layer below.
pub(super) fn scan(source: &Source) -> Result<Vec<(u64, Range<u64>)>> {
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let (cuts, to_decode) = sync_channel::<Cut>(workers);
    let (answers, decoded) = sync_channel(4 * workers);
    let to_decode = Mutex::new(to_decode);
    thread::scope(|scope| {
        let mut started = 0;
        for _ in 0..workers {
            let (to_decode, answers) = (&to_decode, answers.clone());
            let worker = thread::Builder::new().name("decompress".into());
            started += usize::from(worker.spawn_scoped(scope, move || work(to_decode, &answers)).is_ok());
        }
        drop(answers);
        if started == 0 {
            return Err(Error::new(Errno::EAGAIN, "there can be no thread to decompress"));
        }
        let collector = scope.spawn(move || collect(&decoded));
        let cut = cut(source, &cuts);
        drop(cuts);
        let blocks = collector.join().map_err(|_| damaged("a decoder panicked"))?;
        // Of two errors the decoder's.
        let blocks = blocks?;
        cut.map(|()| blocks)
    })
}

fn work(cuts: &Mutex<Receiver<Cut>>, answers: &SyncSender<Answer>) {
    let mut wanted = true;
    loop {
        let next = cuts.lock().recv();
        let Ok(cut) = next else { return };
        // What is not wanted any more is taken all the same, for the thread that cuts must not wait for ever.
        if wanted {
            let length = length_of(&cut);
            wanted = answers.send((cut, length)).is_ok();
        }
    }
}

fn length_of(cut: &Cut) -> Option<u64> {
    let count = (cut.bits.end - cut.bits.start) as usize;
    decode(&cut.bytes, (cut.bits.start % 8) as usize, count).ok().map(|data| data.len() as u64)
}

/// Puts the answers in order, and tries again what a mark within a block has cut in two.
fn collect(decoded: &Receiver<Answer>) -> Result<Vec<(u64, Range<u64>)>> {
    let mut waiting = BTreeMap::new();
    let mut blocks = Vec::new();
    let mut failed: Option<Cut> = None;
    let mut next = 0;
    for (cut, length) in decoded {
        waiting.insert(cut.number, (cut, length));
        while let Some((cut, length)) = waiting.remove(&next) {
            next += 1;
            match (failed.take(), length) {
                (None, Some(length)) => blocks.push((length, cut.bits)),
                (None, None) => failed = Some(cut),
                (Some(first), _) => {
                    let both = join(first, &cut);
                    let length = both.as_ref().and_then(length_of);
                    let (Some(both), Some(length)) = (both, length) else {
                        return Err(damaged(format_args!(
                            "a block is damaged, about {} bytes into the file",
                            cut.bits.start / 8
                        )));
                    };
                    blocks.push((length, both.bits));
                }
            }
        }
    }
    match failed {
        None => Ok(blocks),
        Some(cut) => {
            Err(damaged(format_args!("a block is damaged, {} bytes into the file", cut.bits.start / 8)))
        }
    }
}

/// Two blocks as one, if the second begins where the first ends.
fn join(first: Cut, second: &Cut) -> Option<Cut> {
    if first.bits.end != second.bits.start {
        return None;
    }
    let mut bytes = first.bytes;
    bytes.truncate((first.bits.end / 8 - first.bits.start / 8) as usize);
    bytes.extend(&second.bytes);
    Some(Cut { number: first.number, bits: first.bits.start..second.bits.end, bytes })
}

/// What is to come next in the file.
enum Next {
    /// A mark at this bit: a stream has begun.
    Mark(u64),
    /// The end of this block: its first bit, and the bytes from that one's on.
    EndOf(u64, Vec<u8>),
    /// From this byte on another stream, of whose header so much has come, or something else.
    Stream(u64, Vec<u8>),
}

/// Cuts the file into blocks.
fn cut(source: &Source, cuts: &SyncSender<Cut>) -> Result<()> {
    let mut reader = Reader::new(0..source.size());
    let mut finder = Finder::default();
    let mut recent = [0_u8; 8];
    let mut next = Next::Stream(0, Vec::new());
    let (mut position, mut count) = (0, 0);
    loop {
        let input = reader.fill(source)?;
        if input.is_empty() {
            break;
        }
        let length = input.len();
        for byte in input {
            recent.rotate_left(1);
            recent[7] = *byte;
            match &mut next {
                Next::EndOf(_, bytes) if bytes.len() > MOST_COMPRESSED => {
                    return Err(damaged("a block does not end"));
                }
                Next::EndOf(_, bytes) => bytes.push(*byte),
                Next::Stream(at, header) if position >= *at => {
                    header.push(*byte);
                    if header.len() == HEADER as usize {
                        if !matches!(header[..], [b'B', b'Z', b'h', b'1'..=b'9']) {
                            // What follows the last stream is not part of the disk.
                            return Ok(());
                        }
                        next = Next::Mark((*at + HEADER) * 8);
                    }
                }
                Next::Mark(at) if position * 8 > *at + MARK => return Err(no_block(*at)),
                Next::Mark(_) | Next::Stream(..) => {}
            }
            position += 1;
            let Some((at, mark)) = finder.push(*byte) else { continue };
            match next {
                Next::Mark(expected) if at != expected => return Err(no_block(at)),
                Next::Mark(_) => {}
                Next::EndOf(start, mut bytes) => {
                    bytes.truncate((at.div_ceil(8) - start / 8) as usize);
                    if cuts.send(Cut { number: count, bits: start..at, bytes }).is_err() {
                        return Ok(());
                    }
                    count += 1;
                    if count > MOST_BLOCKS {
                        let what = format!("the file has over {MOST_BLOCKS} blocks");
                        return Err(Error::new(Errno::E2BIG, what));
                    }
                }
                Next::Stream(..) => continue,
            }
            next = match mark {
                // The mark ends in this byte.
                Mark::Block => Next::EndOf(at, recent[8 - (position - at / 8) as usize..].to_vec()),
                // A checksum of 32 bits follows, and the next byte.
                Mark::End => Next::Stream((at + MARK + 32).div_ceil(8), Vec::new()),
            };
        }
        reader.consume(length);
    }
    match next {
        Next::Stream(at, _) if position >= at && position > 0 => Ok(()),
        _ => Err(damaged("the compressed data ends early")),
    }
}

fn no_block(bit: u64) -> Error {
    damaged(format_args!("there is no block {} bytes into the file", bit / 8))
}
