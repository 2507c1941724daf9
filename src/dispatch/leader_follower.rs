//! Leader/follower: how a connection runs requests that may wait without handing each to a thread.
//!
//! A request that may wait belongs on an [`Executor`](crate::Executor); but to wake one of its threads takes longer
//! than many a plugin in C takes to answer. So where such requests [have been quick](crate::InlinePolicy), the leader, which
//! receives, runs them itself. The follower checks on it now and then: if it finds the leader in the same request for
//! [`TICK`], it takes the lead, and the replies that are ready and the requests that come are not held up by the slow
//! one. The first thread, when it is done, sends its reply and follows in turn.

use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use crate::{
    Entered, Job,
    reclaim::IDLE,
    sync::{self, AtomicBool, AtomicU64, Bug, Condvar, Mutex, MutexGuard, Scope, is_planted},
};

/// How often a leader at work is looked after.
const TICK: Duration = Duration::from_millis(2);
/// A leader that has not been at work for so many ticks is not looked after until it is again.
const QUIET: u32 = if cfg!(all(test, feature = "shuttle")) { 2 } else { 16 };

/// A connection, as its leader sees it.
pub trait Lead: Send {
    /// What runs requests, wherever that is.
    type Runner: Run;
    /// How the connection ended.
    type End: Send;

    /// What runs requests.
    fn runner(&self) -> Arc<Self::Runner>;

    /// What the thread that follows is called.
    fn name(&self) -> &str;

    /// Receives and answers until there is a request for the leader to run though it may wait.
    ///
    /// # Errors
    /// The end.
    fn lead(&mut self) -> Result<<Self::Runner as Run>::Job, Self::End>;

    /// Hands a request to another thread after all.
    ///
    /// # Errors
    /// The end.
    fn hand_over(&mut self, job: <Self::Runner as Run>::Job) -> Result<(), Self::End>;

    /// An empty place for the reply to a request that is run without the lead.
    fn take_reply(&mut self) -> <Self::Runner as Run>::Reply;

    /// Takes the reply to a request that the leader has run.
    ///
    /// # Errors
    /// The end.
    fn answer(&mut self, reply: <Self::Runner as Run>::Reply) -> Result<(), Self::End>;

    /// Another thread has taken the lead, for a request was slow.
    fn taken_over(&mut self);

    /// Lets the requests under way end and sends their replies.
    fn finish(&mut self, end: &Self::End);

    /// The end when a thread panicked.
    fn lost() -> Self::End;
}

/// What runs the requests of a connection.
pub trait Run: Send + Sync {
    /// A request.
    type Job: Job;
    /// What it is answered with.
    type Reply: Send;

    /// Counts a request among those that run. None: there are too many bytes.
    fn enter(&self, bytes: usize) -> Option<Entered<'_, Self::Job>>;

    /// Runs it.
    fn run(&self, job: Self::Job, reply: &mut Self::Reply);

    /// Sends the reply, by a thread that does not lead.
    fn send(&self, reply: Self::Reply);
}

/// A connection in transmission phase, and the threads that lead it.
struct LeaderFollower<L: Lead> {
    /// Locked by the leader, but for the time of a request that it runs itself.
    connection: Mutex<L>,
    /// Odd while the leader runs a request itself. The thread that makes it even leads from then on: the leader when it is
    /// done, or the follower when that takes too long.
    turn: AtomicU64,
    /// The follower wants to be woken at the next request.
    asleep: AtomicBool,
    state: Mutex<State<L::End>>,
    changed: Condvar,
}

struct State<E> {
    /// There are two threads.
    started: bool,
    /// One of them follows.
    present: bool,
    end: Option<E>,
}

/// What a thread does.
enum Role<'s, L> {
    Lead(MutexGuard<'s, L>),
    Follow,
    /// The connection has ended.
    Over,
}

/// Leads a connection to its end.
pub fn run<L: Lead>(connection: L) -> L::End {
    let both = LeaderFollower {
        connection: Mutex::new(connection),
        turn: AtomicU64::new(0),
        asleep: AtomicBool::new(false),
        state: Mutex::new(State { started: false, present: false, end: None }),
        changed: Condvar::new(),
    };
    sync::scope(|scope| both.live(Role::Lead(both.connection.lock()), scope));
    both.state.lock().end.take().unwrap_or_else(L::lost)
}

impl<L: Lead> LeaderFollower<L> {
    fn live<'s>(&'s self, mut role: Role<'s, L>, scope: &'s Scope<'s, '_>) {
        let _over = OverOnPanic(self);
        loop {
            role = match role {
                Role::Lead(connection) => self.lead(connection, scope),
                Role::Follow => self.follow(),
                Role::Over => return,
            }
        }
    }

    fn lead<'s>(&'s self, mut connection: MutexGuard<'s, L>, scope: &'s Scope<'s, '_>) -> Role<'s, L> {
        let runner = connection.runner();
        let mut answered = Ok(());
        loop {
            let job = match answered.and_then(|()| connection.lead()) {
                Ok(job) => job,
                Err(end) => {
                    connection.finish(&end);
                    self.state.lock().end = Some(end);
                    self.changed.notify_all();
                    return Role::Over;
                }
            };
            let Some(entered) = runner.enter(job.bytes()) else {
                answered = connection.hand_over(job);
                continue;
            };
            // Before the question, so that the follower does not leave in between.
            let turn = self.turn.fetch_add(1, SeqCst) + 1;
            if !self.is_followed(connection.name(), scope) && self.end_turn(turn) {
                drop(entered);
                answered = connection.hand_over(job);
                continue;
            }
            if self.asleep.load(SeqCst) {
                drop(self.state.lock());
                self.changed.notify_all();
            }
            let mut reply = connection.take_reply();
            drop(connection);
            runner.run(job, &mut reply);
            if !self.end_turn(turn) {
                log::debug!("a request was slow: others are not held up");
                runner.send(reply);
                drop(entered);
                return Role::Follow;
            }
            drop(entered);
            connection = self.connection.lock();
            answered = connection.answer(reply);
        }
    }

    /// Ends the turn of a leader; false: another thread has.
    fn end_turn(&self, turn: u64) -> bool {
        if is_planted(Bug::TurnWithoutExchange) {
            let is_ours = self.turn.load(SeqCst) == turn;
            self.turn.store(turn + 1, SeqCst);
            return is_ours;
        }
        self.turn.compare_exchange(turn, turn + 1, SeqCst, SeqCst).is_ok()
    }

    /// Whether a thread follows.
    fn is_followed<'s>(&'s self, name: &str, scope: &'s Scope<'s, '_>) -> bool {
        let mut state = self.state.lock();
        if !state.started {
            state.started = true;
            if let Err(e) = sync::spawn_scoped(scope, name, || self.live(Role::Follow, scope)) {
                log::debug!("cannot start a thread that follows: {e}");
                return false;
            }
            state.present = true;
        }
        state.present
    }

    fn follow<'s>(&'s self) -> Role<'s, L> {
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
                    // This thread is not needed. The leader starts another one when one is.
                    *state = State { started: false, present: false, end: state.end.take() };
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
                let mut connection = self.connection.lock();
                connection.taken_over();
                return Role::Lead(connection);
            }
        }
    }
}

/// Lets the other thread end when this one panics.
struct OverOnPanic<'s, L: Lead>(&'s LeaderFollower<L>);

impl<L: Lead> Drop for OverOnPanic<'_, L> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.state.lock().end.get_or_insert_with(L::lost);
            self.0.changed.notify_all();
        }
    }
}
