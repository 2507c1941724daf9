//! What a filter is: a layer over the rest of the chain.

use std::ffi::{OsStr, OsString};

use crate::{Below, Exports, Handle, Info, Open, Result, ThreadModel};

/// Passes a parameter on to the layer below.
pub type NextConfig<'a> = dyn FnMut(&str, &OsStr) -> anyhow::Result<()> + 'a;

/// Passes `config_complete` on to the layer below.
pub type NextConfigComplete<'a> = dyn FnMut() -> anyhow::Result<()> + 'a;

/// A layer over the rest of the chain. A method that is not implemented passes through. Dropping it unloads it.
///
/// [`Below`] is the part of the chain beneath the filter; it can be kept, to open the plugin outside any
/// connection.
pub trait Filter: Send + Sync {
    /// Name, help and so on.
    fn info(&self) -> Info;

    /// Takes a parameter, or hands it to `next`, changed or not.
    ///
    /// # Errors
    /// Any: the start fails with it. The message names the fix.
    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        next(key, value)
    }

    /// Takes a debug flag, `-D FILTER.name=value`, before the first parameter; false: there is no such flag. One that is
    /// loaded from a file has variables instead.
    fn debug_flag(&mut self, name: &str, value: i32) -> bool {
        let _ = (name, value);
        false
    }

    /// All parameters were given. Must call `next`.
    ///
    /// # Errors
    /// Any: the start fails with it.
    fn config_complete(&mut self, next: &mut NextConfigComplete<'_>) -> anyhow::Result<()> {
        next()
    }

    /// Further `key=value` lines for `--dump-plugin`. A filter that can only print them does so here.
    fn dump(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    /// How many requests may be in the filter at once, over layers of the model `next`. The strictest of the
    /// chain wins, so this can only tighten.
    fn thread_model(&self, next: ThreadModel) -> ThreadModel {
        next
    }

    /// The last call before the server goes to the background, with the final thread model.
    ///
    /// # Errors
    /// Any: the start fails with it.
    fn get_ready(&mut self, model: ThreadModel) -> anyhow::Result<()> {
        let _ = model;
        Ok(())
    }

    /// The first call in the process that serves, the plugin's first.
    ///
    /// # Errors
    /// Any: the server ends.
    fn after_fork(&self, next: &Below) -> anyhow::Result<()> {
        let _ = next;
        Ok(())
    }

    /// The last call, after the last handle was closed.
    fn cleanup(&self, next: &Below) {
        let _ = next;
    }

    /// A client has connected and has said nothing yet.
    ///
    /// # Errors
    /// Any: the client is rejected.
    fn preconnect(&self, next: &Below, readonly: bool) -> Result<()> {
        next.preconnect(readonly)
    }

    /// The exports there are.
    ///
    /// # Errors
    /// Any: the client gets no list.
    fn list_exports(&self, next: &Below, readonly: bool, tls: bool) -> Result<Exports> {
        next.list_exports(readonly, tls)
    }

    /// The name that the empty name stands for.
    ///
    /// # Errors
    /// Any: as None, and logged.
    fn default_export(&self, next: &Below, readonly: bool, tls: bool) -> Result<Option<OsString>> {
        next.default_export(readonly, tls)
    }

    /// Metadata contexts beside `base:allocation` that clients may select for an export, by name (`namespace:leaf`,
    /// at most 4096 bytes); their status comes from [`Handle::context_status`](crate::Handle::context_status).
    /// Default: none, even of those below, since a filter may move what they describe.
    fn meta_contexts(&self, next: &Below) -> Vec<String> {
        let _ = next;
        Vec::new()
    }

    /// Whether the filter opens the layer below read-only whatever its clients want. Default: no.
    fn opens_readonly(&self) -> bool {
        false
    }

    /// Opens the filter for a connection: opens the layer below by `next.open(open)`, with the same or changed
    /// wishes, and returns a handle that owns it. When this fails, what was opened below is closed.
    ///
    /// # Errors
    /// Any: the client hears that there is no such export.
    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>>;
}
