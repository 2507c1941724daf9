//! The tokens of the data language: a cursor over its text that knows numbers, strings, names and words.
//!
//! The language has no fixed separators (`1(2)3` is three values, `08` is a 0 and an 8), so the parser asks for the
//! token that it expects instead of being handed a list of them.

use anyhow::{Result, bail};

/// A position in the text.
#[derive(Clone)]
pub(super) struct Scanner<'a> {
    text: &'a [u8],
    at: usize,
}

/// A whole number as it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Number {
    /// Its value; `i128::MAX` or the negative of it when there are too many digits.
    pub(super) value: i128,
    /// Not octal or hexadecimal, so a suffix may follow.
    pub(super) decimal: bool,
}

/// White space as the language has it: space, tab, newline, form feed, carriage return, vertical tab.
pub(super) fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | 0x0c | b'\r' | 0x0b)
}

impl<'a> Scanner<'a> {
    pub(super) fn new(text: &'a [u8]) -> Self {
        Scanner { text, at: 0 }
    }

    /// Where it stands, in bytes from the start.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    pub(super) fn rest(&self) -> &'a [u8] {
        self.text.get(self.at..).unwrap_or_default()
    }

    pub(super) fn peek(&self) -> Option<u8> {
        self.rest().first().copied()
    }

    pub(super) fn skip(&mut self, bytes: usize) {
        self.at = (self.at + bytes).min(self.text.len());
    }

    /// Takes a token if it comes next.
    pub(super) fn eat(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token.as_bytes());
        if found {
            self.skip(token.len());
        }
        found
    }

    /// Takes bytes as long as they are of a kind.
    pub(super) fn take_while(&mut self, kind: impl Fn(u8) -> bool) -> &'a [u8] {
        let rest = self.rest();
        let end = rest.iter().position(|byte| !kind(*byte)).unwrap_or(rest.len());
        self.skip(end);
        &rest[..end]
    }

    pub(super) fn skip_space(&mut self) {
        self.take_while(is_space);
    }

    /// A decimal, `0` octal or `0x` hexadecimal number, after white space and a sign. None: there is none, and the
    /// position has not changed.
    pub(super) fn number(&mut self) -> Option<Number> {
        let mut ahead = self.clone();
        ahead.skip_space();
        let negative = ahead.peek() == Some(b'-');
        if negative || ahead.peek() == Some(b'+') {
            ahead.skip(1);
        }
        let octal = ahead.peek() == Some(b'0');
        let hexadecimal = ahead.eat("0x") || ahead.eat("0X");
        let radix = match (hexadecimal, octal) {
            (true, _) => 16,
            (false, true) => 8,
            (false, false) => 10,
        };
        let digits = ahead.take_while(|byte| (byte as char).is_digit(radix));
        if digits.is_empty() && !hexadecimal {
            return None;
        }
        let value = digits.iter().fold(0_i128, |value, digit| {
            let digit = (*digit as char).to_digit(radix).unwrap_or_default();
            value.saturating_mul(radix.into()).saturating_add(digit.into())
        });
        *self = ahead;
        Some(Number { value: if negative { -value } else { value }, decimal: radix == 10 || digits == b"0" })
    }

    /// The factor that a suffix of a size stands for: `b`, `k` to `e`, `KiB` to `EiB`, and `s`, in either case, unless a longer word
    /// begins there.
    pub(super) fn scale(&mut self) -> Option<u64> {
        let factor = match self.peek()?.to_ascii_lowercase() {
            b'b' => 1,
            b's' => 512,
            b'k' => 1 << 10,
            b'm' => 1 << 20,
            b'g' => 1 << 30,
            b't' => 1 << 40,
            b'p' => 1 << 50,
            b'e' => 1 << 60,
            _ => return None,
        };
        // "KiB" is "K", as in all sizes.
        let length = if factor >= 1 << 10 && self.rest()[1..].starts_with(b"iB") { 3 } else { 1 };
        if self.rest().get(length).is_some_and(u8::is_ascii_alphanumeric) {
            return None;
        }
        self.skip(length);
        Some(factor)
    }

    /// The rest of a string, after its opening quote.
    ///
    /// # Errors
    /// No closing quote, or an escape that is not known.
    pub(super) fn string(&mut self) -> Result<Vec<u8>> {
        let rest = self.rest();
        let mut escaped = false;
        let end = rest.iter().position(|byte| {
            let end = *byte == b'"' && !escaped;
            escaped = *byte == b'\\' && !escaped;
            end
        });
        let Some(end) = end else { bail!("data parameter: unterminated string: add the closing '\"'") };
        let mut inside = Scanner::new(&rest[..end]);
        self.skip(end + 1);
        let mut bytes = Vec::with_capacity(end);
        while let Some(byte) = inside.peek() {
            inside.skip(1);
            bytes.push(if byte == b'\\' { inside.escape()? } else { byte });
        }
        Ok(bytes)
    }

    fn escape(&mut self) -> Result<u8> {
        let byte = self.peek().unwrap_or(b'\\');
        self.skip(1);
        Ok(match byte {
            b'a' => 0x07,
            b'b' => 0x08,
            b'f' => 0x0c,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'v' => 0x0b,
            b'x' => {
                let digits = self.rest().get(..2).filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
                let Some(digits) = digits else {
                    bail!("data: \\xNN must be followed by exactly two hexadecimal characters");
                };
                self.skip(2);
                digits.iter().fold(0, |value, digit| {
                    value << 4 | (*digit as char).to_digit(16).unwrap_or_default() as u8
                })
            }
            b'0'..=b'9' | b'u' => {
                bail!("data: string numeric and unicode sequences are not yet implemented: use \\xNN")
            }
            other => other,
        })
    }

    /// Takes all up to the parenthesis that closes one before; None when there is no such.
    pub(super) fn parenthesized(&mut self) -> Option<&'a [u8]> {
        let rest = self.rest();
        let mut depth = 1_usize;
        let end = rest.iter().position(|byte| {
            match byte {
                b'(' => depth += 1,
                b')' => depth -= 1,
                _ => {}
            }
            depth == 0
        })?;
        self.skip(end + 1);
        Some(&rest[..end])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Value and what is left.
    fn number(text: &str) -> Option<(i128, &[u8])> {
        let mut scanner = Scanner::new(text.as_bytes());
        scanner.number().map(|number| (number.value, scanner.rest()))
    }

    #[test]
    fn numbers_end_where_their_digits_do() {
        for (text, value, rest) in [
            ("0", 0, ""),
            ("08", 0, "8"),
            ("010x", 8, "x"),
            ("0xfFg", 255, "g"),
            ("0x", 0, ""),
            (" \t-12*", -12, "*"),
            ("+3:", 3, ":"),
            ("1k", 1, "k"),
        ] {
            assert_eq!(number(text), Some((value, rest.as_bytes())), "{text}");
        }
        for text in ["", "x", "-", " +x", "*"] {
            assert_eq!(number(text), None, "{text}");
        }
        assert_eq!(number(&"9".repeat(1000)).unwrap().0, i128::MAX);
    }

    #[test]
    fn suffixes_are_single_letters() {
        for (text, factor) in [
            ("k", Some(1024)),
            ("S 1", Some(512)),
            ("b)", Some(1)),
            ("be16:1", None),
            ("", None),
            ("x", None),
        ] {
            assert_eq!(Scanner::new(text.as_bytes()).scale(), factor, "{text}");
        }
    }

    #[test]
    fn strings_have_escapes() {
        for (text, want) in [
            (r#"""#, &b""[..]),
            (r#"a b" c"#, b"a b"),
            (r#"\a\b\f\n\r\t\v\\\"""#, b"\x07\x08\x0c\n\r\t\x0b\\\""),
            (r#"\x41\xfFz""#, b"A\xffz"),
            (r#"\q\(""#, b"q("),
        ] {
            assert_eq!(Scanner::new(text.as_bytes()).string().unwrap(), want, "{text}");
        }
        for (text, message) in [
            ("", "unterminated"),
            (r#"a\""#, "unterminated"),
            (r#"\x4""#, "exactly two hexadecimal"),
            (r#"\xg0""#, "exactly two hexadecimal"),
            (r#"\0""#, "not yet implemented"),
            (r#"\u1234""#, "not yet implemented"),
        ] {
            let error = Scanner::new(text.as_bytes()).string().unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    #[test]
    fn parentheses_match() {
        let mut scanner = Scanner::new(b"a (b) c) d");
        assert_eq!(scanner.parenthesized(), Some(&b"a (b) c"[..]));
        assert_eq!(scanner.rest(), b" d");
        assert_eq!(scanner.parenthesized(), None);
    }

    proptest! {
        #[test]
        fn every_number_reads_back(value in any::<u64>()) {
            for text in [format!("{value}"), format!("0{value:o}"), format!("0x{value:x}")] {
                prop_assert_eq!(number(&text), Some((value.into(), &b""[..])));
            }
        }

        #[test]
        fn every_byte_can_be_escaped(bytes in prop::collection::vec(any::<u8>(), 0..50)) {
            let text: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).chain(["\"".into()]).collect();
            prop_assert_eq!(Scanner::new(text.as_bytes()).string().unwrap(), bytes);
        }
    }
}
