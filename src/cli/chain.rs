//! From names on the command line to a chain: name → registry or file, and words → parameters.

use std::{
    ffi::{OsStr, OsString},
    path::PathBuf,
};

use anyhow::{Context as _, Error, Result, anyhow, bail};
use nbdkit_core::{Chain, Filter, Plugin, params};
use nbdkit_loader::{
    DebugFlags, load_filter, load_plugin,
    lookup::{self, Found, Kind},
};

/// Loads the plugin and the filters, the outermost filter first. Nothing is configured yet, but a plugin that runs
/// a script has it.
///
/// # Errors
/// A name that is not known; the message suggests one that looks like it. What is wrong with a file.
pub fn load(plugin: &OsStr, filters: &[OsString], mut debug: DebugFlags) -> Result<Chain> {
    let (plugin, script) = find_plugin(plugin, &mut debug)?;
    let filters = filters.iter().map(|name| find_filter(name, &mut debug)).collect::<Result<_>>()?;
    let mut chain = Chain::new(plugin, filters);
    let names: Vec<_> = chain.infos().into_iter().map(|info| info.name).collect();
    debug.warn_unused(&names);
    if let Some(script) = script {
        chain.config("script", script.as_os_str())?;
    }
    Ok(chain)
}

/// The plugin that needs the loader, and so is not among the others.
const COMPILER: &str = "cc";

/// A bundled plugin of that name.
fn bundled(name: &str) -> Option<Box<dyn Plugin>> {
    if name == COMPILER { Some(nbdkit_loader::cc()) } else { nbdkit_plugins::load(name) }
}

/// The names of the bundled plugins, in alphabetical order.
fn bundled_names() -> impl Iterator<Item = &'static str> {
    std::iter::once(COMPILER).chain(nbdkit_plugins::names())
}

/// Finds a plugin, and its script if the name is that of one.
fn find_plugin(name: &OsStr, debug: &mut DebugFlags) -> Result<(Box<dyn Plugin>, Option<PathBuf>)> {
    if let Some(bundled) = name.to_str().and_then(bundled) {
        return Ok((bundled, None));
    }
    match lookup::find(Kind::Plugin, name) {
        Some(Found::Library(path)) => Ok((load_plugin(&path, debug)?, None)),
        Some(Found::Script { path, plugin: Some(language) }) => {
            let plugin =
                find_language(language.as_ref(), debug).with_context(|| path.display().to_string())?;
            Ok((plugin, Some(path)))
        }
        Some(Found::Script { path, plugin: None }) => {
            bail!("{}: the first line of the script must be #!/usr/sbin/nbdkit PLUGIN", path.display())
        }
        None => Err(unknown(Kind::Plugin, name, bundled_names())),
    }
}

/// Finds the plugin that runs a script: not a script itself.
fn find_language(name: &OsStr, debug: &mut DebugFlags) -> Result<Box<dyn Plugin>> {
    if let Some(bundled) = name.to_str().and_then(bundled) {
        return Ok(bundled);
    }
    match lookup::find(Kind::Plugin, name) {
        Some(Found::Library(path)) => load_plugin(&path, debug),
        _ => Err(unknown(Kind::Plugin, name, bundled_names())),
    }
}

fn find_filter(name: &OsStr, debug: &mut DebugFlags) -> Result<Box<dyn Filter>> {
    if let Some(bundled) = name.to_str().and_then(nbdkit_filters::load) {
        return Ok(bundled);
    }
    match lookup::find(Kind::Filter, name) {
        Some(Found::Library(path)) => load_filter(&path, debug),
        _ => Err(unknown(Kind::Filter, name, nbdkit_filters::names())),
    }
}

