//! What block devices are asked by ioctl(2). The module of the plugin with `unsafe` for that: the kernel writes to or reads
//! from memory by a number.

#![allow(unsafe_code)]

use std::{fs::File, os::fd::AsRawFd as _};

use nbdkit_core::BlockSize;
use nix::errno::Errno;

/// Numbers of `linux/fs.h`.
mod number {
    pub(super) const BLKDISCARD: u8 = 119;
    pub(super) const BLKIOMIN: u8 = 120;
    pub(super) const BLKIOOPT: u8 = 121;
    pub(super) const BLKZEROOUT: u8 = 127;
}

nix::ioctl_read_bad!(
    /// Smallest request that is not slower than it has to be, in bytes.
    io_min,
    nix::request_code_none!(0x12, number::BLKIOMIN),
    u32
);
nix::ioctl_read_bad!(
    /// Best size of requests, in bytes; 0: not known.
    io_opt,
    nix::request_code_none!(0x12, number::BLKIOOPT),
    u32
);
nix::ioctl_write_ptr_bad!(
    /// Discards a range: its start and length.
    blk_discard,
    nix::request_code_none!(0x12, number::BLKDISCARD),
    [u64; 2]
);
nix::ioctl_write_ptr_bad!(
    /// Zeroes a range: its start and length.
    blk_zero_out,
    nix::request_code_none!(0x12, number::BLKZEROOUT),
    [u64; 2]
);

/// The size of requests that the device likes; unset where it does not tell, or what NBD cannot say.
pub(super) fn block_size(device: &File) -> BlockSize {
    let ask = |ioctl: unsafe fn(i32, *mut u32) -> nix::Result<i32>| {
        let mut answer = 0;
        // SAFETY: the request writes an unsigned int.
        unsafe { ioctl(device.as_raw_fd(), &raw mut answer) }.ok().map(|_| answer)
    };
    let (Some(minimum), Some(best)) = (ask(io_min), ask(io_opt)) else { return BlockSize::default() };
    block_size_of(minimum, best)
}

fn block_size_of(minimum: u32, best: u32) -> BlockSize {
    let preferred = if best == 0 { minimum.max(4096) } else { best };
    let told = BlockSize { minimum, preferred, maximum: u32::MAX };
    if minimum < 512 { BlockSize::default() } else { told.validate().unwrap_or_default() }
}

/// Frees a range of whole blocks.
pub(super) fn discard(device: &File, offset: u64, length: u64) -> rustix::io::Result<()> {
    // SAFETY: the request reads two 64-bit numbers.
    result(unsafe { blk_discard(device.as_raw_fd(), &[offset, length]) })
}

/// Zeroes a range of whole blocks.
pub(super) fn zero_out(device: &File, offset: u64, length: u64) -> rustix::io::Result<()> {
    // SAFETY: the request reads two 64-bit numbers.
    result(unsafe { blk_zero_out(device.as_raw_fd(), &[offset, length]) })
}

fn result(done: nix::Result<i32>) -> rustix::io::Result<()> {
    done.map(|_| ()).map_err(|e| match e {
        // What a device says that has no such request.
        Errno::ENOTTY | Errno::EOPNOTSUPP => rustix::io::Errno::OPNOTSUPP,
        e => rustix::io::Errno::from_raw_os_error(e as i32),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_can_be_told() {
        let told = |minimum, best| {
            let BlockSize { minimum, preferred, maximum } = block_size_of(minimum, best);
            (minimum, preferred, maximum)
        };
        assert_eq!(told(512, 0), (512, 4096, u32::MAX));
        assert_eq!(told(65536, 0), (65536, 65536, u32::MAX));
        assert_eq!(told(4096, 1 << 20), (4096, 1 << 20, u32::MAX));
        for (minimum, best) in [(256, 0), (512, 3 << 20), (4096, 512), (1 << 20, 1 << 20), (0, 0)] {
            assert_eq!(told(minimum, best), (0, 0, 0), "{minimum} {best}");
        }
    }

    #[test]
    fn a_file_is_no_device() {
        let file = tempfile::tempfile().unwrap();
        assert!(block_size(&file).is_unset());
        assert_eq!(discard(&file, 0, 512), Err(rustix::io::Errno::OPNOTSUPP));
        assert_eq!(zero_out(&file, 0, 512), Err(rustix::io::Errno::OPNOTSUPP));
    }
}
