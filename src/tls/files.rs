//! The files of a directory of certificates, as both ends of a connection load them.

use std::path::Path;

use anyhow::Context as _;
use openssl::{
    ssl::{SslContextBuilder, SslFiletype},
    x509::{
        X509,
        store::{X509Lookup, X509StoreBuilder},
        verify::X509VerifyFlags,
    },
};

/// Trusts the authorities, which were read from `path` as `pem`, less what they have revoked in `ca-crl.pem`. `name` them to
/// clients, of whom certificates are asked.
///
/// # Errors
/// Files that make no sense.
pub(crate) fn trust(
    context: &mut SslContextBuilder,
    directory: &Path,
    (path, pem): (&Path, &[u8]),
    name: bool,
) -> anyhow::Result<()> {
    let mut store = X509StoreBuilder::new()?;
    for authority in X509::stack_from_pem(pem).with_context(|| format!("cannot load {}", path.display()))? {
        if name {
            context.add_client_ca(&authority)?;
        }
        store.add_cert(authority)?;
    }
    let revoked = directory.join("ca-crl.pem");
    if revoked.exists() {
        store
            .add_lookup(X509Lookup::file())?
            .load_crl_file(&revoked, SslFiletype::PEM)
            .with_context(|| format!("cannot load {}", revoked.display()))?;
        store.set_flags(X509VerifyFlags::CRL_CHECK)?;
    }
    context.set_cert_store(store.build());
    Ok(())
}

/// Shows a certificate to the other end.
///
/// # Errors
/// Files that cannot be read or do not fit together.
pub(crate) fn show(context: &mut SslContextBuilder, certificate: &Path, key: &Path) -> anyhow::Result<()> {
    context
        .set_certificate_chain_file(certificate)
        .with_context(|| format!("cannot load {}", certificate.display()))?;
    context
        .set_private_key_file(key, SslFiletype::PEM)
        .with_context(|| format!("cannot load {}", key.display()))?;
    context
        .check_private_key()
        .with_context(|| format!("{} is not the key of {}", key.display(), certificate.display()))
}
