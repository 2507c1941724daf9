//! The list of sections: who competes, in what, and which ratios count.

use crate::{
    contestants::{
        Contestant,
        Disk::{Cached, Cold, Empty, Memory, Sparse},
        Kind, Variant,
    },
    fio::Engine,
    jobs::{Job, Tool, small, stream},
    load::{Load, Mix},
    measure::Cpus,
};

/// One section of the report.
///
/// Beside each contestant that is ours the earlier release takes part, when there is one: see [`lineup`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Contest {
    pub(crate) title: &'static str,
    pub(crate) contestants: &'static [Contestant],
    /// Pairs of contestants by name: how many times the second's rate the first has.
    pub(crate) ratios: &'static [(&'static str, &'static str)],
    pub(crate) jobs: &'static [Job],
}

/// In the order in which they run. Those that write come late where they share a disk: they leave dirty pages behind.
pub(crate) const CONTESTS: &[Contest] = &[
    Contest {
        title: "NBD, cached file",
        contestants: &[
            Contestant::new("ours", Kind::Ours, Cached),
            Contestant::new("nbdkit", Kind::Nbdkit, Cached),
            Contestant::new("qemu-nbd", Kind::QemuNbd, Cached),
        ],
        ratios: &[("ours", "nbdkit"), ("ours", "qemu-nbd")],
        jobs: &[
            pinned("nbd-read-d1", "4 KiB random reads, depth 1, one CPU", small(Mix::READS, 1)),
            pinned("nbd-read-d16", "4 KiB random reads, depth 16, one CPU", small(Mix::READS, 16)),
            pinned("nbd-read-d64", "4 KiB random reads, depth 64, one CPU", small(Mix::READS, 64)),
            own("nbd-read-d64-all", "4 KiB random reads, depth 64, all CPUs", small(Mix::READS, 64)),
            by_fio(
                "nbd-fio-d1",
                "4 KiB random reads, depth 1, fio, all CPUs",
                Engine::Nbd,
                small(Mix::READS, 1),
            ),
            by_fio(
                "nbd-fio-d16",
                "4 KiB random reads, depth 16, fio, all CPUs",
                Engine::Nbd,
                small(Mix::READS, 16),
            ),
            own("nbd-stream-read", "1 MiB reads, depth 4, all CPUs", stream(Mix::READS)),
            copy("nbd-copy-1", "nbdcopy of the disk, 1 connection, all CPUs, per MiB", 1),
            copy("nbd-copy-4", "nbdcopy of the disk, 4 connections, all CPUs, per MiB", 4),
            own("nbd-stream-write", "1 MiB writes, depth 4, all CPUs", stream(Mix::WRITES)),
        ],
    },
    Contest {
        title: "NBD, memory plugin",
        contestants: &[
            Contestant::new("ours", Kind::Ours, Memory(256 << 20)),
            Contestant::new("nbdkit", Kind::Nbdkit, Memory(256 << 20)),
            Contestant::new("qemu-nbd", Kind::QemuNbd, Memory(256 << 20)),
        ],
        ratios: &[("ours", "nbdkit"), ("ours", "qemu-nbd")],
        jobs: &[
            own("memory-write-d16", "4 KiB random writes, depth 16, all CPUs", small(Mix::WRITES, 16)),
            own("memory-stream-write", "1 MiB writes, depth 4, all CPUs", stream(Mix::WRITES)),
        ],
    },
    Contest {
        title: "NBD with TLS (pre-shared key), cached file",
        contestants: &[
            Contestant::new("ours", Kind::Ours, Cached).with(Variant::Tls),
            Contestant::new("nbdkit", Kind::Nbdkit, Cached).with(Variant::Tls),
            Contestant::new("qemu-nbd", Kind::QemuNbd, Cached).with(Variant::Tls),
        ],
        ratios: &[("ours", "nbdkit"), ("ours", "qemu-nbd")],
        jobs: &[copy("tls-copy", "nbdcopy of the disk, 4 connections, all CPUs, per MiB", 4)],
    },
    Contest {
        title: "NBD, C plugin (the distribution's file plugin), cached file",
        contestants: &[
            Contestant::new("ours", Kind::Ours, Cached).with(Variant::CPlugin),
            Contestant::new("nbdkit", Kind::Nbdkit, Cached).with(Variant::CPlugin),
        ],
        ratios: &[("ours", "nbdkit")],
        jobs: &[
            pinned("c-plugin-d16", "4 KiB random reads, depth 16, one CPU", small(Mix::READS, 16)),
            own("c-plugin-d16-all", "4 KiB random reads, depth 16, all CPUs", small(Mix::READS, 16)),
        ],
    },
    Contest {
        title: "NBD, filters over a cached file",
        contestants: &[
            Contestant::new("no filter", Kind::Ours, Cached),
            Contestant::new("three filters", Kind::Ours, Cached)
                .with(Variant::Filters(&["log", "partition", "offset"], &["offset=1M", "partition=1"])),
            Contestant::new("ten filters", Kind::Ours, Cached).with(Variant::Filters(&["nofilter"; 10], &[])),
        ],
        ratios: &[("three filters", "no filter"), ("ten filters", "no filter")],
        jobs: &[
            pinned("filters-d16", "4 KiB random reads, depth 16, one CPU", small(Mix::READS, 16)),
            own("filters-stream-read", "1 MiB reads, depth 4, all CPUs", stream(Mix::READS)),
        ],
    },
    Contest {
        title: "NBD, several connections to a cached file",
        contestants: &[
            Contestant::new("ours", Kind::Ours, Cached),
            Contestant::new("nbdkit", Kind::Nbdkit, Cached),
            Contestant::new("qemu-nbd", Kind::QemuNbd, Cached),
        ],
        ratios: &[("ours", "nbdkit"), ("ours", "qemu-nbd")],
        jobs: &[
            own("connections-1", "4 KiB random reads, depth 16, 1 connection, all CPUs", many(1)),
            own("connections-4", "4 KiB random reads, depth 16, 4 connections, all CPUs", many(4)),
            own("connections-16", "4 KiB random reads, depth 16, 16 connections, all CPUs", many(16)),
            own("connections-64", "4 KiB random reads, depth 16, 64 connections, all CPUs", many(64)),
            pinned("connections-1-one", "4 KiB random reads, depth 16, 1 connection, one CPU", many(1)),
            pinned("connections-64-one", "4 KiB random reads, depth 16, 64 connections, one CPU", many(64)),
        ],
    },
    Contest {
        title: "NBD, sizes of the memory plugin",
        contestants: &[
            Contestant::new("1 MiB", Kind::Ours, Empty(1 << 20)),
            Contestant::new("1 GiB", Kind::Ours, Empty(1 << 30)),
            Contestant::new("1 TiB", Kind::Ours, Empty(1 << 40)),
            Contestant::new("8 EiB − 1", Kind::Ours, Empty(i64::MAX as u64)),
        ],
        ratios: &[("8 EiB − 1", "1 MiB")],
        jobs: &[pinned("size-read-d16", "4 KiB random reads, depth 16, one CPU", small(Mix::READS, 16))],
    },
    Contest {
        title: "NBD, block status of a file of 1 TiB with 10,000 extents",
        contestants: &[
            Contestant::new("ours", Kind::Ours, Sparse),
            Contestant::new("nbdkit", Kind::Nbdkit, Sparse),
            Contestant::new("qemu-nbd", Kind::QemuNbd, Sparse),
        ],
        ratios: &[("ours", "nbdkit"), ("ours", "qemu-nbd")],
        jobs: &[Job {
            id: "map",
            title: "nbdinfo --map of the disk, all CPUs",
            tool: Tool::Map,
            load: small(Mix::READS, 1),
            cpus: Cpus::All,
        }],
    },
    Contest {
        title: "NBD, file past the page cache",
        contestants: &[
            Contestant::new("ours", Kind::Ours, Cold),
            Contestant::new("five filters", Kind::Ours, Cold).with(Variant::Filters(
                &["stats", "readonly", "log", "partition", "offset"],
                &["statsfile=/dev/null", "offset=1M", "partition=1"],
            )),
            Contestant::new("nbdkit", Kind::Nbdkit, Cold),
            Contestant::new("qemu-nbd", Kind::QemuNbd, Cold),
            Contestant::new("fio on the file", Kind::Raw, Cold),
        ],
        ratios: &[
            ("ours", "nbdkit"),
            ("ours", "qemu-nbd"),
            ("ours", "fio on the file"),
            ("five filters", "ours"),
        ],
        jobs: &[own("cold-read-d64", "4 KiB random reads, depth 64, all CPUs", small(Mix::READS, 64))],
    },
    Contest {
        title: "Start, memory plugin of 1 MiB, --run true",
        contestants: &[
            Contestant::new("ours", Kind::Ours, Memory(1 << 20)),
            Contestant::new("nbdkit", Kind::Nbdkit, Memory(1 << 20)),
        ],
        ratios: &[("ours", "nbdkit")],
        jobs: &[Job {
            id: "start",
            title: "from start to exit, all CPUs",
            tool: Tool::Start,
            load: small(Mix::READS, 1),
            cpus: Cpus::All,
        }],
    },
    Contest {
        title: "FUSE, C plugin (the distribution's file plugin), cached file",
        contestants: &[Contestant::new("ours", Kind::OursMount, Cached).with(Variant::CPlugin)],
        ratios: &[],
        jobs: &[by_fio(
            "fuse-c-plugin-d16",
            "4 KiB random reads, direct, depth 16, all CPUs",
            Engine::Direct,
            small(Mix::READS, 16),
        )],
    },
    Contest {
        title: "FUSE, cached file",
        contestants: &[
            Contestant::new("ours", Kind::OursMount, Cached),
            Contestant::new("nbdfuse", Kind::Nbdfuse, Cached),
            Contestant::new("qsd", Kind::Qsd, Cached),
            Contestant::new("ours, passthrough", Kind::OursPassthrough, Cached),
            Contestant::new("the file itself", Kind::Raw, Cached),
        ],
        ratios: &[
            ("ours", "nbdfuse"),
            ("ours", "qsd"),
            ("ours", "the file itself"),
            ("ours, passthrough", "the file itself"),
        ],
        jobs: &[
            Job {
                cpus: Cpus::One,
                ..by_fio(
                    "fuse-read-d1",
                    "4 KiB random reads, direct, depth 1, one CPU",
                    Engine::Direct,
                    small(Mix::READS, 1),
                )
            },
            Job {
                cpus: Cpus::Two,
                ..by_fio(
                    "fuse-read-d1-two",
                    "4 KiB random reads, direct, depth 1, server and client on a CPU each",
                    Engine::Direct,
                    small(Mix::READS, 1),
                )
            },
            by_fio(
                "fuse-read-d1-all",
                "4 KiB random reads, direct, depth 1, all CPUs",
                Engine::Direct,
                small(Mix::READS, 1),
            ),
            by_fio(
                "fuse-read-d16",
                "4 KiB random reads, direct, depth 16, all CPUs",
                Engine::Direct,
                small(Mix::READS, 16),
            ),
            by_fio("fuse-cached", "4 KiB random reads, cached", CACHED, small(Mix::READS, 1)),
            by_fio("fuse-cached-stream", "1 MiB reads, cached", CACHED, stream(Mix::READS)),
            by_fio("fuse-stream-read", "1 MiB reads, direct, depth 4", Engine::Direct, stream(Mix::READS)),
            Job {
                cpus: Cpus::One,
                ..by_fio(
                    "fuse-write-d1",
                    "4 KiB random writes, direct, depth 1, one CPU",
                    Engine::Direct,
                    small(Mix::WRITES, 1),
                )
            },
            by_fio("fuse-stream-write", "1 MiB writes, direct, depth 4", Engine::Direct, stream(Mix::WRITES)),
        ],
    },
    Contest {
        title: "NBD, socket of the mount, cached file",
        contestants: &[
            Contestant::new("nbdkit-mount -U", Kind::OursMountSocket, Cached),
            Contestant::new("ours", Kind::Ours, Cached),
        ],
        ratios: &[("nbdkit-mount -U", "ours")],
        jobs: &[own("mount-socket-stream-write", "1 MiB writes, depth 4, all CPUs", stream(Mix::WRITES))],
    },
];

