//! The trait that a plugin implements, in the order of a plugin's life.

use std::ffi::OsStr;

use crate::{BlockSize, CacheFlags, Error, ExportHandle, ExtentHandle, Flags, FuaFlags, Result, ThreadModel};

/// A plugin, and a handle that one of its clients has open.
///
/// The functions without `self` are the plugin: they are called once in the life of the server, in the order of this
/// page. [`open`](Server::open) makes a handle for each client; the methods with `&self` are asked of it, and it is
/// dropped when the client has gone.
///
/// Four are required. The others are optional, and the server calls an optional one only if [`plugin!`] names it:
/// what a plugin does not name has the default that its description tells. (Those that return `Option<&'static str>`
/// need not be named.) One that is named but not implemented fails with `EOPNOTSUPP`.
///
/// [`plugin!`]: crate::plugin!
// The arguments of provided methods are named for the documentation.
#[allow(unused_variables)]
pub trait Server {
    /// The plugin's name: ASCII letters and digits, with dashes between them. No two plugins share one.
    fn name() -> &'static str
    where
        Self: Sized;

    /// A name for people, used in messages.
    fn longname() -> Option<&'static str>
    where
        Self: Sized,
    {
        None
    }

    /// The plugin's version, of any form. Shown by `--version` and `--dump-plugin`.
    fn version() -> Option<&'static str>
    where
        Self: Sized,
    {
        None
    }

    /// What the plugin is for, in one or more lines. Shown by `--help`.
    fn description() -> Option<&'static str>
    where
        Self: Sized,
    {
        None
    }

    /// A line for each parameter that [`config`](Server::config) takes. Shown by `--help`.
    fn config_help() -> Option<&'static str>
    where
        Self: Sized,
    {
        None
    }

    /// The key of parameters that are given without one: with `Some("file")`, `nbdkit PLUGIN disk.img` means
    /// `nbdkit PLUGIN file=disk.img`.
    ///
    /// Without it only the first parameter may lack its key, and gets the key `script`.
    fn magic_config_key() -> Option<&'static str>
    where
        Self: Sized,
    {
        None
    }

    /// Called first, once, when the plugin has been loaded. It cannot fail.
    fn load()
    where
        Self: Sized,
    {
    }

    /// Prints `key=value` lines of the plugin's own on standard output, for `--dump-plugin`.
    ///
    /// Keys that begin with the plugin's name cannot clash with others. Parameters may have been configured before.
    fn dump_plugin()
    where
        Self: Sized,
    {
    }

    /// Takes one parameter of the command line, `key=value`; called once for each, in their order.
    ///
    /// The key is an ASCII letter followed by letters, digits, `.`, `_` and `-`. The value is any UTF-8, also empty;
    /// one that is not UTF-8 is refused before it gets here. Without this method there are no parameters.
    ///
    /// # Errors
    ///
    /// An unknown key or a bad value: the server does not start. The message should name the parameter.
    fn config(key: &str, value: &str) -> Result<()>
    where
        Self: Sized,
    {
        missing("config")
    }

    /// As [`config`](Server::config), with a value that need not be UTF-8, for it may be the name of a file. Without
    /// it, such values are refused and the others reach `config`. It is registered as `config`.
    ///
    /// # Errors
    ///
    /// Those of `config`.
    fn config_os(key: &str, value: &OsStr) -> Result<()>
    where
        Self: Sized,
    {
        match value.to_str() {
            Some(value) => Self::config(key, value),
            None => Err(Error::new(libc::EINVAL, format!("{key} is not UTF-8: {value:?}"))),
        }
    }

    /// Called when all parameters have been given: the place to see whether one is missing.
    ///
    /// # Errors
    ///
    /// The server does not start.
    fn config_complete() -> Result<()>
    where
        Self: Sized,
    {
        missing("config_complete")
    }

    /// How much may happen at once. Called after [`config_complete`](Server::config_complete); without it,
    /// [`ThreadModel::Parallel`]. The server may be stricter, since its filters have a say too.
    ///
    /// # Errors
    ///
    /// The server does not start.
    fn thread_model() -> Result<ThreadModel>
    where
        Self: Sized,
    {
        missing("thread_model")
    }

    /// Called before the server goes to the background and changes to `/`: the last chance to open files by relative
    /// names and to fail visibly.
    ///
    /// # Errors
    ///
    /// The server does not start.
    fn get_ready() -> Result<()>
    where
        Self: Sized,
    {
        missing("get_ready")
    }

