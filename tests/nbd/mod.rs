//! The NBD front end, through libnbd, qemu and fio.

mod cli;
mod commands;
mod copy;
mod costs;
mod direct;
mod ending;
mod extended;
mod fuzz;
mod handshake;
mod hostile;
mod images;
mod information;
mod interop;
mod life;
mod memory;
mod messages;
mod options;
mod sparse;
mod start;
mod status;
mod syscalls;
mod tls;
mod told;
