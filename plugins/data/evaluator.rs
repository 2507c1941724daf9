//! From the tree to a value. Names are known from their assignment to the end of their list, and in the lists within.
//!
//! A name without files and scripts in it is evaluated once, when it is assigned; its error counts only when it is used.
//! Others are evaluated anew at each use, for a script may print something else each time.

use std::process::Stdio;

use anyhow::{Context as _, Result, anyhow, ensure};

use super::{
    parser::{Atom, Item, List, Operator, Seek, Term},
    sources,
    value::{Builder, Value, size_in_range},
};

/// How deep evaluation may go: names may stand for names.
const MAX_DEPTH: usize = 250;

/// Evaluates the whole tree. Scripts have `stdin`.
///
/// # Errors
/// Offsets and slices out of range, names that are not known, files and scripts that fail.
pub(super) fn evaluate(list: &List, stdin: fn() -> Stdio) -> Result<Value> {
    Evaluator { stdin }.list(list, None, 0)
}

struct Evaluator {
    stdin: fn() -> Stdio,
}

/// The names of one list that is being evaluated.
struct Scope<'a> {
    outer: Option<View<'a>>,
    names: Vec<(&'a str, Binding<'a>)>,
}

/// The names that were known at some moment: those of a scope that came before the one of that index.
#[derive(Clone, Copy)]
struct View<'a> {
    scope: &'a Scope<'a>,
    length: usize,
}

enum Binding<'a> {
    /// The error as text, since it may be needed more than once.
    Known(Result<Value, String>),
    Again(&'a Term),
}

impl<'a> View<'a> {
    /// What a name stands for, and the names that were known when it was assigned.
    fn find(self, name: &str) -> Option<(&'a Binding<'a>, View<'a>)> {
        let known = self.scope.names.get(..self.length)?;
        match known.iter().rposition(|(known, _)| *known == name) {
            Some(index) => Some((&known[index].1, View { length: index, ..self })),
            None => self.scope.outer?.find(name),
        }
    }
}

impl Evaluator {
    fn list(&self, list: &List, outer: Option<View<'_>>, depth: usize) -> Result<Value> {
        ensure!(depth < MAX_DEPTH, "data parameter: names are nested more than {MAX_DEPTH} deep");
        let mut builder = Builder::default();
        let mut scope = Scope { outer, names: Vec::new() };
        for item in &list.0 {
            let view = View { scope: &scope, length: scope.names.len() };
            match item {
                Item::Seek(seek) => {
                    let offset = target(*seek, builder.offset())?;
                    builder.seek(offset);
                }
                Item::Put(term) => builder.put(self.term(term, view, depth)?)?,
                Item::Assign(term, name) => {
                    let binding = if is_pure(term, view) {
                        Binding::Known(self.term(term, view, depth).map_err(|e| format!("{e:#}")))
                    } else {
                        Binding::Again(term)
                    };
                    scope.names.push((name, binding));
                }
            }
        }
        builder.finish()
    }

    fn term(&self, term: &Term, view: View<'_>, depth: usize) -> Result<Value> {
        let first = term.operators.first();
        let mut rest = term.operators.as_slice();
        let mut value = match (source(&term.atom), first) {
            // Only the part that is wanted is read.
            (Some(Atom::File(path)), Some(Operator::Slice(from, to))) => {
                rest = &rest[1..];
                sources::file(path, *from..to.unwrap_or(u64::MAX))?
            }
            (Some(Atom::Script(script)), Some(Operator::Slice(0, to))) => {
                rest = &rest[1..];
                sources::script(script, Some(to.unwrap_or(u64::MAX)), (self.stdin)())?
            }
            (_, _) => self.atom(&term.atom, view, depth)?,
        };
        for operator in rest {
            value = match operator {
                Operator::Repeat(count) => value.repeat(*count)?,
                Operator::Slice(from, to) => {
                    let to = to.unwrap_or(value.size());
                    ensure!(*from <= to && to <= value.size(), "[N:M] does not describe a valid slice");
                    value.slice(*from, to)
                }
            };
        }
        Ok(value)
    }

