//! The language of LVM's metadata: `key = value`, sections in braces, comments from `#` on.

/// Sections within sections that are followed.
const MAX_DEPTH: usize = 8;

/// A value or a section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Number(i64),
    Text(String),
    List(Vec<Node>),
    Section(Vec<(String, Node)>),
}

impl Node {
    /// What a section has under a name.
    pub(super) fn get(&self, name: &str) -> Option<&Node> {
        self.entries().iter().find(|(key, _)| key == name).map(|(_, node)| node)
    }

    /// All that a section has.
    pub(super) fn entries(&self) -> &[(String, Node)] {
        match self {
            Node::Section(entries) => entries,
            _ => &[],
        }
    }

    /// A number of a section, not negative.
    pub(super) fn number(&self, name: &str) -> Option<u64> {
        match self.get(name)? {
            Node::Number(number) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    /// A text of a section.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        match self.get(name)? {
            Node::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A list of a section; a single value is a list of one.
    pub(super) fn list(&self, name: &str) -> &[Node] {
        match self.get(name) {
            Some(Node::List(list)) => list,
            Some(node) => std::slice::from_ref(node),
            None => &[],
        }
    }
}

/// Parses a whole text, which may have zeroes at its end. None: it is not well-formed.
pub(super) fn parse(text: &[u8]) -> Option<Node> {
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    let mut parser = Parser { rest: &text[..end] };
    let entries = parser.section(0)?;
    parser.rest.is_empty().then_some(Node::Section(entries))
}

struct Parser<'a> {
    rest: &'a [u8],
}

impl Parser<'_> {
    fn skip_blanks(&mut self) {
        loop {
            self.rest = self.rest.trim_ascii_start();
            if self.rest.first() != Some(&b'#') {
                return;
            }
            let end = self.rest.iter().position(|byte| *byte == b'\n').unwrap_or(self.rest.len());
            self.rest = &self.rest[end..];
        }
    }

    fn take(&mut self, byte: u8) -> bool {
        self.skip_blanks();
        match self.rest.split_first() {
            Some((first, rest)) if *first == byte => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    /// The entries up to the closing brace, which is left, or the end.
    fn section(&mut self, depth: usize) -> Option<Vec<(String, Node)>> {
        let mut entries = Vec::new();
        if depth > MAX_DEPTH {
            return None;
        }
        loop {
            self.skip_blanks();
            if self.rest.is_empty() || self.rest[0] == b'}' {
                return Some(entries);
            }
            let name = self.name()?;
            let node = if self.take(b'{') {
                let inner = self.section(depth + 1)?;
                self.take(b'}').then_some(Node::Section(inner))?
            } else {
                self.take(b'=').then_some(())?;
                self.value(depth)?
            };
            entries.push((name, node));
        }
    }

    fn name(&mut self) -> Option<String> {
        if self.rest.first() == Some(&b'"') {
            return self.string();
        }
        let is_part = |byte: &u8| byte.is_ascii_alphanumeric() || b"_-.+/@".contains(byte);
        let end = self.rest.iter().position(|byte| !is_part(byte)).unwrap_or(self.rest.len());
        let (name, rest) = self.rest.split_at(end);
        self.rest = rest;
        (end > 0).then(|| String::from_utf8_lossy(name).into_owned())
    }

    fn value(&mut self, depth: usize) -> Option<Node> {
        self.skip_blanks();
        match self.rest.first()? {
            b'"' => self.string().map(Node::Text),
            b'[' if depth <= MAX_DEPTH => {
                self.rest = &self.rest[1..];
                let mut list = Vec::new();
                while !self.take(b']') {
                    list.push(self.value(depth + 1)?);
                    if !self.take(b',') {
                        self.take(b']').then_some(())?;
                        break;
                    }
                }
                Some(Node::List(list))
            }
            _ => {
                let is_part = |byte: &u8| byte.is_ascii_digit() || b"+-.".contains(byte);
                let end = self.rest.iter().position(|byte| !is_part(byte)).unwrap_or(self.rest.len());
                let (digits, rest) = self.rest.split_at(end);
                self.rest = rest;
                std::str::from_utf8(digits).ok()?.parse().ok().map(Node::Number)
            }
        }
    }

    /// A text in quotation marks, in which a backslash makes the next character one of the text.
    fn string(&mut self) -> Option<String> {
        let mut text = Vec::new();
        let mut bytes = self.rest.iter().enumerate().skip(1);
        loop {
            let end = match bytes.next()? {
                (_, b'\\') => {
                    text.push(*bytes.next()?.1);
                    continue;
                }
                (at, b'"') => at,
                (_, byte) => {
                    text.push(*byte);
                    continue;
                }
            };
            self.rest = &self.rest[end + 1..];
            return Some(String::from_utf8_lossy(&text).into_owned());
        }
    }
}
