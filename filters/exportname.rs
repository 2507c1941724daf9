//! Changes which exports clients see, what they are called and described as, and which they may open.

use std::{
    ffi::{OsStr, OsString},
    io::Read as _,
    process::{Command, Stdio},
    sync::Arc,
};

use anyhow::bail;
use nbdkit_core::{
    Below, Caps, Errno, Error, Exports, Filter, Handle, Info, Next, NextConfig, Open, Outcome, Request,
    Result, params,
};

const HELP: &str = "\
default-export=<NAME>     The export that the empty name stands for (default: as below).
exportname-list=<MODE>    What is listed: 'keep' (default), 'error', 'empty', 'defaultonly' or 'explicit'.
exportname-strict=<BOOL>  Only exports given by exportname= can be opened (default false).
exportname=<NAME>         An export for the list; can be repeated.
exportdesc=<MODE>         Descriptions: 'keep' (default), 'none', 'fixed:TEXT' or 'script:COMMAND'.";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(ExportName {
        default: None,
        list: List::Keep,
        strict: false,
        explicit: Exports::new(),
        describe: Arc::new(Describe::Keep),
    })
}

struct ExportName {
    default: Option<OsString>,
    list: List,
    strict: bool,
    explicit: Exports,
    describe: Arc<Describe>,
}

/// What a client that asks for the list gets.
#[derive(Clone, Copy)]
enum List {
    Keep,
    Error,
    Empty,
    DefaultOnly,
    Explicit,
}

/// Where descriptions come from.
enum Describe {
    Keep,
    Nothing,
    Fixed(String),
    Script(OsString),
}

impl Describe {
    /// The description of an export whose own is `own`.
    fn of(&self, name: &OsStr, own: Option<String>) -> Option<String> {
        match self {
            Describe::Keep => own,
            Describe::Nothing => None,
            Describe::Fixed(text) => Some(text.clone()),
            Describe::Script(script) => match output(script, name) {
                Ok(text) => Some(text),
                Err(e) => {
                    log::error!("exportname: cannot run the script of exportdesc=: {e}");
                    None
                }
            },
        }
    }
}

/// The first line or lines that a script prints, as far as a description may go.
fn output(script: &OsStr, name: &OsStr) -> std::io::Result<String> {
    let mut child = Command::new("/bin/sh")
        .arg("-c")
        .arg(script)
        .env("name", name)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut bytes = Vec::new();
    let read = match child.stdout.take() {
        Some(stdout) => stdout.take(Exports::MAX_STRING as u64).read_to_end(&mut bytes),
        None => Ok(0),
    };
    child.wait()?;
    read?;
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    let mut text = String::from_utf8_lossy(&bytes).into_owned();
    // What is not UTF-8 may have become longer.
    while text.len() > Exports::MAX_STRING {
        text.pop();
    }
    Ok(text)
}

impl ExportName {
    fn is_explicit(&self, name: &OsStr) -> bool {
        self.explicit.as_slice().iter().any(|export| export.name == name)
    }
}

impl Filter for ExportName {
    fn info(&self) -> Info {
        Info::bundled("exportname", "nbdkit exportname filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "default-export" | "default_export" => self.default = Some(value.to_owned()),
            "exportname-strict" | "exportname_strict" => self.strict = params::boolean(value)?,
            "exportname" => self.explicit.add(value, None)?,
            "exportname-list" | "exportname_list" => {
                self.list = match params::text(value)? {
                    "keep" => List::Keep,
                    "error" => List::Error,
                    "empty" => List::Empty,
                    "defaultonly" | "default-only" | "default" => List::DefaultOnly,
                    "explicit" => List::Explicit,
                    other => bail!(
                        "unknown exportname-list '{other}': use keep, error, empty, defaultonly or explicit"
                    ),
                }
            }
            "exportdesc" => {
                let text = params::text(value)?;
                self.describe = Arc::new(match text.split_once(':') {
                    None if text == "keep" => Describe::Keep,
                    None if text == "none" => Describe::Nothing,
                    Some(("fixed", text)) if text.len() <= Exports::MAX_STRING => {
                        Describe::Fixed(text.to_owned())
                    }
                    Some(("fixed", _)) => {
                        bail!("the text of exportdesc=fixed: is over {} bytes", Exports::MAX_STRING)
                    }
                    Some(("script", script)) => Describe::Script(script.into()),
                    _ => bail!("unknown exportdesc '{text}': use keep, none, fixed:TEXT or script:COMMAND"),
                });
            }
            _ => return next(key, value),
        }
        Ok(())
    }

