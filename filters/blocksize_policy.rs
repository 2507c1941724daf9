//! Tells clients which sizes of requests are welcome, and refuses the others if asked to.

use std::{ffi::OsStr, sync::Arc};

use anyhow::{Context as _, bail, ensure};
use nbdkit_core::{
    Below, BlockSize, Call, Caps, Client, Errno, Error, Filter, Handle, Info, Next, NextConfig,
    NextConfigComplete, Op, Open, Outcome, Request, Result, params,
};

const HELP: &str = "\
blocksize-minimum=<SIZE>           Smallest request and alignment: a power of 2, 1 to 64K.
blocksize-preferred=<SIZE>         Best size: a power of 2, 512 to 32M.
blocksize-maximum=<SIZE>           Largest read or write: a multiple of the minimum.
blocksize-error-policy=<POLICY>    What becomes of other requests: 'allow' (default), 'error', or 'strict-error',
                                   which refuses the end of a disk that is no multiple of the minimum too.
blocksize-write-disconnect=<SIZE>  Disconnect clients that write more at once.";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Policy::default())
}

#[derive(Clone, Default)]
struct Policy {
    minimum: Option<u32>,
    preferred: Option<u32>,
    maximum: Option<u32>,
    refuse: Refuse,
    /// 0: never.
    disconnect_over: u64,
}

/// Which requests that do not fit are refused.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Refuse {
    #[default]
    None,
    /// All but those that end where the disk does, and otherwise fit.
    Most,
    All,
}

fn size(key: &str, value: &OsStr) -> anyhow::Result<u32> {
    let size = params::size(value).with_context(|| key.to_owned())?;
    u32::try_from(size).ok().with_context(|| format!("{key}={} is over 4294967295 bytes", value.display()))
}

impl Policy {
    /// What clients are told: what is not set here is as below, or does not limit anything.
    fn block_size(&self, below: BlockSize) -> Result<BlockSize> {
        if self.minimum.is_none() && self.preferred.is_none() && self.maximum.is_none() {
            return Ok(below);
        }
        let default = if below.is_unset() {
            let minimum = self.minimum.unwrap_or(1);
            let maximum = match self.disconnect_over {
                0 => u32::MAX,
                over => u32::try_from(over - over % u64::from(minimum)).unwrap_or(u32::MAX),
            };
            BlockSize { minimum, preferred: 4096, maximum }
        } else {
            below
        };
        BlockSize {
            minimum: self.minimum.unwrap_or(default.minimum),
            preferred: self.preferred.unwrap_or(default.preferred),
            maximum: self.maximum.unwrap_or(default.maximum),
        }
        .validate()
        .map_err(|e| e.context("the block sizes of blocksize-policy and of the disk do not fit"))
    }
}

impl Filter for Policy {
    fn info(&self) -> Info {
        Info::bundled("blocksize-policy", "nbdkit blocksize policy filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "blocksize-minimum" => {
                let minimum = size(key, value)?;
                ensure!(
                    minimum.is_power_of_two() && minimum <= 65536,
                    "{key}={minimum} is not a power of 2 between 1 and 64K"
                );
                self.minimum = Some(minimum);
            }
            "blocksize-preferred" => {
                let preferred = size(key, value)?;
                ensure!(
                    preferred.is_power_of_two() && (512..=32 << 20).contains(&preferred),
                    "{key}={preferred} is not a power of 2 between 512 and 32M"
                );
                self.preferred = Some(preferred);
            }
            "blocksize-maximum" => {
                let maximum = size(key, value)?;
                ensure!(maximum > 0, "{key}=0 would allow no request: leave it out for no limit");
                self.maximum = Some(maximum);
            }
            "blocksize-error-policy" => {
                self.refuse = match params::text(value)? {
                    "allow" => Refuse::None,
                    "error" => Refuse::Most,
                    "strict-error" | "strict" => Refuse::All,
                    other => bail!("unknown {key} '{other}': use allow, error or strict-error"),
                }
            }
            "blocksize-write-disconnect" => {
                self.disconnect_over = params::size(value).with_context(|| key.to_owned())?;
            }
            _ => return next(key, value),
        }
        Ok(())
    }

    fn config_complete(&mut self, next: &mut NextConfigComplete<'_>) -> anyhow::Result<()> {
        if let (Some(minimum), Some(preferred)) = (self.minimum, self.preferred) {
            ensure!(
                minimum <= preferred,
                "blocksize-minimum={minimum} is over blocksize-preferred={preferred}"
            );
        }
        if let (Some(preferred), Some(maximum)) = (self.preferred, self.maximum) {
            ensure!(
                preferred <= maximum,
                "blocksize-preferred={preferred} is over blocksize-maximum={maximum}"
            );
        }
        if let (Some(minimum), Some(maximum)) = (self.minimum, self.maximum) {
            ensure!(
                maximum == u32::MAX || maximum.is_multiple_of(minimum),
                "blocksize-maximum={maximum} is not a multiple of blocksize-minimum={minimum}"
            );
        }
        next()
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        let block = self.block_size(next.caps().block_size)?;
        Ok(Box::new(Strict { policy: self.clone(), block, client: open.client.clone(), next }))
    }
}

