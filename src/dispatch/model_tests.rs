//! The orders in which threads may meet in this package, tried at random by shuttle.
//!
//! `NBDKIT_MODEL_ITERATIONS` says how many per model: scripts/model-check sets it, and the default is for every day. Each
//! model is run with planted bugs too, which it has to find.

mod executor;
mod leader_follower;
mod queue;
mod slab;

use crate::sync::{Bug, plant, time_passes};

/// Tries many orders. With a bug, enough of them to find it: the test then expects the panic.
fn check(model: impl Fn() + Send + Sync + 'static, passes: bool, bug: Option<Bug>) {
    let asked = std::env::var("NBDKIT_MODEL_ITERATIONS").ok().and_then(|count| count.parse().ok());
    let iterations = if bug.is_some() { 20_000 } else { asked.unwrap_or(4_000) };
    plant(bug);
    time_passes(passes);
    let model = std::sync::Arc::new(model);
    // One walks at random; the other prefers a thread for long, and so finds what takes few, ill-timed switches.
    for half in [true, false] {
        let model = model.clone();
        if half {
            shuttle::check_random(move || model(), iterations / 2);
        } else {
            shuttle::check_pct(move || model(), iterations / 2, 3);
        }
    }
}
