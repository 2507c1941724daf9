//! What the bundled plugins show, beside the distribution's nbdkit where it has them.

mod curl;
mod data;
mod examples;
mod made;
mod memory;
mod nbd;

use crate::util::{NBDKIT, Run, run};

/// The C nbdkit.
const C_NBDKIT: &str = "nbdkit";

/// Runs a shell command while `program` serves a disk: `$uri` leads to it.
fn captive(program: &str, words: &[&str], command: &str) -> Run {
    let before = [program, "-U", "-"];
    run(before.into_iter().chain(words.iter().copied()).chain(["--run", command]))
}

/// What a command prints while each server serves the disk: ours and that of the C nbdkit.
fn both(words: &[&str], command: &str) -> [String; 2] {
    [NBDKIT, C_NBDKIT].map(|program| captive(program, words, command).ok())
}
