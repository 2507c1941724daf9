//! Formats that a disk can be packed in, told by the first bytes of a file and in some cases the last ones.
//!
//! Served as they are, such files look like disks full of noise; a write to one destroys it.

/// How many bytes of the start [`ImageFormat::detect`] looks at.
pub const HEAD: usize = 1024;
/// How many bytes of the end it looks at.
pub const TAIL: usize = 512;

/// A format that holds a disk, or an archive or a compressed file that may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageFormat {
    /// What people call it.
    pub name: &'static str,
    /// The filter that serves the disk in it, of ours or of others.
    pub filter: Option<&'static str>,
    /// What else gets at the disk in it, as the end of a sentence "to serve the disk in it …".
    pub instead: &'static str,
}

const fn format(name: &'static str, filter: Option<&'static str>, instead: &'static str) -> ImageFormat {
    ImageFormat { name, filter, instead }
}

const QEMU: &str = "use qemu-nbd";

/// Formats that start with certain bytes.
const STARTS: [(&[u8], ImageFormat); 25] = [
    (b"QFI\xfb\0\0\0\x01", format("qcow", None, QEMU)),
    (b"QFI\xfb\0\0\0\x02", format("qcow2", Some("qcow2dec"), QEMU)),
    (b"QFI\xfb\0\0\0\x03", format("qcow2", Some("qcow2dec"), QEMU)),
    (b"QED\0", format("qed", None, QEMU)),
    (b"KDMV", format("vmdk", None, QEMU)),
    (b"COWD", format("vmdk", None, QEMU)),
    (b"# Disk DescriptorFile", format("vmdk", None, QEMU)),
    (b"vhdxfile", format("vhdx", None, QEMU)),
    (b"conectix", format("vpc (VHD)", None, QEMU)),
    (b"WithoutFreeSpace", format("parallels", None, QEMU)),
    (b"WithouFreSpacExt", format("parallels", None, QEMU)),
    (b"EVF\x09\x0d\x0a\xff\0", format("ewf (EnCase)", None, "use ewfmount")),
    (b"EVF2\x0d\x0a\x81\0", format("ewf (EnCase)", None, "use ewfmount")),
    (b"LVF\x09\x0d\x0a\xff\0", format("ewf (EnCase)", None, "use ewfmount")),
    (b"AFF10\r\n\0", format("aff", None, "use affuse")),
    (b"LUKS\xba\xbe\0", format("luks", Some("luks"), "use cryptsetup")),
    (b"\x1f\x8b\x08", format("gzip", Some("gzip"), "unpack it with gzip -d")),
    (b"\xfd7zXZ\0", format("xz", Some("xz"), "unpack it with xz -d")),
    (b"\x28\xb5\x2f\xfd", format("zstd", Some("zstd"), "unpack it with zstd -d")),
    (b"LZIP\x01", format("lzip", Some("lzip"), "unpack it with lzip -d")),
    (b"\x04\x22\x4d\x18", format("lz4", None, "unpack it with lz4 -d")),
    (b"PK\x03\x04", format("zip", None, "unpack it with unzip")),
    (b"PK\x05\x06", format("zip", None, "unpack it with unzip")),
    (b"7z\xbc\xaf\x27\x1c", format("7z", None, "unpack it with 7z x")),
    (b"!<arch>\n", format("ar", None, "unpack it with ar x")),
];

/// Those that need a closer look.
const BZIP2: ImageFormat = format("bzip2", Some("bzip2"), "unpack it with bzip2 -d");
const TAR: ImageFormat = format("tar", Some("tar"), "unpack it with tar -x");
const VDI: ImageFormat = format("vdi", None, QEMU);
const VPC: ImageFormat = format("vpc (VHD)", None, QEMU);
const DMG: ImageFormat = format("dmg", None, QEMU);

impl ImageFormat {
    /// Looks at the first bytes of a file, at most [`HEAD`] of them, and its last ones, at most [`TAIL`]. None: nothing
    /// that is known, so probably a disk as it is.
    pub fn detect(head: &[u8], tail: &[u8]) -> Option<Self> {
        let start = STARTS.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, format)| *format);
        start
            .or_else(|| is_bzip2(head).then_some(BZIP2))
            .or_else(|| (head.get(0x40..0x44) == Some(&[0x7f, 0x10, 0xda, 0xbe])).then_some(VDI))
            .or_else(|| is_tar(head).then_some(TAR))
            .or_else(|| {
                let footer = &tail[tail.len().saturating_sub(TAIL)..];
                match footer.get(..8) {
                    Some(b"conectix") => Some(VPC),
                    Some([b'k', b'o', b'l', b'y', 0, 0, 0, 4]) => Some(DMG),
                    // A footer of older versions is a byte shorter.
                    _ if footer.get(1..9) == Some(b"conectix") => Some(VPC),
                    _ => None,
                }
            })
    }
}

/// A block's or the end's magic number follows the block size.
fn is_bzip2(head: &[u8]) -> bool {
    let body = head.get(4..10);
    head.starts_with(b"BZh")
        && head.get(3).is_some_and(|size| (b'1'..=b'9').contains(size))
        && (body == Some(&[0x31, 0x41, 0x59, 0x26, 0x53, 0x59])
            || body == Some(&[0x17, 0x72, 0x45, 0x38, 0x50, 0x90]))
}

