//! The layouts of nbdkit-abi are those of the C headers, field by field.

use std::{collections::BTreeMap, mem::offset_of, process::Command};

use nbdkit_abi as abi;

use super::{filters::headers, harness::Lab};

/// What a compiled program says, by name.
#[track_caller]
fn theirs(flags: &[String]) -> BTreeMap<String, usize> {
    let lab = Lab::new();
    let program = lab.gcc("offsets.c", "offsets", flags);
    let output = Command::new(program).output().expect("run the program");
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let line = |line: &str| {
        let (name, number) = line.split_once(' ').expect("two words");
        (name.to_owned(), number.parse().expect("a number"))
    };
    text.lines().map(line).collect()
}

macro_rules! offsets {
    ($type:ty, $prefix:literal, $($field:ident)*) => {
        [$((format!("{}.{}", $prefix, stringify!($field)), offset_of!($type, $field)),)*]
    };
}

macro_rules! constants {
    ($($name:ident)*) => {
        [$((stringify!($name).to_owned(), usize::try_from(abi::$name).expect("no negative one")),)*]
    };
}

/// Those of both headers.
fn constants() -> BTreeMap<String, usize> {
    constants!(
        THREAD_MODEL_SERIALIZE_CONNECTIONS THREAD_MODEL_SERIALIZE_ALL_REQUESTS THREAD_MODEL_SERIALIZE_REQUESTS THREAD_MODEL_PARALLEL
        FLAG_MAY_TRIM FLAG_FUA FLAG_REQ_ONE FLAG_FAST_ZERO
        FUA_NONE FUA_EMULATE FUA_NATIVE CACHE_NONE
        CACHE_EMULATE CACHE_NATIVE EXTENT_HOLE EXTENT_ZERO
    )
    .into()
}

fn plugin(version: u32) -> BTreeMap<String, usize> {
    let mut ours: BTreeMap<_, _> = offsets!(
        abi::Plugin, "nbdkit_plugin",
        _struct_size _api_version _thread_model name longname version description load unload config
        config_complete config_help open close get_size can_write can_flush is_rotational can_trim
        errno_is_preserved dump_plugin can_zero can_fua magic_config_key can_multi_conn can_extents extents
        can_cache cache thread_model can_fast_zero preconnect get_ready after_fork list_exports default_export
        export_description cleanup block_size
    )
    .into();
    ours.extend(constants());
    ours.insert("nbdkit_plugin".into(), size_of::<abi::Plugin>());
    let old = offsets!(abi::Plugin, "nbdkit_plugin", pread_v1 pwrite_v1 flush_v1 trim_v1 zero_v1);
    let new = offsets!(abi::Plugin, "nbdkit_plugin", pread pwrite flush trim zero);
    if version == 1 {
        ours.extend(old.map(|(name, at)| (name.replace("_v1", ""), at)));
    } else {
        ours.extend(old.map(|(name, at)| (name.replace("nbdkit_plugin.", "nbdkit_plugin._"), at)));
        ours.extend(new);
    }
    ours
}

#[test]
fn plugins() {
    for version in [1, 2] {
        let flags = ["-DPLUGIN".into(), format!("-DNBDKIT_API_VERSION={version}")];
        assert_eq!(theirs(&flags), plugin(version), "version {version}");
    }
}

/// The offsets of a filter whose callbacks start at `callbacks`.
fn filter(size: usize, thread_model: usize, callbacks: usize) -> BTreeMap<String, usize> {
    let mut ours: BTreeMap<String, usize> = [
        ("nbdkit_filter".into(), size),
        ("nbdkit_filter.thread_model".into(), thread_model),
        ("nbdkit_next_ops".into(), size_of::<abi::NextOps>()),
        ("nbdkit_extent".into(), size_of::<abi::Extent>()),
        ("nbdkit_extent.type".into(), offset_of!(abi::Extent, r#type)),
        ("nbdkit_export".into(), size_of::<abi::Export>()),
    ]
    .into();
    ours.extend(constants());
    ours.extend(constants!(FILTER_API_VERSION ZERO_NONE ZERO_EMULATE ZERO_NATIVE));
    ours.extend(offsets!(abi::Extent, "nbdkit_extent", offset length));
    ours.extend(offsets!(abi::Export, "nbdkit_export", name description));
    ours.extend(offsets!(
        abi::FilterHead, "nbdkit_filter",
        _api_version _version name longname description load unload config config_complete config_help
    ));
    let last = offsets!(
        abi::FilterCallbacks, "nbdkit_filter",
        get_ready after_fork cleanup preconnect list_exports default_export open close prepare finalize get_size
        export_description block_size can_write can_flush is_rotational can_trim can_zero can_fast_zero
        can_extents can_fua can_multi_conn can_cache pread pwrite flush trim zero extents cache
    );
    ours.extend(last.map(|(name, at)| (name, at + callbacks)));
    ours.extend(offsets!(
        abi::NextOps, "nbdkit_next_ops",
        prepare finalize get_size export_description block_size can_write can_flush is_rotational can_trim
        can_zero can_fast_zero can_extents can_fua can_multi_conn can_cache pread pwrite flush trim zero extents
        cache
    ));
    ours
}

macro_rules! layout {
    ($type:ty) => {
        filter(size_of::<$type>(), offset_of!($type, thread_model), offset_of!($type, callbacks))
    };
}

#[test]
fn filters_of_the_distribution() {
    assert_eq!(theirs(&[]), layout!(abi::FilterV132));
}

#[test]
fn filters_of_later_versions() {
    let dump = "nbdkit_filter.dump_plugin".to_owned();
    let mut v136 = layout!(abi::FilterV136);
    v136.insert(dump.clone(), offset_of!(abi::FilterV136, dump_plugin));
    let mut v144 = layout!(abi::FilterV144);
    v144.insert(dump, offset_of!(abi::FilterV144, dump_plugin));
    for (version, ours) in [("1.36.2", v136), ("1.44.0", v144)] {
        let lab = Lab::new();
        let include = headers(&lab, version);
        assert_eq!(theirs(&["-DHAS_DUMP_PLUGIN".into(), include]), ours, "{version}");
    }
}
