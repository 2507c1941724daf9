//! The limit of open files: each client needs one, and one more for each file that is opened for it, and the usual limit
//! of 1024 is meant for programs that use select(2).

use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The limit that the program was started with, if it was raised.
static FORMER: OnceLock<u64> = OnceLock::new();

/// Raises the soft limit of open files to the hard one. Where that is refused, the limit stays.
pub fn raise_limit() {
    let limit = getrlimit(Resource::Nofile);
    let Some(soft) = limit.current.filter(|soft| limit.maximum.is_none_or(|hard| *soft < hard)) else {
        return;
    };
    if setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).is_ok() {
        let _ = FORMER.set(soft);
        log::debug!("open files: the limit was {soft} and is {:?}", limit.maximum);
    }
}

/// The soft limit from before, for children; None: it is the same.
pub fn former_limit() -> Option<u64> {
    FORMER.get().copied()
}
