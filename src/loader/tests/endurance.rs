//! What adds up: many connections, many requests, and every byte that is lost on the way.

use std::{ffi::OsStr, path::Path, process::Command, sync::Arc};

use nbdkit_core::{Chain, Flags, Session};

use super::harness::{Lab, connect, open, start};

/// The plugin below a filter that opens layers and keeps handles of its own, below one of the end-to-end tests.
fn chain(lab: &Lab) -> Arc<Chain> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let include = format!("-I{}", root.join("include").display());
    let invert = lab.library(root.join("tests/abi/invert.c").to_str().expect("UTF-8"), &[include]);
    let turn = lab.library::<&str>("filter.c", &[]);
    start(lab.plugin("plugin.c", &[]), &[&invert, &turn], &[])
}

/// Memory in use, in bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("procfs");
    let pages: u64 = statm.split(' ').nth(1).and_then(|n| n.parse().ok()).expect("a number");
    pages * 4096
}

#[test]
fn a_hundred_thousand_connections() {
    let lab = Lab::new();
    let chain = chain(&lab);
    let cycles = |n| {
        for _ in 0..n {
            let session = open(&chain, "some name").expect("open");
            session.export_description().expect("a description");
            session.pread(&mut [0; 512], 512).expect("read");
        }
    };
    cycles(10_000);
    let before = resident();
    cycles(90_000);
    // Twelve bytes of each connection would be more.
    let grown = resident().saturating_sub(before);
    assert!(grown < 1 << 20, "{grown} bytes more");
}

/// Random requests of all kinds to a sixteenth of the disk.
fn busy(session: &Session, seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let part = session.size() / 16;
    for _ in 0..2000 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let at = state % part;
        let count = 1 + (state >> 20) % (part - at);
        let offset = seed % 16 * part + at;
        let mut buf = vec![seed as u8; count as usize];
        let none = Flags::empty();
        match (state >> 40) % 8 {
            0 | 1 => session.pread(&mut buf, offset),
            2 | 3 => session.pwrite(&buf, offset, none),
            4 => session.zero(count, offset, none),
            5 => session.trim(count, offset, none),
            6 => session.extents(count, offset, none).map(drop),
            _ => session.flush(),
        }
        .expect("a request");
    }
}

#[test]
fn sixteen_threads_on_each_of_two_connections() {
    let lab = Lab::new();
    let chain = chain(&lab);
    let round = || {
        let connection = connect(&chain);
        let sessions =
            [connection.open(OsStr::new("one"), false).expect("open"), open(&chain, "two").expect("open")];
        std::thread::scope(|scope| {
            for session in &sessions {
                for seed in 1..=16 {
                    scope.spawn(move || busy(session, seed));
                }
            }
        });
    };
    for _ in 0..3 {
        round();
    }
    let before = resident();
    for _ in 0..10 {
        round();
    }
    // Four bytes of each request would be more.
    let grown = resident().saturating_sub(before);
    assert!(grown < 1 << 20, "{grown} bytes more");
}

/// The conformance suite again, with every access and every byte of memory accounted for.
#[test]
fn no_error_and_no_leak() {
    let suite = "tests::conformance::suite::";
    let run = Command::new("valgrind")
        .args(["-q", "--error-exitcode=99", "--leak-check=full", "--num-callers=20"])
        .args(["--show-leak-kinds=definite,indirect", "--errors-for-leak-kinds=definite,indirect"])
        .arg(std::env::current_exe().expect("this program"))
        .args(["--test-threads=1", suite])
        .output()
        .expect("valgrind is needed");
    let said = [String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr)].concat();
    assert!(run.status.success(), "{said}");
    assert!(said.contains("test result: ok.") && !said.contains("ok. 0 passed"), "{said}");
}
