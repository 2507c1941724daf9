//! A disk in memory that starts with data from the command line.

use std::{ffi::OsStr, os::unix::ffi::OsStrExt, sync::Arc};

use anyhow::{Context as _, bail};
use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use nbdkit_common::Regions;
use nbdkit_core::{Errno, Handle, Info, Open, Plugin, Result, params};

use crate::{
    backing::Backing,
    joined::{Joined, Part},
};

const HELP: &str = "\
raw=<BYTES>       The data as it is.
base64=<TEXT>     The data in base64.
size=<SIZE>       Size of the disk (default: that of the data).";

const DECODER: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Decodes base64, with or without padding; white space is skipped.
pub(crate) fn decode_base64(text: &[u8]) -> std::result::Result<Vec<u8>, base64::DecodeError> {
    let bare: Vec<u8> = text.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    DECODER.decode(bare)
}

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::new(Data::default())
}

#[derive(Default)]
struct Data {
    data: Option<Vec<u8>>,
    size: Option<u64>,
    disk: Option<Arc<Regions<Part>>>,
}

impl Data {
    fn set(&mut self, data: Vec<u8>) -> anyhow::Result<()> {
        if self.data.replace(data).is_some() {
            bail!("exactly one of raw= and base64= must be given, and only once");
        }
        Ok(())
    }
}

impl Plugin for Data {
    fn info(&self) -> Info {
        Info::bundled("data", "nbdkit data plugin", HELP).magic("data")
    }

    fn callbacks(&self) -> Vec<&'static str> {
        [crate::EVERYTHING, &["config_complete", "dump_plugin", "get_ready"]].concat()
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "raw" => self.set(value.as_bytes().to_vec())?,
            "base64" => {
                self.set(decode_base64(value.as_bytes()).context("base64: cannot decode the value")?)?
            }
            "data" => bail!("the data language of data= is not supported yet: use raw= or base64="),
            "size" => self.size = Some(params::size(value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        if self.data.is_none() {
            bail!("you must supply the data as raw= or base64=");
        }
        Ok(())
    }

    fn dump(&self) -> Vec<(String, String)> {
        vec![("data_base64".into(), "yes".into())]
    }

    fn get_ready(&mut self) -> anyhow::Result<()> {
        let mut data = self.data.take().unwrap_or_default();
        let size = self.size.unwrap_or(data.len() as u64);
        data.truncate(usize::try_from(size).unwrap_or(usize::MAX));
        let memory =
            Backing::memory(size).with_context(|| format!("could not make a disk of {size} bytes"))?;
        memory.write(&data, 0)?;
        let mut disk = Regions::new();
        disk.push(size, Part::File(memory)).context("the size is over 2^63-1")?;
        self.disk = Some(Arc::new(disk));
        Ok(())
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        let disk = self.disk.clone().ok_or(Errno::EINVAL)?;
        Ok(Box::new(Joined::new(disk)))
    }
}

#[cfg(test)]
mod tests {
    use crate::testkit::{config_error, disk, extents, read_all, start};
    use nbdkit_core::{Flags, Op};

    #[test]
    fn the_disk_starts_with_the_data() {
        for (params, content) in [
            (&[("raw", "hello")][..], &b"hello"[..]),
            (&[("raw", "hello"), ("size", "3")], b"hel"),
            (&[("raw", "hello"), ("size", "7")], b"hello\0\0"),
            (&[("size", "0"), ("raw", "hello")], b""),
            (&[("raw", "")], b""),
            (&[("base64", "aGVsbG8=")], b"hello"),
            (&[("base64", "aGVs\n bG8")], b"hello"),
        ] {
            assert_eq!(read_all(&disk("data", params)), content, "{params:?}");
        }
    }

    #[test]
    fn the_disk_is_shared_and_sparse() {
        let chain = start("data", &[("raw", "hello"), ("size", "1T")]).unwrap();
        let (one, other) = (crate::testkit::open(&chain).unwrap(), crate::testkit::open(&chain).unwrap());
        assert_eq!(extents(&one, 0, 1 << 40), [(0, 4096, 0), (4096, (1 << 40) - 4096, 3)]);
        one.pwrite(b"x", (1 << 40) - 1, Flags::FUA).unwrap();
        let mut last = [0; 2];
        other.pread(&mut last, (1 << 40) - 2).unwrap();
        assert_eq!(&last, b"\0x");
        other.zero(1 << 40, 0, Flags::FAST_ZERO).unwrap();
        assert_eq!(extents(&one, 0, 1 << 40), [(0, 1 << 40, 3)]);
        assert!(!one.may_block(Op::Read) && one.caps().multi_conn);
        assert!(one.loan(5, 100).is_some_and(|loan| loan.offset == 5 && loan.writable));
    }

    #[test]
    fn the_largest_disk_starts() {
        let largest = i64::MAX as u64;
        let disk = disk("data", &[("raw", "x"), ("size", "9223372036854775807")]);
        assert_eq!(disk.size(), largest);
        disk.pwrite(b"end", largest - 3, Flags::empty()).unwrap();
        disk.trim(largest, 0, Flags::empty()).unwrap();
        assert_eq!(extents(&disk, 0, largest), [(0, largest, 3)]);
    }

    #[test]
    fn bad_parameters_name_the_fix() {
        for (params, message) in [
            (&[][..], "you must supply the data"),
            (&[("size", "5")], "you must supply the data"),
            (&[("raw", "a"), ("base64", "YQ==")], "exactly one of raw= and base64="),
            (&[("raw", "a"), ("raw", "a")], "exactly one of raw= and base64="),
            (&[("base64", "!!")], "base64"),
            (&[("data", "0x55*100")], "use raw= or base64="),
            (&[("raw", "a"), ("size", "-1")], "negative"),
        ] {
            let error = config_error("data", params);
            assert!(error.contains(message), "{params:?}: {error}");
        }
    }
}
