//! A plugin with every optional method, each of which says in the debug log that it was called.

use std::sync::{Barrier, Mutex, PoisonError};

use nbdkit::*;

const SIZE: usize = 1 << 20;

static DISK: Mutex<Vec<u8>> = Mutex::new(Vec::new());
static MEETING: Barrier = Barrier::new(2);

struct Everything {
    export: String,
}

fn with_disk<T>(use_it: impl FnOnce(&mut [u8]) -> T) -> T {
    let mut disk = DISK.lock().unwrap_or_else(PoisonError::into_inner);
    disk.resize(SIZE, 0);
    use_it(&mut disk)
}

impl Drop for Everything {
    fn drop(&mut self) {
        debug!("called: drop {}", self.export);
    }
}

impl Server for Everything {
    fn name() -> &'static str {
        "everything"
    }

    fn longname() -> Option<&'static str> {
        Some("every method there is")
    }

    fn version() -> Option<&'static str> {
        Some("1.2.3")
    }

    fn description() -> Option<&'static str> {
        Some("a plugin for tests\nin two lines")
    }

    fn config_help() -> Option<&'static str> {
        Some("size=<SIZE>  is only looked at")
    }

    fn magic_config_key() -> Option<&'static str> {
        Some("word")
    }

    fn load() {
        debug!("called: load");
    }

    fn dump_plugin() {
        println!("everything_answer=42");
    }

    fn config(key: &str, value: &str) -> Result<()> {
        match key {
            "size" => debug!("called: config size {}", parse_size(value)?),
            "flag" => debug!("called: config flag {}", parse_bool(value)?),
            "chance" => debug!("called: config chance {}", parse_probability("chance", value)?),
            "word" => debug!("called: config word {value} stdio {} {}", stdio_safe(), is_stdio_safe()),
            _ => return Err(Error::new(libc::EINVAL, format!("unknown parameter {key}"))),
        }
        Ok(())
    }

    fn config_complete() -> Result<()> {
        debug!("called: config_complete");
        Ok(())
    }

    fn thread_model() -> Result<ThreadModel> {
        debug!("called: thread_model");
        Ok(ThreadModel::Parallel)
    }

    fn get_ready() -> Result<()> {
        debug!("called: get_ready");
        Ok(())
    }

    fn after_fork() -> Result<()> {
        debug!("called: after_fork");
        Ok(())
    }

    fn preconnect(readonly: bool) -> Result<()> {
        let peer = peername::<std::os::unix::net::SocketAddr>().map(|address| address.is_unnamed());
        debug!("called: preconnect readonly {readonly} unnamed peer {peer:?}");
        if peername::<std::net::SocketAddr>().is_ok() {
            return Err(Error::new(libc::EPERM, "a Unix socket has no internet address"));
        }
        Ok(())
    }

    fn list_exports(readonly: bool, is_tls: bool, exports: &mut ExportHandle) -> Result<()> {
        debug!("called: list_exports readonly {readonly} tls {is_tls}");
        exports.add_default()?;
        exports.add("second", Some("the second one"))?;
        exports.add("third", None)
    }

    fn default_export(readonly: bool, is_tls: bool) -> Result<Option<String>> {
        debug!("called: default_export readonly {readonly} tls {is_tls}");
        Ok(Some("first".to_owned()))
    }

    fn open(readonly: bool) -> Result<Box<dyn Server>> {
        let export = export_name().map_err(|error| Error::new(libc::EINVAL, error.to_string()))?;
        debug!("called: open {export} readonly {readonly} tls {}", is_tls()?);
        Ok(Box::new(Everything { export }))
    }

    fn get_size(&self) -> Result<i64> {
        Ok(SIZE as i64)
    }

    fn export_description(&self) -> Result<Option<String>> {
        Ok(Some(format!("about {}", self.export)))
    }

    fn block_size(&self) -> Result<BlockSize> {
        Ok(BlockSize { minimum: 512, preferred: 4096, maximum: 1 << 20 })
    }

    fn can_write(&self) -> Result<bool> {
        Ok(self.export != "third")
    }

    fn can_flush(&self) -> Result<bool> {
        Ok(true)
    }

    fn is_rotational(&self) -> Result<bool> {
        Ok(true)
    }

    fn can_trim(&self) -> Result<bool> {
        Ok(true)
    }

    fn can_zero(&self) -> Result<bool> {
        Ok(true)
    }

    fn can_fast_zero(&self) -> Result<bool> {
        Ok(true)
    }

    fn can_extents(&self) -> Result<bool> {
        Ok(true)
    }

    fn can_fua(&self) -> Result<FuaFlags> {
        Ok(FuaFlags::Native)
    }

    fn can_multi_conn(&self) -> Result<bool> {
        Ok(true)
    }

    fn can_cache(&self) -> Result<CacheFlags> {
        Ok(CacheFlags::Native)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match self.export.as_str() {
            // Returns only when two requests are in the plugin at once.
            "meeting" => {
                MEETING.wait();
            }
            "shutdown" => shutdown(),
            "disconnect" => disconnect(true),
            _ => (),
        }
        let start = offset as usize;
        with_disk(|disk| buf.copy_from_slice(&disk[start..start + buf.len()]));
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        debug!("called: write_at {} {offset} {:?}", buf.len(), flags);
        let start = offset as usize;
        with_disk(|disk| disk[start..start + buf.len()].copy_from_slice(buf));
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        debug!("called: flush");
        Ok(())
    }

    fn trim(&self, count: u32, offset: u64, flags: Flags) -> Result<()> {
        debug!("called: trim {count} {offset} {flags:?}");
        Ok(())
    }

    fn zero(&self, count: u32, offset: u64, flags: Flags) -> Result<()> {
        debug!("called: zero {count} {offset} {flags:?}");
        let start = offset as usize;
        with_disk(|disk| disk[start..start + count as usize].fill(0));
        Ok(())
    }

    fn extents(&self, count: u32, offset: u64, flags: Flags, extent_handle: &mut ExtentHandle) -> Result<()> {
        debug!("called: extents {count} {offset} {flags:?}");
        let half = SIZE as u64 / 2;
        extent_handle.add(0, half, ExtentType::Hole)?;
        extent_handle.add(half, half, ExtentType::Zero)
    }

    fn cache(&self, count: u32, offset: u64) -> Result<()> {
        debug!("called: cache {count} {offset}");
        Ok(())
    }

    fn cleanup() {
        debug!("called: cleanup");
    }

    fn unload() {
        debug!("called: unload");
    }
}

plugin!(Everything {
    longname,
    version,
    description,
    config_help,
    magic_config_key,
    load,
    dump_plugin,
    config,
    config_complete,
    thread_model,
    get_ready,
    after_fork,
    preconnect,
    list_exports,
    default_export,
    export_description,
    block_size,
    can_write,
    can_flush,
    is_rotational,
    can_trim,
    can_zero,
    can_fast_zero,
    can_extents,
    can_fua,
    can_multi_conn,
    can_cache,
    write_at,
    flush,
    trim,
    zero,
    extents,
    cache,
    cleanup,
    unload,
});
