//! The parameters of a layer, read from its own help (`Info::config_help`), so that there is no second list to keep:
//! `--help`, `--list`, completion and advice all go by this.
//!
//! A line of help is `KEY=VALUE`, `[KEY=]VALUE`, or several of those between commas, then two spaces or more and what it
//! is for. Lines that begin with a space go on with that; others are notes.

use nbdkit_core::{Info, params};

/// One parameter, or several that are alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameter {
    /// Its keys; the first is the usual one.
    pub keys: Vec<String>,
    /// What stands for its value, such as `SIZE` or `off|auto|on`; may be empty.
    pub value: String,
    /// What it is for, in a sentence or two.
    pub what: String,
    /// Whether a word without a key is for it.
    pub is_magic: bool,
}

/// What the help of a layer says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// In the order of the help.
    pub list: Vec<Parameter>,
    /// Lines that tell of no parameter.
    pub notes: Vec<String>,
}

/// The kind of a value, as far as that can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// A number of bytes, with a suffix or without.
    Size,
    /// true or false.
    Boolean,
    /// A whole number.
    Number,
    /// A time, with a unit or in seconds.
    Time,
    /// A file.
    File,
    /// A directory.
    Directory,
    /// One of a few words.
    Choice,
    /// A shell command.
    Command,
    /// Anything else.
    Text,
}

impl Type {
    /// Its name in `--list --json`.
    pub fn name(self) -> &'static str {
        match self {
            Type::Size => "size",
            Type::Boolean => "boolean",
            Type::Number => "number",
            Type::Time => "time",
            Type::File => "file",
            Type::Directory => "directory",
            Type::Choice => "choice",
            Type::Command => "command",
            Type::Text => "text",
        }
    }
}

impl Parameters {
    /// Reads the help of a layer.
    pub fn of(info: &Info) -> Self {
        let mut parameters = Parameters::default();
        for line in info.config_help.lines().map(str::trim_end) {
            if line.starts_with([' ', '\t']) {
                let more = line.trim();
                match parameters.list.last_mut() {
                    Some(last) if last.what.is_empty() => last.what = more.to_owned(),
                    Some(last) => last.what = format!("{} {more}", last.what),
                    None => parameters.notes.push(more.to_owned()),
                }
            } else if let Some(parameter) = parameter(line) {
                parameters.list.push(parameter);
            } else if !line.is_empty() {
                parameters.notes.push(line.to_owned());
            }
        }
        if let Some(magic) = &info.magic_config_key {
            match parameters.list.iter_mut().find(|parameter| parameter.has(magic)) {
                Some(parameter) => parameter.is_magic = true,
                None => {
                    let keys = vec![magic.to_string()];
                    let magic =
                        Parameter { keys, value: "VALUE".into(), is_magic: true, ..Parameter::default() };
                    parameters.list.insert(0, magic);
                }
            }
        }
        parameters
    }

    /// The parameter of that key.
    pub fn find(&self, key: &str) -> Option<&Parameter> {
        self.list.iter().find(|parameter| parameter.has(key))
    }

    /// All keys.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.list.iter().flat_map(|parameter| &parameter.keys).map(String::as_str)
    }
}

impl Parameter {
    fn has(&self, key: &str) -> bool {
        self.keys.iter().any(|known| known == key)
    }

    /// Whether it has to be given.
    pub fn is_required(&self) -> bool {
        ["(required)", "(required,", "Required."].iter().any(|word| self.what.contains(word))
    }

    /// The value that it has when it is not given, as the help words it.
    pub fn default_value(&self) -> Option<&str> {
        let (before, after) = self.what.split_once("(default")?;
        let said = after.split_once(')')?.0.trim_start_matches([':', ' ']);
        if said.is_empty() {
            // The word before it.
            return before.trim_end().rsplit([' ', ',']).next().map(|word| word.trim_matches('\''));
        }
        Some(said)
    }

    /// What it is for, without what [`is_required`](Self::is_required) says.
    pub fn sentence(&self) -> String {
        let what = self.what.replace(" (required)", "");
        what.trim_start_matches("(required) ").trim().to_owned()
    }

