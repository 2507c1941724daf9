//! Reads what scripts print.

use std::{
    ffi::{CString, OsStr, OsString},
    os::unix::ffi::{OsStrExt, OsStringExt},
};

use nbdkit_core::{BlockSize, Errno, Error, Exports, Extents, Result, Support, ThreadModel, params};

fn bad(method: &str, what: impl std::fmt::Display) -> Error {
    Error::new(Errno::EIO, format!("the {method} script printed something else than {what}"))
}

/// One line, without its end.
fn line(output: &[u8]) -> &[u8] {
    output.strip_suffix(b"\n").unwrap_or(output)
}

fn quoted(output: &[u8]) -> String {
    const LONGEST: usize = 100;
    let text = String::from_utf8_lossy(line(output));
    let short: String = text.chars().take(LONGEST).collect();
    if short.len() < text.len() { format!("'{short}…'") } else { format!("'{short}'") }
}

/// A word for further calls: a handle.
pub(super) fn handle(output: &[u8]) -> Result<CString> {
    CString::new(line(output)).map_err(|_| bad("open", "a handle: it holds a NUL byte"))
}

/// A line for people.
pub(super) fn text(output: &[u8]) -> String {
    String::from_utf8_lossy(line(output)).into_owned()
}

/// A size, as parameters have it.
pub(super) fn size(output: &[u8]) -> Result<u64> {
    params::size(OsStr::from_bytes(line(output)))
        .map_err(|_| bad("get_size", format_args!("a size such as 1048576 or 1M: {}", quoted(output))))
}

/// Three sizes.
pub(super) fn block_size(output: &[u8]) -> Result<BlockSize> {
    let mut sizes = words(output).map(|word| {
        let size = params::size(OsStr::from_bytes(word)).ok()?;
        u32::try_from(size).ok()
    });
    let mut next = || sizes.next().flatten();
    match (next(), next(), next()) {
        (Some(minimum), Some(preferred), Some(maximum)) => Ok(BlockSize { minimum, preferred, maximum }),
        _ => Err(bad(
            "block_size",
            format_args!("the minimum, preferred and maximum block size: {}", quoted(output)),
        )),
    }
}

/// How something is offered.
pub(super) fn support(method: &str, output: &[u8]) -> Result<Support> {
    let word = line(output);
    [("none", Support::None), ("emulate", Support::Emulate), ("native", Support::Native)]
        .into_iter()
        .find(|(name, _)| word.eq_ignore_ascii_case(name.as_bytes()))
        .map(|(_, support)| support)
        .ok_or_else(|| bad(method, format_args!("none, emulate or native: {}", quoted(output))))
}

/// A thread model; None for words that are not known.
pub(super) fn thread_model(output: &[u8]) -> Option<ThreadModel> {
    let word = std::str::from_utf8(line(output)).ok()?;
    word.to_ascii_lowercase().parse().ok()
}

/// A parameter's name; None: there is none.
pub(super) fn key(output: &[u8]) -> Option<String> {
    let word = std::str::from_utf8(line(output)).ok()?;
    params::is_key(word).then(|| word.to_owned())
}

fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty())
}

/// A list of exports, whose first line may say how names and descriptions are arranged.
pub(super) fn exports(output: &[u8]) -> Result<Exports> {
    let mut lines: Vec<&[u8]> = line(output).split(|b| *b == b'\n').collect();
    if output.is_empty() {
        lines.clear();
    }
    let arrangement = lines.first().copied().unwrap_or_default();
    let described: Vec<(&[u8], Option<&[u8]>)> = match arrangement {
        b"INTERLEAVED" => lines[1..].chunks(2).map(|pair| (pair[0], pair.get(1).copied())).collect(),
        b"NAMES+DESCRIPTIONS" => {
            let (names, descriptions) = lines[1..].split_at(lines.len() / 2);
            let descriptions = descriptions.iter().copied().map(Some).chain(std::iter::repeat(None));
            names.iter().copied().zip(descriptions).collect()
        }
        b"NAMES" => lines[1..].iter().map(|name| (*name, None)).collect(),
        _ => lines.iter().map(|name| (*name, None)).collect(),
    };
    let mut exports = Exports::new();
    for (name, description) in described {
        exports.add(OsString::from_vec(name.to_vec()), description.map(text))?;
    }
    Ok(exports)
}

/// Lines of `OFFSET LENGTH [TYPE]`.
pub(super) fn extents(output: &[u8], extents: &mut Extents) -> Result<()> {
    for text in line(output).split(|b| *b == b'\n').filter(|_| !output.is_empty()) {
        let mut words = words(text);
        let mut size = || params::size(OsStr::from_bytes(words.next()?)).ok();
        let (Some(offset), Some(length)) = (size(), size()) else {
            return Err(bad("extents", format_args!("lines of OFFSET LENGTH [TYPE]: {}", quoted(text))));
        };
        let (hole, zero) = kind(words.next().unwrap_or_default());
        extents.add(offset, length, hole, zero)?;
    }
    Ok(())
}

