//! The chain: one plugin, any number of filters over it, and the session through which a front end drives them.
//!
//! This package owns the contract between layers and nothing else. It does no I/O, holds no thread-locals and
//! has no `unsafe`: a plugin may be Rust code, a shared library or a script, and a front end may be NBD or FUSE,
//! without this package knowing.
//!
//! * [`Plugin`] supplies a disk, [`Filter`] reshapes the one below it; both open [`Handle`]s.
//! * [`Chain`] holds the configured layers; layer 0 is the plugin, the last one is the outermost filter.
//! * [`Next`] is the glue between two open layers: the contract is checked and missing operations are emulated there.
//! * [`Session`] is one open client. Both front ends call it and nothing else on the data path.

#![forbid(unsafe_code)]

pub mod emulate;
pub mod params;
pub mod stats;
pub mod sync;

mod caps;
mod chain;
mod client;
mod error;
mod exports;
mod extents;
mod filter;
mod handle;
mod loan;
mod locks;
mod memory;
mod next;
mod plugin;
mod request;
mod session;
mod shutdown_flag;
mod whole_extents;

pub use caps::{Answer, BlockSize, Caps, Flags, Op, Support, ThreadModel};
pub use chain::{Announced, Below, Chain, UnknownParameter, WriteObserver};
pub use client::{Certificate, Client, Open, Peer};
pub use error::{Errno, Error, Result, without_numbers};
pub use exports::{Export, Exports};
pub use extents::{Extent, Extents, Status};
pub use filter::{Filter, NextConfig, NextConfigComplete};
pub use handle::Handle;
pub use loan::Loan;
pub use memory::{Buffers, Memory};
pub use next::Next;
pub use plugin::{Above, ChainMaker, Info, Interface, Plugin};
pub use request::{
    Call, Completed, Completions, Data, Outcome, Payload, Pending, Request, Started, Task, Wake, Wakes,
};
pub use session::{Connection, Session};
pub use shutdown_flag::ShutdownFlag;
