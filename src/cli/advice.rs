//! Hints in errors about words that fit nowhere: the nearest name, the layer that takes the parameter, the plugin that
//! takes the URL.
//!
//! What the bundled layers take is read from their own help (`Info::config_help`), so there is no second list of it to
//! keep. Names count as near by the Damerau–Levenshtein distance, in which the slip of swapping two letters is one step.

use std::{
    ffi::{OsStr, OsString},
    fmt::Write as _,
    io::Read,
    path::Path,
};

use anyhow::{Error, Result, anyhow, bail};
use nbdkit_core::{Chain, Info};
use nbdkit_loader::{
    DebugFlags,
    lookup::{self, Found, Kind},
};

use crate::{
    chain::{bundled, bundled_names, split},
    parameters::Parameters,
};

/// URLs, and the plugin that takes them with the words to write after its name.
const URLS: &[(&str, &str, &str)] = &[
    ("nbd://", "nbd", "URL"),
    ("nbds://", "nbd", "URL"),
    ("nbd+unix://", "nbd", "URL"),
    ("nbds+unix://", "nbd", "URL"),
    ("nbd+vsock://", "nbd", "URL"),
    ("nbds+vsock://", "nbd", "URL"),
    ("http://", "curl", "URL"),
    ("https://", "curl", "URL"),
    ("ftp://", "curl", "URL"),
    ("ftps://", "curl", "URL"),
    ("ssh://", "ssh", "host=HOST /PATH"),
    ("sftp://", "ssh", "host=HOST /PATH"),
    ("s3://", "S3", "bucket=BUCKET key=KEY"),
    ("gs://", "gcs", "bucket=BUCKET key=KEY"),
    ("nfs://", "nfs", "URL"),
    ("magnet:?", "torrent", "URL"),
];

/// The plugin that takes a URL, and how; None: it is no URL of a known kind.
fn for_url(word: &OsStr) -> Option<(&'static str, String)> {
    let word = word.to_str()?;
    let starts =
        |scheme: &str| word.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme));
    let (_, plugin, words) = URLS.iter().find(|(scheme, ..)| starts(scheme))?;
    Some((plugin, words.replace("URL", &format!("'{word}'"))))
}

/// Whether a name is that of a bundled filter.
fn is_filter(name: &str) -> bool {
    nbdkit_filters::names().any(|known| known == name)
}

/// Whether a name is that of a bundled plugin.
fn is_plugin(name: &str) -> bool {
    bundled_names().any(|known| known == name)
}

/// The candidate that a word is most likely meant to be: at most a third of its letters are wrong.
fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    let distance = |known: &str| {
        let allowed = (word.len().min(known.len()) / 3).max(1);
        Some(strsim::damerau_levenshtein(&word, &known.to_lowercase())).filter(|d| *d <= allowed)
    };
    candidates
        .into_iter()
        .filter_map(|known| Some((distance(known)?, known)))
        .min_by_key(|(d, _)| *d)
        .map(|(_, k)| k)
}

/// The keys of the parameters that a layer takes.
fn keys(info: &Info) -> Vec<String> {
    Parameters::of(info).keys().map(str::to_owned).collect()
}

/// The error for a plugin or filter that there is not.
pub(crate) fn unknown(kind: Kind, name: &OsStr) -> Error {
    let shown = name.display();
    let text = name.to_str().unwrap_or_default();
    match kind {
        _ if name.is_empty() => {
            anyhow!("the name of the {} is empty: --help lists those there are", kind.name())
        }
        Kind::Plugin => match (of_plugin(name), nearest(text, bundled_names())) {
            (Some(advice), _) => anyhow!(advice),
            (None, Some(known)) => anyhow!("unknown plugin '{shown}': did you mean '{known}'?"),
            (None, None) => match nearest(text, nbdkit_filters::names()) {
                Some(known) => anyhow!("unknown plugin '{shown}': did you mean the filter --filter={known}?"),
                None => anyhow!("unknown plugin '{shown}': --help lists those there are"),
            },
        },
        Kind::Filter => match (of_filter(text), nearest(text, nbdkit_filters::names())) {
            (Some(advice), _) => anyhow!(advice),
            (None, Some(known)) => anyhow!("unknown filter '{shown}': did you mean '{known}'?"),
            (None, None) => anyhow!("unknown filter '{shown}': --help lists those there are"),
        },
    }
}

