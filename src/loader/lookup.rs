//! From a name on the command line to a file: a path as it is, a short name in the directories for it.

use std::{
    ffi::OsStr,
    fs,
    io::Read,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::{Path, PathBuf},
};

/// A kind of layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The source of a disk.
    Plugin,
    /// A layer over it.
    Filter,
}

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// A shared library.
    Library(PathBuf),
    /// An executable script, whose first line says `#!…/nbdkit PLUGIN`: it is a parameter of that plugin.
    Script {
        /// The script.
        path: PathBuf,
        /// The plugin that runs it; None when its first line names no plugin.
        plugin: Option<String>,
    },
}

impl Kind {
    /// `plugin` or `filter`.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Plugin => "plugin",
            Kind::Filter => "filter",
        }
    }

    /// The environment variable that names a directory to look in first.
    fn variable(self) -> &'static str {
        match self {
            Kind::Plugin => "NBDKIT_PLUGINDIR",
            Kind::Filter => "NBDKIT_FILTERDIR",
        }
    }

    /// The directory that the user named in the environment.
    fn own_directory(self) -> Option<PathBuf> {
        std::env::var_os(self.variable()).filter(|d| !d.is_empty()).map(PathBuf::from)
    }

    /// The directories to look in, the first one first. They need not exist.
    pub fn directories(self) -> Vec<PathBuf> {
        let mut directories: Vec<PathBuf> = self.own_directory().into_iter().collect();
        let bindir = bindir();
        let beside = bindir.as_deref().and_then(Path::parent).map(libdirs).unwrap_or_default();
        let system = ["/usr/local", "/usr"].into_iter().flat_map(|prefix| libdirs(Path::new(prefix)));
        for libdir in beside.into_iter().chain(system) {
            let directory = libdir.join("nbdkit").join(format!("{}s", self.name()));
            if !directories.contains(&directory) {
                directories.push(directory);
            }
        }
        directories
    }
}

/// The directory of the running program.
fn bindir() -> Option<PathBuf> {
    std::env::current_exe().ok()?.parent().map(Path::to_owned)
}

/// The directories for libraries beneath a prefix: lib64, those of an architecture, lib.
fn libdirs(prefix: &Path) -> Vec<PathBuf> {
    let triplet = format!("lib/{}-linux-gnu", std::env::consts::ARCH);
    [Path::new("lib64"), Path::new(&triplet), Path::new("lib")].map(|dir| prefix.join(dir)).into()
}

/// Whether a name on the command line is a path.
pub fn is_path(name: &OsStr) -> bool {
    name.as_bytes().iter().any(|b| matches!(b, b'/' | b'.'))
}

/// Looks for a plugin or filter. A path is taken as it is, whether there is such a file or not; a short name is
/// looked for, libraries before scripts.
pub fn find(kind: Kind, name: &OsStr) -> Option<Found> {
    if is_path(name) {
        let path = PathBuf::from(name);
        return Some(match kind {
            Kind::Plugin if is_script(&path) => script(path),
            _ => Found::Library(path),
        });
    }
    if name.is_empty() {
        return None;
    }
    let own = kind.own_directory().and_then(|directory| find_in(kind, name, &[directory]));
    own.or_else(|| find_built(kind, name, &bindir()?).map(Found::Library))
        .or_else(|| find_in(kind, name, &kind.directories()))
}

/// A library that cargo built together with the program: there it is called `libnbdkit_NAME_plugin.so` and lies beside
/// it. So the build tree works as it is, and its language plugins win over those of an installed nbdkit.
fn find_built(kind: Kind, name: &OsStr, bindir: &Path) -> Option<PathBuf> {
    let file = format!("libnbdkit_{}_{}.so", name.to_str()?.replace('-', "_"), kind.name());
    Some(bindir.join(file)).filter(|path| path.is_file())
}

/// The libraries and scripts that short names stand for, in the order in which they are found: names and files.
pub fn installed(kind: Kind) -> Vec<(String, PathBuf)> {
    let mut found = Vec::new();
    let own: Vec<_> = kind.own_directory().into_iter().collect();
    found.extend(own.iter().flat_map(|directory| layers_in(kind, directory)));
    let built = bindir().and_then(|bindir| fs::read_dir(bindir).ok()).into_iter().flatten().flatten();
    found.extend(built.filter_map(|entry| {
        let file = entry.file_name().into_string().ok()?;
        let name = file.strip_prefix("libnbdkit_")?.strip_suffix(&format!("_{}.so", kind.name()))?;
        Some((name.replace('_', "-"), entry.path()))
    }));
    found.extend(kind.directories().iter().flat_map(|directory| layers_in(kind, directory)));
    found
}

