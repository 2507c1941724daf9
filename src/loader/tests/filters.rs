//! Filters in the three layouts.

use std::{ffi::OsStr, path::Path, sync::Arc};

use nbdkit_core::{
    Caps, Chain, Client, Errno, Flags, Handle, Info, Open, Peer, Plugin, Session, ThreadModel,
};

use super::harness::{HEADERS, Lab, connect, open, start};
use crate::{DebugFlags, load_filter};

/// Writes headers as a later nbdkit has them, made from the distribution's. Returns the flag that chooses them.
pub(super) fn headers(lab: &Lab, version: &str) -> String {
    let include = lab.path("include");
    std::fs::create_dir_all(&include).unwrap();
    let read = |name: &str| std::fs::read_to_string(format!("{HEADERS}/{name}")).expect("nbdkit-plugin-dev");
    let old = "int (*thread_model) (void);";
    let new = match version {
        "1.44.0" => "int (*thread_model) (int next); void (*dump_plugin) (void);",
        _ => "int (*thread_model) (void); void (*dump_plugin) (void);",
    };
    let filter = read("nbdkit-filter.h");
    assert!(filter.contains(old));
    std::fs::write(include.join("nbdkit-filter.h"), filter.replace(old, new)).unwrap();
    let text = format!("#define NBDKIT_VERSION_STRING \"{version}\"\n");
    std::fs::write(include.join("nbdkit-version.h"), text).unwrap();
    std::fs::write(include.join("nbdkit-common.h"), read("nbdkit-common.h")).unwrap();
    format!("-I{}", include.display())
}

/// A chain of the test filter over the test plugin, both in C.
fn chain(lab: &Lab, mode: &str) -> Arc<Chain> {
    let filter = lab.library::<&str>("filter.c", &[]);
    let log = lab.path("log");
    start(lab.plugin("plugin.c", &[]), &[&filter], &[("log", log.to_str().unwrap()), ("mode", mode)])
}

fn extents(session: &Session, length: u64, offset: u64) -> Vec<(u64, u64, u32)> {
    let extents = session.extents(length, offset, Flags::empty()).unwrap();
    extents.iter().map(|e| (e.offset, e.length, e.kind())).collect()
}

#[test]
fn the_order_of_life() {
    let lab = Lab::new();
    let chain = chain(&lab, "");
    assert_eq!(chain.thread_model(), ThreadModel::SerializeRequests);
    let connection = connect(&chain);
    let session = connection.open(OsStr::new("name"), false).unwrap();
    assert_eq!(session.export_description().unwrap().as_deref(), Some("turned: the disk name"));
    drop((session, connection));
    chain.cleanup();
    drop(chain);
    let log = [
        "filter: config_complete",
        "config_complete",
        "get_ready debug=0",
        "filter: get_ready 2",
        "after_fork",
        "open background",
        "filter: after_fork read 0, can_write 0",
        "filter: preconnect pid=11",
        "preconnect readonly=0 uid=12",
        "filter: open name",
        "open name",
        "filter: prepare readonly=0 size=65536",
        "filter: finalize",
        "filter: close",
        "close",
        "filter: cleanup",
        "close",
        "cleanup",
        "unload",
        "filter: unload",
    ];
    assert_eq!(lab.log(), log);
}

#[test]
fn data_goes_through() {
    let lab = Lab::new();
    let chain = chain(&lab, "");
    let session = open(&chain, "x").unwrap();
    session.pwrite(&[1, 2, 3], 10, Flags::FUA).unwrap();
    let mut buf = [9; 5];
    session.pread(&mut buf, 9).unwrap();
    assert_eq!(buf, [0xff, 1, 2, 3, 0xff]);
    // The filter wants to see zeroes as writes.
    session.zero(2, 10, Flags::FUA).unwrap();
    session.pread(&mut buf, 9).unwrap();
    assert_eq!(buf, [0xff, 0, 0, 3, 0xff]);
    let fast = session.zero(2, 10, Flags::FAST_ZERO).unwrap_err();
    assert_eq!(fast.errno(), if session.caps().fast_zero { Errno::EOPNOTSUPP } else { Errno::EINVAL });
    let log = lab.log();
    let count = |line: &str| log.iter().filter(|l| *l == line).count();
    assert_eq!((count("pwrite 2 10 flags=0"), count("flush"), count("filter: zero")), (1, 2, 0));
    assert_eq!(extents(&session, 40000, 20000), [(20000, 12768, 0), (32768, 27232, 1)]);
}