/// What somebody wants who gives this in place of a plugin, if that can be told.
fn of_plugin(name: &OsStr) -> Option<String> {
    let shown = name.display();
    if let Some((key, value)) = split(name) {
        let value = value.display();
        return Some(match key {
            "filter" => format!("'{shown}' is no plugin: a filter is added by an option, --filter={value}"),
            _ => format!("the plugin comes first, and '{shown}' is a parameter: PLUGIN {shown}"),
        });
    }
    if let Some((plugin, words)) = for_url(name) {
        return Some(format!("'{shown}' is a URL, which the plugin {plugin} takes: {plugin} {words}"));
    }
    if name.to_str().is_some_and(is_filter) {
        return Some(format!(
            "'{shown}' is a filter, and the disk comes from a plugin: --filter={shown} PLUGIN"
        ));
    }
    of_file(name)
}

/// What serves a file or directory that was given in place of a plugin.
fn of_file(name: &OsStr) -> Option<String> {
    let (shown, path) = (name.display(), Path::new(name));
    let kind = std::fs::metadata(path).ok()?.file_type();
    Some(if kind.is_dir() {
        format!("'{shown}' is a directory and not a plugin: to serve the files in it, file dir={shown}")
    } else {
        format!("'{shown}' is a file and not a plugin: to serve it, file {shown}")
    })
}

/// What somebody wants who gives this as a filter, if that can be told.
fn of_filter(name: &str) -> Option<String> {
    if name.contains(',') {
        let each: Vec<_> = name.split(',').filter(|name| !name.is_empty()).collect();
        let options = each.iter().fold(String::new(), |all, name| all + " --filter=" + name);
        return Some(format!("--filter={name}: each filter has an option of its own:{options}"));
    }
    if let Some((filter, value)) = name.split_once('=').filter(|(filter, _)| is_filter(filter)) {
        let takes =
            nbdkit_filters::load(filter).is_some_and(|layer| keys(&layer.info()).iter().any(|k| k == filter));
        let parameter = if takes { format!("{filter}={value}") } else { "KEY=VALUE".into() };
        return Some(format!(
            "--filter={name}: parameters follow the plugin: --filter={filter} PLUGIN {parameter}"
        ));
    }
    if is_plugin(name) {
        return Some(format!(
            "'{name}' is a plugin and not a filter: give it after the options, without --filter="
        ));
    }
    Path::new(name)
        .is_file()
        .then(|| format!("'{name}' is a file and not a filter: --help lists those there are"))
}

/// Looks for the words before the plugin that should follow it.
///
/// # Errors
/// If the first word is no plugin, and the second is.
pub(crate) fn order(words: &[OsString]) -> Result<()> {
    let [first, second, ..] = words else { return Ok(()) };
    let is_known = |word: &OsStr| word.to_str().is_some_and(|word| is_plugin(word) || is_filter(word));
    let is_filter_option = split(first).is_some_and(|(key, _)| key == "filter");
    let plugin = second.to_str().filter(|name| is_plugin(name));
    match plugin {
        Some(plugin)
            if !is_known(first)
                && !is_filter_option
                && lookup::find(Kind::Plugin, first)
                    .is_none_or(|found| matches!(found, Found::Library(path) if !is_library(&path))) =>
        {
            bail!("the plugin comes first, and '{}' stands before {plugin}: {plugin} ...", first.display())
        }
        _ => Ok(()),
    }
}

/// Whether a file is an ELF file.
fn is_library(path: &Path) -> bool {
    let mut start = [0; 4];
    std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == *b"\x7fELF"
}

/// Looks at a file that is about to be loaded as a plugin or filter, for what people give by mistake.
///
/// # Errors
/// If it is no shared library, or not there.
pub(crate) fn library(kind: Kind, name: &OsStr, path: &Path) -> Result<()> {
    let advice = |name: &OsStr| match kind {
        Kind::Plugin => of_plugin(name),
        Kind::Filter => name.to_str().and_then(of_filter),
    };
    if is_library(path) {
        return Ok(());
    }
    match advice(name) {
        Some(advice) => bail!(advice),
        // The loader knows what is wrong with it.
        None if path.exists() => Ok(()),
        None if kind == Kind::Plugin && path.extension().is_none_or(|e| e != "so") => {
            bail!("there is no file '{}'; and the plugin comes first, as in: file {0}", name.display())
        }
        None => bail!("cannot open {}: {}: the file does not exist", kind.name(), name.display()),
    }
}

/// Refuses a URL that is given to a bundled plugin that serves files.
///
/// # Errors
/// Then: the message names the plugin that takes it.
pub(crate) fn url(chain: &Chain, word: &OsStr) -> Result<()> {
    let info = chain.plugin().info();
    if info.path.is_some() || info.magic_config_key.as_deref() != Some("file") {
        return Ok(());
    }
    let value = match split(word) {
        Some(("file", value)) => value,
        Some(_) => return Ok(()),
        None => word,
    };
    match for_url(value) {
        Some((plugin, words)) if !Path::new(value).exists() => bail!(
            "'{}' is a URL, and {} serves files: the plugin {plugin} takes it: {plugin} {words}",
            value.display(),
            info.name
        ),
        _ => Ok(()),
    }
}

