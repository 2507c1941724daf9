//! The chain: the configured layers and the order in which they live.
//!
//! Order of calls: [`Chain::new`] → [`config`](Chain::config) for each parameter →
//! [`config_complete`](Chain::config_complete) → [`get_ready`](Chain::get_ready) (the thread model is settled
//! before it) → [`after_fork`](Chain::after_fork) → sessions → [`cleanup`](Chain::cleanup) → drop.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::{
    Above, ChainMaker, Client, Exports, Filter, Info, Next, Open, Plugin, Result, ShutdownFlag, ThreadModel,
    locks::Locks, next::CONTROLPATH, stats::Stats, sync::RwLock,
};
use anyhow::Context as _;
use log::debug;

/// A front end that wants to know what other sessions change, so that its caches stay true. It is told of the changes
/// of all sessions but its own.
pub trait WriteObserver: Send + Sync {
    /// The range `offset..offset+length` of the export is about to be changed. After [`Announced::Heard`] one call of
    /// [`written`](Self::written) or [`withdrawn`](Self::withdrawn) follows, soon.
    fn writing(&self, export_name: &OsStr, offset: u64, length: u64, may_wait: bool) -> Announced;

    /// The range will not be changed now.
    fn withdrawn(&self, export_name: &OsStr, offset: u64, length: u64);

    /// The range was changed. Called after the request left the chain and before its client hears of it.
    fn written(&self, export_name: &OsStr, offset: u64, length: u64);
}

/// What an observer says to a change that is announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announced {
    /// It has nothing of that range.
    Unheard,
    /// It has put its caches in order, and keeps them so until the range is written.
    Heard,
    /// It would have to wait for others, and may not.
    NeedsThread,
}

/// The configured plugin and filters.
pub struct Chain {
    plugin: Box<dyn Plugin>,
    /// Innermost first: filter `i` is layer `i + 1`, the plugin is layer 0.
    filters: Vec<Box<dyn Filter>>,
    /// Name of each layer, by index.
    names: Vec<Arc<str>>,
    model: ThreadModel,
    /// No client is given the right to write.
    readonly: bool,
    pub(crate) locks: Locks,
    server: Arc<ShutdownFlag>,
    observers: RwLock<Vec<Weak<dyn WriteObserver>>>,
    pub(crate) observer_count: AtomicUsize,
    /// Clients that are connected.
    pub(crate) connections: AtomicUsize,
    stats: Option<Stats>,
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chain({:?})", self.names)
    }
}

impl Chain {
    /// A chain of `filters`, the outermost first as on the command line, over `plugin`.
    pub fn new(plugin: Box<dyn Plugin>, mut filters: Vec<Box<dyn Filter>>) -> Self {
        filters.reverse();
        let names = std::iter::once(plugin.info())
            .chain(filters.iter().map(|f| f.info()))
            .map(|info| Arc::from(&*info.name))
            .collect();
        Chain {
            plugin,
            filters,
            names,
            model: ThreadModel::Parallel,
            readonly: false,
            locks: Locks::new(ThreadModel::Parallel),
            server: Arc::new(ShutdownFlag::new()),
            observers: RwLock::default(),
            observer_count: AtomicUsize::new(0),
            connections: AtomicUsize::new(0),
            stats: None,
        }
    }

    /// The plugin's own name: what threads and messages are called after.
    pub fn plugin_name(&self) -> &str {
        &self.names[0]
    }

    /// The outermost layer's name.
    pub fn name(&self) -> &str {
        &self.names[self.filters.len()]
    }

    /// The flag that shuts down the server of this chain. Front ends watch it, and clients are made with it.
    pub fn server(&self) -> &Arc<ShutdownFlag> {
        &self.server
    }

    /// The plugin.
    pub fn plugin(&self) -> &dyn Plugin {
        &*self.plugin
    }

    /// The filters, the outermost first.
    pub fn filters(&self) -> impl Iterator<Item = &dyn Filter> {
        self.filters.iter().rev().map(|filter| &**filter)
    }

    /// What the layers say about themselves, the outermost filter first and the plugin last.
    pub fn infos(&self) -> Vec<Info> {
        self.filters.iter().rev().map(|f| f.info()).chain([self.plugin.info()]).collect()
    }

    /// Tells the plugin that standard input and output are a client's.
    pub fn stdio_is_taken(&mut self) {
        self.plugin.stdio_is_taken();
    }