    fn atom(&self, atom: &Atom, view: View<'_>, depth: usize) -> Result<Value> {
        match atom {
            Atom::Bytes(bytes) => Ok(Value::bytes(bytes)),
            Atom::File(path) => sources::file(path, 0..u64::MAX),
            Atom::Script(script) => sources::script(script, None, (self.stdin)()),
            Atom::List(list) => self.list(list, Some(view), depth + 1),
            Atom::Name(name) => match view.find(name) {
                None => Err(anyhow!("\\{name} not defined")),
                Some((Binding::Known(value), _)) => value.clone().map_err(anyhow::Error::msg),
                Some((Binding::Again(term), then)) => {
                    ensure!(depth < MAX_DEPTH, "data parameter: names are nested more than {MAX_DEPTH} deep");
                    self.term(term, then, depth + 1)
                }
            },
        }
    }
}

/// The file or script that an atom is, within parentheses too.
fn source(mut atom: &Atom) -> Option<&Atom> {
    loop {
        match atom {
            Atom::File(_) | Atom::Script(_) => return Some(atom),
            Atom::List(list) => match list.0.as_slice() {
                [Item::Put(term)] if term.operators.is_empty() => atom = &term.atom,
                _ => return None,
            },
            Atom::Bytes(_) | Atom::Name(_) => return None,
        }
    }
}

/// Whether evaluating a term again would give the same, and has no effect.
fn is_pure(term: &Term, view: View<'_>) -> bool {
    match &term.atom {
        Atom::Bytes(_) => true,
        Atom::File(_) | Atom::Script(_) => false,
        // A name that is not known is one of an inner list.
        Atom::Name(name) => view.find(name).is_none_or(|(binding, _)| matches!(binding, Binding::Known(_))),
        Atom::List(list) => list.0.iter().all(|item| match item {
            Item::Seek(_) => true,
            Item::Put(term) | Item::Assign(term, _) => is_pure(term, view),
        }),
    }
}

