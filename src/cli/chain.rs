//! From names on the command line to a chain: name → registry or file, and words → parameters.

use std::{
    ffi::{OsStr, OsString},
    path::PathBuf,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nbdkit_core::{Chain, Filter, Plugin, UnknownParameter, params};
use nbdkit_loader::{
    DebugFlags, load_filter, load_plugin,
    lookup::{self, Found, Kind},
};

use crate::{advice, subchain};

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
    // What is not used yet may be for the plugin that will be compiled.
    if chain.plugin_name() != COMPILER {
        debug.warn_unused(&names);
    }
    chain.set_chains(&subchain::maker());
    if let Some(script) = script {
        chain.config("script", script.as_os_str())?;
    }
    Ok(chain)
}

/// Checks the order of the words, the first of which is to be the plugin's name.
///
/// # Errors
/// If it is a later one: the message says so.
pub fn check_order(words: &[OsString]) -> Result<()> {
    advice::order(words)
}

/// The plugin that needs the loader, and so is not among the others.
const COMPILER: &str = "cc";

/// A bundled plugin of that name.
pub(crate) fn bundled(name: &str, debug: &mut DebugFlags) -> Option<Box<dyn Plugin>> {
    if name == COMPILER {
        return Some(nbdkit_loader::cc(debug));
    }
    let mut plugin = nbdkit_plugins::load(name)?;
    debug.give(name, |flag, value| plugin.debug_flag(flag, value));
    Some(plugin)
}

/// The names of the bundled plugins, in alphabetical order.
pub(crate) fn bundled_names() -> impl Iterator<Item = &'static str> {
    std::iter::once(COMPILER).chain(nbdkit_plugins::names())
}

/// Finds a plugin, and its script if the name is that of one.
fn find_plugin(name: &OsStr, debug: &mut DebugFlags) -> Result<(Box<dyn Plugin>, Option<PathBuf>)> {
    if let Some(bundled) = name.to_str().and_then(|name| bundled(name, debug)) {
        return Ok((bundled, None));
    }
    match lookup::find(Kind::Plugin, name) {
        Some(Found::Library(path)) => {
            advice::library(Kind::Plugin, name, &path)?;
            Ok((load_plugin(&path, debug)?, None))
        }
        Some(Found::Script { path, plugin: Some(language) }) => {
            let plugin =
                find_language(language.as_ref(), debug).with_context(|| path.display().to_string())?;
            Ok((plugin, Some(path)))
        }
        Some(Found::Script { path, plugin: None }) => {
            bail!("{}: the first line of the script must be #!/usr/sbin/nbdkit PLUGIN", path.display())
        }
        None => Err(advice::unknown(Kind::Plugin, name)),
    }
}

/// Finds the plugin that runs a script: not a script itself.
fn find_language(name: &OsStr, debug: &mut DebugFlags) -> Result<Box<dyn Plugin>> {
    if let Some(bundled) = name.to_str().and_then(|name| bundled(name, debug)) {
        return Ok(bundled);
    }
    match lookup::find(Kind::Plugin, name) {
        Some(Found::Library(path)) => load_plugin(&path, debug),
        _ => Err(advice::unknown(Kind::Plugin, name)),
    }
}

fn find_filter(name: &OsStr, debug: &mut DebugFlags) -> Result<Box<dyn Filter>> {
    let bundled = name.to_str().and_then(|name| Some((name, nbdkit_filters::load(name)?)));
    if let Some((name, mut filter)) = bundled {
        debug.give(name, |flag, value| filter.debug_flag(flag, value));
        return Ok(filter);
    }
    match lookup::find(Kind::Filter, name) {
        Some(Found::Library(path)) => {
            advice::library(Kind::Filter, name, &path)?;
            load_filter(&path, debug)
        }
        _ => Err(advice::unknown(Kind::Filter, name)),
    }
}

/// Gives the words after the plugin's name to the chain: `KEY=VALUE`, or bare ones for the plugin's magic
/// parameter. Without such a parameter the first word, if bare, is the plugin's `script`. `@FILE` stands for the words in
/// a file.
///
/// # Errors
/// Those of the layers, and a bare word that nobody wants.
pub fn configure(chain: &mut Chain, words: &[OsString]) -> Result<()> {
    for (index, word) in words.iter().enumerate() {
        match parameters_file(chain, word)? {
            Some((path, inner)) => {
                for (index, word) in inner.iter().enumerate() {
                    parameter(chain, index, word).with_context(|| path.display().to_string())?;
                }
            }
            None => parameter(chain, index, word)?,
        }
    }
    Ok(())
}

/// Gives one word to the chain, the one at `index`.
fn parameter(chain: &mut Chain, index: usize, word: &OsStr) -> Result<()> {
    advice::url(chain, word)?;
    if let Some((key, value)) = split(word) {
        return give(chain, key, value);
    }
    // A script says what it takes once it is known.
    match chain.plugin().info().magic_config_key {
        Some(key) => give(chain, &key, word).map_err(|e| match advice::misplaced(chain, word) {
            Some(advice) if !word.is_empty() => advice,
            _ if index == 0 => e,
            _ => e.context(format!("'{}' has no KEY= and is taken as {key}=", word.display())),
        }),
        None if index == 0 => chain.config("script", word).map_err(|e| {
            if e.is::<UnknownParameter>() {
                return advice::misplaced(chain, word).unwrap_or_else(|| advice::too_many(chain, word));
            }
            e.context(format!("'{}' has no KEY= and is taken as script=", word.display()))
        }),
        None => Err(advice::misplaced(chain, word).unwrap_or_else(|| {
            anyhow!("expecting key=value on the command line but got: {}", word.display())
        })),
    }
}

/// Gives a parameter to the chain. Who takes it instead, if nobody does, is in the error.
fn give(chain: &mut Chain, key: &str, value: &OsStr) -> Result<()> {
    chain.config(key, value).map_err(|e| match e.downcast_ref() {
        Some(UnknownParameter(key)) => advice::unknown_parameter(chain, key, value),
        None => e,
    })
}

/// The file that `@FILE` names, and the words in it: each line that is neither empty nor begins with `#` is one.
/// None: some other word.
fn parameters_file(chain: &Chain, word: &OsStr) -> Result<Option<(PathBuf, Vec<OsString>)>> {
    use std::os::unix::ffi::OsStrExt;
    let Some(path) = word.as_bytes().strip_prefix(b"@").map(|path| PathBuf::from(OsStr::from_bytes(path)))
    else {
        return Ok(None);
    };
    // "@1M" is data too.
    if chain.plugin().info().magic_config_key.as_deref() == Some("data") && !path.is_file() {
        return Ok(None);
    }
    ensure!(!path.as_os_str().is_empty(), "'@' needs the name of a file with parameters: @FILE");
    let text = std::fs::read(&path).with_context(|| {
        format!("cannot read the parameters in {} (from the word '{}')", path.display(), word.display())
    })?;
    let lines = text.split(|b| *b == b'\n').map(<[u8]>::trim_ascii);
    let words = lines.filter(|line| !line.is_empty() && !line.starts_with(b"#"));
    let words = words.map(|line| OsStr::from_bytes(line).to_owned()).collect();
    Ok(Some((path, words)))
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

/// What `--version` says about the layers, the outermost first.
pub fn versions(chain: &Chain) -> String {
    chain.infos().iter().map(|info| format!("{} {}\n", info.name, info.version)).collect()
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
}
