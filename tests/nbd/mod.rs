//! The NBD door, through libnbd, qemu and fio.

mod cli;
mod commands;
mod copy;
mod extended;
mod fuzz;
mod handshake;
mod hostile;
mod information;
mod life;
mod memory;
mod messages;
mod sparse;
mod tls;
