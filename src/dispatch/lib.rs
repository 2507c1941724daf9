//! What every front end shares: where a request runs, and how one comes back that was started.
//!
//! A front end decodes a request and offers it to the chain ([`Started::offer`]). There are four ways on from there, for all
//! kinds of requests and all front ends:
//!
//! 1. *lent*: the chain lends a file, and the kernel moves the data;
//! 2. *done*: it was answered at once, where it was received;
//! 3. *started*: it holds no thread; its end is posted to the [`CompletionQueue`] of the front end, which encodes
//!    and sends the reply;
//! 4. *on a thread*: of the [`Executor`], or of the front end's own, where such requests have been quick
//!    ([`InlinePolicy`]) and another thread can take over receiving ([`leader_follower`]).
//!
//! [`BusyPoll`] and [`reclaim`] are about the time between requests.

#![deny(unsafe_code)]

pub mod buffer;
pub mod leader_follower;
pub mod reclaim;

mod busy_poll;
mod completion_queue;
mod executor;
mod inline_policy;
mod started;
mod sync;

#[cfg(all(test, feature = "shuttle"))]
mod model_tests;

pub use busy_poll::{Awake, BusyPoll};
pub use completion_queue::CompletionQueue;
pub use executor::{Entered, Executor, Job, Worker};
pub use inline_policy::InlinePolicy;
pub use started::{Lent, Offered, Started};
