//! Those who write until the server is killed: byte by byte over NBD with several requests under way, and through the
//! kernel.

use std::{
    collections::HashMap,
    io::{Read, Write},
    os::unix::{
        fs::{FileExt, OpenOptionsExt},
        net::UnixStream,
    },
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use rustix::fs::{FallocateFlags, OFlags, fallocate};

use super::model::{Becomes, Change, Dice, Model, SECTOR};

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const ZERO: u16 = 6;
const FUA: u16 = 1;
const NO_HOLE: u16 = 2;

/// Requests under way at most.
const DEPTH: u64 = 6;

/// A client of NBD with simple replies.
pub(crate) struct Nbd(UnixStream);

enum UnderWay {
    Change(Change),
    Flush(u64),
}

impl Nbd {
    pub(crate) fn connect(socket: &Path) -> Self {
        let mut stream = UnixStream::connect(socket).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a timeout");
        stream.read_exact(&mut [0; 18]).expect("the greeting");
        let option = [&3_u32.to_be_bytes()[..], b"IHAVEOPT", &1_u32.to_be_bytes(), &[0; 4]].concat();
        stream.write_all(&option).expect("EXPORT_NAME");
        stream.read_exact(&mut [0; 10]).expect("the export");
        Nbd(stream)
    }

    fn send(&mut self, command: u16, flags: u16, cookie: u64, range: (usize, usize), data: &[u8]) -> bool {
        let (offset, length) = range;
        let request = [
            &0x2560_9513_u32.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &command.to_be_bytes(),
            &cookie.to_be_bytes(),
            &(offset as u64).to_be_bytes(),
            &(length as u32).to_be_bytes(),
            data,
        ];
        self.0.write_all(&request.concat()).is_ok()
    }

    /// The cookie of the next reply; None: the server is gone.
    fn reply(&mut self) -> Option<u64> {
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply).ok()?;
        assert_eq!(reply[4..8], [0; 4], "a request failed");
        Some(u64::from_be_bytes(reply[8..].try_into().expect("8 bytes")))
    }

    pub(crate) fn read_all(&mut self, size: usize) -> Vec<u8> {
        assert!(self.send(READ, 0, 0, (0, size), &[]) && self.reply().is_some(), "the disk cannot be read");
        let mut data = vec![0; size];
        self.0.read_exact(&mut data).expect("data");
        data
    }

    /// Writes, zeroes, trims and flushes. No two changes of a sector are under way at once, for their order is open.
    pub(crate) fn write_until_killed(mut self, model: &mut Model, dice: &mut Dice, done: &AtomicUsize) {
        let mut under_way: HashMap<u64, UnderWay> = HashMap::new();
        for cookie in 1.. {
            while under_way.len() as u64 > dice.roll(DEPTH) {
                let Some(cookie) = self.reply() else { return };
                match under_way.remove(&cookie).expect("a request of ours") {
                    UnderWay::Change(change) => model.answered(&change),
                    UnderWay::Flush(sent) => model.flushed(sent),
                }
                done.fetch_add(1, Ordering::Release);
            }
            if dice.roll(12) == 0 {
                under_way.insert(cookie, UnderWay::Flush(model.flush()));
                if !self.send(FLUSH, 0, cookie, (0, 0), &[]) {
                    return;
                }
                continue;
            }
            // Now and then much at once: what is killed in the middle is what is looked for.
            let longest = [1, 8, 16, model.len() as u64 / 2][dice.roll(4) as usize];
            let length = 1 + dice.roll(longest) as usize;
            let first = dice.roll((model.len() - length) as u64 + 1) as usize;
            let sectors = first..first + length;
            let meets = |one: &UnderWay| match one {
                UnderWay::Change(c) => c.sectors.start < sectors.end && sectors.start < c.sectors.end,
                UnderWay::Flush(_) => false,
            };
            if under_way.values().any(meets) {
                continue;
            }
            let fua = dice.roll(6) == 0;
            let flags = if fua { FUA } else { 0 };
            let (command, flags, becomes) = match dice.roll(8) {
                0 => (ZERO, flags, Becomes::Zeroes),
                1 => (ZERO, flags | NO_HOLE, Becomes::Zeroes),
                2 => (TRIM, flags, Becomes::Trimmed),
                _ => (WRITE, flags, Becomes::Stamped),
            };
            let (change, data) = model.send(sectors, becomes, fua);
            under_way.insert(cookie, UnderWay::Change(change));
            if !self.send(command, flags, cookie, (first * SECTOR, length * SECTOR), &data) {
                return;
            }
        }
    }
}

/// A process that has the file of a mount open, past the page cache.
pub(crate) struct File(std::fs::File);

impl File {
    pub(crate) fn open(path: &Path) -> Self {
        let direct = OFlags::DIRECT.bits().cast_signed();
        File(std::fs::File::options().read(true).write(true).custom_flags(direct).open(path).expect("open"))
    }

    pub(crate) fn read_all(&mut self, size: usize) -> Vec<u8> {
        let mut data = vec![0; size];
        self.0.read_exact_at(&mut data, 0).expect("read");
        data
    }

    pub(crate) fn write_until_killed(self, model: &mut Model, dice: &mut Dice, done: &AtomicUsize) {
        loop {
            if dice.roll(8) == 0 {
                let sent = model.flush();
                if self.0.sync_data().is_err() {
                    return;
                }
                model.flushed(sent);
            } else {
                let longest = [1, 8, 16, model.len() as u64 / 2][dice.roll(4) as usize];
                let length = 1 + dice.roll(longest) as usize;
                let first = dice.roll((model.len() - length) as u64 + 1) as usize;
                let (offset, bytes) = ((first * SECTOR) as u64, (length * SECTOR) as u64);
                let zero = |flags| fallocate(&self.0, flags, offset, bytes).is_ok();
                let becomes = if dice.roll(5) < 2 { Becomes::Zeroes } else { Becomes::Stamped };
                let (change, data) = model.send(first..first + length, becomes, false);
                let made = match becomes {
                    Becomes::Stamped => self.0.write_all_at(&data, offset).is_ok(),
                    _ if dice.roll(2) == 0 => zero(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE),
                    _ => zero(FallocateFlags::ZERO_RANGE),
                };
                if !made {
                    return;
                }
                model.answered(&change);
            }
            done.fetch_add(1, Ordering::Release);
        }
    }
}