#[test]
fn zero_as_the_filter_says() {
    let lab = Lab::new();
    let c = chain(&lab, "zero-native");
    open(&c, "x").unwrap().zero(512, 0, Flags::MAY_TRIM).unwrap();
    let log = lab.log();
    let at = log.iter().position(|line| line == "filter: zero").unwrap();
    assert_eq!(log[at + 1], "zero 512 0 flags=1");
    let lab = Lab::new();
    let c = chain(&lab, "zero-none");
    let session = open(&c, "x").unwrap();
    assert_eq!(session.zero(512, 0, Flags::empty()).unwrap_err().errno(), Errno::EINVAL);
}

#[test]
fn exports_go_through() {
    let lab = Lab::new();
    let chain = chain(&lab, "");
    let connection = connect(&chain);
    let exports = connection.list_exports(false).unwrap();
    let exports: Vec<_> =
        exports.into_iter().map(|e| (e.name.to_str().unwrap(), e.description.as_deref())).collect();
    assert_eq!(exports, [("turned-one", Some("the first")), ("turned-two", None), ("default-two", None)]);
    drop(connection.open(OsStr::new(""), false).unwrap());
    assert!(lab.log().contains(&"open default-two".into()));
}

#[test]
fn failures() {
    let lab = Lab::new();
    let c = chain(&lab, "errno");
    let error = open(&c, "x").unwrap().pread(&mut [0; 1], 0).unwrap_err();
    assert_eq!(error.errno(), Errno::ENOSPC);
    let lab = Lab::new();
    assert_eq!(open(&chain(&lab, "no-open"), "x").unwrap_err().to_string(), "it stays closed");
    let lab = Lab::new();
    let c = chain(&lab, "preconnect");
    let client = Arc::new(Client::new(1, Peer::Local, Arc::default()));
    assert_eq!(c.connect(client, false).unwrap_err().to_string(), "go away");
}

#[test]
fn what_the_plugin_says_reaches_the_client_through_a_silent_filter() {
    let lab = Lab::new();
    let filter = lab.library::<&str>("filter.c", &[]);
    let load = load_filter(&filter, &mut DebugFlags::default()).unwrap();
    let mut chain = Chain::new(lab.plugin("plugin.c", &[]), vec![load]);
    chain.config("wrong", OsStr::new("set-error")).unwrap();
    chain.config_complete().unwrap();
    let chain = Arc::new(chain);
    let error = open(&chain, "x").unwrap().pread(&mut [0; 1], 0).unwrap_err();
    assert_eq!((error.errno(), error.to_string()), (Errno::ENOSPC, "pread went wrong".into()));
}

#[test]
fn the_layer_below_can_be_the_filters_own() {
    let lab = Lab::new();
    let c = chain(&lab, "late");
    let session = open(&c, "x").unwrap();
    session.pwrite(&[1], 0, Flags::empty()).unwrap();
    drop(session);
    let life =
        |log: Vec<String>| log.into_iter().filter(|l| l == "close" || l.starts_with("open ")).collect();
    let log: Vec<String> = life(lab.log());
    assert_eq!(log, ["open background", "open x", "close"]);

    let lab = Lab::new();
    let c = chain(&lab, "reopen");
    let session = open(&c, "x").unwrap();
    session.pread(&mut [0; 10], 0).unwrap();
    session.pread(&mut [0; 10], 0).unwrap();
    drop(session);
    let log: Vec<String> = life(lab.log());
    assert_eq!(log, ["open background", "open x", "open again", "close", "close"]);
}

