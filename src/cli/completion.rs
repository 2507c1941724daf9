//! What can follow on the command line: the one place that the scripts for all shells ask (`--complete`).
//!
//! The words up to the cursor come in, candidates for the last one come out, each with a word or two about it. A candidate is
//! a whole word, one that goes on (`KEY=`, `folder/`) ends in `=` or `/`. Nothing here may fail or print: whoever presses
//! Tab wants either a list or silence.

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::{Read, Seek, SeekFrom},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

use clap::{Arg, Command, ValueHint};
use nbdkit_core::Info;
use nbdkit_loader::{
    DebugFlags,
    lookup::{self, Kind},
};

use crate::{
    chain::{self, split},
    layers,
    parameters::{Parameter, Parameters, Type},
};

/// The scripts for shells, by name. They ask the program and do nothing else.
pub const SCRIPTS: [(&str, &str); 3] = [
    ("bash", include_str!("completion/nbdkit.bash")),
    ("zsh", include_str!("completion/nbdkit.zsh")),
    ("fish", include_str!("completion/nbdkit.fish")),
];

/// The script for a shell.
///
/// # Errors
/// For a shell that is not known.
pub fn script(shell: &str) -> anyhow::Result<&'static str> {
    let found = SCRIPTS.iter().find(|(name, _)| *name == shell).map(|(_, script)| *script);
    found.ok_or_else(|| anyhow::anyhow!("--completions={shell}: choose bash, zsh or fish"))
}

/// What a candidate is, and what it is for.
pub type Candidate = (OsString, String);

/// What only the program knows.
#[derive(Debug, Default)]
pub struct Program {
    /// Whether the last word is the mountpoint.
    pub mounts: bool,
    /// The options whose value is a live mount, and these.
    pub live: Vec<PathBuf>,
}

/// Options whose value is a live mount.
const LIVE: [&str; 2] = ["unmount", "stats"];
/// Options whose value is one of a few words, with these.
const WORDS: [(&str, &[&str]); 5] = [
    ("tls", &["off", "on", "require"]),
    ("cache", &["auto", "none", "writeback"]),
    ("log", &["stderr", "syslog", "null", "default"]),
    ("log-format", &["text", "json"]),
    ("completions", &["bash", "zsh", "fish"]),
];
/// More names than this are not offered.
const MAX: usize = 1000;

/// Prints the candidates for the last of the words, the first of which is the program's name: `CANDIDATE`, a tab and what it
/// is for on a line each.
pub fn print(command: &Command, words: &[OsString], program: &Program) -> Vec<u8> {
    let mut text = Vec::new();
    for (candidate, what) in candidates(command, words, program) {
        let is_a_line = !candidate.as_bytes().iter().any(|b| b"\n\t".contains(b));
        if is_a_line {
            text.extend_from_slice(candidate.as_bytes());
            text.push(b'\t');
            text.extend_from_slice(what.replace(['\n', '\t'], " ").as_bytes());
            text.push(b'\n');
        }
    }
    text
}

/// The words behind `--complete --`, if that is what a program was started for: they are no command line of its own.
pub fn asked(line: impl IntoIterator<Item = OsString>) -> Option<Vec<OsString>> {
    let mut line = line.into_iter().skip(1);
    (line.next()? == "--complete" && line.next()? == "--").then(|| line.collect())
}

fn candidates(command: &Command, words: &[OsString], program: &Program) -> Vec<Candidate> {
    let Some((current, before)) = words.get(1..).and_then(<[_]>::split_last) else { return Vec::new() };
    let typed = Typed::new(command, before);
    let mut found = match (&typed.option, split_option(current)) {
        (Some(option), _) => of_option(option, "", current, &typed, program),
        (None, Some((name, value))) => match option(command, name) {
            Some(option) => of_option(option, &format!("--{name}="), value, &typed, program),
            None => Vec::new(),
        },
        _ if current.as_bytes().starts_with(b"-") && !typed.only_words => options(command),
        _ => of_word(current, &typed, program),
    };
    found.retain(|(candidate, _)| candidate.as_bytes().starts_with(current.as_bytes()));
    found.truncate(MAX);
    found
}

/// What stands before the word at the cursor.
#[derive(Default)]
struct Typed<'a> {
    filters: Vec<OsString>,
    /// The words that are no options: the plugin, and its parameters.
    words: Vec<OsString>,
    /// The option that wants the next word as its value.
    option: Option<&'a Arg>,
    /// After `--`.
    only_words: bool,
}

impl<'a> Typed<'a> {
    fn new(command: &'a Command, words: &[OsString]) -> Self {
        let mut typed = Typed::default();
        let mut filters = Vec::new();
        for word in words {
            if let Some(option) = typed.option.take() {
                if option.get_long() == Some("filter") {
                    filters.push(word.clone());
                }
            } else if typed.only_words || !word.as_bytes().starts_with(b"-") || word == "-" {
                typed.words.push(word.clone());
            } else if word == "--" {
                typed.only_words = true;
            } else if let Some((name, value)) = split_option(word) {
                if name == "filter" {
                    filters.push(value.to_owned());
                }
            } else {
                typed.option = with_value(command, word);
            }
        }
        typed.filters = filters;
        typed
    }

