//! What threads share and wait with: the machine's, or in model tests the scheduler's of shuttle, which tries many
//! orders of everything that happens here.
//!
//! Model tests are `cargo test --features shuttle` of this package; other builds never see them.

#[cfg(not(all(test, feature = "shuttle")))]
mod machine;
#[cfg(all(test, feature = "shuttle"))]
mod model;

#[cfg(not(all(test, feature = "shuttle")))]
pub(crate) use machine::*;
#[cfg(all(test, feature = "shuttle"))]
pub(crate) use model::*;

/// Bugs that a model test plants, to see that it would find them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// The front end says that it sleeps after it has looked, and sleeps through what is posted in between.
    AsleepAfterTheLook,
    /// A completion is posted, and the thread that waits for it is not told.
    NoNotice,
    /// A thread that had no work for long leaves though there is some by now.
    LeavesWithoutALook,
    /// A request is queued while its thread is told before: it may sleep on.
    NoticeBeforeTheWork,
    /// Leader and follower both take the turn.
    TurnWithoutExchange,
    /// The place of a request that is under way is given to another.
    PlaceStaysFree,
}
