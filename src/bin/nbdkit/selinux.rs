//! `--selinux-label`: the label that sockets are made with.

use anyhow::{Context as _, Result};

/// The kernel's file for the label of the sockets that this thread makes; what libselinux writes to.
const LABEL: &str = "/proc/thread-self/attr/sockcreate";

/// Runs `make`, whose sockets get the label.
///
/// # Errors
/// Those of `make`, and when SELinux is off or does not know the label.
pub(crate) fn with_label<T>(label: Option<&str>, make: impl FnOnce() -> Result<T>) -> Result<T> {
    let Some(label) = label else { return make() };
    std::fs::write(LABEL, format!("{label}\0")).with_context(|| {
        format!("--selinux-label: cannot make sockets with the label '{label}': is SELinux enabled?")
    })?;
    let made = make();
    // An empty label is the policy's own again.
    std::fs::write(LABEL, "").context("--selinux-label: cannot go back to the policy's label")?;
    made
}
