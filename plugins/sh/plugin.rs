//! The plugin whose callbacks are scripts.

use std::{
    ffi::{OsStr, OsString},
    io::Write as _,
    os::unix::ffi::OsStrExt,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::{Context as _, bail};
use nbdkit_core::{Client, Exports, Handle, Info, Open, Plugin, Result, ShutdownFlag, ThreadModel};
use parking_lot::Mutex;

use super::{
    alarm::Patience,
    answer::MAX_KNOWN_STATUS,
    handle::Opened,
    parse,
    scripts::{Call, Found, Methods, Scripts},
};

/// How long the last scripts may take, when there is nobody left who could give them up.
const LAST: Duration = Duration::from_secs(5);

/// See the module.
pub(crate) struct Scripted<M: Methods> {
    scripts: Arc<Shared<M>>,
    /// `load` was called, if there is one.
    loaded: bool,
    /// The parameter for bare words that the script asked for.
    magic: Option<String>,
    model: Mutex<Option<ThreadModel>>,
}

/// What the plugin shares with its handles; the last to let go calls `unload`.
pub(super) struct Shared<M: Methods>(Scripts<M>);

impl<M: Methods> std::ops::Deref for Shared<M> {
    type Target = Scripts<M>;

    fn deref(&self) -> &Scripts<M> {
        &self.0
    }
}

impl<M: Methods> Drop for Shared<M> {
    fn drop(&mut self) {
        if !self.0.loaded.load(Ordering::Relaxed) {
            return;
        }
        let call = Call::new("unload").patience(Patience::at_most(LAST));
        if let Err(e) = self.0.run(call) {
            log::error!("unload: {e}");
        }
    }
}

impl<M: Methods> Scripted<M> {
    pub(crate) fn new(methods: M) -> Self {
        Scripted {
            scripts: Arc::new(Shared(Scripts::new(methods))),
            loaded: false,
            magic: None,
            model: Mutex::new(None),
        }
    }

    /// Calls a method of the start. Tells whether it is there.
    fn step(&self, call: Call<'_>, method: &str) -> anyhow::Result<bool> {
        self.scripts.run(call).with_context(|| format!("{}: {method}", self.scripts.methods.title()))
    }

    /// Calls `load` as soon as there is one.
    fn load(&mut self) -> anyhow::Result<()> {
        if self.loaded || matches!(self.scripts.methods.find("load"), Found::Missing) {
            return Ok(());
        }
        self.loaded = true;
        self.scripts.loaded.store(false, Ordering::Relaxed);
        self.step(Call::at_start("load"), "load")?;
        self.scripts.loaded.store(true, Ordering::Relaxed);
        let key = self.scripts.ask(Call::at_start("magic_config_key"));
        let key = key.with_context(|| format!("{}: magic_config_key", self.scripts.methods.title()))?;
        self.magic = key.as_deref().and_then(parse::key);
        Ok(())
    }

    fn ask_model(&self) -> anyhow::Result<ThreadModel> {
        let answer = self.scripts.ask(Call::at_start("thread_model"));
        let answer = answer.with_context(|| format!("{}: thread_model", self.scripts.methods.title()))?;
        let model = answer.as_deref().map(|answer| {
            let model = parse::thread_model(answer);
            if model.is_none() {
                log::warn!(
                    "thread_model: the script printed none that is known, and requests are serialized"
                );
            }
            model
        });
        Ok(model.flatten().unwrap_or(ThreadModel::SerializeAllRequests))
    }

    fn when_served(&self, method: &'static str) -> Call<'_> {
        Call::new(method).patience(Patience::until(self.scripts.alarm()))
    }
}

impl<M: Methods> Plugin for Scripted<M> {
    fn info(&self) -> Info {
        let info = self.scripts.methods.info();
        Info { magic_config_key: self.magic.clone().map(Into::into).or(info.magic_config_key), ..info }
    }

    fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<bool> {
        let scripts = Arc::get_mut(&mut self.scripts).context("parameters come before connections")?;
        if scripts.0.define(key, value)? {
            self.load()?;
            return Ok(true);
        }
        let call = Call::at_start("config").word(key)?.word(value.as_bytes())?;
        if !self.step(call, "config")? {
            let title = self.scripts.methods.title();
            bail!("unknown parameter '{key}': {title} has no config method that could take it");
        }
        Ok(true)
    }

    fn config_complete(&mut self) -> anyhow::Result<()> {
        self.scripts.methods.check()?;
        self.step(Call::at_start("config_complete"), "config_complete")?;
        let model = self.ask_model()?;
        *self.model.lock() = Some(model);
        self.scripts.serial.store(model == ThreadModel::SerializeAllRequests, Ordering::Relaxed);
        Ok(())
    }

    fn stdio_is_taken(&mut self) {
        if let Some(scripts) = Arc::get_mut(&mut self.scripts) {
            scripts.0.methods.stdio_is_taken();
        }
    }

    fn callbacks(&self) -> Option<Vec<&'static str>> {
        None
    }

    fn dump(&self) -> Vec<(String, String)> {
        match self.scripts.ask(Call::at_start("dump_plugin")) {
            // The script's lines may have any form.
            Ok(lines) => {
                let mut out = std::io::stdout().lock();
                let status = writeln!(out, "max_known_status={MAX_KNOWN_STATUS}");
                let written = status.and_then(|()| out.write_all(&lines.unwrap_or_default()));
                if let Err(e) = written.and_then(|()| out.flush()) {
                    log::error!("dump_plugin: {e}");
                }
            }
            Err(e) => log::error!("dump_plugin: {e}"),
        }
        Vec::new()
    }

    fn thread_model(&self) -> ThreadModel {
        if let Some(model) = *self.model.lock() {
            return model;
        }
        // Asked before config_complete, by --dump-plugin: no start depends on it.
        match self.scripts.methods.check() {
            Ok(()) => self.ask_model().unwrap_or(ThreadModel::SerializeAllRequests),
            Err(_) => ThreadModel::Parallel,
        }
    }

    fn max_thread_model(&self) -> ThreadModel {
        ThreadModel::Parallel
    }

    fn get_ready(&mut self) -> anyhow::Result<()> {
        self.step(Call::at_start("get_ready"), "get_ready").map(drop)
    }

    fn after_fork(&self, server: &Arc<ShutdownFlag>) -> anyhow::Result<()> {
        self.scripts.serve(server)?;
        self.step(self.when_served("after_fork"), "after_fork").map(drop)
    }

    fn cleanup(&self) {
        let call = Call::new("cleanup").patience(Patience::at_most(LAST));
        if let Err(e) = self.scripts.run(call) {
            log::error!("cleanup: {e}");
        }
    }

    fn preconnect(&self, client: Option<&Arc<Client>>, readonly: bool) -> Result<()> {
        let call = self.when_served("preconnect").boolean(readonly);
        let call = match client {
            Some(client) => call.client(client),
            None => call,
        };
        self.scripts.run(call).map(drop)
    }

    fn list_exports(&self, readonly: bool, tls: bool) -> Result<Exports> {
        let call = self.when_served("list_exports").boolean(readonly).boolean(tls);
        if let Some(output) = self.scripts.ask(call)? {
            return parse::exports(&output);
        }
        let mut exports = Exports::new();
        exports.use_default();
        Ok(exports)
    }

    fn default_export(&self, readonly: bool, tls: bool) -> Result<Option<OsString>> {
        let call = self.when_served("default_export").boolean(readonly).boolean(tls);
        let Some(output) = self.scripts.ask(call)? else { return Ok(Some(OsString::new())) };
        let first = parse::exports(&output)?.into_iter().next().map(|export| export.name.clone());
        Ok(Some(first.unwrap_or_default()))
    }

    fn open(&self, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Opened::new(self.scripts.clone(), open)?))
    }
}
