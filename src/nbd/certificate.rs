//! What a client's certificate says of it: distinguished names as text (RFC 4514), for rules to compare and people to
//! read.
//!
//! OpenSSL has checked the certificate by then, yet a name is anything that an authority signs: what would look like
//! another name, a zero byte or a comma within a value, is escaped.

use std::fmt::Write as _;

use nbdkit_core::Certificate;
use openssl::x509::{X509NameRef, X509Ref};

/// Both names of a certificate; None: they cannot be told.
pub(crate) fn names(certificate: &X509Ref) -> Option<Certificate> {
    let text = |name: &X509NameRef| distinguished_name(&name.to_der().ok()?);
    Some(Certificate { subject: text(certificate.subject_name())?, issuer: text(certificate.issuer_name())? })
}

/// Attributes that have a name in a distinguished name, by their encoded object identifiers.
const ATTRIBUTES: [(&[u8], &str); 11] = [
    (&[0x55, 4, 3], "CN"),
    (&[0x55, 4, 5], "serialNumber"),
    (&[0x55, 4, 6], "C"),
    (&[0x55, 4, 7], "L"),
    (&[0x55, 4, 8], "ST"),
    (&[0x55, 4, 9], "STREET"),
    (&[0x55, 4, 10], "O"),
    (&[0x55, 4, 11], "OU"),
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 1], "UID"),
    (&[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 25], "DC"),
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 1], "EMAIL"),
];

/// Tags of DER.
mod tag {
    pub(super) const OBJECT_IDENTIFIER: u8 = 6;
    pub(super) const UTF8: u8 = 12;
    pub(super) const NUMERIC: u8 = 18;
    pub(super) const PRINTABLE: u8 = 19;
    pub(super) const IA5: u8 = 22;
    pub(super) const UNIVERSAL: u8 = 28;
    pub(super) const BMP: u8 = 30;
    pub(super) const SEQUENCE: u8 = 0x30;
    pub(super) const SET: u8 = 0x31;
}

/// One element of DER.
struct Element<'a> {
    tag: u8,
    content: &'a [u8],
    /// With its head.
    whole: &'a [u8],
}

impl<'a> Element<'a> {
    /// Takes the next element off `der`.
    fn take(der: &mut &'a [u8]) -> Option<Self> {
        let [tag, first, ..] = **der else { return None };
        let extra = if first & 0x80 == 0 { 0 } else { usize::from(first & 0x7f) };
        let bytes = der.get(2..2 + extra)?;
        let length = match extra {
            0 => usize::from(first),
            1..=4 => bytes.iter().fold(0, |length, b| length << 8 | usize::from(*b)),
            _ => return None,
        };
        let head = 2 + extra;
        let (whole, rest) = der.split_at_checked(head.checked_add(length)?)?;
        *der = rest;
        Some(Element { tag, content: &whole[head..], whole })
    }

