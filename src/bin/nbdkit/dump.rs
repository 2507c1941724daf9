//! `--dump-config` and `--dump-plugin`: key=value lines that scripts read.

use std::{fmt::Display, io::Write, path::PathBuf};

use nbdkit_core::{Chain, Info};

/// How the server was built.
pub(crate) fn config() -> String {
    let version = env!("CARGO_PKG_VERSION");
    let mut parts = version.split('.');
    let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let binary = std::env::current_exe().unwrap_or_default();
    let bindir = binary.parent().unwrap_or(std::path::Path::new("")).display().to_string();
    [
        ("binary", binary.display().to_string()),
        ("bindir", bindir.clone()),
        ("exit_with_parent", "yes".into()),
        ("host_cpu", std::env::consts::ARCH.into()),
        ("host_os", "linux-gnu".into()),
        ("name", "nbdkit".into()),
        ("run_default_socket", "unix".into()),
        ("sbindir", bindir),
        ("selinux", "no".into()),
        ("timeout_option", "yes".into()),
        ("tls", "no".into()),
        ("version", version.into()),
        ("version_major", major.into()),
        ("version_minor", minor.into()),
        ("vsock_option", "no".into()),
        ("zstd", "no".into()),
    ]
    .into_iter()
    .map(|(key, value)| format!("{key}={value}\n"))
    .collect()
}

/// Prints what a configured chain can do. Returns the lines that the layers themselves add; those written in C
/// print theirs.
///
/// # Errors
/// Those of standard output.
pub(crate) fn plugin(chain: &Chain) -> std::io::Result<String> {
    let plugin = chain.plugin();
    let (info, interface) = (plugin.info(), plugin.interface());
    let mut out = std::io::stdout().lock();
    let mut line = |key: &str, value: &dyn Display| writeln!(out, "{key}={value}");
    line("path", &path(&info).display())?;
    line("name", &info.name)?;
    if !info.version.is_empty() {
        line("version", &info.version)?;
    }
    line("api_version", &interface.api_version)?;
    if let Some(size) = interface.struct_size {
        line("struct_size", &size)?;
    }
    line("max_thread_model", &plugin.max_thread_model())?;
    line("thread_model", &chain.filters().fold(plugin.thread_model(), |m, f| m.min(f.thread_model(m))))?;
    line("errno_is_preserved", &i32::from(interface.errno_is_preserved))?;
    if let Some(key) = &info.magic_config_key {
        line("magic_config_key", key)?;
    }
    for callback in interface.callbacks {
        line(&format!("has_{callback}"), &1)?;
    }
    for info in chain.filters().map(|filter| filter.info()) {
        line(&format!("{}_path", info.name), &path(&info).display())?;
        line(&format!("{}_name", info.name), &info.name)?;
    }
    out.flush()?;
    let added = plugin.dump().into_iter().chain(chain.filters().flat_map(|filter| filter.dump()));
    Ok(added.map(|(key, value)| format!("{key}={value}\n")).collect())
}

/// The file that a layer is in.
fn path(info: &Info) -> PathBuf {
    info.path.clone().or_else(|| std::env::current_exe().ok()).unwrap_or_default()
}
