//! GUIDs as partition tables store them.

use std::{fmt, str::FromStr};

/// A GUID in the byte order of the disk: the first three fields little-endian.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Guid(pub [u8; 16]);

/// Position on disk of each byte of the written form.
const WRITTEN: [usize; 16] = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];

impl Guid {
    /// All zeroes: in a GPT, an entry that is not used.
    pub const NIL: Guid = Guid([0; 16]);

    /// A GUID that is always the same for the same `seed`, and in practice another for any other: version 8 of RFC
    /// 9562, with an FNV-1a hash.
    pub fn from_seed(seed: &[u8]) -> Self {
        const PRIME: u128 = 0x0000000001000000000000000000013b;
        const BASIS: u128 = 0x6c62272e07bb014262b821756295c58d;
        let hash = seed.iter().fold(BASIS, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(PRIME));
        let mut written = hash.to_be_bytes();
        written[6] = written[6] & 0x0f | 0x80;
        written[8] = written[8] & 0x3f | 0x80;
        let mut disk = [0; 16];
        WRITTEN.iter().zip(written).for_each(|(position, byte)| disk[*position] = byte);
        Guid(disk)
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, position) in WRITTEN.iter().enumerate() {
            let dash = if matches!(i, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{:02X}", self.0[*position])?;
        }
        Ok(())
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Guid {
    type Err = String;

    /// `0FC63DAF-8483-4772-8E79-3D69D8477DE4`, in either case, with or without braces around it.
    fn from_str(text: &str) -> Result<Self, String> {
        let fail = || format!("could not parse GUID '{text}': use a form such as {LINUX}");
        let bare = text.strip_prefix('{').and_then(|t| t.strip_suffix('}')).unwrap_or(text);
        let groups: Vec<&str> = bare.split('-').collect();
        if groups.iter().map(|group| group.len()).ne([8, 4, 4, 4, 12])
            || !groups.iter().all(|group| group.bytes().all(|b| b.is_ascii_hexdigit()))
        {
            return Err(fail());
        }
        let number = u128::from_str_radix(&groups.concat(), 16).map_err(|_| fail())?;
        let mut disk = [0; 16];
        WRITTEN.iter().zip(number.to_be_bytes()).for_each(|(position, byte)| disk[*position] = byte);
        Ok(Guid(disk))
    }
}

/// The type of a partition with a Linux file system.
pub const LINUX: Guid =
    Guid([0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4]);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn linux_is_written_as_everybody_writes_it() {
        assert_eq!(LINUX.to_string(), "0FC63DAF-8483-4772-8E79-3D69D8477DE4");
        assert_eq!("{0fc63daf-8483-4772-8e79-3d69d8477de4}".parse(), Ok(LINUX));
    }

    #[test]
    fn what_is_no_guid_is_refused() {
        for bad in [
            "",
            "foo",
            "0FC63DAF84834772",
            "+FC63DAF-8483-4772-8E79-3D69D8477DE4",
            "{0FC63DAF-8483-4772-8E79-3D69D8477DE4",
        ] {
            assert!(bad.parse::<Guid>().unwrap_err().contains("could not parse GUID"), "{bad}");
        }
    }

    #[test]
    fn seeds_give_valid_and_different_guids() {
        let (a, b) = (Guid::from_seed(b"a"), Guid::from_seed(b"b"));
        assert_ne!(a, b);
        assert_eq!(a, Guid::from_seed(b"a"));
        assert_eq!(a.to_string().as_bytes()[14], b'8');
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(bytes: [u8; 16]) {
            prop_assert_eq!(Guid(bytes).to_string().parse(), Ok(Guid(bytes)));
        }
    }
}
