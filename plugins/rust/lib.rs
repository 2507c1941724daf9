//! Write plugins for nbdkit in Rust.
//!
//! A plugin is a shared library that supplies a virtual disk: the server asks it to read and write byte ranges and
//! does everything else. Implement [`Server`], name the optional methods you implement in [`plugin!`], and build a
//! `cdylib`. It loads in this project's `nbdkit` and `nbdkit-mount` and in the C nbdkit.
//!
//! ```toml
//! [lib]
//! crate-type = ["cdylib"]
//! ```
//!
//! A read-only disk of 1 MiB, full of the letter A:
//!
//! ```no_run
//! use nbdkit::*;
//!
//! struct LetterA;
//!
//! impl Server for LetterA {
//!     fn name() -> &'static str {
//!         "letterA"
//!     }
//!
//!     fn open(_readonly: bool) -> Result<Box<dyn Server>> {
//!         Ok(Box::new(LetterA))
//!     }
//!
//!     fn get_size(&self) -> Result<i64> {
//!         Ok(1 << 20)
//!     }
//!
//!     fn read_at(&self, buf: &mut [u8], _offset: u64) -> Result<()> {
//!         buf.fill(b'A');
//!         Ok(())
//!     }
//! }
//!
//! plugin!(LetterA {});
//! # fn main() {}
//! ```
//!
//! ```console
//! $ cargo build
//! $ nbdkit target/debug/libletter_a.so --run 'nbdcopy "$uri" - | head -c 8'
//! AAAAAAAA
//! ```
//!
//! # Units
//!
//! Sizes, counts and offsets are bytes. The server has checked a request before a plugin sees it: it lies within
//! [`Server::get_size`], and the disk can do what it asks for.
//!
//! # Errors
//!
//! A method fails with an [`Error`]: an errno for the client and a message for the log (and for the client, where the
//! server passes messages on). A panic in a method fails that one call with `EIO` and its message is logged; the
//! server and its other clients go on. That takes unwinding: do not build a plugin with `panic = "abort"`.
//!
//! # Threads
//!
//! Unless [`Server::thread_model`] says otherwise, the server calls a plugin from many threads at once, also for one
//! and the same handle. The trait does not require `Send` and `Sync`, for the sake of plugins that choose a stricter
//! model, so it is the plugin's duty to choose a model that its types allow:
//!
//! | the handle is | model |
//! |---|---|
//! | `Send + Sync` | any, [`ThreadModel::Parallel`] too |
//! | `Send` only | at most [`ThreadModel::SerializeRequests`] |
//! | neither | none: calls come from different threads in every model |
//!
//! # Which server
//!
//! A plugin needs nothing of the server but the functions it uses. Those that nbdkit 1.32 does not have
//! ([`disconnect`], [`parse_probability`], [`parse_delay`]…) are looked up when they are called and fail with a message where they are
//! missing, and so are the callbacks that older servers do not know: they are not called.
//!
//! # Features
//!
//! `nix`: [`peername`] answers in the socket address types of the crate nix 0.24 as well, for the source of plugins
//! that were written for the crate nbdkit 0.3.0.

/// The lower half, for the bridges to other languages: what their plugins can do is known only once a script is
/// loaded, so they fill the structure of the C interface themselves.
#[doc(hidden)]
pub mod bridge {
    pub use crate::{
        panics::border,
        sys::{c_string, log_error, newer_function},
    };
    pub use nbdkit_abi as abi;
}
mod callbacks;
mod error;
mod flags;
mod functions;
mod identity;
mod lists;
mod panics;
mod peer;
mod registration;
mod server;
mod sys;
mod values;

#[doc(hidden)]
pub use nbdkit_abi::Plugin;
#[cfg(feature = "nix")]
pub use nix::sys::socket::SockaddrLike;

pub use error::{Error, Result};
pub use flags::{BlockSize, CacheFlags, ExtentType, Flags, FuaFlags, ThreadModel};
#[doc(hidden)]
pub use functions::write_debug_message;
pub use functions::{
    debug_hexdiff, debug_hexdump, disconnect, export_name, is_stdio_safe, is_tls, parse_bool,
    parse_probability, parse_size, set_error, shutdown, stdio_safe,
};
pub use identity::{peer_gid, peer_pid, peer_security_context, peer_tls_dn, peer_tls_issuer_dn, peer_uid};
pub use lists::{ExportHandle, ExtentHandle};
pub use peer::{FromSockaddr, peername};
#[doc(hidden)]
pub use registration::Registration;
pub use server::Server;
pub use values::{absolute_path, nanosleep, parse_delay, parse_int, read_password, realpath};
