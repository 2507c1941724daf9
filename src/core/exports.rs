//! The list of exports that a plugin offers.

use std::ffi::{OsStr, OsString};

use crate::{Errno, Error, Result};

/// One export: a name, and perhaps a line for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    /// The name that a client asks for; may be empty (the default export), holds no NUL, at most 4096 bytes.
    pub name: OsString,
    /// What is in it, at most 4096 bytes.
    pub description: Option<String>,
}

/// A bounded list of exports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exports {
    list: Vec<Export>,
    /// The default export belongs to it.
    default: bool,
}

impl Exports {
    /// More are refused.
    pub const MAX: usize = 10_000;
    /// Longest name or description, in bytes (proto.md, "Values": strings).
    pub const MAX_STRING: usize = 4096;

    /// An empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends an export.
    ///
    /// # Errors
    /// `EINVAL` for the 10,001st, for a string over 4096 bytes and for a NUL within one.
    pub fn add(&mut self, name: impl Into<OsString>, description: Option<String>) -> Result<()> {
        let name = name.into();
        if self.list.len() >= Self::MAX {
            return Err(Error::new(Errno::EINVAL, format!("more than {} exports", Self::MAX)));
        }
        check_name(&name)?;
        if description.as_ref().is_some_and(|d| d.len() > Self::MAX_STRING) {
            return Err(Error::new(
                Errno::EINVAL,
                format!("an export's description is over {} bytes", Self::MAX_STRING),
            ));
        }
        self.list.push(Export { name, description });
        Ok(())
    }

    /// Adds the default export of the layer that makes the list, if it has one: the name is found out when the list is
    /// complete.
    pub fn use_default(&mut self) {
        self.default = true;
    }

    /// Whether the default export is still to be added. Not again after this.
    pub(crate) fn take_default(&mut self) -> bool {
        std::mem::take(&mut self.default)
    }

    /// The exports, in the order they were added.
    pub fn as_slice(&self) -> &[Export] {
        &self.list
    }
}

/// Checks an export name against the limits above.
fn check_name(name: &OsStr) -> Result<()> {
    if name.len() > Exports::MAX_STRING {
        return Err(Error::new(
            Errno::EINVAL,
            format!("an export name is over {} bytes", Exports::MAX_STRING),
        ));
    }
    if name.as_encoded_bytes().contains(&0) {
        return Err(Error::new(Errno::EINVAL, "an export name holds a NUL byte"));
    }
    Ok(())
}

impl<'a> IntoIterator for &'a Exports {
    type Item = &'a Export;
    type IntoIter = std::slice::Iter<'a, Export>;

    fn into_iter(self) -> Self::IntoIter {
        self.list.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits() {
        let mut e = Exports::new();
        assert!(e.add("x".repeat(4096), None).is_ok());
        assert!(e.add("x".repeat(4097), None).is_err());
        assert!(e.add("a\0b", None).is_err());
        for i in 1..Exports::MAX {
            e.add(i.to_string(), None).unwrap();
        }
        assert!(e.add("one more", None).is_err());
    }
}
