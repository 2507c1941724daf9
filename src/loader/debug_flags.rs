//! `-D NAME.FLAG=N`: sets the C variable `NAME_debug_FLAG` of a plugin or filter.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use nbdkit_core::params;
use parking_lot::Mutex;

/// The flags of a command line. Copies share what was used: a plugin that is compiled later takes its flags then.
#[derive(Clone, Debug, Default)]
pub struct DebugFlags(Arc<Mutex<Vec<Flag>>>);

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
        Ok(DebugFlags(Arc::new(Mutex::new(flags.collect::<Result<_>>()?))))
    }

    /// Sets the variables of the layer `name`; `find` looks for one by its name with a NUL.
    pub(crate) fn apply(&mut self, name: &str, find: impl Fn(&[u8]) -> Option<*mut i32>) {
        for flag in self.0.lock().iter_mut().filter(|flag| flag.layer == name && !flag.used) {
            flag.used = true;
            let symbol = flag.symbol();
            match find(format!("{symbol}\0").as_bytes()) {
                // SAFETY: an int of the library, which is loaded and whose code does not run yet.
                Some(variable) => unsafe { variable.write(flag.value) },
                None => flag.warn_missing(),
            }
        }
    }

    /// Gives its flags to a bundled layer; `take` says whether there is one of that name.
    pub fn give(&mut self, layer: &str, mut take: impl FnMut(&str, i32) -> bool) {
        for flag in self.0.lock().iter_mut().filter(|flag| flag.layer == layer && !flag.used) {
            flag.used = take(&flag.name, flag.value);
        }
    }

    /// Warns of what nobody took, when the chain with these layers is loaded.
    pub fn warn_unused(&mut self, layers: &[impl AsRef<str>]) {
        for flag in self.0.lock().iter_mut().filter(|flag| !flag.used) {
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
        let mut flags = self.0.lock();
        let flag = flags.iter_mut().rev().find(|flag| flag.layer == "nbdkit" && flag.name == name)?;
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