struct Strict {
    policy: Policy,
    block: BlockSize,
    client: Arc<Client>,
    next: Next,
}

impl Strict {
    /// Whether each request has to be seen.
    fn is_strict(&self) -> bool {
        self.policy.disconnect_over > 0 || (self.policy.refuse != Refuse::None && !self.block.is_unset())
    }

    fn check(&self, call: &Call) -> Result<()> {
        let Call { op, offset, length, .. } = *call;
        let most = self.policy.disconnect_over;
        if op == Op::Write && most > 0 && length > most {
            self.client.disconnect(true);
            return Err(Error::new(
                Errno::ESHUTDOWN,
                format!("disconnected: a write of {length} bytes is over blocksize-write-disconnect={most}"),
            ));
        }
        if self.policy.refuse == Refuse::None || self.block.is_unset() || op == Op::Flush {
            return Ok(());
        }
        let BlockSize { minimum, maximum, .. } = self.block;
        let mut rounded = length;
        if self.policy.refuse == Refuse::Most && offset.saturating_add(length) == self.next.caps().size {
            // The last block of the disk may be a part of one.
            rounded = length.next_multiple_of(u64::from(minimum));
        }
        let length = rounded;
        let why = if length < u64::from(minimum) {
            format!("{length} bytes are fewer than the minimum of {minimum}")
        } else if matches!(op, Op::Read | Op::Write) && length > u64::from(maximum) {
            format!("{length} bytes are more than the maximum of {maximum}")
        } else if !length.is_multiple_of(u64::from(minimum)) {
            format!("{length} bytes are not a multiple of the minimum of {minimum}")
        } else if !offset.is_multiple_of(u64::from(minimum)) {
            format!("offset {offset} is not a multiple of the minimum of {minimum}")
        } else {
            return Ok(());
        };
        Err(Error::new(Errno::EINVAL, format!("{op:?} request refused: {why} (blocksize-error-policy)")))
    }
}