    /// Called when the server is in the background, before the first client. Threads must be started here: those
    /// started earlier are lost in the fork.
    ///
    /// # Errors
    ///
    /// The server ends.
    fn after_fork() -> Result<()>
    where
        Self: Sized,
    {
        missing("after_fork")
    }

    /// Called when a client has connected, before a word has been exchanged. `readonly` tells that the server runs
    /// with `-r`.
    ///
    /// The client is not authenticated yet, so this should be quick and cheap: a look at
    /// [`peername`](crate::peername), for instance.
    ///
    /// # Errors
    ///
    /// The client is turned away.
    fn preconnect(readonly: bool) -> Result<()>
    where
        Self: Sized,
    {
        missing("preconnect")
    }

    /// Lists the exports for a client that asks. `is_tls` tells whether it speaks TLS.
    ///
    /// Without it the list has the default export only.
    ///
    /// # Errors
    ///
    /// The client gets no list.
    fn list_exports(readonly: bool, is_tls: bool, exports: &mut ExportHandle) -> Result<()>
    where
        Self: Sized,
    {
        missing("list_exports")
    }

    /// The name of the export that a client means which gives the empty name. `None` forbids the empty name.
    ///
    /// Without it the default export's name is empty.
    ///
    /// # Errors
    ///
    /// The same as `None`, with a message.
    fn default_export(readonly: bool, is_tls: bool) -> Result<Option<String>>
    where
        Self: Sized,
    {
        missing("default_export")
    }

    /// Opens a handle for a client. `readonly` tells that the client will not write, because the server runs with
    /// `-r`; a plugin that never writes need not look at it.
    ///
    /// [`export_name`](crate::export_name) tells which disk the client wants. The handle is used by several threads,
    /// and by several at once under [`ThreadModel::Parallel`]: see "Threads" on the [front page](crate#threads).
    ///
    /// # Errors
    ///
    /// The client does not get the export.
    fn open(readonly: bool) -> Result<Box<dyn Server>>
    where
        Self: Sized;

    /// The size of the disk in bytes, 0 or more. It is asked once for each handle and must not change.
    ///
    /// # Errors
    ///
    /// The client does not get the export; neither does it for a negative size.
    fn get_size(&self) -> Result<i64>;

    /// A description of the export, for people. Without it there is none.
    ///
    /// # Errors
    ///
    /// The same as `None`, with a message in the log.
    fn export_description(&self) -> Result<Option<String>> {
        missing("export_description")
    }

    /// The sizes in bytes that requests should have. Without it, nothing is said about them. Servers since nbdkit
    /// 1.30 ask.
    ///
    /// # Errors
    ///
    /// The client does not get the export; neither does it for sizes that [`BlockSize`] does not allow.
    fn block_size(&self) -> Result<BlockSize> {
        missing("block_size")
    }

    /// Whether the disk can be written. Without it: whether [`write_at`](Server::write_at) is there.
    ///
    /// # Errors
    ///
    /// Like those of all questions about what a disk can do: the client does not get the export.
    fn can_write(&self) -> Result<bool> {
        missing("can_write")
    }

    /// Whether [`flush`](Server::flush) may be called. Without it: whether there is a flush.
    ///
    /// # Errors
    ///
    /// The client does not get the export.
    fn can_flush(&self) -> Result<bool> {
        missing("can_flush")
    }

    /// Whether the medium rotates, so that clients should order their requests. Without it: no.
    ///
    /// # Errors
    ///
    /// The client does not get the export.
    fn is_rotational(&self) -> Result<bool> {
        missing("is_rotational")
    }

    /// Whether [`trim`](Server::trim) may be called. Without it: whether there is a trim.
    ///
    /// # Errors
    ///
    /// The client does not get the export.
    fn can_trim(&self) -> Result<bool> {
        missing("can_trim")
    }

    /// Whether [`zero`](Server::zero) is to be called. Without it: whether there is a zero. Clients can zero any
    /// disk that can be written; where the answer is no, the server writes zeroes.
    ///
    /// # Errors
    ///
    /// The client does not get the export.
    fn can_zero(&self) -> Result<bool> {
        missing("can_zero")
    }

