//! Files that are replaced whole, so that a reader never sees half of one.

use std::{
    fs::Permissions,
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
};

/// Writes a file under another name beside it, which nobody can guess or have prepared, and renames that. `mode` are its
/// permission bits, less the umask.
///
/// # Errors
/// Those of the system: then there is what was there before.
pub fn write(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".");
    let mut file = tempfile::Builder::new()
        .prefix(&name)
        .suffix(".tmp")
        .permissions(Permissions::from_mode(mode))
        .tempfile_in(directory)
        .map_err(without_name)?;
    file.write_all(contents)?;
    file.persist(path).map(drop).map_err(|e| e.error)
}

/// An error without the name that was made up for the file: people have not heard of it.
fn without_name(e: io::Error) -> io::Error {
    match e.to_string().split_once(" at path ") {
        Some((what, _)) => io::Error::new(e.kind(), what.to_owned()),
        None => e,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn nothing_that_was_prepared_is_written_to() {
        let dir = tempfile::tempdir().unwrap();
        let [path, precious] = ["state", "precious"].map(|name| dir.path().join(name));
        fs::write(&precious, "precious").unwrap();
        symlink(&precious, &path).unwrap();
        // The name that was once taken.
        symlink(&precious, path.with_added_extension(format!("{}.tmp", std::process::id()))).unwrap();
        write(&path, b"new", 0o640).unwrap();
        assert_eq!(fs::read(&precious).unwrap(), b"precious");
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert!(fs::symlink_metadata(&path).unwrap().is_file());
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o137, 0, "no more than was asked for");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
        write(&dir.path().join("none/state"), b"", 0o644).unwrap_err();
    }
}