fn target(seek: Seek, offset: u64) -> Result<u64> {
    match seek {
        Seek::To(to) => Ok(to),
        Seek::Forward(by) => size_in_range(offset.checked_add(by)),
        Seek::Back(by) => offset.checked_sub(by).with_context(|| {
            format!("data parameter @-{by} must not be larger than the current offset {offset}")
        }),
        Seek::Align(to) => size_in_range(offset.checked_next_multiple_of(to)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::parser::parse, *};

    fn evaluated(text: &str) -> Result<Vec<u8>> {
        let value = evaluate(&parse(text.as_bytes(), |_| None)?, Stdio::null)?;
        let mut bytes = vec![0xee; value.size() as usize];
        value.write(&mut bytes, 0)?;
        Ok(bytes)
    }

    #[test]
    fn offsets_lists_and_operators() {
        for (text, want) in [
            ("", &[][..]),
            ("1 2 @5", &[1, 2, 0, 0, 0]),
            ("1 2 3 @-2 9", &[1, 9, 3]),
            ("1 @^4 2 @+1 3", &[1, 0, 0, 0, 2, 0, 3]),
            ("@3 @-3", &[0, 0, 0]),
            ("7*4 @0 (@1 1)", &[0, 1, 7, 7]),
            ("(1 2)*2[1:3]*2", &[2, 1, 2, 1]),
            ("@2 (@1 1)*2", &[0, 0, 0, 1, 0, 1]),
            ("1*0 ()*9 2[1:]", &[]),
            ("()*9223372036854775807 (1*1000000*0)*5", &[]),
            ("1->\\a \\a (\\a 2)->\\b \\b", &[1, 1, 2]),
            ("1->\\a (\\a \\a)->\\b 2->\\a \\b \\a", &[1, 1, 2]),
            ("1->\\a (2->\\a \\a) \\a", &[2, 1]),
            ("(1->\\a \\a)*2", &[1, 1]),
            ("</nonexistent ->\\a <(false)->\\b (\\nope)->\\c 1[2:]->\\d 5", &[5]),
            ("<(echo a)->\\a \\a[:1]*2 (\\a)->\\b \\b", b"aaa\n"),
            ("<(exit 1)[:4] (<(echo a; exit 1))[0:1]", b"a"),
        ] {
            assert_eq!(evaluated(text).unwrap_or_else(|e| panic!("{text}: {e:#}")), want, "{text}");
        }
    }

    #[test]
    fn a_script_runs_at_each_use() {
        let dir = tempfile::tempdir().unwrap();
        let count = dir.path().join("count");
        let text = format!("<(echo >> {0}; wc -l < {0})->\\n (\\n)->\\m \\m \\n \\n*2", count.display());
        assert_eq!(evaluated(&text).unwrap(), b"1\n2\n3\n3\n");
    }

    #[test]
    fn errors_say_what_is_wrong() {
        for (text, message) in [
            ("@-1", "@-1 must not be larger than the current offset 0"),
            ("(1 2)[1:3]", "[N:M] does not describe a valid slice"),
            ("1[2:]", "[N:M] does not describe a valid slice"),
            ("\\a", "\\a not defined"),
            ("(1->\\a) \\a", "\\a not defined"),
            ("\\a ->\\b 1->\\a \\b", "\\a not defined"),
            ("</nonexistent", "/nonexistent: No such file"),
            ("<(exit 1)", "external command failed"),
            ("<(echo hi; exit 1)[1:]", "external command failed"),
            ("@9223372036854775807 1", "larger than 2^63-1"),
            ("@9223372036854775807 @+1", "larger than 2^63-1"),
            ("@0x7fffffffffffffff @^8", "larger than 2^63-1"),
            ("((1 2)*4611686018427387904)*2", "larger than 2^63-1"),
        ] {
            let error = format!("{:#}", evaluated(text).expect_err(text));
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    #[test]
    fn names_of_names_take_no_time() {
        // Each is as long as two of the one before.
        let text: String = (1..60).map(|n| format!("(\\a{} \\a{})->\\a{n} ", n - 1, n - 1)).collect();
        let list = parse(format!("1->\\a0 {text} \\a59").as_bytes(), |_| None).unwrap();
        assert_eq!(evaluate(&list, Stdio::null).unwrap().size(), 1 << 59);
        let chain: String = (1..1000).map(|n| format!("\\a{} ->\\a{n} ", n - 1)).collect();
        let error = evaluated(&format!("<(echo)->\\a0 {chain} \\a999")).unwrap_err().to_string();
        assert!(error.contains("nested more than"), "{error}");
        assert_eq!(evaluated(&format!("1->\\a0 {chain} \\a999")).unwrap(), [1]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn random_lists_agree_with_a_simple_model(items in prop::collection::vec((0_u8..5, 0_u64..30), 0..20)) {
            let (mut text, mut want, mut at) = (String::new(), Vec::<u8>::new(), 0);
            for (kind, n) in items {
                let bytes = match kind {
                    0 => { text += &format!("@{n} "); at = n as usize; vec![] }
                    1 => { text += &format!("@+{n} "); at += n as usize; vec![] }
                    2 => { text += &format!("{n} "); vec![n as u8] }
                    3 => { text += &format!("({n} 1)*{n}[:{n}] "); [n as u8, 1].repeat(n as usize)[..n as usize].into() }
                    _ => { text += &format!("{n}->\\x (\\x @3)*2 "); [n as u8, 0, 0].repeat(2) }
                };
                want.resize(want.len().max(at + bytes.len()), 0);
                want[at..at + bytes.len()].copy_from_slice(&bytes);
                at += bytes.len();
            }
            prop_assert_eq!(evaluated(&text).unwrap(), want);
        }
    }
}
