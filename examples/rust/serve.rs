//! Serves a `Vec<u8>` over NBD, with the crates that the programs are made of:
//!
//! cargo run --example serve /tmp/disk.sock

mod disk;

fn main() -> anyhow::Result<()> {
    let socket = std::env::args_os().nth(1).ok_or_else(|| anyhow::anyhow!("which socket?"))?;
    let chain = disk::chain(vec![0; 64 << 20])?;
    let listener = nbdkit_nbd::listen::unix(socket.as_ref())?;
    let stop = chain.server().clone();
    nbdkit_nbd::serve(chain, nbdkit_nbd::Config::default(), vec![listener], stop, None)
}
