//! Makes the disk below smaller or larger. What is added reads as zeroes and takes nothing else.

use std::ffi::OsStr;

use anyhow::ensure;
use nbdkit_core::{
    Below, Call, Caps, Data, Errno, Error, Extents, Filter, Handle, Info, Next, NextConfig, Op, Open,
    Outcome, Request, Result, params,
};

const HELP: &str = "\
truncate=<SIZE>   The new size.
round-up=<N>      Round the size up to a multiple of N, a power of 2.
round-down=<N>    Round the size down to a multiple of N, a power of 2.";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Truncate::default())
}

#[derive(Clone, Copy, Default)]
struct Truncate {
    size: Option<u64>,
    round_up: Option<u64>,
    round_down: Option<u64>,
}

impl Truncate {
    /// The size for a disk of `real` bytes.
    fn apply(self, real: u64) -> Result<u64> {
        let mut size = self.size.unwrap_or(real);
        if let Some(n) = self.round_up {
            size = size.checked_next_multiple_of(n).filter(|s| *s <= i64::MAX as u64).ok_or_else(|| {
                Error::new(Errno::EINVAL, format!("cannot round size {size} up to next boundary of {n}"))
            })?;
        }
        if let Some(n) = self.round_down {
            size -= size % n;
        }
        Ok(size)
    }
}

fn boundary(key: &str, value: &OsStr) -> anyhow::Result<Option<u64>> {
    let n = params::size(value)?;
    ensure!(n > 0, "if set, the {key} parameter must be > 0");
    ensure!(n.is_power_of_two(), "the {key} parameter must be a power of 2");
    Ok(Some(n))
}

impl Filter for Truncate {
    fn info(&self) -> Info {
        Info::bundled("truncate", "nbdkit truncate filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "truncate" => self.size = Some(params::size(value)?),
            "round-up" => self.round_up = boundary(key, value)?,
            "round-down" => self.round_down = boundary(key, value)?,
            _ => return next(key, value),
        }
        Ok(())
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        let real = next.caps().size;
        Ok(Box::new(Resized { size: self.apply(real)?, real, next }))
    }
}

struct Resized {
    size: u64,
    /// Size of the disk below.
    real: u64,
    next: Next,
}

impl Resized {
    /// Answers a request that is not only for the disk below, which is asked for the first `on_disk` bytes.
    fn past_end(&self, request: &mut Request<'_>, on_disk: u64) -> Outcome<'_> {
        let (call, may_wait) = (*request.call(), request.may_wait());
        let below = |data: Data<'_>| match on_disk {
            0 => Outcome::Done(Ok(())),
            length => self.next.piece(Call { length, ..call }, data, may_wait),
        };
        match request.data() {
            Data::Read(buf) => {
                let (disk, added) = buf.split_at_mut(on_disk as usize);
                added.fill(0);
                below(Data::Read(disk))
            }
            Data::Write(buf) => {
                let (disk, added) = buf.split_at(on_disk as usize);
                if added.iter().any(|byte| *byte != 0) {
                    return Outcome::Done(Err(self.no_space()));
                }
                below(Data::Write(disk))
            }
            Data::Extents(extents) => match below(Data::Extents(extents)) {
                Outcome::Done(Ok(())) => Outcome::Done(self.add_hole(call.offset, extents)),
                outcome => outcome,
            },
            // It asks for a loan.
            Data::None if matches!(call.op, Op::Read | Op::Write) => Outcome::NeedsThread,
            _ => below(Data::None),
        }
    }

    /// What is added follows on what is known of the disk below, if that reaches its end: it may be a short answer.
    fn add_hole(&self, offset: u64, extents: &mut Extents) -> Result<()> {
        let added = extents.covered_to().max(offset);
        if added < self.real {
            return Ok(());
        }
        extents.add(added, self.size.saturating_sub(added), true, true)
    }

    #[cold]
    fn no_space(&self) -> Error {
        Error::new(
            Errno::ENOSPC,
            format!("write of data after the {} bytes of the disk below: only zeroes fit there", self.real),
        )
    }
}

impl Handle for Resized {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn capabilities(&self) -> Result<Caps> {
        let Caps { extents, skip_holes, .. } = *self.next.caps();
        let caps = self.next.capabilities().with_size(self.size).with_skip_holes(skip_holes);
        // What is added is known to be a hole, whatever is below.
        Ok(if extents || self.size > self.real { caps.with_extents(true) } else { caps })
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let on_disk = self.real.saturating_sub(request.offset()).min(request.length());
        if on_disk == request.length() { self.next.pass(request) } else { self.past_end(request, on_disk) }
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::Flags;

    use super::*;
    use crate::testing::{
        Answer, Spec, View, chain, check_model, client, config_error, inline, lent, open, session, started,
    };

