//! The conformance suite of the bundled plugins, for C plugins of both versions and a C filter.

use std::{ffi::OsString, path::Path, sync::Arc};

use nbdkit_core::Chain;

use self::suite::{Row, Writes};
use super::harness::{Lab, serve};
use crate::{DebugFlags, load_filter, load_plugin};

#[path = "../../../plugins/conformance/suite.rs"]
#[allow(dead_code, reason = "no row here needs a file, or fails to write")]
mod suite;

/// The second plugin takes whole pages only.
const SIZE: u64 = (256 << 10) + 4096;

/// A disk in memory, kept from one connection to the next.
const fn row(plugin: &'static str, export: &'static str, caps: &'static str) -> Row {
    let params = |_: &Path| vec![("size", SIZE.to_string().into())];
    Row { plugin, params, export, size: SIZE, caps, writes: Writes::Kept, area: 0..SIZE }
}

const V1: &str = "write flush trim zero=Native fast_zero fua=Emulate";
const V2: &str = "write flush trim zero=Native fast_zero fua=Native multi_conn cache=Native extents";

const ROWS: &[Row] = &[
    row("ramdisk_v1.c", "", V1),
    row("ramdisk_v2.c", "ram", V2),
    row("invert.c ramdisk_v1.c", "", "write flush trim zero=Emulate fast_zero fua=Emulate"),
    row(
        "invert.c ramdisk_v2.c",
        "ram",
        "write flush trim zero=Emulate fast_zero fua=Native multi_conn cache=Native",
    ),
];

/// A chain of a plugin and the filters before it, from the sources of the end-to-end tests.
fn start(sources: &str, params: Vec<(&str, OsString)>) -> anyhow::Result<Arc<Chain>> {
    let lab = Lab::new();
    let library = |source: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/abi").join(source);
        lab.library(
            path.to_str().expect("UTF-8"),
            &[format!("-I{}/../../include", env!("CARGO_MANIFEST_DIR"))],
        )
    };
    let mut layers: Vec<_> = sources.split(' ').map(library).collect();
    let plugin = load_plugin(&layers.pop().expect("a plugin"), &mut DebugFlags::default())?;
    let filters: Vec<_> =
        layers.iter().map(|path| load_filter(path, &mut DebugFlags::default())).collect::<Result<_, _>>()?;
    let mut chain = Chain::new(plugin, filters);
    for (key, value) in params {
        chain.config(key, &value)?;
    }
    serve(chain)
}
