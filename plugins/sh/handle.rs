//! An open disk whose methods are scripts.

use std::{ffi::CString, os::unix::ffi::OsStrExt, sync::Arc, time::Duration};

use nbdkit_core::{BlockSize, Caps, Client, Errno, Error, Extents, Flags, Handle, Open, Result, Support};

use super::{
    alarm::{Alarm, Patience},
    parse,
    plugin::Shared,
    scripts::{Call, Methods},
};

/// The time that scripts have which bring a disk to rest, even if they start late.
const AT_LEAST: Duration = Duration::from_secs(1);

/// See the module.
pub(super) struct Opened<M: Methods> {
    scripts: Arc<Shared<M>>,
    client: Arc<Client>,
    /// Goes off when the client is gone.
    gone: Arc<Alarm>,
    /// What the script called the open disk.
    name: CString,
    /// Opened so: questions about writing are not asked.
    readonly: bool,
}

impl<M: Methods> Opened<M> {
    pub(super) fn new(scripts: Arc<Shared<M>>, open: &Open) -> Result<Self> {
        let gone = Alarm::on(&open.client.gone)?;
        let call = Call::new("open")
            .boolean(open.readonly)
            .word(open.export_name.as_bytes())?
            .boolean(open.tls)
            .client(&open.client)
            .patience(Patience::until([&gone]));
        let name = scripts.ask(call)?.map(|output| parse::handle(&output)).transpose()?;
        Ok(Opened {
            scripts,
            client: open.client.clone(),
            gone,
            name: name.unwrap_or_default(),
            readonly: open.readonly,
        })
    }

    /// A call of a method that changes nothing: it is not worth waiting for once the client is gone.
    fn asking(&self, method: &'static str) -> Result<Call<'_>> {
        let call = Call::new(method).word(self.name.as_bytes())?;
        Ok(call.client(&self.client).patience(Patience::until([&self.gone])))
    }

    /// A call of a method that changes something: it goes on without the client, until the server stops too.
    fn changing(&self, method: &'static str) -> Result<Call<'_>> {
        Ok(self.asking(method)?.patience(self.until_all_stops()))
    }

    fn until_all_stops(&self) -> Patience<'_> {
        Patience::until([&self.gone].into_iter().chain(self.scripts.alarm()))
    }

    fn range<'a>(call: Call<'a>, length: u64, offset: u64) -> Result<Call<'a>> {
        call.number(length)?.number(offset)
    }

    fn can(&self, method: &'static str) -> Result<Option<bool>> {
        self.scripts.decide(self.asking(method)?)
    }

    fn support(&self, method: &'static str, missing: Support) -> Result<Support> {
        let output = self.scripts.ask(self.asking(method)?)?;
        output.map_or(Ok(missing), |output| parse::support(method, &output))
    }

    fn get_size(&self) -> Result<u64> {
        let output = self.scripts.ask(self.asking("get_size")?)?;
        parse::size(&output.ok_or_else(|| required("get_size"))?)
    }

    fn block_size(&self) -> Result<BlockSize> {
        let output = self.scripts.ask(self.asking("block_size")?)?;
        output.map_or_else(|| Ok(BlockSize::default()), |output| parse::block_size(&output))
    }
}

/// The flags of a request, as scripts know them.
fn flags(flags: Flags) -> String {
    let names = [
        (Flags::FUA, "fua"),
        (Flags::MAY_TRIM, "may_trim"),
        (Flags::FAST_ZERO, "fast"),
        (Flags::REQ_ONE, "req_one"),
    ];
    let given = names.into_iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, name)| name);
    given.collect::<Vec<_>>().join(",")
}

fn required(method: &str) -> Error {
    Error::new(Errno::EIO, format!("the script has no {method} method, which is required"))
}

impl<M: Methods> Handle for Opened<M> {
    fn capabilities(&self) -> Result<Caps> {
        let yes = |method| Ok(self.can(method)?.unwrap_or(false));
        let mut caps = Caps::of_size(self.get_size()?)
            .with_block_size(self.block_size()?)
            .with_write(if self.readonly { Ok(false) } else { yes("can_write") })
            .with_flush(yes("can_flush"))
            .with_multi_conn(yes("can_multi_conn"))
            .with_cache(self.support("can_cache", Support::None))
            .with_extents(yes("can_extents"))
            .with_rotational(yes("is_rotational"));
        if caps.write {
            let zero = |native| if native { Support::Native } else { Support::Emulate };
            let fua = if caps.flush { Support::Emulate } else { Support::None };
            caps = caps
                .with_trim(yes("can_trim"))
                .with_zero(yes("can_zero").map(zero))
                .with_fua(self.support("can_fua", fua));
            let fast = |native| Ok(self.can("can_fast_zero")?.unwrap_or(native != Support::Native));
            caps = {
                let answer = caps.can_zero().and_then(fast);
                caps.with_fast_zero(answer)
            };
        }
        Ok(caps)
    }

    fn export_description(&self) -> Result<Option<String>> {
        let output = self.scripts.ask(self.asking("export_description")?)?;
        Ok(output.map(|output| parse::text(&output)))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let call = Self::range(self.asking("pread")?, buf.len() as u64, offset)?.fill(buf);
        if self.scripts.run(call)? { Ok(()) } else { Err(required("pread")) }
    }

    fn pwrite(&self, buf: &[u8], offset: u64, given: Flags) -> Result<()> {
        let call = Self::range(self.changing("pwrite")?, buf.len() as u64, offset)?;
        if self.scripts.run(call.word(flags(given))?.input(buf))? { Ok(()) } else { Err(required("pwrite")) }
    }

    fn flush(&self) -> Result<()> {
        let patience = self.until_all_stops().at_least(AT_LEAST);
        // One that says it can and has no such method has nothing to do.
        self.scripts.run(self.changing("flush")?.patience(patience)).map(drop)
    }

    fn trim(&self, length: u64, offset: u64, given: Flags) -> Result<()> {
        let call = Self::range(self.changing("trim")?, length, offset)?.word(flags(given))?;
        // A trim promises nothing.
        self.scripts.run(call).map(drop)
    }

    fn zero(&self, length: u64, offset: u64, given: Flags) -> Result<()> {
        let call = Self::range(self.changing("zero")?, length, offset)?.word(flags(given))?;
        if self.scripts.run(call)? { Ok(()) } else { Err(Errno::EOPNOTSUPP.into()) }
    }

    fn extents(&self, length: u64, offset: u64, given: Flags, extents: &mut Extents) -> Result<()> {
        let call = Self::range(self.asking("extents")?, length, offset)?.word(flags(given))?;
        let output = self.scripts.ask(call)?.ok_or_else(|| required("extents"))?;
        parse::extents(&output, extents)
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        // It is only a hint.
        self.scripts.run(Self::range(self.asking("cache")?, length, offset)?).map(drop)
    }
}

impl<M: Methods> Drop for Opened<M> {
    fn drop(&mut self) {
        let patience = self.until_all_stops().at_least(AT_LEAST);
        let closed = self.changing("close").and_then(|call| self.scripts.run(call.patience(patience)));
        if let Err(e) = closed {
            log::error!("close: {e}");
        }
    }
}
