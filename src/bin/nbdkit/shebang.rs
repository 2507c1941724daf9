//! Scripts whose first line is `#!/usr/sbin/nbdkit WORDS`.
//!
//! The kernel passes all words after the interpreter as one argument, before the script's path. One word, the name of a
//! plugin, needs nothing more; several are taken apart here.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{BufRead, BufReader, Read},
    os::unix::ffi::OsStrExt,
};

/// Longest first line that the kernel reads.
const MAX_LINE: u64 = 256;

/// The command line, with the words of a script's first line taken apart.
pub(crate) fn command_line(words: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut words: Vec<_> = words.into_iter().collect();
    if let [_, combined, script, ..] = &words[..]
        && combined.as_bytes().contains(&b' ')
        && is_first_line(script, combined)
    {
        let apart = combined.as_bytes().split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        let apart: Vec<OsString> = apart.map(|word| OsStr::from_bytes(word).to_owned()).collect();
        words.splice(1..2, apart);
    }
    words
}

/// Whether a script's first line passes these words on.
fn is_first_line(script: &OsStr, words: &OsStr) -> bool {
    let mut line = Vec::new();
    let read =
        File::open(script).and_then(|file| BufReader::new(file.take(MAX_LINE)).read_until(b'\n', &mut line));
    let rest = read.ok().and_then(|_| line.strip_prefix(b"#!")).map(<[u8]>::trim_ascii);
    let after_interpreter = rest.and_then(|rest| {
        let end = rest.iter().position(u8::is_ascii_whitespace)?;
        rest.get(end..)
    });
    after_interpreter.is_some_and(|after| after.trim_ascii() == words.as_bytes().trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_words_of_a_script_are_taken_apart() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("script");
        std::fs::write(&script, "#! /usr/sbin/nbdkit -f -v  memory \nmore").unwrap();
        let script = script.to_str().unwrap();
        let line = |words: &[&str]| command_line(words.iter().map(OsString::from));
        assert_eq!(line(&["n", "-f -v  memory", script, "x"]), ["n", "-f", "-v", "memory", script, "x"]);
        assert_eq!(line(&["n", "-f memory", script]), ["n", "-f memory", script], "another line");
        assert_eq!(line(&["n", "-f -v  memory", "/none"]), ["n", "-f -v  memory", "/none"]);
        assert_eq!(line(&["n", "memory", script]), ["n", "memory", script]);
        assert_eq!(line(&["n"]), ["n"]);
    }
}
