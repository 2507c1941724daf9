//! Whether connections to the server are encrypted, and by what the sides know each other.

#[cfg(feature = "tls")]
use std::path::Path;
use std::{path::PathBuf, time::Instant};

use anyhow::bail;
use nbdkit_core::{Errno, Error, Result};

use super::wire::Wire;

/// Whether to encrypt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Off,
    /// If the server does.
    On,
    Require,
}

/// As given.
#[derive(Clone, Debug)]
pub(super) struct TlsOptions {
    pub(super) mode: Option<Mode>,
    pub(super) certificates: Option<PathBuf>,
    pub(super) keys: Option<PathBuf>,
    pub(super) user: Option<String>,
    pub(super) server_name: Option<String>,
    pub(super) verify: bool,
}

impl Default for TlsOptions {
    fn default() -> Self {
        TlsOptions { mode: None, certificates: None, keys: None, user: None, server_name: None, verify: true }
    }
}

/// As meant.
#[derive(Debug, Default)]
pub(super) struct Encryption {
    /// None: there is none.
    #[cfg(feature = "tls")]
    credentials: Option<nbdkit_tls::ClientCredentials>,
    required: bool,
    server_name: Option<String>,
}

impl Encryption {
    /// Loads what the options name.
    ///
    /// # Errors
    /// Options that do not go together, and credentials that cannot be used.
    pub(super) fn new(options: &TlsOptions) -> anyhow::Result<Self> {
        let named = options.certificates.is_some() || options.keys.is_some() || options.user.is_some();
        let mode = options.mode.unwrap_or(if named { Mode::On } else { Mode::Off });
        if mode == Mode::Off {
            return Ok(Encryption::default());
        }
        if options.certificates.is_some() && options.keys.is_some() {
            bail!("tls-certificates= and tls-psk= cannot be used together: leave one out");
        }
        Self::load(options, mode)
    }

    #[cfg(not(feature = "tls"))]
    fn load(_: &TlsOptions, _: Mode) -> anyhow::Result<Self> {
        bail!("this nbdkit was built without TLS: build it with the feature \"tls\"")
    }

    #[cfg(feature = "tls")]
    fn load(options: &TlsOptions, mode: Mode) -> anyhow::Result<Self> {
        use anyhow::Context as _;
        use nbdkit_tls::ClientCredentials;

        let credentials = match &options.keys {
            Some(file) => {
                let user = options.user.clone().or_else(user_name);
                let user = user.context("tls-username= is needed: the user has no name")?;
                ClientCredentials::keys(file, &user)
            }
            None => {
                let directory = options.certificates.clone().or_else(usual_directory);
                ClientCredentials::certificates(directory.as_deref(), options.verify)
            }
        };
        Ok(Encryption {
            credentials: Some(credentials.context("TLS cannot be used")?),
            required: mode == Mode::Require,
            server_name: options.server_name.clone(),
        })
    }

    pub(super) fn is_wanted(&self) -> bool {
        #[cfg(feature = "tls")]
        return self.credentials.is_some();
        #[cfg(not(feature = "tls"))]
        false
    }

    pub(super) fn is_required(&self) -> bool {
        self.required
    }

    /// Encrypts a connection to a server on `host`.
    ///
    /// # Errors
    /// The two sides do not come together in time.
    pub(super) fn start(&self, wire: &mut Wire, host: Option<&str>, deadline: Instant) -> Result<()> {
        let name = self.server_name.as_deref().or(host);
        #[cfg(feature = "tls")]
        if let Some(credentials) = &self.credentials {
            return wire
                .encrypt(credentials, name, deadline)
                .map_err(|e| Error::new(Errno::ENOTCONN, format!("the TLS handshake failed: {e:#}")));
        }
        let _ = (wire, name, deadline);
        Err(Error::new(Errno::ENOTCONN, "there is no TLS"))
    }
}

#[cfg(feature = "tls")]
fn user_name() -> Option<String> {
    let of_environment = ["LOGNAME", "USER"].into_iter().find_map(|name| std::env::var(name).ok());
    of_environment.filter(|name| !name.is_empty()).or_else(|| {
        let user = nix::unistd::User::from_uid(nix::unistd::geteuid());
        user.ok().flatten().map(|user| user.name)
    })
}

/// Where programs with libnbd look for certificates.
#[cfg(feature = "tls")]
fn usual_directory() -> Option<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let root = nix::unistd::geteuid().is_root();
    let places = match home.filter(|_| !root) {
        Some(home) => vec![home.join(".pki/libnbd"), home.join(".config/pki/libnbd")],
        None => vec![Path::new("/etc/pki/libnbd").to_owned()],
    };
    places.into_iter().find(|place| place.join("ca-cert.pem").exists())
}
