//! The boundary that no panic crosses: whatever C calls runs inside it.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `body` for a caller in C. A panic, which the hook has logged by then, becomes `failure`.
pub(crate) fn boundary<T>(failure: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        // A payload may panic when it is dropped.
        std::mem::forget(panic);
        failure
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_the_failure() {
        assert_eq!(boundary(-1, || 7), 7);
        assert_eq!(boundary(-1, || panic!("on purpose")), -1);
    }
}
