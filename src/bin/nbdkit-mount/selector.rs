//! The partition that `--partition` means, or the only one that can be meant.

use std::{ffi::OsStr, fmt};

use anyhow::{Context as _, Result, bail, ensure};
use nbdkit_common::Usage;
use nbdkit_core::params;
use nbdkit_fuse::{Contents, PartContent};

/// What `--partition` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Selector {
    /// By number.
    Number(u32),
    /// The root directory of a Linux system.
    Root,
    /// By a field, as in fstab(5).
    Field(Field, String),
    /// A label or a name, whichever of them.
    Name(String),
}

/// What can be asked for by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    /// The label of what is in it.
    Label,
    /// The UUID of what is in it.
    Uuid,
    /// The partition's name.
    PartLabel,
    /// The partition's identifier.
    PartUuid,
}

const FIELDS: [(&str, Field); 4] = [
    ("LABEL", Field::Label),
    ("UUID", Field::Uuid),
    ("PARTLABEL", Field::PartLabel),
    ("PARTUUID", Field::PartUuid),
];

/// More parts are not named in an error.
const LISTED: usize = 16;

impl Selector {
    /// # Errors
    /// A number that makes no sense, an empty word.
    pub(crate) fn parse(word: &OsStr) -> Result<Selector> {
        let text = params::text(word).context("--partition")?;
        ensure!(!text.is_empty(), "--partition needs a number, a name, or root");
        if text.bytes().all(|b| b.is_ascii_digit()) {
            let number = params::integer("--partition", word)?;
            ensure!(number > 0, "--partition 0: partitions count from 1");
            return Ok(Selector::Number(number));
        }
        let field = text.split_once('=').and_then(|(key, value)| {
            let (_, field) = FIELDS.iter().find(|(name, _)| *name == key)?;
            Some(Selector::Field(*field, value.trim_matches('"').to_owned()))
        });
        Ok(match field {
            Some(field) => field,
            None if text == "root" => Selector::Root,
            None => Selector::Name(text.to_owned()),
        })
    }

    fn finds(&self, part: &PartContent) -> bool {
        let content = part.content.as_ref();
        let label = content.and_then(|content| content.label.as_deref());
        let same_id = |id: Option<&str>, wanted: &str| id.is_some_and(|id| id.eq_ignore_ascii_case(wanted));
        match self {
            Selector::Number(number) => part.number == *number,
            Selector::Root => part.kind.is_linux_root(),
            Selector::Field(Field::Label, wanted) => label == Some(wanted),
            Selector::Field(Field::Uuid, wanted) => {
                same_id(content.and_then(|content| content.uuid.as_deref()), wanted)
            }
            Selector::Field(Field::PartLabel, wanted) => part.name == *wanted,
            Selector::Field(Field::PartUuid, wanted) => same_id(part.uuid.as_deref(), wanted),
            Selector::Name(wanted) => {
                label == Some(wanted) || part.name == *wanted || part.file.to_str() == Some(wanted)
            }
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Selector::Number(number) => write!(f, "{number}"),
            Selector::Root => f.write_str("root"),
            Selector::Field(field, value) => {
                let name = FIELDS.iter().find(|(_, known)| known == field).map_or("", |(name, _)| name);
                write!(f, "{name}={value}")
            }
            Selector::Name(name) => f.write_str(name),
        }
    }
}

/// The file in which to find what is meant. None: the disk as a whole. `inside`: a file system is wanted, and so without a
/// selector the only one there is.
///
/// # Errors
/// There is none, or more than one; the message names those there are.
pub(crate) fn choose<'a>(
    selector: Option<&Selector>,
    inside: bool,
    contents: &'a Contents,
) -> Result<Option<&'a PartContent>> {
    let parts = &contents.parts;
    let Some(selector) = selector else {
        let is_whole = contents.whole.as_ref().is_some_and(|content| content.usage == Usage::FileSystem);
        if !inside || is_whole {
            return Ok(None);
        }
        let mut found = parts.iter().filter(|part| has_file_system(part));
        return match (found.next(), found.next()) {
            (Some(_), Some(_)) => bail!(
                "the disk has more than one file system: say which with --partition, of {}",
                list(parts.iter().filter(|part| has_file_system(part)))
            ),
            (only, _) => Ok(only),
        };
    };
    ensure!(
        !parts.is_empty(),
        "partition {selector} not found: the disk has no partition table: leave --partition out"
    );
    let mut found: Vec<_> = parts.iter().filter(|part| selector.finds(part)).collect();
    if *selector == Selector::Root {
        found = roots(parts, found);
    }
    match found[..] {
        [part] => Ok(Some(part)),
        [] => bail!("partition {selector} not found: the disk has {}", list(parts.iter())),
        _ => bail!("--partition {selector} may be any of {}: say which", list(found.into_iter())),
    }
}

fn has_file_system(part: &PartContent) -> bool {
    part.content.as_ref().is_some_and(|content| content.usage == Usage::FileSystem)
}

/// Those that may have the root directory: by the type of the partition, for this machine first; by a name; or the only one
/// with a file system that Linux can have it on.
fn roots<'a>(parts: &'a [PartContent], typed: Vec<&'a PartContent>) -> Vec<&'a PartContent> {
    let own = typed.iter().copied().filter(|part| part.kind.is_own_root());
    let own: Vec<_> = own.collect();
    let is_named = |part: &&PartContent| {
        let label = part.content.as_ref().and_then(|content| content.label.as_deref()).unwrap_or_default();
        [label, part.name.as_str()]
            .iter()
            .any(|name| matches!(*name, "/" | "root" | "rootfs" | "ROOT" | "cloudimg-rootfs"))
    };
    let is_linux = |part: &&PartContent| {
        const KINDS: [&str; 8] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "jfs"];
        part.content.as_ref().is_some_and(|content| KINDS.contains(&content.kind))
    };
    let named = parts.iter().filter(|part| has_file_system(part)).filter(is_named).collect();
    let linux = parts.iter().filter(is_linux).collect();
    [own, typed, named, linux].into_iter().find(|found| !found.is_empty()).unwrap_or_default()
}

/// Parts as words for a message.
fn list<'a>(parts: impl Iterator<Item = &'a PartContent>) -> String {
    let mut words: Vec<_> = parts
        .take(LISTED + 1)
        .map(|part| {
            let name = part.number;
            let content = part.content.as_ref();
            let label =
                content.and_then(|content| content.label.as_deref()).map(|label| format!(" {label:?}"));
            match content {
                Some(content) => format!("{name} ({}{})", content.kind, label.unwrap_or_default()),
                None => name.to_string(),
            }
        })
        .collect();
    if words.len() > LISTED {
        words.truncate(LISTED);
        words.push("...".into());
    }
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Selector> {
        Selector::parse(OsStr::new(text))
    }

    #[test]
    fn forms() {
        assert_eq!(parse("12").unwrap(), Selector::Number(12));
        assert_eq!(parse("root").unwrap(), Selector::Root);
        assert_eq!(parse("LABEL=a b").unwrap(), Selector::Field(Field::Label, "a b".into()));
        assert_eq!(parse("PARTUUID=\"x\"").unwrap(), Selector::Field(Field::PartUuid, "x".into()));
        assert_eq!(parse("home").unwrap(), Selector::Name("home".into()));
        assert_eq!(parse("OTHER=x").unwrap(), Selector::Name("OTHER=x".into()));
        for text in ["", "0", "99999999999"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
