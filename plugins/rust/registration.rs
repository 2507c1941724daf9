//! Telling the server about a plugin: `plugin!` and the structure it fills.

use std::{ffi::c_char, marker::PhantomData, mem::MaybeUninit, ptr};

use nbdkit_abi as abi;

use crate::{Plugin, Server, ThreadModel, callbacks, panics::border, sys};

/// Makes a type that implements [`Server`] the plugin of this library.
///
/// Name the optional methods that the type implements; the server uses the defaults of the others. The order is
/// free. A library has one plugin.
///
/// ```no_run
/// # use nbdkit::*;
/// struct Disk;
///
/// impl Server for Disk {
/// #   fn name() -> &'static str { "disk" }
/// #   fn open(_: bool) -> Result<Box<dyn Server>> { Ok(Box::new(Disk)) }
/// #   fn get_size(&self) -> Result<i64> { Ok(512) }
/// #   fn read_at(&self, _: &mut [u8], _: u64) -> Result<()> { Ok(()) }
///     // name, open, get_size, read_at, and:
///     fn write_at(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
///         // …
/// #       Ok(())
///     }
/// }
///
/// plugin!(Disk { write_at });
/// # fn main() {}
/// ```
///
/// A method that does not exist is an error of the compiler:
///
/// ```compile_fail,E0599
/// # use nbdkit::*;
/// # struct Disk;
/// # impl Server for Disk {
/// #   fn name() -> &'static str { "disk" }
/// #   fn open(_: bool) -> Result<Box<dyn Server>> { Ok(Box::new(Disk)) }
/// #   fn get_size(&self) -> Result<i64> { Ok(512) }
/// #   fn read_at(&self, _: &mut [u8], _: u64) -> Result<()> { Ok(()) }
/// # }
/// plugin!(Disk { pwrite });
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! plugin {
    ($server:path { $($method:ident),* $(,)? }) => {
        /// The plugin, for the server that loads this library.
        #[unsafe(no_mangle)]
        pub extern "C" fn plugin_init() -> *const $crate::Plugin {
            $crate::Registration::<$server>::new()$(.$method())*.into_raw()
        }
    };
}

/// A plugin's structure while [`plugin!`] fills it.
pub struct Registration<S> {
    plugin: Plugin,
    server: PhantomData<fn() -> S>,
}

impl<S: Server> Registration<S> {
    #[allow(clippy::new_without_default, reason = "for the macro only")]
    #[allow(missing_docs, reason = "hidden")]
    pub fn new() -> Self {
        // SAFETY: the fields are integers, pointers that may be null, and optional functions: zeroes are all of them.
        let mut plugin = unsafe { MaybeUninit::<Plugin>::zeroed().assume_init() };
        plugin._struct_size = size_of::<Plugin>() as u64;
        plugin._api_version = abi::PLUGIN_API_VERSION;
        plugin._thread_model = ThreadModel::Parallel.into();
        plugin.open = Some(callbacks::open::<S>);
        plugin.close = Some(callbacks::close);
        plugin.get_size = Some(callbacks::get_size);
        plugin.pread = Some(callbacks::read_at);
        Registration { plugin, server: PhantomData }
    }

    /// Hands the structure to the server, which may use it as long as it runs; null, after an error message, if the
    /// plugin cannot say who it is.
    pub fn into_raw(mut self) -> *const Plugin {
        border("plugin_init", ptr::null(), || {
            self.plugin.name = text(Some(S::name()));
            self.plugin.longname = text(S::longname());
            self.plugin.version = text(S::version());
            self.plugin.description = text(S::description());
            self.plugin.config_help = text(S::config_help());
            self.plugin.magic_config_key = text(S::magic_config_key());
            Ok(&*Box::leak(Box::new(self.plugin)))
        })
    }
}

/// A string that lives as long as the server.
fn text(text: Option<&str>) -> *const c_char {
    text.map_or(ptr::null(), |text| sys::c_string(text).into_raw())
}

/// A function for each optional method, under the method's name: so an unknown name does not compile.
macro_rules! optional {
    ($($field:ident: $method:ident = $callback:expr;)*) => {
        #[allow(missing_docs, reason = "hidden")]
        impl<S: Server> Registration<S> {
            $(pub fn $method(mut self) -> Self {
                self.plugin.$field = Some($callback);
                self
            })*
        }
    };
}
optional! {
    load: load = callbacks::load::<S>;
    dump_plugin: dump_plugin = callbacks::dump_plugin::<S>;
    config: config = callbacks::config::<S>;
    config_complete: config_complete = callbacks::config_complete::<S>;
    thread_model: thread_model = callbacks::thread_model::<S>;
    get_ready: get_ready = callbacks::get_ready::<S>;
    after_fork: after_fork = callbacks::after_fork::<S>;
    preconnect: preconnect = callbacks::preconnect::<S>;
    list_exports: list_exports = callbacks::list_exports::<S>;
    default_export: default_export = callbacks::default_export::<S>;
    export_description: export_description = callbacks::export_description;
    block_size: block_size = callbacks::block_size;
    can_write: can_write = callbacks::can_write;
    can_flush: can_flush = callbacks::can_flush;
    is_rotational: is_rotational = callbacks::is_rotational;
    can_trim: can_trim = callbacks::can_trim;
    can_zero: can_zero = callbacks::can_zero;
    can_fast_zero: can_fast_zero = callbacks::can_fast_zero;
    can_extents: can_extents = callbacks::can_extents;
    can_fua: can_fua = callbacks::can_fua;
    can_multi_conn: can_multi_conn = callbacks::can_multi_conn;
    can_cache: can_cache = callbacks::can_cache;
    pwrite: write_at = callbacks::write_at;
    flush: flush = callbacks::flush;
    trim: trim = callbacks::trim;
    zero: zero = callbacks::zero;
    extents: extents = callbacks::extents;
    cache: cache = callbacks::cache;
    cleanup: cleanup = callbacks::cleanup::<S>;
    unload: unload = callbacks::unload::<S>;
}

/// Texts are registered when they are there; to name them is allowed and changes nothing.
#[allow(missing_docs, reason = "hidden")]
impl<S: Server> Registration<S> {
    pub fn longname(self) -> Self {
        self
    }
    pub fn version(self) -> Self {
        self
    }
    pub fn description(self) -> Self {
        self
    }
    pub fn config_help(self) -> Self {
        self
    }
    pub fn magic_config_key(self) -> Self {
        self
    }
}
