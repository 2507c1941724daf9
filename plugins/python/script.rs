//! The script: loaded into the module `__main__`, asked which version of the interface it is for, and its functions.

use std::{
    ffi::{OsStr, c_int},
    path::{Path, absolute},
    sync::OnceLock,
};

use pyo3::{
    call::PyCallArgs,
    prelude::*,
    types::{PyBytes, PyModule, PyString},
};

use crate::failure::{Failure, Result};

/// The newest version of the interface for scripts.
pub(crate) const MAX_VERSION: c_int = 2;

/// The script, once it is loaded.
static SCRIPT: OnceLock<Script> = OnceLock::new();

/// How a script's functions are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// Version 1: no flags, `pread(h, count, offset)` returns a buffer.
    First,
    /// Version 2 as it was proposed: `pread(h, count, offset, flags)` returns a buffer.
    Counted,
    /// Version 2: `pread(h, buf, offset, flags)` fills a buffer.
    Filled,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Script {
    /// As it was given.
    pub(crate) name: String,
    pub(crate) style: Style,
    module: Py<PyModule>,
}

impl Script {
    /// The script, if there is one yet.
    pub(crate) fn get() -> Option<&'static Script> {
        SCRIPT.get()
    }

    /// Runs the file and looks at what it defines.
    pub(crate) fn load(py: Python<'_>, path: &OsStr) -> Result<()> {
        let name = path.display().to_string();
        let source = std::fs::read(path)
            .map_err(|error| Failure::new(0, format!("cannot read the script: {error}")))?;
        let module = run(py, Path::new(path), &source).map_err(|error| Failure::exception(py, &error))?;
        let mut script = Script { name, style: Style::First, module: module.unbind() };
        script.style = script.find_style(py)?;
        for method in ["open", "get_size", "pread"] {
            if script.function(py, method)?.is_none() {
                return Err(Failure::new(0, format!("the script must define the function {method}")));
            }
        }
        // Nobody else loads one: there is one `config` at a time.
        let _ = SCRIPT.set(script);
        Ok(())
    }

    /// The text at the beginning of the script.
    pub(crate) fn docstring<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyAny>> {
        let text = self.module.bind(py).getattr("__doc__").ok().filter(|text| !text.is_none())?;
        py.import("inspect").and_then(|inspect| inspect.call_method1("cleandoc", (text,))).ok()
    }

    /// One of the script's functions, if it is there.
    pub(crate) fn function<'py>(
        &self,
        py: Python<'py>,
        name: impl IntoPyObject<'py, Target = PyString>,
    ) -> Result<Option<Bound<'py, PyAny>>> {
        let found = self.module.bind(py).getattr_opt(name).map_err(|error| Failure::exception(py, &error))?;
        Ok(found.filter(|function| function.is_callable()))
    }

    /// One of the script's functions, which the server calls only if it is there.
    pub(crate) fn required<'py>(
        &self,
        py: Python<'py>,
        name: &Bound<'py, PyString>,
    ) -> Result<Bound<'py, PyAny>> {
        let missing = || Failure::new(libc::EIO, format!("the script does not define the function {name}"));
        self.function(py, name)?.ok_or_else(missing)
    }

    /// Whether one of the script's functions is there.
    pub(crate) fn has(&self, py: Python<'_>, name: &str) -> Result<bool> {
        Ok(self.function(py, name)?.is_some())
    }

    /// Calls one of the script's functions, if it is there.
    pub(crate) fn call<'py>(
        &self,
        py: Python<'py>,
        name: impl IntoPyObject<'py, Target = PyString>,
        arguments: impl PyCallArgs<'py>,
    ) -> Result<Option<Bound<'py, PyAny>>> {
        let Some(function) = self.function(py, name)? else { return Ok(None) };
        function.call1(arguments).map(Some).map_err(|error| Failure::exception(py, &error))
    }

    fn find_style(&self, py: Python<'_>) -> Result<Style> {
        let constant = self.module.bind(py).getattr_opt("API_VERSION");
        let version = match constant.map_err(|error| Failure::exception(py, &error))? {
            Some(version) => Some(version),
            None => self.call(py, "api_version", ())?,
        };
        let Some(version) = version else { return Ok(Style::First) };
        match version.extract::<c_int>() {
            Ok(1) => Ok(Style::First),
            Ok(2) if self.pread_counts(py) => Ok(Style::Counted),
            Ok(2) => Ok(Style::Filled),
            _ => {
                let text =
                    format!("API version {version} is not known: it must be between 1 and {MAX_VERSION}");
                Err(Failure::new(0, text))
            }
        }
    }

    /// Whether `pread` is given a count: its second parameter is called `count`. What cannot be inspected, such as
    /// a function written in C, is given a buffer.
    fn pread_counts(&self, py: Python<'_>) -> bool {
        let Ok(Some(pread)) = self.function(py, "pread") else { return false };
        let second = py
            .import("inspect")
            .and_then(|inspect| inspect.call_method1("signature", (pread,)))
            .and_then(|signature| signature.getattr("parameters")?.try_iter()?.nth(1).transpose());
        matches!(second, Ok(Some(name)) if name.eq("count").unwrap_or(false))
    }
}

/// Runs a script's source in `__main__`.
fn run<'py>(py: Python<'py>, path: &Path, source: &[u8]) -> PyResult<Bound<'py, PyModule>> {
    // Tracebacks quote the source also when the server has left the directory.
    let file = absolute(path).unwrap_or_else(|_| path.to_owned());
    let sys = py.import("sys")?;
    sys.setattr("argv", [path.as_os_str()])?;
    // Modules beside the script come last: the C nbdkit does not look there, and a script may have any name.
    if let Some(folder) = file.parent() {
        sys.getattr("path")?.call_method1("append", (folder.as_os_str(),))?;
    }
    let module = py.import("__main__")?;
    module.setattr("__file__", file.as_os_str())?;
    let builtins = py.import("builtins")?;
    let code = builtins.call_method1("compile", (PyBytes::new(py, source), file.as_os_str(), "exec"))?;
    builtins.call_method1("exec", (code, module.dict()))?;
    Ok(module)
}