    fn list_exports(&self, next: &Below, readonly: bool, tls: bool) -> Result<Exports> {
        let source = match self.list {
            List::Keep => next.list_exports(readonly, tls)?,
            List::Explicit => self.explicit.clone(),
            List::Empty => Exports::new(),
            List::Error => {
                return Err(Error::new(
                    Errno::EPERM,
                    "the list of exports is not public (exportname-list=error)",
                ));
            }
            List::DefaultOnly => {
                let mut exports = Exports::new();
                if let Some(name) = self.default_export(next, readonly, tls)? {
                    exports.add(name, None)?;
                }
                exports
            }
        };
        let mut exports = Exports::new();
        for export in &source {
            let description = self.describe.of(&export.name, export.description.clone());
            exports.add(export.name.clone(), description)?;
        }
        Ok(exports)
    }

    fn default_export(&self, next: &Below, readonly: bool, tls: bool) -> Result<Option<OsString>> {
        match &self.default {
            _ if self.strict && !self.is_explicit(OsStr::new("")) => Ok(None),
            Some(name) => Ok(Some(name.clone())),
            None if self.strict => Ok(Some(OsString::new())),
            None => next.default_export(readonly, tls),
        }
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let mut open = open.clone();
        if self.strict && !self.is_explicit(&open.export_name) {
            let name = open.export_name.display();
            return Err(Error::new(
                Errno::ENOENT,
                format!("export '{name}' is not among those of exportname="),
            ));
        }
        if let (true, Some(name)) = (open.export_name.is_empty(), &self.default) {
            open.export_name.clone_from(name);
        }
        let next = next.open(&open)?;
        Ok(Box::new(Renamed { name: open.export_name, describe: self.describe.clone(), next }))
    }
}

struct Renamed {
    name: OsString,
    describe: Arc<Describe>,
    next: Next,
}

impl Handle for Renamed {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn export_description(&self) -> Result<Option<String>> {
        let own = match *self.describe {
            Describe::Keep => self.next.export_description()?,
            _ => None,
        };
        Ok(self.describe.of(&self.name, own))
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        self.next.pass(request)
    }

