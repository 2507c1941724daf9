//! Plugins and filters in C, compiled here against the distribution's headers, driven through a chain.

mod conformance;
mod endurance;
mod filters;
mod harness;
mod interface;
mod offsets;
mod plugins;
