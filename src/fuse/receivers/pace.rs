//! Whether requests come faster with busy polling than without: that is tried, and measured.
//!
//! A client on the same CPU runs while we sleep, and to sleep is cheap. One on another CPU has to be woken, and has to wake
//! us. Which of the two it is, is the scheduler's choice, and to poll may change it: so what counts is the pace.

use std::time::{Duration, Instant};

/// To sleep for less than this is cheap.
const CHEAP: Duration = Duration::from_micros(10);
/// After so many sleeps in a row that were not cheap, busy polling is tried.
const DEAR: u32 = 8;
/// The pace is that of so many requests.
const SPAN: u32 = 128;
/// After so many spans with busy polling it is asked again whether it would be cheap to sleep.
const SPANS: u32 = 8;
/// For so many spans at most it is not tried when that was no use.
const REST_MAX: u32 = 1024;

/// See the module.
pub(super) struct Pace {
    /// Requests of this span, and when it began.
    requests: u32,
    began: Instant,
    /// How many sleeps in a row were not cheap.
    dear: u32,
    polled: bool,
    /// The best span without busy polling, not long ago. None: not known.
    unpolled: Option<Duration>,
    /// Spans with it in a row, or spans until it is tried again.
    spans: u32,
    rest: u32,
    penalty: u32,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Pace {
            requests: 0,
            began: now,
            dear: 0,
            polled: false,
            unpolled: None,
            spans: 0,
            rest: 0,
            penalty: 1,
        }
    }

    /// Whether to look for the next request.
    pub(super) fn is_polled(&self) -> bool {
        self.polled
    }

    /// A request has come, that was `found`, or was slept for.
    pub(super) fn request(&mut self, slept: Duration, found: bool, now: impl Fn() -> Instant) {
        if !found {
            self.dear = if slept < CHEAP { 0 } else { self.dear + 1 };
        }
        self.requests += 1;
        if self.requests >= SPAN {
            self.end_span(now());
        } else if !self.polled && self.dear >= DEAR && self.rest == 0 && self.unpolled.is_some() {
            self.begin(true, now());
        }
    }

    fn begin(&mut self, polled: bool, now: Instant) {
        if polled != self.polled {
            (self.spans, self.dear) = (0, 0);
        }
        (self.requests, self.began, self.polled) = (0, now, polled);
    }

    fn end_span(&mut self, now: Instant) {
        let took = now.saturating_duration_since(self.began);
        if !self.polled {
            // The best of a time is remembered for some spans.
            let best = self.unpolled.map_or(took, |best| took.min(best + best / 16));
            self.unpolled = Some(best);
            self.rest = self.rest.saturating_sub(1);
            return self.begin(false, now);
        }
        self.spans += 1;
        if self.unpolled.is_none_or(|unpolled| took >= unpolled) {
            self.rest = self.penalty;
            self.penalty = (self.penalty * 4).min(REST_MAX);
            self.begin(false, now);
        } else if self.spans >= SPANS {
            self.penalty = 1;
            self.begin(false, now);
        } else {
            self.begin(true, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `count` requests that take so many microseconds each, with busy polling and without. Tells how many were
    /// polled for.
    fn run(pace: &mut Pace, now: &mut Instant, count: u32, (polled, unpolled): (u64, u64)) -> u32 {
        let mut with = 0;
        for _ in 0..count {
            let found = pace.is_polled();
            with += u32::from(found);
            let took = Duration::from_micros(if found { polled } else { unpolled });
            *now += took;
            pace.request(took, found, || *now);
        }
        with
    }

    #[test]
    fn it_polls_where_that_is_faster() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        let with = run(&mut pace, &mut now, 100 * SPAN, (20, 100));
        assert!(with > 80 * SPAN, "{with}");
        // The client has moved: to sleep is cheap.
        let with = run(&mut pace, &mut now, 100 * SPAN, (20, 5));
        assert!(with <= SPANS * SPAN, "{with}");
    }

    #[test]
    fn it_polls_less_and_less_where_that_is_no_faster() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        let with = run(&mut pace, &mut now, 100 * SPAN, (30, 20));
        assert!((SPAN..=5 * SPAN).contains(&with), "{with}");
        let with = run(&mut pace, &mut now, 5000 * SPAN, (30, 20));
        assert!(with <= 10 * SPAN, "{with}");
    }

    #[test]
    fn a_cheap_sleep_is_left_alone() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        assert_eq!(run(&mut pace, &mut now, 100 * SPAN, (1, 5)), 0);
    }
}