/// The error for a bare word that nobody could use, if it is the name of a layer: one word too many, or in the wrong
/// place.
pub(crate) fn misplaced(chain: &Chain, word: &OsStr) -> Option<Error> {
    let name = word.to_str()?;
    if is_filter(name) {
        return Some(anyhow!("'{name}' is a filter: --filter={name} adds it"));
    }
    let plugin = chain.plugin_name();
    is_plugin(name)
        .then(|| anyhow!("'{name}' is a plugin, and the plugin is {plugin} already: leave one out"))
}

/// The error for a bare word after a plugin that takes none.
pub(crate) fn too_many(chain: &Chain, word: &OsStr) -> Error {
    let mut text = format!("'{}' is one word too many: {} takes ", word.display(), chain.plugin_name());
    let keys = keys(&chain.plugin().info());
    if keys.is_empty() {
        text += "no parameters";
    } else {
        let _ = write!(text, "KEY=VALUE, with the keys {}", keys.join(" "));
    }
    anyhow!(text)
}

/// The error for a parameter that no layer of the chain takes: who does, or which one is near.
pub(crate) fn unknown_parameter(chain: &Chain, key: &str, value: &OsStr) -> Error {
    let start = format!("unknown parameter '{key}'");
    if key == "filter" || key == "filters" {
        return anyhow!("{start}: a filter is added by an option, --filter={}", value.display());
    }
    let infos = chain.infos();
    let absent: Vec<_> = nbdkit_filters::names()
        .filter(|name| infos.iter().all(|info| info.name != *name))
        .filter_map(|name| Some((name, keys(&nbdkit_filters::load(name)?.info()))))
        .collect();
    if let Some((filter, _)) = absent.iter().find(|(_, keys)| keys.iter().any(|known| known == key)) {
        return anyhow!("{start}: it belongs to the filter {filter}: add --filter={filter}");
    }
    let taken: Vec<_> = infos.iter().flat_map(keys).collect();
    if let Some(near) = nearest(key, taken.iter().map(|key| &**key)) {
        return anyhow!("{start}: did you mean '{near}'?");
    }
    let plugin = chain.plugin_name();
    let others: Vec<_> = bundled_names()
        .filter(|name| {
            bundled(name, &mut DebugFlags::default())
                .is_some_and(|other| keys(&other.info()).iter().any(|known| known == key))
        })
        .collect();
    if !others.is_empty() {
        return anyhow!("{start}: {plugin} does not take it, only {}", others.join(" "));
    }
    let near =
        absent.iter().find_map(|(filter, keys)| Some((filter, nearest(key, keys.iter().map(|key| &**key))?)));
    match near {
        Some((filter, near)) => {
            anyhow!("{start}: did you mean '{near}' of the filter {filter} (add --filter={filter})?")
        }
        None if taken.is_empty() => anyhow!("{start}: {plugin} takes no parameters"),
        None if infos.len() > 1 => {
            anyhow!("{start}: {plugin} and its filters take {}", taken.join(" "))
        }
        None => anyhow!("{start}: {plugin} takes {}", taken.join(" ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_near_and_another_word_is_not() {
        let names = || nbdkit_filters::names().chain(bundled_names());
        for (word, known) in [
            ("memroy", Some("memory")),
            ("Memory", Some("memory")),
            ("ofset", Some("offset")),
            ("coww", Some("cow")),
            ("block-size", Some("blocksize")),
            ("retry_request", Some("retry-request")),
            ("torrent", None),
            ("qqqq", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, names()), known, "{word}");
        }
    }

    /// The help names what the layer takes, and nothing else: each key is taken by the layer itself.
    #[test]
    fn keys_are_those_that_the_layers_take() {
        for name in nbdkit_filters::names() {
            let mut filter = nbdkit_filters::load(name).unwrap();
            for key in keys(&filter.info()) {
                let mut passed_on = false;
                let _ = filter.config(&key, OsStr::new(""), &mut |_, _| {
                    passed_on = true;
                    Ok(())
                });
                assert!(!passed_on, "{name} does not take {key}, which its help names");
            }
        }
        for name in bundled_names() {
            for key in keys(&bundled(name, &mut DebugFlags::default()).unwrap().info()) {
                let taken = bundled(name, &mut DebugFlags::default()).unwrap().config(&key, OsStr::new(""));
                // What stands for the names of all methods.
                assert!(!matches!(taken, Ok(false)) || key == "METHOD", "{name} does not take {key}");
            }
        }
    }
}
