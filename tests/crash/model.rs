//! What each sector of a disk may hold after a crash.

use std::ops::Range;

/// The unit that must never be torn, in bytes.
pub(crate) const SECTOR: usize = 512;

/// Numbers that are the same for the same seed.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// What a sector was given.
#[derive(Clone, PartialEq, Eq)]
enum Content {
    /// What was there at the start.
    Bytes(Box<[u8]>),
    /// A write with this stamp.
    Stamp(u64),
    Zeroes,
}

impl Content {
    fn of(bytes: &[u8]) -> Option<Self> {
        let (words, rest) = bytes.as_chunks::<8>();
        let same = rest.is_empty() && words.iter().all(|word| *word == words[0]);
        same.then(|| match u64::from_le_bytes(words[0]) {
            0 => Content::Zeroes,
            stamp => Content::Stamp(stamp),
        })
    }
}

struct Version {
    content: Content,
    /// A trim need not have had any effect.
    optional: bool,
    /// When its request was answered, on the clock of the model.
    answered: Option<u64>,
    request: u64,
}

/// A request under way.
#[derive(Clone)]
pub(crate) struct Change {
    pub(crate) sectors: Range<usize>,
    number: u64,
    /// Durable when it is answered.
    pub(crate) fua: bool,
}

/// See the module. For each sector the versions that it may have, the oldest first.
pub(crate) struct Model {
    sectors: Vec<Vec<Version>>,
    clock: u64,
    requests: u64,
}

/// What a change makes of its sectors.
#[derive(Clone, Copy)]
pub(crate) enum Becomes {
    Stamped,
    Zeroes,
    /// Zeroes, or what was there.
    Trimmed,
}

impl Model {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let content = |sector: &[u8]| Content::of(sector).unwrap_or_else(|| Content::Bytes(sector.into()));
        let first = |sector| vec![Version::first(content(sector))];
        Model { sectors: bytes.chunks(SECTOR).map(first).collect(), clock: 1, requests: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.sectors.len()
    }

    /// A change is sent. Returns it, and the data of a write.
    pub(crate) fn send(&mut self, sectors: Range<usize>, becomes: Becomes, fua: bool) -> (Change, Vec<u8>) {
        self.requests += 1;
        let number = self.requests;
        let mut data = Vec::new();
        for sector in sectors.clone() {
            // Nobody else's, and tells its place.
            let stamp = number << 16 | sector as u64;
            let (content, optional) = match becomes {
                Becomes::Stamped => (Content::Stamp(stamp), false),
                Becomes::Zeroes => (Content::Zeroes, false),
                Becomes::Trimmed => (Content::Zeroes, true),
            };
            if let Becomes::Stamped = becomes {
                data.extend(stamp.to_le_bytes().repeat(SECTOR / 8));
            }
            self.sectors[sector].push(Version { content, optional, answered: None, request: number });
        }
        (Change { sectors, number, fua }, data)
    }

    /// It was answered.
    pub(crate) fn answered(&mut self, change: &Change) {
        self.clock += 1;
        for versions in &mut self.sectors[change.sectors.clone()] {
            let own = versions.iter().position(|version| version.request == change.number);
            let Some(own) = own else { continue };
            versions[own].answered = Some(self.clock);
            if change.fua && !versions[own].optional {
                versions.drain(..own);
            }
        }
    }

    /// A flush is sent. Returns what tells [`flushed`](Self::flushed) which changes it covers.
    pub(crate) fn flush(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A flush was answered.
    pub(crate) fn flushed(&mut self, sent: u64) {
        for versions in &mut self.sectors {
            let durable =
                |version: &Version| !version.optional && version.answered.is_some_and(|at| at < sent);
            if let Some(newest) = versions.iter().rposition(durable) {
                versions.drain(..newest);
            }
        }
    }

    /// Checks what a crash has left, which from now on is all that there is.
    #[track_caller]
    pub(crate) fn check(&mut self, found: &[u8], when: &str) {
        for (number, (bytes, versions)) in found.chunks(SECTOR).zip(&mut self.sectors).enumerate() {
            let known = versions.iter().position(|version| match &version.content {
                Content::Bytes(own) => **own == *bytes,
                other => Content::of(bytes).as_ref() == Some(other),
            });
            let Some(known) = known else {
                let held: Vec<String> = versions.iter().map(Version::describe).collect();
                let words: Vec<u64> =
                    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word) >> 16).collect();
                panic!("{when}: sector {number} holds {words:?}, which is none of {held:?}");
            };
            *versions = vec![Version::first(versions.swap_remove(known).content)];
        }
    }
}

impl Version {
    fn first(content: Content) -> Self {
        Version { content, optional: false, answered: Some(0), request: 0 }
    }

    fn describe(&self) -> String {
        match &self.content {
            Content::Bytes(_) => "the original".into(),
            Content::Stamp(stamp) => (stamp >> 16).to_string(),
            Content::Zeroes => "zeroes".into(),
        }
    }
}

/// A check that has never failed is not trusted.
#[test]
fn the_model_finds_what_is_lost_torn_and_older() {
    let original = vec![7; 4 * SECTOR];
    let fails = |model: &mut Model, found: &[u8]| {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| model.check(found, "now"))).is_err()
    };
    let sent = |flush: bool, fua: bool| {
        let mut model = Model::of(&original);
        let (change, data) = model.send(1..3, Becomes::Stamped, fua);
        model.answered(&change);
        if flush {
            let sent = model.flush();
            model.flushed(sent);
        }
        (model, [&original[..SECTOR], &data, &original[..SECTOR]].concat())
    };
    for (flush, fua) in [(false, false), (true, false), (false, true)] {
        assert!(!fails(&mut sent(flush, fua).0, &sent(flush, fua).1));
        assert_eq!(fails(&mut sent(flush, fua).0, &original), flush || fua, "lost");
        let (mut model, mut torn) = sent(flush, fua);
        torn[SECTOR + 8..SECTOR + 16].fill(7);
        assert!(fails(&mut model, &torn));
    }
    // What was answered after the flush was sent need not be durable.
    let mut model = Model::of(&original);
    let (change, _) = model.send(0..1, Becomes::Zeroes, false);
    let flush = model.flush();
    model.answered(&change);
    model.flushed(flush);
    assert!(!fails(&mut model, &original));
    // A trim may do nothing, but it brings nothing older back.
    let mut model = Model::of(&original);
    for becomes in [Becomes::Stamped, Becomes::Trimmed] {
        let (change, _) = model.send(0..4, becomes, true);
        model.answered(&change);
    }
    assert!(fails(&mut model, &original));
}
