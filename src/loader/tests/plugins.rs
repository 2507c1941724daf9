//! Plugins of both versions, of several sizes, well-behaved and not.

use std::{ffi::OsStr, mem::offset_of, path::Path};

use nbdkit_abi as abi;
use nbdkit_core::{Errno, Flags, ThreadModel};

use super::harness::{Lab, connect, open, start};
use crate::{DebugFlags, load_plugin};

/// Parameters for a plugin that notes what it is called for in the lab's log.
fn parameters<'a>(log: &'a Path, wrong: &'a str) -> [(&'a str, &'a str); 2] {
    [("log", log.to_str().unwrap()), ("wrong", wrong)]
}

#[test]
fn the_order_of_life() {
    let lab = Lab::new();
    // Other plugins of this process have a variable of the same name.
    let path = lab.library("plugin.c", &["-Wl,-Bsymbolic"]);
    let mut flags = DebugFlags::parse(["test.level.one=3"]).unwrap();
    let plugin = load_plugin(&path, &mut flags).unwrap();
    let info = plugin.info();
    assert_eq!((&*info.name, &*info.longname, &*info.version), ("test", "a test", "7.8"));
    assert_eq!(info.magic_config_key.as_deref(), Some("log"));
    let chain = start(plugin, &[], &parameters(&lab.path("log"), ""));
    let connection = connect(&chain);
    let session = connection.open(OsStr::new("name"), false).unwrap();
    assert_eq!(session.export_description().unwrap().as_deref(), Some("the disk name"));
    drop((session, connection));
    chain.cleanup();
    drop(chain);
    let log = [
        "config_complete",
        "get_ready debug=3",
        "after_fork",
        "preconnect readonly=0 uid=12",
        "open name",
        "close",
        "cleanup",
        "unload",
    ];
    assert_eq!(lab.log(), log);
}

/// Everything that both versions can do.
fn behaves(version: &str) {
    let lab = Lab::new();
    let plugin = lab.plugin("plugin.c", &[&format!("-DNBDKIT_API_VERSION={version}"), "-DPRESERVED"]);
    assert_eq!(plugin.interface().unwrap().api_version.to_string(), version);
    let chain = start(plugin, &[], &parameters(&lab.path("log"), ""));
    let session = open(&chain, "").unwrap();
    let caps = session.caps();
    assert!(caps.write && caps.flush && caps.trim && caps.extents && !caps.multi_conn && !caps.rotational);
    assert_eq!((caps.size, caps.block_size.preferred), (65536, 4096));
    assert_eq!(caps.fast_zero, version == "1", "version 1 fails fast, and version 2 would have to say so");
    assert!(!session.pread_nowait(&mut [0; 8], 0).unwrap(), "who knows how long it takes");

    session.pwrite(&[7; 1000], 100, Flags::FUA).unwrap();
    let mut buf = [0; 1000];
    session.pread(&mut buf, 600).unwrap();
    assert_eq!((buf[499], buf[500]), (7, 0));
    session.trim(512, 1024, Flags::empty()).unwrap();
    session.zero(500, 200, Flags::MAY_TRIM).unwrap();
    session.pread(&mut buf, 0).unwrap();
    assert_eq!((buf[199], buf[200], buf[699], buf[700]), (7, 0, 0, 7));
    if version == "1" {
        let fast = session.zero(500, 200, Flags::FAST_ZERO).unwrap_err();
        assert_eq!(fast.errno(), Errno::EOPNOTSUPP);
    }
    let extents = session.extents(40000, 20000, Flags::empty()).unwrap();
    let extents: Vec<_> = extents.iter().map(|e| (e.offset, e.length, e.kind())).collect();
    assert_eq!(extents, [(20000, 12768, 0), (32768, 32768, 3)]);
    drop(session);

    let mut want = vec!["open two", "pwrite 1000 100 flags=0", "flush"];
    want.extend(["trim 512 1024 flags=0", "zero 500 200 flags=1", "close"]);
    let log = lab.log();
    assert_eq!(log.iter().skip_while(|line| !line.starts_with("open")).collect::<Vec<_>>(), want);

    let exports = connect(&chain).list_exports(false).unwrap();
    let exports: Vec<_> =
        exports.into_iter().map(|e| (e.name.to_str().unwrap(), e.description.as_deref())).collect();
    assert_eq!(exports, [("one", Some("the first")), ("two", None)]);
}

#[test]
fn version_1() {
    behaves("1");
}

#[test]
fn version_2() {
    behaves("2");
}

#[test]
fn the_errno_of_a_failure() {
    let read = |flags: &[&str], wrong: &str| {
        let lab = Lab::new();
        let chain = start(lab.plugin("plugin.c", flags), &[], &parameters(&lab.path("log"), wrong));
        let error = open(&chain, "x").unwrap().pread(&mut [0; 10], 0).unwrap_err();
        (error.errno(), error.to_string())
    };
    let said = (Errno::ENOSPC, "pread went wrong".to_owned());
    assert_eq!(read(&[], "set-error"), said);
    assert_eq!(read(&["-DPRESERVED"], "set-error"), said);
    assert_eq!(read(&[], "errno").0, Errno::EIO);
    assert_eq!(read(&["-DPRESERVED"], "errno").0, Errno::EROFS);
    assert_eq!(read(&["-DNBDKIT_API_VERSION=1", "-DPRESERVED"], "errno").0, Errno::EROFS);
}

