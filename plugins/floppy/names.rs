//! Names in a FAT directory: the long one as it is, in UTF-16, and the short one of 8 and 3 letters that each file has
//! besides, made up where the name is none.

use std::collections::{HashMap, HashSet};

/// Bytes of a directory entry.
pub(super) const ENTRY: usize = 32;
/// UTF-16 units in one entry of a long name.
const UNITS: usize = 13;
/// Most UTF-16 units of a long name.
const LONGEST: usize = 255;

/// A short name as it is stored: 8 letters and 3, padded with blanks.
pub(super) type Short = [u8; 11];

/// The names of one directory.
#[derive(Default)]
pub(super) struct Names {
    short: HashSet<Short>,
    /// Long names, without case: FAT does not tell `a` and `A` apart.
    long: HashSet<String>,
    /// The next number for names that begin so.
    next: HashMap<Short, u32>,
}

/// What a file is called in the file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Name {
    pub(super) short: Short,
    /// Empty: the short name says it all.
    pub(super) long: Vec<u16>,
}

/// Why a file cannot have its name in a FAT file system.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It is longer than 255 UTF-16 units.
    TooLong,
    /// Another one differs in case alone, or in letters that FAT does not have.
    Taken,
}

/// The name with `_` for what a long name cannot have: control characters, `"*/:<>?\|`, and a dot or blank at the end.
fn legal(name: &str) -> String {
    let mut legal: Vec<char> = name
        .chars()
        .map(|c| if c < ' ' || c == '\x7f' || "\"*/:<>?\\|".contains(c) { '_' } else { c })
        .collect();
    for c in legal.iter_mut().rev().take_while(|c| matches!(c, '.' | ' ')) {
        *c = '_';
    }
    legal.into_iter().collect()
}

fn is_short_letter(byte: u8) -> bool {
    byte.is_ascii_uppercase() || byte.is_ascii_digit() || b"!#$%&'()-@^_`{}~".contains(&byte)
}

/// The name as a short one, if it is one already.
fn as_short(name: &str) -> Option<Short> {
    let (base, extension) = name.split_once('.').unwrap_or((name, ""));
    let fits = (1..=8).contains(&base.len()) && extension.len() <= 3 && !name.ends_with('.');
    let all = base.bytes().chain(extension.bytes()).all(is_short_letter);
    (fits && all).then(|| padded(base.as_bytes(), extension.as_bytes()))
}

fn padded(base: &[u8], extension: &[u8]) -> Short {
    let mut short = [b' '; 11];
    short[..base.len()].copy_from_slice(base);
    short[8..8 + extension.len()].copy_from_slice(extension);
    short
}

/// Letters for a short name out of a part of a long one.
fn letters(part: &str, most: usize) -> Vec<u8> {
    part.chars()
        .filter(|c| !matches!(c, ' ' | '.'))
        .map(|c| u8::try_from(c.to_ascii_uppercase()).ok().filter(|b| is_short_letter(*b)).unwrap_or(b'_'))
        .take(most)
        .collect()
}

impl Names {
    /// Takes a name into the directory.
    ///
    /// # Errors
    /// [`Refused`].
    pub(super) fn add(&mut self, name: &str) -> Result<Name, Refused> {
        let name = legal(name);
        let long: Vec<u16> = name.encode_utf16().collect();
        if long.len() > LONGEST {
            return Err(Refused::TooLong);
        }
        if !self.long.insert(name.to_uppercase()) {
            return Err(Refused::Taken);
        }
        if let Some(short) = as_short(&name).filter(|short| self.short.insert(*short)) {
            return Ok(Name { short, long: Vec::new() });
        }
        let (base, extension) = match name.trim_start_matches('.').rsplit_once('.') {
            Some((base, extension)) => (letters(base, 8), letters(extension, 3)),
            None => (letters(&name, 8), Vec::new()),
        };
        let base = if base.is_empty() { b"_".to_vec() } else { base };
        // Numbered from 1, in as many letters as the number leaves.
        let start = padded(&base[..base.len().min(6)], &extension);
        let next = self.next.entry(start).or_insert(0);
        loop {
            *next += 1;
            let tail = format!("~{next}");
            let kept = base.len().min(8 - tail.len());
            let short = padded(&[&base[..kept], tail.as_bytes()].concat(), &extension);
            if self.short.insert(short) {
                return Ok(Name { short, long });
            }
        }
    }
}

