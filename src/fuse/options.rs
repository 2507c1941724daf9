//! Mount options, as after `-o`: what the kernel is told, and what shapes the file's attributes.

use anyhow::{Context as _, bail};
use fuser::SessionACL;
use rustix::mount::MountFlags;

/// Parsed options.
#[derive(Debug)]
pub(crate) struct Options {
    /// `ro`.
    pub(crate) readonly: bool,
    /// `allow_other`, `allow_root`.
    pub(crate) acl: SessionACL,
    /// Flags of mount(2).
    pub(crate) flags: MountFlags,
    /// `fsname=`: the source in the mount table.
    pub(crate) fsname: Option<String>,
    /// `subtype=`: the part of the type after `fuse.`.
    pub(crate) subtype: String,
    /// `max_read=`, in bytes.
    pub(crate) max_read: Option<u32>,
    /// `uid=`: owner of the file.
    pub(crate) uid: Option<u32>,
    /// `gid=`: group of the file.
    pub(crate) gid: Option<u32>,
    /// `umask=`: permission bits that the file lacks.
    pub(crate) umask: u16,
}

/// The subtype unless another is asked for; by it a mount of ours is known.
pub(crate) const SUBTYPE: &str = "nbdkit-mount";

impl Default for Options {
    fn default() -> Self {
        Options {
            readonly: false,
            acl: SessionACL::Owner,
            flags: MountFlags::NOSUID | MountFlags::NODEV,
            fsname: None,
            subtype: SUBTYPE.into(),
            max_read: None,
            uid: None,
            gid: None,
            umask: 0o022,
        }
    }
}

/// Checks mount options, each word as after `-o`.
///
/// # Errors
/// One line that names the word.
pub fn check_options(words: &[String]) -> anyhow::Result<()> {
    Options::parse(words.iter().map(String::as_str)).map(drop)
}

impl Options {
    /// Parses words, each of which may hold several options between commas.
    pub(crate) fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> anyhow::Result<Self> {
        let mut options = Options::default();
        for word in words.into_iter().flat_map(|w| w.split(',')).filter(|w| !w.is_empty()) {
            options.set(word)?;
        }
        Ok(options)
    }

    fn set(&mut self, word: &str) -> anyhow::Result<()> {
        let (key, value) = match word.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (word, None),
        };
        match (key, value) {
            ("ro", None) => self.readonly = true,
            ("rw", None) => self.readonly = false,
            ("allow_other", None) => self.acl = SessionACL::All,
            ("allow_root", None) => self.acl = SessionACL::RootAndOwner,
            // The kernel always checks permissions here: an open that reached us was allowed.
            ("default_permissions", None) => {}
            // mount.fuse(8) adds them unasked; no file of ours is a device or a program.
            ("dev" | "nodev" | "suid" | "nosuid", None) => {}
            ("exec", None) => self.flags.remove(MountFlags::NOEXEC),
            ("noexec", None) => self.flags.insert(MountFlags::NOEXEC),
            ("atime", None) => self.flags.remove(MountFlags::NOATIME),
            ("noatime", None) => self.flags.insert(MountFlags::NOATIME),
            // For mount(8), systemd and fstab(5); nothing to do here.
            (
                "defaults" | "auto" | "noauto" | "nofail" | "_netdev" | "user" | "nouser" | "users" | "owner"
                | "group" | "async" | "diratime" | "nodiratime" | "relatime" | "norelatime" | "strictatime"
                | "lazytime" | "nolazytime",
                None,
            ) => {}
            ("sync", None) => self.flags.insert(MountFlags::SYNCHRONOUS),
            ("dirsync", None) => self.flags.insert(MountFlags::DIRSYNC),
            (key, _)
                if key.starts_with("x-") || key.starts_with("X-") || key == "comment" || key == "user" => {}
            ("fsname", Some(value)) => self.fsname = Some(name(word, value)?),
            ("subtype", Some(value)) => self.subtype = name(word, value)?,
            ("max_read", Some(value)) => {
                let bytes = number(word, value, 10)?;
                if bytes < 4096 {
                    bail!("mount option '{word}': reads of less than 4096 bytes do not work");
                }
                self.max_read = Some(bytes);
            }
            ("uid", Some(value)) => self.uid = Some(number(word, value, 10)?),
            ("gid", Some(value)) => self.gid = Some(number(word, value, 10)?),
            ("umask", Some(value)) => {
                let mask = number(word, value, 8)?;
                if mask > 0o777 {
                    bail!("mount option '{word}': give permission bits from 000 to 777");
                }
                self.umask = mask as u16;
            }
            _ => bail!(
                "unknown mount option '{word}': known are ro rw allow_other allow_root default_permissions \
                 auto_unmount [no]dev [no]suid [no]exec [no]atime sync dirsync fsname= subtype= max_read= uid= gid= \
                 umask=, and what fstab(5) has for mount(8) and systemd"
            ),
        }
        Ok(())
    }

    /// The words that mount(2) takes after those that fuse itself needs, and fusermount3 too.
    pub(crate) fn kernel_words(&self) -> Vec<String> {
        let mut words = vec!["default_permissions".to_owned()];
        if self.acl != SessionACL::Owner {
            words.push("allow_other".into());
        }
        words.extend(self.max_read.map(|n| format!("max_read={n}")));
        words
    }

    /// The flags of mount(2) as the words that fusermount3 takes.
    pub(crate) fn flag_words(&self) -> Vec<&'static str> {
        let word = |flag, on, off| if self.flags.contains(flag) { on } else { off };
        let mut words = vec![if self.readonly { "ro" } else { "rw" }];
        words.push(word(MountFlags::NODEV, "nodev", "dev"));
        words.push(word(MountFlags::NOSUID, "nosuid", "suid"));
        if self.flags.contains(MountFlags::NOEXEC) {
            words.push("noexec");
        }
        if self.flags.contains(MountFlags::NOATIME) {
            words.push("noatime");
        }
        words
    }
}

