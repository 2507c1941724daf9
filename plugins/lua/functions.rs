//! The table `nbdkit`: what a script may ask of the server. A script that does not know of it runs as ever.

use std::{
    cell::Cell,
    ffi::OsStr,
    fmt,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::Path,
    time::Duration,
};

use mlua::{Error, Function, Lua, LuaString, Result, Value, Variadic};
use nbdkit::bridge::abi;
use nix::errno::Errno;

/// Puts the table into a new state. A script's own global of that name replaces it.
pub(crate) fn install(lua: &Lua) -> Result<()> {
    let table = lua.create_table()?;
    for (name, value) in CONSTANTS {
        table.set(*name, *value)?;
    }

    let format: Function = lua.globals().get::<mlua::Table>("string")?.get("format")?;
    let debug = move |_: &Lua, (text, values): (Value, Variadic<Value>)| {
        let text = if values.is_empty() { text.to_string()? } else { format.call((text, values))? };
        nbdkit::debug!("{text}");
        Ok(())
    };
    table.set("debug", lua.create_function(debug)?)?;
    table.set("set_error", lua.create_function(set_error)?)?;

    macro_rules! functions {
        ($lua:ident; $($name:ident($($argument:ident: $kind:ty),*) = $body:expr;)*) => {
            $(table.set(stringify!($name), lua.create_function(|$lua, ($($argument,)*): ($($kind,)*)| {
                ($body).map_err(|error| located($lua, error))
            })?)?;)*
        };
    }
    functions! { lua;
        export_name() = nbdkit::export_name();
        is_tls() = nbdkit::is_tls();
        stdio_safe() = Ok::<_, nbdkit::Error>(nbdkit::stdio_safe());
        peer_name() = peer_name();
        peer_pid() = nbdkit::peer_pid();
        peer_uid() = nbdkit::peer_uid();
        peer_gid() = nbdkit::peer_gid();
        peer_security_context() = nbdkit::peer_security_context();
        peer_tls_dn() = nbdkit::peer_tls_dn();
        peer_tls_issuer_dn() = nbdkit::peer_tls_issuer_dn();
        shutdown() = done(nbdkit::shutdown);
        disconnect(force: bool) = done(|| nbdkit::disconnect(force));
        parse_size(text: String) = nbdkit::parse_size(&text);
        parse_int(what: String, text: String) = nbdkit::parse_int(&what, &text);
        parse_bool(text: String) = nbdkit::parse_bool(&text);
        parse_probability(what: String, text: String) = nbdkit::parse_probability(&what, &text);
        parse_delay(what: String, text: String) = nbdkit::parse_delay(&what, &text).map(|d| d.as_secs_f64());
        nanosleep(seconds: f64) = duration(seconds).and_then(nbdkit::nanosleep);
        read_password(value: LuaString) =
            nbdkit::read_password(value.as_bytes()).and_then(|bytes| string(lua, &bytes));
        absolute_path(path: LuaString) = path_by(lua, &path, nbdkit::absolute_path);
        realpath(path: LuaString) = path_by(lua, &path, nbdkit::realpath);
    }
    lua.globals().set("nbdkit", table)
}

const CONSTANTS: &[(&str, i32)] = &[
    ("THREAD_MODEL_SERIALIZE_CONNECTIONS", abi::THREAD_MODEL_SERIALIZE_CONNECTIONS),
    ("THREAD_MODEL_SERIALIZE_ALL_REQUESTS", abi::THREAD_MODEL_SERIALIZE_ALL_REQUESTS),
    ("THREAD_MODEL_SERIALIZE_REQUESTS", abi::THREAD_MODEL_SERIALIZE_REQUESTS),
    ("THREAD_MODEL_PARALLEL", abi::THREAD_MODEL_PARALLEL),
    ("FUA_NONE", abi::FUA_NONE),
    ("FUA_EMULATE", abi::FUA_EMULATE),
    ("FUA_NATIVE", abi::FUA_NATIVE),
    ("CACHE_NONE", abi::CACHE_NONE),
    ("CACHE_EMULATE", abi::CACHE_EMULATE),
    ("CACHE_NATIVE", abi::CACHE_NATIVE),
];

