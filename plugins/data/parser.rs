//! From the text of `data=` to a tree. Nothing is read or run here but the text and the variables it names.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    rc::Rc,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::scanner::{Number, Scanner, is_space};

/// How deep lists and variables may be nested: parsing and evaluating them is recursive.
const MAX_DEPTH: usize = 250;

/// What is evaluated in order, each at the offset where the one before has ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct List(pub(super) Vec<Item>);

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// `@…`
    Seek(Seek),
    /// Written at the offset.
    Put(Term),
    /// `… -> \NAME`: not written.
    Assign(Term, Box<str>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seek {
    /// `@N`
    To(u64),
    /// `@+N`
    Forward(u64),
    /// `@-N`
    Back(u64),
    /// `@^N`, a power of 2
    Align(u64),
}

/// An atom and the operators behind it, which apply from left to right.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Term {
    pub(super) atom: Atom,
    pub(super) operators: Vec<Operator>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Atom {
    Bytes(Vec<u8>),
    /// `<FILE`
    File(PathBuf),
    /// `<(SCRIPT)`
    Script(OsString),
    /// `( … )` or `$VAR`
    List(Rc<List>),
    /// `\NAME`
    Name(Box<str>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operator {
    /// `*N`
    Repeat(u64),
    /// `[N:M]`; None: up to the end. N is not over M.
    Slice(u64, Option<u64>),
}

/// Parses the text; `variable` tells what `$VAR` stands for.
///
/// # Errors
/// What is wrong with it, and where.
pub(super) fn parse(text: &[u8], variable: impl Fn(&str) -> Option<OsString>) -> Result<List> {
    Parser { variable, known: HashMap::new(), depth: 0 }.list(&mut Scanner::new(text), false)
}

struct Parser<F> {
    variable: F,
    /// The variables met so far; None while one is being parsed.
    known: HashMap<String, Option<Rc<List>>>,
    depth: usize,
}

fn wrong<T>(offset: usize) -> Result<T> {
    bail!("data parameter: parsing error at offset {offset}")
}

/// Checks that a number is in the range of offsets.
fn unsigned(number: Number, negative: &str) -> Result<u64> {
    ensure!(number.value >= 0, "{negative} must not be negative");
    u64::try_from(number.value)
        .ok()
        .filter(|value| i64::try_from(*value).is_ok())
        .with_context(|| "data parameter: a number is over 2^63-1")
}

fn name(bytes: &[u8]) -> Option<Box<str>> {
    // It consists of ASCII characters only.
    Some(bytes).filter(|name| !name.is_empty()).map(|name| String::from_utf8_lossy(name).into())
}

impl<F: Fn(&str) -> Option<OsString>> Parser<F> {
    /// Up to the end of the text or the parenthesis that closes the list.
    fn list(&mut self, scanner: &mut Scanner<'_>, nested: bool) -> Result<List> {
        self.depth += 1;
        ensure!(self.depth <= MAX_DEPTH, "data parameter: lists are nested more than {MAX_DEPTH} deep");
        let mut items = Vec::new();
        while let Some(byte) = scanner.peek() {
            let start = scanner.position();
            match byte {
                byte if is_space(byte) => scanner.skip_space(),
                b'#' => drop(scanner.take_while(|byte| byte != b'\n')),
                b')' => {
                    ensure!(nested, "unmatched ')' in data string");
                    scanner.skip(1);
                    self.depth -= 1;
                    return Ok(List(items));
                }
                b'@' => items.push(Item::Seek(seek(scanner)?)),
                b'*' | b'[' => {
                    let (what, operator) =
                        if byte == b'*' { ("*N", repeat(scanner)?) } else { ("[N:M]", slice(scanner)?) };
                    match items.last_mut() {
                        Some(Item::Put(term)) => term.operators.push(operator),
                        Some(_) => bail!("{what} cannot be applied to this type of expression"),
                        None => bail!("{what} must follow an expression"),
                    }
                }
                b'-' => {
                    if !scanner.eat("->") {
                        return wrong(start + 1);
                    }
                    scanner.skip_space();
                    let name = if scanner.eat("\\") { defined_name(scanner) } else { None };
                    let Some(name) = name else { return wrong(start + 2) };
                    match items.pop() {
                        Some(Item::Put(term)) => items.push(Item::Assign(term, name)),
                        Some(_) => bail!("-> cannot be applied to this type of expression"),
                        None => bail!("-> must follow an expression"),
                    }
                }
                _ => items.push(Item::Put(Term { atom: self.atom(scanner, byte)?, operators: vec![] })),
            }
        }
        ensure!(!nested, "unmatched '(' in data string");
        self.depth -= 1;
        Ok(List(items))
    }

    fn atom(&mut self, scanner: &mut Scanner<'_>, first: u8) -> Result<Atom> {
        let start = scanner.position();
        Ok(match first {
            b'0'..=b'9' => Atom::Bytes(vec![byte(scanner)?]),
            b'b' if scanner.eat("base64:") => Atom::Bytes(base64(scanner, start)?),
            b'l' | b'b' => Atom::Bytes(word(scanner)?),
            b'"' => {
                scanner.skip(1);
                Atom::Bytes(scanner.string()?)
            }
            b'<' => source(scanner)?,
            b'(' => {
                scanner.skip(1);
                Atom::List(Rc::new(self.list(scanner, true)?))
            }
            b'\\' => {
                scanner.skip(1);
                let Some(name) = defined_name(scanner) else { return wrong(start) };
                Atom::Name(name)
            }
            b'$' => {
                scanner.skip(1);
                let digit = scanner.peek().is_some_and(|byte| byte.is_ascii_digit());
                let name = name(scanner.take_while(|byte| byte.is_ascii_alphanumeric() || byte == b'_'));
                let Some(name) = name.filter(|_| !digit) else { return wrong(start) };
                Atom::List(self.variable(&name)?)
            }
            _ => return wrong(start),
        })
    }

    /// Each variable is parsed once: several that name each other twice would take for ever otherwise.
    fn variable(&mut self, name: &str) -> Result<Rc<List>> {
        match self.known.get(name) {
            Some(Some(list)) => return Ok(list.clone()),
            Some(None) => bail!("${name}: the variable contains itself"),
            None => {}
        }
        let text = (self.variable)(name)
            .with_context(|| format!("${name}: variable not found: add {name}=VALUE to the parameters"))?;
        self.known.insert(name.to_owned(), None);
        let list = self.list(&mut Scanner::new(text.as_bytes()), false);
        let list = Rc::new(list.with_context(|| format!("${name}"))?);
        self.known.insert(name.to_owned(), Some(list.clone()));
        Ok(list)
    }
}

fn defined_name(scanner: &mut Scanner<'_>) -> Option<Box<str>> {
    name(scanner.take_while(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-')))
}

fn byte(scanner: &mut Scanner<'_>) -> Result<u8> {
    let value = scanner.number().map(|number| number.value);
    value
        .and_then(|value| u8::try_from(value).ok())
        .context("data parameter BYTE must be in the range 0..255")
}

/// The data behind `base64:`, in quotes or as far as its alphabet goes, so that operators may follow.
fn base64(scanner: &mut Scanner<'_>, start: usize) -> Result<Vec<u8>> {
    let text = if scanner.eat("\"") {
        let text = scanner.take_while(|byte| byte != b'"');
        ensure!(scanner.eat("\""), "data parameter: unterminated base64:\"...: add the closing '\"'");
        text
    } else {
        let text =
            scanner.take_while(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/' | b'='));
        ensure!(!text.is_empty(), "data parameter: base64: needs data, at offset {start}");
        text
    };
    super::decode_base64(text)
        .with_context(|| format!("data parameter: cannot decode base64: at offset {start}"))
}

/// `le16:N` and so on.
fn word(scanner: &mut Scanner<'_>) -> Result<Vec<u8>> {
    let start = scanner.position();
    let forms = ["le16:", "le32:", "le64:", "be16:", "be32:", "be64:"];
    let Some(form) = forms.into_iter().find(|form| scanner.eat(form)) else {
        bail!("data parameter: expected \"le16/32/64:\" or \"be16/32/64:\" at offset {start}");
    };
    let text = scanner.take_while(|byte| !is_space(byte));
    let shown = String::from_utf8_lossy(text);
    ensure!(!text.is_empty(), "data: empty string where we expected a number");
    let mut inside = Scanner::new(text);
    let number = inside.number().filter(|_| inside.rest().is_empty() && !text.ends_with(b"x"));
    let Some(number) = number else { bail!("data: could not parse number: \"{shown}\": trailing garbage") };
    ensure!(number.value >= 0, "data: negative numbers are not allowed");
    let bits = match form.as_bytes()[2] {
        b'1' => 16,
        b'3' => 32,
        _ => 64,
    };
    let value = u64::try_from(number.value).ok().filter(|value| bits == 64 || value >> bits == 0);
    let value = value.with_context(|| {
        format!("data: could not parse number: \"{shown}\": Numerical result out of range")
    })?;
    let length = bits / 8;
    Ok(match form.starts_with("le") {
        true => value.to_le_bytes()[..length].to_vec(),
        false => value.to_be_bytes()[8 - length..].to_vec(),
    })
}

fn source(scanner: &mut Scanner<'_>) -> Result<Atom> {
    scanner.skip(1);
    let start = scanner.position();
    if scanner.eat("(") {
        let script = scanner.parenthesized().filter(|script| !script.is_empty());
        let Some(script) = script else { return wrong(start + 1) };
        return Ok(Atom::Script(OsStr::from_bytes(script).to_owned()));
    }
    let file = scanner.take_while(|byte| !is_space(byte) && !matches!(byte, b'*' | b'[' | b')'));
    ensure!(!file.is_empty(), "data parameter <FILE not a filename");
    Ok(Atom::File(OsStr::from_bytes(file).into()))
}

fn seek(scanner: &mut Scanner<'_>) -> Result<Seek> {
    scanner.skip(1);
    let first = scanner.peek();
    match first {
        Some(b'0'..=b'9') => {}
        Some(b'+' | b'-' | b'^') => scanner.skip(1),
        _ => return wrong(scanner.position()),
    }
    let Some(mut number) = scanner.number() else { return wrong(scanner.position()) };
    Ok(match first {
        Some(b'+') => Seek::Forward(unsigned(number, "data parameter after @+")?),
        Some(b'-') => Seek::Back(unsigned(number, "data parameter after @-")?),
        Some(b'^') => {
            let multiple = unsigned(number, "data parameter after @^")?;
            ensure!(multiple.is_power_of_two(), "data parameter @^{multiple} must be a power of 2");
            Seek::Align(multiple)
        }
        _ => {
            if number.decimal {
                number.value = number.value.saturating_mul(scanner.scale().unwrap_or(1).into());
            }
            Seek::To(unsigned(number, "data parameter @OFFSET")?)
        }
    })
}

fn repeat(scanner: &mut Scanner<'_>) -> Result<Operator> {
    scanner.skip(1);
    let number = scanner.number().context("*N not numeric")?;
    Ok(Operator::Repeat(unsigned(number, "data parameter *N")?))
}

fn slice(scanner: &mut Scanner<'_>) -> Result<Operator> {
    const NOT_NUMERIC: &str = "enclosed pattern (...)[N:M] not numeric";
    const INVALID: &str = "[N:M] does not describe a valid slice";
    let bound = |number: Number| unsigned(number, INVALID).context(INVALID);
    scanner.skip(1);
    let from = match scanner.peek() {
        Some(b':') => 0,
        _ => bound(scanner.number().context(NOT_NUMERIC)?)?,
    };
    if !scanner.eat(":") {
        return wrong(scanner.position());
    }
    let to = match scanner.peek() {
        Some(b']') => None,
        _ => Some(bound(scanner.number().context(NOT_NUMERIC)?)?),
    };
    if !scanner.eat("]") {
        return wrong(scanner.position());
    }
    ensure!(to.is_none_or(|to| from <= to), INVALID);
    Ok(Operator::Slice(from, to))
}

#[cfg(test)]
#[path = "parser_tests.rs"]
mod tests;
