//! What `--dump-plugin` says of the C interface for the bundled plugins, which are not built for it.

use std::mem::size_of;

use nbdkit_abi as abi;
use nbdkit_core::{Info, Interface, Plugin};

/// The callbacks there are, in the order of `--dump-plugin`.
const CALLBACKS: [&str; 37] = [
    "longname",
    "description",
    "load",
    "unload",
    "dump_plugin",
    "config",
    "config_complete",
    "config_help",
    "thread_model",
    "get_ready",
    "after_fork",
    "cleanup",
    "preconnect",
    "list_exports",
    "default_export",
    "open",
    "close",
    "export_description",
    "get_size",
    "block_size",
    "can_write",
    "can_flush",
    "is_rotational",
    "can_trim",
    "can_zero",
    "can_fast_zero",
    "can_extents",
    "can_fua",
    "can_multi_conn",
    "can_cache",
    "pread",
    "pwrite",
    "flush",
    "trim",
    "zero",
    "extents",
    "cache",
];

/// The interface of a plugin: its own, or for a bundled one what it would be.
pub fn interface(plugin: &dyn Plugin) -> Interface {
    plugin.interface().unwrap_or_else(|| bundled(&plugin.info(), plugin.callbacks().as_deref()))
}

/// That of a bundled plugin: the optional callbacks it names, those that its `info` tells of, and what every one has.
pub(crate) fn bundled(info: &Info, optional: Option<&[&str]>) -> Interface {
    let has = |callback: &&str| match *callback {
        "open" | "get_size" | "pread" | "thread_model" => true,
        "longname" => !info.longname.is_empty(),
        "description" => !info.description.is_empty(),
        "config" | "config_help" => !info.config_help.is_empty(),
        other => optional.is_none_or(|optional| optional.contains(&other)),
    };
    Interface {
        api_version: 2,
        struct_size: size_of::<abi::Plugin>() as u64,
        errno_is_preserved: true,
        callbacks: CALLBACKS.into_iter().filter(has).collect(),
    }
}
