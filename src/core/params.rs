//! Values of parameters: sizes, delays, probabilities, booleans and numbers.
//!
//! Values arrive as [`OsStr`], because a path need not be UTF-8; the functions here take those that must be text.
//! What is accepted is what the C interface's `nbdkit_parse_*` functions accept (nbdkit-plugin(3)).

use std::{ffi::OsStr, time::Duration};

use anyhow::{Context as _, Result, bail};

/// Whether a word may be the KEY of `KEY=VALUE`: a letter, then letters, digits, `.`, `_` and `-`.
pub fn is_key(word: &str) -> bool {
    let mut bytes = word.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// A value that must be text.
///
/// # Errors
/// When it is not UTF-8.
pub fn text(value: &OsStr) -> Result<&str> {
    value.to_str().with_context(|| format!("'{}' is not valid UTF-8", value.display()))
}

/// A size in bytes, 0 to 2^63−1: a decimal number with an optional suffix `b k m g t p e` (powers of 1024, either
/// case; `KiB`, `MiB` and so on mean the same) or `s` (sectors of 512 bytes).
///
/// # Errors
/// No number, a sign, an unknown suffix, or over 2^63−1.
pub fn size(value: &OsStr) -> Result<u64> {
    let value = text(value)?;
    let digits = value.len() - value.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, suffix) = value.split_at(digits);
    if value.starts_with('-') {
        bail!("could not parse size '{value}': it cannot be negative");
    }
    if number.is_empty() {
        bail!("could not parse size '{value}': it must start with a number, such as 512, 10M or 1G");
    }
    // "KiB" is "K": the units are those of IEC 80000-13 either way.
    let short = match suffix.as_bytes() {
        [unit, b'i', b'B'] if unit.is_ascii_alphabetic() && !matches!(unit, b'b' | b'B' | b's' | b'S') => {
            &suffix[..1]
        }
        _ => suffix,
    };
    let unit: u64 = match short {
        "" | "b" | "B" => 1,
        "s" | "S" => 512,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        "t" | "T" => 1 << 40,
        "p" | "P" => 1 << 50,
        "e" | "E" => 1 << 60,
        _ => bail!(
            "could not parse size '{value}': unknown suffix '{suffix}' (use one of b s k m g t p e, or KiB MiB GiB TiB PiB EiB)"
        ),
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(unit))
        .filter(|n| i64::try_from(*n).is_ok())
        .with_context(|| format!("could not parse size '{value}': it is over 2^63-1 bytes"))
}

/// A boolean: `1 true t yes y on` or `0 false f no n off`, in any case.
///
/// # Errors
/// Anything else.
pub fn boolean(value: &OsStr) -> Result<bool> {
    let value = text(value)?;
    match value.to_ascii_lowercase().as_str() {
        "1" | "true" | "t" | "yes" | "y" | "on" => Ok(true),
        "0" | "false" | "f" | "no" | "n" | "off" => Ok(false),
        _ => bail!("could not decipher boolean '{value}': use true or false"),
    }
}

/// A delay: seconds, with an optional unit `s`, `ms`, `us` (or `μs`) or `ns`; fractions are allowed.
///
/// # Errors
/// No number, negative, an unknown unit, or more than the clock can count.
pub fn delay(value: &OsStr) -> Result<Duration> {
    let value = text(value)?;
    let (number, nanos) =
        [("ms", 1e6), ("us", 1e3), ("\u{3bc}s", 1e3), ("\u{b5}s", 1e3), ("ns", 1.0), ("s", 1e9)]
            .into_iter()
            .find_map(|(unit, nanos)| value.strip_suffix(unit).map(|number| (number, nanos)))
            .unwrap_or((value, 1e9));
    let number = decimal(number).with_context(|| {
        format!("could not parse delay '{value}': use a number and s, ms, us or ns, such as 10ms")
    })?;
    Duration::try_from_secs_f64(number * nanos / 1e9)
        .with_context(|| format!("could not parse delay '{value}': it is too long"))
}

/// A probability from 0 to 1: `0.1`, `10%`, `1:10` or `1/10`.
///
/// # Errors
/// No such form, negative, or over 1.
pub fn probability(value: &OsStr) -> Result<f64> {
    let value = text(value)?;
    let parsed = if let Some(percent) = value.strip_suffix('%') {
        decimal(percent).map(|p| p / 100.0)
    } else if let Some((n, d)) = value.split_once([':', '/']) {
        match (decimal(n), decimal(d)) {
            (Some(0.0), Some(0.0)) => Some(0.0),
            (Some(n), Some(d)) => Some(n / d),
            _ => None,
        }
    } else {
        decimal(value)
    };
    match parsed {
        Some(p) if (0.0..=1.0).contains(&p) => Ok(p),
        Some(_) => bail!("could not parse probability '{value}': it must be between 0 and 1 (100%)"),
        None => bail!("could not parse probability '{value}': use a form such as 0.1, 10%, 1:10 or 1/10"),
    }
}

