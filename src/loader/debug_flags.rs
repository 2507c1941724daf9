//! `-D NAME.FLAG=N`: sets the C variable `NAME_debug_FLAG` of a plugin or filter.

use anyhow::{Context as _, Result};
use nbdkit_core::params;

/// The flags of a command line.
#[derive(Clone, Debug, Default)]
pub struct DebugFlags(Vec<Flag>);

#[derive(Clone, Debug)]
struct Flag {
    layer: String,
    name: String,
    value: i32,
    used: bool,
}

impl DebugFlags {
    /// Reads the values of `-D`.
    ///
    /// # Errors
    /// For one that has not the form `NAME.FLAG=N`.
    pub fn parse<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let flags = words.into_iter().map(|word| {
            Flag::parse(word).with_context(|| format!("-D '{word}' must have the format NAME.FLAG=N"))
        });
        flags.collect::<Result<_>>().map(DebugFlags)
    }

    /// Sets the variables of the layer `name`; `find` looks for one by its name with a NUL.
    pub(crate) fn apply(&mut self, name: &str, find: impl Fn(&[u8]) -> Option<*mut i32>) {
        for flag in self.0.iter_mut().filter(|flag| flag.layer == name && !flag.used) {
            flag.used = true;
            let symbol = flag.symbol();
            match find(format!("{symbol}\0").as_bytes()) {
                // SAFETY: an int of the library, which is loaded and whose code does not run yet.
                Some(variable) => unsafe { variable.write(flag.value) },
                None => flag.warn_missing(),
            }
        }
    }

    /// Warns of what nobody took, when the chain with these layers is loaded. Bundled layers have no flags.
    pub fn warn_unused(&mut self, layers: &[impl AsRef<str>]) {
        for flag in self.0.iter_mut().filter(|flag| !flag.used) {
            flag.used = true;
            if layers.iter().any(|layer| layer.as_ref() == flag.layer) {
                flag.warn_missing();
            } else {
                log::warn!("debug flag -D {}.{} was not used", flag.layer, flag.name);
            }
        }
    }

    /// The value of a flag of the server's own, `-D nbdkit.NAME=N`.
    pub fn take(&mut self, name: &str) -> Option<i32> {
        let flag = self.0.iter_mut().rev().find(|flag| flag.layer == "nbdkit" && flag.name == name)?;
        flag.used = true;
        Some(flag.value)
    }
}

impl Flag {
    fn parse(word: &str) -> Option<Self> {
        let (key, value) = word.split_once('=')?;
        let (layer, name) = key.split_once('.')?;
        let value = params::integer("-D", value.as_ref()).ok()?;
        let complete = !layer.is_empty() && !name.is_empty();
        complete.then(|| Flag { layer: layer.into(), name: name.into(), value, used: false })
    }

    fn symbol(&self) -> String {
        format!("{}_debug_{}", self.layer, self.name).replace('.', "_")
    }

    fn warn_missing(&self) {
        let Flag { layer, name, .. } = self;
        log::warn!("-D {layer}.{name}: {layer} does not contain a global variable called {}", self.symbol());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn form() {
        for bad in ["", "a", "a.b", "a=1", ".b=1", "a.=1", "a.b=", "a.b=x"] {
            let error = DebugFlags::parse([bad]).unwrap_err().to_string();
            assert!(error.contains("must have the format"), "{bad}: {error}");
        }
    }

    #[test]
    fn variables_are_set_by_name() {
        let mut flags = DebugFlags::parse(["x.a.b=7", "y.c=1", "nbdkit.backend.datapath=0"]).unwrap();
        let mut variable = 0;
        let address = &raw mut variable;
        flags.apply("x", |symbol| {
            assert_eq!(symbol, b"x_debug_a_b\0");
            Some(address)
        });
        assert_eq!(variable, 7);
        assert_eq!(flags.take("backend.datapath"), Some(0));
        assert_eq!(flags.take("backend.controlpath"), None);
    }
}
