//! The sparse-random plugin: runs of random data with holes between them, as disks of virtual machines have, the same
//! for the same seed.
//!
//! The disk is divided into cells. Each has one run of data, whose length and place the seed and the number of the cell tell.
//! So a disk of any size needs no memory, and where its data is takes no search.

use std::{ffi::OsStr, ops::Range};

use anyhow::{Context as _, bail, ensure};
use nbdkit_core::{
    Caps, Errno, Error, Extents, Flags, Handle, Info, Op, Open, Outcome, Plugin, Request, Result, Support,
    params,
};

use crate::noise;

/// Data comes in blocks of so many bytes.
const BLOCK: u64 = 4096;
/// Most extents of one answer, which may be shorter than the question.
const MAX_EXTENTS: usize = 1 << 16;

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::new(SparseRandom {
        size: None,
        seed: None,
        percent: 10.0,
        run: 16 << 20,
        random_content: false,
        disk: None,
    })
}

struct SparseRandom {
    size: Option<u64>,
    seed: Option<u32>,
    percent: f64,
    /// Average length of a run in bytes, over 0.
    run: u64,
    random_content: bool,
    disk: Option<Disk>,
}

impl Plugin for SparseRandom {
    fn info(&self) -> Info {
        Info::bundled(
            "sparse-random",
            "a sparse disk with random data",
            "[size=]SIZE  (required) Size of the disk\n\
             seed=SEED               The same disk for the same number (default: another one each time)\n\
             percent=N               How much of it is data (default: 10)\n\
             runlength=SIZE          Average length of a run of data (default: 16M)\n\
             random-content=BOOL     Every byte is random, not only each block (default: false)",
        )
        .magic("size")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        let more = [
            "can_write",
            "can_flush",
            "can_trim",
            "can_zero",
            "can_extents",
            "pwrite",
            "flush",
            "trim",
            "zero",
            "extents",
            "config_complete",
        ];
        Some([crate::READ_ONLY, &more].concat())
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "size" => self.size = Some(params::size(value)?),
            "seed" => self.seed = Some(params::integer("seed", value)?),
            "percent" => {
                let text = params::text(value)?;
                let number = text.strip_suffix('%').unwrap_or(text).parse();
                match number {
                    Ok(percent) if (0.0..=100.0).contains(&percent) => self.percent = percent,
                    _ => bail!("cannot parse percent parameter: {text}: use a number from 0 to 100"),
                }
            }
            "runlength" => {
                self.run = params::size(value)?;
                ensure!(self.run > 0, "runlength parameter must be > 0");
            }
            "random-content" => self.random_content = params::boolean(value)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        let size = self.size.context("you must specify size=SIZE on the command line, such as size=1G")?;
        let seed = match self.seed {
            Some(seed) => noise::spread(seed.into()),
            None => noise::any_seed()?,
        };
        self.disk = Some(Disk::new(size, seed, self.percent / 100.0, self.run, self.random_content));
        Ok(())
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(self.disk.clone().ok_or(Errno::EINVAL)?))
    }
}

#[derive(Clone)]
struct Disk {
    size: u64,
    seed: u64,
    random_content: bool,
    /// In blocks: how long a cell is, and how much of it is data on average.
    cell: u64,
    run: f64,
}

/// A part of a request.
struct Part {
    range: Range<u64>,
    data: bool,
}

impl Disk {
    fn new(size: u64, seed: u64, share: f64, run: u64, random_content: bool) -> Self {
        let blocks = size.div_ceil(BLOCK).max(1);
        let wanted = (run.div_ceil(BLOCK) as f64 / share).ceil();
        // At least one cell, so that a small disk has its share too. Floats are clamped to the range of integers.
        let cell = (wanted as u64).clamp(1, blocks);
        Disk { size, seed, random_content, cell, run: cell as f64 * share }
    }

