//! Compiles C code and makes chains of it.

use std::{
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use nbdkit_core::{Chain, Client, Connection, Peer, Plugin, Session, ShutdownFlag};
use tempfile::TempDir;

use crate::{DebugFlags, load_filter, load_plugin};

/// Where the distribution keeps the headers.
pub(super) const HEADERS: &str = "/usr/include";

/// A directory for what a test compiles.
pub(super) struct Lab {
    dir: TempDir,
}

impl Lab {
    pub(super) fn new() -> Self {
        Lab { dir: tempfile::tempdir().expect("a temporary directory") }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Compiles one of the sources beside this file; `flags` come before the distribution's headers.
    #[track_caller]
    pub(super) fn gcc<S: AsRef<OsStr>>(&self, source: &str, output: &str, flags: &[S]) -> PathBuf {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(source);
        let path = self.path(output);
        let run = Command::new("gcc")
            .args(["-Wall", "-Wno-unused-function", "-Werror", "-g", "-o"])
            .arg(&path)
            .args(flags)
            .args(["-I", HEADERS])
            .arg(source)
            .output()
            .expect("gcc is needed");
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        path
    }

    /// Compiles a shared library.
    #[track_caller]
    pub(super) fn library<S: AsRef<OsStr>>(&self, source: &str, flags: &[S]) -> PathBuf {
        let mut all: Vec<OsString> = vec!["-shared".into(), "-fPIC".into()];
        all.extend(flags.iter().map(|flag| flag.as_ref().to_owned()));
        let name = Path::new(source).file_name().expect("a file").display();
        self.gcc(source, &format!("{name}.so"), &all)
    }

    /// Compiles and loads a plugin.
    #[track_caller]
    pub(super) fn plugin(&self, source: &str, flags: &[&str]) -> Box<dyn Plugin> {
        load_plugin(&self.library(source, flags), &mut DebugFlags::default()).expect("a plugin")
    }

    /// Why a plugin does not load.
    #[track_caller]
    pub(super) fn refused(&self, source: &str, flags: &[&str]) -> String {
        let path = self.library(source, flags);
        let error = load_plugin(&path, &mut DebugFlags::default()).err().expect("an error");
        let error = format!("{error:#}");
        assert!(error.contains(path.to_str().unwrap()), "the error must name the file: {error}");
        error
    }

    /// What a plugin has written to its log.
    pub(super) fn log(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.path("log")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

/// A chain with its parameters, ready to serve; `filters` are the outermost first.
pub(super) fn start(plugin: Box<dyn Plugin>, filters: &[&Path], parameters: &[(&str, &str)]) -> Arc<Chain> {
    let load = |path: &&Path| load_filter(path, &mut DebugFlags::default()).expect("a filter");
    let mut chain = Chain::new(plugin, filters.iter().map(load).collect());
    for (key, value) in parameters {
        chain.config(key, OsStr::new(value)).expect("config");
    }
    serve(chain).expect("a chain that starts")
}

/// Brings a chain that has its parameters to where it takes clients.
pub(super) fn serve(mut chain: Chain) -> anyhow::Result<Arc<Chain>> {
    chain.config_complete()?;
    chain.get_ready()?;
    let chain = Arc::new(chain);
    chain.after_fork()?;
    Ok(chain)
}

/// A client that has connected.
pub(super) fn connect(chain: &Arc<Chain>) -> Arc<Connection> {
    let peer = Peer::Unix { pid: 11, uid: 12, gid: 13 };
    let client = Arc::new(Client::new(1, peer, Arc::new(ShutdownFlag::new())));
    Arc::new(chain.connect(client, false).expect("connect"))
}

/// A client with the export `name`.
pub(super) fn open(chain: &Arc<Chain>, name: &str) -> nbdkit_core::Result<Session> {
    connect(chain).open(OsStr::new(name), false)
}
