//! Errors that any stranger can cause as often as he likes: a port that is open to the world is tried all day, and the log
//! must neither fill the disk nor hide what matters. The first of a kind are told as they come, and then one a second,
//! with the number of those that were left out.

use std::{fmt::Display, time::Instant};

use parking_lot::Mutex;

/// So many are told at once …
const BURST: f64 = 20.0;
/// … and then so many a second.
const RATE: f64 = 1.0;

/// The errors of one kind.
pub(crate) struct Complaints(Mutex<State>);

struct State {
    /// How many may be told now; and when that was so. None: all, for there were none.
    credit: Option<(f64, Instant)>,
    left_out: u64,
}

impl Complaints {
    pub(crate) const fn new() -> Self {
        Complaints(Mutex::new(State { credit: None, left_out: 0 }))
    }

    /// Tells an error of this kind, or counts it.
    pub(crate) fn tell(&self, error: impl Display) {
        match self.ask(Instant::now()) {
            None => log::debug!("{error}"),
            Some(0) => log::error!("{error}"),
            Some(left_out) => log::error!("{error} (and {left_out} more like it, which were not told)"),
        }
    }

    /// Whether one may be told, and how many were left out before.
    fn ask(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock();
        let (credit, then) = state.credit.unwrap_or((BURST, now));
        let credit = (credit + now.saturating_duration_since(then).as_secs_f64() * RATE).min(BURST);
        if credit < 1.0 {
            state.credit = Some((credit, now));
            state.left_out += 1;
            return None;
        }
        state.credit = Some((credit - 1.0, now));
        Some(std::mem::take(&mut state.left_out))
    }
}

/// No connection can be accepted.
pub(crate) static ACCEPT: Complaints = Complaints::new();
/// TLS does not come about.
#[cfg(feature = "tls")]
pub(crate) static TLS: Complaints = Complaints::new();
/// Layers refuse clients, or cannot open or list exports.
pub(crate) static REFUSED: Complaints = Complaints::new();

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_flood_is_a_line_a_second() {
        let (complaints, start) = (Complaints::new(), Instant::now());
        // A thousand a second, for ten seconds.
        let said: Vec<u64> =
            (0..10_000).filter_map(|n| complaints.ask(start + Duration::from_millis(n))).collect();
        assert!((29..=30).contains(&said.len()), "{}", said.len());
        assert!(said[..20].iter().all(|left_out| *left_out == 0));
        assert!(said[21..].iter().all(|left_out| (900..1100).contains(left_out)), "{said:?}");
        // After a while they are told as they come again.
        let later = start + Duration::from_secs(100);
        assert!(complaints.ask(later).is_some_and(|left_out| left_out > 0));
        assert_eq!((0..30).filter(|_| complaints.ask(later).is_some()).count(), 19);
    }
}
