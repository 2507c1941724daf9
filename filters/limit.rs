//! Limits how many clients may be connected at once.

use std::{ffi::OsStr, sync::Arc};

use nbdkit_core::{Below, Errno, Error, Filter, Handle, Info, NextConfig, Open, Result, params};
use parking_lot::Mutex;

use crate::passthrough::Passthrough;

const HELP: &str = "limit=<N>   Most clients at once (default 1); 0 means no limit.";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(Limit { limit: 1, connected: Arc::default() })
}

struct Limit {
    limit: u32,
    connected: Arc<Mutex<u32>>,
}

impl Filter for Limit {
    fn info(&self) -> Info {
        Info::bundled("limit", "nbdkit limit filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "limit" => self.limit = params::integer("limit", value)?,
            _ => return next(key, value),
        }
        Ok(())
    }

    fn preconnect(&self, next: &Below, readonly: bool) -> Result<()> {
        if let (Some(client), 1..) = (next.client(), self.limit) {
            let mut connected = self.connected.lock();
            if *connected >= self.limit {
                return Err(Error::new(
                    Errno::EBUSY,
                    format!("{connected} clients are connected and limit={} allows no more", self.limit),
                ));
            }
            *connected += 1;
            drop(connected);
            let connected = self.connected.clone();
            client.gone.on_raise(move || *connected.lock() -= 1);
        }
        next.preconnect(readonly)
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Passthrough(next.open(open)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Spec, View, chain, check_model, client, config_error};

    #[test]
    fn model() {
        check_model(&["limit"], &[], 20_000, &View::same(20_000));
    }

    #[test]
    fn one_more_is_refused_until_another_leaves() {
        for (params, limit) in [(&[][..], 1), (&[("limit", "1")], 1), (&[("limit", "3")], 3)] {
            let chain = chain(&Spec::default().disk(), &["limit"], params).unwrap();
            let mut inside: Vec<_> = (0..limit).map(|_| chain.connect(client(), false).unwrap()).collect();
            assert_eq!(chain.connect(client(), false).unwrap_err().errno(), Errno::EBUSY);
            inside.pop();
            inside.push(chain.connect(client(), false).unwrap());
            assert!(chain.connect(client(), false).is_err(), "the one refused has freed no place");
        }
    }

    #[test]
    fn a_client_that_is_gone_does_not_count_once_more_when_it_is_dropped() {
        let chain = chain(&Spec::default().disk(), &["limit"], &[]).unwrap();
        let first = chain.connect(client(), false).unwrap();
        first.client().gone.raise();
        let second = chain.connect(client(), false).unwrap();
        drop(first);
        chain.connect(client(), false).unwrap_err();
        drop(second);
        chain.connect(client(), false).unwrap();
    }

    #[test]
    fn zero_is_no_limit() {
        let chain = chain(&Spec::default().disk(), &["limit"], &[("limit", "0")]).unwrap();
        let inside: Vec<_> = (0..100).map(|_| chain.connect(client(), false).unwrap()).collect();
        assert_eq!(inside.len(), 100);
    }

    #[test]
    fn a_value_that_is_no_number_is_refused() {
        assert!(config_error("limit", &[("limit", "-1")]).contains("out of range"));
        assert!(config_error("limit", &[("limit", "few")]).contains("'few'"));
    }
}