impl Name {
    /// The entries of the long name, which stand before that of the file itself.
    pub(super) fn long_entries(&self) -> Vec<[u8; ENTRY]> {
        let sum = checksum(&self.short);
        let count = self.long.len().div_ceil(UNITS);
        let entry = |(index, part): (usize, &[u16])| {
            let last = if index + 1 == count { 0x40 } else { 0 };
            let mut units = [0xffff_u16; UNITS];
            units[..part.len()].copy_from_slice(part);
            if let Some(end) = units.get_mut(part.len()) {
                *end = 0;
            }
            let mut entry = [0; ENTRY];
            entry[0] = (index + 1) as u8 | last;
            // A long name; a system that knows none sees a hidden volume label.
            entry[11] = 0x0f;
            entry[13] = sum;
            let places = (1..11).step_by(2).chain((14..26).step_by(2)).chain([28, 30]);
            for (place, unit) in places.zip(units) {
                entry[place..place + 2].copy_from_slice(&unit.to_le_bytes());
            }
            entry
        };
        let mut entries: Vec<_> = self.long.chunks(UNITS).enumerate().map(entry).collect();
        // The end of the name comes first.
        entries.reverse();
        entries
    }
}

/// What ties a long name to its short one.
fn checksum(short: &Short) -> u8 {
    short.iter().fold(0, |sum: u8, byte| sum.rotate_right(1).wrapping_add(*byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn short(names: &mut Names, name: &str) -> (String, usize) {
        let name = names.add(name).unwrap();
        (String::from_utf8(name.short.into()).unwrap(), name.long.len())
    }

    #[test]
    fn short_names() {
        let mut names = Names::default();
        for (name, want, long) in [
            ("README.TXT", "README  TXT", 0),
            ("A", "A          ", 0),
            ("readme.md", "README~1MD ", 9),
            ("readme.m", "README~1M  ", 8),
            ("a long name.html", "ALONGN~1HTM", 16),
            ("a long name 2.html", "ALONGN~2HTM", 18),
            (".profile", "PROFIL~1   ", 8),
            ("x.tar.gz", "XTAR~1  GZ ", 8),
            ("ünïcode", "_N_COD~1   ", 7),
            ("12:30", "12_30      ", 0),
            ("+", "_~1        ", 1),
            ("X~1", "X~1        ", 0),
            ("x", "X~2        ", 1),
            ("end.", "END_~1     ", 4),
        ] {
            assert_eq!(short(&mut names, name), (want.into(), long), "{name}");
        }
        assert_eq!(names.add("a"), Err(Refused::Taken));
        assert_eq!(names.add("12?30"), Err(Refused::Taken));
        assert_eq!(names.add(&"x".repeat(256)), Err(Refused::TooLong));
        assert_eq!(names.add(&"x".repeat(255)).unwrap().long_entries().len(), 20);
    }

    #[test]
    fn many_names_that_begin_alike() {
        let mut names = Names::default();
        for n in 0..20_000 {
            names.add(&format!("photograph {n}.jpeg")).unwrap();
        }
        assert_eq!(names.short.len(), 20_000);
        assert!(names.short.contains(b"PH~20000JPE") && names.short.contains(b"PHOTOG~1JPE"));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn any_name_is_taken_or_refused(all in prop::collection::vec("\\PC{1,40}", 1..30)) {
            let mut names = Names::default();
            let taken: Vec<_> = all.iter().filter_map(|name| names.add(name).ok()).collect();
            prop_assert_eq!(names.short.len(), taken.len());
            for name in taken {
                prop_assert!(name.short[0] != b' ' && name.short.iter().all(|b| *b == b' ' || is_short_letter(*b)));
            }
        }
    }
}
