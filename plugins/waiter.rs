//! A thread that waits for the answer to a request that goes on without it.

use std::sync::Arc;

use nbdkit_core::{Errno, Error, Result};
use parking_lot::{Condvar, Mutex};

/// The thread's side.
#[derive(Debug)]
pub(crate) struct Waiter<T>(Arc<Place<T>>);

/// The other side: the duty to answer, once. Dropping it answers `EIO`.
#[derive(Debug)]
pub(crate) struct Promise<T>(Option<Arc<Place<T>>>);

#[derive(Debug)]
struct Place<T> {
    answer: Mutex<Option<Result<T>>>,
    answered: Condvar,
}

/// Both sides.
pub(crate) fn waiter<T>() -> (Waiter<T>, Promise<T>) {
    let place = Arc::new(Place { answer: Mutex::new(None), answered: Condvar::new() });
    (Waiter(place.clone()), Promise(Some(place)))
}

impl<T> Promise<T> {
    /// Gives the answer.
    pub(crate) fn answer(mut self, answer: Result<T>) {
        self.give(answer);
    }

    fn give(&mut self, answer: Result<T>) {
        if let Some(place) = self.0.take() {
            *place.answer.lock() = Some(answer);
            place.answered.notify_one();
        }
    }
}

impl<T> Drop for Promise<T> {
    fn drop(&mut self) {
        self.give(Err(Error::new(Errno::EIO, "the request was forgotten")));
    }
}

impl<T> Waiter<T> {
    /// Waits for the answer.
    ///
    /// # Errors
    /// The answer.
    pub(crate) fn wait(self) -> Result<T> {
        let mut answer = self.0.answer.lock();
        loop {
            match answer.take() {
                Some(answer) => return answer,
                None => self.0.answered.wait(&mut answer),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_promise_is_an_answer() {
        let (waiter, promise) = waiter::<u32>();
        let thread = std::thread::spawn(move || waiter.wait());
        drop(promise);
        assert_eq!(thread.join().unwrap().unwrap_err().errno(), Errno::EIO);
        let (waiter, promise) = super::waiter();
        promise.answer(Ok(1));
        assert_eq!(waiter.wait().unwrap(), 1);
    }
}
