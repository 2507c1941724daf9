//! What compiles against this package and what must not, seen from a crate of its own: the source of a plugin as its
//! author writes it, checked by cargo.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// A crate outside the workspace whose only dependencies are this package and libc.
struct Crate {
    folder: PathBuf,
}

impl Crate {
    fn new(name: &str, edition: &str) -> Crate {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir_all(folder.join("src")).expect("make the crate's folders");
        let manifest = format!(
            "[package]\nname = {name:?}\nedition = {edition:?}\n\n[lib]\ncrate-type = [\"cdylib\"]\n\n\
             [dependencies]\nlibc = \"0.2\"\nnbdkit = {{ path = {:?} }}\n\n[workspace]\n",
            env!("CARGO_MANIFEST_DIR")
        );
        fs::write(folder.join("Cargo.toml"), manifest).expect("write the manifest");
        // The same versions as here, so that nothing has to be fetched.
        let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.lock");
        fs::copy(lock, folder.join("Cargo.lock")).expect("copy the lock file");
        Crate { folder }
    }

    /// The compiler's errors, if there are any.
    fn check(&self, source: &str) -> Result<(), String> {
        fs::write(self.folder.join("src/lib.rs"), source).expect("write the source");
        let output = Command::new(env!("CARGO"))
            .args(["check", "--offline", "--quiet", "--color=never"])
            .current_dir(&self.folder)
            // One for all crates: this package is compiled once.
            .env("CARGO_TARGET_DIR", Path::new(env!("CARGO_TARGET_TMPDIR")).join("source-target"))
            .output()
            .expect("run cargo");
        if output.status.success() {
            Ok(())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }
}

const REQUIRED: [&str; 4] = [
    "fn name() -> &'static str { \"disk\" }",
    "fn open(_readonly: bool) -> Result<Box<dyn Server>> { Ok(Box::new(Disk)) }",
    "fn get_size(&self) -> Result<i64> { Ok(512) }",
    "fn read_at(&self, buf: &mut [u8], _offset: u64) -> Result<()> { buf.fill(0); Ok(()) }",
];

fn plugin(methods: &[&str], registered: &str) -> String {
    let methods = methods.join("\n");
    format!(
        "use nbdkit::*;\nstruct Disk;\nimpl Server for Disk {{\n{methods}\n}}\nplugin!(Disk {{{registered}}});\n"
    )
}

#[test]
fn mistakes_do_not_compile() {
    let disk = Crate::new("mistakes", "2024");
    disk.check(&plugin(&REQUIRED, "")).expect("the required methods are enough");

    for (missing, method) in ["name", "open", "get_size", "read_at"].into_iter().enumerate() {
        let mut methods = REQUIRED.to_vec();
        methods.remove(missing);
        let errors = disk.check(&plugin(&methods, "")).expect_err(method);
        assert!(errors.contains(&format!("missing: `{method}`")), "{errors}");
    }
    // Required ones are not registered by name.
    for unknown in ["pwrite", "write", "open", "close"] {
        let errors = disk.check(&plugin(&REQUIRED, unknown)).expect_err(unknown);
        assert!(errors.contains(&format!("no method named `{unknown}`")), "{errors}");
    }
    let mut methods = REQUIRED.to_vec();
    methods.push("fn flush(&self, flags: Flags) -> Result<()> { Ok(()) }");
    let errors = disk.check(&plugin(&methods, "flush")).expect_err("flush has no flags");
    assert!(errors.contains("`flush` has 2 parameters"), "{errors}");
}

/// The 34 methods as the crate nbdkit 0.3.0 has them, with its types and functions, in the idiom of its time.
#[test]
fn source_for_the_older_crate_compiles() {
    let source = r#"
#[macro_use]
extern crate nbdkit;

use nbdkit::*;
use std::io;

#[derive(Default)]
struct Disk {
    size: i64,
}

impl Server for Disk {
    fn name() -> &'static str { "older" }
    fn longname() -> Option<&'static str> { Some("a longer name") }
    fn version() -> Option<&'static str> { None }
    fn description() -> Option<&'static str> { Some("lines") }
    fn config_help() -> Option<&'static str> { None }
    fn magic_config_key() -> Option<&'static str> where Self: Sized { Some("size") }
    fn load() {}
    fn unload() where Self: Sized {}
    fn dump_plugin() { println!("older=1"); }
    fn config(key: &str, value: &str) -> Result<()> {
        match key {
            "size" => parse_size(value).map(|_: i64| ()),
            "flag" => parse_bool(value).map(|_: bool| ()),
            "chance" => parse_probability("chance", value).map(|_: f64| ()),
            "file" => Ok(std::fs::File::open(value).map(|_| ())?),
            _ => Err(Error::new(libc::EINVAL, "Unknown parameter")),
        }
    }
    fn config_complete() -> Result<()> {
        if is_stdio_safe() { debug!("stdio is {}", "safe"); }
        Ok(())
    }
    fn thread_model() -> Result<ThreadModel> where Self: Sized {
        let model = ThreadModel::SerializeAllRequests;
        assert!(model != ThreadModel::Parallel && model as i32 == 1);
        Ok(model)
    }
    fn get_ready() -> Result<()> { Ok(()) }
    fn after_fork() -> Result<()> { Ok(()) }
    fn preconnect(_readonly: bool) -> Result<()> { Err(io::Error::from_raw_os_error(libc::EPERM).into()) }
    fn open(_readonly: bool) -> Result<Box<dyn Server>> {
        let name: std::result::Result<String, Box<dyn std::error::Error>> = export_name();
        debug!("tls={} name={:?}", is_tls()?, name);
        Ok(Box::<Disk>::default())
    }
    fn get_size(&self) -> Result<i64> { Ok(self.size) }
    fn can_write(&self) -> Result<bool> { Ok(true) }
    fn can_flush(&self) -> Result<bool> { Ok(true) }
    fn is_rotational(&self) -> Result<bool> { Ok(false) }
    fn can_trim(&self) -> Result<bool> { Ok(true) }
    fn can_zero(&self) -> Result<bool> { Ok(true) }
    fn can_fast_zero(&self) -> Result<bool> { Ok(true) }
    fn can_extents(&self) -> Result<bool> { Ok(true) }
    fn can_fua(&self) -> Result<FuaFlags> {
        let number: i32 = FuaFlags::Emulate.into();
        Ok(if number == 1 { FuaFlags::Native } else { FuaFlags::None })
    }
    fn can_multi_conn(&self) -> Result<bool> { Ok(false) }
    fn can_cache(&self) -> Result<CacheFlags> {
        let number: i32 = CacheFlags::None.into();
        Ok(if number == 0 { CacheFlags::Native } else { CacheFlags::Emulate })
    }
    fn read_at(&self, _buf: &mut [u8], _offset: u64) -> Result<()> {
        let cause: Box<dyn std::error::Error> = "not today".into();
        Err(Error::new(libc::EIO, cause))
    }
    fn write_at(&self, _buf: &[u8], _offset: u64, flags: Flags) -> Result<()> {
        if flags.contains(Flags::FUA) && flags != Flags::empty() { self.flush()?; }
        Ok(())
    }
    fn flush(&self) -> Result<()> { Ok(()) }
    fn trim(&self, _count: u32, _offset: u64, flags: Flags) -> Result<()> {
        let _: u32 = (flags | Flags::FUA).bits();
        Ok(())
    }
    fn zero(&self, count: u32, _offset: u64, flags: Flags) -> Result<()> {
        if (flags & Flags::FAST_ZERO).is_empty() || flags.intersects(Flags::MAY_TRIM) {
            return Err(Error::new(libc::EOPNOTSUPP, format!("{} zeroes", count)));
        }
        disconnect(true);
        shutdown();
        Ok(())
    }
    fn extents(&self, count: u32, offset: u64, flags: Flags, extent_handle: &mut ExtentHandle) -> Result<()> {
        let kind = if flags.contains(Flags::REQ_ONE) { ExtentType::Hole } else { ExtentType::HoleZero };
        extent_handle.add(offset, count as u64, kind)?;
        extent_handle.add(offset, count as u64, ExtentType::Allocated)?;
        extent_handle.add(offset, count as u64, ExtentType::Zero)
    }
    fn cache(&self, _count: u32, _offset: u64) -> Result<()> { Ok(()) }
}

plugin!(Disk {
    after_fork, cache, can_cache, can_extents, can_fast_zero, can_flush, can_fua, can_multi_conn, can_trim, can_write,
    can_zero, config, config_complete, config_help, dump_plugin, extents, flush, get_ready, is_rotational, load,
    preconnect, thread_model, trim, unload, write_at, zero
});
"#;
    for edition in ["2018", "2021", "2024"] {
        let older = Crate::new(&format!("older{edition}"), edition);
        older.check(source).unwrap_or_else(|errors| panic!("edition {edition}: {errors}"));
    }
}
