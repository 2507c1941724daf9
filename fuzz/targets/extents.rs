//! Lists of extents as layers tell them: what is kept is contiguous and within the range, whatever they say.

#![no_main]

use libfuzzer_sys::fuzz_target;
use nbdkit_core::Extents;

fuzz_target!(|input: (u64, u64, Vec<(u64, u64, bool, bool)>)| {
    let (start, end, list) = input;
    if start > end {
        return;
    }
    let mut extents = Extents::new(start, end);
    for (offset, length, hole, zero) in list {
        let _ = extents.add(offset, length, hole, zero);
    }
    let mut at = start;
    for extent in extents.as_slice() {
        assert!(extent.offset == at && extent.length > 0, "{extent:?} at {at}");
        at = extent.end();
    }
});
