//! What `-D data.AST=1` shows: the tree that the text of `data=` was read as, in the language itself.

use super::parser::{Atom, Item, List, Operator, Seek, Term};

/// Bytes of a string that are shown.
const SHOWN: usize = 256;
/// Lines that are shown: a list may be in a tree many times.
const LINES: usize = 1000;

/// The tree as lines of text, lists indented. What is too long is cut off with `...`.
pub(super) fn lines(list: &List) -> Vec<String> {
    let mut lines = Lines(Vec::new());
    lines.list(list, 0, "");
    if lines.0.len() > LINES {
        lines.0.truncate(LINES);
        lines.0.push("...".into());
    }
    lines.0
}

struct Lines(Vec<String>);

impl Lines {
    fn line(&mut self, depth: usize, text: &str) {
        self.0.push(format!("{:width$}{text}", "", width = depth * 4));
    }

    fn list(&mut self, list: &List, depth: usize, after: &str) {
        self.line(depth, "(");
        for item in &list.0 {
            if self.0.len() > LINES {
                return;
            }
            match item {
                Item::Seek(seek) => self.line(depth + 1, &shown(*seek)),
                Item::Put(term) => self.term(term, depth + 1, ""),
                Item::Assign(term, name) => self.term(term, depth + 1, &format!(" -> \\{name}")),
            }
        }
        self.line(depth, &format!("){after}"));
    }

    fn term(&mut self, term: &Term, depth: usize, after: &str) {
        let operators = term.operators.iter().map(|operator| match operator {
            Operator::Repeat(count) => format!("*{count}"),
            Operator::Slice(from, to) => {
                format!("[{from}:{}]", to.map_or_else(String::new, |to| to.to_string()))
            }
        });
        let after = operators.collect::<String>() + after;
        match &term.atom {
            Atom::Bytes(bytes) => self.line(depth, &(string(bytes) + &after)),
            Atom::File(path) => self.line(depth, &format!("<{}{after}", path.display())),
            Atom::Script(script) => self.line(depth, &format!("<({}){after}", script.display())),
            Atom::Name(name) => self.line(depth, &format!("\\{name}{after}")),
            Atom::List(list) => self.list(list, depth, &after),
        }
    }
}

fn shown(seek: Seek) -> String {
    match seek {
        Seek::To(to) => format!("@{to}"),
        Seek::Forward(by) => format!("@+{by}"),
        Seek::Back(by) => format!("@-{by}"),
        Seek::Align(to) => format!("@^{to}"),
    }
}

/// A byte as a number, more of them as a string.
fn string(bytes: &[u8]) -> String {
    if let [byte] = bytes {
        return byte.to_string();
    }
    let text: String = bytes.iter().take(SHOWN).map(|byte| escaped(*byte)).collect();
    format!("\"{text}\"{}", if bytes.len() > SHOWN { "..." } else { "" })
}

fn escaped(byte: u8) -> String {
    match byte {
        b'"' | b'\\' => format!("\\{}", byte as char),
        b' '..=b'~' => (byte as char).into(),
        _ => format!("\\x{byte:02x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::parser::parse, *};

    fn tree(text: &str) -> Result<List, String> {
        parse(text.as_bytes(), |name| (name == "x").then(|| "1 2".into())).map_err(|e| e.to_string())
    }

    #[test]
    fn a_tree_reads_as_itself() {
        for text in [
            "",
            "1 2 \"a\\\\\\\"\\x00b\"",
            "(1 (2 3)*4[1:7])[:2] -> \\a \\a*3 @4 @+1 @-2 @^512",
            "<file[3:] <(echo (a) b)[:7]",
            "$x*2 be64:5 base64:aGVsbG8=",
        ] {
            let list = tree(text).unwrap();
            let shown = lines(&list).join("\n");
            let again = tree(&shown).unwrap();
            // One more list than before, which is the whole.
            assert_eq!(lines(&again).len(), lines(&list).len() + 2, "{shown}");
            let Some(Item::Put(Term { atom: Atom::List(inner), operators })) = again.0.first() else {
                panic!("{shown}")
            };
            assert_eq!((&**inner, operators.len()), (&list, 0), "{shown}");
        }
    }

    #[test]
    fn what_is_shown_is_bounded() {
        // Each name is the one before twice.
        let doubled = |name: &str| {
            let n: u32 = name[1..].parse().ok()?;
            Some(if n == 0 { "1".into() } else { format!("$x{0} $x{0}", n - 1).into() })
        };
        let lines = lines(&parse(b"$x40", doubled).unwrap());
        assert_eq!((lines.len(), lines[LINES].as_str()), (LINES + 1, "..."));
        assert!(string(&[b'a'; 100_000]).len() < 300);
    }
}
