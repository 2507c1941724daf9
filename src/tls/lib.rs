//! TLS for both ends of an NBD connection: what the sides show each other, and what is spoken.
//!
//! OpenSSL does it, for its pre-shared keys work with the programs there are, which use GnuTLS. It is opened when the first
//! credentials are made (`libssl`), which can be done in one place of a program only: so the server's credentials and the
//! client's are both made here. What moves the records is up to each end.

#![deny(unsafe_code)]

mod client;
mod credentials;
mod files;
#[cfg(openssl_on_demand)]
mod libssl;
mod priority;

pub use client::ClientCredentials;
pub use credentials::{Credentials, debug, set_debug};