#[test]
fn a_broken_contract_is_an_error_that_says_so() {
    let opened = |wrong: &str| {
        let lab = Lab::new();
        let chain = start(lab.plugin("plugin.c", &[]), &[], &parameters(&lab.path("log"), wrong));
        open(&chain, "x").map(|session| (session, lab))
    };
    let refused = |wrong: &str| opened(wrong).map(drop).unwrap_err();
    assert_eq!(refused("open").errno(), Errno::EIO);
    let error = refused("open-error");
    assert_eq!((error.errno(), error.to_string()), (Errno::ENOENT, "no such x".into()));
    assert_eq!(refused("size").to_string(), "get_size returned -5");
    assert!(refused("block-size").to_string().contains("maximum block size 1000"));
    for wrong in ["no-extents", "gap"] {
        let error = opened(wrong).unwrap().0.extents(100, 50, Flags::empty()).unwrap_err();
        assert_eq!(error.errno(), Errno::EIO, "{wrong}: {error}");
    }
}

#[test]
fn zero_that_is_not_supported_is_written() {
    let lab = Lab::new();
    let chain = start(lab.plugin("plugin.c", &[]), &[], &parameters(&lab.path("log"), "no-zero"));
    let session = open(&chain, "x").unwrap();
    session.pwrite(&[7; 512], 512, Flags::empty()).unwrap();
    session.zero(512, 512, Flags::empty()).unwrap();
    let mut buf = [1; 512];
    session.pread(&mut buf, 512).unwrap();
    assert_eq!(buf, [0; 512]);
}

#[test]
fn a_read_only_plugin() {
    let lab = Lab::new();
    let chain = start(lab.plugin("plugin.c", &["-DREAD_ONLY"]), &[], &[]);
    let session = open(&chain, "x").unwrap();
    assert!(!session.caps().write && !session.caps().flush);
    assert_eq!(session.pwrite(&[1], 0, Flags::empty()).unwrap_err().errno(), Errno::EPERM);
}

#[test]
fn a_plugin_that_knows_fewer_fields_or_more() {
    let shorter = offset_of!(abi::Plugin, preconnect);
    for (size, has_later_fields) in [(shorter, false), (4096, true)] {
        let lab = Lab::new();
        let flags = [&format!("-DREGISTER_SIZE={size}"), "-DREGISTER_VERSION=2"];
        let plugin = lab.plugin("plugin.c", &flags);
        assert_eq!(plugin.interface().unwrap().struct_size, size as u64);
        assert_eq!(plugin.interface().unwrap().callbacks.contains(&"block_size"), has_later_fields);
        assert!(plugin.interface().unwrap().callbacks.contains(&"pread"));
        let chain = start(plugin, &[], &[("log", lab.path("log").to_str().unwrap())]);
        assert_eq!(open(&chain, "").unwrap().caps().block_size.is_unset(), !has_later_fields);
        assert_eq!(lab.log().contains(&"after_fork".into()), has_later_fields);
    }
    // The interface of 2013 ends before pread's successors.
    let lab = Lab::new();
    let first = offset_of!(abi::Plugin, errno_is_preserved);
    let flags = ["-DNBDKIT_API_VERSION=1", &format!("-DREGISTER_SIZE={first}"), "-DREGISTER_VERSION=1"];
    let chain = start(lab.plugin("plugin.c", &flags), &[], &[]);
    open(&chain, "").unwrap().pwrite(&[1], 0, Flags::FUA).unwrap();
}

#[test]
fn what_is_no_plugin_is_refused_with_the_reason() {
    let lab = Lab::new();
    for (flags, reason) in [
        (&["-DNAME=\"a b\""][..], "must hold only ASCII letters, digits and dashes"),
        (&["-DNAME=\"-a\""], "must begin with an ASCII letter or digit"),
        (&["-DNAME=\"\""], ".name is empty"),
        (&["-DNAME=NULL"], "plugin must have a .name"),
        (&["-DNO_OPEN"], "plugin must have a .open callback"),
        (&["-DREGISTER_SIZE=8", "-DREGISTER_VERSION=2"], "plugin must have a .name"),
        (&["-DREGISTER_SIZE=384", "-DREGISTER_VERSION=3"], "version 3 of the plugin interface"),
        (&["-DTHREAD_MODEL=9"], "_thread_model is 9"),
    ] {
        let error = lab.refused("plugin.c", flags);
        assert!(error.contains(reason), "{flags:?}: {error}");
    }
    let error = load_plugin(Path::new("./none.so"), &mut DebugFlags::default()).err().unwrap();
    assert!(error.to_string().contains("none.so: cannot open shared object file"), "{error}");
}

#[test]
fn the_last_message_is_why_a_start_fails() {
    let lab = Lab::new();
    let mut plugin = lab.plugin("plugin.c", &[]);
    let error = plugin.config("nosuch", OsStr::new("1")).unwrap_err();
    assert_eq!(error.to_string(), "unknown parameter 'nosuch': No such file or directory");
}

#[test]
fn thread_models() {
    let lab = Lab::new();
    let plugin = lab.plugin("plugin.c", &["-DTHREAD_MODEL=1"]);
    assert_eq!(plugin.max_thread_model(), ThreadModel::SerializeAllRequests);
    assert_eq!(start(plugin, &[], &[]).thread_model(), ThreadModel::SerializeAllRequests);
}
