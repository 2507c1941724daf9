//! The contestants: which program serves which disk, and how.

/// A program with a way to serve a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Ours,
    Nbdkit,
    QemuNbd,
    /// The NBD socket of our mount.
    OursMountSocket,
    /// Our mount where each request passes the chain.
    OursMount,
    /// Our mount that hands the file to the kernel, which needs `-r`.
    OursPassthrough,
    /// nbdfuse over the peer's nbdkit.
    Nbdfuse,
    Qsd,
    /// None: the clients use the file itself.
    Raw,
}

/// What is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Disk {
    /// The stamped image, in the page cache.
    Cached,
    /// A stamped image that is not in the page cache and stays out of it.
    Cold,
    /// The file of 1 TiB with holes.
    Sparse,
    /// Memory of this many bytes, all written before.
    Memory(u64),
    /// Memory of this many bytes, never written.
    Empty(u64),
}

/// What is unusual about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Variant {
    Plain,
    /// TLS by a pre-shared key.
    Tls,
    /// The distribution's C plugin instead of the server's own.
    CPlugin,
    /// Filters, outermost first, and their parameters.
    Filters(&'static [&'static str], &'static [&'static str]),
}

/// One column of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Contestant {
    /// Unlike the others of its section.
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) disk: Disk,
    pub(crate) variant: Variant,
    /// The programs are those of an earlier release of this project.
    pub(crate) earlier: bool,
}

impl Kind {
    /// Programs of this project.
    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Kind::Ours | Kind::OursMount | Kind::OursMountSocket | Kind::OursPassthrough)
    }
}

impl Contestant {
    pub(crate) const fn new(name: &'static str, kind: Kind, disk: Disk) -> Self {
        Contestant { name, kind, disk, variant: Variant::Plain, earlier: false }
    }

    pub(crate) const fn with(self, variant: Variant) -> Self {
        Contestant { variant, ..self }
    }

    /// Takes no writes.
    pub(crate) fn is_readonly(self) -> bool {
        matches!(self.kind, Kind::OursPassthrough | Kind::Raw)
    }

    /// Past the page cache, these reads go to the storage, where the others' end in the page cache of the image.
    pub(crate) fn only_cached(self) -> bool {
        self.is_readonly() && self.disk == Disk::Cached
    }

    /// A server of this project as it is now: when it fails, the run fails.
    pub(crate) fn is_ours(self) -> bool {
        self.kind.is_ours() && !self.earlier
    }
}
