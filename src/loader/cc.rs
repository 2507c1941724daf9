//! Compiles the source of a plugin and loads what comes of it. The compiler runs when all parameters are known; from
//! then on every call goes to the compiled plugin.
//!
//! It is here and not among the bundled plugins because only this package can load what was compiled.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail, ensure};
use nbdkit_core::{Client, Errno, Error, Exports, Handle, Info, Open, Plugin, ShutdownFlag, ThreadModel};

use crate::{DebugFlags, plugin::load_compiled};

const HELP: &str = "\
script=<FILENAME>     (required) The source; '-' reads it from standard input.
CC=<COMPILER>         The compiler (default cc).
CFLAGS=<FLAGS>        Its flags, instead of the usual ones.
EXTRA_CFLAGS=<FLAGS>  Further flags.
All other parameters are the compiled plugin's.";

/// Debugging symbols, and a shared object.
const CFLAGS: &str = "-g -O2 -fPIC -shared";

/// The plugin `cc`. The compiled plugin takes those of `flags` that are its own.
pub fn cc(flags: &DebugFlags) -> Box<dyn Plugin> {
    Box::new(Cc { cc: "cc".into(), cflags: default_flags(), flags: flags.clone(), ..Cc::default() })
}

/// See the module.
#[derive(Default)]
struct Cc {
    source: Option<Source>,
    cc: OsString,
    cflags: OsString,
    extra: OsString,
    parameters: Vec<(String, OsString)>,
    flags: DebugFlags,
    /// A client speaks on standard input.
    no_stdin: bool,
    plugin: Option<Box<dyn Plugin>>,
}

enum Source {
    File(PathBuf),
    StandardInput,
}

/// The usual flags. A server that was installed beside its headers tells where they are.
fn default_flags() -> OsString {
    let mut flags = OsString::from(CFLAGS);
    let binary = std::env::current_exe().ok();
    let prefix = binary.as_deref().and_then(Path::parent).and_then(Path::parent);
    if let Some(include) = prefix.map(|prefix| prefix.join("include"))
        && include.join("nbdkit-plugin.h").is_file()
    {
        flags.push(" -I");
        flags.push(quote(include.as_os_str()));
    }
    flags
}

/// What OCaml's compiler has to know, if the server was installed with what plugins in OCaml are compiled with, and OCaml
/// does not look there.
fn ocaml() -> Vec<(&'static str, OsString)> {
    let binary = std::env::current_exe().ok();
    let prefix = binary.as_deref().and_then(Path::parent).and_then(Path::parent);
    let Some(lib) = prefix.map(|prefix| prefix.join("lib")) else { return Vec::new() };
    if !lib.join("ocaml/NBDKit.cmx").is_file() || std::env::var_os("OCAMLPARAM").is_some() {
        return Vec::new();
    }
    let mut include = OsString::from("_,I=");
    include.push(lib.join("ocaml"));
    let mut libraries = lib.into_os_string();
    if let Some(others) = std::env::var_os("LIBRARY_PATH") {
        libraries.push(":");
        libraries.push(others);
    }
    vec![("OCAMLPARAM", include), ("LIBRARY_PATH", libraries)]
}

/// Quotes a word for the shell.
fn quote(word: &OsStr) -> OsString {
    use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
    let parts: Vec<&[u8]> = word.as_bytes().split(|b| *b == b'\'').collect();
    OsString::from_vec([b"'", &parts.join(&b"'\\''"[..])[..], b"'"].concat())
}

impl Cc {
    /// Compiles and loads. The library's file is not needed any more once it is loaded.
    fn compile(&self) -> Result<Box<dyn Plugin>> {
        let Some(source) = &self.source else {
            bail!("the source is missing: nbdkit cc SOURCE.c [KEY=VALUE ...]");
        };
        let directory = tempfile::Builder::new()
            .prefix("nbdkit")
            .tempdir()
            .context("cannot make a directory for the compiled plugin ($TMPDIR says where)")?;
        let copy = directory.path().join("plugin.c");
        let (path, shown) = match source {
            Source::File(path) => (path, path.display().to_string()),
            Source::StandardInput => {
                let copied =
                    File::create(&copy).and_then(|mut file| io::copy(&mut io::stdin().lock(), &mut file));
                copied.context("cannot read the source from standard input")?;
                (&copy, "the source on standard input".into())
            }
        };
        let library = directory.path().join("plugin.so");
        let (path, output) = (quote(path.as_os_str()), quote(library.as_os_str()));
        let words = [&*self.cc, &self.cflags, &self.extra, &path, OsStr::new("-o"), &output];
        let command = words.join(OsStr::new(" "));
        log::debug!("{}", command.display());
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(&command).stdin(Stdio::null()).envs(ocaml());
        let status = shell.status();
        let status = status.context("cannot run /bin/sh")?;
        ensure!(
            status.success(),
            "cannot compile {shown}: {} ended with {status}; what it said is above",
            self.cc.display()
        );
        ensure!(library.is_file(), "cannot compile {shown}: {} made no file", self.cc.display());
        let mut flags = self.flags.clone();
        let plugin = load_compiled(&library, &mut flags).with_context(|| shown)?;
        flags.warn_unused(&["cc"]);
        Ok(plugin)
    }

