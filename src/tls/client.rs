//! What a client shows to a server, and asks of it.

use std::{collections::HashMap, fmt, path::Path};

use anyhow::{Context as _, bail, ensure};
use openssl::{
    ssl::{Ssl, SslContext, SslContextBuilder, SslMethod, SslMode, SslOptions, SslVerifyMode},
    x509::verify::X509CheckFlags,
};

use crate::{
    credentials::{key_log, parse_keys},
    files::{show, trust},
    priority::{Kind, Priority},
};

/// See the module.
#[derive(Clone)]
pub struct ClientCredentials {
    context: SslContext,
    kind: Kind,
    verify: bool,
}

impl fmt::Debug for ClientCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientCredentials")
    }
}

fn context(kind: Kind) -> anyhow::Result<SslContextBuilder> {
    #[cfg(openssl_on_demand)]
    crate::libssl::load()?;
    let priority = Priority::parse(None, kind)?;
    let mut context = SslContext::builder(SslMethod::tls_client())?;
    context.set_min_proto_version(Some(priority.min))?;
    context.set_max_proto_version(Some(priority.max))?;
    context.set_options(SslOptions::NO_TICKET | SslOptions::NO_COMPRESSION | SslOptions::NO_RENEGOTIATION);
    context.set_mode(SslMode::ENABLE_PARTIAL_WRITE | SslMode::ACCEPT_MOVING_WRITE_BUFFER);
    context.set_ciphersuites(&priority.suites)?;
    context.set_cipher_list(&priority.ciphers)?;
    key_log(&mut context);
    Ok(context)
}

impl ClientCredentials {
    /// Loads from a directory `ca-cert.pem`, which must have signed the server's certificate, perhaps `ca-crl.pem`, and
    /// `client-cert.pem` with `client-key.pem` if they are there. None: the authorities that the system trusts. Without
    /// `verify` the server may be anybody.
    ///
    /// # Errors
    /// Files that cannot be read or do not fit together.
    pub fn certificates(directory: Option<&Path>, verify: bool) -> anyhow::Result<Self> {
        let mut context = context(Kind::Certificates)?;
        match directory {
            Some(directory) => load(&mut context, directory)?,
            None => context.set_default_verify_paths()?,
        }
        context.set_verify(if verify { SslVerifyMode::PEER } else { SslVerifyMode::NONE });
        Ok(ClientCredentials { context: context.build(), kind: Kind::Certificates, verify })
    }

    /// Takes the key of `user` from a file of lines `USER:KEY`.
    ///
    /// # Errors
    /// A file that cannot be read, holds anything else, or has no such user.
    pub fn keys(file: &Path, user: &str) -> anyhow::Result<Self> {
        let text = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let mut keys: HashMap<_, _> = parse_keys(&text).with_context(|| format!("{}", file.display()))?;
        let Some(key) = keys.remove(user.as_bytes()) else {
            bail!("{} has no key for the user '{user}': name one that it has", file.display());
        };
        let user = user.to_owned();
        ensure!(!user.contains('\0'), "a user's name cannot have a zero byte");
        let mut context = context(Kind::Keys)?;
        context.set_psk_client_callback(move |_, _, identity, out| {
            let name = identity.get_mut(..=user.len());
            let (Some(name), Some(out)) = (name, out.get_mut(..key.len())) else { return Ok(0) };
            name[..user.len()].copy_from_slice(user.as_bytes());
            name[user.len()] = 0;
            out.copy_from_slice(&key);
            Ok(key.len())
        });
        Ok(ClientCredentials { context: context.build(), kind: Kind::Keys, verify: true })
    }

    /// State for one connection to a server, whose certificate has to be for `name`, a host's or an address.
    ///
    /// # Errors
    /// Memory, or a name that cannot be one.
    pub fn session(&self, name: Option<&str>) -> anyhow::Result<Ssl> {
        let mut ssl = Ssl::new(&self.context)?;
        if self.kind == Kind::Keys {
            return Ok(ssl);
        }
        let Some(name) = name else {
            ensure!(
                !self.verify,
                "the server has no host name that its certificate could be for: give one with tls-hostname in a \
                 URI, use tls-psk, or tls-verify=false"
            );
            return Ok(ssl);
        };
        let address = name.parse::<std::net::IpAddr>();
        if address.is_err() {
            ssl.set_hostname(name)?;
        }
        if self.verify {
            let param = ssl.param_mut();
            param.set_hostflags(X509CheckFlags::NO_PARTIAL_WILDCARDS);
            match address {
                Ok(address) => param.set_ip(address)?,
                Err(_) => param.set_host(name)?,
            }
        }
        Ok(ssl)
    }

    /// What a failed handshake means, if OpenSSL's reason does not tell; empty: it does.
    pub fn hint(&self, reason: &str) -> &'static str {
        let is = |what: &[&str]| what.iter().any(|what| reason.contains(what));
        match self.kind {
            Kind::Keys
                if is(&[
                    "bad record mac",
                    "decrypt error",
                    "unknown psk",
                    "illegal parameter",
                    "access denied",
                ]) =>
            {
                "the server does not have this user's pre-shared key: "
            }
            Kind::Certificates if is(&["certificate required", "bad certificate"]) => {
                "the server does not accept our certificate: "
            }
            Kind::Certificates if is(&["certificate verify failed"]) => {
                "the server's certificate is not trusted (tls-certificates=DIR names the authority): "
            }
            _ if is(&["handshake failure", "no shared cipher"]) => {
                "the server wants to be shown something else than we have (certificates, or pre-shared keys): "
            }
            _ => "",
        }
    }
}

/// The files of a directory.
fn load(context: &mut SslContextBuilder, directory: &Path) -> anyhow::Result<()> {
    let file = |name: &str| directory.join(name);
    let authority = file("ca-cert.pem");
    let pem = std::fs::read(&authority).with_context(|| {
        format!("cannot read {}: the directory needs the certificate of an authority", authority.display())
    })?;
    trust(context, directory, (&authority, &pem), false)?;
    let (certificate, key) = (file("client-cert.pem"), file("client-key.pem"));
    if certificate.exists() && key.exists() {
        show(context, &certificate, &key)?;
    }
    Ok(())
}
