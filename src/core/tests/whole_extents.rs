//! What a layer says of its extents, however it says it, becomes whole blocks, all of a range, and never more than its
//! disk.

use std::{ffi::OsStr, sync::Arc};

use nbdkit_core::{
    Below, Caps, Chain, Client, Extents, Filter, Flags, Handle, Info, Next, Open, Peer, Plugin, Result,
    Session, ShutdownFlag,
};

/// Lengths in bytes and kinds.
type List = &'static [(u64, u32)];

/// A disk with these extents, each of which is told alone.
#[derive(Clone)]
struct Pieces {
    size: u64,
    list: List,
}

impl Plugin for Pieces {
    fn info(&self) -> Info {
        Info::bundled("pieces", "", "")
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(self.clone()))
    }
}

impl Handle for Pieces {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(self.size).with_extents(true))
    }

    fn extents(&self, _: u64, offset: u64, _: Flags, extents: &mut Extents) -> Result<()> {
        let mut start = 0;
        for (length, kind) in self.list {
            if offset < start + length {
                return extents.add(start, *length, kind & 1 != 0, kind & 2 != 0);
            }
            start += length;
        }
        Ok(())
    }
}

/// Tells its extents in blocks of this size; 0: all at once.
struct Blocks(u64);

struct InBlocks(u64, Next);

impl Filter for Blocks {
    fn info(&self) -> Info {
        Info::bundled("blocks", "", "")
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(InBlocks(self.0, next.open(open)?)))
    }
}

impl Handle for InBlocks {
    fn next(&self) -> Option<&Next> {
        Some(&self.1)
    }

    fn extents(&self, length: u64, offset: u64, flags: Flags, extents: &mut Extents) -> Result<()> {
        if self.0 > 0 {
            return self.1.extents_aligned(length, offset, flags, self.0, extents);
        }
        let all = self.1.extents_full(length, offset)?;
        all.as_slice().iter().try_for_each(|e| extents.add(e.offset, e.length, e.hole, e.zero))
    }
}

fn session(disk: &Pieces, align: Option<u64>) -> Session {
    let filters = align.map(|align| Box::new(Blocks(align)) as Box<dyn Filter>);
    let mut chain = Chain::new(Box::new(disk.clone()), filters.into_iter().collect());
    chain.config_complete().unwrap();
    chain.get_ready().unwrap();
    let client = Client::new(1, Peer::Local, Arc::new(ShutdownFlag::new()));
    let connection = Arc::new(chain).connect(Arc::new(client), false).unwrap();
    Arc::new(connection).open(OsStr::new(""), false).unwrap()
}

/// All of the disk, asked for until the end, as lengths and kinds; neighbours of one kind count as one.
fn all(disk: &Pieces, align: Option<u64>, flags: Flags) -> Vec<(u64, u32)> {
    let session = session(disk, align);
    let mut list: Vec<(u64, u32)> = Vec::new();
    let mut at = 0;
    while at < disk.size {
        let extents = session.extents(disk.size - at, at, flags).unwrap();
        for e in &extents {
            assert_eq!(e.offset, at);
            at = e.end();
            assert!(
                align.is_none_or(|align| align == 0 || at.is_multiple_of(align) || at == disk.size),
                "{e:?}"
            );
            match list.last_mut().filter(|last| last.1 == e.kind()) {
                Some(last) => last.0 += e.length,
                None => list.push((e.length, e.kind())),
            }
        }
    }
    list
}

#[test]
fn blocks_are_what_all_of_them_is() {
    const LISTS: [(List, List); 6] = [
        (&[(8, 3), (32, 0)], &[(8, 3), (32, 0)]),
        (&[(12, 3), (28, 2)], &[(8, 3), (32, 2)]),
        (&[(9, 3), (1, 0), (30, 3)], &[(8, 3), (8, 0), (24, 3)]),
        (&[(4, 3), (4, 3), (32, 0)], &[(8, 3), (32, 0)]),
        (&[(1, 3), (1, 2), (1, 3), (37, 3)], &[(8, 2), (32, 3)]),
        // The disk ends within a block, and the layer tells of more than there is.
        (&[(32, 0), (3, 3), (100, 2)], &[(32, 0), (8, 2)]),
    ];
    for (list, want) in LISTS {
        let disk = Pieces { size: 40, list };
        for flags in [Flags::empty(), Flags::REQ_ONE] {
            assert_eq!(all(&disk, Some(8), flags), want, "{list:?} {flags:?}");
        }
    }
    let disk = Pieces { size: 35, list: &[(32, 0), (1, 3), (100, 2)] };
    assert_eq!(all(&disk, Some(8), Flags::empty()), [(32, 0), (3, 2)]);
}

#[test]
fn a_layer_is_asked_on() {
    let disk = Pieces { size: 40, list: &[(9, 3), (1, 0), (30, 3)] };
    let extents = session(&disk, Some(0)).extents(20, 0, Flags::empty()).unwrap();
    let found: Vec<_> = extents.iter().map(|e| (e.length, e.kind())).collect();
    assert_eq!(found, [(9, 3), (1, 0), (30, 3)], "the last one passes the end of the request");
    let one = session(&disk, None).extents(5, 0, Flags::REQ_ONE).unwrap();
    assert_eq!((one.len(), one[0].length), (1, 5));
}

#[test]
fn nothing_is_told_past_the_disk() {
    let disk = Pieces { size: 512, list: &[(1 << 20, 0)] };
    let extents = session(&disk, None).extents(100, 0, Flags::empty()).unwrap();
    assert_eq!((extents.len(), extents[0].length), (1, 512));
}
