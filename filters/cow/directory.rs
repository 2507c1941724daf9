//! A directory of overlays: one file for each export, named after it.

use std::{
    ffi::{OsStr, OsString},
    fmt::Write as _,
    fs,
    os::unix::{
        ffi::{OsStrExt as _, OsStringExt as _},
        fs::DirBuilderExt as _,
    },
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

use super::store::Claimed;

/// What the files' names end with.
const SUFFIX: &str = ".cow";
/// The file of the export without a name. No other name makes this one, for its hexadecimal digits are capitals.
const NAMELESS: &str = "%default";
/// Names that would be longer are cut, in bytes.
const LONGEST: usize = 200;

/// Whether a path is that of a directory rather than of one overlay.
pub(super) fn is_meant(path: &Path) -> bool {
    path.as_os_str().as_bytes().ends_with(b"/") || path.is_dir()
}

/// Makes the directory if there is none, for its owner alone.
///
/// # Errors
/// Those of mkdir(2).
pub(super) fn prepare(path: &Path) -> anyhow::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new()
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make the directory {} for the overlays", path.display()))
}

/// The name of an export's file.
pub(super) fn file_name(export: &OsStr) -> OsString {
    let mut name = String::new();
    for (index, byte) in export.as_bytes().iter().enumerate() {
        let plain = byte.is_ascii_alphanumeric() || b"_-+@=,:".contains(byte) || (*byte == b'.' && index > 0);
        if plain {
            name.push(char::from(*byte));
        } else {
            let _ = write!(name, "%{byte:02X}");
        }
    }
    if name.is_empty() {
        name.push_str(NAMELESS);
    }
    if name.len() > LONGEST {
        // The header has the whole name, so two that are alike do not share a file.
        name.truncate(LONGEST);
        let _ = write!(name, "%x{:08x}", crc32fast::hash(export.as_bytes()));
    }
    (name + SUFFIX).into()
}

/// The file that holds an overlay: `path`, or the one of `export` in the directory `path`. Without an export it is the
/// only one there is.
///
/// # Errors
/// Several, or none.
pub(super) fn find(path: &Path, export: Option<&OsStr>) -> anyhow::Result<PathBuf> {
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    if let Some(export) = export {
        let file = path.join(file_name(export));
        if !file.exists() {
            bail!("{} has no overlay of export '{}'", path.display(), export.display());
        }
        return Ok(file);
    }
    let shown = path.display();
    let mut files = Vec::new();
    for entry in fs::read_dir(path).with_context(|| shown.to_string())? {
        let file = entry.with_context(|| shown.to_string())?.path();
        if file.as_os_str().as_bytes().ends_with(SUFFIX.as_bytes()) {
            files.push(file);
        }
    }
    match &files[..] {
        [] => bail!("{shown} is a directory without overlays"),
        [file] => Ok(file.clone()),
        several => {
            let mut names: Vec<_> = several.iter().filter_map(|file| export_of(file)).collect();
            names.sort();
            bail!("{shown} has overlays of several exports: name one with -e ({})", names.join(", "))
        }
    }
}

/// The export of an overlay, for people.
fn export_of(file: &Path) -> Option<String> {
    let name = Claimed::peek(file)?.export?;
    Some(format!("'{}'", OsString::from_vec(name).display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_export_has_a_file_of_its_own() {
        let long = ["x".repeat(4000), "x".repeat(4001), "/".repeat(300), "/".repeat(301)];
        let names =
            ["", "disk0", "disk0.img", "default", "%default", "a/b", "a%2Fb", "..", ".", ".x", "ä", " "];
        let files: Vec<_> = names
            .iter()
            .copied()
            .chain(long.iter().map(String::as_str))
            .map(|n| file_name(n.as_ref()))
            .collect();
        for (index, file) in files.iter().enumerate() {
            let file_text = file.to_str().unwrap();
            assert!(
                file.len() < 255 && !file_text.contains('/') && !file_text.starts_with('.'),
                "{file_text}"
            );
            assert!(!files[..index].contains(file), "{file_text} twice");
        }
        assert_eq!(&files[..4], ["%default.cow", "disk0.cow", "disk0.img.cow", "default.cow"]);
    }
}
