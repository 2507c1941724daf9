//! A script: its Lua state, calls of its functions, and what becomes of its errors.

use std::{
    ffi::{CStr, CString, OsStr},
    fs,
    path::Path,
};

use mlua::{FromLuaMulti, Function, IntoLuaMulti, Lua, Table, Value};
use nbdkit::{Error, Result};

use crate::functions;

/// A script that has run. Its functions are looked up by name at each call, since it may define and redefine them at
/// any time.
pub(crate) struct Script {
    globals: Table,
    lua: Lua,
    /// As given on the command line, for messages.
    name: String,
    /// What the script says about itself, by name.
    texts: Vec<(&'static CStr, CString)>,
}

/// Global strings of a script that say what it is, as the fields of a plugin in C do.
const TEXTS: [&CStr; 6] =
    [c"name", c"longname", c"version", c"description", c"config_help", c"magic_config_key"];

impl Script {
    /// Runs a script's top level.
    pub(crate) fn load(path: &OsStr) -> Result<Self> {
        let path = Path::new(path);
        let name = path.display().to_string();
        let source = fs::read(path).map_err(|e| {
            Error::new(e.raw_os_error().unwrap_or(0), format!("cannot read the Lua script {name}: {e}"))
        })?;
        // SAFETY: a script may do whatever its author wants: the user who runs it could as well.
        let lua = unsafe { Lua::unsafe_new() };
        let globals = lua.globals();
        let mut script = Script { globals, lua, name, texts: Vec::new() };
        // Lua has a function of that name, which is not the script's.
        let builtin = script.function("load")?;
        functions::install(&script.lua).map_err(|e| script.error("load", &e))?;
        let chunk = script.lua.load(without_shebang(&source)).set_name(format!("@{}", script.name));
        chunk.exec().map_err(|e| script.error("load", &e))?;
        for required in ["open", "get_size", "pread"] {
            if !script.has(required)? {
                let text = format!(
                    "{} has no function {required}: open, get_size and pread are required",
                    script.name
                );
                return Err(Error::new(libc::EINVAL, text));
            }
        }
        if script.function("load")? != builtin {
            script.call::<()>("load", ())?;
        }
        script.texts = script.read_texts()?;
        Ok(script)
    }

    /// Other things may be called so in a script that does not mean to say what it is: those are left alone.
    fn read_texts(&self) -> Result<Vec<(&'static CStr, CString)>> {
        let mut texts = Vec::new();
        for field in TEXTS {
            let name = field.to_string_lossy();
            let value: Value = self.globals.get(&*name).map_err(|e| self.error(&name, &e))?;
            let Value::String(text) = value else { continue };
            let Ok(text) = CString::new(&*text.as_bytes()) else { continue };
            let is_name = field == c"name";
            let valid = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-';
            if !is_name || text.to_bytes().iter().all(valid) {
                texts.push((field, text));
            }
        }
        Ok(texts)
    }

    /// What the script says of a field, if it does.
    pub(crate) fn text(&self, field: &CStr) -> Option<&CStr> {
        self.texts.iter().find(|(name, _)| *name == field).map(|(_, text)| text.as_c_str())
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether the script has a function of that name now.
    pub(crate) fn has(&self, method: &str) -> Result<bool> {
        self.function(method).map(|function| function.is_some())
    }

    fn function(&self, method: &str) -> Result<Option<Function>> {
        match self.globals.get(method).map_err(|e| self.error(method, &e))? {
            Value::Function(function) => Ok(Some(function)),
            _ => Ok(None),
        }
    }

    /// Calls the script's function of that name; None if it has none.
    pub(crate) fn call<R: FromLuaMulti>(
        &self,
        method: &str,
        arguments: impl IntoLuaMulti,
    ) -> Result<Option<R>> {
        let Some(function) = self.function(method)? else { return Ok(None) };
        functions::take_errno();
        function.call(arguments).map(Some).map_err(|e| self.error(method, &e))
    }

    /// A Lua string.
    pub(crate) fn string(&self, bytes: &[u8]) -> Result<mlua::LuaString> {
        self.lua.create_string(bytes).map_err(|e| self.error("memory", &e))
    }

    /// An answer that is not what it should be.
    pub(crate) fn wrong(&self, method: &str, what: impl std::fmt::Display) -> Error {
        Error::new(0, format!("{method}: {}: {what}", self.name))
    }

    /// A Lua error as one line, `METHOD: SCRIPT:LINE: MESSAGE`. The traceback is for -v. The errno is what the script
    /// has set.
    fn error(&self, method: &str, error: &mlua::Error) -> Error {
        let (message, traceback) = told_apart(error);
        for line in traceback.lines() {
            nbdkit::debug!("{method}: {}", line.trim_start());
        }
        Error::new(functions::take_errno(), format!("{method}: {message}"))
    }
}

/// The version of the language.
pub(crate) fn version() -> String {
    let version = Lua::new().globals().get::<String>("_VERSION").unwrap_or_default();
    let version = version.strip_prefix("Lua ").unwrap_or(&version);
    if cfg!(feature = "luajit") { format!("{version} (LuaJIT)") } else { version.to_owned() }
}

/// Drops the first line if it begins as that of an executable script. Its end stays: line numbers count.
fn without_shebang(source: &[u8]) -> &[u8] {
    if !source.starts_with(b"#") {
        return source;
    }
    let end = source.iter().position(|&byte| byte == b'\n').unwrap_or(source.len());
    &source[end..]
}

/// An error's message and its traceback.
fn told_apart(error: &mlua::Error) -> (String, String) {
    match error {
        mlua::Error::CallbackError { traceback, cause } => {
            let (message, _) = told_apart(cause);
            (message, traceback.clone())
        }
        mlua::Error::RuntimeError(text) => match text.split_once("\nstack traceback:\n") {
            Some((message, traceback)) => (message.to_owned(), traceback.to_owned()),
            None => (text.clone(), String::new()),
        },
        mlua::Error::SyntaxError { message, .. } => (message.clone(), String::new()),
        other => (other.to_string(), String::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_line_for_the_kernel_is_not_lua() {
        assert_eq!(without_shebang(b"#!/usr/sbin/nbdkit lua\nx = 1\n"), b"\nx = 1\n");
        assert_eq!(without_shebang(b"#!/usr/sbin/nbdkit lua"), b"");
        assert_eq!(without_shebang(b"x = #y\n"), b"x = #y\n");
    }

    #[test]
    fn messages_and_tracebacks() {
        let lua = Lua::new();
        let chunk = lua.load("\nlocal function f() error('no') end\nf()").set_name("@a.lua");
        let (message, traceback) = told_apart(&chunk.exec().unwrap_err());
        assert_eq!(message, "a.lua:2: no");
        assert!(traceback.contains("a.lua:3:"), "{traceback}");
        let (message, _) = told_apart(&lua.load("x = =").set_name("@a.lua").exec().unwrap_err());
        assert!(message.starts_with("a.lua:1: unexpected symbol"), "{message}");
    }
}
