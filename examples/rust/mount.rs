//! Shows a `Vec<u8>` as a file through FUSE, until it is unmounted:
//!
//! cargo run --example mount /mnt/x

mod disk;

fn main() -> anyhow::Result<()> {
    let mountpoint = std::env::args_os().nth(1).ok_or_else(|| anyhow::anyhow!("which mountpoint?"))?;
    let chain = disk::chain(vec![0; 64 << 20])?;
    let config = nbdkit_fuse::Config { mountpoint: mountpoint.into(), ..Default::default() };
    let stop = chain.server().clone();
    nbdkit_fuse::Mount::new(chain, config, stop)?.wait()
}
