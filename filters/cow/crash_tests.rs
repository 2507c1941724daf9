//! Power loss at any moment: of what was written after the last fdatasync(2), any sectors may be missing.

use std::{collections::BTreeMap, fs::File, os::unix::fs::FileExt as _, path::Path};

use parking_lot::Mutex;

use super::{
    overlay::Overlay,
    store::{Claimed, Store},
    *,
};

const SECTOR: u64 = 512;
const BLOCK: u64 = 4096;
/// Three pages of the map.
const SIZE: u64 = 40_000 * BLOCK;
/// The blocks that are written to, some in each page.
const BLOCKS: [u64; 9] = [0, 1, 5, 16_255, 16_256, 20_000, 39_000, 39_998, 39_999];

/// The sectors of a file that are not zero.
type Sectors = BTreeMap<u64, Vec<u8>>;

fn sectors(file: &File) -> Sectors {
    use rustix::fs::{SeekFrom, seek};
    let mut found = Sectors::new();
    let mut at = 0;
    while let Ok(start) = seek(file, SeekFrom::Data(at)) {
        let end = seek(file, SeekFrom::Hole(start)).unwrap();
        let mut bytes = vec![0; (end - start) as usize];
        file.read_exact_at(&mut bytes, start).unwrap();
        for (number, sector) in bytes.chunks(SECTOR as usize).enumerate() {
            if sector.iter().any(|b| *b != 0) {
                found.insert(start + number as u64 * SECTOR, sector.to_vec());
            }
        }
        at = end;
    }
    found
}

/// Numbers that are the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }

    /// What a power loss leaves: of each sector one of the two versions.
    fn mix(&mut self, durable: &Sectors, current: &Sectors) -> Sectors {
        // Now and then nearly everything has made it, or nearly nothing.
        let share = [1, 8, 15][self.roll(3) as usize];
        let places: std::collections::BTreeSet<_> = durable.keys().chain(current.keys()).collect();
        let choose = |place: &u64| {
            let from = if self.roll(16) < share { current } else { durable };
            Some((*place, from.get(place)?.clone()))
        };
        places.into_iter().filter_map(choose).collect()
    }
}

fn below(offset: u64) -> u8 {
    (offset / SECTOR * 7) as u8 | 1
}

fn read_below(buf: &mut [u8], offset: u64) -> Result<()> {
    (offset..).zip(buf).for_each(|(at, byte)| *byte = below(at));
    Ok(())
}

fn open(path: &Path) -> Overlay {
    let store = Store::new(Claimed::open(path, true).unwrap(), OsStr::new(""), SIZE, BLOCK)
        .map_err(|(_, e)| e)
        .unwrap();
    Overlay::persistent(store).unwrap()
}

fn open_sectors(path: &Path, sectors: &Sectors) -> Overlay {
    let file = File::create(path).unwrap();
    for (place, sector) in sectors {
        file.write_all_at(sector, *place).unwrap();
    }
    file.set_len(SIZE + (2 << 20)).unwrap();
    open(path)
}

/// For each sector of the blocks what it may hold: what was flushed last, then all that was written since.
struct Model(BTreeMap<u64, Vec<u8>>);

impl Model {
    fn new() -> Self {
        let places = BLOCKS.iter().flat_map(|b| (0..8).map(move |s| b * BLOCK + s * SECTOR));
        Model(places.map(|place| (place, vec![below(place)])).collect())
    }

    fn read(overlay: &Overlay, place: u64) -> u8 {
        let mut buf = vec![0; SECTOR as usize];
        match overlay.span(place, SECTOR).state {
            State::Below => read_below(&mut buf, place).unwrap(),
            State::Stored => overlay.read(&mut buf, place).unwrap(),
            State::Discarded => {}
        }
        assert!(buf.iter().all(|b| *b == buf[0]), "sector {place} is torn");
        buf[0]
    }

    fn write(&mut self, offset: u64, length: u64, value: u8) {
        self.0.range_mut(offset..offset + length).for_each(|(_, versions)| versions.push(value));
    }

    fn check(&self, overlay: &Overlay) {
        for (place, versions) in &self.0 {
            let found = Self::read(overlay, *place);
            assert!(versions.contains(&found), "sector {place} holds {found}, which is none of {versions:?}");
        }
    }

    /// Everything is as it was written last.
    fn flushed(&mut self) {
        self.0.values_mut().for_each(|versions| *versions = versions.split_off(versions.len() - 1));
    }

    /// From now on what is found counts.
    fn accept(&mut self, overlay: &Overlay) {
        self.0.iter_mut().for_each(|(place, versions)| *versions = vec![Self::read(overlay, *place)]);
    }
}

#[test]
fn any_power_loss_keeps_what_was_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, lost) = (dir.path().join("overlay"), dir.path().join("lost"));
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let mut overlay = open(&path);
    let mut durable = sectors(&File::open(&path).unwrap());
    let mut model = Model::new();
    let mut losses = 0;
    for _ in 0..1500 {
        let block = BLOCKS[dice.roll(BLOCKS.len() as u64) as usize];
        match dice.roll(10) {
            0..6 => {
                let first = dice.roll(8);
                let (offset, length) = (block * BLOCK + first * SECTOR, (1 + dice.roll(8 - first)) * SECTOR);
                let value = dice.roll(255) as u8 + 1;
                overlay.store(Patch::Data(&vec![value; length as usize]), offset, read_below).unwrap();
                model.write(offset, length, value);
            }
            6 => {
                overlay.discard(block * BLOCK);
                model.write(block * BLOCK, BLOCK, 0);
            }
            7..9 => {
                // Whatever is written between two syncs of a flush may be lost, too.
                let seen = Arc::new(Mutex::new(Vec::new()));
                overlay.before_sync({
                    let seen = seen.clone();
                    move |file| seen.lock().push(sectors(file))
                });
                overlay.flush().unwrap();
                for now in std::mem::take(&mut *seen.lock()) {
                    for _ in 0..3 {
                        model.check(&open_sectors(&lost, &dice.mix(&durable, &now)));
                        losses += 1;
                    }
                    durable = now;
                }
                model.flushed();
                model.check(&open_sectors(&lost, &durable));
            }
            _ => {
                let left = dice.mix(&durable, &sectors(&File::open(&path).unwrap()));
                drop(overlay);
                overlay = open_sectors(&path, &left);
                model.check(&overlay);
                model.accept(&overlay);
                durable = left;
                losses += 1;
            }
        }
    }
    assert!(losses > 1000, "{losses}");
}

#[test]
fn flushes_at_once_share_their_rounds() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("overlay");
    let overlay = open(&path);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let overlay = &overlay;
            scope.spawn(move || {
                for round in 0..50 {
                    let offset = (thread * 50 + round) * BLOCK;
                    overlay.store(Patch::Data(&[1; BLOCK as usize]), offset, read_below).unwrap();
                    overlay.flush().unwrap();
                }
            });
        }
    });
    drop(overlay);
    assert_eq!(open(&path).span(0, SIZE), Span { offset: 0, length: 200 * BLOCK, state: State::Stored });
}
