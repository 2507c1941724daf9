//! What people call the types of partitions.

use super::Kind;

const MBR: [(u8, &str); 27] = [
    (0x01, "FAT12"),
    (0x04, "FAT16"),
    (0x06, "FAT16"),
    (0x07, "NTFS/exFAT"),
    (0x0b, "FAT32"),
    (0x0c, "FAT32"),
    (0x0e, "FAT16"),
    (0x11, "hidden FAT12"),
    (0x14, "hidden FAT16"),
    (0x16, "hidden FAT16"),
    (0x17, "hidden NTFS"),
    (0x1b, "hidden FAT32"),
    (0x1c, "hidden FAT32"),
    (0x27, "Windows recovery"),
    (0x39, "Plan 9"),
    (0x81, "Minix"),
    (0x82, "Linux swap"),
    (0x83, "Linux"),
    (0x8e, "Linux LVM"),
    (0xa5, "FreeBSD"),
    (0xa6, "OpenBSD"),
    (0xa8, "Apple UFS"),
    (0xa9, "NetBSD"),
    (0xaf, "Apple HFS"),
    (0xbf, "Solaris"),
    (0xef, "EFI System"),
    (0xfd, "Linux RAID"),
];

/// In the form of blkid(8).
const GPT: [(&str, &str); 32] = [
    ("c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "EFI System"),
    ("21686148-6449-6e6f-744e-656564454649", "BIOS boot"),
    ("bc13c2ff-59e6-4262-a352-b275fd6f7172", "boot loader"),
    ("0fc63daf-8483-4772-8e79-3d69d8477de4", "Linux"),
    ("0657fd6d-a4ab-43c4-84e5-0933c84b4f4f", "Linux swap"),
    ("e6d6d379-f507-44c2-a23c-238f2a3df928", "Linux LVM"),
    ("a19d880f-05fc-4d3b-a006-743f0f84911e", "Linux RAID"),
    ("ca7d7ccb-63ed-4c53-861c-1742536059cc", "Linux LUKS"),
    ("933ac7e1-2eb4-4f13-b844-0e14e2aef915", "Linux home"),
    ("3b8f8425-20e0-4f3b-907f-1a25a76f98e8", "Linux server data"),
    ("4d21b016-b534-45c2-a9fb-5c16e091fd2d", "Linux variable data"),
    ("44479540-f297-41b2-9af7-d131d5f0458a", "Linux root (x86)"),
    (ROOT_X86_64, "Linux root (x86-64)"),
    ("69dad710-2ce4-4e3c-b16c-21a1d49abed3", "Linux root (ARM)"),
    ("b921b045-1df0-41c3-af44-4c6f280d3fae", "Linux root (ARM64)"),
    ("72ec70a6-cf74-40e6-bd49-4bda08e8f224", "Linux root (RISC-V)"),
    ("1de3f1ef-fa98-47b5-8dcd-4a860a654d78", "Linux root (PPC)"),
    ("c31c45e6-3f39-412e-80fb-4809c4980599", "Linux root (PPC64LE)"),
    ("5eead9a9-fe09-4a1e-a1d7-520d00531306", "Linux root (s390x)"),
    ("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7", "Microsoft basic data"),
    ("e3c9e316-0b5c-4db8-817d-f92df00215ae", "Microsoft reserved"),
    ("de94bba4-06d1-4d40-a16a-bfd50179d6ac", "Windows recovery"),
    ("5808c8aa-7e8f-42e0-85d2-e1e90434cfb3", "Microsoft LDM metadata"),
    ("af9b60a0-1431-4f62-bc68-3311714a69ad", "Microsoft LDM data"),
    ("48465300-0000-11aa-aa11-00306543ecac", "Apple HFS+"),
    ("7c3457ef-0000-11aa-aa11-00306543ecac", "Apple APFS"),
    ("426f6f74-0000-11aa-aa11-00306543ecac", "Apple boot"),
    ("83bd6b9d-7f41-11dc-be0b-001560b84f0f", "FreeBSD boot"),
    ("516e7cb6-6ecf-11d6-8ff8-00022d09712b", "FreeBSD UFS"),
    ("516e7cb5-6ecf-11d6-8ff8-00022d09712b", "FreeBSD swap"),
    ("516e7cba-6ecf-11d6-8ff8-00022d09712b", "FreeBSD ZFS"),
    ("49f48d5a-b10e-11dc-b99b-0019d1879648", "NetBSD"),
];
const ROOT_X86_64: &str = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709";

const BSD: [(u8, &str); 6] =
    [(1, "swap"), (7, "4.2BSD"), (8, "MS-DOS"), (9, "4.4LFS"), (12, "ISO 9660"), (27, "ZFS")];
const SUN: [(u16, &str); 10] = [
    (1, "boot"),
    (2, "SunOS root"),
    (3, "SunOS swap"),
    (4, "SunOS usr"),
    (7, "SunOS var"),
    (8, "SunOS home"),
    (0x82, "Linux swap"),
    (0x83, "Linux"),
    (0x8e, "Linux LVM"),
    (0xfd, "Linux RAID"),
];

impl Kind {
    /// What people call the type, if it is known.
    pub fn name(&self) -> Option<&str> {
        fn find<K: PartialEq>(list: &[(K, &'static str)], kind: K) -> Option<&'static str> {
            list.iter().find(|(known, _)| *known == kind).map(|(_, name)| *name)
        }
        match self {
            Kind::Mbr(kind) => find(&MBR, *kind),
            Kind::Gpt(_) => find(&GPT, self.to_string().as_str()),
            Kind::Apm(name) => Some(name),
            Kind::Bsd(kind) => find(&BSD, *kind),
            Kind::Sun(tag) => find(&SUN, *tag),
            Kind::Amiga(_) => None,
        }
    }

    /// Whether it says that the root directory of a Linux system is there.
    pub fn is_linux_root(&self) -> bool {
        matches!(self, Kind::Gpt(_)) && self.name().is_some_and(|name| name.starts_with("Linux root"))
    }

    /// The same, of a system for this machine.
    pub fn is_own_root(&self) -> bool {
        let own = match std::env::consts::ARCH {
            "x86_64" => "Linux root (x86-64)",
            "x86" => "Linux root (x86)",
            "aarch64" => "Linux root (ARM64)",
            "arm" => "Linux root (ARM)",
            "riscv64" => "Linux root (RISC-V)",
            "powerpc64" => "Linux root (PPC64LE)",
            "s390x" => "Linux root (s390x)",
            _ => return false,
        };
        self.is_linux_root() && self.name() == Some(own)
    }
}
