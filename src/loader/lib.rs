//! Plugins and filters from shared libraries that were compiled for nbdkit's C interface.
//!
//! To the chain they are a [`Plugin`](nbdkit_core::Plugin) and a [`Filter`](nbdkit_core::Filter) like any other: what
//! C code lacks is emulated by the chain, not here. This package turns calls into C calls and back, and exports the
//! functions that C code calls. Everything unsafe that the C interface asks for is here.
//!
//! What C code promises cannot be checked: that its pointers are what the interface says, that it calls back only
//! while it may. The safety comments name what is relied on.

mod cc;
mod context;
mod debug_flags;
mod exports;
mod filter;
mod filter_handle;
mod interface;
mod layout;
pub mod lookup;
mod module;
mod next_ops;
mod panic;
mod pieces;
mod plugin;
mod plugin_handle;
mod strings;
#[cfg(test)]
mod tests;

pub use cc::cc;
pub use debug_flags::DebugFlags;
pub use exports::{flush_stdio, stdio_is_taken};
pub use filter::load_filter;
pub use interface::interface;
pub use plugin::load_plugin;
