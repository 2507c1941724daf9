//! The versions that the programs tell: that of the nbdkit whose behaviour they have, which scripts compare, and their own.

/// The version of nbdkit that the programs behave like.
pub const COMPATIBLE: &str = env!("CARGO_PKG_VERSION");
/// The version of this project.
pub const OWN: &str = "0.1.0";
/// The commit that the programs were built from, as 12 hexadecimal digits; "unknown" outside of a repository.
pub const COMMIT: &str = env!("NBDKIT_COMMIT");

/// What `--version` prints: scripts read the second word of the first line.
pub fn text(program: &str) -> String {
    format!("{program} {COMPATIBLE} (nbdkit-rs {OWN}, commit {COMMIT})\n")
}
