//! One buffer for each thread that reads: an answer goes from it straight to the kernel.

use std::cell::RefCell;

/// Alignment of the data: enough for a plugin that reads with `O_DIRECT`.
const ALIGN: usize = 4096;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Lends this thread's buffer, `length` bytes long and page-aligned. What is in it is left over from earlier reads.
/// Must not be nested.
pub(crate) fn with<T>(length: usize, then: impl FnOnce(&mut [u8]) -> T) -> T {
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < length + ALIGN {
            // Not grown in place: there is nothing to copy, and fresh zeroed memory costs only what is touched.
            *buffer = vec![0; length + ALIGN];
        }
        let start = buffer.as_ptr().align_offset(ALIGN).min(ALIGN);
        then(&mut buffer[start..start + length])
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn is_aligned_whatever_its_size() {
        for length in [1, 4096, 5000, 1 << 20, 512] {
            super::with(length, |buffer| {
                assert_eq!(buffer.len(), length);
                assert_eq!(buffer.as_ptr() as usize % super::ALIGN, 0);
            });
        }
    }
}
