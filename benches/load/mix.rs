//! The kinds of requests, and their shares in a load.

use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};

/// The kind of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Read,
    Write,
    Trim,
}

impl Op {
    pub(crate) const ALL: [Op; 3] = [Op::Read, Op::Write, Op::Trim];

    /// As the command line has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Trim => "trim",
        }
    }
}

/// How many of so many requests are of each kind, in the order of [`Op::ALL`]; not all zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mix([u16; 3]);

impl Mix {
    pub(crate) const READS: Mix = Mix([1, 0, 0]);
    pub(crate) const WRITES: Mix = Mix([0, 1, 0]);

    /// Whether requests of that kind are among them.
    pub(crate) fn has(self, op: Op) -> bool {
        self.0[op as usize] > 0
    }

    /// Changes nothing on the disk.
    pub(crate) fn only_reads(self) -> bool {
        !self.has(Op::Write) && !self.has(Op::Trim)
    }

    /// The kind that a random number stands for.
    pub(super) fn pick(self, random: u64) -> Op {
        let total: u64 = self.0.iter().copied().map(u64::from).sum();
        let mut at = random % total.max(1);
        for (op, share) in Op::ALL.into_iter().zip(self.0) {
            match at.checked_sub(share.into()) {
                Some(rest) => at = rest,
                None => return op,
            }
        }
        Op::Read
    }
}

impl FromStr for Mix {
    type Err = anyhow::Error;

    /// Reads `read=70,write=20,trim=10`; a share that is left out is 1.
    fn from_str(text: &str) -> Result<Self> {
        let mut mix = Mix([0; 3]);
        for part in text.split(',') {
            let (name, share) = part.split_once('=').unwrap_or((part, "1"));
            let Some(op) = Op::ALL.into_iter().find(|op| op.name() == name) else {
                bail!("unknown kind of request `{name}`: use read, write, trim");
            };
            ensure!(!mix.has(op), "{name} is given twice");
            mix.0[op as usize] =
                share.parse().with_context(|| format!("the share of {name} is no number from 0 to 65535"))?;
        }
        ensure!(mix.0.iter().any(|share| *share > 0), "all shares are 0");
        Ok(mix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_kept() {
        let mix: Mix = "trim=10,read=70,write=20".parse().unwrap();
        let mut counts = [0; 3];
        for random in 1000..1100 {
            counts[mix.pick(random) as usize] += 1;
        }
        assert_eq!(counts, [70, 20, 10]);
        assert_eq!("read".parse::<Mix>().unwrap(), Mix::READS);
        assert!("read=0,write".parse::<Mix>().unwrap().pick(u64::MAX) == Op::Write);
    }

    #[test]
    fn bad_mixes_are_refused() {
        for text in ["", "read=0", "flush", "read=-1", "read,read", "read=65536", "read=1,,write=1"] {
            assert!(text.parse::<Mix>().is_err(), "{text}");
        }
    }
}
