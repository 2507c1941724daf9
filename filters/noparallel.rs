//! Makes the server handle fewer requests at once.
//!
//! The locks are the core's: the filter asks for a stricter thread model and touches no request.

use std::ffi::OsStr;

use anyhow::bail;
use nbdkit_core::{Below, Filter, Handle, Info, NextConfig, Open, Result, ThreadModel, params};

use crate::passthrough::Passthrough;

const HELP: &str = "serialize=<MODE>   'requests' (default), 'all-requests' or 'connections'.";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(NoParallel { model: ThreadModel::SerializeRequests })
}

struct NoParallel {
    model: ThreadModel,
}

impl Filter for NoParallel {
    fn info(&self) -> Info {
        Info::bundled("noparallel", "nbdkit noparallel filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        if !matches!(key, "serialize" | "serialise") {
            return next(key, value);
        }
        self.model = match params::text(value)? {
            "requests" => ThreadModel::SerializeRequests,
            "all-requests" | "all_requests" => ThreadModel::SerializeAllRequests,
            "connections" => ThreadModel::SerializeConnections,
            other => bail!("unknown serialize mode '{other}': use requests, all-requests or connections"),
        };
        Ok(())
    }

    fn thread_model(&self, next: ThreadModel) -> ThreadModel {
        self.model.min(next)
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Passthrough(next.open(open)?)))
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::Op;

    use super::*;
    use crate::testing::{Spec, View, chain, check_model, client, config_error, needs_thread, open, session};

    fn model_of(spec: Spec, params: &[(&str, &str)]) -> ThreadModel {
        chain(&spec.disk(), &["noparallel"], params).unwrap().thread_model()
    }

    #[test]
    fn model() {
        check_model(&["noparallel"], &[], 20_000, &View::same(20_000));
    }

    #[test]
    fn modes() {
        use ThreadModel::*;
        assert_eq!(model_of(Spec::default(), &[]), SerializeRequests);
        for (mode, model) in [
            ("requests", SerializeRequests),
            ("all-requests", SerializeAllRequests),
            ("connections", SerializeConnections),
        ] {
            assert_eq!(model_of(Spec::default(), &[("serialize", mode)]), model, "{mode}");
        }
        assert_eq!(model_of(Spec::default(), &[("serialise", "all_requests")]), SerializeAllRequests);
        assert!(config_error("noparallel", &[("serialize", "x")]).contains("use requests"));
    }

    #[test]
    fn a_stricter_plugin_stays_as_strict() {
        let strict = Spec { thread_model: ThreadModel::SerializeConnections, ..Spec::default() };
        assert_eq!(model_of(strict, &[("serialize", "requests")]), ThreadModel::SerializeConnections);
    }

    #[test]
    fn one_request_of_a_session_at_a_time() {
        let disk = Spec::default().disk();
        let session = session(&disk, "noparallel", &[]);
        disk.hold();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| session.pread(&mut [0; 8], 0).unwrap());
            }
            disk.wait_inside(1);
            assert!(needs_thread(&session, Op::Read), "the others wait for their turn");
            disk.release();
        });
        assert_eq!((disk.max_inside(), disk.count(Op::Read)), (1, 4));
    }

    #[test]
    fn requests_of_two_sessions_still_meet() {
        let disk = Spec::default().disk();
        let chain = chain(&disk, &["noparallel"], &[]).unwrap();
        let sessions = [(); 2].map(|()| open(&chain, client(), false).unwrap());
        disk.hold();
        std::thread::scope(|scope| {
            for session in &sessions {
                scope.spawn(|| session.pread(&mut [0; 8], 0).unwrap());
            }
            disk.wait_inside(2);
            disk.release();
        });
    }

    #[test]
    fn no_multi_conn_when_connections_are_serialized() {
        let multi_conn =
            |mode| session(&Spec::default().disk(), "noparallel", &[("serialize", mode)]).caps().multi_conn;
        assert!(multi_conn("all-requests"));
        assert!(!multi_conn("connections"));
    }
}
