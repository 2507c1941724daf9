//! The NBD door, through libnbd, qemu and fio.

mod commands;
mod copy;
mod handshake;
mod hostile;
mod life;
