//! The numbers of the interface.

use core::ffi::c_int;

/// The newest plugin interface.
pub const PLUGIN_API_VERSION: c_int = 2;
/// The one filter interface there is.
pub const FILTER_API_VERSION: c_int = 6;

/// One connection at a time.
pub const THREAD_MODEL_SERIALIZE_CONNECTIONS: c_int = 0;
/// One request at a time in the whole server.
pub const THREAD_MODEL_SERIALIZE_ALL_REQUESTS: c_int = 1;
/// One request at a time on each connection.
pub const THREAD_MODEL_SERIALIZE_REQUESTS: c_int = 2;
/// No limit.
pub const THREAD_MODEL_PARALLEL: c_int = 3;

/// zero: a hole will do.
pub const FLAG_MAY_TRIM: u32 = 1 << 0;
/// pwrite, trim, zero: on stable storage before the call returns.
pub const FLAG_FUA: u32 = 1 << 1;
/// extents: one is enough.
pub const FLAG_REQ_ONE: u32 = 1 << 2;
/// zero: fail rather than be slow.
pub const FLAG_FAST_ZERO: u32 = 1 << 3;

/// FUA is not offered.
pub const FUA_NONE: c_int = 0;
/// FUA is made from flush.
pub const FUA_EMULATE: c_int = 1;
/// FUA is passed on.
pub const FUA_NATIVE: c_int = 2;

/// cache is not offered.
pub const CACHE_NONE: c_int = 0;
/// cache reads and forgets.
pub const CACHE_EMULATE: c_int = 1;
/// cache is passed on.
pub const CACHE_NATIVE: c_int = 2;

/// zero is not offered; filters only.
pub const ZERO_NONE: c_int = 0;
/// zero writes zeroes; filters only.
pub const ZERO_EMULATE: c_int = 1;
/// zero is passed on; filters only.
pub const ZERO_NATIVE: c_int = 2;

/// An extent that nothing is allocated in.
pub const EXTENT_HOLE: u32 = 1 << 0;
/// An extent that reads as zeroes.
pub const EXTENT_ZERO: u32 = 1 << 1;
