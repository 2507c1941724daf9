//! The small types of the interface: what requests ask for and what a plugin answers about itself.

use bitflags::bitflags;
use nbdkit_abi as abi;

bitflags! {
    /// What a request asks for besides its range.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct Flags: u32 {
        /// [`Server::zero`](crate::Server::zero): a hole will do, if it reads as zeroes. A plugin may ignore it.
        const MAY_TRIM = abi::FLAG_MAY_TRIM;

        /// [`Server::write_at`](crate::Server::write_at), [`Server::trim`](crate::Server::trim) and
        /// [`Server::zero`](crate::Server::zero): return only when the change is on stable storage. A plugin gets it
        /// only if its [`Server::can_fua`](crate::Server::can_fua) answers [`FuaFlags::Native`].
        const FUA = abi::FLAG_FUA;

        /// [`Server::extents`](crate::Server::extents): the client wants to know about the extent at the offset
        /// only. A plugin may ignore it.
        const REQ_ONE = abi::FLAG_REQ_ONE;

        /// [`Server::zero`](crate::Server::zero): fail at once with `EOPNOTSUPP`, leaving the disk as it was, if
        /// this would take about as long as writing the zeroes.
        const FAST_ZERO = abi::FLAG_FAST_ZERO;
    }
}

/// An answer as a number for C.
macro_rules! numbered {
    ($($answer:ident),*) => {
        $(impl From<$answer> for i32 {
            fn from(answer: $answer) -> i32 {
                answer as i32
            }
        })*
    };
}
numbered!(CacheFlags, FuaFlags, ThreadModel);

/// What [`Server::can_cache`](crate::Server::can_cache) answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum CacheFlags {
    /// Cache requests are not offered to the client.
    None = abi::CACHE_NONE,
    /// The server reads the range and drops the data.
    Emulate = abi::CACHE_EMULATE,
    /// [`Server::cache`](crate::Server::cache) is called.
    Native = abi::CACHE_NATIVE,
}

/// What [`Server::can_fua`](crate::Server::can_fua) answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum FuaFlags {
    /// FUA is not offered to the client.
    None = abi::FUA_NONE,
    /// The server calls [`Server::flush`](crate::Server::flush) after the request.
    Emulate = abi::FUA_EMULATE,
    /// The plugin obeys [`Flags::FUA`].
    Native = abi::FUA_NATIVE,
}

/// How much may happen at once in a plugin, from the strictest to the freest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(i32)]
pub enum ThreadModel {
    /// One client at a time; others wait until it has gone.
    SerializeConnections = abi::THREAD_MODEL_SERIALIZE_CONNECTIONS,
    /// Many clients, but one request at a time in the whole plugin.
    SerializeAllRequests = abi::THREAD_MODEL_SERIALIZE_ALL_REQUESTS,
    /// One request at a time on each handle; those of different handles run side by side.
    SerializeRequests = abi::THREAD_MODEL_SERIALIZE_REQUESTS,
    /// No limit: many requests at once, also on one handle, which must be `Sync`. Replies may overtake each other.
    Parallel = abi::THREAD_MODEL_PARALLEL,
}

/// What an extent is, for [`ExtentHandle::add`](crate::ExtentHandle::add).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ExtentType {
    /// Data.
    Allocated = 0,
    /// Nothing is allocated, and what a read returns is undefined. Rare: some SCSI disks are like that after a trim.
    Hole = abi::EXTENT_HOLE,
    /// Allocated, and reads as zeroes.
    Zero = abi::EXTENT_ZERO,
    /// Nothing is allocated, and it reads as zeroes: the usual hole.
    HoleZero = abi::EXTENT_HOLE | abi::EXTENT_ZERO,
}

/// What [`Server::block_size`](crate::Server::block_size) answers, in bytes. All 0 says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct BlockSize {
    /// Offsets and lengths of requests must be multiples of this: a power of 2 from 1 to 64 KiB.
    pub minimum: u32,
    /// Requests of this size and alignment do best: a power of 2 from 512 bytes to 32 MiB.
    pub preferred: u32,
    /// No request may be longer: a multiple of `minimum`, or `u32::MAX` for no limit.
    pub maximum: u32,
}
