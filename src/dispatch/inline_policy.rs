//! Whether a request that needs a thread runs on the one that received it: yes, where such requests have been quick.
//!
//! To hand a request to a worker, and have that send the reply, takes longer than many a plugin in C or in a script takes
//! to answer, though it cannot be known beforehand that it will not block. So the pace of those before it decides whether
//! the thread that listens to the client runs it. Under a thread model below parallel nothing is lost by that, for only
//! one runs at a time. Under parallel the bound is lower, and another thread [follows](crate::leader_follower).

use std::{
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// See the module. One for each connection or mount.
#[derive(Debug)]
pub struct InlinePolicy {
    /// Requests keep their order.
    serial: bool,
    /// How many in a row were quick.
    quick: AtomicU32,
}

impl InlinePolicy {
    /// What is quick where only one runs at a time.
    const QUICK: Duration = Duration::from_micros(200);
    /// What is quick where others could run meanwhile: less than it takes to wake them, so never a wait for a device.
    const QUICK_PARALLEL: Duration = Duration::from_micros(15);
    /// How many in a row make a habit.
    const HABIT: u32 = 32;

    /// No request has been quick yet. `serial`: requests keep their order, so nothing else could run meanwhile.
    pub fn new(serial: bool) -> Self {
        InlinePolicy { serial, quick: AtomicU32::new(0) }
    }

    /// Runs a request.
    pub fn measure(&self, request: impl FnOnce()) {
        let start = Instant::now();
        request();
        self.note(start.elapsed());
    }

    /// What is lost between load and store, of those that run at once, does not matter.
    fn note(&self, took: Duration) {
        let limit = if self.serial { Self::QUICK } else { Self::QUICK_PARALLEL };
        let quick = self.quick.load(Relaxed);
        let quick = match took {
            _ if took < limit => (quick + 1).min(2 * Self::HABIT),
            // One among many may have been interrupted.
            _ if took < 10 * limit => quick / 2,
            _ => 0,
        };
        self.quick.store(quick, Relaxed);
    }

    /// Something has taken too long.
    pub fn forget(&self) {
        self.quick.store(0, Relaxed);
    }

    /// Whether the next request is likely to be quick.
    pub fn is_quick(&self) -> bool {
        self.quick.load(Relaxed) >= Self::HABIT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_habit_takes_many_and_ends_with_one() {
        let policy = InlinePolicy::new(true);
        for _ in 0..InlinePolicy::HABIT {
            assert!(!policy.is_quick());
            policy.note(Duration::from_micros(10));
        }
        assert!(policy.is_quick());
        policy.note(Duration::from_millis(1));
        assert!(!policy.is_quick());
        for _ in 0..10 * InlinePolicy::HABIT {
            policy.note(Duration::from_micros(10));
        }
        policy.note(Duration::from_millis(1));
        assert!(policy.is_quick(), "one is an exception");
        policy.note(Duration::from_secs(1));
        assert!(!policy.is_quick());
    }

    #[test]
    fn side_by_side_less_is_quick() {
        for (serial, habit) in [(true, true), (false, false)] {
            let policy = InlinePolicy::new(serial);
            for _ in 0..InlinePolicy::HABIT {
                policy.note(Duration::from_micros(100));
            }
            assert_eq!(policy.is_quick(), habit);
        }
        let policy = InlinePolicy::new(false);
        for _ in 0..InlinePolicy::HABIT {
            policy.note(Duration::from_micros(5));
        }
        assert!(policy.is_quick());
        policy.forget();
        assert!(!policy.is_quick());
    }
}
