//! What stands for a disk on the command line in place of a plugin's name: a line of fstab(5), the URI of an NBD server, or
//! a server to run, `[ COMMAND ... ]`. Each becomes the words that it is short for.

use std::ffi::{OsStr, OsString};

use anyhow::{Context as _, Result};

/// Whether the words are what mount(8) makes of a line of fstab(5), `'PLUGIN [KEY=]VALUE ...' MOUNTPOINT`; then, the
/// words in the first, split as a shell does.
///
/// # Errors
/// An open quotation mark.
pub(crate) fn split_source(words: &[OsString]) -> Result<Option<Vec<OsString>>> {
    let [source, _] = words else { return Ok(None) };
    let Some(text) = source.to_str().filter(|text| text.contains(char::is_whitespace)) else {
        return Ok(None);
    };
    let split =
        shlex::split(text).with_context(|| format!("'{text}' has a quotation mark that is not closed"))?;
    Ok(Some(split.into_iter().map(OsString::from).collect()))
}

/// The command line with the words of the source in its place.
pub(crate) fn expand(line: &[OsString], source: &OsStr, words: Vec<OsString>) -> Vec<OsString> {
    let at = line.iter().rposition(|word| word == source).unwrap_or(line.len());
    let mut expanded = line[..at].to_vec();
    expanded.extend(words);
    expanded.extend(line.iter().skip(at + 1).cloned());
    expanded
}

/// The words that the first of `words` is short for, and the others; None: it is the name of a plugin.
///
/// # Errors
/// A command that is empty or not closed.
pub(crate) fn long_form(words: &[OsString]) -> Result<Option<Vec<OsString>>> {
    let Some((first, others)) = words.split_first() else { return Ok(None) };
    let text = first.to_str().unwrap_or_default();
    let mut long = if text == "[" {
        let end = others.iter().position(|word| word == "]").context(UNCLOSED)?;
        let mut long = server(&others[..end])?;
        long.extend_from_slice(&others[end + 1..]);
        return Ok(Some(long));
    } else if text.starts_with("[ ") {
        let inner = text[1..].trim_end().strip_suffix(" ]").context(UNCLOSED)?;
        let words = shlex::split(inner)
            .with_context(|| format!("'{text}' has a quotation mark that is not closed"))?;
        server(&words.into_iter().map(OsString::from).collect::<Vec<_>>())?
    } else if let Some((plugin, key)) = nbdkit_plugins::for_uri(text) {
        vec![plugin.into(), format!("{key}={text}").into()]
    } else {
        return Ok(None);
    };
    long.extend_from_slice(others);
    Ok(Some(long))
}

const UNCLOSED: &str =
    "'[' begins the command of a server, which ends with a word ']': [ qemu-nbd -f qcow2 disk.qcow2 ]";

/// A server to run, as parameters of the plugin nbd.
fn server(command: &[OsString]) -> Result<Vec<OsString>> {
    let (program, arguments) = command.split_first().context("there is no command between '[' and ']'")?;
    let parameter = |key: &str, value: &OsString| {
        let mut word = OsString::from(key);
        word.push(value);
        word
    };
    let arguments = arguments.iter().map(|argument| parameter("arg=", argument));
    Ok([OsString::from("nbd"), parameter("command=", program)].into_iter().chain(arguments).collect())
}

/// The command line with the words between brackets, whose options are not ours, in their long form.
///
/// # Errors
/// As [`long_form`].
pub(crate) fn without_brackets(line: Vec<OsString>) -> Result<Vec<OsString>> {
    let Some(at) = line.iter().position(|word| word == "[") else { return Ok(line) };
    let long = long_form(&line[at..])?.unwrap_or_default();
    Ok([&line[..at], &long].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &[&str]) -> Vec<OsString> {
        text.iter().map(OsString::from).collect()
    }

    #[test]
    fn a_line_of_fstab() {
        let split = |text: &[&str]| split_source(&words(text)).unwrap();
        assert_eq!(split(&["file 'file=/a b'", "/mnt"]), Some(words(&["file", "file=/a b"])));
        assert_eq!(split(&["file", "/mnt"]), None);
        assert_eq!(split(&["file x", "y", "/mnt"]), None);
        assert!(split_source(&words(&["file 'x", "/mnt"])).is_err());
        let line = words(&["nbdkit-mount", "-o", "ro", "file x", "/mnt", "-v"]);
        let expanded = expand(&line, OsStr::new("file x"), words(&["--filter=cow", "file", "x"]));
        assert_eq!(expanded, words(&["nbdkit-mount", "-o", "ro", "--filter=cow", "file", "x", "/mnt", "-v"]));
    }

    #[test]
    fn servers() {
        let long = |text: &[&str]| long_form(&words(text)).unwrap();
        assert_eq!(long(&["memory", "1M"]), None);
        assert_eq!(long(&["nbd://h/x", "retry=1"]), Some(words(&["nbd", "uri=nbd://h/x", "retry=1"])));
        let server = words(&["nbd", "command=qemu-nbd", "arg=-f", "arg=a b", "/mnt"]);
        assert_eq!(long(&["[", "qemu-nbd", "-f", "a b", "]", "/mnt"]), Some(server.clone()));
        assert_eq!(long(&["[ qemu-nbd -f 'a b' ]", "/mnt"]), Some(server));
        for bad in [&["[", "x"][..], &["[ x"], &["[", "]"], &["[ ]"], &["[ 'x ]"]] {
            assert!(long_form(&words(bad)).is_err(), "{bad:?}");
        }
        let line = without_brackets(words(&["nbdkit-mount", "-v", "[", "x", "-r", "]", "/mnt"])).unwrap();
        assert_eq!(line, words(&["nbdkit-mount", "-v", "nbd", "command=x", "arg=-r", "/mnt"]));
    }
}
