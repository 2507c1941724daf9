//! What scripts read: key=value lines of `--dump-config` and `--dump-plugin`, and the lists of options.

use std::{
    collections::BTreeSet,
    fmt::Display,
    io::Write,
    path::{Path, PathBuf},
};

use clap::{Arg, Command};
use nbdkit_core::{Chain, Info};
use nbdkit_loader::lookup::Kind;

use crate::version;

/// Where the configuration of the machine is.
const SYSCONFDIR: &str = "/etc";

/// How the program `name` was built, with TLS or without.
pub fn config(name: &str, tls: bool) -> String {
    let version = version::COMPATIBLE;
    let mut parts = version.split('.');
    let (major, minor) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let binary = std::env::current_exe().unwrap_or_default();
    let bindir = binary.parent().unwrap_or(Path::new(""));
    let prefix = bindir.parent().unwrap_or(Path::new("/"));
    let plugindir = layers(Kind::Plugin);
    let libdir = plugindir.ancestors().nth(2).unwrap_or(&plugindir);
    let show = |path: &Path| path.display().to_string();
    [
        ("binary", show(&binary)),
        ("bindir", show(bindir)),
        ("exit_with_parent", "yes".into()),
        ("filterdir", show(&layers(Kind::Filter))),
        ("host_cpu", std::env::consts::ARCH.into()),
        ("host_os", "linux-gnu".into()),
        ("libdir", show(libdir)),
        ("mandir", show(&prefix.join("share/man"))),
        ("max_api_version", "2".into()),
        ("name", name.into()),
        ("plugindir", show(&plugindir)),
        ("root_tls_certificates_dir", format!("{SYSCONFDIR}/pki/nbdkit")),
        ("run_default_socket", "unix".into()),
        ("sbindir", show(bindir)),
        ("selinux", "yes".into()),
        ("soext", "so".into()),
        ("sysconfdir", SYSCONFDIR.into()),
        ("timeout_option", "yes".into()),
        ("tls", if tls { "yes" } else { "no" }.into()),
        ("version", version.into()),
        ("version_commit", version::COMMIT.into()),
        ("version_major", major.into()),
        ("version_minor", minor.into()),
        ("version_own", version::OWN.into()),
        ("vsock_option", "yes".into()),
        ("zstd", "yes".into()),
    ]
    .into_iter()
    .map(|(key, value)| format!("{key}={value}\n"))
    .collect()
}

/// The directory where plugins or filters are: the first that exists of those where they are looked for.
fn layers(kind: Kind) -> PathBuf {
    let directories = kind.directories();
    let found = directories.iter().find(|directory| directory.is_dir()).or(directories.first());
    found.cloned().unwrap_or_default()
}

/// The options with one letter, one on a line, for completion scripts.
pub fn short_options(command: &Command) -> String {
    sorted(command.get_arguments().filter_map(Arg::get_short).map(|letter| format!("-{letter}")))
}

/// The options with a name, and their other names.
pub fn long_options(command: &Command) -> String {
    let names = |arg: &Arg| {
        let others = arg.get_all_aliases().unwrap_or_default();
        arg.get_long().into_iter().chain(others).map(|name| format!("--{name}")).collect::<Vec<_>>()
    };
    sorted(command.get_arguments().flat_map(names))
}

fn sorted(options: impl Iterator<Item = String>) -> String {
    options.collect::<BTreeSet<_>>().into_iter().map(|option| option + "\n").collect()
}

/// Prints what a configured chain can do. Returns the lines that the layers themselves add; those written in C
/// print theirs.
///
/// # Errors
/// Those of standard output.
pub fn plugin(chain: &Chain) -> std::io::Result<String> {
    let plugin = chain.plugin();
    let (info, interface) = (plugin.info(), nbdkit_loader::interface(plugin));
    let mut out = std::io::stdout().lock();
    let mut line = |key: &str, value: &dyn Display| writeln!(out, "{key}={value}");
    line("path", &path(&info).display())?;
    line("name", &info.name)?;
    if !info.version.is_empty() {
        line("version", &info.version)?;
    }
    line("api_version", &interface.api_version)?;
    line("struct_size", &interface.struct_size)?;
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
