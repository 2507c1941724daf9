//! Numbers that are no rates: sizes of programs, memory of idle connections.

use anyhow::{Result, bail};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{
    contestants::{Contestant, Disk, Kind},
    images::Images,
    interrupt,
    measure::memory,
    programs::{Programs, stripped_size},
    servers::Server,
};

/// The ids of all figures.
#[cfg(test)]
pub(crate) const IDS: &[&str] = &["server-size", "mount-size", "idle-rss"];
const IDLE: usize = 1000;

/// A number of each contestant that has it.
#[derive(Debug)]
pub(crate) struct Figure {
    /// For the targets and bench.json.
    pub(crate) id: &'static str,
    pub(crate) title: &'static str,
    pub(crate) unit: &'static str,
    /// By the name of the contestant.
    pub(crate) values: Vec<(&'static str, f64)>,
}

impl Figure {
    /// Of one contestant.
    pub(crate) fn value(&self, name: &str) -> Option<f64> {
        self.values.iter().find(|(n, _)| *n == name).map(|(_, value)| *value)
    }
}

/// How large the programs are without debug information.
pub(crate) fn sizes(programs: &Programs) -> Vec<Figure> {
    let size = |name, files: &[&Option<_>]| {
        let sizes = files.iter().map(|file| stripped_size(file.as_deref()?));
        Some((name, sizes.sum::<Option<u64>>()? as f64 / f64::from(1 << 20)))
    };
    let server = [
        size("ours", &[&programs.ours.server]),
        size("nbdkit", &[&programs.nbdkit, &programs.file_plugin]),
        size("qemu-nbd", &[&programs.qemu_nbd]),
    ];
    let mount = [
        size("ours", &[&programs.ours.mount]),
        size("nbdfuse", &[&programs.nbdfuse]),
        size("qsd", &[&programs.qsd]),
    ];
    let figure = |id, title, values: [_; 3]| Figure {
        id,
        title,
        unit: "MiB",
        values: values.into_iter().flatten().collect(),
    };
    vec![
        figure("server-size", "size of the server", server),
        figure("mount-size", "size of the mount", mount),
    ]
}

/// What an idle connection costs in memory, and what went wrong.
pub(crate) fn idle(programs: &Programs, images: &Images) -> Result<(Figure, Vec<String>)> {
    let (mut values, mut problems) = (Vec::new(), Vec::new());
    for (name, kind) in [("ours", Kind::Ours), ("nbdkit", Kind::Nbdkit), ("qemu-nbd", Kind::QemuNbd)] {
        let contestant = Contestant::new(name, kind, Disk::Cached);
        match idle_memory(contestant, programs, images) {
            Ok(Some(each)) => values.push((name, each)),
            Ok(None) => problems.push(format!("{name}: not installed")),
            Err(error) => problems.push(format!("{name}: idle connections: {error:#}")),
        }
        interrupt::check()?;
    }
    let title = "memory of each of 1,000 idle connections";
    Ok((Figure { id: "idle-rss", title, unit: "KiB", values }, problems))
}

/// In KiB a connection.
fn idle_memory(contestant: Contestant, programs: &Programs, images: &Images) -> Result<Option<f64>> {
    // The server inherits it.
    allow_files(2 * IDLE as u64 + 100)?;
    let Some(server) = Server::start(contestant, programs, images)? else { return Ok(None) };
    // The first connection pays for what all share.
    let first = server.connect(1, false)?;
    let before = memory(&server.pids())?.rss;
    let idle = server.connect(IDLE, false)?;
    let after = memory(&server.pids())?.rss;
    drop((first, idle));
    Ok(Some(after.saturating_sub(before) as f64 / IDLE as f64))
}

/// Lets this process and its children open so many files.
fn allow_files(count: u64) -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < count) {
        if limit.maximum.is_some_and(|maximum| maximum < count) {
            bail!("no more than {} open files are allowed: raise ulimit -n", limit.maximum.unwrap_or(0));
        }
        setrlimit(Resource::Nofile, Rlimit { current: Some(count), ..limit })?;
    }
    Ok(())
}