fn number(word: &str, value: &str, radix: u32) -> anyhow::Result<u32> {
    let what = if radix == 8 { "an octal number" } else { "a number" };
    u32::from_str_radix(value, radix).with_context(|| format!("mount option '{word}': give {what}"))
}

fn name(word: &str, value: &str) -> anyhow::Result<String> {
    if value.is_empty() || value.contains(['\\', '\0', '\n']) {
        bail!("mount option '{word}': give a name without backslashes");
    }
    Ok(value.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_commas_are_the_same() {
        let options = Options::parse(["ro,allow_other", "uid=7", "umask=077,max_read=65536"]).unwrap();
        assert!(options.readonly);
        assert_eq!(options.acl, SessionACL::All);
        assert_eq!((options.uid, options.umask, options.max_read), (Some(7), 0o077, Some(65536)));
        assert_eq!(options.kernel_words(), ["default_permissions", "allow_other", "max_read=65536"]);
    }

    #[test]
    fn the_last_of_two_opposites_wins() {
        let options = Options::parse(["ro", "rw", "exec", "noexec"]).unwrap();
        assert_eq!(options.flag_words(), ["rw", "nodev", "nosuid", "noexec"]);
    }

    #[test]
    fn devices_and_setuid_are_off_whatever_is_asked_for() {
        assert_eq!(Options::parse([]).unwrap().flag_words(), ["rw", "nodev", "nosuid"]);
        assert_eq!(Options::parse(["suid", "dev"]).unwrap().flag_words(), ["rw", "nodev", "nosuid"]);
    }

    #[test]
    fn words_for_other_programs_are_let_by() {
        let words = "_netdev,noauto,nofail,user,users,user=root,x-systemd.automount,x-systemd.idle-timeout=1min,defaults";
        assert_eq!(Options::parse([words]).unwrap().flag_words(), ["rw", "nodev", "nosuid"]);
        assert!(Options::parse(["noauto=1"]).is_err());
    }

    #[test]
    fn bad_words_are_named() {
        for word in ["sparkle", "ro=1", "uid=", "uid=-1", "umask=9", "umask=1000", "max_read=1", "fsname"] {
            let e = Options::parse([word]).unwrap_err();
            assert!(format!("{e:#}").contains(word), "{word}: {e:#}");
        }
    }
}
