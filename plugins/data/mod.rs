//! A disk in memory that starts with data from the command line.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
    process::Stdio,
    sync::Arc,
};

use anyhow::{Context as _, bail};
use base64::{
    Engine as _,
    alphabet::STANDARD,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use nbdkit_core::{Errno, Handle, Info, Open, Plugin, Result, ShutdownFlag, params};

use self::value::{Target, Value};
use crate::memory::{Allocator, Shared, Storage, allocator_help};

mod evaluator;
mod parser;
mod scanner;
mod sources;
mod tree;
mod value;

const HELP: &str = concat!(
    "[data=]TEXT             The data in the language that nbdkit-data-plugin(1) describes\n\
     raw=BYTES               The data as it is\n\
     base64=TEXT             The data in base64\n\
     size=SIZE               Size of the disk (default: that of the data)\n\
     NAME=TEXT               What $NAME stands for in data=\n",
    allocator_help!()
);

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
    data: Option<Source>,
    size: Option<u64>,
    /// Parameters that `$NAME` may name.
    variables: Vec<(String, OsString)>,
    stdin_is_taken: bool,
    allocator: Allocator,
    /// `-D data.AST`: the text of `data=` is told in the log as it was understood.
    tell_tree: bool,
    /// `-D data.dir`: see [`Storage::told`].
    tell_pages: bool,
    disk: Option<Arc<Storage>>,
}

/// How the data was given.
enum Source {
    Bytes(Vec<u8>),
    Text(OsString),
}

impl Data {
    fn set(&mut self, data: Source) -> anyhow::Result<()> {
        if self.data.replace(data).is_some() {
            bail!("raw|base64|data parameter must be specified exactly once");
        }
        Ok(())
    }

    /// The value of a variable: the last parameter of that name, else one of the environment.
    fn variable(&self, name: &str) -> Option<OsString> {
        let parameter = self.variables.iter().rfind(|(key, _)| key == name);
        parameter.map(|(_, value)| value.clone()).or_else(|| std::env::var_os(name))
    }

    /// The data that was given.
    fn value(&self) -> anyhow::Result<Value> {
        match &self.data {
            None => bail!("raw|base64|data parameter was not specified"),
            Some(Source::Bytes(bytes)) => Ok(Value::bytes(bytes)),
            Some(Source::Text(text)) => {
                let list = parser::parse(text.as_bytes(), |name| self.variable(name))?;
                if self.tell_tree {
                    log::debug!("BEGIN AST (-D data.AST=1)");
                    tree::lines(&list).iter().for_each(|line| log::debug!("{line}"));
                    log::debug!("END AST");
                }
                // What a client sends on standard input is not for scripts.
                evaluator::evaluate(&list, if self.stdin_is_taken { Stdio::null } else { Stdio::inherit })
            }
        }
    }
}

/// The new disk, onto which the data is written.
struct Disk<'a>(&'a Storage);

impl Target for Disk<'_> {
    fn write(&mut self, data: &[u8], at: u64) -> anyhow::Result<()> {
        Ok(self.0.write(data, at)?)
    }

    fn zero(&mut self, length: u64, at: u64) -> anyhow::Result<()> {
        if length > 0 {
            self.0.clear(length, at)?;
        }
        Ok(())
    }
}

impl Plugin for Data {
    fn info(&self) -> Info {
        Info::bundled("data", "nbdkit data plugin", HELP).magic("data")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        let life = ["block_size", "config_complete", "dump_plugin", "get_ready", "after_fork"];
        Some([crate::EVERYTHING, &life].concat())
    }

    fn stdio_is_taken(&mut self) {
        self.stdin_is_taken = true;
    }

