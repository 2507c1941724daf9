//! `--dump-config` and `--dump-plugin`: key=value lines that scripts read.

use std::fmt::Write;

use nbdkit_core::Chain;

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

/// What the plugin of a configured chain can do.
pub(crate) fn plugin(chain: &Chain) -> String {
    let plugin = chain.plugin();
    let info = plugin.info();
    let mut out = String::new();
    let mut line = |key: &str, value: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{key}={value}");
    };
    line("path", &std::env::current_exe().unwrap_or_default().display().to_string());
    line("name", &info.name);
    line("version", &info.version);
    line("api_version", "2");
    line("max_thread_model", plugin.max_thread_model().name());
    line("thread_model", plugin.thread_model().name());
    line("errno_is_preserved", "1");
    if let Some(key) = &info.magic_config_key {
        line("magic_config_key", key);
    }
    line("has_thread_model", "1");
    for (key, value) in plugin.dump() {
        line(&key, &value);
    }
    out
}