impl Handle for Strict {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn capabilities(&self) -> Result<Caps> {
        Ok(self.next.capabilities().with_block_size(self.block))
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let call = *request.call();
        if call.op == Op::Extents {
            if let Err(e) = self.check(&call) {
                return Outcome::Done(Err(e));
            }
            // Whole blocks, for a client asks on where one ends.
            let block = u64::from(self.block.minimum.max(1));
            let start = call.offset - call.offset % block;
            let end = call.end().next_multiple_of(block).min(self.next.caps().size);
            return self.next.whole_blocks(request, start, end - start, block);
        }
        if !self.is_strict() {
            return self.next.pass(request);
        }
        match self.check(&call) {
            // Watched, for a loan must not be used for other requests unseen.
            Ok(()) => self.next.watch(self, request, 0),
            Err(e) => Outcome::Done(Err(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::Flags;

    use super::*;
    use crate::testing::{
        Answer, Spec, View, chain, check_model, client, config_error, lent, open, read_inline, session,
        started,
    };

    fn told(below: BlockSize, params: &[(&str, &str)]) -> Result<(u32, u32, u32)> {
        let disk = Spec { block_size: below, ..Spec::default() }.disk();
        let chain = chain(&disk, &["blocksize-policy"], params).unwrap();
        let session = open(&chain, client(), false)?;
        let BlockSize { minimum, preferred, maximum } = session.caps().block_size;
        Ok((minimum, preferred, maximum))
    }

    const STRICT: [(&str, &str); 4] = [
        ("blocksize-minimum", "512"),
        ("blocksize-preferred", "4K"),
        ("blocksize-maximum", "8K"),
        ("blocksize-error-policy", "error"),
    ];

    #[test]
    fn model() {
        check_model(&["blocksize-policy"], &[], 20_000, &View::same(20_000));
        check_model(&["blocksize-policy"], &STRICT[..3], 20_480, &View::same(20_480));
    }

    #[test]
    fn what_clients_are_told() {
        let unset = BlockSize::default();
        let set = BlockSize { minimum: 512, preferred: 8192, maximum: 1 << 20 };
        let told_ok = |below, params: &[_]| told(below, params).unwrap();
        assert_eq!(told_ok(unset, &[]), (0, 0, 0));
        assert_eq!(told_ok(set, &[]), (512, 8192, 1 << 20));
        assert_eq!(told_ok(unset, &[("blocksize-preferred", "32K")]), (1, 32768, u32::MAX));
        assert_eq!(told_ok(unset, &[("blocksize-minimum", "4K")]), (4096, 4096, u32::MAX));
        assert_eq!(told_ok(unset, &[("blocksize-maximum", "64K")]), (1, 4096, 65536));
        assert_eq!(told_ok(set, &[("blocksize-minimum", "4K")]), (4096, 8192, 1 << 20));
        assert_eq!(told_ok(set, &[("blocksize-preferred", "512")]), (512, 512, 1 << 20));
        let disconnect = [("blocksize-minimum", "512"), ("blocksize-write-disconnect", "10000")];
        assert_eq!(told_ok(unset, &disconnect), (512, 4096, 9728));
        assert!(told(unset, &[("blocksize-minimum", "32K")]).is_err());
        assert!(told(set, &[("blocksize-maximum", "4K")]).is_err());
    }

    #[test]
    fn other_requests_are_refused_when_asked() {
        let disk = Spec::default().disk();
        let session = session(&disk, "blocksize-policy", &STRICT);
        let mut buf = [0; 16_384];
        for (length, offset) in [(511, 0), (1, 0), (513, 0), (512, 1)] {
            let n = length as usize;
            for error in [
                session.pread(&mut buf[..n], offset).unwrap_err(),
                read_inline(&session, &mut buf[..n], offset).unwrap_err(),
                session.pwrite(&buf[..n], offset, Flags::empty()).unwrap_err(),
                session.trim(length, offset, Flags::empty()).unwrap_err(),
                session.zero(length, offset, Flags::empty()).unwrap_err(),
                session.cache(length, offset).unwrap_err(),
                session.extents(length, offset, Flags::empty()).unwrap_err(),
            ] {
                assert_eq!(error.errno(), Errno::EINVAL, "{length}@{offset}");
            }
        }
        assert_eq!(session.pread(&mut buf, 0).unwrap_err().errno(), Errno::EINVAL);
        assert_eq!(session.pwrite(&buf, 0, Flags::empty()).unwrap_err().errno(), Errno::EINVAL);
        assert!(disk.calls().is_empty());
        session.pread(&mut buf[..8192], 512).unwrap();
        session.pwrite(&buf[..512], 8192, Flags::empty()).unwrap();
        // The maximum is about data that travels.
        session.zero(16_384, 0, Flags::empty()).unwrap();
        session.trim(16_384, 0, Flags::empty()).unwrap();
    }

    /// A disk that ends within a block can be read to its end.
    #[test]
    fn the_end_of_the_disk_may_be_a_part_of_a_block() {
        let disk = Spec::sized(1000).disk();
        let over = |policy| {
            let params = [STRICT[0], STRICT[1], STRICT[2], ("blocksize-error-policy", policy)];
            session(&disk, "blocksize-policy", &params)
        };
        let error = over("error");
        error.pread(&mut [0; 488], 512).unwrap();
        error.pread(&mut [0; 1000], 0).unwrap();
        error.pwrite(&[0; 488], 512, Flags::empty()).unwrap();
        error.extents(488, 512, Flags::empty()).unwrap();
        assert!(error.pread(&mut [0; 487], 513).is_err(), "the start is aligned all the same");
        assert!(error.pread(&mut [0; 487], 512).is_err());
        for policy in ["strict-error", "strict"] {
            assert_eq!(over(policy).pread(&mut [0; 488], 512).unwrap_err().errno(), Errno::EINVAL);
            over(policy).pread(&mut [0; 512], 0).unwrap();
        }
    }

    #[test]
    fn extents_are_in_whole_blocks() {
        let data = [vec![0; 600], vec![1; 600], vec![0; 800]].concat();
        let disk = Spec { data, ..Spec::default() }.disk();
        let extents = |params: &[_], length, offset| {
            let list =
                session(&disk, "blocksize-policy", params).extents(length, offset, Flags::empty()).unwrap();
            list.iter().map(|e| (e.offset, e.length, e.kind())).collect::<Vec<_>>()
        };
        let whole = [(0, 512, 3), (512, 1024, 0), (1536, 464, 3)];
        assert_eq!(extents(&STRICT[..1], 2000, 0), whole);
        assert_eq!(extents(&STRICT[..1], 1, 600), [(600, 424, 0)], "to the end of the block");
        assert_eq!(extents(&STRICT, 512, 512), [(512, 512, 0)]);
    }

    #[test]
    fn other_requests_pass_by_default() {
        let disk = Spec::default().disk();
        let session = session(&disk, "blocksize-policy", &STRICT[..3]);
        session.pread(&mut [0; 16_384], 3).unwrap();
        session.pwrite(&[0; 3], 3, Flags::empty()).unwrap();
        assert_eq!(disk.calls().len(), 2);
    }

    #[test]
    fn a_client_that_writes_too_much_is_disconnected() {
        let disk = Spec::default().disk();
        let session = session(&disk, "blocksize-policy", &[("blocksize-write-disconnect", "4K")]);
        session.pwrite(&[0; 4096], 0, Flags::empty()).unwrap();
        assert!(!session.client().leave.is_raised());
        let error = session.pwrite(&[0; 4097], 0, Flags::empty()).unwrap_err();
        assert_eq!(error.errno(), Errno::ESHUTDOWN);
        assert!(session.client().leave.is_raised() && session.client().gone.is_raised());
        assert_eq!(disk.count(Op::Write), 1);
    }

    #[test]
    fn loans() {
        let disk = Spec::default().disk();
        let strict = session(&disk, "blocksize-policy", &STRICT);
        for op in [Op::Read, Op::Write] {
            assert_eq!(lent(&strict, op, 0, 511), None);
            assert_eq!(lent(&strict, op, 0, 16_384), None);
            assert_eq!(lent(&strict, op, 512, 512), Some(512));
        }
        let allow = session(&disk, "blocksize-policy", &STRICT[..3]);
        assert_eq!(lent(&allow, Op::Write, 3, 16_384), Some(3));
    }

    #[test]
    fn what_is_not_refused_may_be_started() {
        let disk = Spec { later: true, ..Spec::default() }.disk();
        let session = session(&disk, "blocksize-policy", &STRICT);
        let read = |length| started(&session, Call::new(Op::Read, 0, length), &[]);
        assert!(matches!(read(512), Answer::Started(Ok(_))));
        assert!(matches!(read(511), Answer::Done(Err(_))));
    }

    #[test]
    fn sizes_that_break_the_rules_are_refused() {
        let refused = |params: &[_], message: &str| {
            let error = config_error("blocksize-policy", params);
            assert!(error.contains(message), "{error}");
        };
        refused(&[("blocksize-minimum", "3")], "not a power of 2 between 1 and 64K");
        refused(&[("blocksize-minimum", "128K")], "not a power of 2 between 1 and 64K");
        refused(&[("blocksize-preferred", "256")], "not a power of 2 between 512 and 32M");
        refused(&[("blocksize-preferred", "64M")], "not a power of 2 between 512 and 32M");
        refused(&[("blocksize-maximum", "0")], "leave it out");
        refused(&[("blocksize-maximum", "4G")], "over 4294967295");
        refused(&[("blocksize-maximum", "x")], "blocksize-maximum: ");
        refused(&[("blocksize-error-policy", "x")], "use allow, error or strict-error");
        refused(
            &[("blocksize-minimum", "4K"), ("blocksize-preferred", "512")],
            "is over blocksize-preferred",
        );
        refused(&[("blocksize-preferred", "4K"), ("blocksize-maximum", "2K")], "is over blocksize-maximum");
        refused(&[("blocksize-minimum", "512"), ("blocksize-maximum", "1000")], "is not a multiple");
    }
}
