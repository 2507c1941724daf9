//! What an open layer can do. Asked once per connection when the layer is opened, then kept.

use std::{fmt, str::FromStr, sync::Arc};

use crate::{Errno, Error, Result};

/// How many requests may be in the layer at once, from the strictest to the freest.
///
/// The order is the numbering of the C interface (`NBDKIT_THREAD_MODEL_*`), so the strictest of several is
/// their minimum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ThreadModel {
    /// One connection at a time.
    SerializeConnections = 0,
    /// One request at a time in the whole server.
    SerializeAllRequests = 1,
    /// One request at a time on each connection.
    SerializeRequests = 2,
    /// No limit.
    Parallel = 3,
}

impl ThreadModel {
    /// The name as `--dump-plugin` prints it.
    pub fn name(self) -> &'static str {
        match self {
            ThreadModel::SerializeConnections => "serialize_connections",
            ThreadModel::SerializeAllRequests => "serialize_all_requests",
            ThreadModel::SerializeRequests => "serialize_requests",
            ThreadModel::Parallel => "parallel",
        }
    }
}

impl fmt::Display for ThreadModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ThreadModel {
    type Err = anyhow::Error;

    /// Reads a name, with hyphens or underscores.
    fn from_str(name: &str) -> anyhow::Result<Self> {
        use ThreadModel::*;
        let plain = name.replace('-', "_");
        [SerializeConnections, SerializeAllRequests, SerializeRequests, Parallel]
            .into_iter()
            .find(|model| model.name() == plain)
            .ok_or_else(|| anyhow::anyhow!("unknown thread model '{name}'"))
    }
}

/// How an operation that can be emulated is offered (zero, FUA, cache).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Support {
    /// Not offered to the client.
    None = 0,
    /// Offered, and made from other operations: zero by pwrite, FUA by flush, cache by pread.
    Emulate = 1,
    /// Offered, and done by the layer itself.
    Native = 2,
}

bitflags::bitflags! {
    /// Flags of a request, numbered as in the C interface.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Flags: u32 {
        /// zero: the range may become a hole.
        const MAY_TRIM = 1;
        /// pwrite, trim, zero: the data must be on stable storage when the request returns.
        const FUA = 2;
        /// extents: one extent is enough.
        const REQ_ONE = 4;
        /// zero: fail with `EOPNOTSUPP` at once unless it is faster than writing.
        const FAST_ZERO = 8;
    }
}

/// The kind of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read bytes.
    Read,
    /// Write bytes.
    Write,
    /// Make all completed writes durable.
    Flush,
    /// Discard a range; what it reads as afterwards is not defined.
    Trim,
    /// Make a range read as zeroes.
    Zero,
    /// Read ahead into a cache.
    Cache,
    /// Ask which parts of a range are holes or zeroes.
    Extents,
}

/// Limits on the size and alignment of requests, in bytes. All 0: not known.
///
/// The meaning of each is that of `NBD_INFO_BLOCK_SIZE` (proto.md, "Block size constraints").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockSize {
    /// Smallest request and alignment: a power of 2, 1 to 65536.
    pub minimum: u32,
    /// Best request size: a power of 2, 512 to 32 Mi.
    pub preferred: u32,
    /// Largest request: `u32::MAX` (no limit) or a multiple of `minimum`.
    pub maximum: u32,
}

impl BlockSize {
    /// Whether nothing is known.
    pub fn is_unset(&self) -> bool {
        *self == BlockSize::default()
    }

    /// Checks the rules above.
    ///
    /// # Errors
    /// `EINVAL` naming the rule that is broken.
    pub fn validate(self) -> Result<Self> {
        let BlockSize { minimum, preferred, maximum } = self;
        let fail = |what: String| Err(Error::new(Errno::EINVAL, what));
        if self.is_unset() {
            return Ok(self);
        }
        if !minimum.is_power_of_two() || minimum > 65536 {
            return fail(format!("minimum block size {minimum} is not a power of 2 between 1 and 64K"));
        }
        if !preferred.is_power_of_two() || !(512..=32 << 20).contains(&preferred) {
            return fail(format!("preferred block size {preferred} is not a power of 2 between 512 and 32M"));
        }
        if preferred < minimum {
            return fail(format!("preferred block size {preferred} is below the minimum {minimum}"));
        }
        if maximum != u32::MAX && (maximum % minimum != 0 || maximum < preferred) {
            return fail(format!(
                "maximum block size {maximum} is neither unlimited nor a multiple of {minimum} from {preferred} up"
            ));
        }
        Ok(self)
    }
}