    /// Whether [`zero`](Server::zero) obeys [`Flags::FAST_ZERO`]. Without it: no if zero is used; yes, by failing at
    /// once, if it is not.
    ///
    /// # Errors
    ///
    /// The client does not get the export.
    fn can_fast_zero(&self) -> Result<bool> {
        missing("can_fast_zero")
    }

    /// Whether [`extents`](Server::extents) may be called. Without it: whether there is an extents. Where the answer
    /// is no, all of the disk counts as data.
    ///
    /// # Errors
    ///
    /// The client does not get the export.
    fn can_extents(&self) -> Result<bool> {
        missing("can_extents")
    }

    /// How [`Flags::FUA`] is done. Without it: by [`flush`](Server::flush) if there is one, else not at all.
    ///
    /// # Errors
    ///
    /// The client does not get the export.
    fn can_fua(&self) -> Result<FuaFlags> {
        missing("can_fua")
    }

    /// Whether one client may spread its requests over several connections: what one handle has flushed, or written
    /// with [`Flags::FUA`], all others must see. Without it: no.
    ///
    /// # Errors
    ///
    /// The client does not get the export.
    fn can_multi_conn(&self) -> Result<bool> {
        missing("can_multi_conn")
    }

    /// How cache requests are done. Without it: by [`cache`](Server::cache) if there is one, else not at all.
    ///
    /// # Errors
    ///
    /// The client does not get the export.
    fn can_cache(&self) -> Result<CacheFlags> {
        missing("can_cache")
    }

    /// Fills all of `buf` with what is on the disk from byte `offset` on.
    ///
    /// # Errors
    ///
    /// There is no short read: what cannot be read wholly fails, and the client gets nothing of `buf`.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes all of `buf` to the disk from byte `offset` on. `flags` may hold [`Flags::FUA`]. Without it the disk is
    /// read-only.
    ///
    /// # Errors
    ///
    /// There is no short write: what cannot be written wholly fails. `ENOSPC` when there is no room.
    fn write_at(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        missing("write_at")
    }

    /// Returns when everything written before is on stable storage.
    ///
    /// # Errors
    ///
    /// It may not be.
    fn flush(&self) -> Result<()> {
        missing("flush")
    }

    /// Gives up the contents of `count` bytes from `offset`; what they read as is undefined. `flags` may hold
    /// [`Flags::FUA`].
    ///
    /// # Errors
    ///
    /// The range may be untouched, or partly given up.
    fn trim(&self, count: u32, offset: u64, flags: Flags) -> Result<()> {
        missing("trim")
    }

    /// Writes `count` zeroes from `offset` on. `flags` may hold [`Flags::MAY_TRIM`], [`Flags::FUA`] and
    /// [`Flags::FAST_ZERO`].
    ///
    /// # Errors
    ///
    /// `ENOTSUP` and `EOPNOTSUPP` mean "not this way": the server then calls [`write_at`](Server::write_at), unless
    /// the client wanted a fast zero.
    fn zero(&self, count: u32, offset: u64, flags: Flags) -> Result<()> {
        missing("zero")
    }

    /// Tells which parts of `count` bytes from `offset` are data, holes or zeroes, by
    /// [`extent_handle.add`](ExtentHandle::add): in ascending order, without gaps, the first one covering `offset`.
    ///
    /// It may tell less than `count`, and with [`Flags::REQ_ONE`] a single extent is enough. To report data where
    /// there is none costs time only; to report a hole or zeroes where there is data loses it.
    ///
    /// # Errors
    ///
    /// The client has to do without.
    fn extents(&self, count: u32, offset: u64, flags: Flags, extent_handle: &mut ExtentHandle) -> Result<()> {
        missing("extents")
    }

    /// Gets `count` bytes from `offset` near, since the client will read them soon.
    ///
    /// # Errors
    ///
    /// They are harmless: it was a hint.
    fn cache(&self, count: u32, offset: u64) -> Result<()> {
        missing("cache")
    }

    /// Called when the server ends, after the last handle has been dropped: the place to stop the plugin's threads.
    /// It cannot fail. Servers since nbdkit 1.28 call it.
    fn cleanup()
    where
        Self: Sized,
    {
    }

    /// Called last, before the plugin leaves memory. It cannot fail.
    fn unload()
    where
        Self: Sized,
    {
    }
}

fn missing<T>(method: &str) -> Result<T> {
    Err(Error::new(libc::EOPNOTSUPP, format!("{method}: plugin! names it, but it is not implemented")))
}
