//! Random requests to a disk, compared with an array of bytes.

use proptest::prelude::*;

use std::{ffi::OsStr, sync::Arc};

use nbdkit_core::{Chain, Flags};
use tempfile::TempDir;

use super::{
    start,
    suite::{connect, image, read},
};

const SIZE: usize = 40_001;

#[derive(Clone, Debug)]
enum Request {
    Read(usize, usize),
    Write(usize, usize, u8, bool),
    Zero(usize, usize, u32),
    Trim(usize, usize, bool),
    Extents(usize, usize, bool),
    Reopen,
}

/// A range within the disk: somewhere, or up to an edge of a page.
fn range() -> impl Strategy<Value = (usize, usize)> {
    let edge = prop_oneof![0..=SIZE, (0..=SIZE / 4096).prop_map(|page| page * 4096), Just(SIZE)];
    (edge.clone(), edge)
        .prop_map(|(a, b)| (a.min(b), a.max(b)))
        .prop_map(|(a, b)| if a < b { (a, b) } else { (a.min(SIZE - 1), a.min(SIZE - 1) + 1) })
}

fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        3 => range().prop_map(|(a, b)| Request::Read(a, b)),
        4 => (range(), any::<u8>(), any::<bool>()).prop_map(|((a, b), byte, fua)| Request::Write(a, b, byte, fua)),
        3 => (range(), 0..8u32).prop_map(|((a, b), flags)| Request::Zero(a, b, flags)),
        2 => (range(), any::<bool>()).prop_map(|((a, b), fua)| Request::Trim(a, b, fua)),
        2 => (range(), any::<bool>()).prop_map(|((a, b), one)| Request::Extents(a, b, one)),
        1 => Just(Request::Reopen),
    ]
}

fn run(chain: &Arc<Chain>, requests: Vec<Request>) {
    let open = || connect(chain, false).open(OsStr::new(""), false).unwrap();
    let mut session = open();
    let mut model = vec![0; SIZE];
    let fua = |on| if on { Flags::FUA } else { Flags::empty() };
    let span = |a: usize, b: usize| ((b - a) as u64, a as u64);
    for request in requests {
        match request {
            Request::Read(a, b) => assert_eq!(read(&session, a as u64..b as u64), model[a..b]),
            Request::Write(a, b, byte, durable) => {
                model[a..b].fill(byte);
                session.pwrite(&model[a..b], a as u64, fua(durable)).unwrap();
            }
            Request::Zero(a, b, bits) => {
                let all = [Flags::MAY_TRIM, Flags::FUA, Flags::FAST_ZERO];
                let flags =
                    all.into_iter().enumerate().filter(|(i, _)| bits >> i & 1 == 1).map(|(_, f)| f).collect();
                let (length, offset) = span(a, b);
                match session.zero(length, offset, flags) {
                    Err(e) if e.is_unsupported() && flags.contains(Flags::FAST_ZERO) => {}
                    result => {
                        result.unwrap();
                        model[a..b].fill(0);
                    }
                }
            }
            Request::Trim(a, b, durable) => {
                let (length, offset) = span(a, b);
                session.trim(length, offset, fua(durable)).unwrap();
                let now = read(&session, a as u64..b as u64);
                for (old, new) in model[a..b].iter_mut().zip(now) {
                    assert!(new == 0 || new == *old, "trim made {new} of {old}");
                    *old = new;
                }
            }
            Request::Extents(a, b, one) => {
                let (length, offset) = span(a, b);
                let flags = if one { Flags::REQ_ONE } else { Flags::empty() };
                for extent in session.extents(length, offset, flags).unwrap() {
                    let spot = extent.offset as usize..extent.end() as usize;
                    assert!(!extent.zero || model[spot].iter().all(|b| *b == 0), "{extent:?} is not zero");
                }
            }
            Request::Reopen => session = open(),
        }
    }
    assert_eq!(read(&session, 0..SIZE as u64), model);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn memory_is_an_array_of_bytes(requests in prop::collection::vec(request(), 1..40)) {
        run(&start("memory", vec![("size", SIZE.to_string().into())]).unwrap(), requests);
    }

    #[test]
    fn file_is_an_array_of_bytes(requests in prop::collection::vec(request(), 1..40)) {
        let dir = TempDir::new().unwrap();
        run(&start("file", vec![("file", image(dir.path(), "disk", SIZE as u64))]).unwrap(), requests);
    }
}