/// The part of a mounted file that cached reads stay in, so that filling the cache takes no time.
const CACHED: Engine = Engine::Cached(64 << 20);

const fn own(id: &'static str, title: &'static str, load: Load) -> Job {
    Job { id, title, tool: Tool::Own, load, cpus: Cpus::All }
}

const fn pinned(id: &'static str, title: &'static str, load: Load) -> Job {
    Job { cpus: Cpus::One, ..own(id, title, load) }
}

const fn by_fio(id: &'static str, title: &'static str, engine: Engine, load: Load) -> Job {
    Job { tool: Tool::Fio(engine), ..own(id, title, load) }
}

const fn copy(id: &'static str, title: &'static str, connections: usize) -> Job {
    let load = Load { connections, ..stream(Mix::READS) };
    Job { tool: Tool::Copy, ..own(id, title, load) }
}

/// Reads on several connections.
const fn many(connections: usize) -> Load {
    Load { connections, ..small(Mix::READS, 16) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_ratios_have_contestants() {
        let mut ids = std::collections::HashSet::new();
        for contest in CONTESTS {
            assert!(contest.jobs.iter().all(|job| ids.insert(job.id)), "{}", contest.title);
            let names: Vec<_> = contest.contestants.iter().map(|c| c.name).collect();
            let unique: std::collections::HashSet<_> = names.iter().collect();
            assert_eq!(unique.len(), names.len(), "{}", contest.title);
            for (of, over) in contest.ratios {
                assert!(names.contains(of) && names.contains(over), "{of} ÷ {over}");
            }
        }
    }
}
