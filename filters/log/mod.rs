//! Logs what clients do, to a file, to a script, or among the debug messages.
//!
//! * [`entry`] is one line of the log: its format is what scripts parse.
//! * [`journal`] is where lines go.
//! * [`handle`] is the layer that sees the requests.

mod entry;
mod handle;
mod journal;
#[cfg(test)]
mod tests;

use std::{
    ffi::{OsStr, OsString},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use nbdkit_core::{Below, Exports, Filter, Handle, Info, NextConfig, Open, Result, ThreadModel, params};

use self::{entry::List, handle::Logged, journal::Journal};

const HELP: &str = "\
logfile=<FILE>       The file to write the log to.
logappend=<BOOL>     Append to the file (default: false, it is overwritten).
logscript=<SCRIPT>   Bash script to run for each entry.";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Log::default())
}

#[derive(Default)]
struct Log {
    file: Option<PathBuf>,
    append: bool,
    script: Option<OsString>,
    journal: Arc<Journal>,
    preconnects: AtomicU64,
    lists: AtomicU64,
    connections: AtomicU64,
}

/// The next number of a counter, from 1.
fn count(counter: &AtomicU64) -> u64 {
    counter.fetch_add(1, Ordering::Relaxed) + 1
}

impl Filter for Log {
    fn info(&self) -> Info {
        Info::bundled("log", "nbdkit log filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "logfile" => self.file = Some(value.into()),
            "logappend" => self.append = params::boolean(value)?,
            "logscript" => self.script = Some(value.into()),
            _ => return next(key, value),
        }
        Ok(())
    }

    fn get_ready(&mut self, model: ThreadModel) -> anyhow::Result<()> {
        self.journal = Arc::new(Journal::open(self.file.as_deref(), self.append, self.script.take())?);
        self.journal.print(None, "Ready", format_args!(" thread_model={}", model as i32));
        Ok(())
    }

    fn after_fork(&self, _: &Below) -> anyhow::Result<()> {
        self.journal.print(None, "Fork", format_args!(""));
        Ok(())
    }

    fn preconnect(&self, next: &Below, readonly: bool) -> Result<()> {
        let id = count(&self.preconnects);
        let params = format_args!(" readonly={}", i32::from(readonly));
        self.journal.enter(None, "Preconnect", id, params);
        let result = next.preconnect(readonly);
        self.journal.leave(None, "Preconnect", id, format_args!(""), &result);
        result
    }

    fn list_exports(&self, next: &Below, readonly: bool, tls: bool) -> Result<Exports> {
        let id = count(&self.lists);
        let params = format_args!(" readonly={} tls={}", i32::from(readonly), i32::from(tls));
        self.journal.enter(None, "ListExports", id, params);
        let result = next.list_exports(readonly, tls);
        match &result {
            Ok(list) => {
                self.journal.leave(None, "ListExports", id, format_args!(" exports={}", List(list)), &result);
            }
            Err(_) => self.journal.leave(None, "ListExports", id, format_args!(""), &result),
        }
        result
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        Ok(Box::new(Logged::new(self.journal.clone(), count(&self.connections), open, next)))
    }
}