    fn debug_flag(&mut self, name: &str, value: i32) -> bool {
        match name {
            "AST" => self.tell_tree = value != 0,
            "dir" => self.tell_pages = value != 0,
            _ => return false,
        }
        true
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "raw" => self.set(Source::Bytes(value.as_bytes().to_vec()))?,
            "base64" => {
                let bytes = decode_base64(value.as_bytes()).context("base64: cannot decode the value")?;
                self.set(Source::Bytes(bytes))?;
            }
            "data" => self.set(Source::Text(value.to_owned()))?,
            "size" => self.size = Some(params::size(value)?),
            "allocator" => self.allocator = Allocator::parse(value)?,
            _ => self.variables.push((key.to_owned(), value.to_owned())),
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        match (&self.data, self.variables.first()) {
            (None, _) => bail!(
                "raw|base64|data parameter was not specified: give the disk as data='0x55 0xAA @512', for example"
            ),
            (Some(Source::Bytes(_)), Some((key, _))) => {
                bail!("extra parameters passed and not using data='...': {key} is not known")
            }
            _ => Ok(()),
        }
    }

    fn dump(&self) -> Vec<(String, String)> {
        [("data_base64".into(), "yes".into())].into_iter().chain(Allocator::dump()).collect()
    }

    /// Before the fork: files are named from the directory where the server was started.
    fn get_ready(&mut self) -> anyhow::Result<()> {
        let value = self.value()?;
        let size = self.size.unwrap_or(value.size());
        let disk = self.allocator.make(size)?.told(self.tell_pages.then_some("data"));
        value.slice(0, size.min(value.size())).write(&mut Disk(&disk), 0)?;
        self.disk = Some(Arc::new(disk));
        Ok(())
    }

    fn after_fork(&self, _: &Arc<ShutdownFlag>) -> anyhow::Result<()> {
        self.disk.as_ref().map_or(Ok(()), |disk| disk.after_fork())
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        let disk = self.disk.clone().ok_or(Errno::EINVAL)?;
        Ok(Box::new(Shared::new(disk)))
    }
}

#[cfg(test)]
mod tests {
    use crate::testkit::{config_error, disk, extents, lend, read_all, start};
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
            (&[("data", "1 2 @4")], b"\x01\x02\0\0"),
            (&[("data", "1 2 3 4"), ("size", "3")], b"\x01\x02\x03"),
            (&[("data", "$x*2"), ("x", "\"a\""), ("x", "\"b\"")], b"bb"),
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
        assert!(one.pread_nowait(&mut last, 0).unwrap() && one.caps().multi_conn);
        for op in [Op::Read, Op::Write] {
            assert!(lend(&one, op, 5, 100).is_some_and(|(_, offset)| offset == 5));
        }
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
    fn patterns_of_terabytes_cost_what_they_fill() {
        let disk = disk("data", &[("data", "@1T (0*1048576 @1G)*1000 (1 @1M)*3 @0 0x55*10000")]);
        let at = (1 << 40) + (1000 << 30);
        assert_eq!(disk.size(), at + (3 << 20));
        let filled = [(0, 12288, 0), (12288, at - 12288, 3)];
        assert_eq!(extents(&disk, 0, at), filled);
        assert_eq!(extents(&disk, at, 1 << 20), [(at, 4096, 0), (at + 4096, (1 << 20) - 4096, 3)]);
    }

    #[test]
    fn bad_parameters_name_the_fix() {
        for (params, message) in [
            (&[][..], "raw|base64|data parameter was not specified"),
            (&[("size", "5")], "raw|base64|data parameter was not specified"),
            (&[("raw", "a"), ("base64", "YQ==")], "must be specified exactly once"),
            (&[("raw", "a"), ("data", "1")], "must be specified exactly once"),
            (&[("raw", "a"), ("raws", "a")], "not using data='...': raws is not known"),
            (&[("data", "1 x")], "parsing error at offset 2"),
            (&[("data", "$x")], "$x: variable not found"),
            (&[("base64", "!!")], "base64"),
            (&[("raw", "a"), ("size", "-1")], "negative"),
        ] {
            let error = config_error("data", params);
            assert!(error.contains(message), "{params:?}: {error}");
        }
    }
}
