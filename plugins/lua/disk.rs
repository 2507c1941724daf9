//! A handle: what the script's `open` returned, and the calls about it. What a script lacks is answered as the server
//! answers for a plugin that lacks it.

use std::sync::Arc;

use mlua::Value;
use nbdkit::{BlockSize, CacheFlags, Error, ExtentHandle, Flags, FuaFlags, Result, Server};

use crate::{answers, script::Script};

/// An open disk.
pub(crate) struct Disk {
    /// Any value of Lua's; it is not collected while this holds it.
    handle: Value,
    script: Arc<Script>,
}

impl Disk {
    pub(crate) fn open(script: Arc<Script>, readonly: bool) -> Result<Self> {
        match script.call("open", readonly)?.unwrap_or(Value::Nil) {
            Value::Nil => Err(script.wrong("open", "must return a handle, not nil")),
            handle => Ok(Disk { handle, script }),
        }
    }

    /// Asks yes or no.
    fn ask(&self, method: &str) -> Result<Option<bool>> {
        Ok(self.script.call(method, &self.handle)?.map(|answer: Value| answers::boolean(&answer)))
    }

    /// Asks whether the disk can do what the function `request` does; if the script does not say, whether it has that
    /// function.
    fn can(&self, method: &str, request: &str) -> Result<bool> {
        match self.ask(method)? {
            Some(answer) => Ok(answer),
            None => self.script.has(request),
        }
    }

    /// The script says that it can, and it cannot.
    fn missing<T>(&self, method: &str, answer: Option<T>) -> Result<T> {
        answer.ok_or_else(|| {
            let text = format!("{method}: {} has no function {method}", self.script.name());
            Error::new(libc::EOPNOTSUPP, text)
        })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Err(error) = self.script.call::<()>("close", &self.handle) {
            nbdkit::bridge::log_error(&error.to_string());
        }
    }
}

impl Server for Disk {
    fn open(_: bool) -> Result<Box<dyn Server>> {
        Err(Error::new(libc::EINVAL, "a handle cannot be opened"))
    }

    fn name() -> &'static str {
        "lua"
    }

    fn get_size(&self) -> Result<i64> {
        let answer = self.missing("get_size", self.script.call("get_size", &self.handle)?)?;
        answers::size(&self.script, &answer)
    }

    fn export_description(&self) -> Result<Option<String>> {
        match self.script.call("export_description", &self.handle)? {
            None => Ok(None),
            Some(answer) => answers::text(&self.script, "export_description", &answer),
        }
    }

    fn block_size(&self) -> Result<BlockSize> {
        match self.script.call::<(Value, Value, Value)>("block_size", &self.handle)? {
            None => Ok(BlockSize::default()),
            Some((minimum, preferred, maximum)) => {
                answers::block_size(&self.script, &[minimum, preferred, maximum])
            }
        }
    }

    fn can_write(&self) -> Result<bool> {
        self.can("can_write", "pwrite")
    }

    fn can_flush(&self) -> Result<bool> {
        self.can("can_flush", "flush")
    }

    fn is_rotational(&self) -> Result<bool> {
        Ok(self.ask("is_rotational")?.unwrap_or(false))
    }

    fn can_trim(&self) -> Result<bool> {
        self.can("can_trim", "trim")
    }

    fn can_zero(&self) -> Result<bool> {
        self.can("can_zero", "zero")
    }

    /// A script that does not say does not know of fast zeroes: `zero` refuses them at once, which is fast.
    fn can_fast_zero(&self) -> Result<bool> {
        Ok(self.ask("can_fast_zero")?.unwrap_or(true))
    }

    fn can_extents(&self) -> Result<bool> {
        self.can("can_extents", "extents")
    }

    fn can_fua(&self) -> Result<FuaFlags> {
        match self.script.call("can_fua", &self.handle)? {
            Some(answer) => answers::fua(&self.script, &answer),
            None if self.script.has("flush")? => Ok(FuaFlags::Emulate),
            None => Ok(FuaFlags::None),
        }
    }

    fn can_multi_conn(&self) -> Result<bool> {
        Ok(self.ask("can_multi_conn")?.unwrap_or(false))
    }

    fn can_cache(&self) -> Result<CacheFlags> {
        match self.script.call("can_cache", &self.handle)? {
            Some(answer) => answers::cache(&self.script, &answer),
            None if self.script.has("cache")? => Ok(CacheFlags::Native),
            None => Ok(CacheFlags::None),
        }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let answer = self.script.call("pread", (&self.handle, buffer.len(), offset))?;
        answers::data(&self.script, &self.missing("pread", answer)?, buffer)
    }

    fn write_at(&self, buffer: &[u8], offset: u64, flags: Flags) -> Result<()> {
        let data = self.script.string(buffer)?;
        let fua = flags.contains(Flags::FUA);
        self.missing("pwrite", self.script.call("pwrite", (&self.handle, data, offset, fua))?)
    }

    fn flush(&self) -> Result<()> {
        self.missing("flush", self.script.call("flush", &self.handle)?)
    }

    fn trim(&self, count: u32, offset: u64, flags: Flags) -> Result<()> {
        let fua = flags.contains(Flags::FUA);
        self.missing("trim", self.script.call("trim", (&self.handle, count, offset, fua))?)
    }

    fn zero(&self, count: u32, offset: u64, flags: Flags) -> Result<()> {
        let [may_trim, fua, fast] =
            [Flags::MAY_TRIM, Flags::FUA, Flags::FAST_ZERO].map(|flag| flags.contains(flag));
        if fast && !self.script.has("can_fast_zero")? {
            return Err(Error::new(libc::EOPNOTSUPP, "zero: the script does not say whether it is fast"));
        }
        let arguments = (&self.handle, count, offset, may_trim, fua, fast);
        self.missing("zero", self.script.call("zero", arguments)?)
    }

    fn extents(&self, count: u32, offset: u64, flags: Flags, extents: &mut ExtentHandle) -> Result<()> {
        let req_one = flags.contains(Flags::REQ_ONE);
        let answer = self.script.call("extents", (&self.handle, count, offset, req_one))?;
        answers::extents(&self.script, &self.missing("extents", answer)?, extents)
    }

    /// Nothing to do is a way to do it.
    fn cache(&self, count: u32, offset: u64) -> Result<()> {
        self.script.call::<()>("cache", (&self.handle, count, offset)).map(drop)
    }
}