    /// The blocks of a cell that are data.
    fn run_of(&self, cell: u64) -> Range<u64> {
        let fraction = |bits: u64| bits as f64 / u64::MAX as f64;
        // From half to one and a half of the average; as far to both sides as there is room in the cell.
        let spread = (self.cell as f64 - self.run).min(self.run / 2.0);
        let exact = self.run + spread * (2.0 * fraction(noise::word(self.seed, cell * 3)) - 1.0);
        // What is left of a block counts now and then, so that short runs keep their average.
        let blocks = (exact + fraction(noise::word(self.seed, cell * 3 + 1))) as u64;
        let blocks = if self.run >= self.cell as f64 { self.cell } else { blocks.min(self.cell) };
        let room = self.cell - blocks;
        let from = cell * self.cell + noise::word(self.seed, cell * 3 + 2) % (room + 1);
        from..from + blocks
    }

    /// A range, cut where data and holes meet.
    fn parts(&self, offset: u64, length: u64) -> impl Iterator<Item = Part> + '_ {
        let (mut at, end) = (offset, offset + length);
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let cell = at / BLOCK / self.cell;
            let run = self.run_of(cell);
            let bytes = |blocks: u64| blocks.saturating_mul(BLOCK);
            let (data, to) = match at / BLOCK {
                block if block < run.start => (false, bytes(run.start)),
                block if block < run.end => (true, bytes(run.end)),
                _ => (false, bytes((cell + 1).saturating_mul(self.cell))),
            };
            let range = at..to.min(end);
            at = range.end;
            Some(Part { range, data })
        })
    }

    /// The content of data.
    fn content(&self, buf: &mut [u8], offset: u64) {
        if self.random_content {
            return noise::fill(self.seed, buf, offset);
        }
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let length = ((BLOCK - at % BLOCK) as usize).min(rest.len());
            let (block, after) = rest.split_at_mut(length);
            // Not 0: it is data.
            block.fill((noise::word(!self.seed, at / BLOCK) % 255) as u8 + 1);
            at += length as u64;
            rest = after;
        }
    }

    fn read(&self, buf: &mut [u8], offset: u64) {
        for part in self.parts(offset, buf.len() as u64) {
            let target = &mut buf[(part.range.start - offset) as usize..(part.range.end - offset) as usize];
            if part.data { self.content(target, part.range.start) } else { target.fill(0) }
        }
    }
}