    /// Offers a way to make other chains.
    pub fn set_chains(&mut self, chains: &Arc<dyn ChainMaker>) {
        self.plugin.set_chains(chains);
    }

    /// Tells that every client will be served read-only. To be called before [`get_ready`](Self::get_ready).
    pub fn set_readonly(&mut self, readonly: bool) {
        self.readonly = readonly;
    }

    /// What stands above the plugin.
    fn above_plugin(&self) -> Above {
        let written = if self.readonly || self.filters.iter().any(|filter| filter.opens_readonly()) {
            Some(false)
        } else if self.filters.iter().any(|filter| filter.info().path.is_some()) {
            None
        } else {
            Some(true)
        };
        Above { written, filters: self.names[1..].iter().rev().cloned().collect() }
    }

    /// Gives a parameter to the outermost layer, which may pass it on.
    ///
    /// # Errors
    /// Those of the layers; one that names the key when no layer takes it.
    pub fn config(&mut self, key: &str, value: &OsStr) -> anyhow::Result<()> {
        let names = &self.names;
        config(&mut *self.plugin, &mut self.filters, names, key, value)
    }

    /// Tells the layers that all parameters were given, and settles the thread model.
    ///
    /// # Errors
    /// Those of the layers.
    pub fn config_complete(&mut self) -> anyhow::Result<()> {
        config_complete(&mut *self.plugin, &mut self.filters, &self.names)?;
        self.model = self
            .filters
            .iter()
            .fold(self.plugin.thread_model(), |model, filter| model.min(filter.thread_model(model)));
        debug!("using thread model: {}", self.model);
        self.locks = Locks::new(self.model);
        Ok(())
    }

    /// Counts requests from now on, in what is opened from now on.
    pub fn count_requests(&mut self) {
        self.stats = Some(Stats::new(&self.names));
    }

    /// What was counted, if anything is.
    pub fn stats(&self) -> Option<&Stats> {
        self.stats.as_ref()
    }

    /// The strictest thread model of all layers.
    pub fn thread_model(&self) -> ThreadModel {
        self.model
    }

    /// The last step before the background, the plugin first.
    ///
    /// # Errors
    /// Those of the layers.
    pub fn get_ready(&mut self) -> anyhow::Result<()> {
        debug!(target: CONTROLPATH, "{}: get_ready", self.names[0]);
        let above = self.above_plugin();
        self.plugin.set_above(above);
        self.plugin.get_ready()?;
        for (filter, name) in self.filters.iter_mut().zip(&self.names[1..]) {
            debug!(target: CONTROLPATH, "{name}: get_ready thread_model={}", self.model as i32);
            filter.get_ready(self.model)?;
        }
        Ok(())
    }

    /// The first step in the serving process, the plugin first.
    ///
    /// # Errors
    /// Those of the layers.
    pub fn after_fork(self: &Arc<Self>) -> anyhow::Result<()> {
        debug!(target: CONTROLPATH, "{}: after_fork", self.names[0]);
        self.plugin.after_fork(&self.server)?;
        for level in 1..=self.filters.len() {
            debug!(target: CONTROLPATH, "{}: after_fork", self.names[level]);
            self.filters[level - 1].after_fork(&self.below(level))?;
        }
        Ok(())
    }

    /// Whether a client is connected: after the end of a front end one that was left behind, since a request of its does
    /// not end.
    pub fn has_clients(&self) -> bool {
        self.connections.load(Ordering::Acquire) > 0
    }

    /// The last step, after the last session ended: outermost first.
    pub fn cleanup(self: &Arc<Self>) {
        for level in (1..=self.filters.len()).rev() {
            debug!(target: CONTROLPATH, "{}: cleanup", self.names[level]);
            self.filters[level - 1].cleanup(&self.below(level));
        }
        debug!(target: CONTROLPATH, "{}: cleanup", self.names[0]);
        self.plugin.cleanup();
    }

    /// The layers beneath layer `level`.
    fn below(self: &Arc<Self>, level: usize) -> Below {
        Below { chain: self.clone(), level, client: None }
    }

    /// The whole chain, as something beneath a front end, on behalf of a client.
    pub(crate) fn whole(self: &Arc<Self>, client: Option<&Arc<Client>>) -> Below {
        Below { client: client.cloned(), ..self.below(self.filters.len() + 1) }
    }

