//! Memory of a request's own, for data that outlives the call: fit for direct I/O, and used again.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    sync::{Arc, Weak},
};

use zerocopy::FromZeros as _;

use crate::{Errno, Error, Result, sync::Mutex};

/// Memory kept for the next requests, in bytes; what is more is given back to the system.
const SPARE: usize = 1 << 20;

/// A buffer that begins at a multiple of [`ALIGN`](Self::ALIGN) and whose size is one. Dropping it gives it back to the
/// [`Buffers`] that it came from.
#[derive(Default)]
pub struct Memory {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
    home: Weak<Spares>,
}

impl Memory {
    /// What any device and file system is content with, in bytes.
    pub const ALIGN: usize = 4096;

    fn new(length: usize, home: Weak<Spares>) -> Result<Self> {
        let length = length.next_multiple_of(Self::ALIGN);
        let bytes = u8::new_vec_zeroed(length + Self::ALIGN)
            .map_err(|_| Error::new(Errno::ENOMEM, format!("there is no memory for {length} bytes")))?;
        let address = bytes.as_ptr() as usize;
        Ok(Memory { start: address.next_multiple_of(Self::ALIGN) - address, bytes, length, home })
    }

    /// Whether direct I/O can use `buf` as it is.
    pub fn is_aligned(buf: &[u8]) -> bool {
        (buf.as_ptr() as usize).is_multiple_of(Self::ALIGN)
    }
}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({})", self.length)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let Some(home) = self.home.upgrade() else { return };
        let mut kept = home.0.lock();
        if kept.bytes + self.length <= SPARE {
            kept.bytes += self.length;
            let (bytes, start, length) = (std::mem::take(&mut self.bytes), self.start, self.length);
            kept.list.push(Memory { bytes, start, length, home: Weak::new() });
        }
    }
}

/// Buffers for the next requests.
#[derive(Clone, Debug, Default)]
pub struct Buffers(Arc<Spares>);

#[derive(Debug, Default)]
struct Spares(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    list: Vec<Memory>,
    bytes: usize,
}

impl Buffers {
    /// A buffer of at least `length` bytes, whose content is left over from before.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn take(&self, length: usize) -> Result<Memory> {
        let spare = {
            let mut kept = self.0.0.lock();
            let spare = kept.list.pop();
            kept.bytes -= spare.as_ref().map_or(0, |spare| spare.len());
            spare
        };
        let home = Arc::downgrade(&self.0);
        match spare {
            Some(mut spare) if spare.len() >= length => {
                spare.home = home;
                Ok(spare)
            }
            _ => Memory::new(length, home),
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
            assert!(Memory::is_aligned(&buffer) && buffer.len() >= length);
            assert!(buffer.len().is_multiple_of(Memory::ALIGN));
            buffer.fill(length as u8);
        }
        let again = buffers.take(1).unwrap();
        assert_eq!(again[0], 100);
    }

    #[test]
    fn no_more_is_kept_than_may_be() {
        let buffers = Buffers::default();
        drop(buffers.take(2 * SPARE).unwrap());
        drop([(); 300].map(|()| buffers.take(1).unwrap()));
        let kept = buffers.0.0.lock();
        assert_eq!((kept.bytes, kept.list.len()), (SPARE, SPARE / Memory::ALIGN));
    }

    #[test]
    fn a_buffer_may_outlive_its_home() {
        let buffers = Buffers::default();
        let buffer = buffers.take(1).unwrap();
        drop(buffers);
        drop(buffer);
    }

    #[test]
    fn too_much_is_an_error() {
        let error = Buffers::default().take(isize::MAX as usize - Memory::ALIGN).unwrap_err();
        assert_eq!(error.errno(), Errno::ENOMEM);
    }
}
