//! Chains within a chain: `[ --filter=FILTER... PLUGIN KEY=VALUE... ]` in one word of a command line.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::{OsStrExt as _, OsStringExt as _},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail, ensure};
use nbdkit_core::{Chain, ChainMaker};
use nbdkit_loader::DebugFlags;

use crate::chain::{configure, load};

/// What plugins make chains with.
pub(crate) fn maker() -> Arc<dyn ChainMaker> {
    Arc::new(Maker)
}

struct Maker;

impl ChainMaker for Maker {
    fn make(&self, text: &OsStr) -> Result<Chain> {
        let words = words(text)?;
        let (filters, rest) = filters(&words)?;
        let (plugin, parameters) =
            rest.split_first().context("'[ ]' names no plugin: [ PLUGIN KEY=VALUE... ]")?;
        let mut chain = load(plugin, &filters, DebugFlags::default())?;
        configure(&mut chain, parameters)?;
        Ok(chain)
    }
}

/// The words between the brackets.
fn words(text: &OsStr) -> Result<Vec<OsString>> {
    let bytes = text.as_bytes().trim_ascii();
    let inside = bytes.strip_prefix(b"[").and_then(|rest| rest.strip_suffix(b"]"));
    let inside = inside.context("what begins with [ ends with ]: '[ PLUGIN KEY=VALUE... ]'")?;
    let words = shlex::bytes::split(inside).context("a quote is not closed")?;
    Ok(words.into_iter().map(OsString::from_vec).collect())
}

/// The filters in front, and the words behind them.
fn filters(words: &[OsString]) -> Result<(Vec<OsString>, &[OsString])> {
    let (mut filters, mut rest) = (Vec::new(), words);
    while let [word, after @ ..] = rest {
        let name = match word.as_bytes().strip_prefix(b"--filter") {
            Some([b'=', name @ ..]) => OsStr::from_bytes(name).to_owned(),
            Some([]) => {
                let name = after.first().context("--filter needs the name of a filter: --filter=FILTER")?;
                filters.push(name.clone());
                rest = &after[1..];
                continue;
            }
            _ if word.as_bytes().starts_with(b"-") => {
                bail!("'{}' cannot stand in brackets: only --filter=FILTER can", word.display());
            }
            _ => break,
        };
        ensure!(!name.is_empty(), "--filter= needs the name of a filter");
        filters.push(name);
        rest = after;
    }
    Ok((filters, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<(Vec<String>, Vec<String>)> {
        let words = words(OsStr::new(text))?;
        let (filters, rest) = filters(&words)?;
        let text =
            |words: &[OsString]| words.iter().map(|word| word.to_string_lossy().into_owned()).collect();
        Ok((text(&filters), text(rest)))
    }

    #[test]
    fn words_and_filters() {
        let (filters, rest) = parsed(" [ --filter=a --filter b plugin 'x y' k=\"v]\" --filter=c]").unwrap();
        assert_eq!(filters, ["a", "b"]);
        assert_eq!(rest, ["plugin", "x y", "k=v]", "--filter=c"]);
        assert_eq!(parsed("[plugin]").unwrap().1, ["plugin"]);
        for (text, message) in [
            ("[ a", "ends with ]"),
            ("[ 'a ]", "quote"),
            ("[ -v a ]", "'-v' cannot stand in brackets"),
            ("[ --filter ]", "needs the name"),
            ("[ --filter= a ]", "needs the name"),
            ("[ --filters=x a ]", "cannot stand in brackets"),
        ] {
            assert!(parsed(text).unwrap_err().to_string().contains(message), "{text}");
        }
    }
}