    /// The exports that the outermost layer offers.
    ///
    /// # Errors
    /// Those of the layers.
    pub fn list_exports(self: &Arc<Self>, readonly: bool, tls: bool) -> Result<Exports> {
        self.whole(None).list_exports(readonly, tls)
    }

    /// The name that the empty export name stands for; None when the default export is forbidden.
    ///
    /// # Errors
    /// Those of the layers.
    pub fn default_export(self: &Arc<Self>, readonly: bool, tls: bool) -> Result<Option<OsString>> {
        self.whole(None).default_export(readonly, tls)
    }

    /// Starts a session for a client: waits for its turn under `SERIALIZE_CONNECTIONS` and calls `preconnect`.
    /// Nothing is open yet.
    ///
    /// # Errors
    /// Those of `preconnect`: reject the client; `ESHUTDOWN` when it went away meanwhile.
    pub fn connect(self: &Arc<Self>, client: Arc<Client>, readonly: bool) -> Result<crate::Connection> {
        let permit = self.locks.connection(&client.gone)?;
        self.whole(Some(&client)).preconnect(readonly)?;
        Ok(crate::Connection::new(self.clone(), client, readonly, permit))
    }

    /// Registers a front end that wants to know what others write. It ends when the front end drops its side.
    pub fn observe(&self, observer: &Arc<dyn WriteObserver>) {
        let mut observers = self.observers.write();
        observers.retain(|o| o.strong_count() > 0);
        observers.push(Arc::downgrade(observer));
        self.observer_count.store(observers.len(), Ordering::Release);
    }

    /// Calls `tell` with the observers, but not with the one at the address `own`.
    #[cold]
    pub(crate) fn for_observers(
        &self,
        own: Option<&Arc<dyn WriteObserver>>,
        mut tell: impl FnMut(&dyn WriteObserver),
    ) {
        // They may wait, so not under the lock. Backwards, since one that leaves meanwhile only moves others towards the
        // start: none is passed over.
        let mut left = self.observers.read().len();
        while left > 0 {
            left -= 1;
            let observer = self.observers.read().get(left).and_then(Weak::upgrade);
            if let Some(observer) = observer
                && own.is_none_or(|own| !Arc::ptr_eq(own, &observer))
            {
                tell(&*observer);
            }
        }
    }
}

/// A parameter, by its key, that no layer of the chain takes. The programs find it in the error to say who would.
#[derive(Clone, Debug)]
pub struct UnknownParameter(pub String);

impl std::fmt::Display for UnknownParameter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "unknown parameter '{}'", self.0)
    }
}

impl std::error::Error for UnknownParameter {}

fn config(
    plugin: &mut dyn Plugin,
    filters: &mut [Box<dyn Filter>],
    names: &[Arc<str>],
    key: &str,
    value: &OsStr,
) -> anyhow::Result<()> {
    debug!(target: CONTROLPATH, "{}: config key={key}, value={}", names[filters.len()], value.display());
    match filters.split_last_mut() {
        Some((filter, rest)) => {
            filter.config(key, value, &mut |key, value| config(plugin, rest, names, key, value))
        }
        None => {
            if !plugin.config(key, value)? {
                return Err(UnknownParameter(key.to_owned()).into());
            }
            Ok(())
        }
    }
}

fn config_complete(
    plugin: &mut dyn Plugin,
    filters: &mut [Box<dyn Filter>],
    names: &[Arc<str>],
) -> anyhow::Result<()> {
    debug!(target: CONTROLPATH, "{}: config_complete", names[filters.len()]);
    match filters.split_last_mut() {
        Some((filter, rest)) => {
            let mut called = false;
            filter.config_complete(&mut || {
                called = true;
                config_complete(plugin, rest, names)
            })?;
            if !called {
                return Err(anyhow::anyhow!("config_complete did not reach the layers below"))
                    .context(names[rest.len() + 1].to_string());
            }
            Ok(())
        }
        None => plugin.config_complete(),
    }
}

/// The part of a chain beneath one layer. A filter may keep it and open it at any time, outside any connection.
#[derive(Clone, Debug)]
pub struct Below {
    chain: Arc<Chain>,
    level: usize,
    client: Option<Arc<Client>>,
}

impl Below {
    /// The client on whose behalf the filter was called; None outside any connection.
    pub fn client(&self) -> Option<&Arc<Client>> {
        self.client.as_ref()
    }

    /// The flag that shuts down the server, for what must raise it without a client.
    pub fn server(&self) -> &Arc<ShutdownFlag> {
        self.chain.server()
    }

