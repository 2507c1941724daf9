//! Memory that direct I/O can use: it begins at a multiple of [`ALIGN`], and its size is one.

use std::ops::{Deref, DerefMut};

use nbdkit_core::{Errno, Error, Result};
use parking_lot::Mutex;
use zerocopy::FromZeros as _;

/// What any device and file system is content with, in bytes.
pub(super) const ALIGN: usize = 4096;
/// Memory kept for the next requests, in bytes; one that has more is given back.
const SPARE: usize = 1 << 20;

/// A buffer of such memory.
#[derive(Debug, Default)]
pub(super) struct Aligned {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    /// Zeroes, at least `length` of them.
    ///
    /// # Errors
    /// `ENOMEM`.
    fn new(length: usize) -> Result<Self> {
        let length = length.next_multiple_of(ALIGN);
        let memory = u8::new_vec_zeroed(length + ALIGN)
            .map_err(|_| Error::new(Errno::ENOMEM, format!("there is no memory for {length} bytes")))?;
        let address = memory.as_ptr() as usize;
        Ok(Aligned { start: address.next_multiple_of(ALIGN) - address, memory, length })
    }
}

impl Deref for Aligned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

/// Whether direct I/O can use this memory as it is.
pub(super) fn is_aligned(buf: &[u8]) -> bool {
    (buf.as_ptr() as usize).is_multiple_of(ALIGN)
}

/// Buffers for the next requests.
#[derive(Debug, Default)]
pub(super) struct Buffers(Mutex<Spares>);

#[derive(Debug, Default)]
struct Spares {
    list: Vec<Aligned>,
    bytes: usize,
}

impl Buffers {
    /// A buffer of at least `length` bytes, whose content is left over from before.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(super) fn take(&self, length: usize) -> Result<Aligned> {
        let spare = {
            let mut spares = self.0.lock();
            let spare = spares.list.pop();
            spares.bytes -= spare.as_ref().map_or(0, |spare| spare.len());
            spare
        };
        match spare {
            Some(spare) if spare.len() >= length => Ok(spare),
            _ => Aligned::new(length),
        }
    }

    /// Gives a buffer back.
    pub(super) fn give(&self, buffer: Aligned) {
        let mut spares = self.0.lock();
        if spares.bytes + buffer.len() <= SPARE {
            spares.bytes += buffer.len();
            spares.list.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_come_back() {
        let buffers = Buffers::default();
        for length in [1, 4096, 5000, 1 << 20, 100] {
            let mut buffer = buffers.take(length).unwrap();
            assert!(is_aligned(&buffer) && buffer.len() >= length && buffer.len().is_multiple_of(ALIGN));
            buffer.fill(length as u8);
            buffers.give(buffer);
        }
        let again = buffers.take(1).unwrap();
        assert_eq!(again[0], 100);
    }

    #[test]
    fn no_more_is_kept_than_may_be() {
        let buffers = Buffers::default();
        for buffer in [(); 300].map(|()| Aligned::new(ALIGN).unwrap()) {
            buffers.give(buffer);
        }
        buffers.give(Aligned::new(2 * SPARE).unwrap());
        let spares = buffers.0.lock();
        assert_eq!((spares.bytes, spares.list.len()), (SPARE, SPARE / ALIGN));
    }

    #[test]
    fn too_much_is_an_error() {
        assert_eq!(Buffers::default().take(isize::MAX as usize - ALIGN).unwrap_err().errno(), Errno::ENOMEM);
    }
}