impl Handle for Disk {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(self.size)
            .with_write(true)
            .with_flush(true)
            .with_trim(true)
            .with_zero(Support::Native)
            .with_fua(Support::Emulate)
            .with_multi_conn(true)
            .with_cache(Support::Native)
            .with_extents(true)
            .with_skip_holes(true))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.read(buf, offset);
        Ok(())
    }

    fn pwrite(&self, buf: &[u8], offset: u64, _: Flags) -> Result<()> {
        noise::check(buf, offset, |buf, at| self.read(buf, at))
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.zero(length, offset, flags)
    }

    /// What is a hole may be zeroed: a copy does that.
    fn zero(&self, length: u64, offset: u64, _: Flags) -> Result<()> {
        if self.parts(offset, length).any(|part| part.data) {
            return Err(Error::new(Errno::EIO, "trying to trim or zero non-hole in disk"));
        }
        Ok(())
    }

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        for part in self.parts(offset, length) {
            extents.add(part.range.start, part.range.end - part.range.start, !part.data, !part.data)?;
            let count = extents.as_slice().len();
            if count >= MAX_EXTENTS || flags.contains(Flags::REQ_ONE) && count > 1 {
                break;
            }
        }
        Ok(())
    }

    fn cache(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        // Cells may be small and the range large.
        let slow = matches!(request.op(), Op::Zero | Op::Trim | Op::Extents);
        if slow && !request.may_wait() { Outcome::NeedsThread } else { request.run(self) }
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::{Errno, Flags};

    use crate::testkit::{config_error, disk, extents, read_all};

    /// How much is data, and the number of runs.
    fn data(params: &[(&str, &str)]) -> (u64, u64) {
        let disk = disk("sparse-random", params);
        let (mut at, mut bytes, mut runs) = (0, 0, 0);
        while at < disk.size() {
            for (start, length, kind) in extents(&disk, at, disk.size() - at) {
                at = start + length;
                if kind == 0 {
                    bytes += length;
                    runs += 1;
                }
            }
        }
        (bytes, runs)
    }

    #[test]
    fn percentages_and_runs_are_about_right() {
        for (percent, run) in
            [("10", "1M"), ("50", "4M"), ("90", "1M"), ("1", "64K"), ("30", "4096"), ("99.5", "100k")]
        {
            let (size, exact): (u64, f64) = (10 << 30, percent.parse().unwrap());
            let (bytes, runs) =
                data(&[("size", "10G"), ("seed", "1"), ("percent", percent), ("runlength", run)]);
            let share = bytes as f64 * 100.0 / size as f64;
            assert!((share / exact - 1.0).abs() < 0.05, "{percent}% of {run}: {share}%");
            let run = nbdkit_core::params::size(run.as_ref()).unwrap() as f64;
            let average = bytes as f64 / runs as f64;
            // Runs that touch count as one.
            let touch = exact > 80.0 || run <= 4096.0;
            assert!(touch || (average / run - 1.0).abs() < 0.1, "{percent}% of {run}: {average}");
        }
        assert_eq!(data(&[("size", "1G"), ("percent", "0")]), (0, 0));
        assert_eq!(data(&[("size", "1G"), ("percent", "100")]), (1 << 30, 1));
        // One that is smaller than a cell.
        let small = data(&[("size", "1M"), ("seed", "1")]).0;
        assert!((40 << 10..170 << 10).contains(&small), "{small}");
    }

    #[test]
    fn extents_tell_of_the_data() {
        for content in ["false", "true"] {
            let params = [
                ("size", "1000001"),
                ("seed", "3"),
                ("percent", "40"),
                ("runlength", "20000"),
                ("random-content", content),
            ];
            let disk = disk("sparse-random", &params);
            let bytes = read_all(&disk);
            for (offset, length, kind) in extents(&disk, 0, disk.size()) {
                let range = &bytes[offset as usize..(offset + length) as usize];
                let zeroes = range.iter().filter(|byte| **byte == 0).count();
                match (kind, content) {
                    (3, _) => assert_eq!(zeroes as u64, length),
                    (_, "false") => assert_eq!(zeroes, 0),
                    _ => assert!(zeroes < range.len() / 50, "{zeroes} of {length}"),
                }
                let done = disk.zero(length, offset, Flags::empty());
                assert_eq!(done.map_err(|e| e.errno()), if kind == 3 { Ok(()) } else { Err(Errno::EIO) });
            }
            disk.pwrite(&bytes, 0, Flags::empty()).unwrap();
            let same = crate::testkit::disk("sparse-random", &params);
            assert!(read_all(&same) == bytes);
        }
    }

    #[test]
    fn the_largest_disk_has_ends() {
        let largest = i64::MAX as u64;
        let disk =
            disk("sparse-random", &[("size", "9223372036854775807"), ("percent", "50"), ("runlength", "1E")]);
        assert!(extents(&disk, 0, largest).iter().map(|(_, length, _)| length).sum::<u64>() == largest);
        disk.pread(&mut [0; 10], largest - 10).unwrap();
    }

    #[test]
    fn bad_parameters() {
        for (params, message) in [
            (&[][..], "you must specify size="),
            (&[("size", "1M"), ("percent", "101")], "cannot parse percent parameter: 101"),
            (&[("size", "1M"), ("percent", "-1")], "cannot parse percent parameter"),
            (&[("size", "1M"), ("percent", "NaN")], "cannot parse percent parameter"),
            (&[("size", "1M"), ("runlength", "0")], "runlength parameter must be > 0"),
            (&[("size", "1M"), ("random-content", "x")], "boolean"),
            (&[("size", "1M"), ("seed", "x")], "seed"),
        ] {
            assert!(config_error("sparse-random", params).contains(message), "{params:?}");
        }
    }
}
