//! Memory that may not be there, and buffers for the next payloads.
//!
//! How much is needed is the client's choice, so a failed allocation is an error of its request and never ends the
//! server.

use nbdkit_core::{Errno, Error, Result};
use zerocopy::FromZeros as _;

use crate::{reclaim::give_back, sync::Mutex};

/// Buffers kept for the next payloads.
const SPARES: usize = 4;
/// A larger one is not kept, in bytes.
const SPARE_MAX: usize = 4 << 20;

/// Grows `data` to at least `size` initialised bytes; what it holds stays.
///
/// # Errors
/// `ENOMEM`.
pub fn grow(data: &mut Vec<u8>, size: usize) -> Result<()> {
    if data.is_empty() {
        // The kernel's pages are zero: these cost nothing until they are used, however many a client asks for.
        *data = u8::new_vec_zeroed(size).map_err(|_| no_memory(size))?;
    } else if size > data.len() {
        data.try_reserve_exact(size - data.len()).map_err(|_| no_memory(size))?;
        data.resize(size, 0);
    }
    Ok(())
}

#[cold]
fn no_memory(size: usize) -> Error {
    Error::new(Errno::ENOMEM, format!("there is no memory for a buffer of {size} bytes"))
}

/// Buffers for payloads, one after the other.
#[derive(Debug, Default)]
pub struct Payloads(Mutex<Vec<Vec<u8>>>);

impl Payloads {
    /// A buffer of `length` bytes, whose content is left over from before.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn take(&self, length: usize) -> Result<Vec<u8>> {
        let mut spare = self.0.lock().pop().unwrap_or_default();
        if spare.capacity() < length {
            give_back(&mut spare);
            spare = Vec::new();
        }
        grow(&mut spare, length)?;
        spare.truncate(length);
        Ok(spare)
    }

    /// Takes a buffer for the next payload.
    pub fn recycle(&self, payload: Vec<u8>) {
        if payload.capacity() == 0 || payload.capacity() > SPARE_MAX {
            return;
        }
        let mut spares = self.0.lock();
        if spares.len() < SPARES {
            spares.push(payload);
        }
    }

    /// Gives the memory back.
    pub fn give_back(&self) {
        self.0.lock().drain(..).for_each(|mut spare| give_back(&mut spare));
    }
}
