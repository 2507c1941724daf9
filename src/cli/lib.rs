//! What both programs are made of: the way from words on the command line to a chain, and how a program lives, in the
//! foreground, in the background or for one command.
//!
//! Nothing here knows whether the chain is served over NBD or shown through FUSE.

#![deny(unsafe_code)]

mod advice;
pub mod captive;
pub mod chain;
pub mod completion;
pub mod daemon;
pub mod descriptors;
pub mod dump;
pub mod ending;
pub mod layers;
pub mod logger;
pub mod metrics;
pub mod parameters;
pub mod parent;
pub mod pidfile;
pub mod progress;
pub mod readiness;
pub mod replace;
pub mod signals;
pub mod std_fds;
pub mod stdio;
mod subchain;
pub mod usage;
pub mod version;