    /// The words to choose from, if there are a few.
    pub fn choices(&self) -> Vec<&str> {
        let is_word =
            |word: &&str| !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        let is_lower = |word: &&str| word.bytes().any(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let value = self.value.split('[').next().unwrap_or_default();
        if self.value.contains('|') && !self.value.contains(['<', '.']) {
            let words: Vec<_> =
                self.value.split('|').map(|w| w.split('[').next().unwrap_or(w)).filter(is_word).collect();
            if words.len() > 1 && (words.iter().any(is_lower) || !value.contains("PATH")) {
                return words;
            }
        }
        match placeholder(&self.value) {
            "BOOL" => vec!["true", "false"],
            "MODE" | "POLICY" | "LEVEL" | "FORMAT" => {
                let quoted: Vec<_> = self.what.split('\'').skip(1).step_by(2).filter(is_word).collect();
                match self.what.split_once(": ") {
                    _ if quoted.len() > 1 => quoted,
                    Some((_, words)) if words.contains(" or ") => words
                        .trim_end_matches('.')
                        .split(", ")
                        .flat_map(|w| w.split(" or "))
                        .filter(is_word)
                        .collect(),
                    _ => Vec::new(),
                }
            }
            _ if is_word(&&*self.value)
                && is_lower(&&*self.value)
                && !self.value.contains(char::is_uppercase) =>
            {
                vec![&self.value]
            }
            _ => Vec::new(),
        }
    }

    /// The kind of its value.
    pub fn kind(&self) -> Type {
        match placeholder(&self.value) {
            "BOOL" => Type::Boolean,
            _ if !self.choices().is_empty() => Type::Choice,
            "SIZE" | "OFFSET" | "LENGTH" | "BITSPERSEC" => Type::Size,
            "N" | "NUMBER" | "FD" | "PID" | "SEED" | "PERCENTILE" | "BYTE" => Type::Number,
            "NN" | "SECS" | "TIME" | "DELAY" => Type::Time,
            "FILE" | "FILENAME" | "PATH" | "SOCKET" | "TRIGGER" | "SOURCE" => Type::File,
            "DIRECTORY" | "DIR" => Type::Directory,
            "SCRIPT" if self.keys.iter().any(|key| key == "script") => Type::File,
            "SCRIPT" | "COMMAND" => Type::Command,
            _ => Type::Text,
        }
    }

    /// As it is typed: `[key=]VALUE`.
    pub fn usage(&self) -> String {
        let value = match placeholder(&self.value) {
            "NN" => "TIME".to_owned(),
            "BITSPERSEC" => "BITS_PER_SECOND".to_owned(),
            _ => self.value.replace(['<', '>'], ""),
        };
        let mut keys = self.keys.iter();
        let first = keys.next().map(String::as_str).unwrap_or_default();
        let first = if self.is_magic { format!("[{first}=]{value}") } else { format!("{first}={value}") };
        keys.fold(first, |all, key| format!("{all}, {key}="))
    }
}

/// The word that stands for a value: the first one in capital letters.
fn placeholder(value: &str) -> &str {
    let value = value.trim_start_matches('<');
    let end = value.find(|c: char| !c.is_ascii_uppercase() && c != '_').unwrap_or(value.len());
    &value[..end]
}

/// Reads the first line about a parameter.
fn parameter(line: &str) -> Option<Parameter> {
    let (usage, what) = match line.find("  ") {
        Some(at) => (&line[..at], line[at..].trim()),
        // A list of values may leave no room for more than one space, or none.
        None => match line.split_once(' ') {
            Some((usage, what)) if !usage.ends_with(',') => (usage, what.trim()),
            _ => (line, ""),
        },
    };
    let mut parameter = Parameter { what: what.to_owned(), ..Parameter::default() };
    for item in usage.split(", ").map(|item| item.trim_end_matches(',')) {
        let bare = item.strip_prefix('[');
        let (key, value) = bare.unwrap_or(item).split_once('=').filter(|(key, _)| params::is_key(key))?;
        parameter.keys.push(key.to_owned());
        if parameter.value.is_empty() {
            parameter.value = bare.map_or(value, |_| value.trim_start_matches(']')).to_owned();
        }
    }
    Some(parameter)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(help: &'static str) -> Parameters {
        Parameters::of(&Info::bundled("x", "x", help))
    }

    #[test]
    fn all_forms_of_help() {
        let parameters = of("[size=]SIZE  (required) Size\nbyte=N   The byte, or a=b, c=d");
        assert_eq!(parameters.keys().collect::<Vec<_>>(), ["size", "byte"]);
        assert!(parameters.list[0].is_required() && !parameters.list[1].is_required());
        assert_eq!(parameters.list[0].sentence(), "Size");
        let parameters = of("a-b=, c=, d=1   Three\n   continued=no\nSee also: x=1");
        assert_eq!(parameters.keys().collect::<Vec<_>>(), ["a-b", "c", "d"]);
        assert_eq!(parameters.list[0].what, "Three continued=no");
        assert_eq!(parameters.notes, ["See also: x=1"]);
    }

    #[test]
    fn choices_and_defaults() {
        for (help, kind, choices, default) in [
            ("lock=off|auto|on  Lock (default auto).", Type::Choice, vec!["off", "auto", "on"], Some("auto")),
            ("m=<MODE>  Mode: 'keep' (default), 'none'.", Type::Choice, vec!["keep", "none"], Some("keep")),
            ("c=MODE   Use of the cache: default or none", Type::Choice, vec!["default", "none"], None),
            ("b=<BOOL>  Whether (default: false).", Type::Boolean, vec!["true", "false"], Some("false")),
            ("rdelay=<NN>[ms]  Delay.", Type::Time, vec![], None),
            ("f=FILENAME  (required) A file.", Type::File, vec![], None),
            ("format=raw   As it is", Type::Choice, vec!["raw"], None),
            ("s=<SIZE>  Size (default: as below).", Type::Size, vec![], Some("as below")),
        ] {
            let found = of(help);
            let [parameter] = &found.list[..] else { panic!("{found:?}") };
            assert_eq!(
                (parameter.kind(), parameter.choices(), parameter.default_value()),
                (kind, choices, default),
                "{help}"
            );
        }
    }

    /// Whatever a bundled layer takes can be listed.
    #[test]
    fn the_help_of_every_layer_can_be_read() {
        let filters = nbdkit_filters::names().filter_map(nbdkit_filters::load).map(|filter| filter.info());
        let plugins = nbdkit_plugins::names().filter_map(nbdkit_plugins::load).map(|plugin| plugin.info());
        for info in filters.chain(plugins) {
            for parameter in Parameters::of(&info).list {
                assert!(!parameter.what.is_empty(), "{}: {:?} is for nothing", info.name, parameter.keys);
            }
        }
    }
}
