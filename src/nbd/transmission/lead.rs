//! Who listens to the client: one thread leads, another stands by.
//!
//! A request that may block is the business of a worker; but to wake one takes longer than many a plugin in C takes to
//! answer. So where such requests [have been quick](crate::pace), the leader runs them itself. The other thread looks
//! after it now and then: if it finds the leader in the same request for [`TICK`], it takes the lead, and the replies
//! that are ready and the requests that come are not held up by the slow one. The first thread, when it is done,
//! sends its reply and stands by in turn.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    thread::{Builder, Scope},
    time::Duration,
};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::{End, Reader};
use crate::idle::IDLE;

/// How often a leader at work is looked after.
const TICK: Duration = Duration::from_millis(2);
/// Who has not been at work for so many ticks is not looked after until it is again.
const QUIET: u32 = 16;

/// A connection in transmission phase, and the threads that lead it.
pub(super) struct Stage<'a> {
    /// Locked by the one who leads, but for the time of a request that it runs itself.
    reader: Mutex<Reader<'a>>,
    /// Odd while the leader runs a request itself. Whoever makes it even leads from then on: the leader when it is done, or
    /// the other when that takes too long.
    turn: AtomicU64,
    /// The one who stands by wants to be woken at the next request.
    asleep: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// There are two threads.
    started: bool,
    /// One of them stands by.
    present: bool,
    end: Option<End>,
}

/// What a thread does.
enum Role<'s, 'a> {
    Lead(MutexGuard<'s, Reader<'a>>),
    StandBy,
    /// The connection has ended.
    Over,
}

impl<'a> Stage<'a> {
    pub(super) fn new(reader: Reader<'a>) -> Self {
        Stage {
            reader: Mutex::new(reader),
            turn: AtomicU64::new(0),
            asleep: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Leads the connection to its end.
    pub(super) fn run(&self) -> End {
        std::thread::scope(|scope| self.live(Role::Lead(self.reader.lock()), scope));
        self.state.lock().end.take().unwrap_or(End::Eof)
    }

    fn live<'s>(&'s self, mut role: Role<'s, 'a>, scope: &'s Scope<'s, '_>) {
        let _over = OverOnPanic(self);
        loop {
            role = match role {
                Role::Lead(reader) => self.lead(reader, scope),
                Role::StandBy => self.stand_by(),
                Role::Over => return,
            }
        }
    }

    fn lead<'s>(&'s self, mut reader: MutexGuard<'s, Reader<'a>>, scope: &'s Scope<'s, '_>) -> Role<'s, 'a> {
        let shared = reader.shared.clone();
        let mut answered = Ok(());
        loop {
            let job = match answered.and_then(|()| reader.run()) {
                Ok(job) => job,
                Err(end) => {
                    reader.finish(&end);
                    self.state.lock().end = Some(end);
                    self.changed.notify_all();
                    return Role::Over;
                }
            };
            let bytes = job.bytes();
            if !shared.pool.enter(bytes) {
                answered = reader.submit(job);
                continue;
            }
            // Before the question, so that the one who stands by does not leave in between.
            let turn = self.turn.fetch_add(1, SeqCst) + 1;
            if !self.is_looked_after(reader.name, scope) && self.end_turn(turn) {
                shared.pool.leave(bytes);
                answered = reader.submit(job);
                continue;
            }
            if self.asleep.load(SeqCst) {
                drop(self.state.lock());
                self.changed.notify_all();
            }
            let mut reply = std::mem::take(&mut reader.reply);
            drop(reader);
            shared.execute(&job, &mut reply);
            shared.pool.recycle(job.payload);
            if !self.end_turn(turn) {
                log::debug!("a request was slow: others are not held up");
                shared.outbox.send(&mut reply);
                shared.pool.leave(bytes);
                return Role::StandBy;
            }
            shared.pool.leave(bytes);
            reader = self.reader.lock();
            answered = reader.answer(reply);
        }
    }

    /// Ends the turn of a leader; false: somebody else has.
    fn end_turn(&self, turn: u64) -> bool {
        self.turn.compare_exchange(turn, turn + 1, SeqCst, SeqCst).is_ok()
    }

    /// Whether somebody stands by.
    fn is_looked_after<'s>(&'s self, name: &str, scope: &'s Scope<'s, '_>) -> bool {
        let mut state = self.state.lock();
        if !state.started {
            state.started = true;
            let other = Builder::new().name(name.to_owned());
            if let Err(e) = other.spawn_scoped(scope, || self.live(Role::StandBy, scope)) {
                log::debug!("cannot start a thread that stands by: {e}");
                return false;
            }
            state.present = true;
        }
        state.present
    }

    fn stand_by<'s>(&'s self) -> Role<'s, 'a> {
        let mut state = self.state.lock();
        state.present = true;
        let mut seen = self.turn.load(SeqCst);
        let mut ticks = 0;
        loop {
            if state.end.is_some() {
                return Role::Over;
            }
            if ticks >= QUIET {
                self.asleep.store(true, SeqCst);
                let for_nothing =
                    self.turn.load(SeqCst) == seen && self.changed.wait_for(&mut state, IDLE).timed_out();
                self.asleep.store(false, SeqCst);
                if for_nothing && self.turn.load(SeqCst) == seen && seen.is_multiple_of(2) {
                    // Nobody needs this thread. Who leads starts another one when one is needed.
                    *state = State { end: state.end.take(), ..State::default() };
                    return Role::Over;
                }
            } else {
                self.changed.wait_for(&mut state, TICK);
            }
            let turn = self.turn.load(SeqCst);
            if turn != seen {
                (seen, ticks) = (turn, 0);
                continue;
            }
            ticks += 1;
            if turn % 2 == 1 && self.end_turn(turn) {
                state.present = false;
                drop(state);
                let reader = self.reader.lock();
                reader.shared.pace.forget();
                return Role::Lead(reader);
            }
        }
    }
}

/// Lets the other thread end when this one panics.
struct OverOnPanic<'s, 'a>(&'s Stage<'a>);

impl Drop for OverOnPanic<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.state.lock().end.get_or_insert(End::Eof);
            self.0.changed.notify_all();
        }
    }
}