/// The answers of an open layer, after the rules between them were applied: nothing that writes is on unless
/// `write` is.
#[derive(Clone, Debug)]
pub struct Caps {
    /// Size of the disk in bytes, at most `i64::MAX`.
    pub size: u64,
    /// Limits on requests.
    pub block_size: BlockSize,
    /// Requests that change data are allowed.
    pub write: bool,
    /// Flush is allowed.
    pub flush: bool,
    /// Trim is allowed.
    pub trim: bool,
    /// How zero is offered.
    pub zero: Support,
    /// Zero understands [`Flags::FAST_ZERO`].
    pub fast_zero: bool,
    /// How FUA is offered.
    pub fua: Support,
    /// Several connections see one consistent disk (a flush on one covers writes of the others).
    pub multi_conn: bool,
    /// How cache is offered.
    pub cache: Support,
    /// The layer knows its extents; without it everything is reported as data.
    pub extents: bool,
    /// The disk behaves like a spinning one.
    pub rotational: bool,
    /// Questions whose answer failed. The field above has the cautious answer, and a layer that answers by itself does not
    /// inherit the failure; what is left of them at the outermost layer fails the open.
    pub(crate) failed: Vec<FailedAnswer>,
}

/// One method for each question that may have failed, named as the one of [`Handle`](crate::Handle).
macro_rules! inherited {
    ($($question:ident: $field:ident, $answer:ty;)*) => {
        impl Caps {
            $(
                /// The answer to the question of that name, for the layer above that passes it on.
                ///
                /// # Errors
                /// The question failed here.
                pub fn $question(&self) -> Result<$answer> {
                    self.inherit(stringify!($question)).map(|()| self.$field)
                }
            )*
        }
    };
}

inherited! {
    is_rotational: rotational, bool;
    can_write: write, bool;
    can_flush: flush, bool;
    can_trim: trim, bool;
    can_zero: zero, Support;
    can_fast_zero: fast_zero, bool;
    can_fua: fua, Support;
    can_multi_conn: multi_conn, bool;
    can_cache: cache, Support;
    can_extents: extents, bool;
}

impl Caps {
    fn inherit(&self, question: &str) -> Result<()> {
        let failed = self.failed.iter().find(|failed| failed.question == question);
        failed.map_or(Ok(()), |failed| Err(failed.error()))
    }
}

/// A question about capabilities that a layer failed to answer.
#[derive(Clone, Debug)]
pub(crate) struct FailedAnswer {
    pub(crate) question: &'static str,
    error: Arc<Error>,
}

impl FailedAnswer {
    pub(crate) fn new(question: &'static str, error: Error) -> Self {
        FailedAnswer { question, error: Arc::new(error) }
    }

    /// The failure, once more.
    pub(crate) fn error(&self) -> Error {
        self.error.duplicate()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_size_rules() {
        let ok = |a, b, c| BlockSize { minimum: a, preferred: b, maximum: c }.validate().is_ok();
        assert!(ok(0, 0, 0));
        assert!(ok(1, 512, u32::MAX));
        assert!(ok(512, 4096, 1 << 20));
        assert!(!ok(3, 512, u32::MAX));
        assert!(!ok(1, 256, u32::MAX));
        assert!(!ok(131072, 131072, u32::MAX));
        assert!(!ok(4096, 512, u32::MAX));
        assert!(!ok(4096, 4096, 4097));
        assert!(!ok(1, 64 << 20, u32::MAX));
        assert!(!ok(0, 512, 0));
    }

    #[test]
    fn strictest_model_is_the_minimum() {
        assert_eq!(
            ThreadModel::Parallel.min(ThreadModel::SerializeAllRequests),
            ThreadModel::SerializeAllRequests
        );
        assert_eq!("serialize-requests".parse::<ThreadModel>().unwrap(), ThreadModel::SerializeRequests);
        assert_eq!("serialize_requests".parse::<ThreadModel>().unwrap(), ThreadModel::SerializeRequests);
        assert!("fast".parse::<ThreadModel>().is_err());
    }
}
