//! Wildcards, as the shell and fnmatch(3) have them, over any text: names of certificates hold slashes and dots.

/// Whether all of `text` is what `pattern` says: `*` for any characters, `?` for one, `[a-z]` for one of them and
/// `[!a-z]` for another one, `\` before a character that stands for itself.
pub(crate) fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    // After the last star, and where what it stands for ends so far.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        if pattern.get(p) == Some(&'*') {
            p += 1;
            star = Some((p, t));
        } else if let Some(next) = one(&pattern, p, text[t]) {
            (p, t) = (next, t + 1);
        } else if let Some((after, end)) = star {
            (p, t) = (after, end + 1);
            star = Some((after, t));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

/// What follows in the pattern, if what is at `p` stands for `c`.
fn one(pattern: &[char], p: usize, c: char) -> Option<usize> {
    match *pattern.get(p)? {
        '?' => Some(p + 1),
        '\\' => {
            // The last one of a pattern stands for itself.
            let (quoted, next) = pattern.get(p + 1).map_or(('\\', p + 1), |quoted| (*quoted, p + 2));
            (quoted == c).then_some(next)
        }
        '[' => match set(pattern, p + 1, c) {
            Some((is_in, next)) => is_in.then_some(next),
            // A bracket that is not closed stands for itself.
            None => (c == '[').then_some(p + 1),
        },
        other => (other == c).then_some(p + 1),
    }
}

/// Whether `c` is one of a set, whose bracket was before `p`, and what follows the set. None: it does not end.
fn set(pattern: &[char], mut p: usize, c: char) -> Option<(bool, usize)> {
    let negated = matches!(pattern.get(p), Some('!' | '^'));
    p += usize::from(negated);
    let (mut is_in, first) = (false, p);
    loop {
        let low = *pattern.get(p)?;
        if low == ']' && p > first {
            return Some((is_in != negated, p + 1));
        }
        let (high, next) = match pattern.get(p + 1..p + 3) {
            Some(['-', high]) if *high != ']' => (*high, p + 3),
            _ => (low, p + 1),
        };
        is_in |= (low..=high).contains(&c);
        p = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, text) in [
            ("", ""),
            ("*", ""),
            ("**", "a/b"),
            ("CN=a,O=b", "CN=a,O=b"),
            ("*,O=BigCo,*", "CN=x,O=BigCo,C=DE"),
            ("a*b*c", "a-b-b-c"),
            ("a?c", "aéc"),
            ("[a-c]x[!0-9]", "bxy"),
            ("[]]", "]"),
            ("[a-]", "-"),
            ("a\\*", "a*"),
            ("a\\", "a\\"),
            ("[a", "[a"),
        ] {
            assert!(matches(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [
            ("", "a"),
            ("?", ""),
            ("a", "A"),
            ("*b", "abc"),
            ("[a-c]", "d"),
            ("[!a]", "a"),
            ("a\\*", "ab"),
            ("*,O=BigCo,*", "CN=x,O=BigCorp,C=DE"),
        ] {
            assert!(!matches(pattern, text), "{pattern} {text}");
        }
    }
}
