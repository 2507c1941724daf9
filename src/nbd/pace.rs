//! How quick the requests are that keep their order, under a thread model below parallel.
//!
//! Only one of them runs at a time. To hand it to a worker and have that send the reply takes longer than many a plugin
//! in C or in a script takes to answer, though nobody can know beforehand that it will not block. So the pace of those
//! before it decides.

use std::{
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// The pace of a connection.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Requests keep their order.
    serial: bool,
    /// How many in a row were quick.
    quick: AtomicU32,
}

impl Pace {
    /// What is quick, and how many in a row make a habit.
    const QUICK: Duration = Duration::from_micros(200);
    const HABIT: u32 = 32;

    pub(crate) fn new(serial: bool) -> Self {
        Pace { serial, quick: AtomicU32::new(0) }
    }

    /// Runs a request.
    pub(crate) fn measure(&self, request: impl FnOnce()) {
        if !self.serial {
            return request();
        }
        let start = Instant::now();
        request();
        self.note(start.elapsed());
    }

    /// Those that are measured run one after the other, so nothing is lost between load and store.
    fn note(&self, took: Duration) {
        let quick = if took < Self::QUICK { self.quick.load(Relaxed).saturating_add(1) } else { 0 };
        self.quick.store(quick, Relaxed);
    }

    /// Whether the next request is likely to be quick.
    pub(crate) fn is_quick(&self) -> bool {
        self.quick.load(Relaxed) >= Self::HABIT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_habit_takes_many_and_ends_with_one() {
        let pace = Pace::new(true);
        for _ in 0..Pace::HABIT {
            assert!(!pace.is_quick());
            pace.note(Duration::from_micros(10));
        }
        assert!(pace.is_quick());
        pace.note(Duration::from_millis(1));
        assert!(!pace.is_quick());
    }

    #[test]
    fn side_by_side_there_is_no_pace() {
        let pace = Pace::new(false);
        for _ in 0..2 * Pace::HABIT {
            pace.measure(|| ());
        }
        assert!(!pace.is_quick());
    }
}
