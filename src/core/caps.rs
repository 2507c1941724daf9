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

/// A question about what a layer can do, named as the callback of the C interface that answers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    Write,
    Flush,
    Trim,
    Zero,
    FastZero,
    Fua,
    MultiConn,
    Cache,
    Extents,
    Rotational,
}

/// An answer of a layer about itself: what it can do, or why it cannot tell.
#[derive(Debug)]
pub struct Answer<T>(Result<T>);

impl<T> From<Result<T>> for Answer<T> {
    fn from(answer: Result<T>) -> Self {
        Answer(answer)
    }
}

impl From<bool> for Answer<bool> {
    fn from(answer: bool) -> Self {
        Answer(Ok(answer))
    }
}

impl From<Support> for Answer<Support> {
    fn from(answer: Support) -> Self {
        Answer(Ok(answer))
    }
}

/// What an open layer can do, as one value: [`Handle::capabilities`](crate::Handle::capabilities) makes it once, when the
/// layer is opened.
///
/// A plugin starts from [`of_size`](Self::of_size), a filter from [`Next::capabilities`](crate::Next::capabilities), and
/// both change what differs by the `with_` methods. An answer that failed is kept with the cautious one in its place; a
/// layer above that answers by itself replaces it, and what is left at the outermost layer fails the open.
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
    /// Whether a front end may ask for extents before it reads, and not read what reads as zeroes: the extents cost next to
    /// nothing (a system call or two, nothing that is far away), and no layer has to see every read.
    pub skip_holes: bool,
    failed: Vec<(Question, Arc<Error>)>,
}

impl Caps {
    /// A read-only disk of `size` bytes on which everything else is emulated or not offered: what a plugin starts from.
    pub fn of_size(size: u64) -> Self {
        Caps {
            size,
            block_size: BlockSize::default(),
            write: false,
            flush: false,
            trim: false,
            zero: Support::Emulate,
            fast_zero: true, // Emulated zero fails fast.
            fua: Support::None,
            multi_conn: false,
            cache: Support::None,
            extents: false,
            rotational: false,
            skip_holes: false,
            failed: Vec::new(),
        }
    }

    /// A disk of `size` bytes whose plugin does everything itself, fast, and for any number of connections: what a plugin
    /// with memory or a file behind it starts from.
    pub fn native(size: u64) -> Self {
        Caps {
            write: true,
            flush: true,
            trim: true,
            zero: Support::Native,
            fua: Support::Native,
            multi_conn: true,
            cache: Support::Native,
            extents: true,
            ..Caps::of_size(size)
        }
    }

    /// For a layer that takes every change itself, whatever is below, and makes it durable.
    #[must_use]
    pub fn with_native_writes(self) -> Self {
        self.with_write(true)
            .with_flush(true)
            .with_trim(true)
            .with_zero(Support::Native)
            .with_fast_zero(true)
            .with_fua(Support::Native)
    }

    /// Another size, in bytes.
    #[must_use]
    pub fn with_size(self, size: u64) -> Self {
        Caps { size, ..self }
    }

    /// Other limits on requests.
    #[must_use]
    pub fn with_block_size(self, block_size: BlockSize) -> Self {
        Caps { block_size, ..self }
    }

    /// Sets how zero is offered. One that is native is not fast, unless [`with_fast_zero`](Self::with_fast_zero) follows.
    #[must_use]
    pub fn with_zero(self, answer: impl Into<Answer<Support>>) -> Self {
        let caps = self.set_zero(answer);
        if caps.zero == Support::Native { caps.with_fast_zero(false) } else { caps }
    }

    /// Whether a front end may leave out reads of holes.
    #[must_use]
    pub fn with_skip_holes(self, skip_holes: bool) -> Self {
        Caps { skip_holes, ..self }
    }

    /// The answer, or the cautious one in place of one that failed.
    fn take<T: Copy>(&mut self, question: Question, answer: Answer<T>, cautious: T) -> T {
        self.failed.retain(|(failed, _)| *failed != question);
        answer.0.unwrap_or_else(|e| {
            self.failed.push((question, Arc::new(e)));
            cautious
        })
    }

    /// The answer to a question, with its failure.
    fn answer<T>(&self, question: Question, answer: T) -> Result<T> {
        match self.failed.iter().find(|(failed, _)| *failed == question) {
            Some((_, e)) => Err(e.duplicate()),
            None => Ok(answer),
        }
    }

    /// A failure that no layer has replaced.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.failed.first().map(|(_, e)| e.duplicate())
    }

    /// Checks the values, and applies the rules between them: nothing that writes is on unless `write` is.
    ///
    /// # Errors
    /// `EIO` for a size that is no size; `EINVAL` for limits that contradict each other.
    pub(crate) fn resolve(mut self, layer: &str, readonly: bool) -> Result<Self> {
        if self.size > i64::MAX as u64 {
            return Err(Error::new(Errno::EIO, format!("{layer}: the size {} is over 2^63-1", self.size)));
        }
        self.block_size = self.block_size.validate().map_err(|e| e.context(layer))?;
        if readonly {
            self = self.with_write(false);
        }
        if !self.write {
            self = self.with_trim(false).with_zero(Support::None).with_fua(Support::None);
        }
        if self.zero == Support::None {
            self = self.with_fast_zero(false);
        }
        self.skip_holes &= self.extents;
        Ok(self)
    }
}

/// For each question its field, the method that sets it, and the one that gives it with its failure.
macro_rules! questions {
    ($($question:ident: $field:ident, $visible:vis $with:ident, $can:ident, $answer:ty, $cautious:expr;)*) => {
        impl Caps {
            $(
                /// Sets the field of that name. An answer that failed is kept, with the cautious one in its place.
                #[must_use]
                $visible fn $with(mut self, answer: impl Into<Answer<$answer>>) -> Self {
                    self.$field = self.take(Question::$question, answer.into(), $cautious);
                    self
                }

                /// The field of that name.
                ///
                /// # Errors
                /// The layer failed to answer.
                pub fn $can(&self) -> Result<$answer> {
                    self.answer(Question::$question, self.$field)
                }
            )*
        }
    };
}

questions! {
    Write: write, pub with_write, can_write, bool, false;
    Flush: flush, pub with_flush, can_flush, bool, false;
    Trim: trim, pub with_trim, can_trim, bool, false;
    Zero: zero, set_zero, can_zero, Support, Support::None;
    FastZero: fast_zero, pub with_fast_zero, can_fast_zero, bool, false;
    Fua: fua, pub with_fua, can_fua, Support, Support::None;
    MultiConn: multi_conn, pub with_multi_conn, can_multi_conn, bool, false;
    Cache: cache, pub with_cache, can_cache, Support, Support::None;
    Extents: extents, pub with_extents, can_extents, bool, false;
    Rotational: rotational, pub with_rotational, is_rotational, bool, false;
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