/// The plugins or filters in a directory.
fn layers_in(kind: Kind, directory: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let layer = |entry: fs::DirEntry| {
        let file = entry.file_name().into_string().ok()?;
        let rest = file.strip_prefix("nbdkit-")?;
        let suffix = format!("-{}", kind.name());
        let name = match rest.strip_suffix(".so") {
            Some(rest) => rest.strip_suffix(&suffix)?,
            None => {
                rest.strip_suffix(&suffix).filter(|_| kind == Kind::Plugin && is_script(&entry.path()))?
            }
        };
        Some((name.to_owned(), entry.path()))
    };
    let mut found: Vec<_> = entries.filter_map(layer).collect();
    found.sort();
    found
}

fn find_in(kind: Kind, name: &OsStr, directories: &[PathBuf]) -> Option<Found> {
    let mut base = OsStr::new("nbdkit-").to_owned();
    base.push(name);
    base.push("-");
    base.push(kind.name());
    let mut library = base.clone();
    library.push(".so");
    let libraries = directories.iter().map(|d| d.join(&library)).filter(|path| path.is_file());
    let scripts = directories.iter().map(|d| d.join(&base)).filter(|path| is_script(path));
    match kind {
        Kind::Plugin => libraries.map(Found::Library).chain(scripts.map(script)).next(),
        Kind::Filter => libraries.map(Found::Library).next(),
    }
}

/// Whether a file is executable and begins as scripts do.
fn is_script(path: &Path) -> bool {
    let executable = fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    executable && first_line(path).is_some_and(|line| line.starts_with(b"#!"))
}

/// The beginning of a file, up to the end of the first line.
fn first_line(path: &Path) -> Option<Vec<u8>> {
    let mut start = Vec::new();
    fs::File::open(path).ok()?.take(256).read_to_end(&mut start).ok()?;
    let end = start.iter().position(|b| *b == b'\n').unwrap_or(start.len());
    start.truncate(end);
    Some(start)
}

fn script(path: PathBuf) -> Found {
    let line = first_line(&path).unwrap_or_default();
    let line = String::from_utf8_lossy(&line);
    let mut words = line.trim_start_matches("#!").split_ascii_whitespace();
    let interpreter = words.next().and_then(|word| Path::new(word).file_name());
    let is_ours = interpreter.is_some_and(|name| name == "nbdkit");
    let plugin = words.next().filter(|_| is_ours).map(str::to_owned);
    Found::Script { path, plugin }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path, text: &str, mode: u32) {
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn paths_are_told_by_their_form() {
        for path in ["./x", "x.so", "/a/b", "a/b"] {
            assert!(is_path(OsStr::new(path)), "{path}");
        }
        assert!(!is_path(OsStr::new("memory")));
        let found = find(Kind::Filter, OsStr::new("./none.so"));
        assert_eq!(found, Some(Found::Library("./none.so".into())));
    }

    #[test]
    fn libraries_come_before_scripts_and_directories_in_order() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let directories = [one.path().to_owned(), two.path().to_owned()];
        let look = |name: &str| find_in(Kind::Plugin, OsStr::new(name), &directories);
        assert_eq!(look("x"), None);
        assert_eq!(find(Kind::Plugin, OsStr::new("")), None);
        let path = one.path().join("nbdkit-x-plugin");
        write(&path, "#!/usr/sbin/nbdkit sh\n", 0o644);
        assert_eq!(look("x"), None, "it is not executable");
        write(&path, "#!/usr/sbin/nbdkit sh\nmore", 0o755);
        assert_eq!(look("x"), Some(Found::Script { path: path.clone(), plugin: Some("sh".into()) }));
        write(&path, "#!/bin/bash -e\n", 0o755);
        assert_eq!(look("x"), Some(Found::Script { path, plugin: None }));
        let library = two.path().join("nbdkit-x-plugin.so");
        write(&library, "", 0o644);
        assert_eq!(look("x"), Some(Found::Library(library)));
    }

    #[test]
    fn libraries_beside_the_program_have_the_names_that_cargo_gives() {
        let bin = tempfile::tempdir().unwrap();
        let look = |kind, name: &str| find_built(kind, OsStr::new(name), bin.path());
        let library = bin.path().join("libnbdkit_two_words_plugin.so");
        assert_eq!(look(Kind::Plugin, "two-words"), None);
        write(&library, "", 0o644);
        assert_eq!(look(Kind::Plugin, "two-words"), Some(library));
        assert_eq!(look(Kind::Filter, "two-words"), None);
        assert_eq!(look(Kind::Plugin, "words"), None);
    }
}
