//! The list of targets.

use super::{
    Bound::{self, AtLeast, AtMost},
    Measure::{self, Cpu, CpuMs, CpuOfJobs, Figure, LayerNs, Rate, RateOfJobs, Rss, Time},
    Target,
};

/// What every row reaches against the earlier release, where the list has no bound for it.
pub(crate) const NO_SLOWER: f64 = 0.97;

/// The contestant beside ours that runs the earlier release.
const EARLIER: &str = "ours, earlier";

/// All of them. Peers are named where it is not nbdkit.
pub(crate) const TARGETS: &[Target] = &[
    rate("file, 4 KiB reads, one CPU, depth 1", "nbd-read-d1", "nbdkit", 1.6),
    rate("file, 4 KiB reads, one CPU, depth 16", "nbd-read-d16", "nbdkit", 3.5),
    rate("file, 4 KiB reads, one CPU, depth 64", "nbd-read-d64", "nbdkit", 3.5),
    rate("file, 4 KiB reads, all CPUs, depth 64", "nbd-read-d64-all", "nbdkit", 2.5),
    rate("file, fio nbd engine, depth 1", "nbd-fio-d1", "nbdkit", 1.3),
    rate("file, fio nbd engine, depth 16", "nbd-fio-d16", "nbdkit", 1.2),
    rate("file, 1 MiB reads", "nbd-stream-read", "nbdkit", 1.8),
    rate("file, 1 MiB writes", "nbd-stream-write", "nbdkit", 1.5),
    rate("memory, 4 KiB writes, depth 16", "memory-write-d16", "nbdkit", 2.1),
    rate("memory, 1 MiB writes", "memory-stream-write", "nbdkit", 1.15),
    target("server CPU per 4 KiB read, depth 16", Cpu("nbd-read-d16", "ours", "nbdkit"), AtMost(0.4)),
    rate("TLS-PSK copy", "tls-copy", "nbdkit", 4.0),
    rate("4 KiB reads, one CPU, depth 1, qemu-nbd", "nbd-read-d1", "qemu-nbd", 2.0),
    rate("4 KiB reads, one CPU, depth 16, qemu-nbd", "nbd-read-d16", "qemu-nbd", 2.0),
    rate("4 KiB reads, one CPU, depth 64, qemu-nbd", "nbd-read-d64", "qemu-nbd", 2.0),
    rate("4 KiB reads, all CPUs, depth 64, qemu-nbd", "nbd-read-d64-all", "qemu-nbd", 2.0),
    rate("fio nbd engine, depth 1, qemu-nbd", "nbd-fio-d1", "qemu-nbd", 2.0),
    rate("fio nbd engine, depth 16, qemu-nbd", "nbd-fio-d16", "qemu-nbd", 2.0),
    rate("1 MiB reads, qemu-nbd", "nbd-stream-read", "qemu-nbd", 2.0),
    rate("1 MiB writes, qemu-nbd", "nbd-stream-write", "qemu-nbd", 2.0),
    rate("memory, 4 KiB writes, depth 16, qemu-nbd", "memory-write-d16", "qemu-nbd", 2.0),
    rate("memory, 1 MiB writes, qemu-nbd", "memory-stream-write", "qemu-nbd", 2.0),
    target(
        "server CPU per 4 KiB read, depth 16, qemu-nbd",
        Cpu("nbd-read-d16", "ours", "qemu-nbd"),
        AtMost(0.5),
    ),
    rate("TLS-PSK copy, qemu-nbd", "tls-copy", "qemu-nbd", 2.0),
    rate("C plugin, depth 16", "c-plugin-d16", "nbdkit", 1.2),
    rate("FUSE direct 4 KiB, depth 1, one CPU, nbdfuse", "fuse-read-d1", "nbdfuse", 6.0),
    rate("FUSE direct 4 KiB, depth 16, nbdfuse", "fuse-read-d16", "nbdfuse", 6.0),
    rate("FUSE direct 4 KiB, depth 1, one CPU, qsd", "fuse-read-d1", "qsd", 2.5),
    rate("FUSE direct 4 KiB, depth 16, qsd", "fuse-read-d16", "qsd", 3.0),
    rate("FUSE direct 1 MiB reads, qsd", "fuse-stream-read", "qsd", 3.0),
    rate("FUSE cached 4 KiB, the file itself", "fuse-cached", "the file itself", 0.9),
    rate("FUSE cached 1 MiB, the file itself", "fuse-cached-stream", "the file itself", 0.9),
    target(
        "FUSE passthrough 4 KiB, the file itself",
        Rate("fuse-cached", "ours, passthrough", "the file itself"),
        AtLeast(0.9),
    ),
    target(
        "FUSE passthrough 1 MiB, the file itself",
        Rate("fuse-cached-stream", "ours, passthrough", "the file itself"),
        AtLeast(0.9),
    ),
    target("three filters, no filter", Rate("filters-d16", "three filters", "no filter"), AtLeast(0.9)),
    target("ten filters, no filter", Rate("filters-d16", "ten filters", "no filter"), AtLeast(0.95)),
    target(
        "CPU ns per pass-through filter",
        LayerNs("filters-d16", "ten filters", "no filter", 10),
        AtMost(30.0),
    ),
    target("block status, 10,000 extents, CPU ms", CpuMs("map", "ours"), AtMost(50.0)),
    rate("file past the page cache, depth 64, fio on the file", "cold-read-d64", "fio on the file", 0.9),
    target(
        "file past the page cache, five filters, no filter",
        Rate("cold-read-d64", "five filters", "ours"),
        AtLeast(0.95),
    ),
    rate("FUSE, C plugin, depth 16, earlier release", "fuse-c-plugin-d16", EARLIER, 1.5),
    rate("FUSE direct 4 KiB, depth 1, two CPUs, earlier release", "fuse-read-d1-two", EARLIER, 1.35),
    rate("FUSE direct 4 KiB, depth 1, one CPU, earlier release", "fuse-read-d1", EARLIER, 0.97),
    rate("FUSE direct 4 KiB writes, depth 1, one CPU, earlier release", "fuse-write-d1", EARLIER, 1.2),
    target(
        "1 MiB writes, socket of the mount, our server",
        Rate("mount-socket-stream-write", "nbdkit-mount -U", "ours"),
        AtLeast(0.97),
    ),
    target("start to exit, time", Time("start", "ours", "nbdkit"), AtMost(0.5)),
    target("start to exit, CPU", Cpu("start", "ours", "nbdkit"), AtMost(0.5)),
    target("KiB of memory per idle connection", Figure("idle-rss", "ours"), AtMost(64.0)),
    target("memory after the run", Rss("nbd-read-d16", "ours", "nbdkit"), AtMost(2.0)),
    target(
        "CPU per request, 4 connections ÷ 1",
        CpuOfJobs("ours", "connections-4", "connections-1"),
        AtMost(1.2),
    ),
    target(
        "CPU per request, 16 connections ÷ 1",
        CpuOfJobs("ours", "connections-16", "connections-1"),
        AtMost(1.2),
    ),
    target(
        "CPU per request, 64 connections ÷ 1",
        CpuOfJobs("ours", "connections-64", "connections-1"),
        AtMost(1.2),
    ),
    target(
        "CPU per request, one CPU, 64 connections ÷ 1",
        CpuOfJobs("ours", "connections-64-one", "connections-1-one"),
        AtMost(1.3),
    ),
    target("export of 8 EiB − 1 ÷ 1 MiB", Rate("size-read-d16", "8 EiB − 1", "1 MiB"), AtLeast(0.9)),
    target("nbdcopy, 4 connections ÷ 1", RateOfJobs("ours", "nbd-copy-4", "nbd-copy-1"), AtLeast(1.0)),
];

const fn target(work: &'static str, measure: Measure, bound: Bound) -> Target {
    Target { work, measure, bound }
}

/// Our rate is at least so many times that of the peer.
const fn rate(work: &'static str, job: &'static str, peer: &'static str, bound: f64) -> Target {
    target(work, Rate(job, "ours", peer), AtLeast(bound))
}
