//! Documentation keeps up with the registries: every bundled layer has a man page that scdoc can render, and
//! every page belongs to something.

use std::{
    collections::BTreeSet,
    path::Path,
    process::{Command, Stdio},
};

/// The pages about matters that concern several layers.
const TOPICS: [&str; 11] = [
    "captive.1",
    "client.1",
    "functions.3",
    "loop.1",
    "migration.7",
    "probing.1",
    "protocol.1",
    "security.1",
    "service.1",
    "tls.1",
    "tracing.3",
];

fn pages() -> BTreeSet<String> {
    let man = Path::new(env!("CARGO_MANIFEST_DIR")).join("man");
    std::fs::read_dir(man)
        .expect("the folder man")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .collect()
}

#[test]
fn every_layer_has_a_page_and_every_page_a_layer() {
    // How to write a script is a matter of section 3.
    let section = |name: &str| if name == "sh" { 3 } else { 1 };
    let plugins = nbdkit_plugins::names().map(|name| format!("nbdkit-{name}-plugin.{}.scd", section(name)));
    let filters = nbdkit_filters::names().map(|name| format!("nbdkit-{name}-filter.1.scd"));
    let programs = [
        "nbdkit.1.scd",
        "nbdkit-mount.1.scd",
        "mount.nbdkit.8.scd",
        "nbdkit-plugin.3.scd",
        "nbdkit-filter.3.scd",
        "nbdkit-cc-plugin.1.scd",
        "nbdkit-rust-plugin.3.scd",
        "nbdkit-lua-plugin.3.scd",
        "nbdkit-ocaml-plugin.3.scd",
        "nbdkit-python-plugin.3.scd",
    ]
    .map(String::from);
    // What is about no layer.
    let topics = TOPICS.map(|topic| format!("nbdkit-{topic}.scd"));
    let wanted: BTreeSet<String> = plugins.chain(filters).chain(programs).chain(topics).collect();
    assert_eq!(pages(), wanted);
}

#[test]
fn every_page_renders() {
    for page in pages() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("man").join(&page);
        let source = std::fs::File::open(&path).expect("open the page");
        let output = Command::new("scdoc")
            .stdin(source)
            .stderr(Stdio::piped())
            .output()
            .expect("run scdoc (package scdoc)");
        assert!(output.status.success(), "{page}: {}", String::from_utf8_lossy(&output.stderr));
        let title = format!(".TH \"{}\"", page.rsplitn(3, '.').last().expect("a name"));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains(&title), "{page} is called something else");
    }
}

/// Options are documented where users look.
#[test]
fn every_option_is_in_its_page() {
    for (program, page) in [
        (env!("CARGO_BIN_EXE_nbdkit"), "nbdkit.1.scd"),
        (env!("CARGO_BIN_EXE_nbdkit-mount"), "nbdkit-mount.1.scd"),
    ] {
        let output = Command::new(program).arg("--help").output().expect("run the program");
        let help = String::from_utf8(output.stdout).expect("UTF-8");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("man").join(page);
        let text = std::fs::read_to_string(path).expect("the page").replace('\\', "");
        let options: Vec<&str> = help
            .lines()
            .filter(|line| line.trim_start().starts_with('-'))
            .filter_map(|line| line.split([' ', ',', '=', '<']).find(|word| word.starts_with("--")))
            .collect();
        assert!(options.len() > 10, "{help}");
        for option in options {
            assert!(text.contains(option), "{page} does not explain {option}");
        }
    }
}

/// The site has every page, and no link to one that it has not.
#[test]
fn the_site_is_whole() {
    let dir = crate::util::temp();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/site");
    let output = Command::new(script).arg(dir.path()).arg("--sources").output().expect("run scripts/site");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let sources = dir.path().join("sources");
    let summary = std::fs::read_to_string(sources.join("SUMMARY.md")).expect("the summary");
    let links: BTreeSet<&str> =
        summary.split("](").skip(1).filter_map(|rest| rest.split(')').next()).collect();
    for link in &links {
        let page = std::fs::read_to_string(sources.join(link)).unwrap_or_else(|e| panic!("{link}: {e}"));
        assert!(page.len() > 300, "{link} is empty");
        assert!(!page.contains("test: "), "{link} shows what is for the tests");
        // References between manual pages lead somewhere.
        for target in page.split("<a href=\"").skip(1).filter_map(|rest| rest.split('"').next()) {
            if let Some(target) = target.strip_suffix(".html") {
                assert!(sources.join("man").join(format!("{target}.md")).exists(), "{link}: {target}");
            }
        }
    }
    for page in pages() {
        let page = format!("man/{}", page.replace(".scd", ".md"));
        assert!(links.contains(&*page), "{page} is not in the summary");
    }
}
