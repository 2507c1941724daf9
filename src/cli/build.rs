//! Finds out the commit that the programs are built from, and what each layer is for, from the manual pages.

use std::{fmt::Write as _, path::Path, process::Command};

fn git(words: &[&str]) -> Option<String> {
    let output = Command::new("git").args(words).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

/// Writes PLUGINS and FILTERS: the names of layers with the lines that their pages have under NAME.
fn summaries(pages: &Path) -> std::io::Result<String> {
    let mut names: Vec<_> = std::fs::read_dir(pages)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("nbdkit-") && name.ends_with(".scd"))
        .collect();
    names.sort();
    let mut text = String::new();
    for (list, kind) in [("PLUGINS", "plugin"), ("FILTERS", "filter")] {
        let _ = writeln!(text, "static {list}: &[(&str, &str)] = &[");
        for name in &names {
            let page = name.split('.').next().unwrap_or_default();
            let Some(layer) = page.strip_prefix("nbdkit-").and_then(|rest| rest.strip_suffix(kind)) else {
                continue;
            };
            let Some(layer) = layer.strip_suffix('-') else { continue };
            let page = std::fs::read_to_string(pages.join(name))?;
            let line =
                page.lines().skip_while(|line| *line != "# NAME").find_map(|line| line.split_once(" - "));
            let summary = line.map_or("", |(_, summary)| summary).replace('\\', "");
            let _ = writeln!(text, "    ({layer:?}, {summary:?}),");
        }
        text += "];\n";
    }
    Ok(text)
}

fn main() {
    let pages = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../man");
    println!("cargo:rerun-if-changed={}", pages.display());
    let summaries = summaries(&pages).expect("the manual pages");
    let to = std::env::var_os("OUT_DIR").expect("OUT_DIR");
    std::fs::write(Path::new(&to).join("summaries.rs"), summaries).expect("write summaries.rs");

    // Packages are built from an archive, where who makes them may say.
    println!("cargo:rerun-if-env-changed=NBDKIT_COMMIT");
    let given = std::env::var("NBDKIT_COMMIT").ok().filter(|commit| !commit.is_empty());
    let commit = given.or_else(|| git(&["rev-parse", "--short=12", "HEAD"]));
    println!("cargo:rustc-env=NBDKIT_COMMIT={}", commit.as_deref().unwrap_or("unknown"));
    println!("cargo:rerun-if-changed=build.rs");
    // A commit appends to this file.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]).filter(|log| Path::new(log).exists()) {
        println!("cargo:rerun-if-changed={log}");
    }
}
