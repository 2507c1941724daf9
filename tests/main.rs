//! The product seen from outside: servers and mounts under test, foreign clients as witnesses.

mod abi;
mod bad_input;
mod chain;
mod command_lines;
mod crash;
mod docs;
mod examples;
mod filters;
mod fuse;
mod layering;
mod lua;
mod metrics;
mod nbd;
mod ocaml;
mod packages;
mod plugins;
mod python;
mod scripts;
mod security;
mod shells;
mod thread_models;
mod util;
