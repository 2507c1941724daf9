//! Shows one partition of the disk below.
//!
//! The table is read when a client opens the disk, not before: then it may have been made meanwhile. Its content is not
//! trusted (see `nbdkit_common::read_table`), and a partition that is not within the disk does not open.

use std::ffi::OsStr;

use anyhow::bail;
use log::warn;
use nbdkit_common::{Scheme, Table, TableError, read_table};
use nbdkit_core::{
    Below, Errno, Error, Filter, Handle, Info, NextConfig, NextConfigComplete, Open, Result, params,
    sync::Mutex,
};

use crate::{blocksize::read_within_limits, subrange::Subrange};

const HELP: &str = "\
partition=<NUMBER>                        (required) The partition to show, from 1.
partition-sectorsize=auto|512|1024|2048|4096
                                          Bytes in a sector (default auto).";

/// The most numbers of partitions that an error lists.
const LISTED: usize = 16;

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Choice { number: None, sector_size: None, told: Mutex::default() })
}

struct Choice {
    number: Option<u32>,
    /// None: find out.
    sector_size: Option<u64>,
    /// What was wrong with the table that was last read: the same is not told to each client.
    told: Mutex<Vec<String>>,
}

impl Choice {
    fn warn(&self, table: &Table) {
        let mut told = self.told.lock();
        if *told != table.warnings {
            table.warnings.iter().for_each(|warning| warn!("partition: {warning}"));
            told.clone_from(&table.warnings);
        }
    }
}

impl Filter for Choice {
    fn info(&self) -> Info {
        Info::bundled("partition", "nbdkit partition filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "partition" => {
                let number = params::integer("partition", value)?;
                if number == 0 {
                    bail!("invalid partition number 0: partitions count from 1");
                }
                self.number = Some(number);
            }
            "partition-sectorsize" => {
                self.sector_size = match params::text(value)? {
                    "auto" => None,
                    "512" => Some(512),
                    "1k" | "1K" | "1024" => Some(1024),
                    "2k" | "2K" | "2048" => Some(2048),
                    "4k" | "4K" | "4096" => Some(4096),
                    other => {
                        bail!("unknown partition-sectorsize '{other}': use auto, 512, 1024, 2048 or 4096")
                    }
                }
            }
            _ => return next(key, value),
        }
        Ok(())
    }

    fn config_complete(&mut self, next: &mut NextConfigComplete<'_>) -> anyhow::Result<()> {
        if self.number.is_none() {
            bail!("you must supply the partition parameter on the command line, such as partition=1");
        }
        next()
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        let number = self.number.ok_or(Errno::EINVAL)?;
        let table = read_table(next.caps().size, self.sector_size, |buf, offset| {
            read_within_limits(&next, buf, offset)
        })
        .map_err(|e| explain(e, next.caps().size))?;
        self.warn(&table);
        let Some(found) = table.partitions.iter().find(|partition| partition.number == number) else {
            return Err(not_found(&table, number));
        };
        let (start, length, size) = (found.start, found.length, next.caps().size);
        let part = Subrange::new(next, start, length).ok_or_else(|| {
            Error::new(
                Errno::EINVAL,
                format!(
                    "{} partition {number} (bytes {start} to {}) passes the end of the {size} byte disk",
                    table.scheme,
                    start + length
                ),
            )
        })?;
        Ok(Box::new(part))
    }
}

fn explain(e: TableError<Error>, size: u64) -> Error {
    let message = match e {
        TableError::Read(e) => return e.context("could not read the partition table"),
        TableError::TooSmall => format!("the disk of {size} bytes is too small to be a partitioned disk"),
        TableError::NoTable => {
            "the disk does not contain an MBR or GPT partition table signature, nor an Apple, BSD, Sun or Amiga one"
                .into()
        }
        TableError::Damaged(how) => format!("the partition table is damaged: {how}"),
    };
    Error::new(Errno::EINVAL, message)
}

