//! `--exit-with-parent`: the end of the parent process is the end of this one.

use anyhow::{Context as _, Result, ensure};

/// Asks the kernel to send SIGTERM when the parent ends.
///
/// # Errors
/// If the parent is gone already.
pub fn exit_with_parent() -> Result<()> {
    let parent = rustix::process::getppid();
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
        .context("--exit-with-parent")?;
    ensure!(rustix::process::getppid() == parent, "--exit-with-parent: the parent process has ended already");
    Ok(())
}