/// The error for a name that nothing has; it suggests one that looks like it.
fn unknown(kind: Kind, name: &OsStr, names: impl Iterator<Item = &'static str>) -> Error {
    let (kind, name) = (kind.name(), name.to_string_lossy());
    let near = names
        .map(|known| (strsim::jaro_winkler(&name, known), known))
        .filter(|(score, _)| *score > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match near {
        Some((_, known)) => anyhow!("unknown {kind} '{name}': did you mean '{known}'?"),
        None => anyhow!("unknown {kind} '{name}': --help lists those there are"),
    }
}

/// Gives the words after the plugin's name to the chain: `KEY=VALUE`, or bare ones for the plugin's magic
/// parameter. Without such a parameter the first word, if bare, is the plugin's `script`.
///
/// # Errors
/// Those of the layers, and a bare word that nobody wants.
pub fn configure(chain: &mut Chain, words: &[OsString]) -> Result<()> {
    for (index, word) in words.iter().enumerate() {
        match split(word) {
            Some((key, value)) => chain.config(key, value)?,
            // A script says what it takes once it is known.
            None => match chain.plugin().info().magic_config_key {
                Some(key) => chain.config(&key, word)?,
                None if index == 0 => chain
                    .config("script", word)
                    .with_context(|| format!("'{}' has no KEY= and is taken as script=", word.display()))?,
                None => bail!("expecting key=value on the command line but got: {}", word.display()),
            },
        }
    }
    Ok(())
}

/// Gives the script to a plugin that runs one, so that `--help` can tell about it. `words` are those of
/// [`configure`].
///
/// # Errors
/// Those of the plugin.
pub fn configure_script(chain: &mut Chain, words: &[OsString]) -> Result<()> {
    let info = chain.plugin().info();
    let runs_scripts = info.path.is_some() && info.magic_config_key.as_deref() == Some("script");
    match words.first() {
        Some(word) if runs_scripts && split(word).is_none_or(|(key, _)| key == "script") => {
            configure(chain, &words[..1])
        }
        _ => Ok(()),
    }
}

/// Splits `KEY=VALUE`, if the word has that form.
pub fn split(word: &OsStr) -> Option<(&str, &OsStr)> {
    use std::os::unix::ffi::OsStrExt;
    let bytes = word.as_bytes();
    let at = bytes.iter().position(|b| *b == b'=')?;
    let key = std::str::from_utf8(&bytes[..at]).ok()?;
    params::is_key(key).then(|| (key, OsStr::from_bytes(&bytes[at + 1..])))
}

/// What `--help` says about the layers, the outermost first.
pub fn help(chain: &Chain) -> String {
    let infos = chain.infos();
    let mut text = String::new();
    for (i, info) in infos.iter().enumerate() {
        let kind = if i + 1 == infos.len() { "plugin" } else { "filter" };
        text += &format!("\n{kind}: {} ({})\n", info.name, info.longname);
        for part in [&info.description, &info.config_help] {
            if !part.is_empty() {
                text += part.trim_end();
                text.push('\n');
            }
        }
    }
    text
}

/// What `--version` says about the layers, the outermost first.
pub fn versions(chain: &Chain) -> String {
    chain.infos().iter().map(|info| format!("{} {}\n", info.name, info.version)).collect()
}

/// The lists of names for a `--help` without a plugin.
pub fn names_help() -> String {
    let list = |names: Vec<&str>| names.join(" ");
    format!(
        "Plugins: {}\nFilters: {}",
        list(bundled_names().collect()),
        list(nbdkit_filters::names().collect())
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words() {
        assert_eq!(split(OsStr::new("a=b=c")), Some(("a", OsStr::new("b=c"))));
        assert_eq!(split(OsStr::new("a=")), Some(("a", OsStr::new(""))));
        assert_eq!(split(OsStr::new("./a=b")), None);
        assert_eq!(split(OsStr::new("=b")), None);
        assert_eq!(split(OsStr::new("plain")), None);
    }

    #[test]
    fn near_names() {
        let text = |name: &str| load(OsStr::new(name), &[], DebugFlags::default()).unwrap_err().to_string();
        assert!(text("memroy").contains("'memory'"), "{}", text("memroy"));
        assert!(text("qqqq").contains("--help"));
    }
}