#[test]
fn aligned_extents() {
    let lab = Lab::new();
    let c = chain(&lab, "aligned");
    let session = open(&c, "x").unwrap();
    assert_eq!(extents(&session, 65536, 0), [(0, 32768, 0), (32768, 32768, 3)]);
    assert_eq!(extents(&session, 100, 32700), [(32700, 68, 0), (32768, 32768, 3)]);

    // A disk that ends within a block.
    let lab = Lab::new();
    let c = chain(&lab, "aligned-end");
    assert_eq!(extents(&open(&c, "x").unwrap(), 100, 0), [(0, 65536, 0)]);
}

#[test]
fn rust_and_c_mix() {
    let lab = Lab::new();
    let filter = lab.library::<&str>("filter.c", &[]);
    let load = || load_filter(&filter, &mut DebugFlags::default()).unwrap();
    // The same library twice is one filter twice: it turns bytes over and back.
    let chain = Chain::new(lab.plugin("plugin.c", &[]), vec![load(), load()]);
    assert_eq!(chain.infos().len(), 3);
}

/// A plugin in Rust that panics where it is asked to read.
struct Broken;

impl Plugin for Broken {
    fn info(&self) -> Info {
        Info::bundled("broken", "", "")
    }

    fn open(&self, _: &Open) -> nbdkit_core::Result<Box<dyn Handle>> {
        Ok(Box::new(Broken))
    }
}

impl Handle for Broken {
    fn capabilities(&self) -> nbdkit_core::Result<Caps> {
        Ok(Caps::of_size(512))
    }

    fn pread(&self, _: &mut [u8], _: u64) -> nbdkit_core::Result<()> {
        panic!("on purpose")
    }
}

/// It must pass through no frame of C.
#[test]
fn a_panic_below_a_c_filter_is_a_failed_request() {
    let lab = Lab::new();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/abi/invert.c");
    let include = format!("-I{}/../../include", env!("CARGO_MANIFEST_DIR"));
    let filter = lab.library(path.to_str().unwrap(), &[include]);
    let chain = start(Box::new(Broken), &[&filter], &[]);
    let session = open(&chain, "").unwrap();
    for _ in 0..2 {
        assert_eq!(session.pread(&mut [0; 512], 0).unwrap_err().errno(), Errno::EIO);
    }
}

#[test]
fn the_three_layouts() {
    for version in ["1.36.2", "1.44.0"] {
        let lab = Lab::new();
        let mut flags = vec![headers(&lab, version)];
        if version == "1.44.0" {
            flags.push("-DMODEL_OF_NEXT".into());
        }
        let filter = lab.library("filter.c", &flags);
        let log = lab.path("log");
        let chain = start(lab.plugin("plugin.c", &[]), &[&filter], &[("log", log.to_str().unwrap())]);
        assert_eq!(chain.infos()[0].version, version);
        let mut buf = [0; 3];
        open(&chain, "x").unwrap().pread(&mut buf, 0).unwrap();
        assert_eq!(buf, [0xff; 3], "{version}");
        let told = lab.log().contains(&"filter: thread_model over 3".into());
        assert_eq!(told, version == "1.44.0");
        chain.cleanup();
    }
}

#[test]
fn an_unknown_layout_is_refused_with_those_that_are_known() {
    let lab = Lab::new();
    let include = headers(&lab, "1.35.9");
    let filter = lab.library("filter.c", &[include]);
    let error = load_filter(&filter, &mut DebugFlags::default()).err().unwrap();
    let error = format!("{error:#}");
    assert!(error.contains(filter.to_str().unwrap()) && error.contains("'1.35.9'"), "{error}");
    assert!(error.contains("1.32 to 1.34, 1.36 to 1.42, and 1.44 or later"), "{error}");
}
