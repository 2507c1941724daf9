//! The border between C and a plugin's code: each callback crosses it here, and no panic does.

use std::{
    any::Any,
    ffi::c_int,
    panic::{AssertUnwindSafe, catch_unwind},
};

use crate::{Error, Result, sys};

/// Runs one callback. A failure is reported to the server, and `failed` is what C gets.
///
/// What a panic left half done is the plugin's: its own locks are poisoned, and the SDK keeps no state.
pub fn border<T>(method: &str, failed: T, body: impl FnOnce() -> Result<T>) -> T {
    let outcome = catch_unwind(AssertUnwindSafe(|| body().map_err(|error| report(&error))));
    match outcome {
        Ok(Ok(answer)) => answer,
        Ok(Err(())) => failed,
        Err(payload) => {
            sys::log_error(&format!("{method}: panic: {}", message_of(payload)));
            crate::set_error(libc::EIO);
            failed
        }
    }
}

/// The same for callbacks that answer 0 or -1.
pub(crate) fn status(method: &str, body: impl FnOnce() -> Result<()>) -> c_int {
    border(method, -1, || body().map(|()| 0))
}

/// The same for callbacks that cannot fail.
pub(crate) fn silent(method: &str, body: impl FnOnce()) {
    border(method, (), || {
        body();
        Ok(())
    });
}

fn report(error: &Error) {
    sys::log_error(&error.to_string());
    if error.errno() > 0 {
        crate::set_error(error.errno());
    }
}

fn message_of(payload: Box<dyn Any + Send>) -> String {
    match payload.downcast::<String>() {
        Ok(text) => *text,
        Err(payload) => match payload.downcast_ref::<&'static str>() {
            Some(text) => (*text).to_owned(),
            None => {
                // Its drop is the plugin's code and might panic again, here where nothing would catch it.
                std::mem::forget(payload);
                "not a text".to_owned()
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_panics() {
        assert_eq!(message_of(Box::new("literal")), "literal");
        assert_eq!(message_of(Box::new(String::from("formatted"))), "formatted");
        struct Bomb;
        impl Drop for Bomb {
            fn drop(&mut self) {
                panic!("dropped");
            }
        }
        assert_eq!(message_of(Box::new(Bomb)), "not a text");
    }
}