    /// The layers whose names were typed, the plugin last.
    fn layers(&self) -> Vec<Info> {
        let filters = self.filters.iter().filter_map(|name| info(Kind::Filter, name));
        let plugin = self.words.first().and_then(|name| info(Kind::Plugin, name));
        filters.chain(plugin).collect()
    }

    /// The value of a parameter of the plugin that names a file or directory.
    fn parameter(&self, key: &str, magic: bool) -> Option<&OsStr> {
        self.words.iter().skip(1).find_map(|word| match split(word) {
            Some((found, value)) => (found == key).then_some(value),
            None => magic.then_some(word.as_os_str()),
        })
    }
}

/// What a layer says about itself, if it can be found and loaded.
fn info(kind: Kind, name: &OsStr) -> Option<Info> {
    if let Some(info) = name.to_str().and_then(|name| layers::info(kind, name)) {
        return Some(info);
    }
    match kind {
        Kind::Plugin => Some(chain::load(name, &[], DebugFlags::default()).ok()?.plugin().info()),
        Kind::Filter => {
            let lookup::Found::Library(path) = lookup::find(kind, name)? else { return None };
            Some(nbdkit_loader::load_filter(&path, &mut DebugFlags::default()).ok()?.info())
        }
    }
}

/// Splits `--NAME=VALUE`.
fn split_option(word: &OsStr) -> Option<(&str, &OsStr)> {
    let rest = word.as_bytes().strip_prefix(b"--")?;
    let at = rest.iter().position(|b| *b == b'=')?;
    Some((std::str::from_utf8(&rest[..at]).ok()?, OsStr::from_bytes(&rest[at + 1..])))
}

fn takes_value(option: &Arg) -> bool {
    option.get_action().takes_values()
}

/// The option of a long name, or of another name that it has.
fn option<'a>(command: &'a Command, name: &str) -> Option<&'a Arg> {
    command
        .get_arguments()
        .find(|arg| arg.get_long() == Some(name) || arg.get_all_aliases().unwrap_or_default().contains(&name))
}

/// The option that takes the word after this one as its value.
fn with_value<'a>(command: &'a Command, word: &OsStr) -> Option<&'a Arg> {
    let word = word.to_str()?;
    let found = match word.strip_prefix("--") {
        Some(name) => option(command, name),
        // Several in one word: the first that takes a value has the rest of it, if there is any.
        None => {
            let letters = word.strip_prefix('-')?;
            let of = |letter| command.get_arguments().find(|arg| arg.get_short() == Some(letter));
            let at = letters.char_indices().find(|(_, letter)| of(*letter).is_some_and(takes_value))?;
            of(at.1).filter(|_| at.0 + at.1.len_utf8() == letters.len())
        }
    };
    found.filter(|option| takes_value(option))
}

/// All options.
fn options(command: &Command) -> Vec<Candidate> {
    let mut found = Vec::new();
    for option in command.get_arguments().filter(|option| !option.is_hide_set()) {
        let what = option.get_help().map(ToString::to_string).unwrap_or_default();
        if let Some(name) = option.get_long() {
            let equals = if takes_value(option) { "=" } else { "" };
            found.push((format!("--{name}{equals}").into(), what.clone()));
        }
        if let Some(letter) = option.get_short() {
            found.push((format!("-{letter}").into(), what));
        }
    }
    found.sort();
    found
}

/// Values of an option, after `start`.
fn of_option(
    option: &Arg,
    start: &str,
    value: &OsStr,
    typed: &Typed<'_>,
    program: &Program,
) -> Vec<Candidate> {
    let name = option.get_long().unwrap_or_default();
    let after = |found: Vec<Candidate>| with_start(start, found);
    if let Some((_, words)) = WORDS.iter().find(|(known, _)| *known == name) {
        return after(plain(words.iter().copied()));
    }
    match name {
        "filter" => after(names(Kind::Filter)),
        "export" | "exportname" => after(exports(typed)),
        "partition" => after(partitions(typed)),
        _ if LIVE.contains(&name) && !program.live.is_empty() => {
            let live = program.live.iter().map(|mount| (mount.clone().into_os_string(), "a mount".into()));
            after(live.collect())
        }
        _ => match option.get_value_hint() {
            ValueHint::Unknown if option.get_value_names().is_some_and(|n| n.iter().any(|n| *n == "DIR")) => {
                after(files(value, true))
            }
            ValueHint::Unknown => Vec::new(),
            ValueHint::DirPath => after(files(value, true)),
            _ => after(files(value, option.get_value_names().is_some_and(|n| n.iter().any(|n| *n == "DIR")))),
        },
    }
}

