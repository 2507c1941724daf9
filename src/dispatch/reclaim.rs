//! Reclaims the memory of a front end's buffers while its client is idle, down to a page or two.
//!
//! A thousand connections that were busy once would otherwise keep megabytes each. To free the buffers is not enough,
//! for the allocator keeps much of what it has had.

#![allow(unsafe_code)]

use std::time::Duration;

use rustix::{
    mm::{Advice, madvise},
    param::page_size,
};

/// A client that says nothing for so long is idle.
pub const IDLE: Duration = Duration::from_secs(1);

/// Gives the memory of all whole pages in `data` back. Its content is lost: the bytes there read as zero, or as before.
pub fn give_back(data: &mut [u8]) {
    let page = page_size();
    let start = data.as_ptr().align_offset(page).min(data.len());
    let whole = (data.len() - start) / page * page;
    if whole == 0 {
        return;
    }
    let pages = &mut data[start..start + whole];
    // SAFETY: the pages are ours alone, and no byte in them is outside of the slice; afterwards they are memory as before,
    // with zeroes, for our allocations are private and not of a file.
    let result = unsafe { madvise(pages.as_mut_ptr().cast(), pages.len(), Advice::LinuxDontNeed) };
    if let Err(e) = result {
        // Locked memory (--swap) stays.
        log::debug!("{} idle bytes are kept: {e}", pages.len());
    }
}

/// At most so many parts of the allocator's memory, one for each thread that runs at the same time as others.
#[cfg(target_env = "gnu")]
const ARENAS: i32 = 4;
/// What each of them may keep that is not in use, in bytes; larger pieces are mapped by themselves.
#[cfg(target_env = "gnu")]
const KEPT: i32 = 4 << 20;

/// Bounds what the allocator keeps of memory that was freed. By itself it keeps twice the largest piece that there was, for
/// each thread that ran beside others, and gives none of that back. To be called before there are threads.
pub fn bound() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in
        [(libc::M_ARENA_MAX, ARENAS), (libc::M_MMAP_THRESHOLD, KEPT), (libc::M_TRIM_THRESHOLD, KEPT)]
    {
        // SAFETY: the parameters are the allocator's, and so are the values.
        unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives back what the allocator keeps in between of what is in use.
pub fn all() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes no memory that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_pages_only() {
        let page = page_size();
        for (start, end) in [(0, 8 * page), (1, 8 * page - 1), (5, 9), (page, page), (page - 1, 2 * page + 1)]
        {
            let mut data = vec![7_u8; 8 * page];
            give_back(&mut data[start..end]);
            assert!(data[..start].iter().chain(&data[end..]).all(|b| *b == 7), "{start}..{end}");
            let zeroes = data.iter().filter(|b| **b == 0).count();
            let most = end.saturating_sub(start) / page;
            assert_eq!(zeroes % page, 0);
            assert!((most.saturating_sub(1)..=most).contains(&(zeroes / page)), "{start}..{end}: {zeroes}");
        }
    }
}
