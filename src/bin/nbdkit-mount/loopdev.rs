//! Loop devices: a file of the mount as a block device. See loop(4).

#![allow(unsafe_code)]

use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;

/// Attempts to get a free device: others may take it between two calls.
const ATTEMPTS: usize = 64;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;
const PARTSCAN: u32 = 8;
const DIRECT_IO: u32 = 16;

nix::ioctl_write_ptr_bad!(loop_configure, 0x4c0a, Config);
nix::ioctl_none_bad!(loop_clr_fd, 0x4c01);
nix::ioctl_none_bad!(loop_ctl_get_free, 0x4c82);

/// How a file is shown as a block device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) readonly: bool,
    /// Bytes in a block: a power of 2 from 512 to 4096.
    pub(crate) block_size: u32,
    /// It is detached when nobody has it open any more.
    pub(crate) autoclear: bool,
}

/// Attaches a loop device to `file`, with direct I/O, so that data is not cached twice, and with its partitions. Returns its
/// name, and the device open.
///
/// # Errors
/// When there are no loop devices or none is free, or when they are not for this user.
pub(crate) fn attach(file: &Path, shape: Shape) -> Result<(PathBuf, File)> {
    let control = File::options().read(true).write(true).open("/dev/loop-control").context(
        "cannot use loop devices (/dev/loop-control): run as root, after modprobe loop if it is missing",
    )?;
    let backing = File::options()
        .read(true)
        .write(!shape.readonly)
        .open(file)
        .with_context(|| format!("cannot open {}", file.display()))?;
    for _ in 0..ATTEMPTS {
        // SAFETY: the call takes no argument, and the file is open.
        let number = unsafe { loop_ctl_get_free(control.as_raw_fd()) }.context("no free loop device")?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        match configure(&device, &backing, shape) {
            Ok(()) => return Ok((path, device)),
            Err(Errno::EBUSY) => {}
            Err(e) => bail!("cannot attach {} to {}: {}", path.display(), file.display(), io::Error::from(e)),
        }
    }
    bail!("no loop device stays free: detach some with losetup -d")
}

fn configure(device: &File, backing: &File, shape: Shape) -> Result<(), Errno> {
    let mut flags = DIRECT_IO | PARTSCAN;
    if shape.readonly {
        flags |= READ_ONLY;
    }
    if shape.autoclear {
        flags |= AUTOCLEAR;
    }
    loop {
        let info = Info {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        };
        let fd = u32::try_from(backing.as_raw_fd()).map_err(|_| Errno::EBADF)?;
        let config = Config { fd, block_size: shape.block_size, info, reserved: [0; 8] };
        // SAFETY: both files are open, and the kernel reads as much as the structure has.
        match unsafe { loop_configure(device.as_raw_fd(), &config) } {
            // Not every file can do direct I/O.
            Err(Errno::EINVAL) if flags & DIRECT_IO != 0 => flags &= !DIRECT_IO,
            result => return result.map(drop),
        }
    }
}

/// The file that a loop device shows; None: none.
pub(crate) fn backing_file(device: &Path) -> Option<PathBuf> {
    let name = device.file_name()?;
    let file = Path::new("/sys/block").join(name).join("loop/backing_file");
    let mut text = fs::read(file).ok()?;
    text.pop_if(|b| *b == b'\n');
    Some(PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(text)))
}

/// Whether a loop device shows a file at or under `place`.
pub(crate) fn shows(device: &Path, place: &Path) -> bool {
    backing_file(device).is_some_and(|file| file.starts_with(place))
}

/// The loop devices that show files at or under `place`.
pub(crate) fn showing(place: &Path) -> Vec<PathBuf> {
    let Ok(devices) = fs::read_dir("/sys/block") else { return Vec::new() };
    devices
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"loop"))
        .map(|entry| Path::new("/dev").join(entry.file_name()))
        .filter(|device| shows(device, place))
        .collect()
}

/// Whether `source`, as the mount table has it, is the loop device or one of its partitions.
pub(crate) fn is_on(source: &str, device: &Path) -> bool {
    let partition = source.strip_prefix(&*device.to_string_lossy());
    partition.is_some_and(|rest| rest.is_empty() || rest.starts_with('p'))
}

/// Detaches a loop device; one that is in use detaches itself when it no longer is.
pub(crate) fn detach(device: &Path) -> io::Result<()> {
    let file = File::open(device)?;
    // SAFETY: the call takes no argument, and the file is open.
    match unsafe { loop_clr_fd(file.as_raw_fd()) } {
        Ok(_) | Err(Errno::ENXIO) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_are_the_kernels() {
        assert_eq!(size_of::<Info>(), 232);
        assert_eq!(size_of::<Config>(), 304);
    }

    #[test]
    fn partitions_are_on_their_device() {
        let device = Path::new("/dev/loop1");
        assert!(is_on("/dev/loop1", device) && is_on("/dev/loop1p2", device));
        assert!(!is_on("/dev/loop10", device) && !is_on("/dev/loop", device));
    }

    #[test]
    fn devices_that_are_not() {
        assert_eq!(backing_file(Path::new("/dev/null")), None);
        assert!(!shows(Path::new("/dev/null"), Path::new("/")));
    }
}
