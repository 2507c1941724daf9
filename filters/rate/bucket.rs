//! How bandwidth is shared out: a bucket of tokens that fills at the rate and holds what a burst may take.
//!
//! The bucket is kept as a time: up to when the tokens are spent. So it needs no refill, requests that wait get
//! their turns in order, and a change of the rate needs no arithmetic.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

pub(super) struct Bucket {
    burst: Duration,
    /// The clock starts here, at the time `burst`.
    start: Instant,
    state: Mutex<State>,
}

struct State {
    /// In bits per second; 0: no limit.
    rate: u64,
    /// By the bucket's clock. Never longer ago than `burst` when it is used: a full bucket does not fill further.
    spent_until: Duration,
}

impl Bucket {
    /// A full one.
    pub(super) fn new(rate: u64, burst: Duration, now: Instant) -> Self {
        let state = State { rate, spent_until: Duration::ZERO };
        Bucket { burst, start: now, state: Mutex::new(state) }
    }

    pub(super) fn set_rate(&self, rate: u64) {
        self.state.lock().rate = rate;
    }

    fn clock(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.start).saturating_add(self.burst)
    }

    /// Takes `bits` at the time `now` and returns how long to wait until they are there.
    pub(super) fn take(&self, bits: u64, now: Instant) -> Duration {
        let mut state = self.state.lock();
        if state.rate == 0 {
            return Duration::ZERO;
        }
        let clock = self.clock(now);
        state.spent_until = self.after(&state, bits, clock);
        state.spent_until.saturating_sub(clock)
    }

    /// Whether `bits` could be taken at the time `now` without a wait.
    pub(super) fn has(&self, bits: u64, now: Instant) -> bool {
        let state = self.state.lock();
        let clock = self.clock(now);
        state.rate == 0 || self.after(&state, bits, clock) <= clock
    }

    /// Up to when the tokens are spent after `bits` were taken at the time `clock`.
    fn after(&self, state: &State, bits: u64, clock: Duration) -> Duration {
        let cost = Duration::try_from_secs_f64(bits as f64 / state.rate as f64).unwrap_or(Duration::MAX);
        let full = clock.saturating_sub(self.burst);
        state.spent_until.max(full).saturating_add(cost)
    }

    /// Whether a request that came now would have to wait for others before it.
    pub(super) fn is_in_debt(&self, now: Instant) -> bool {
        self.state.lock().spent_until > self.clock(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn a_burst_is_free_and_what_follows_waits_in_order() {
        let now = Instant::now();
        let bucket = Bucket::new(100, secs(2), now);
        assert_eq!(bucket.take(200, now), secs(0));
        assert!(!bucket.is_in_debt(now));
        assert_eq!(bucket.take(100, now), secs(1));
        assert_eq!(bucket.take(300, now), secs(4));
        assert!(bucket.is_in_debt(now));
        assert_eq!(bucket.take(100, now + secs(4)), secs(1));
        assert_eq!(bucket.take(100, now + secs(6)), secs(0));
    }

    #[test]
    fn a_long_pause_fills_it_up_to_the_burst() {
        let now = Instant::now();
        let bucket = Bucket::new(100, secs(2), now);
        assert_eq!(bucket.take(1000, now), secs(8));
        assert_eq!(bucket.take(200, now + secs(1000)), secs(0));
        assert_eq!(bucket.take(100, now + secs(1000)), secs(1));
    }

    #[test]
    fn without_a_burst_everything_waits() {
        let now = Instant::now();
        let bucket = Bucket::new(100, secs(0), now);
        assert_eq!(bucket.take(100, now), secs(1));
    }

    #[test]
    fn a_new_rate_counts_from_now_on() {
        let now = Instant::now();
        let bucket = Bucket::new(0, secs(1), now);
        assert_eq!(bucket.take(u64::MAX, now), secs(0));
        bucket.set_rate(10);
        assert_eq!(bucket.take(30, now), secs(2));
        bucket.set_rate(100);
        assert_eq!(bucket.take(100, now), secs(3));
    }

    #[test]
    fn no_number_overflows() {
        let now = Instant::now();
        let bucket = Bucket::new(1, secs(2), now);
        assert!(bucket.take(u64::MAX, now) > secs(1 << 60));
        assert!(bucket.take(u64::MAX, now) > secs(1 << 60));
    }
}
