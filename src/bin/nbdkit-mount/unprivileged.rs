//! File systems without root: programs that show one from a file through FUSE.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::loop_mount::{Base, LoopMountOptions, find};

/// What a program can show, and the package that has it. All take `-o`, the file and the directory.
const PROGRAMS: [(&[&str], &str, &str); 5] = [
    (&["ext2", "ext3", "ext4"], "fuse2fs", "fuse2fs"),
    (&["ntfs"], "ntfs-3g", "ntfs-3g"),
    (&["exfat"], "mount.exfat-fuse", "exfat-fuse"),
    (&["squashfs"], "squashfuse", "squashfuse"),
    (&["erofs"], "erofsfuse", "erofsfuse"),
];

/// Mounts the file system in a file on `target`. False: none of the programs knows it.
///
/// # Errors
/// The program is missing, or refuses.
pub(crate) fn mount(options: &LoopMountOptions, base: &Base, target: &Path) -> Result<bool> {
    let kind = options.fstype.as_deref().or(base.content.as_ref().map(|content| content.kind));
    let Some((_, program, package)) =
        PROGRAMS.iter().find(|(kinds, ..)| kind.is_some_and(|kind| kinds.contains(&kind)))
    else {
        return Ok(false);
    };
    let path = find(program).with_context(|| {
        format!("--mount as an ordinary user needs {program}: install the package {package}, or run as root")
    })?;
    let mut words = vec!["nosuid", "nodev", if options.readonly { "ro" } else { "rw" }];
    if *program == "fuse2fs" && options.readonly && !options.recovered {
        words.push("norecovery");
    }
    words.extend(options.options.iter().map(String::as_str));
    let output = Command::new(path)
        .arg("-o")
        .arg(words.join(","))
        .arg(&base.file)
        .arg(target)
        .stdin(Stdio::null())
        .output()
        .context(*program)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.lines().next().unwrap_or("it does not say why").trim();
        bail!("{program} cannot mount {}: {said}", base.file.display());
    }
    Ok(true)
}
