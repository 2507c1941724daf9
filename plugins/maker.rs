//! What the plugins share whose disks are made by programs of the system: running those, and where the disks are kept.

use std::{
    collections::BTreeMap,
    ffi::{CString, OsStr, OsString},
    fs::File,
    os::{
        fd::AsFd as _,
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
    path::PathBuf,
};

use nbdkit_core::{Errno, Error, Result, params};

use crate::sh::{Ended, How, Job, Output, Patience, SHELL, run};

/// Where the disks are made, which may be large: `TMPDIR` or a directory that is on a disk.
pub(crate) fn directory() -> PathBuf {
    std::env::var_os("TMPDIR")
        .filter(|path| !path.is_empty())
        .map_or_else(|| "/var/tmp".into(), PathBuf::from)
}

/// Runs a shell script that makes a disk. `variables` are in its environment, beside those of the server.
///
/// # Errors
/// It cannot be run, it failed, or was given up. The message begins with `what`, and ends with the last that it said.
pub(crate) fn make(
    what: &str,
    script: &OsStr,
    variables: &[(&str, &OsStr)],
    own_group: bool,
    patience: Patience<'_>,
) -> Result<()> {
    let wrong = |e: &dyn std::fmt::Display| Error::new(Errno::EINVAL, format!("{what}: {e}"));
    let text = |bytes: &OsStr| CString::new(bytes.as_bytes()).map_err(|e| wrong(&e));
    let mut environment: BTreeMap<OsString, OsString> = std::env::vars_os().collect();
    // The programs that make file systems are not for everybody, so not everybody has them in the path.
    let path = environment.entry("PATH".into()).or_default();
    path.push(if path.is_empty() { "/usr/bin:/bin:/usr/sbin:/sbin" } else { ":/usr/sbin:/sbin" });
    for (name, value) in variables {
        environment.insert((*name).into(), (*value).into());
    }
    let environment: Vec<CString> = environment
        .into_iter()
        .map(|(name, value)| text(&OsString::from_vec([name.as_bytes(), b"=", value.as_bytes()].concat())))
        .collect::<Result<_>>()?;
    let script = text(script)?;
    let job = Job {
        program: SHELL,
        words: &[SHELL, c"-c", &script],
        environment: &environment,
        input: None,
        output: Output::Ignored,
        own_group,
        patience,
    };
    let null = File::open("/dev/null").map_err(|e| Error::from(e).context("/dev/null"))?;
    let Ended { how, stderr, .. } =
        run(job, null.as_fd()).map_err(|e| Error::from(e).context(format!("{what}: cannot run /bin/sh")))?;
    let said = String::from_utf8_lossy(&stderr);
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.iter().for_each(|line| log::debug!("{what}: {line}"));
    let last = lines.last().map_or_else(String::new, |line| format!(": {line}"));
    let end = match how {
        How::Exited(0) => return Ok(()),
        How::Exited(code) => format!("failed with exit code {code}"),
        How::Killed(signal) => format!("was killed by signal {signal}"),
        How::GivenUp => {
            return Err(Error::new(
                Errno::ESHUTDOWN,
                format!("{what} was given up: the client or the server stops"),
            ));
        }
    };
    Err(Error::new(Errno::EIO, format!("{what} {end}{last}")))
}

/// The parameters of a plugin that makes file systems for its clients.
#[derive(Default)]
pub(crate) struct FileSystem {
    pub(crate) size: Option<u64>,
    /// None: mkfs, by way of [`MKFS`].
    command: Option<OsString>,
    /// What the command gets as variables.
    variables: BTreeMap<String, OsString>,
}

/// Makes a file system: `$type` on `$disk`, of `$size` bytes, with `$label` if that is set.
const MKFS: &str = r#"
truncate -s "$size" "$disk" || exit 1
name=-L
case "$type" in
ext?) set -- -q -F ;;
xfs | btrfs) set -- -q -f ;;
*fat | msdos) set -- ; name=-n ;;
ntfs) set -- -q -F -Q ;;
*) set -- ;;
esac
if [ -n "$label" ]; then set -- "$@" "$name" "$label"; fi
exec mkfs -t "$type" "$@" "$disk"
"#;

/// The lines of `config_help` that they have in common.
macro_rules! file_system_help {
    () => {
        "[size=]SIZE              (required) Size of the disks\n\
         type=TYPE                The file system, one that mkfs knows (default ext4)\n\
         label=LABEL              Its label\n\
         command=SCRIPT           A shell script that makes $disk, instead of mkfs\n\
         NAME=VALUE               Variables of the script"
    };
}
pub(crate) use file_system_help;

impl FileSystem {
    /// Takes a parameter.
    ///
    /// # Errors
    /// Its value is wrong, or it cannot be one.
    pub(crate) fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "size" => self.size = Some(params::size(value)?),
            "command" => self.command = Some(value.to_owned()),
            "disk" => {
                anyhow::bail!("'disk' parameter cannot be set: $disk is where the command makes the disk")
            }
            _ => drop(self.variables.insert(key.to_owned(), value.to_owned())),
        }
        Ok(true)
    }

    /// All parameters were given.
    ///
    /// # Errors
    /// One is missing, or means nothing.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.size.is_some(), "size parameter is required, such as size=1G");
        let unknown = self.variables.keys().find(|key| !matches!(key.as_str(), "type" | "label"));
        if let (None, Some(key)) = (&self.command, unknown) {
            anyhow::bail!("unknown parameter '{key}': only command= has variables of its own");
        }
        Ok(())
    }

    /// Makes a disk at a path where nothing is yet.
    ///
    /// # Errors
    /// As [`make`].
    pub(crate) fn make(&self, disk: &std::path::Path, patience: Patience<'_>) -> Result<()> {
        let size = self.size.unwrap_or_default().to_string();
        let defaults = [("type", OsStr::new("ext4")), ("label", OsStr::new(""))];
        let own = [("size", OsStr::new(&size)), ("disk", disk.as_os_str())];
        let given = self.variables.iter().map(|(key, value)| (key.as_str(), value.as_os_str()));
        let variables: Vec<_> = defaults.into_iter().chain(given).chain(own).collect();
        match &self.command {
            Some(command) => make("the command", command, &variables, true, patience),
            None => make("mkfs", OsStr::new(MKFS), &variables, true, patience),
        }
    }
}
