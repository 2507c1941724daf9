//! Several exports behind one chain: each behaves as if it were served alone, whatever a filter keeps.

use std::{ffi::OsStr, sync::Arc};

use nbdkit_core::{Chain, Flags, Handle, Info, Open, Plugin, Result, Session};

use crate::testing::{Disk, Spec, chain, client};

/// Disks by the name of their export.
#[derive(Clone)]
struct Several(Vec<(&'static str, Disk)>);

impl Several {
    fn disk(&self, export: &OsStr) -> &Disk {
        &self.0.iter().find(|(name, _)| *name == export).expect("an export of that name").1
    }
}

impl Plugin for Several {
    fn info(&self) -> Info {
        Info::bundled("several", "disks for tests", "")
    }

    fn open(&self, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(self.disk(&open.export_name).clone()))
    }
}

/// Parameters without which a filter does not start or does nothing.
fn params(filter: &str, scratch: &str) -> Vec<(&'static str, String)> {
    let fixed = |list: &[(&'static str, &str)]| list.iter().map(|(k, v)| (*k, v.to_string())).collect();
    match filter {
        "blocksize" => fixed(&[("minblock", "1k"), ("maxdata", "4k")]),
        "blocksize-policy" => fixed(&[("blocksize-preferred", "4k"), ("blocksize-maximum", "1M")]),
        "cow" => fixed(&[("cow-block-size", "4k")]),
        "cow-file" => vec![("cow-block-size", "4k".into()), ("cow-file", format!("{scratch}/overlays/"))],
        "exportname" => fixed(&[("exportname", "disk0"), ("exportname", "disk1")]),
        "fua" => fixed(&[("fuamode", "force")]),
        "limit" => fixed(&[("limit", "9")]),
        "log" => vec![("logfile", format!("{scratch}/log"))],
        "map" => fixed(&[("map", "1k-2k:4k")]),
        "multi-conn" => fixed(&[("multi-conn-mode", "emulate"), ("multi-conn-track-dirty", "fast")]),
        "nozero" => fixed(&[("zeromode", "emulate")]),
        "offset" => fixed(&[("offset", "512")]),
        "pause" => vec![("pause-control", format!("{scratch}/pause"))],
        "protect" => fixed(&[("protect", "0-511")]),
        "rate" => fixed(&[("rate", "100G")]),
        "readonly" => fixed(&[("readonly-file", "/no/such/file")]),
        "stats" => vec![("statsfile", format!("{scratch}/stats"))],
        "truncate" => fixed(&[("round-up", "4k")]),
        _ => Vec::new(),
    }
}

/// These need what the test disks are not.
const OTHERS: &[(&str, &str)] = &[
    ("exitwhen", "needs an event"),
    ("map", "maps what is past the end of a small disk"),
    ("partition", "needs a partition table"),
    ("tls-fallback", "shows a small disk of its own to clients without TLS"),
    ("bzip2", "needs a compressed disk"),
    ("gzip", "needs a compressed disk"),
    ("indexed-gzip", "needs a compressed disk"),
    ("lzip", "needs a compressed disk"),
    ("xz", "needs a compressed disk"),
    ("zstd", "needs a compressed disk"),
    ("luks", "needs an encrypted disk"),
];

fn start(plugin: impl Plugin + 'static, filter: &str, params: &[(&str, String)]) -> Arc<Chain> {
    let mut chain = Chain::new(Box::new(plugin), vec![crate::load(filter).expect("it is registered")]);
    for (key, value) in params {
        chain.config(key, OsStr::new(value)).unwrap_or_else(|e| panic!("{filter}: {e:#}"));
    }
    chain.config_complete().unwrap_or_else(|e| panic!("{filter}: {e:#}"));
    chain.get_ready().unwrap_or_else(|e| panic!("{filter}: {e:#}"));
    let chain = Arc::new(chain);
    chain.after_fork().unwrap_or_else(|e| panic!("{filter}: {e:#}"));
    chain
}

fn open(chain: &Arc<Chain>, export: &str) -> Session {
    Arc::new(chain.connect(client(), false).unwrap()).open(OsStr::new(export), false).unwrap()
}

fn contents(session: &Session) -> Vec<u8> {
    let mut bytes = vec![0xaa; session.size() as usize];
    session.pread(&mut bytes, 0).unwrap();
    bytes
}

/// What requests that change a disk come to; a different value for each.
fn change(session: &Session, value: u8) -> String {
    let mut results = Vec::new();
    for (offset, length) in [(0, 512), (4096, 4096), (10_000, 3000), (session.size() - 700, 700)] {
        let data: Vec<u8> = (0..length).map(|i: u64| value ^ (i / 512) as u8).collect();
        results.push(session.pwrite(&data, offset, Flags::empty()));
    }
    results.push(session.zero(2048, 14_336 + 512 * u64::from(value % 2), Flags::empty()));
    results.push(session.trim(4096, 20_480, Flags::empty()));
    results.push(session.flush());
    results.push(session.pwrite(&[value; 512], 1024, Flags::FUA));
    results.iter().map(|r| format!("{:?};", r.as_ref().map_err(|e| e.errno()))).collect()
}

fn check(case: &str, sizes: [u64; 2]) {
    let filter = case.strip_suffix("-file").filter(|name| *name == "cow").unwrap_or(case);
    let dirs = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let scratch = dirs.each_ref().map(|dir| dir.path().to_str().unwrap());
    let specs = [
        Spec::sized(sizes[0]),
        Spec { data: crate::testing::pattern(sizes[1]).iter().map(|b| !b).collect(), ..Spec::default() },
    ];
    let names = ["disk0", "disk1"];
    let shared =
        Several(names.into_iter().zip(specs.clone()).map(|(name, spec)| (name, spec.disk())).collect());
    let chain = start(shared.clone(), filter, &params(case, scratch[2]));
    let alone = [0, 1].map(|i| {
        let disk = Several(vec![(names[i], specs[i].clone().disk())]);
        let chain = start(disk.clone(), filter, &params(case, scratch[i]));
        (disk, open(&chain, names[i]), chain)
    });
    let sessions = names.map(|name| open(&chain, name));
    for round in 0..2_u8 {
        for (i, session) in sessions.iter().enumerate() {
            let value = 0x40 + 2 * round + i as u8;
            assert_eq!(session.size(), alone[i].1.size(), "{case}: size of {}", names[i]);
            assert_eq!(change(session, value), change(&alone[i].1, value), "{case}: results of {}", names[i]);
        }
        for (i, (disk, session, _)) in alone.iter().enumerate() {
            assert!(contents(&sessions[i]) == contents(session), "{case}: {} shows something else", names[i]);
            assert!(
                contents(&open(&chain, names[i])) == contents(session),
                "{case}: another client of {}",
                names[i]
            );
            let name = OsStr::new(names[i]);
            assert!(shared.disk(name).contents() == disk.disk(name).contents(), "{case}: the disk {name:?}");
            assert!(
                shared.disk(name).stable() == disk.disk(name).stable(),
                "{case}: what {name:?} has for good"
            );
        }
    }
    drop(sessions);
    chain.cleanup();
}

#[test]
fn each_export_is_as_if_it_were_served_alone() {
    let cases =
        crate::names().chain(["cow-file"]).filter(|name| OTHERS.iter().all(|(other, _)| other != name));
    for case in cases {
        check(case, [32_768, 32_768]);
        check(case, [32_768, 49_152]);
        check(case, [49_152, 24_576]);
    }
}

#[test]
fn the_log_names_the_export_of_a_connection() {
    let dir = tempfile::tempdir().unwrap();
    let disks = ["disk0", "disk1"].map(|name| (name, Spec::default().disk()));
    let chain = start(Several(disks.into()), "log", &params("log", dir.path().to_str().unwrap()));
    for (name, offset) in [("disk0", 512), ("disk1", 1024)] {
        open(&chain, name).pread(&mut [0; 16], offset).unwrap();
    }
    let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
    for (number, export, offset) in [(1, "disk0", "0x200"), (2, "disk1", "0x400")] {
        let line = |text: &str| {
            log.lines().any(|l| l.contains(&format!("connection={number} ")) && l.contains(text))
        };
        assert!(line(&format!("export={export} ")), "{log}");
        assert!(line(&format!("offset={offset}")), "{log}");
    }
}

/// A name that nobody has used costs nothing once its client has left.
#[test]
fn the_names_of_exports_leave_nothing_behind() {
    let fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let disk = Spec::sized(32_768).disk();
    let chain = chain(&disk, &["cow"], &[]).unwrap();
    let before = fds();
    for number in 0..200 {
        let session = open(&chain, &format!("export{number}"));
        session.pread(&mut [0; 16], 0).unwrap();
    }
    // Other tests run in the same process.
    assert!(fds() < before + 100, "{} descriptors", fds() - before);
    open(&chain, "one").pwrite(&[7], 0, Flags::empty()).unwrap();
    assert_eq!(contents(&open(&chain, "one"))[0], 7, "changes stay");
    assert_eq!(contents(&open(&chain, "two"))[0], disk.contents()[0]);

    let dir = tempfile::tempdir().unwrap();
    let overlays = format!("{}/overlays/", dir.path().display());
    let chain = crate::testing::chain(&disk, &["cow"], &[("cow-file", &overlays)]).unwrap();
    for (name, value) in [("one", 7), ("two", 0), ("three", 0)] {
        let session = open(&chain, name);
        if value > 0 {
            session.pwrite(&[value], 0, Flags::FUA).unwrap();
        }
    }
    let files: Vec<_> =
        std::fs::read_dir(&overlays).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files, ["one.cow"]);
    assert_eq!(contents(&open(&chain, "one"))[0], 7);
}
