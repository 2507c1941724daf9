//! What a plugin is: loaded and configured once, opened for each connection.

use std::{borrow::Cow, ffi::OsStr, path::PathBuf, sync::Arc};

use crate::{Chain, Client, Exports, Handle, Open, Result, ShutdownFlag, ThreadModel};

/// Makes chains. The program does that, for it knows the names of layers and what words on a command line mean.
pub trait ChainMaker: Send + Sync {
    /// Makes a chain out of `[ --filter=FILTER... PLUGIN KEY=VALUE... ]`, quoted as for a shell. It has its parameters; the
    /// rest of its life is for who asked for it.
    ///
    /// # Errors
    /// Those of a command line with these words.
    fn make(&self, text: &OsStr) -> anyhow::Result<Chain>;
}

/// What a plugin or filter says about itself.
#[derive(Clone, Debug, Default)]
pub struct Info {
    /// The name on the command line and in messages; ASCII letters and digits, `-` too.
    pub name: Cow<'static, str>,
    /// A longer name for `--help`.
    pub longname: Cow<'static, str>,
    /// Version; the server's own for bundled layers.
    pub version: Cow<'static, str>,
    /// Some lines about it for `--help`.
    pub description: Cow<'static, str>,
    /// One line for each parameter, for `--help`.
    pub config_help: Cow<'static, str>,
    /// The parameter that bare words on the command line are for.
    pub magic_config_key: Option<Cow<'static, str>>,
    /// The file it was loaded from; None for a bundled layer.
    pub path: Option<PathBuf>,
}

/// What `--dump-plugin` tells of the C interface that a plugin was built for.
#[derive(Clone, Debug)]
pub struct Interface {
    /// The version of the interface.
    pub api_version: i32,
    /// Size in bytes of the structure it registered.
    pub struct_size: u64,
    /// An errno left by a failed call is the errno of the request.
    pub errno_is_preserved: bool,
    /// The optional and required callbacks that it has, by name.
    pub callbacks: Vec<&'static str>,
}

impl Info {
    /// The info of a bundled layer, with the version of this workspace.
    pub fn bundled(name: &'static str, longname: &'static str, config_help: &'static str) -> Self {
        Info {
            name: name.into(),
            longname: longname.into(),
            version: env!("CARGO_PKG_VERSION").into(),
            config_help: config_help.into(),
            ..Info::default()
        }
    }

    /// Sets the parameter for bare words.
    #[must_use]
    pub fn magic(mut self, key: &'static str) -> Self {
        self.magic_config_key = Some(key.into());
        self
    }
}

/// What stands above a plugin, as far as that is known when the server starts.
#[derive(Clone, Debug, Default)]
pub struct Above {
    /// Whether the plugin will be opened for writing. None: a filter from a shared object may do either.
    pub written: Option<bool>,
    /// The names of the filters, the outermost first.
    pub filters: Vec<Arc<str>>,
}

/// A source of disks. See [`Chain`](crate::Chain) for the order of calls. Dropping it unloads it.
pub trait Plugin: Send + Sync {
    /// Name, help and so on.
    fn info(&self) -> Info;

    /// Standard input and output are a client's: parameters must not be read from there. Called before the first one.
    fn stdio_is_taken(&mut self) {}

    /// Offers a way to make other chains, for a plugin whose disk has theirs in it. Called once, before the first parameter.
    fn set_chains(&mut self, chains: &Arc<dyn ChainMaker>) {
        let _ = chains;
    }

    /// Tells what stands above it. Called once, before [`get_ready`](Self::get_ready).
    fn set_above(&mut self, above: Above) {
        let _ = above;
    }

    /// Takes a debug flag, `-D PLUGIN.name=value`, before the first parameter; false: there is no such flag. One that is
    /// loaded from a file has variables instead.
    fn debug_flag(&mut self, name: &str, value: i32) -> bool {
        let _ = (name, value);
        false
    }

    /// Takes a parameter; `Ok(false)`: "not mine", and the start fails with an error that names it.
    ///
    /// # Errors
    /// Any: the start fails with it. The message names the fix.
    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        let _ = (key, value);
        Ok(false)
    }

    /// All parameters were given: check that those required are there.
    ///
    /// # Errors
    /// Any: the start fails with it.
    fn config_complete(&mut self) -> anyhow::Result<()> {
        Ok(())
    }

    /// What it was built for, for `--dump-plugin`. None: a bundled one, which has no interface in between.
    fn interface(&self) -> Option<Interface> {
        None
    }

    /// The optional callbacks that a bundled plugin would have in the C interface, by name: for `--dump-plugin`, where
    /// scripts look for them before they use a plugin. None: all, since it passes every call on.
    fn callbacks(&self) -> Option<Vec<&'static str>> {
        Some(Vec::new())
    }

    /// Further `key=value` lines for `--dump-plugin`. A plugin that can only print them does so here.
    fn dump(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    /// How many requests may be in the plugin at once; asked after `config_complete`.
    fn thread_model(&self) -> ThreadModel {
        ThreadModel::Parallel
    }

    /// The strictest the plugin can be made to be, for `--dump-plugin`; asked at any time.
    fn max_thread_model(&self) -> ThreadModel {
        self.thread_model()
    }

    /// The last call before the server goes to the background: errors are still visible.
    ///
    /// # Errors
    /// Any: the start fails with it.
    fn get_ready(&mut self) -> anyhow::Result<()> {
        Ok(())
    }

    /// The first call in the process that serves: threads may start here. `server` is the flag that shuts it down.
    ///
    /// # Errors
    /// Any: the server ends.
    fn after_fork(&self, server: &Arc<ShutdownFlag>) -> anyhow::Result<()> {
        let _ = server;
        Ok(())
    }

    /// The last call, after the last handle was closed.
    fn cleanup(&self) {}

    /// A client has connected and has said nothing yet. None: one of the server's own.
    ///
    /// # Errors
    /// Any: the client is rejected.
    fn preconnect(&self, client: Option<&Arc<Client>>, readonly: bool) -> Result<()> {
        let _ = (client, readonly);
        Ok(())
    }

    /// The exports there are. Default: the default export alone.
    ///
    /// # Errors
    /// Any: the client gets no list.
    fn list_exports(&self, readonly: bool, tls: bool) -> Result<Exports> {
        let _ = (readonly, tls);
        let mut exports = Exports::new();
        exports.use_default();
        Ok(exports)
    }

    /// The name that the empty name stands for; None: a client must name an export. Default: the empty name.
    ///
    /// # Errors
    /// Any: as None, and logged.
    fn default_export(&self, readonly: bool, tls: bool) -> Result<Option<std::ffi::OsString>> {
        let _ = (readonly, tls);
        Ok(Some(std::ffi::OsString::new()))
    }

    /// Metadata contexts beside `base:allocation` that clients may select for an export, by name (`namespace:leaf`,
    /// at most 4096 bytes); their status comes from [`Handle::context_status`](crate::Handle::context_status).
    /// Default: none.
    fn meta_contexts(&self) -> Vec<String> {
        Vec::new()
    }

    /// Opens a disk for a connection.
    ///
    /// # Errors
    /// Any: the client hears that there is no such export.
    fn open(&self, open: &Open) -> Result<Box<dyn Handle>>;
}
