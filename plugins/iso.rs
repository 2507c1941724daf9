//! The iso plugin: directories as a CD-ROM image, made at the start by the program of the system that can.

use std::{
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, bail, ensure};
use nbdkit_common::Regions;
use nbdkit_core::{Errno, Handle, Info, Open, Plugin, Result};

use crate::{
    block_file::BlockFile,
    concat::{Concat, Segment},
    maker,
    sh::Patience,
};

const HELP: &str = "\
[dir=]DIRECTORY     (required, may be repeated) What is on the disk; several are merged
params=WORDS        Further words for the program, as a shell reads them, such as '-JrT'
prog=PROGRAM        The program (default: xorriso, genisoimage or mkisofs, whichever there is)";

/// The programs that can, the better ones first.
const PROGRAMS: [&str; 3] = ["xorriso", "genisoimage", "mkisofs"];

pub(crate) fn new() -> Box<dyn Plugin> {
    Box::<Iso>::default()
}

#[derive(Default)]
struct Iso {
    directories: Vec<PathBuf>,
    params: OsString,
    program: Option<OsString>,
    disk: Option<Arc<Regions<Segment>>>,
}

/// The program that there is on this machine.
fn find() -> Option<&'static str> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_there = |program: &&str| std::env::split_paths(&path).any(|dir| dir.join(program).is_file());
    PROGRAMS.into_iter().find(is_there)
}

impl Iso {
    fn make(&self, output: &Path) -> anyhow::Result<()> {
        let program = match &self.program {
            Some(program) => program.clone(),
            None => find()
                .context("xorriso, genisoimage or mkisofs is needed: install one of these packages, or name another by prog=")?
                .into(),
        };
        // xorriso is mkisofs when it is told so.
        let is_xorriso = Path::new(&program).file_name() == Some(OsStr::new("xorriso"));
        let emulation = if is_xorriso { "-as mkisofs" } else { "" };
        let mut script =
            OsString::from(format!("exec \"$nbdkit_program\" {emulation} -quiet -o \"$nbdkit_output\" "));
        script.push(&self.params);
        let names: Vec<String> = (0..self.directories.len()).map(|n| format!("nbdkit_dir{n}")).collect();
        for name in &names {
            script.push(format!(" \"${name}\""));
        }
        let own = [("nbdkit_program", program.as_os_str()), ("nbdkit_output", output.as_os_str())];
        let directories = names.iter().zip(&self.directories).map(|(name, dir)| (&**name, dir.as_os_str()));
        let variables: Vec<_> = own.into_iter().chain(directories).collect();
        let what = program.display().to_string();
        Ok(maker::make(&what, &script, &variables, false, Patience::default())?)
    }
}

impl Plugin for Iso {
    fn info(&self) -> Info {
        Info::bundled("iso", "nbdkit iso plugin", HELP).magic("dir")
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        Some([crate::READ_ONLY, &["can_extents", "extents", "config_complete", "get_ready"]].concat())
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        match key {
            "dir" => {
                let path = std::path::absolute(value).with_context(|| format!("dir={}", value.display()))?;
                self.directories.push(path);
            }
            "params" => self.params = value.to_owned(),
            "prog" => {
                ensure!(!value.is_empty(), "prog= needs the name of a program, such as xorriso");
                self.program = Some(value.to_owned());
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        if self.directories.is_empty() {
            bail!("you must supply the dir=DIRECTORY parameter after the plugin name");
        }
        self.directories.iter().try_for_each(|dir| check(dir))
    }

    fn get_ready(&mut self) -> anyhow::Result<()> {
        let output = tempfile::Builder::new().prefix("nbdkit").suffix(".iso").tempfile_in(maker::directory());
        let output =
            output.with_context(|| format!("cannot make a file in {}", maker::directory().display()))?;
        self.make(output.path())?;
        let file = BlockFile::open(output.path(), true)?;
        let mut disk = Regions::new();
        disk.push(file.length(), Segment::File(file)).context("the image is too large")?;
        // The file has no name from here on, and goes with the server.
        self.disk = Some(Arc::new(disk));
        Ok(())
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Concat::new(self.disk.clone().ok_or(Errno::EINVAL)?).for_reading()))
    }
}

/// Checks that there is such a directory.
///
/// # Errors
/// There is none; the message names the parameter.
pub(crate) fn check(directory: &Path) -> anyhow::Result<()> {
    let metadata = directory.metadata().map_err(nbdkit_core::Error::from);
    let metadata = metadata.with_context(|| format!("dir={}", directory.display()))?;
    ensure!(metadata.is_dir(), "dir={}: is not a directory", directory.display());
    Ok(())
}
