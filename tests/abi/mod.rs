//! The C interface, from the outside: binaries that others compiled, and those compiled against our headers.

mod distribution;
mod headers;
mod install;
mod loading;
mod rust;
mod unfilled;
mod unruly;
