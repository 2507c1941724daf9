//! The random plugin: a disk of random bytes, the same for the same seed.
//!
//! Writing is allowed and checked, so that a copy of the disk onto itself proves the program that copies.

use std::ffi::OsStr;

use anyhow::Context as _;
use nbdkit_core::{
    Caps, Errno, Error, Flags, Handle, Info, Open, Outcome, Plugin, Request, Result, Support, params,
};

use crate::noise;

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::<Random>::default()
}

#[derive(Default)]
struct Random {
    size: Option<u64>,
    seed: Option<u32>,
    /// Known once the server starts.
    noise: u64,
}

impl Plugin for Random {
    fn info(&self) -> Info {
        Info::bundled(
            "random",
            "a disk of random bytes",
            "[size=]SIZE  (required) Size of the disk\n\
             seed=SEED               The same disk for the same number (default: another one each time)",
        )
        .magic("size")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        let more = ["can_write", "can_trim", "can_zero", "pwrite", "trim", "zero", "config_complete"];
        Some([crate::READ_ONLY, &more].concat())
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "size" => self.size = Some(params::size(value)?),
            "seed" => self.seed = Some(params::integer("seed", value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        self.size.context("you must specify size=SIZE on the command line, such as size=1G")?;
        self.noise = match self.seed {
            Some(seed) => noise::spread(seed.into()),
            None => noise::any_seed()?,
        };
        Ok(())
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Noise { size: self.size.unwrap_or_default(), seed: self.noise }))
    }
}

struct Noise {
    size: u64,
    seed: u64,
}

impl Noise {
    fn refuse<T>() -> Result<T> {
        Err(Error::new(Errno::EIO, "attempt to trim or zero non-sparse random disk"))
    }
}

impl Handle for Noise {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(self.size)
            .with_write(true)
            .with_trim(true)
            .with_zero(Support::Native)
            .with_multi_conn(true)
            .with_cache(Support::Native))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        noise::fill(self.seed, buf, offset);
        Ok(())
    }

    fn pwrite(&self, buf: &[u8], offset: u64, _: Flags) -> Result<()> {
        noise::check(buf, offset, |buf, at| noise::fill(self.seed, buf, at))
    }

    fn trim(&self, _: u64, _: u64, _: Flags) -> Result<()> {
        Self::refuse()
    }

    fn zero(&self, _: u64, _: u64, _: Flags) -> Result<()> {
        Self::refuse()
    }

    fn cache(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        request.run(self)
    }
}

#[cfg(test)]
mod tests {
    use crate::testkit::{config_error, disk, read_all};

    #[test]
    fn a_seed_makes_a_disk() {
        let of = |seed| read_all(&disk("random", &[("size", "10000"), ("seed", seed)]));
        assert_eq!(of("1"), of("1"));
        assert_ne!(of("1"), of("2"));
        let any = || read_all(&disk("random", &[("size", "10000")]));
        assert_ne!(any(), any());
    }

    #[test]
    fn bad_parameters() {
        for (params, message) in [
            (&[][..], "you must specify size="),
            (&[("size", "1M"), ("seed", "x")], "seed"),
            (&[("size", "1M"), ("seed", "-1")], "seed"),
            (&[("size", "1M"), ("seed", "4294967296")], "seed"),
        ] {
            assert!(config_error("random", params).contains(message), "{params:?}");
        }
    }
}