    fn capabilities(&self) -> Result<Caps> {
        Ok(self.next.capabilities().with_skip_holes(self.next.caps().skip_holes))
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::{Chain, Connection, Op, Plugin, Session};

    use super::*;
    use crate::testing::{Spec, View, check_model, client, config_error, lent};

    /// Offers the exports a and b, the first of them as the default one, and describes each by its name.
    struct Two;

    struct Described(String);

    impl Plugin for Two {
        fn info(&self) -> Info {
            Info::bundled("two", "", "")
        }

        fn list_exports(&self, _: bool, _: bool) -> Result<Exports> {
            let mut exports = Exports::new();
            exports.add("a", Some("first".into()))?;
            exports.add("b", None)?;
            Ok(exports)
        }

        fn default_export(&self, _: bool, _: bool) -> Result<Option<OsString>> {
            Ok(Some("a".into()))
        }

        fn open(&self, open: &Open) -> Result<Box<dyn Handle>> {
            Ok(Box::new(Described(format!("[{}]", open.export_name.display()))))
        }
    }

    impl Handle for Described {
        fn capabilities(&self) -> Result<Caps> {
            Ok(Caps::of_size(512))
        }

        fn export_description(&self) -> Result<Option<String>> {
            Ok(Some(self.0.clone()))
        }
    }

    fn connect(params: &[(&str, &str)]) -> Arc<Connection> {
        let mut chain = Chain::new(Box::new(Two), vec![new()]);
        for (key, value) in params {
            chain.config(key, OsStr::new(value)).unwrap();
        }
        chain.config_complete().unwrap();
        Arc::new(Arc::new(chain).connect(client(), false).unwrap())
    }

    fn open(params: &[(&str, &str)], name: &str) -> Result<Session> {
        connect(params).open(OsStr::new(name), false)
    }

    fn described(params: &[(&str, &str)], name: &str) -> Option<String> {
        open(params, name).unwrap().export_description().unwrap()
    }

    fn list(params: &[(&str, &str)]) -> Vec<(String, Option<String>)> {
        let exports = connect(params).list_exports(false).unwrap();
        exports.into_iter().map(|e| (e.name.to_string_lossy().into_owned(), e.description.clone())).collect()
    }

    fn names(params: &[(&str, &str)]) -> Vec<String> {
        list(params).into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn model() {
        check_model(&["exportname"], &[], 20_000, &View::same(20_000));
        let session = crate::testing::session(&Spec::default().disk(), "exportname", &[]);
        assert_eq!(lent(&session, Op::Write, 0, 512), Some(0));
    }

    #[test]
    fn lists() {
        assert_eq!(list(&[]), [("a".into(), Some("first".into())), ("b".into(), None)]);
        assert_eq!(names(&[("exportname-list", "keep")]), ["a", "b"]);
        assert!(names(&[("exportname-list", "empty")]).is_empty());
        assert_eq!(names(&[("exportname-list", "defaultonly")]), ["a"]);
        assert_eq!(names(&[("exportname-list", "defaultonly"), ("default-export", "x")]), ["x"]);
        let explicit = [("exportname-list", "explicit"), ("exportname", "x"), ("exportname", "y")];
        assert_eq!(names(&explicit), ["x", "y"]);
        let error = connect(&[("exportname-list", "error")]).list_exports(false).unwrap_err();
        assert_eq!(error.errno(), Errno::EPERM);
    }

    #[test]
    fn the_empty_name_stands_for_the_default_export() {
        let default = |params: &[_]| connect(params).default_export(false).unwrap();
        assert_eq!(default(&[]), Some("a".into()));
        assert_eq!(default(&[("default-export", "b")]), Some("b".into()));
        assert_eq!(
            default(&[("default-export", "")]),
            Some("".into()),
            "the plugin chooses when it is opened"
        );
        assert_eq!(default(&[("default_export", "b"), ("exportname_strict", "0")]), Some("b".into()));
        assert_eq!(described(&[("default-export", "b")], "").unwrap(), "[b]");
        assert_eq!(described(&[("default-export", "b")], "a").unwrap(), "[a]");
        assert_eq!(described(&[], "").unwrap(), "[]");
    }

    #[test]
    fn strict_opens_what_was_named() {
        let strict = [("exportname-strict", "true"), ("exportname", "b"), ("default-export", "b")];
        open(&strict, "b").unwrap();
        for name in ["a", ""] {
            assert_eq!(open(&strict, name).unwrap_err().errno(), Errno::ENOENT, "{name}");
        }
        assert_eq!(connect(&strict).default_export(false).unwrap(), None);
        let with_default = [&strict[..], &[("exportname", "")]].concat();
        assert_eq!(connect(&with_default).default_export(false).unwrap(), Some("b".into()));
        assert_eq!(described(&with_default, "").unwrap(), "[b]");
    }

    #[test]
    fn descriptions() {
        assert_eq!(described(&[("exportdesc", "keep")], "b").unwrap(), "[b]");
        assert_eq!(described(&[("exportdesc", "none")], "b"), None);
        assert_eq!(described(&[("exportdesc", "fixed:x:y")], "b").unwrap(), "x:y");
        let script = [("exportdesc", "script:echo \"<$name>\"; echo more")];
        assert_eq!(described(&script, "b").unwrap(), "<b>\nmore");
        assert_eq!(list(&script)[1].1.as_deref(), Some("<b>\nmore"));
        let endless = [("exportdesc", "script:while echo 12345678901234567890; do :; done")];
        assert_eq!(described(&endless, "b").unwrap().len(), Exports::MAX_STRING);
    }

    #[test]
    fn unknown_modes_are_refused() {
        assert!(config_error("exportname", &[("exportname-list", "x")]).contains("use keep, error"));
        assert!(config_error("exportname", &[("exportdesc", "fixed")]).contains("fixed:TEXT"));
        let long = format!("fixed:{}", "x".repeat(4097));
        assert!(config_error("exportname", &[("exportdesc", &long)]).contains("over 4096 bytes"));
        assert!(config_error("exportname", &[("exportname", &"x".repeat(4097))]).contains("over 4096 bytes"));
    }
}
