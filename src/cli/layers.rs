//! The plugins and filters that there are: bundled, and installed where names are looked up.

use std::{collections::BTreeMap, path::PathBuf};

use nbdkit_core::Info;
use nbdkit_loader::{DebugFlags, lookup::Kind};
use serde_json::{Value, json};

use crate::{
    chain::{bundled, bundled_names},
    parameters::Parameters,
};

// One line for each layer, from the NAME sections of the manual pages: PLUGINS and FILTERS, sorted by name.
include!(concat!(env!("OUT_DIR"), "/summaries.rs"));

/// A plugin or filter.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Its name on the command line.
    pub name: String,
    /// What it is for, in one line; empty if that is not known without loading it.
    pub summary: &'static str,
    /// The file that it is in; None: it is bundled.
    pub path: Option<PathBuf>,
}

/// What a layer is for, in one line.
pub fn summary(kind: Kind, name: &str) -> Option<&'static str> {
    let list = match kind {
        Kind::Plugin => PLUGINS,
        Kind::Filter => FILTERS,
    };
    list.iter().find(|(known, _)| *known == name).map(|(_, summary)| *summary)
}

/// What a bundled layer is for. One calls itself other than on the command line.
pub fn summary_of(kind: Kind, layer: &Info) -> Option<&'static str> {
    summary(kind, &layer.name).or_else(|| {
        let named = all(kind).into_iter().filter(|known| known.path.is_none());
        named
            .filter(|known| info(kind, &known.name).is_some_and(|info| info.name == layer.name))
            .map(|k| k.summary)
            .next()
    })
}

/// All layers of a kind in alphabetical order. One that is bundled hides those of its name in files.
pub fn all(kind: Kind) -> Vec<Layer> {
    let mut found = BTreeMap::new();
    let mut add = |name: &str, path: Option<PathBuf>| {
        let summary = summary(kind, name).unwrap_or_default();
        found.entry(name.to_owned()).or_insert_with(|| Layer { name: name.to_owned(), summary, path });
    };
    match kind {
        Kind::Plugin => bundled_names().for_each(|name| add(name, None)),
        Kind::Filter => nbdkit_filters::names().for_each(|name| add(name, None)),
    }
    for (name, path) in nbdkit_loader::lookup::installed(kind) {
        add(&name, Some(path));
    }
    found.into_values().collect()
}

/// What a bundled layer says about itself.
pub fn info(kind: Kind, name: &str) -> Option<Info> {
    match kind {
        Kind::Plugin => Some(bundled(name, &mut DebugFlags::default())?.info()),
        Kind::Filter => Some(nbdkit_filters::load(name)?.info()),
    }
}

/// What `--list` prints: a table for each kind.
pub fn table() -> String {
    let mut text = String::new();
    for (kind, title) in [(Kind::Plugin, "Plugins"), (Kind::Filter, "Filters")] {
        let layers = all(kind);
        let width = layers.iter().map(|layer| layer.name.len()).max().unwrap_or_default();
        text += &format!("{title}:\n");
        for layer in layers {
            let installed = layer.path.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
            let what = if layer.summary.is_empty() { installed } else { layer.summary.to_owned() };
            text += &format!("  {:<width$}  {what}\n", layer.name);
        }
        text.push('\n');
    }
    text.truncate(text.trim_end().len());
    text + "\n"
}

/// What `--list --json` prints. The parameters of layers in files are not known without loading them, which it does
/// not: `null`.
pub fn json() -> Value {
    let list = |kind| {
        let layers = all(kind).into_iter();
        layers.map(|layer| layer_json(kind, &layer)).collect::<Vec<_>>()
    };
    json!({ "plugins": list(Kind::Plugin), "filters": list(Kind::Filter) })
}

fn layer_json(kind: Kind, layer: &Layer) -> Value {
    let info = layer.path.is_none().then(|| info(kind, &layer.name)).flatten();
    let parameters = info.map(|info| {
        let list = Parameters::of(&info).list.into_iter();
        let parameters = list.map(|parameter| {
            json!({
                "key": parameter.keys.first(),
                "keys": parameter.keys,
                "value": parameter.value.replace(['<', '>'], ""),
                "type": parameter.kind().name(),
                "choices": parameter.choices(),
                "default": parameter.default_value(),
                "required": parameter.is_required(),
                "magic": parameter.is_magic,
                "description": parameter.sentence(),
            })
        });
        parameters.collect::<Vec<_>>()
    });
    json!({
        "name": layer.name,
        "summary": layer.summary,
        "path": layer.path.as_ref().map(|path| path.display().to_string()),
        "parameters": parameters,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bundled_layer_has_a_line() {
        for kind in [Kind::Plugin, Kind::Filter] {
            for layer in all(kind).into_iter().filter(|layer| layer.path.is_none()) {
                assert!(!layer.summary.is_empty(), "{} has no manual page with a NAME", layer.name);
                assert!(layer.summary.len() < 80, "{}: {}", layer.name, layer.summary);
            }
        }
    }

    #[test]
    fn the_object_has_types_and_defaults() {
        let object = json();
        let find = |list: &Value, key: &str, name: &str| {
            list.as_array().unwrap().iter().find(|item| item[key] == name).unwrap().clone()
        };
        let size = find(&find(&object["plugins"], "name", "memory")["parameters"], "key", "size");
        assert_eq!(
            (&size["type"], &size["required"], &size["magic"]),
            (&json!("size"), &json!(true), &json!(true))
        );
        let limit = find(&find(&object["filters"], "name", "limit")["parameters"], "key", "limit");
        assert_eq!((&limit["type"], &limit["default"]), (&json!("number"), &json!("1")));
    }
}