    fn expect(der: &mut &'a [u8], tag: u8) -> Option<&'a [u8]> {
        Element::take(der).filter(|element| element.tag == tag).map(|element| element.content)
    }

    /// The text of a string.
    fn text(&self) -> Option<String> {
        let wide = |size: usize| {
            let mut chunks = self.content.chunks_exact(size);
            let text = chunks.by_ref().map(|chunk| chunk.iter().fold(0, |c, b| c << 8 | u32::from(*b)));
            let text: Option<String> = text.map(char::from_u32).collect();
            text.filter(|_| chunks.remainder().is_empty())
        };
        match self.tag {
            tag::UTF8 | tag::NUMERIC | tag::PRINTABLE | tag::IA5 => {
                String::from_utf8(self.content.to_vec()).ok()
            }
            tag::BMP => wide(2),
            tag::UNIVERSAL => wide(4),
            _ => None,
        }
    }
}

/// The text of an encoded name: the last part first, as the RFC wants it.
fn distinguished_name(mut der: &[u8]) -> Option<String> {
    let mut name = Element::expect(&mut der, tag::SEQUENCE)?;
    let mut parts = Vec::new();
    while !name.is_empty() {
        let mut set = Element::expect(&mut name, tag::SET)?;
        let mut part = String::new();
        while !set.is_empty() {
            let mut attribute = Element::expect(&mut set, tag::SEQUENCE)?;
            let kind = Element::expect(&mut attribute, tag::OBJECT_IDENTIFIER)?;
            let value = Element::take(&mut attribute)?;
            if !part.is_empty() {
                part.push('+');
            }
            let known = ATTRIBUTES.iter().find(|(id, _)| *id == kind);
            let text = known.and_then(|(_, name)| Some((name, value.text()?)));
            match text {
                Some((name, text)) => write!(part, "{name}={}", escape(&text)).ok()?,
                None => {
                    write!(part, "{}=#", dotted(kind)).ok()?;
                    value.whole.iter().try_for_each(|b| write!(part, "{b:02X}")).ok()?;
                }
            }
        }
        parts.push(part);
    }
    parts.reverse();
    Some(parts.join(","))
}

/// An object identifier as numbers.
fn dotted(id: &[u8]) -> String {
    let mut text = String::new();
    let mut number: u128 = 0;
    for byte in id {
        number = number << 7 | u128::from(byte & 0x7f);
        if byte & 0x80 != 0 {
            continue;
        }
        if text.is_empty() {
            // The first two share one number.
            let first = (number / 40).min(2);
            text = format!("{first}.{}", number - first * 40);
        } else {
            text += &format!(".{number}");
        }
        number = 0;
    }
    text
}

/// A value of which no part can be taken for the name around it.
fn escape(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    let last = value.chars().count().saturating_sub(1);
    for (at, c) in value.chars().enumerate() {
        match c {
            '"' | '+' | ',' | ';' | '<' | '>' | '\\' => text.extend(['\\', c]),
            ' ' if at == 0 || at == last => text += "\\ ",
            '#' if at == 0 => text += "\\#",
            c if c.is_ascii_control() => text += &format!("\\{:02X}", u32::from(c)),
            c => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn element(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = u8::try_from(content.len()).unwrap();
        let long: &[u8] = if length < 128 { &[] } else { &[0x81] };
        [&[tag], long, &[length], content].concat()
    }

    /// Kind, tag and content of the value.
    type Attribute<'a> = (&'a [u8], u8, &'a [u8]);

    /// A name of parts of attributes.
    fn name(parts: &[&[Attribute<'_>]]) -> Vec<u8> {
        let attribute = |(kind, tag, value): &Attribute<'_>| {
            element(0x30, &[element(6, kind), element(*tag, value)].concat())
        };
        let set = |part: &&[_]| element(0x31, &part.iter().flat_map(attribute).collect::<Vec<_>>());
        element(0x30, &parts.iter().flat_map(set).collect::<Vec<_>>())
    }

    const CN: &[u8] = &[0x55, 4, 3];
    const O: &[u8] = &[0x55, 4, 10];

    #[test]
    fn names_are_text() {
        let der = name(&[
            &[(&[0x55, 4, 6], 19, b"DE")],
            &[(O, 30, b"\0Z\0o\0\xeb"), (CN, 12, "ë".as_bytes())],
            &[(&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 1], 22, b"a@b")],
        ]);
        assert_eq!(distinguished_name(&der).unwrap(), "EMAIL=a@b,O=Zoë+CN=ë,C=DE");
        assert_eq!(distinguished_name(&name(&[])).unwrap(), "");
        let long = [b'x'; 100];
        assert_eq!(distinguished_name(&name(&[&[(CN, 12, &long)]])).unwrap().len(), 103);
    }

    #[test]
    fn a_value_cannot_pretend_to_be_more() {
        let text = |value: &[u8]| distinguished_name(&name(&[&[(CN, 12, value)]])).unwrap();
        assert_eq!(text(b"good,O=us"), "CN=good\\,O=us");
        assert_eq!(text(b"good+O=us"), "CN=good\\+O=us");
        assert_eq!(text(b"good\0.evil\n"), "CN=good\\00.evil\\0A");
        assert_eq!(text(b" # \\ \"<;>\" "), "CN=\\ # \\\\ \\\"\\<\\;\\>\\\"\\ ");
        assert_eq!(text(b"#1"), "CN=\\#1");
        assert_eq!(text(b" "), "CN=\\ ");
        // Not text: told by its bytes.
        assert_eq!(text(b"\xff"), "2.5.4.3=#0C01FF");
        assert_eq!(distinguished_name(&name(&[&[(CN, 30, b"abc")]])).unwrap(), "2.5.4.3=#1E03616263");
        assert_eq!(
            distinguished_name(&name(&[&[(&[0x2b, 6, 1, 4, 1, 0x82, 0x37], 12, b"x")]])).unwrap(),
            "1.3.6.1.4.1.311=#0C0178"
        );
    }

    #[test]
    fn malformed_names_are_not_told() {
        let whole = name(&[&[(CN, 12, b"x")]]);
        for end in 0..whole.len() {
            assert_eq!(distinguished_name(&whole[..end]), None, "{end}");
        }
        assert_eq!(distinguished_name(&[0x30, 0x84, 0xff, 0xff, 0xff, 0xff]), None);
        assert_eq!(distinguished_name(&[0x30, 0x89, 1, 2, 3, 4, 5, 6, 7, 8, 9]), None);
        assert_eq!(distinguished_name(&element(0x31, b"")), None);
    }
}
