//! The functions that C code calls.

use std::{ffi::OsStr, process::Command};

use nbdkit_core::Errno;

use super::harness::{Lab, connect, start};

#[test]
fn functions_that_c_calls() {
    let lab = Lab::new();
    let chain = start(lab.plugin("interface.c", &[]), &[], &[]);
    let connection = connect(&chain);
    let session = connection.open(OsStr::new("name"), false).unwrap();
    let client = session.client().clone();
    session.pread(&mut [0; 1], 0).unwrap();

    session.pread(&mut [0; 1], 1536).unwrap();
    assert!(client.leave.is_raised() && !client.gone.is_raised());
    assert!(!client.server().is_raised());
    session.pread(&mut [0; 1], 1024).unwrap();
    assert!(client.server().is_raised());

    std::thread::scope(|scope| {
        let sleeper = scope.spawn(|| session.pread(&mut [0; 1], 512).unwrap_err().errno());
        session.pread(&mut [0; 1], 2048).unwrap();
        assert!(client.gone.is_raised());
        assert_eq!(sleeper.join().unwrap(), Errno::ESHUTDOWN);
    });
}

/// Every function of the distribution's headers is in the dynamic symbol table, and every one that its plugins use.
#[test]
fn all_functions_are_exported() {
    let own = std::env::current_exe().unwrap();
    let symbols = |kind: &str, file: &std::path::Path| {
        let output = Command::new("nm").args(["-D", kind]).arg(file).output().expect("nm");
        let text = String::from_utf8(output.stdout).unwrap();
        let names = text.lines().filter_map(|line| line.split_whitespace().last()).map(str::to_owned);
        names.filter(|name| name.starts_with("nbdkit_")).collect::<std::collections::BTreeSet<_>>()
    };
    let ours = symbols("--defined-only", &own);
    assert!(ours.len() > 50, "{ours:?}");
    let mut declared = 0;
    for header in ["nbdkit-common.h", "nbdkit-plugin.h", "nbdkit-filter.h"] {
        let text = std::fs::read_to_string(format!("{}/{header}", super::harness::HEADERS)).unwrap();
        for declaration in text.split("NBDKIT_EXTERN_DECL (").skip(1) {
            let name = declaration.split(',').nth(1).expect("a name").trim();
            assert!(ours.contains(name), "{name} of {header} is not exported");
            declared += 1;
        }
    }
    assert!(declared > 40, "{declared}");
}