/// The type of an extent: a number, or words of which unknown ones mean nothing.
fn kind(word: &[u8]) -> (bool, bool) {
    if let Some(bits) = std::str::from_utf8(word).ok().and_then(|word| word.parse::<i64>().ok()) {
        return (bits & 1 != 0, bits & 2 != 0);
    }
    let has = |name: &str| word.split(|b| *b == b',').any(|part| part.eq_ignore_ascii_case(name.as_bytes()));
    (has("hole"), has("zero"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size(b"1M\n").unwrap(), 1 << 20);
        assert_eq!(size(b"0").unwrap(), 0);
        for wrong in [&b""[..], b"\n", b"x", b"1\n2\n", b"-1", b"\xff"] {
            let message = size(wrong).unwrap_err().to_string();
            assert!(message.contains("get_size script printed something else than a size"), "{message}");
        }
        let long = size(&[b'x'; 5000]).unwrap_err().to_string();
        assert!(long.len() < 300, "{long}");
        let BlockSize { minimum, preferred, maximum } = block_size(b"512\n4k 4294967295 more\n").unwrap();
        assert_eq!((minimum, preferred, maximum), (512, 4096, u32::MAX));
        for wrong in [&b""[..], b"1 4k", b"1 4k -1", b"1 4k 8G"] {
            assert!(block_size(wrong).is_err());
        }
    }

    #[test]
    fn words_with_a_meaning() {
        assert_eq!(support("can_fua", b"Native\n").unwrap(), Support::Native);
        assert_eq!(support("can_fua", b"none").unwrap(), Support::None);
        assert!(support("can_fua", b"").unwrap_err().to_string().contains("can_fua"));
        assert_eq!(thread_model(b"parallel\n"), Some(ThreadModel::Parallel));
        assert_eq!(thread_model(b"fast\n"), None);
        assert_eq!(key(b"size\n").as_deref(), Some("size"));
        assert_eq!(key(b"a b\n"), None);
        assert_eq!(handle(b"a\n\n").unwrap().as_bytes(), b"a\n");
        assert!(handle(b"a\0b").is_err());
        assert_eq!(text(b"a\nb\n\n"), "a\nb\n");
    }

    #[test]
    fn exports_come_in_four_forms() {
        let list = |output: &str| {
            let exports = exports(output.as_bytes()).unwrap();
            let texts = exports.as_slice().iter().map(|e| {
                let description = e.description.as_deref().unwrap_or("-");
                format!("{}:{description}", e.name.display())
            });
            texts.collect::<Vec<_>>().join(" ")
        };
        assert_eq!(list("NAMES\na\nb\n"), "a:- b:-");
        assert_eq!(list("a\nb"), "a:- b:-");
        assert_eq!(list("INTERLEAVED\na\n1\nb\n"), "a:1 b:-");
        assert_eq!(list("NAMES+DESCRIPTIONS\na\nb\n1\n2\n"), "a:1 b:2");
        assert_eq!(list("NAMES+DESCRIPTIONS\na\nb\n1\n"), "a:1 b:-");
        assert_eq!(list("NAMES+DESCRIPTIONS\n"), "");
        assert_eq!(list("\nx\n"), ":- x:-");
        for empty in ["", "NAMES", "NAMES\n", "INTERLEAVED\n"] {
            assert_eq!(list(empty), "");
        }
        assert!(exports("x\n".repeat(Exports::MAX + 1).as_bytes()).is_err());
    }

    #[test]
    fn extents_have_types() {
        let list = |output: &str| {
            let mut list = Extents::new(0, 1 << 20);
            extents(output.as_bytes(), &mut list).map_err(|e| e.to_string())?;
            Ok::<_, String>(list.as_slice().iter().map(|e| (e.length, e.kind())).collect::<Vec<_>>())
        };
        for (kind, want) in
            [("", 0), ("3", 3), ("7", 3), ("hole", 1), ("zero,HOLE", 3), ("hole,x", 1), ("data", 0)]
        {
            assert_eq!(list(&format!(" 0\t1M {kind} ignored\n")), Ok(vec![(1 << 20, want)]), "{kind}");
        }
        assert_eq!(list("0 512K\n512K 512K zero\n"), Ok(vec![(1 << 19, 0), (1 << 19, 2)]));
        assert_eq!(list(""), Ok(vec![]));
        for wrong in ["0", "x 1M", "\n0 1M", "-1 1M"] {
            assert!(list(wrong).unwrap_err().contains("lines of OFFSET LENGTH"), "{wrong}");
        }
        assert!(list("512 1M").unwrap_err().contains("first extent"));
    }
}