    /// The plugin's name.
    pub fn plugin_name(&self) -> &str {
        self.chain.plugin_name()
    }

    /// The uppermost layer of this part.
    fn top(&self) -> (Option<&dyn Filter>, &Arc<str>) {
        let index = self.level - 1;
        (index.checked_sub(1).map(|i| &*self.chain.filters[i]), &self.chain.names[index])
    }

    fn under(&self) -> Below {
        Below { level: self.level - 1, ..self.clone() }
    }

    /// Calls `preconnect` of the layers.
    ///
    /// # Errors
    /// Those of the layers: the client is rejected.
    pub fn preconnect(&self, readonly: bool) -> Result<()> {
        let (filter, name) = self.top();
        debug!(target: CONTROLPATH, "{name}: preconnect");
        match filter {
            Some(filter) => filter.preconnect(&self.under(), readonly),
            None => self.chain.plugin.preconnect(self.client.as_ref(), readonly),
        }
    }

    /// The exports there are.
    ///
    /// # Errors
    /// Those of the layers.
    pub fn list_exports(&self, readonly: bool, tls: bool) -> Result<Exports> {
        let (filter, name) = self.top();
        debug!(
            target: CONTROLPATH,
            "{name}: list_exports readonly={} tls={}", i32::from(readonly), i32::from(tls)
        );
        let mut exports = match filter {
            Some(filter) => filter.list_exports(&self.under(), readonly, tls)?,
            None => self.chain.plugin.list_exports(readonly, tls)?,
        };
        if exports.take_default() {
            match self.default_export(readonly, tls) {
                Ok(Some(default)) => exports.add(default, None)?,
                Ok(None) => {}
                // The list is what there is without it.
                Err(e) => log::error!("{name}: default_export: {e}"),
            }
        }
        Ok(exports)
    }

    /// The name that the empty export name stands for. A layer is asked once for each client.
    ///
    /// # Errors
    /// Those of the layers.
    pub fn default_export(&self, readonly: bool, tls: bool) -> Result<Option<OsString>> {
        self.once(self.level, readonly, tls, || self.ask_default_export(readonly, tls))
    }

    /// As [`default_export`](Self::default_export), of the layer above this part of the chain, which asks itself by `ask`.
    ///
    /// # Errors
    /// Those of `ask`.
    pub fn default_export_above(
        &self,
        readonly: bool,
        tls: bool,
        ask: impl FnOnce() -> Result<Option<OsString>>,
    ) -> Result<Option<OsString>> {
        self.once(self.level + 1, readonly, tls, ask)
    }

    fn once(
        &self,
        level: usize,
        readonly: bool,
        tls: bool,
        ask: impl FnOnce() -> Result<Option<OsString>>,
    ) -> Result<Option<OsString>> {
        match &self.client {
            Some(client) => client.default_export(level, readonly, tls, ask),
            None => ask(),
        }
    }

    fn ask_default_export(&self, readonly: bool, tls: bool) -> Result<Option<OsString>> {
        let (filter, name) = self.top();
        debug!(
            target: CONTROLPATH,
            "{name}: default_export readonly={} tls={}", i32::from(readonly), i32::from(tls)
        );
        match filter {
            Some(filter) => filter.default_export(&self.under(), readonly, tls),
            None => self.chain.plugin.default_export(readonly, tls),
        }
    }

    /// The metadata contexts there are beside `base:allocation`.
    pub fn meta_contexts(&self) -> Vec<String> {
        match self.top().0 {
            Some(filter) => filter.meta_contexts(&self.under()),
            None => self.chain.plugin.meta_contexts(),
        }
    }

    /// Opens the layers.
    ///
    /// # Errors
    /// Those of the layers; what was opened is closed again.
    pub fn open(&self, open: &Open) -> Result<Next> {
        let (filter, name) = self.top();
        debug!(
            target: CONTROLPATH,
            "{name}: open readonly={} exportname=\"{}\" tls={}",
            i32::from(open.readonly),
            open.export_name.display(),
            i32::from(open.tls)
        );
        let handle = match filter {
            Some(filter) => filter.open(&self.under(), open)?,
            None => self.chain.plugin.open(open)?,
        };
        let counters = self.chain.stats.as_ref().and_then(|stats| stats.layer(self.level - 1)).cloned();
        Next::new((name.clone(), self.level - 1), handle, open.readonly, counters)
    }
}