    #[test]
    fn model() {
        check_model(&["truncate"], &[("truncate", "9999")], 20_000, &View::same(9999));
        check_model(&["truncate"], &[("truncate", "30001")], 20_000, &View::padded(20_000, 30_001));
        check_model(&["truncate"], &[("round-up", "4096")], 20_001, &View::padded(20_001, 20_480));
        check_model(&["truncate"], &[("round-down", "4096")], 20_001, &View::same(16_384));
    }

    #[test]
    fn sizes() {
        let size =
            |real, params: &[(&str, &str)]| session(&Spec::sized(real).disk(), "truncate", params).size();
        assert_eq!(size(1000, &[]), 1000);
        assert_eq!(size(1024, &[("round-up", "512")]), 1024);
        assert_eq!(size(1000, &[("truncate", "100"), ("round-up", "512")]), 512);
        assert_eq!(size(1000, &[("round-down", "1k")]), 0);
        assert_eq!(size(0, &[("truncate", "8191P")]), 8191 << 50);
    }

    #[test]
    fn a_size_that_cannot_be_rounded_up_does_not_open() {
        let params = [("truncate", "9223372036854775807"), ("round-up", "512")];
        let chain = chain(&Spec::default().disk(), &["truncate"], &params).unwrap();
        assert!(open(&chain, client(), false).unwrap_err().to_string().contains("cannot round size"));
    }

    #[test]
    fn boundaries_are_powers_of_two() {
        assert!(config_error("truncate", &[("round-up", "3")]).contains("power of 2"));
        assert!(config_error("truncate", &[("round-down", "0")]).contains("> 0"));
    }

    #[test]
    fn a_write_over_the_real_end_changes_nothing_when_it_fails() {
        let disk = Spec::sized(1000).disk();
        let before = disk.contents();
        let session = session(&disk, "truncate", &[("truncate", "2000")]);
        let error = session.pwrite(&[1; 100], 950, Flags::empty()).unwrap_err();
        assert_eq!(error.errno(), Errno::ENOSPC);
        assert_eq!(disk.contents(), before);
        session.pwrite(&[0; 100], 950, Flags::empty()).unwrap();
        assert_eq!(disk.take_calls().last().map(|call| (call.offset, call.length)), Some((950, 50)));
    }

    #[test]
    fn what_is_added_is_one_hole() {
        let data = Spec { data: vec![1; 1000], ..Spec::default() };
        for spec in [data.clone(), Spec { extents: false, ..data }] {
            let session = session(&spec.disk(), "truncate", &[("truncate", "1T")]);
            let extents = session.extents(1 << 40, 0, Flags::empty()).unwrap();
            let found: Vec<_> = extents.iter().map(|e| (e.offset, e.length, e.kind())).collect();
            assert_eq!(found, [(0, 1000, 0), (1000, (1 << 40) - 1000, 3)]);
        }
    }

    #[test]
    fn what_is_on_the_disk_is_started_and_lent_for() {
        let disk = Spec { later: true, ..Spec::sized(1000) }.disk();
        let session = session(&disk, "truncate", &[("truncate", "2000")]);
        for op in [Op::Read, Op::Write, Op::Trim, Op::Zero, Op::Cache] {
            let on_disk = started(&session, Call::new(op, 900, 100), &[0; 100]);
            assert!(matches!(on_disk, Answer::Started(Ok(_))), "{op:?}: {on_disk:?}");
            for offset in [950, 1000, 1900] {
                let past = started(&session, Call::new(op, offset, 100), &[0; 100]);
                assert!(matches!(past, Answer::Done(Ok(_))), "{op:?} at {offset}: {past:?}");
            }
        }
        assert!(matches!(started(&session, Call::new(Op::Flush, 0, 0), &[]), Answer::Started(Ok(_))));
        for op in [Op::Read, Op::Write] {
            let lent = [900, 901, 1000].map(|offset| lent(&session, op, offset, 100));
            assert_eq!(lent, [Some(900), None, None], "{op:?}");
        }
    }

    #[test]
    fn a_request_over_the_real_end_needs_a_thread_if_the_disk_does() {
        let session = session(
            &Spec { blocks: |_| true, ..Spec::sized(1000) }.disk(),
            "truncate",
            &[("truncate", "2000")],
        );
        for op in [Op::Read, Op::Write, Op::Trim, Op::Zero, Op::Cache] {
            assert!(matches!(inline(&session, Call::new(op, 950, 100), &[0; 100]), Answer::NeedsThread));
            assert!(matches!(inline(&session, Call::new(op, 1000, 100), &[0; 100]), Answer::Done(Ok(_))));
        }
    }
}