/// The magic number, and a checksum that is right: boot code may have five letters anywhere.
fn is_tar(head: &[u8]) -> bool {
    let Some(header) = head.get(..512).filter(|header| &header[257..262] == b"ustar") else { return false };
    let text = std::str::from_utf8(&header[148..156]).unwrap_or_default();
    let sum: u32 = header
        .iter()
        .enumerate()
        .map(|(i, b)| if (148..156).contains(&i) { 32 } else { u32::from(*b) })
        .sum();
    u32::from_str_radix(text.trim_matches(|c: char| c == ' ' || c == '\0'), 8) == Ok(sum)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        path::Path,
        process::{Command, Stdio},
    };

    use super::*;

    fn name(bytes: &[u8]) -> Option<&'static str> {
        let head = &bytes[..bytes.len().min(HEAD)];
        let tail = &bytes[bytes.len().saturating_sub(TAIL)..];
        ImageFormat::detect(head, tail).map(|format| format.name)
    }

    /// The file that a shell command writes to `$out` from a disk `$disk`; None where its program is not there.
    fn made(dir: &Path, command: &str) -> Option<Vec<u8>> {
        let (disk, out) = (dir.join("disk"), dir.join("out"));
        let _ = fs::remove_file(&out);
        fs::write(&disk, vec![7; 1 << 20]).unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-ec", command]).env("disk", &disk).env("out", &out).current_dir(dir);
        let done = shell.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        done.success().then(|| fs::read(&out).unwrap())
    }

    #[test]
    fn images_of_other_programs() {
        let dir = tempfile::tempdir().unwrap();
        let mut found = 0;
        for (command, format) in [
            ("qemu-img convert -O qcow2 $disk $out", "qcow2"),
            ("qemu-img convert -O qcow2 -o compat=0.10 $disk $out", "qcow2"),
            ("qemu-img convert -O qcow $disk $out", "qcow"),
            ("qemu-img convert -O qed $disk $out", "qed"),
            ("qemu-img convert -O vmdk $disk $out", "vmdk"),
            ("qemu-img convert -O vmdk -o subformat=streamOptimized $disk $out", "vmdk"),
            ("qemu-img convert -O vmdk -o subformat=monolithicFlat $disk $out", "vmdk"),
            ("qemu-img convert -O vhdx $disk $out", "vhdx"),
            ("qemu-img convert -O vpc $disk $out", "vpc (VHD)"),
            ("qemu-img convert -O vpc -o subformat=fixed $disk $out", "vpc (VHD)"),
            ("qemu-img convert -O vdi $disk $out", "vdi"),
            ("qemu-img convert -O parallels $disk $out", "parallels"),
            (
                "qemu-img create -f luks --object secret,id=s,data=x -o key-secret=s,iter-time=10 $out 1M",
                "luks",
            ),
            ("gzip -c $disk > $out", "gzip"),
            ("xz -c $disk > $out", "xz"),
            ("zstd -c $disk > $out", "zstd"),
            ("bzip2 -c $disk > $out", "bzip2"),
            ("bzip2 -c /dev/null > $out", "bzip2"),
            ("lzip -c $disk > $out", "lzip"),
            ("lz4 -c $disk > $out", "lz4"),
            ("tar cf $out disk", "tar"),
            ("tar --format=v7 -cf /dev/null disk; tar --format=pax -cf $out disk", "tar"),
            ("zip -q - disk > $out", "zip"),
        ] {
            if let Some(bytes) = made(dir.path(), command) {
                assert_eq!(name(&bytes), Some(format), "{command}");
                found += 1;
            }
        }
        assert!(found >= 12, "only {found} programs are there");
    }

    #[test]
    fn the_ones_that_no_program_here_makes() {
        for (start, format) in
            [(&b"EVF\x09\x0d\x0a\xff\0\x01"[..], "ewf (EnCase)"), (b"7z\xbc\xaf\x27\x1c\0\x04", "7z")]
        {
            let mut bytes = vec![0; 2048];
            bytes[..start.len()].copy_from_slice(start);
            assert_eq!(name(&bytes), Some(format));
        }
    }

    #[test]
    fn disks_are_no_images() {
        let dir = tempfile::tempdir().unwrap();
        for command in [
            "cp $disk $out",
            "truncate -s 1M $out",
            "truncate -s 2M $out; mkfs.ext4 -q -F $out",
            "truncate -s 20M $out; mkfs.btrfs -q $out || mkfs.xfs -q $out",
            "truncate -s 4M $out; mkfs.vfat $out",
            "truncate -s 8M $out; echo '1M,' | sfdisk -q $out",
            "truncate -s 8M $out; echo '1M,' | sfdisk -q -X gpt $out",
            "mksquashfs $disk $out -quiet",
            "printf '\\037\\213' > $out",
        ] {
            if let Some(bytes) = made(dir.path(), command) {
                assert_eq!(name(&bytes), None, "{command}");
            }
        }
        let mut boot_code = vec![0; 1024];
        boot_code[257..262].copy_from_slice(b"ustar");
        assert_eq!(name(&boot_code), None);
        for length in 0..=17 {
            assert_eq!(name(&b"BZh91AY&SYQFI\xfb\0\0\0"[..length]).is_some(), length >= 10, "{length}");
        }
    }
}
