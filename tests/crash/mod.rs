//! Servers that are killed at random moments, again and again, over layers that keep what was flushed.
//!
//! A layer is one entry of [`LAYERS`]. Each round starts it on what the last round has left, checks that, and writes
//! stamped sectors with flushes and FUA until the server is killed. What is then found in a sector has to be whole, and
//! no older than what the layer has said is durable. `scripts/crash ROUNDS` runs more rounds than the test suite does, and
//! other ones each time.

mod clients;
mod model;

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use crate::util::{Mount, Server, is_left_out, patterned, temp};
use clients::{File, Nbd};
use model::{Dice, Model};

/// Bytes of a disk, in sectors of which stamps are kept.
const SIZE: usize = 256 << 10;

/// A layer that promises to keep what was flushed.
struct Layer {
    name: &'static str,
    /// The words that serve a disk of [`SIZE`] bytes whose state is all in a directory. `base` is an image in it, which
    /// holds a pattern at first.
    words: fn(&Path, base: &str) -> Vec<String>,
    /// It only reads the base.
    keeps_base: bool,
}

/// Later layers are added here.
const LAYERS: &[Layer] = &[
    Layer { name: "file", words: |_, base| vec!["file".into(), base.into()], keeps_base: false },
    Layer {
        name: "file past the page cache",
        words: |_, base| vec!["file".into(), base.into(), "cache=none".into()],
        keeps_base: false,
    },
    Layer { name: "cow", words: |dir, base| cow(dir, base, "64k"), keeps_base: true },
    Layer { name: "cow in small blocks", words: |dir, base| cow(dir, base, "4k"), keeps_base: true },
    Layer {
        name: "cow under blocksize",
        words: |dir, base| {
            let cow = cow(dir, base, "4k");
            ["--filter=blocksize".into()].into_iter().chain(cow).chain(["minblock=4k".into()]).collect()
        },
        keeps_base: true,
    },
];

fn cow(dir: &Path, base: &str, block: &str) -> Vec<String> {
    let overlay = dir.join("overlay").display().to_string();
    ["--filter=cow", "file", base, &format!("cow-file={overlay}"), &format!("cow-block-size={block}")]
        .map(String::from)
        .into()
}

/// How many rounds each layer gets, and what the dice begin with.
fn plan() -> (usize, u64) {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let rounds = number("NBDKIT_CRASH_ROUNDS").unwrap_or(50);
    (rounds as usize, number("NBDKIT_CRASH_SEED").unwrap_or(0x2545_f491_4f6c_dd1d))
}

/// The layers of this run: all, or the one that is named.
fn layers() -> impl Iterator<Item = &'static Layer> {
    let only = std::env::var("NBDKIT_CRASH_LAYER").ok();
    LAYERS.iter().filter(move |layer| only.as_deref().is_none_or(|name| layer.name == name))
}

/// What a layer starts from.
struct Ground {
    dir: tempfile::TempDir,
    base: PathBuf,
    original: Vec<u8>,
}

impl Ground {
    fn new() -> Self {
        let dir = temp();
        let base = patterned(dir.path(), "base", SIZE);
        let original = std::fs::read(&base).expect("read");
        Ground { dir, base, original }
    }

    fn words(&self, layer: &Layer) -> Vec<String> {
        (layer.words)(self.dir.path(), self.base.to_str().expect("UTF-8"))
    }

    fn check(&self, layer: &Layer) {
        if layer.keeps_base {
            assert_eq!(std::fs::read(&self.base).expect("read"), self.original, "the base is only read");
        }
    }
}

/// Waits until that many requests are done or the client has ended, and a moment longer.
fn wait(done: &AtomicUsize, dice: &mut Dice, is_over: impl Fn() -> bool) {
    let (wanted, moment) = (dice.roll(300) as usize, Duration::from_micros(dice.roll(400)));
    while done.load(Ordering::Acquire) < wanted && !is_over() {
        std::thread::yield_now();
    }
    let end = Instant::now() + moment;
    while Instant::now() < end {
        std::hint::spin_loop();
    }
}

#[test]
fn kill_9_over_nbd() {
    let (rounds, seed) = plan();
    for layer in layers() {
        let (ground, mut dice) = (Ground::new(), Dice(seed));
        let mut model = Model::of(&ground.original);
        let mut requests = 0;
        for round in 0..rounds {
            let mut server = Server::start(ground.words(layer));
            let mut client = Nbd::connect(server.socket());
            model.check(&client.read_all(SIZE), &format!("{}, round {round}, seed {seed}", layer.name));
            let done = AtomicUsize::new(0);
            let mut own = Dice(dice.roll(u64::MAX) | 1);
            std::thread::scope(|scope| {
                let (model, done) = (&mut model, &done);
                let writer = scope.spawn(move || client.write_until_killed(model, &mut own, done));
                wait(done, &mut dice, || writer.is_finished());
                server.signal(rustix::process::Signal::KILL);
            });
            requests += done.into_inner();
        }
        println!("{}: {rounds} rounds, {requests} requests over NBD", layer.name);
        ground.check(layer);
    }
}

#[test]
fn kill_9_under_a_mount() {
    if is_left_out("fuse") {
        return;
    }
    let (rounds, seed) = plan();
    for layer in layers() {
        let (ground, mut dice) = (Ground::new(), Dice(seed));
        let mut model = Model::of(&ground.original);
        let mut requests = 0;
        for round in 0..rounds {
            let mut mount = Mount::start(ground.words(layer));
            let mut file = File::open(&mount.file());
            model.check(&file.read_all(SIZE), &format!("{}, round {round}, seed {seed}", layer.name));
            let done = AtomicUsize::new(0);
            let mut own = Dice(dice.roll(u64::MAX) | 1);
            std::thread::scope(|scope| {
                let (model, done) = (&mut model, &done);
                let writer = scope.spawn(move || file.write_until_killed(model, &mut own, done));
                wait(done, &mut dice, || writer.is_finished());
                mount.kill();
            });
            requests += done.into_inner();
        }
        println!("{}: {rounds} rounds, {requests} requests under a mount", layer.name);
        ground.check(layer);
    }
}