    fn plugin(&self) -> nbdkit_core::Result<&dyn Plugin> {
        self.plugin.as_deref().ok_or_else(|| Error::new(Errno::EINVAL, "the plugin is not compiled yet"))
    }
}

impl Plugin for Cc {
    fn info(&self) -> Info {
        Info::bundled("cc", "nbdkit C compiler plugin", HELP)
    }

    fn stdio_is_taken(&mut self) {
        self.no_stdin = true;
    }

    fn config(&mut self, key: &str, value: &OsStr) -> Result<bool> {
        match key {
            "CC" => self.cc = value.to_owned(),
            "CFLAGS" => self.cflags = value.to_owned(),
            "EXTRA_CFLAGS" => self.extra = value.to_owned(),
            "script" if self.source.is_none() => {
                self.source = Some(if value == "-" {
                    ensure!(!self.no_stdin, "an inline source is incompatible with -s: put it into a file");
                    Source::StandardInput
                } else {
                    let path = fs::canonicalize(value);
                    Source::File(path.with_context(|| format!("script={}", value.display()))?)
                });
            }
            _ if self.source.is_none() => {
                bail!("the first parameter must be the source: nbdkit cc SOURCE.c [KEY=VALUE ...]")
            }
            _ => self.parameters.push((key.to_owned(), value.to_owned())),
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> Result<()> {
        let mut plugin = self.compile()?;
        for (key, value) in &self.parameters {
            if !plugin.config(key, value)? {
                bail!("unknown parameter '{key}': the compiled plugin does not take it");
            }
        }
        plugin.config_complete()?;
        self.plugin = Some(plugin);
        Ok(())
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        None
    }

    fn dump(&self) -> Vec<(String, String)> {
        [("CC", &self.cc), ("CFLAGS", &self.cflags)]
            .map(|(key, value)| (key.into(), value.to_string_lossy().into_owned()))
            .into()
    }

    fn thread_model(&self) -> ThreadModel {
        self.plugin.as_ref().map_or(ThreadModel::SerializeConnections, |plugin| plugin.thread_model())
    }

    fn max_thread_model(&self) -> ThreadModel {
        self.plugin.as_ref().map_or(ThreadModel::Parallel, |plugin| plugin.max_thread_model())
    }

    fn get_ready(&mut self) -> Result<()> {
        self.plugin.as_mut().map_or(Ok(()), |plugin| plugin.get_ready())
    }

    fn after_fork(&self, server: &Arc<ShutdownFlag>) -> Result<()> {
        self.plugin()?.after_fork(server)
    }

    fn cleanup(&self) {
        if let Some(plugin) = &self.plugin {
            plugin.cleanup();
        }
    }

    fn preconnect(&self, client: Option<&Arc<Client>>, readonly: bool) -> nbdkit_core::Result<()> {
        self.plugin()?.preconnect(client, readonly)
    }

    fn list_exports(&self, readonly: bool, tls: bool) -> nbdkit_core::Result<Exports> {
        self.plugin()?.list_exports(readonly, tls)
    }

    fn default_export(&self, readonly: bool, tls: bool) -> nbdkit_core::Result<Option<OsString>> {
        self.plugin()?.default_export(readonly, tls)
    }

    fn open(&self, open: &Open) -> nbdkit_core::Result<Box<dyn Handle>> {
        self.plugin()?.open(open)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_the_shell() {
        assert_eq!(quote(OsStr::new("a b")), "'a b'");
        assert_eq!(quote(OsStr::new("it's")), "'it'\\''s'");
    }

    #[test]
    fn the_source_comes_first() {
        let said = cc(&DebugFlags::default()).config("file", OsStr::new("x")).unwrap_err().to_string();
        assert!(said.contains("nbdkit cc SOURCE.c"), "{said}");
        let said = cc(&DebugFlags::default()).config_complete().unwrap_err().to_string();
        assert!(said.contains("the source is missing"), "{said}");
    }
}
