//! How many replies leave together.
//!
//! A client that keeps many requests in flight is woken by each send, and so is the server by each of its sends: small
//! batches cost both more than the requests. So before replies are sent, the input is looked at once more, and answered
//! first, until half of what the client usually keeps in flight is done; then it can go on with that half while we do
//! the other. A client with one request in flight never waits for anything.

/// Most receives that are not looked for after looks in vain.
const PENALTY_MAX: u32 = 64;
/// Receives after which what came before is forgotten.
const WINDOW: u32 = 64;
/// With fewer in flight there are no halves.
const HALVES: u32 = 8;

/// Counts of one connection's thread.
#[derive(Debug)]
pub(crate) struct ReplyCoalescing {
    /// Client and server can run at once.
    side_by_side: bool,
    /// What the client keeps in flight: the most seen in this and the last window.
    depth: u32,
    /// The most seen in this window so far.
    most: u32,
    /// Receives in it.
    receives: u32,
    /// Replies to be sent.
    unsent: u32,
    /// Replies that left in the last flush, if nothing was received since: the client has not seen them.
    unseen: u32,
    /// What was in flight for sure when the input was received that is worked on.
    before: u32,
    /// Requests of that input so far.
    handled: u32,
    /// Looks to be left out.
    skip: u32,
    /// How many that will be after the next look in vain.
    penalty: u32,
}

impl ReplyCoalescing {
    /// `cpus`: that this thread may run on.
    pub(crate) fn new(cpus: usize) -> Self {
        ReplyCoalescing {
            side_by_side: cpus > 1,
            depth: 1,
            most: 1,
            receives: 0,
            unsent: 0,
            unseen: 0,
            before: 0,
            handled: 0,
            skip: 0,
            penalty: 1,
        }
    }

    /// A request was answered, or handed to a worker. True: what there is should be sent now.
    pub(crate) fn add(&mut self) -> bool {
        self.unsent += 1;
        self.handled += 1;
        self.side_by_side && self.depth >= HALVES && self.unsent >= self.depth / 2
    }

    /// The replies were sent.
    pub(crate) fn sent(&mut self) {
        self.unseen += self.unsent;
        self.unsent = 0;
    }

    /// Input was received, `at_once` or after a wait.
    pub(crate) fn received(&mut self, at_once: bool) {
        self.most = self.most.max(self.before + self.handled);
        self.depth = self.depth.max(self.most);
        self.receives += 1;
        if self.receives == WINDOW {
            self.depth = self.most;
            (self.receives, self.most) = (0, 1);
        }
        self.before = if at_once { self.unsent + self.unseen } else { 0 };
        (self.handled, self.unseen) = (0, 0);
    }

    /// Whether to look for more input before the replies are sent.
    pub(crate) fn is_worth_a_look(&mut self) -> bool {
        if !self.side_by_side || self.unsent == 0 || self.unsent * 2 >= self.depth {
            return false;
        }
        self.skip = self.skip.saturating_sub(1);
        self.skip == 0
    }

    /// What the look brought.
    pub(crate) fn looked(&mut self, found: bool) {
        if found {
            self.penalty = 1;
        } else {
            self.skip = self.penalty;
            self.penalty = (self.penalty * 2).min(PENALTY_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers `n` requests; tells after which of them the replies should leave.
    fn answer(batch: &mut ReplyCoalescing, n: u32) -> Vec<u32> {
        (1..=n)
            .filter(|_| {
                let now = batch.add();
                if now {
                    batch.sent();
                }
                now
            })
            .collect()
    }

    #[test]
    fn one_request_in_flight_is_answered_at_once() {
        let mut batch = ReplyCoalescing::new(2);
        for _ in 0..100 {
            assert_eq!(answer(&mut batch, 1), []);
            assert!(!batch.is_worth_a_look());
            batch.sent();
            batch.received(false);
        }
    }

    #[test]
    fn many_are_answered_in_halves() {
        let mut batch = ReplyCoalescing::new(2);
        answer(&mut batch, 16);
        batch.sent();
        for _ in 0..100 {
            // The client sends the second half before it sees the replies to the first.
            batch.received(false);
            assert_eq!(answer(&mut batch, 8), [8]);
            batch.received(true);
            assert_eq!(answer(&mut batch, 8), [8]);
        }
        // Some come first: it is worth a look whether the others are there.
        batch.received(false);
        assert_eq!(answer(&mut batch, 2), []);
        assert!(batch.is_worth_a_look());
        batch.looked(true);
        batch.received(true);
        assert_eq!(answer(&mut batch, 6), [6]);
    }

    #[test]
    fn looks_in_vain_become_rare() {
        let mut batch = ReplyCoalescing::new(2);
        answer(&mut batch, 64);
        batch.sent();
        let mut looks = 0;
        for _ in 0..1000 {
            batch.received(true);
            batch.depth = 64;
            batch.add();
            if batch.is_worth_a_look() {
                looks += 1;
                batch.looked(false);
            }
            batch.sent();
        }
        assert!((10..30).contains(&looks), "{looks}");
    }

    #[test]
    fn a_client_that_keeps_less_in_flight_is_noticed() {
        let mut batch = ReplyCoalescing::new(2);
        answer(&mut batch, 64);
        batch.sent();
        for _ in 0..200 {
            batch.received(false);
            answer(&mut batch, 1);
            batch.sent();
        }
        batch.received(false);
        batch.add();
        assert!(!batch.is_worth_a_look());
    }

    #[test]
    fn on_one_cpu_all_that_is_there_is_answered_first() {
        let mut batch = ReplyCoalescing::new(1);
        answer(&mut batch, 64);
        batch.received(true);
        assert_eq!(answer(&mut batch, 64), []);
        assert!(!batch.is_worth_a_look());
    }
}
