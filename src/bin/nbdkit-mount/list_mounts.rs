//! `--list-mounts`: the mounts of this program that can be seen from here.

use std::io::Write as _;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::{args::Args, state::Stored};

/// Prints a line for each mount, or JSON.
///
/// # Errors
/// The mount table cannot be read.
pub(crate) fn list(args: &Args) -> Result<()> {
    ensure!(args.words.is_empty(), "--list-mounts takes nothing else: leave the other words out");
    let mounts = nbdkit_fuse::mounts().context("cannot read the mount table")?;
    let ours = mounts.into_iter().filter(nbdkit_fuse::MountEntry::is_ours).map(|mount| {
        // Another user's is not to be read.
        let stored = Stored::load(&mount.device).filter(|stored| stored.state.mountpoint == mount.target);
        (mount, stored.map(|stored| stored.state))
    });
    let text = if args.json {
        let all = ours.map(|(mount, state)| {
            json!({
                "mountpoint": mount.target.to_string_lossy(),
                "source": mount.source,
                "pid": state.as_ref().map(|state| state.pid),
                "loop_device": state.as_ref().and_then(|state| state.loop_device.as_ref()),
                "inside": state.as_ref().and_then(|state| state.inside.as_ref()),
            })
        });
        format!("{}\n", json!(all.collect::<Vec<_>>()))
    } else {
        let all = ours.map(|(mount, state)| {
            let mut line = format!("{} from {}", mount.target.display(), mount.source);
            if let Some(state) = state {
                line += &format!(", process {}", state.pid);
                let device = state.loop_device.iter().map(|device| format!(", {}", device.display()));
                let inside = state.inside.iter().map(|inside| format!(", mounted at {}", inside.display()));
                line.extend(device.chain(inside));
            }
            line.escape_debug().to_string() + "\n"
        });
        all.collect()
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot print")
}