thread_local! {
    /// What the function that this thread calls has given to set_error; 0: nothing.
    static ERRNO: Cell<i32> = const { Cell::new(0) };
}

/// What was given to set_error since this was called before.
pub(crate) fn take_errno() -> i32 {
    ERRNO.take()
}

/// An errno by its number, as io.open returns it, or by its name.
fn set_error(lua: &Lua, errno: Value) -> Result<()> {
    let number = match &errno {
        Value::Integer(number) => i32::try_from(*number).ok(),
        Value::Number(number) => Some(*number as i32),
        Value::String(name) => by_name(&name.to_string_lossy()),
        _ => None,
    };
    let number = number.filter(|&number| number > 0);
    let number = number.ok_or_else(|| located(lua, "set_error takes an errno, such as \"ENOSPC\" or 28"))?;
    ERRNO.set(number);
    Ok(())
}

/// The number of an errno's name, in either case.
fn by_name(name: &str) -> Option<i32> {
    let alias = match name.to_ascii_uppercase().as_str() {
        "ENOTSUP" => Some(Errno::EOPNOTSUPP),
        "EWOULDBLOCK" => Some(Errno::EAGAIN),
        _ => None,
    };
    let named = || {
        // Linux has none beyond 133.
        let all = (1..=133).map(Errno::from_raw).filter(|&errno| errno != Errno::UnknownErrno);
        all.map(|errno| (errno as i32, format!("{errno:?}")))
            .find_map(|(number, its_name)| its_name.eq_ignore_ascii_case(name).then_some(number))
    };
    alias.map(|errno| errno as i32).or_else(named)
}

/// The client's address as text: that of a TCP client with its port, and `unix` for a Unix socket.
fn peer_name() -> nbdkit::Result<String> {
    if let Ok(address) = nbdkit::peername::<std::net::SocketAddr>() {
        return Ok(address.to_string());
    }
    let unix = nbdkit::peername::<std::os::unix::net::SocketAddr>();
    unix.map(|_| "unix".to_owned()).map_err(|e| nbdkit::Error::new(libc::ENOTSUP, format!("peer_name: {e}")))
}

fn done(action: impl FnOnce()) -> nbdkit::Result<()> {
    action();
    Ok(())
}

fn duration(seconds: f64) -> nbdkit::Result<Duration> {
    Duration::try_from_secs_f64(seconds)
        .map_err(|e| nbdkit::Error::new(libc::EINVAL, format!("nanosleep takes seconds, not {seconds}: {e}")))
}

fn string(lua: &Lua, bytes: &[u8]) -> nbdkit::Result<LuaString> {
    lua.create_string(bytes).map_err(|e| nbdkit::Error::new(libc::ENOMEM, e.to_string()))
}

fn path_by(
    lua: &Lua,
    path: &LuaString,
    function: impl Fn(&Path) -> nbdkit::Result<std::path::PathBuf>,
) -> nbdkit::Result<LuaString> {
    let path = function(Path::new(OsStr::from_bytes(&path.as_bytes())))?;
    string(lua, &path.into_os_string().into_vec())
}

/// An error with the line of the script that called, as Lua's own errors have.
fn located(lua: &Lua, message: impl fmt::Display) -> Error {
    let place = lua.inspect_stack(1, |caller| {
        let source = caller.source().short_src?.into_owned();
        Some(format!("{source}:{}: ", caller.current_line()?))
    });
    Error::RuntimeError(format!("{}{message}", place.flatten().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_errnos() {
        assert_eq!(by_name("ENOSPC"), Some(libc::ENOSPC));
        assert_eq!(by_name("enospc"), Some(libc::ENOSPC));
        assert_eq!(by_name("ENOTSUP"), Some(libc::EOPNOTSUPP));
        assert_eq!(by_name("ESHUTDOWN"), Some(libc::ESHUTDOWN));
        assert_eq!(by_name("EHWPOISON"), Some(libc::EHWPOISON));
        assert_eq!(by_name("UnknownErrno"), None);
        assert_eq!(by_name(""), None);
    }
}
