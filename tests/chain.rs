//! The rules of the chain, as a user sees them.

use crate::util::{self, NBDKIT, NBDKIT_MOUNT, Server, image, nbdsh, temp};

/// Runs nbdkit with a command; its standard output.
#[track_caller]
fn captive(words: &[&str], command: &str) -> String {
    util::run_ok([NBDKIT, "-U", "-"].iter().chain(words).chain(&["--run", command]))
}

#[test]
fn filters_wrap_in_order_first_listed_outermost() {
    // offset=0 range=512K around truncate to 1M of a 2M disk, and the other way round.
    let size = |words: &[&str]| captive(words, "nbdinfo --size \"$uri\"").trim().to_owned();
    let parameters = ["memory", "2M", "offset=0", "range=512K", "truncate=1M"];
    let chain = |a, b| [&[a, b][..], &parameters].concat();
    assert_eq!(size(&chain("--filter=offset", "--filter=truncate")), "524288");
    assert_eq!(size(&chain("--filter=truncate", "--filter=offset")), "1048576");
}

#[test]
fn help_and_version_list_every_layer() {
    for program in [NBDKIT, NBDKIT_MOUNT] {
        let words = [program, "--filter=offset", "--filter=cow", "memory"];
        let version = util::run_ok(words.iter().chain(&["--version"]));
        let layers: Vec<&str> = version.lines().map(|l| l.split(' ').next().expect("a word")).collect();
        assert_eq!(layers, [program.rsplit('/').next().expect("a name"), "offset", "cow", "memory"]);
        let help = util::run_ok(words.iter().chain(&["--help"]));
        let at = |text: &str| help.find(text).unwrap_or_else(|| panic!("no {text} in {help}"));
        assert!(at("filter: offset") < at("filter: cow") && at("filter: cow") < at("plugin: memory"));
        assert!(help.contains("range=") && help.contains("size="));
    }
}

#[test]
fn filters_take_their_keys_and_the_plugin_the_rest() {
    let out = captive(&["--filter=offset", "memory", "size=1M", "offset=4096"], "nbdinfo --size \"$uri\"");
    assert_eq!(out.trim(), (1048576 - 4096).to_string());
}

#[test]
fn strictest_thread_model_wins() {
    let model = |words: &[&str]| {
        let run = util::run([NBDKIT, "-v", "-U", "-"].iter().chain(words).chain(&["--run", "true"]));
        run.stderr.lines().find_map(|l| l.split("using thread model: ").nth(1)).map(str::to_owned)
    };
    assert_eq!(model(&["memory", "1M"]).as_deref(), Some("parallel"));
    let filters = ["--filter=noparallel", "--filter=nofilter", "memory", "1M"];
    assert_eq!(model(&filters).as_deref(), Some("serialize_requests"));
    let all = [&filters[..], &["serialize=all-requests"]].concat();
    assert_eq!(model(&all).as_deref(), Some("serialize_all_requests"));
}

#[test]
fn messages_carry_the_plugins_name_and_the_connection() {
    let server = Server::start(["-v", "--filter=offset", "memory", "1M"]);
    nbdsh(&server.uri(), "h.pread(512, 0)");
    nbdsh(&server.uri(), "h.pread(512, 512)");
    let stderr = server.stderr();
    assert!(stderr.contains("nbdkit: memory[1]: debug: offset: pread count=512 offset=0"), "{stderr}");
    assert!(stderr.contains("nbdkit: memory[2]: debug: memory: pread count=512 offset=512"), "{stderr}");
}

#[test]
fn open_failure_below_closes_what_is_above() {
    let dir = temp();
    let disk = image(dir.path(), "disk", 1 << 20);
    let server = Server::start(["-v", "--filter=offset", "--filter=nofilter", "file"].into_iter().chain([
        disk.to_str().expect("UTF-8"),
        "offset=0",
        "range=2M",
    ]));
    let run = util::run(["nbdinfo", &server.uri()]);
    assert_ne!(run.code, 0);
    let stderr = server.stderr();
    let count = |text: &str| stderr.matches(text).count();
    assert!(count("debug: nofilter: open ") > 0, "{stderr}");
    assert_eq!(count("debug: nofilter: open "), count("debug: nofilter: close"), "{stderr}");
    assert_eq!(count("debug: file: open "), count("debug: file: close"), "{stderr}");
    // And the server goes on.
    std::fs::File::options().write(true).open(&disk).expect("open").set_len(4 << 20).expect("grow");
    assert_eq!(util::run_ok(["nbdinfo", "--size", &server.uri()]).trim(), "2097152");
}

#[test]
fn emulated_zero_is_one_call_for_the_layers_above() {
    let server = Server::start(["-v", "--filter=log", "--filter=nozero", "memory", "1M", "zeromode=emulate"]);
    nbdsh(
        &server.uri(),
        "h.pwrite(b'x' * 65536, 0); h.zero(65536, 0); assert h.pread(65536, 0) == bytes(65536)",
    );
    let stderr = server.stderr();
    assert_eq!(stderr.matches("debug: log: zero count=65536").count(), 1, "{stderr}");
    assert_eq!(stderr.matches("debug: memory: pwrite count=65536").count(), 2, "{stderr}");
}

/// The C nbdkit 1.32.5 never advances in this loop: old data stays behind the first 64 MiB.
#[test]
fn zero_by_writing_covers_everything() {
    let script = "size = h.get_size()\n\
                  for at in range(0, size, 1 << 25): h.pwrite(b'\\xff' * (1 << 25), at)\n\
                  h.zero(size, 0, nbd.CMD_FLAG_NO_HOLE)\n\
                  for at in range(0, size, 1 << 25): assert h.pread(1 << 25, at) == bytes(1 << 25), at\n";
    let server = Server::start(["--filter=nozero", "memory", "160M", "zeromode=emulate"]);
    nbdsh(&server.uri(), script);
    let server = Server::start(["--filter=nozero", "memory", "160M", "zeromode=plugin"]);
    nbdsh(&server.uri(), script);
}
