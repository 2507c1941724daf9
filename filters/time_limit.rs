//! Limits how long a client may stay connected.
//!
//! A request that comes too late fails, and the client is disconnected, also one that does nothing.

use std::{
    collections::HashMap,
    ffi::OsStr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use nbdkit_core::{
    Below, Client, Errno, Error, Filter, Handle, Info, Next, NextConfig, Open, Outcome, Request, Result,
    ShutdownFlag, params,
};
use parking_lot::Mutex;

const HELP: &str = "time-limit=<SECS>   How long a client may stay (default 60).";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(TimeLimit { limit: Duration::from_secs(60), deadlines: Arc::default() })
}

struct TimeLimit {
    limit: Duration,
    /// When each client that is here must leave, by the address of its state: it is not used again before its client
    /// was taken out.
    deadlines: Arc<Mutex<HashMap<usize, Instant>>>,
}

fn key(client: &Arc<Client>) -> usize {
    Arc::as_ptr(client).addr()
}

/// Starts a thread that disconnects the client after `limit`, and ends when it has left before.
fn disconnect_after(client: &Arc<Client>, limit: Duration) -> Result<()> {
    // A thread that held the client would keep it from being gone.
    let left = Arc::new(ShutdownFlag::new());
    let (hears, late) = (left.clone(), Arc::downgrade(client));
    client.gone.on_raise(move || left.raise());
    std::thread::Builder::new()
        .name("time-limit".into())
        .spawn(move || {
            if !hears.wait_for(limit)
                && let Some(client) = late.upgrade()
            {
                log::debug!("time-limit: the time of client {} is over", client.number);
                client.disconnect(true);
            }
        })
        .map(drop)
        .map_err(|e| Error::from(e).context("time-limit: cannot start a thread"))
}

impl Filter for TimeLimit {
    fn info(&self) -> Info {
        Info::bundled("time-limit", "nbdkit time limit filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "time-limit" | "time_limit" | "timelimit" => {
                self.limit = params::delay(value).context("time-limit")?
            }
            _ => return next(key, value),
        }
        Ok(())
    }

    fn preconnect(&self, next: &Below, readonly: bool) -> Result<()> {
        // A limit beyond what the clock can count is none.
        if let (Some(client), Some(deadline)) = (next.client(), Instant::now().checked_add(self.limit)) {
            let key = key(client);
            self.deadlines.lock().insert(key, deadline);
            let deadlines = self.deadlines.clone();
            client.gone.on_raise(move || {
                deadlines.lock().remove(&key);
            });
            disconnect_after(client, self.limit)?;
        }
        next.preconnect(readonly)
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let deadline = self.deadlines.lock().get(&key(&open.client)).copied();
        Ok(Box::new(Limited { deadline, client: open.client.clone(), next: next.open(open)? }))
    }
}

struct Limited {
    /// None: no limit.
    deadline: Option<Instant>,
    client: Arc<Client>,
    next: Next,
}

impl Limited {
    fn check(&self) -> Result<()> {
        // The deadline of a client that was disconnected before this export was open is forgotten.
        let late = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        if late || self.client.gone.is_raised() {
            self.client.disconnect(true);
            return Err(Error::new(Errno::ESHUTDOWN, "the time of the client is over (time-limit)"));
        }
        Ok(())
    }
}

impl Handle for Limited {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        match self.check() {
            // Each request has to come by here: watched, a loan is for this one only.
            Ok(()) => self.next.watch(self, request, 0),
            Err(e) => Outcome::Done(Err(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::{Call, Flags, Op};

    use super::*;
    use crate::testing::{
        Answer, Spec, View, chain, check_model, client, config_error, is_watched, lent, open, read_inline,
        session, started,
    };

    #[test]
    fn model() {
        check_model(&["time-limit"], &[], 20_000, &View::same(20_000));
        check_model(&["time-limit"], &[("time-limit", "1000000000000000000")], 20_000, &View::same(20_000));
    }

    #[test]
    fn requests_after_the_limit_fail_and_end_the_connection() {
        let disk = Spec::default().disk();
        let session = session(&disk, "time-limit", &[("time-limit", "0")]);
        let mut buf = [0; 8];
        for error in [
            session.pread(&mut buf, 0).unwrap_err(),
            read_inline(&session, &mut buf, 0).unwrap_err(),
            session.pwrite(&buf, 0, Flags::empty()).unwrap_err(),
            session.flush().unwrap_err(),
            session.trim(8, 0, Flags::empty()).unwrap_err(),
            session.zero(8, 0, Flags::empty()).unwrap_err(),
            session.extents(8, 0, Flags::empty()).unwrap_err(),
            session.cache(8, 0).unwrap_err(),
        ] {
            assert_eq!(error.errno(), Errno::ESHUTDOWN);
        }
        assert!(session.client().leave.is_raised() && session.client().gone.is_raised());
        assert!(disk.calls().is_empty());
    }

    #[test]
    fn an_idle_client_is_disconnected() {
        let client = client();
        disconnect_after(&client, Duration::ZERO).unwrap();
        client.leave.wait();
        assert!(client.gone.is_raised());
    }

    #[test]
    fn a_client_that_leaves_is_not_kept() {
        let chain = chain(&Spec::default().disk(), &["time-limit"], &[("time-limit", "100000")]).unwrap();
        let client = client();
        let watched = Arc::downgrade(&client);
        let session = open(&chain, client, false).unwrap();
        session.pread(&mut [0], 0).unwrap();
        drop(session);
        assert!(watched.upgrade().is_none());
    }

    #[test]
    fn clients_that_left_are_forgotten() {
        let deadlines = Arc::<Mutex<HashMap<usize, Instant>>>::default();
        let filter = TimeLimit { limit: Duration::from_secs(100_000), deadlines: deadlines.clone() };
        let disk = Box::new(Spec::default().disk());
        let chain = Arc::new(nbdkit_core::Chain::new(disk, vec![Box::new(filter)]));
        let connections = [0, 1].map(|_| chain.connect(client(), false).unwrap());
        assert_eq!(deadlines.lock().len(), 2);
        drop(connections);
        assert!(deadlines.lock().is_empty());
    }

    #[test]
    fn what_comes_in_time_is_started_and_lent_for_once() {
        let disk = Spec { later: true, ..Spec::default() }.disk();
        let in_time = session(&disk, "time-limit", &[]);
        let read = Call::new(Op::Read, 0, 512);
        assert!(matches!(started(&in_time, read, &[]), Answer::Started(Ok(_))));
        assert!(lent(&in_time, Op::Read, 0, 512).is_some() && is_watched(&in_time, Op::Read));
        let late = session(&disk, "time-limit", &[("time-limit", "0")]);
        assert!(matches!(started(&late, read, &[]), Answer::Done(Err(_))));
        assert!(lent(&late, Op::Read, 0, 512).is_none());
    }

    #[test]
    fn a_value_that_is_no_time_is_refused() {
        assert!(config_error("time-limit", &[("time-limit", "soon")]).contains("'soon'"));
    }
}