/// The plugin, a parameter, or the mountpoint.
fn of_word(current: &OsStr, typed: &Typed<'_>, program: &Program) -> Vec<Candidate> {
    if typed.words.is_empty() {
        return match lookup::is_path(current) {
            true => files(current, false),
            false => names(Kind::Plugin),
        };
    }
    let layers = typed.layers();
    let all: Vec<_> = layers.iter().map(Parameters::of).collect();
    if let Some((key, value)) = split(current) {
        let parameter = all.iter().find_map(|parameters| parameters.find(key));
        return parameter
            .map_or(Vec::new(), |p| with_start(&format!("{key}="), values(p, key, value, typed)));
    }
    let mut found = Vec::new();
    for parameter in all.iter().flat_map(|parameters| &parameters.list) {
        let keys = parameter.keys.iter().filter(|key| *key != "METHOD");
        found.extend(keys.map(|key| (format!("{key}=").into(), parameter.sentence())));
    }
    let magic = all.last().and_then(|plugin| plugin.list.iter().find(|parameter| parameter.is_magic));
    if let Some(magic) = magic {
        let key = magic.keys.first().map(String::as_str).unwrap_or_default();
        found.extend(values(magic, key, current, typed));
    } else if typed.words.len() == 1
        && layers.last().is_some_and(|info| ["sh", "python", "lua"].contains(&&*info.name))
    {
        found.extend(files(current, false));
    }
    if program.mounts {
        found.extend(files(current, true));
    }
    found.sort();
    found.dedup_by(|a, b| a.0 == b.0);
    found
}

/// Values of a parameter.
fn values(parameter: &Parameter, key: &str, value: &OsStr, typed: &Typed<'_>) -> Vec<Candidate> {
    match (key, parameter.kind()) {
        ("partition", _) => partitions(typed),
        ("default-export" | "exportname", _) => exports(typed),
        (_, Type::File) => files(value, false),
        (_, Type::Directory) => files(value, true),
        _ => plain(parameter.choices()),
    }
}

fn plain<'a>(words: impl IntoIterator<Item = &'a str>) -> Vec<Candidate> {
    words.into_iter().map(|word| (word.into(), String::new())).collect()
}

fn with_start(start: &str, found: Vec<Candidate>) -> Vec<Candidate> {
    let start = OsStr::new(start);
    found.into_iter().map(|(word, what)| ([start, &word].into_iter().collect(), what)).collect()
}

fn names(kind: Kind) -> Vec<Candidate> {
    layers::all(kind).into_iter().map(|layer| (layer.name.into(), layer.summary.to_owned())).collect()
}

/// Files that begin so, and directories with a slash at their end; hidden ones only if asked for.
fn files(typed: &OsStr, only_directories: bool) -> Vec<Candidate> {
    let bytes = typed.as_bytes();
    let at = bytes.iter().rposition(|b| *b == b'/').map_or(0, |at| at + 1);
    let (folder, start) = bytes.split_at(at);
    let place = if folder.is_empty() { Path::new(".") } else { Path::new(OsStr::from_bytes(folder)) };
    let place = match (folder.strip_prefix(b"~/"), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) => Path::new(&home).join(OsStr::from_bytes(rest)),
        _ => place.to_owned(),
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(place).into_iter().flatten().flatten().take(100_000) {
        let name = entry.file_name();
        let is_hidden = name.as_bytes().starts_with(b".") && !start.starts_with(b".");
        if is_hidden || !name.as_bytes().starts_with(start) {
            continue;
        }
        let is_directory = fs::metadata(entry.path()).is_ok_and(|metadata| metadata.is_dir());
        if is_directory || !only_directories {
            let mut path = [folder, name.as_bytes()].concat();
            if is_directory {
                path.push(b'/');
            }
            found.push((OsString::from_vec(path), String::new()));
        }
    }
    found.sort();
    found
}

/// The exports of a `dir=`: the files in it.
fn exports(typed: &Typed<'_>) -> Vec<Candidate> {
    let Some(directory) = typed.parameter("dir", false) else { return Vec::new() };
    let mut start = directory.to_owned();
    start.push("/");
    let skip = start.len();
    let files = files(&start, false).into_iter().filter(|(path, _)| !path.as_bytes().ends_with(b"/"));
    files.map(|(path, what)| (OsStr::from_bytes(&path.as_bytes()[skip..]).to_owned(), what)).collect()
}

/// The numbers of the partitions of a file that the plugin serves.
fn partitions(typed: &Typed<'_>) -> Vec<Candidate> {
    let Some(path) = typed.parameter("file", true) else { return Vec::new() };
    let Ok(mut file) = fs::File::open(path) else { return Vec::new() };
    let size = file.seek(SeekFrom::End(0)).unwrap_or_default();
    let mut read =
        |buffer: &mut [u8], at: u64| file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(buffer));
    let Ok(table) = nbdkit_common::read_table(size, None, &mut read) else { return Vec::new() };
    let what = |length: u64| format!("{} MiB", length >> 20);
    table.partitions.iter().map(|p| (p.number.to_string().into(), what(p.length))).collect()
}