/// A plain decimal number without sign, infinity or NaN.
fn decimal(s: &str) -> Option<f64> {
    let plain = s.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'-' | b'+'));
    if !plain || !s.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    s.parse().ok()
}

/// An integer in decimal, `0x` hexadecimal or `0` octal, with an optional sign, within the range of `T`.
///
/// # Errors
/// No number, or out of the range of `T`.
pub fn integer<T: TryFrom<i128>>(what: &str, value: &OsStr) -> Result<T> {
    let value = text(value)?;
    let (negative, digits) = match value.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, value.strip_prefix('+').unwrap_or(value)),
    };
    let (radix, digits) = match digits {
        d if d.starts_with("0x") || d.starts_with("0X") => (16, &d[2..]),
        d if d.len() > 1 && d.starts_with('0') => (8, &d[1..]),
        d => (10, d),
    };
    if digits.is_empty() || !digits.chars().all(|c| c.is_digit(radix)) {
        bail!("{what}: could not parse number '{value}'");
    }
    i128::from_str_radix(digits, radix)
        .ok()
        .map(|n| if negative { -n } else { n })
        .and_then(|n| T::try_from(n).ok())
        .with_context(|| format!("{what}: number '{value}' is out of range"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn os(s: &str) -> &OsStr {
        OsStr::new(s)
    }

    #[test]
    fn keys() {
        for good in ["file", "a", "cow-block-size", "x.y_z9"] {
            assert!(is_key(good), "{good}");
        }
        for bad in ["", "9a", "-a", "a b", "a/b", "é"] {
            assert!(!is_key(bad), "{bad}");
        }
    }

    #[test]
    fn sizes() {
        for (text, want) in [
            ("0", 0),
            ("1", 1),
            ("10b", 10),
            ("2s", 1024),
            ("1k", 1024),
            ("1K", 1024),
            ("100M", 100 << 20),
            ("7E", 7 << 60),
            ("1KiB", 1024),
            ("3MiB", 3 << 20),
            ("1GiB", 1 << 30),
            ("2tiB", 2 << 40),
            ("1PiB", 1 << 50),
            ("7EiB", 7 << 60),
            ("9223372036854775807", i64::MAX as u64),
        ] {
            assert_eq!(size(os(text)).unwrap(), want, "{text}");
        }
        for bad in [
            "",
            "-1",
            "k",
            "1.5G",
            "1KB",
            "1KIB",
            "1biB",
            "1siB",
            "8EiB",
            "8E",
            "9223372036854775808",
            "99999999999999999999",
            "1 G",
            "+1",
        ] {
            assert!(size(os(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn delays() {
        assert_eq!(delay(os("2")).unwrap(), Duration::from_secs(2));
        assert_eq!(delay(os("100ms")).unwrap(), Duration::from_millis(100));
        assert_eq!(delay(os("7us")).unwrap(), Duration::from_micros(7));
        assert_eq!(delay(os("7\u{3bc}s")).unwrap(), Duration::from_micros(7));
        assert_eq!(delay(os("50ns")).unwrap(), Duration::from_nanos(50));
        assert_eq!(delay(os("1.5s")).unwrap(), Duration::from_millis(1500));
        for bad in ["", "-1", "ms", "1h", "inf", "nan", "1e300"] {
            assert!(delay(os(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn probabilities() {
        for text in ["0.1", "10%", "1:10", "1/10"] {
            assert!((probability(os(text)).unwrap() - 0.1).abs() < 1e-9, "{text}");
        }
        for bad in ["2", "101%", "3:2", "-0.1", "x", "1/0", ""] {
            assert!(probability(os(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn integers() {
        assert_eq!(integer::<u8>("n", os("0xff")).unwrap(), 255);
        assert_eq!(integer::<i8>("n", os("-128")).unwrap(), -128);
        assert_eq!(integer::<u16>("n", os("017")).unwrap(), 15);
        assert_eq!(integer::<u64>("n", os("18446744073709551615")).unwrap(), u64::MAX);
        for bad in ["256", "-1", "x", "", "0x", "1.0", "09"] {
            assert!(integer::<u8>("n", os(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn booleans() {
        for t in ["1", "true", "T", "YES", "y", "on"] {
            assert!(boolean(os(t)).unwrap());
        }
        for f in ["0", "False", "f", "no", "N", "off"] {
            assert!(!boolean(os(f)).unwrap());
        }
        assert!(boolean(os("maybe")).is_err());
    }
}
