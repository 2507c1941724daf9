//! The layers of ARCHITECTURE.md: a package may depend on packages of its own workspace only as the table allows.

use std::collections::BTreeMap;

/// Each package and those of ours that it may depend on.
fn allowed() -> BTreeMap<&'static str, &'static [&'static str]> {
    BTreeMap::from([
        ("nbdkit-core", &[] as &[_]),
        ("nbdkit-abi", &[]),
        ("nbdkit-common", &[]),
        ("nbdkit-proto", &[]),
        ("nbdkit-tls", &[]),
        ("nbdkit-dispatch", &["nbdkit-core"]),
        ("nbdkit-nbd", &["nbdkit-core", "nbdkit-dispatch", "nbdkit-proto", "nbdkit-tls"]),
        ("nbdkit-fuse", &["nbdkit-core", "nbdkit-common", "nbdkit-dispatch"]),
        ("nbdkit-loader", &["nbdkit-core", "nbdkit-abi"]),
        ("nbdkit", &["nbdkit-abi"]),
        ("nbdkit-lua-plugin", &["nbdkit"]),
        ("nbdkit-python-plugin", &["nbdkit"]),
        ("nbdkit-plugins", &["nbdkit-core", "nbdkit-common", "nbdkit-proto", "nbdkit-tls"]),
        ("nbdkit-filters", &["nbdkit-core", "nbdkit-common"]),
        (
            "nbdkit-cli",
            &["nbdkit-core", "nbdkit-common", "nbdkit-loader", "nbdkit-plugins", "nbdkit-filters"],
        ),
        (
            "nbdkit-rs",
            &[
                "nbdkit-cli",
                "nbdkit-common",
                "nbdkit-core",
                "nbdkit-nbd",
                "nbdkit-fuse",
                "nbdkit-loader",
                "nbdkit-plugins",
                "nbdkit-filters",
            ],
        ),
        ("nbdkit-bench", &[]),
    ])
}

#[test]
fn arrows_point_downward() {
    let output = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("run cargo metadata");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    let allowed = allowed();
    let ours: Vec<_> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    assert_eq!(ours.len(), allowed.len(), "the table above does not name every package: {ours:?}");
    for package in packages {
        let name = package["name"].as_str().expect("a name");
        let may = allowed.get(name).unwrap_or_else(|| panic!("{name} is in no layer"));
        for dependency in package["dependencies"].as_array().expect("dependencies") {
            let on = dependency["name"].as_str().expect("a name");
            let in_tests_only = dependency["kind"] == "dev";
            if ours.contains(&on) && !in_tests_only {
                assert!(may.contains(&on), "{name} must not depend on {on}");
            }
        }
    }
}
