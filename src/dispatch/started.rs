//! The requests of one front end that are under way without a thread.

use std::sync::Arc;

use nbdkit_core::{Completed, Loan, Outcome, Request, Result, Session, Task};

use crate::{
    CompletionQueue,
    sync::{Bug, is_planted},
};

/// With this many bytes in requests that hold no thread, no further one is started.
const BYTES: usize = 64 << 20;

/// The requests that were started, and for each the note `T` that the front end has made to answer it. What one
/// request has used, its task and its place, serves for the next one: nothing is allocated once enough were under way.
#[derive(Debug)]
pub struct Started<T> {
    queue: Arc<CompletionQueue>,
    notes: Vec<Option<(T, usize)>>,
    free: Vec<usize>,
    #[expect(clippy::vec_box, reason = "a plugin takes the box of the one it starts")]
    tasks: Vec<Box<Task>>,
    bytes: usize,
}

/// How an offered request was answered.
#[must_use]
#[derive(Debug)]
pub enum Offered<T> {
    /// It has ended.
    Done(Result<()>, T),
    /// It ends later: its completion comes by the queue.
    Started,
    /// It has to run on a thread.
    NeedsThread(T),
}

/// The duty to tell the layers how a request ended that was lent for: [`Started::finish_lent`].
#[derive(Debug)]
#[must_use]
pub struct Lent(Box<Task>);

impl Lent {
    /// Whether a layer wants to know how each such request ends: then the front end must not keep what was lent for
    /// requests that it does not make.
    pub fn is_watched(&self) -> bool {
        self.0.is_watched()
    }
}

impl<T> Started<T> {
    /// None yet. Their ends will be posted to `queue`.
    pub fn new(queue: Arc<CompletionQueue>) -> Self {
        Started { queue, notes: Vec::new(), free: Vec::new(), tasks: Vec::new(), bytes: 0 }
    }

    /// Where their ends are posted.
    pub fn queue(&self) -> &Arc<CompletionQueue> {
        &self.queue
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.notes.len() - self.free.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn task(&mut self) -> Box<Task> {
        self.tasks.pop().unwrap_or_else(|| Task::new(self.queue.clone()))
    }

    /// Makes a request ready to be submitted where others may take its completion meanwhile: its note and its task.
    /// [`take_back`](Self::take_back) must follow unless it was started.
    ///
    /// # Errors
    /// The note: no further request may be started now, for there are too many bytes in those that were.
    pub fn prepare(&mut self, note: T, bytes: usize) -> std::result::Result<Box<Task>, T> {
        if self.bytes >= BYTES {
            return Err(note);
        }
        let place = self.note(note, bytes);
        let mut task = self.task();
        task.arm(place as u64);
        Ok(task)
    }

    /// Makes a note, in the place that is next.
    fn note(&mut self, note: T, bytes: usize) -> usize {
        let place = self.free.pop().unwrap_or_else(|| {
            self.notes.push(None);
            self.notes.len() - 1
        });
        if is_planted(Bug::PlaceStaysFree) {
            self.free.push(place);
        }
        self.notes[place] = Some((note, bytes));
        self.bytes += bytes;
        place
    }

    /// Takes a request back that was [prepared](Self::prepare) and not started: its note.
    pub fn take_back(&mut self, task: Box<Task>) -> Option<T> {
        let note = self.remove(&task);
        self.tasks.push(task);
        note
    }

    fn remove(&mut self, task: &Task) -> Option<T> {
        let place = task.tag() as usize;
        let (note, bytes) = self.notes.get_mut(place)?.take()?;
        self.free.push(place);
        self.bytes -= bytes;
        Some(note)
    }

    /// Offers a request to the chain: it is run at once or, if it `may_start`, started, or comes back with its note.
    pub fn offer(
        &mut self,
        session: &Session,
        request: Request<'_>,
        note: T,
        bytes: usize,
        may_start: bool,
    ) -> Offered<T> {
        if !may_start || self.bytes >= BYTES {
            let mut request = request;
            return match session.submit(&mut request) {
                Outcome::Done(result) => Offered::Done(result, note),
                _ => Offered::NeedsThread(note),
            };
        }
        // The note is made only if it is needed: nothing is taken from the queue before this returns.
        let place = self.free.last().copied().unwrap_or(self.notes.len());
        let mut task = self.task();
        task.arm(place as u64);
        let mut request = request.startable(task);
        let outcome = session.submit(&mut request);
        let Some(task) = request.into_task() else {
            self.note(note, bytes);
            return Offered::Started;
        };
        self.tasks.push(task);
        match outcome {
            Outcome::Done(result) => Offered::Done(result, note),
            _ => Offered::NeedsThread(note),
        }
    }

    /// Asks the chain for a file to move the data of a request by: it has no memory of its own.
    pub fn borrow<'s>(&mut self, session: &'s Session, request: Request<'_>) -> Option<(Loan<'s>, Lent)> {
        let mut task = self.task();
        task.arm(u64::MAX);
        let mut request = request.lendable(task);
        let outcome = session.submit(&mut request);
        let task = request.into_task()?;
        match outcome {
            Outcome::Lent(loan) => Some((loan, Lent(task))),
            _ => {
                self.tasks.push(task);
                None
            }
        }
    }

    /// The data was moved, or that has failed.
    ///
    /// # Errors
    /// `result`, as the layers have changed it.
    pub fn finish_lent(&mut self, session: &Session, lent: Lent, result: Result<()>) -> Result<()> {
        let (task, result) = session.finish_lent(lent.0, result);
        self.tasks.push(task);
        result
    }

    /// Nothing was moved: the request goes another way.
    pub fn return_unused(&mut self, lent: Lent) {
        self.tasks.push(lent.0);
    }

    /// Takes a completion from the queue: what the front end had noted.
    pub fn take(&mut self, completed: &Completed) -> Option<T> {
        self.remove(&completed.task)
    }

    /// A completion was answered: its task serves for the next request.
    pub fn recycle(&mut self, completed: Completed) {
        self.tasks.push(completed.task);
    }

    /// Gives memory back that holds nothing.
    pub fn give_back(&mut self) {
        if self.is_empty() {
            (self.notes, self.free, self.tasks) = Default::default();
            self.queue.give_back();
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests;
