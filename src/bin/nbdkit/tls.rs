//! The TLS options as meant: which credentials, and whether clients need them.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use nbdkit_nbd::Tls;

use crate::args::Args;

/// What `--tls` says.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Off,
    /// Nothing was said.
    IfPossible,
    On,
    Require,
}

fn mode(args: &Args) -> Result<Mode> {
    let Some(text) = &args.tls else { return Ok(Mode::IfPossible) };
    Ok(match text.to_ascii_lowercase().as_str() {
        "require" | "required" | "force" => Mode::Require,
        "on" | "1" | "true" | "t" | "yes" | "y" => Mode::On,
        "off" | "0" | "false" | "f" | "no" | "n" => Mode::Off,
        _ => bail!("--tls={text}: choose off, on or require"),
    })
}

/// The name that the parameter has in a URI, and where the credentials are. None: nowhere.
pub(crate) fn source(args: &Args) -> Option<(&'static str, PathBuf)> {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    if let Some(file) = &args.tls_psk {
        return Some(("tls-psk-file", absolute(file)));
    }
    if let Some(directory) = &args.tls_certificates {
        return Some(("tls-certificates", absolute(directory)));
    }
    let home = std::env::var_os("HOME").map(PathBuf::from).filter(|_| !nix::unistd::geteuid().is_root());
    let places = match home {
        Some(home) => vec![home.join(".pki/nbdkit"), home.join(".config/pki/nbdkit")],
        None => vec!["/etc/pki/nbdkit".into()],
    };
    let found = places.into_iter().find(|place| place.join("server-cert.pem").exists())?;
    Some(("tls-certificates", found))
}

/// Loads what the options ask for.
///
/// # Errors
/// Credentials that were named or are required, and cannot be had.
pub(crate) fn tls(args: &Args) -> Result<Tls> {
    let mode = mode(args)?;
    if args.oldstyle && mode == Mode::Require {
        bail!("--tls=require and -o cannot be used together: oldstyle clients cannot encrypt");
    }
    if args.oldstyle || mode == Mode::Off {
        return Ok(Tls::Off);
    }
    load(args, mode)
}

#[cfg(feature = "tls")]
fn load(args: &Args, mode: Mode) -> Result<Tls> {
    use nbdkit_nbd::tls::Credentials;

    let priority = args.tls_priority.as_deref();
    let credentials = match source(args) {
        None => {
            Err(anyhow::anyhow!("no certificates were found: name some with --tls-certificates or --tls-psk"))
        }
        Some(("tls-psk-file", file)) => Credentials::keys(&file, priority),
        Some((_, directory)) => Credentials::certificates(&directory, args.tls_verify_peer, priority),
    };
    let named = args.tls_psk.is_some() || args.tls_certificates.is_some();
    match (credentials, mode) {
        (Ok(credentials), Mode::Require) => Ok(Tls::Require(credentials)),
        (Ok(credentials), _) => Ok(Tls::On(credentials)),
        (Err(e), _) if named || mode == Mode::Require => Err(e.context("TLS cannot be used")),
        (Err(e), Mode::On) => {
            log::warn!("TLS is off: {e:#}");
            Ok(Tls::Off)
        }
        (Err(_), _) => Ok(Tls::Off),
    }
}

#[cfg(not(feature = "tls"))]
fn load(args: &Args, mode: Mode) -> Result<Tls> {
    if mode == Mode::Require || args.tls_psk.is_some() || args.tls_certificates.is_some() {
        bail!("this nbdkit was built without TLS: build it with the feature \"tls\"");
    }
    Ok(Tls::Off)
}