fn not_found(table: &Table, number: u32) -> Error {
    let mut found: Vec<_> = table.partitions.iter().take(LISTED).map(|p| p.number.to_string()).collect();
    if table.partitions.len() > LISTED {
        found.push("...".into());
    }
    let found = if found.is_empty() { "none".into() } else { found.join(", ") };
    let what = if table.scheme == Scheme::Mbr && number > 4 && !table.extended {
        "MBR logical partition selected, but there is no extended partition in the partition table".into()
    } else {
        format!("{} partition {number} not found", table.scheme)
    };
    Error::new(Errno::EINVAL, format!("{what} (partitions found: {found})"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{
        Disk, Spec, View, chain, check_model_over, client, config_error, lent, open, pattern, read_inline,
        session,
    };
    use nbdkit_common::{Guid, Layout, NewPartition};
    use nbdkit_core::{BlockSize, Caps, Chain, Flags, Loan, Op, Outcome, Plugin, Request};
    use std::{
        os::{fd::AsFd, unix::fs::FileExt},
        sync::Arc,
    };

    /// Small partitions close together.
    fn partitions(count: u64) -> Vec<NewPartition> {
        (1..=count).map(|i| NewPartition { alignment: 1024, ..NewPartition::new(i * 3000) }).collect()
    }

    /// A disk with that table and a pattern everywhere else.
    fn spec(layout: &Layout) -> Spec {
        let mut data = pattern(layout.size);
        for (start, table) in &layout.tables {
            data[*start as usize..][..table.len()].copy_from_slice(table);
        }
        Spec { data, ..Spec::default() }
    }

    fn mbr(count: u64) -> Layout {
        Layout::mbr(&partitions(count)).unwrap()
    }

    fn gpt(count: u64) -> Layout {
        Layout::gpt(&partitions(count), Guid::NIL).unwrap()
    }

    fn open_error(disk: &Disk, number: &str) -> String {
        let chain = chain(disk, &["partition"], &[("partition", number)]).unwrap();
        open(&chain, client(), false).unwrap_err().to_string()
    }

    #[test]
    fn model() {
        let (mbr, gpt) = (mbr(6), gpt(3));
        for (layout, number, index) in [(&mbr, "1", 0), (&mbr, "7", 5), (&gpt, "2", 1)] {
            let length = (index as u64 + 1) * 3000;
            let view = View::part(layout.starts[index], length.next_multiple_of(512));
            let spec = spec(layout);
            let emulated = Spec { data: spec.data.clone(), ..Spec::emulated(0) };
            let minimal = Spec { data: spec.data.clone(), ..Spec::minimal(0) };
            for spec in [spec, emulated, minimal] {
                check_model_over(&spec, &["partition"], &[("partition", number)], &view);
            }
        }
    }

    #[test]
    fn every_partition_is_found_with_its_size() {
        for (layout, numbers) in
            [(mbr(4), [1, 2, 3, 4].as_slice()), (mbr(5), &[1, 2, 3, 5, 6]), (gpt(3), &[1, 2, 3])]
        {
            let disk = spec(&layout).disk();
            for (number, length) in numbers.iter().zip((3000u64..).step_by(3000)) {
                let session = session(&disk, "partition", &[("partition", &number.to_string())]);
                assert_eq!(session.size(), length.next_multiple_of(512));
            }
        }
    }

    #[test]
    fn a_missing_partition_names_those_there_are() {
        let (plain, logical, gpt) = (spec(&mbr(2)).disk(), spec(&mbr(5)).disk(), spec(&gpt(20)).disk());
        assert_eq!(open_error(&plain, "3"), "MBR partition 3 not found (partitions found: 1, 2)");
        assert_eq!(
            open_error(&plain, "5"),
            "MBR logical partition selected, but there is no extended partition in the partition table \
             (partitions found: 1, 2)"
        );
        assert_eq!(open_error(&logical, "4"), "MBR partition 4 not found (partitions found: 1, 2, 3, 5, 6)");
        let error = open_error(&gpt, "21");
        assert!(error.starts_with("GPT partition 21 not found (partitions found: 1, 2,"), "{error}");
        assert!(error.ends_with("16, ...)"), "{error}");
    }

    #[test]
    fn disks_without_a_sound_table_do_not_open() {
        assert!(open_error(&Spec::sized(0).disk(), "1").contains("too small"));
        assert!(open_error(&Spec::sized(10_000).disk(), "1").contains("does not contain an MBR or GPT"));
        let damaged = || {
            let mut damaged = spec(&gpt(1));
            damaged.data[1024] ^= 1;
            damaged
        };
        let session = session(&damaged().disk(), "partition", &[("partition", "1")]);
        assert_eq!(session.size(), 3072, "by the backup");
        let mut damaged = damaged();
        *damaged.data.last_chunk_mut::<512>().unwrap() = [0; 512];
        assert!(open_error(&damaged.disk(), "1").contains("damaged"));
        let mut cut = spec(&mbr(2));
        cut.data.truncate(cut.data.len() - 1);
        assert!(open_error(&cut.disk(), "2").starts_with("MBR partition 2 (bytes"));
    }

    #[test]
    fn an_error_of_the_disk_keeps_its_errno() {
        let disk = Spec { fail_after: Some(0), ..spec(&mbr(1)) }.disk();
        let chain = chain(&disk, &["partition"], &[("partition", "1")]).unwrap();
        assert_eq!(open(&chain, client(), false).unwrap_err().errno(), Errno::EIO);
    }

    #[test]
    fn the_table_is_read_in_blocks_that_the_disk_takes() {
        let block_size = BlockSize { minimum: 4096, preferred: 4096, maximum: u32::MAX };
        let mut spec = Spec { block_size, ..spec(&mbr(6)) };
        spec.data.resize(spec.data.len().next_multiple_of(4096), 0);
        let session = session(&spec.disk(), "partition", &[("partition", "7")]);
        assert_eq!(session.size(), 18_000u64.next_multiple_of(512));
    }

    #[test]
    fn requests_reach_the_disk_once_and_shifted() {
        let layout = mbr(2);
        let disk = spec(&layout).disk();
        let session = session(&disk, "partition", &[("partition", "2")]);
        disk.take_calls();
        session.cache(100, 7).unwrap();
        session.zero(200, 8, Flags::FAST_ZERO | Flags::FUA).unwrap();
        let calls: Vec<_> = disk.calls().iter().map(|call| (call.op, call.offset, call.length)).collect();
        let start = layout.starts[1];
        assert_eq!(calls, [(Op::Cache, start + 7, 100), (Op::Zero, start + 8, 200)]);
    }

    /// A plugin that lends its file and reads from the page cache.
    struct Lender(std::fs::File);

    impl Plugin for Lender {
        fn info(&self) -> Info {
            Info::bundled("lender", "a disk for tests", "")
        }

        fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
            Ok(Box::new(Lender(self.0.try_clone()?)))
        }
    }

    impl Handle for Lender {
        fn capabilities(&self) -> Result<Caps> {
            Ok(Caps::of_size(self.0.metadata()?.len()))
        }

        fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
            Ok(self.0.read_exact_at(buf, offset)?)
        }

        fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
            if request.may_lend() {
                return Outcome::Lent(Loan { fd: self.0.as_fd(), offset: request.offset() });
            }
            request.run(self)
        }
    }

    #[test]
    fn loans_and_reads_that_do_not_wait_are_shifted() {
        let layout = mbr(2);
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&spec(&layout).data, 0).unwrap();
        let mut chain = Chain::new(Box::new(Lender(file)), vec![new()]);
        chain.config("partition", OsStr::new("2")).unwrap();
        chain.config_complete().unwrap();
        let session = open(&Arc::new(chain), client(), false).unwrap();
        assert_eq!(lent(&session, Op::Read, 7, 10), Some(layout.starts[1] + 7));
        assert_eq!(lent(&session, Op::Read, 1, session.size()), None);
        let (mut waiting, mut other) = ([0; 64], [1; 64]);
        session.pread(&mut waiting, 1000).unwrap();
        assert!(read_inline(&session, &mut other, 1000).unwrap());
        assert_eq!(waiting, other);
    }

    #[test]
    fn bad_parameters_name_the_fix() {
        assert!(config_error("partition", &[]).contains("you must supply the partition parameter"));
        assert!(config_error("partition", &[("partition", "0")]).contains("count from 1"));
        assert!(config_error("partition", &[("partition", "-1")]).contains("partition"));
        assert!(config_error("partition", &[("partition", "x")]).contains("'x'"));
        let error = config_error("partition", &[("partition", "1"), ("partition-sectorsize", "8k")]);
        assert!(error.contains("use auto, 512, 1024, 2048 or 4096"), "{error}");
    }
}
