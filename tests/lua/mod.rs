//! Plugins in Lua, through both front ends and in the C nbdkit. The distribution's Lua plugin is the measure for scripts
//! that know no more than it does.

mod examples;

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::util::{Mount, NBDKIT, NBDKIT_MOUNT, Server, bridge, nbdsh, run, run_ok, sh, temp};

/// The C nbdkit, of the distribution.
const C_NBDKIT: &str = "nbdkit";

fn script(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lua").join(name);
    path.into_os_string().into_string().expect("UTF-8")
}

/// A script of the test's own.
fn written(dir: &Path, text: &str) -> String {
    let path = dir.join("disk.lua");
    fs::write(&path, text).expect("write a script");
    path.into_os_string().into_string().expect("UTF-8")
}

/// Our Lua plugin.
fn lua() -> String {
    bridge("nbdkit-lua-plugin").into_os_string().into_string().expect("UTF-8")
}

/// The programs that run our plugin, with its name there.
fn servers() -> [(&'static str, String); 2] {
    [(NBDKIT, lua()), (C_NBDKIT, lua())]
}

/// Runs a Python script with `h` connected to a captive server's default export. It must succeed.
#[track_caller]
fn serve(program: &str, words: &[&str], python: &str) -> String {
    let dir = temp();
    let path = dir.path().join("script.py");
    fs::write(&path, python).expect("write a file");
    let command = format!("nbdsh --base-allocation -u \"$uri\" -c - < {}", path.display());
    let mut all = vec![program, "-U", "-"];
    all.extend(words);
    all.extend(["--run", &command]);
    run_ok(all)
}

/// What a client can learn of the disk of page.lua, as text.
const TOUR: &str = "
import hashlib
print(h.get_size(), h.is_read_only(), h.is_rotational(), h.can_flush(), h.can_trim(), h.can_zero(), h.can_fua())
print(h.can_multi_conn(), h.can_cache(), h.can_fast_zero(), h.can_df())
data = bytes(range(256)) * 40
h.pwrite(data, 4000)
h.pwrite(b'end', h.get_size() - 3, nbd.CMD_FLAG_FUA)
h.flush()
h.zero(5000, 4100)
h.zero(5000, 9001, nbd.CMD_FLAG_NO_HOLE)
h.trim(512, 20480)
assert h.pread(len(data) - 10100, 14100) == data[10100:]
print(hashlib.sha256(h.pread(h.get_size(), 0)).hexdigest())
def failure(call, *arguments):
    try:
        call(*arguments)
        return 'no failure'
    except nbd.Error as error:
        return error.errno
print(failure(h.pread, 512, 666 * 512), failure(h.zero, 512, 7 * 4096, nbd.CMD_FLAG_NO_HOLE))
";

/// A script of the page of 2019 is the same disk wherever it runs.
#[test]
fn an_old_script_gives_the_same_answers_everywhere() {
    let page = script("page.lua");
    let ours = lua();
    for parameters in [&["size=1048576", "rotational=yes"][..], &[]] {
        let words = |plugin: &'static str| [&[plugin, &*page][..], parameters].concat();
        let reference = serve(C_NBDKIT, &words("lua"), TOUR);
        assert!(reference.contains("EIO EIO"), "{reference}");
        assert_eq!(serve(NBDKIT, &words("lua"), TOUR), reference);
        let by_path = [&[&*ours, &*page][..], parameters].concat();
        assert_eq!(serve(C_NBDKIT, &by_path, TOUR), reference);
    }
    for (program, plugin) in [(NBDKIT, &ours), (C_NBDKIT, &ours)] {
        let dump = run_ok([program, plugin, &page, "--dump-plugin"]);
        for line in
            ["name=lua\n", "api_version=2\n", "thread_model=serialize_all_requests\n", "page_block=4096\n"]
        {
            assert!(dump.contains(line), "{line}: {dump}");
        }
        assert!(dump.find("lua_version=5.4\n") < dump.find("page_block="), "{dump}");
        let refused = run([program, plugin, &page, "colour=red"]);
        assert_eq!(refused.code, 1);
        assert!(refused.stderr.contains("config: "), "{}", refused.stderr);
        assert!(refused.stderr.contains("page.lua:25: unknown parameter colour"), "{}", refused.stderr);
        let refused = run([program, plugin, &page, "size=0"]).stderr;
        assert!(refused.contains("page.lua:30: size must be positive"), "{refused}");
    }
}

#[test]
fn an_old_script_through_a_mount() {
    lua();
    let dir = temp();
    let mut mount = Mount::start(["lua", &script("page.lua")]);
    sh(&format!(
        "test $(stat -c %s {0}) = 2097152
         head -c 300000 /dev/urandom > {1}/data
         dd if={1}/data of={0} bs=4k seek=10 conv=notrunc,fsync status=none
         cmp -n 300000 -i 0:40960 {1}/data {0}
         fallocate -p -o 40960 -l 8192 {0}
         cmp -n 8192 -i 0:40960 /dev/zero {0}
         cmp -n 291808 -i 8192:49152 {1}/data {0}",
        mount.file().display(),
        dir.path().display()
    ));
    assert_eq!(mount.unmount(), 0);
}

/// Every callback beyond the page, in both servers.
#[test]
fn what_the_page_does_not_have() {
    for (program, plugin) in servers() {
        let dir = temp();
        let log = dir.path().join("log");
        let words = [&*plugin, &script("everything.lua"), &format!("log={}", log.display())];
        let python = "
assert h.get_size() == 1e6 // 4096 * 4096
assert [h.get_block_size(k) for k in range(3)] == [512, 4096, 0xffffffff], [h.get_block_size(k) for k in range(3)]
assert h.can_fua() and h.can_cache() and h.can_multi_conn() and h.can_fast_zero() and not h.is_rotational()
h.pwrite(b'x' * 512, 512, nbd.CMD_FLAG_FUA)
h.pwrite(b'x' * 1024, 0)
h.trim(4096, 8192, nbd.CMD_FLAG_FUA)
h.zero(512, 0)
h.zero(512, 512, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.zero(512, 1024, nbd.CMD_FLAG_FAST_ZERO)
h.cache(4096, 0)
h.flush()
seen = []
h.block_status(h.get_size(), 0, lambda context, at, entries, error: seen.extend(entries))
assert seen == [4096, 0, 8192, 3, 4096, 2, h.get_size() - 16384, 0], seen
seen = []
h.block_status(512, 8192, lambda context, at, entries, error: seen.extend(entries), nbd.CMD_FLAG_REQ_ONE)
assert seen[1] == 3 and len(seen) == 2, seen
";
        serve(program, &words, python);
        let said = fs::read_to_string(&log).expect("the log");
        for line in [
            "get_ready",
            "after_fork",
            "preconnect false",
            "open false plain false",
            "pwrite 512 512 true",
            "pwrite 1024 0 false",
            "trim 4096 8192 true",
            "zero 512 0 true false false",
            "zero 512 512 false true false",
            "zero 512 1024 true false true",
            "cache 4096 0",
            "flush",
            "extents 512 8192 true",
            "close plain",
            "cleanup",
            "unload",
        ] {
            assert!(said.lines().any(|l| l == line), "{program}: {line}: {said}");
        }
        assert!(!said.contains("nil"), "{said}");
        let order = ["get_ready", "after_fork", "preconnect", "open", "close", "cleanup", "unload"];
        let places: Vec<_> = order.iter().map(|word| said.find(word)).collect();
        assert!(places.is_sorted(), "{said}");

        let with = |command: &str| {
            run(["timeout", "60", program, "-U", "-"].iter().copied().chain(words).chain(["--run", command]))
        };
        let list = with("nbdinfo --list \"$uri\"").ok();
        for text in
            ["export=\"plain\"", "export=\"described\"", "description: with words", "is_rotational: true"]
        {
            assert!(list.contains(text), "{text}: {list}");
        }
        let of = |export: &str, python: &str| {
            let connect =
                format!("nbdsh -c 'h.set_export_name(\"{export}\")' -c 'h.connect_unix(\"'$unixsocket'\")'");
            with(&format!("{connect} -c '{python}'"))
        };
        of("readonly", "assert h.is_read_only()").ok();
        let refused = of("forbidden", "pass");
        assert_ne!(refused.code, 0);
        assert!(refused.stderr.contains("error: open: not for you"), "{}", refused.stderr);

        let dump = run_ok([program].iter().copied().chain(words).chain(["--dump-plugin"]));
        assert!(dump.contains("max_thread_model=parallel\n"), "{dump}");
        let refused = run([program, words[0], words[1]]).stderr;
        assert!(refused.contains("config_complete: log= is missing"), "{refused}");
    }
}

/// zero that says "not this way" is done by writing; what else it says reaches the client.
#[test]
fn zero_that_fails() {
    for (program, plugin) in servers() {
        let dir = temp();
        for (errno, python) in [
            ("EOPNOTSUPP", "h.zero(1024, 4096)"),
            ("ENOTSUP", "h.zero(1024, 4096)"),
            (
                "ENOSPC",
                "
try:
    h.zero(1024, 4096)
    raise SystemExit('did not fail')
except nbd.Error as error:
    assert error.errno == 'ENOSPC', error",
            ),
        ] {
            let log = dir.path().join(errno);
            let (log_is, zero) = (format!("log={}", log.display()), format!("zero={errno}"));
            serve(program, &[&plugin, &script("everything.lua"), &log_is, &zero], python);
            let said = fs::read_to_string(&log).expect("the log");
            assert_eq!(said.contains("pwrite 1024 4096 false"), errno != "ENOSPC", "{said}");
        }
    }
}

/// Each way to fail is one line with the method and the place, the errno of the script, and no harm to the server.
#[test]
fn what_goes_wrong_in_a_script() {
    for (program, plugin) in servers() {
        let python = "
def read(n):
    try:
        return h.pread(512, n * 512)[:1].decode()
    except nbd.Error as error:
        return error.errno
print(' '.join(read(n) for n in range(21)))
";
        let dir = temp();
        let (path, errors) = (dir.path().join("script.py"), dir.path().join("errors"));
        fs::write(&path, python).expect("write a file");
        let out = sh(&format!(
            "{program} -U - {plugin} {} --run 'nbdsh -u \"$uri\" -c - < {}' 2>{}",
            script("faults.lua"),
            path.display(),
            errors.display()
        ));
        let io = "EIO";
        let wanted = [
            "a",
            io,
            io,
            io,
            io,
            io,
            io,
            io,
            io,
            io,
            io,
            "ENOSPC",
            "ESHUTDOWN",
            io,
            io,
            "b",
            io,
            io,
            io,
            "c",
            "d",
        ];
        let got: Vec<&str> = out.split_ascii_whitespace().collect();
        assert_eq!(got, wanted, "{program}");
        let said = fs::read_to_string(&errors).expect("messages");
        for message in [
            "faults.lua: returned 511 bytes where 512 were asked for",
            "faults.lua: must return a string, not nil",
            "faults.lua: must return a string, not a table",
            "error: pread: plain\n",
            "error: pread: table: ",
            "error: pread: made of a table\n",
            "faults.lua:35: attempt to index a nil value (local 'x')",
            "faults.lua:23: deep down",
            "stack overflow",
            "faults.lua:38: no room",
            "faults.lua:39: over",
            "faults.lua:40: set_error takes an errno",
            "faults.lua:41: not a size: \"many\"",
            "attempt to yield from outside a coroutine",
            "faults.lua:45: asserted\n",
        ] {
            assert!(said.contains(message), "{program}: {message}: {said}");
        }
        assert!(!said.contains("traceback"), "only with -v: {said}");
        let each = said.lines().filter(|line| line.contains("pread: ")).count();
        assert_eq!(each, wanted.iter().filter(|word| word.starts_with('E')).count(), "{said}");
    }
}

#[test]
fn answers_that_are_none() {
    let faults = script("faults.lua");
    for (program, plugin) in servers() {
        for (wrong, method, message) in [
            ("open", "open", "must return a handle, not nil"),
            ("size-table", "get_size", "the size must be a number of bytes, not a table"),
            ("size-negative", "get_size", "not -1"),
            ("size-fraction", "get_size", "not 0.5"),
            ("size-text", "get_size", "not the string 'x'"),
            ("size-huge", "get_size", "not 1e300"),
            ("fua", "can_fua", "must return one of nbdkit.FUA_*, true and false, not 3"),
            (
                "cache",
                "can_cache",
                "must return one of nbdkit.CACHE_*, true and false, not the string 'often'",
            ),
        ] {
            let wrong = format!("wrong={wrong}");
            let refused =
                run([program, "-U", "-", &plugin, &faults, &wrong, "--run", "nbdinfo --size \"$uri\""]);
            assert_ne!(refused.code, 0, "{program}: {wrong}");
            let line = refused.stderr.lines().find(|line| line.contains(&format!("error: {method}: ")));
            let line = line.unwrap_or_else(|| panic!("{program}: {wrong}: {}", refused.stderr));
            assert!(line.contains(&format!("faults.lua: {message}")) || line.ends_with(message), "{line}");
        }
    }
}

/// What is wrong with a script is said before the server serves, in one line.
#[test]
fn scripts_that_do_not_load() {
    let dir = temp();
    lua();
    let missing = dir.path().join("none.lua").display().to_string();
    let refused = |words: &[&str]| run([&[NBDKIT, "lua"], words].concat()).refused();
    assert!(refused(&[&missing]).contains("cannot read the Lua script"));
    assert!(refused(&["size=1M"]).contains("the first parameter must be a Lua script"));
    let said = run([NBDKIT, "-U", "-", "lua", "--run", "true"]).refused();
    assert!(said.contains("nbdkit lua SCRIPT"), "{said}");
    for (text, message) in [
        ("x = = 1", "disk.lua:1: unexpected symbol near '='"),
        ("\nerror('top')", "disk.lua:2: top"),
        ("function open() end function get_size() end", "has no function pread"),
        ("open = 1", "has no function open"),
        ("function open() end function get_size() end function pread() end error(nil)", "load: nil"),
    ] {
        let said = refused(&[&written(dir.path(), text)]);
        assert!(said.contains(message), "{message}: {said}");
    }
    let minimal = written(dir.path(), MINIMAL);
    let said = refused(&[&minimal, "colour=red"]);
    assert!(said.contains("disk.lua takes no parameters, for it has no function config"), "{said}");
    let said = run([NBDKIT_MOUNT, "lua", &missing, dir.path().to_str().expect("UTF-8")]).refused();
    assert!(said.contains("cannot read the Lua script"), "{said}");
}

const MINIMAL: &str = "
function open() return 1 end
function get_size() return 65536 end
function pread(h, count, offset) return string.rep('m', count) end
";

/// With no more than it must have, a script is what a C plugin of the same functions is.
#[test]
fn the_least_there_can_be() {
    let dir = temp();
    for (program, plugin) in servers() {
        let minimal = written(dir.path(), MINIMAL);
        let python = "
assert h.is_read_only() and not h.can_flush() and not h.can_trim()
assert not h.can_fua() and not h.can_cache()
assert h.get_block_size(nbd.SIZE_PREFERRED) == 0 and not h.can_multi_conn()
assert h.pread(65536, 0) == b'm' * 65536
seen = []
h.block_status(65536, 0, lambda context, at, entries, error: seen.extend(entries))
assert seen == [65536, 0], seen
";
        serve(program, &[&plugin, &minimal], python);
        let list = run_ok([program, "-U", "-", &plugin, &minimal, "--run", "nbdinfo --list \"$uri\""]);
        assert!(list.contains("export=\"\""), "{list}");
        let writable = written(dir.path(), &format!("{MINIMAL}function pwrite() end function flush() end"));
        let python = "assert h.can_fua() and h.can_fast_zero() and h.can_flush() and not h.is_read_only()
h.zero(65536, 0)
h.pwrite(b'x', 0, nbd.CMD_FLAG_FUA)";
        serve(program, &[&plugin, &writable], python);
    }
}

/// What a script says about itself, which servers of C take no notice of; and its function `load`, which is not Lua's.
#[test]
fn what_a_script_says_about_itself() {
    let dir = temp();
    let texts = "
name = 'letters'
longname = 'a disk of letters'
version = '7.8'
description = 'Nothing but one letter.'
config_help = 'letter=LETTER  The letter'
magic_config_key = 'letter'
assert(load('return 5')() == 5)
";
    let config = "function config(k, v) assert(k == 'letter'); letter = v end
        function pread(h, count) return string.rep(letter, count) end";
    let path = written(dir.path(), &format!("{texts}{MINIMAL}{config}"));
    lua();
    let help = run_ok([NBDKIT, "lua", &path, "--help"]);
    for line in
        ["plugin: letters - a disk of letters", "Nothing but one letter.", "letter=LETTER  The letter"]
    {
        assert!(help.lines().any(|l| l == line), "{line}: {help}");
    }
    let dump = run_ok([NBDKIT, "lua", &path, "--dump-plugin"]);
    for line in ["name=letters", "version=7.8", "magic_config_key=letter"] {
        assert!(dump.lines().any(|l| l == line), "{line}: {dump}");
    }
    let first = run_ok([NBDKIT, "-U", "-", "lua", &path, "q", "--run", "nbdcopy \"$uri\" - | head -c 3"]);
    assert_eq!(first, "qqq");
    run_ok([C_NBDKIT, "-U", "-", &lua(), &path, "letter=q", "--run", "nbdinfo \"$uri\""]);

    // Other uses of those names mean nothing.
    let path = written(dir.path(), &format!("name, version, description = 'no name', 3, {{}}\n{MINIMAL}"));
    let dump = run_ok([NBDKIT, "lua", &path, "--dump-plugin"]);
    assert!(dump.contains("\nname=lua\n"), "{dump}");
    let path = written(dir.path(), &format!("{MINIMAL}function load() error('not today') end"));
    for (program, plugin) in servers() {
        let said = run([program, "-U", "-", &plugin, &path, "--run", "true"]);
        assert!(said.code != 0 && said.stderr.contains("not today"), "{}", said.stderr);
    }
}

/// A script in the plugin directory, or anywhere, that the kernel could run.
#[test]
fn an_executable_script_is_a_plugin() {
    let dir = temp();
    let name = dir.path().join("nbdkit-letters-plugin");
    fs::write(&name, format!("#!/usr/sbin/nbdkit lua\n{MINIMAL}")).expect("write a script");
    sh(&format!("chmod +x {}", name.display()));
    // The Lua plugin beside the program is found for it.
    lua();
    let serve = |plugin: &str| {
        let here = dir.path().display();
        sh(&format!("NBDKIT_PLUGINDIR={here} {NBDKIT} -U - {plugin} --run 'nbdcopy \"$uri\" - | head -c 3'"))
    };
    assert_eq!(serve("letters"), "mmm");
    assert_eq!(serve(name.to_str().expect("UTF-8")), "mmm");
}

/// A parameter is bytes, for it may be the name of a file.
#[test]
fn parameters_need_not_be_utf_8() {
    let dir = temp();
    let text = format!(
        "{MINIMAL}function config(k, v) assert(v == 'a\\xff', 'it is ' .. v) done = true end
        function config_complete() assert(done) end"
    );
    let echo = written(dir.path(), &text);
    for (program, plugin) in servers() {
        sh(&format!("{program} -U - {plugin} {echo} x=$'a\\xff' --run true"));
        sh(&format!("! {program} -U - {plugin} {echo} x=b --run true 2>{}", dir.path().join("e").display()));
    }
}

/// The table `nbdkit`: what the server has it can ask for, what an old server lacks is an error that a script can catch.
#[test]
fn functions_of_the_server() {
    let dir = temp();
    let text = format!(
        "{MINIMAL}
        function config_complete()
            nbdkit.debug('hello from the script')
            nbdkit.debug('%s and %d', 'words', 42)
            assert(nbdkit.parse_size('1K') == 1024)
            assert(nbdkit.parse_int('n', '0x10') == 16 and nbdkit.parse_int('n', '-7') == -7)
            assert(not pcall(nbdkit.parse_int, 'n', '7x') and not pcall(nbdkit.peer_name))
            assert(nbdkit.parse_bool('yes') == true and nbdkit.parse_bool('off') == false)
            assert(not pcall(nbdkit.parse_bool, 'perhaps'))
            assert(nbdkit.realpath('/usr/../usr') == '/usr')
            assert(nbdkit.absolute_path('x'):match('^/.*/x$') or nbdkit.absolute_path('x') == '/x')
            assert(nbdkit.read_password('secret') == 'secret')
            assert(nbdkit.stdio_safe() == true)
            assert(not pcall(nbdkit.peer_pid))
            local ok, answer = pcall(nbdkit.parse_probability, 'p', '25%')
            assert(ok and answer == 0.25 or not ok and tostring(answer):match('too old'), answer)
            local ok, answer = pcall(nbdkit.parse_delay, 'd', '250ms')
            assert(ok and answer == 0.25 or not ok and tostring(answer):match('too old'), answer)
        end
        function open(readonly)
            assert(nbdkit.peer_uid() >= 0 and nbdkit.peer_gid() >= 0 and nbdkit.peer_pid() > 0)
            assert(nbdkit.peer_name() == 'unix')
            nbdkit.nanosleep(0.001)
            assert(not pcall(nbdkit.nanosleep, -1))
            return 1
        end
        function close() nbdkit.shutdown() end"
    );
    let path = written(dir.path(), &text);
    for (program, plugin) in servers() {
        let said = run([program, "-v", "-U", "-", &plugin, &path, "--run", "nbdinfo --size \"$uri\""]);
        assert_eq!((said.code, said.stdout.trim()), (0, "65536"), "{}", said.stderr);
        for line in ["debug: hello from the script", "debug: words and 42"] {
            assert!(said.stderr.contains(line), "{line}: {}", said.stderr);
        }
    }
}

/// A script ends the server, or one connection.
#[test]
fn a_script_ends_the_server() {
    lua();
    let dir = temp();
    let text = format!(
        "{MINIMAL}function pwrite(h, b, o) if o == 0 then nbdkit.shutdown() else nbdkit.disconnect(true) end end"
    );
    let mut server = Server::start(["lua", &written(dir.path(), &text)]);
    let gone = "
try:
    h.pwrite(b'x', 512)
    h.pread(1, 0)
    raise SystemExit('still connected')
except nbd.Error:
    pass";
    nbdsh(&server.uri(), gone);
    nbdsh(&server.uri(), "h.pwrite(b'x', 0)");
    assert_eq!(server.wait(), 0);
}

/// Many connections, queued requests and a model that lets them in: the state is one, and nothing gets lost.
#[test]
fn many_clients_under_every_thread_model() {
    lua();
    let dir = temp();
    for model in ["SERIALIZE_CONNECTIONS", "SERIALIZE_ALL_REQUESTS", "SERIALIZE_REQUESTS", "PARALLEL"] {
        let text = format!(
            "function thread_model() return nbdkit.THREAD_MODEL_{model} end
             function can_multi_conn() return true end
             function can_fua() return true end
             {}",
            fs::read_to_string(script("page.lua")).expect("the script")
        );
        let path = written(dir.path(), &text);
        let dump = run_ok([NBDKIT, "lua", &path, "--dump-plugin"]);
        assert!(dump.contains(&format!("\nthread_model={}\n", model.to_lowercase())), "{dump}");
        let server = Server::start(["lua", &path, "size=4194304"]);
        let image = crate::util::patterned(dir.path(), "image", 4 << 20);
        let copy = dir.path().join("copy");
        run_ok(["nbdcopy", "--requests=16", image.to_str().expect("UTF-8"), &server.uri()]);
        run_ok(["nbdcopy", "--requests=16", &server.uri(), copy.to_str().expect("UTF-8")]);
        assert!(fs::read(&image).expect("read") == fs::read(&copy).expect("read"), "{model}");
    }
}

/// Quick requests run in the connection's own thread. One that turns out slow holds back no reply of those before it,
/// and the end of the server ends it.
#[test]
fn a_slow_request_among_quick_ones() {
    lua();
    let dir = temp();
    let flag = dir.path().join("flag");
    let text = format!(
        "{MINIMAL}
         function pread(h, count, offset)
             if offset == 512 then
                 while not io.open('{}') do nbdkit.nanosleep(0.001) end
             end
             return string.rep('m', count)
         end",
        flag.display()
    );
    let mut server = Server::start(["lua", &written(dir.path(), &text)]);
    let both = format!(
        "
for i in range(200):
    h.pread(512, 1024)
quick, slow = nbd.Buffer(512), nbd.Buffer(512)
first, second = h.aio_pread(quick, 0), h.aio_pread(slow, 512)
while not h.aio_command_completed(first):
    h.poll(-1)
open('{}', 'w').close()
while not h.aio_command_completed(second):
    h.poll(-1)
for i in range(200):
    h.pread(512, 1024)
",
        flag.display()
    );
    nbdsh(&server.uri(), &both);
    fs::remove_file(&flag).expect("the flag");
    // Left alone by its client, in the middle of the slow one.
    nbdsh(&server.uri(), "for i in range(200): h.pread(512, 1024)\nh.aio_pread(nbd.Buffer(512), 512)");
    assert_eq!(server.terminate(), 0);
}

/// A client that goes away in the middle, again and again, leaves nothing behind in the state.
#[test]
fn handles_are_collected() {
    lua();
    let dir = temp();
    let text = format!(
        "{MINIMAL}
         local alive = 0
         function open()
             alive = alive + 1
             return setmetatable({{}}, {{ __gc = function() alive = alive - 1 end }})
         end
         function get_size() collectgarbage() return alive * 512 end"
    );
    let server = Server::start(["lua", &written(dir.path(), &text)]);
    for _ in 0..20 {
        nbdsh(&server.uri(), "h.pread(512, 0)");
    }
    // The one before may still be closing.
    let size: u64 = run_ok(["nbdinfo", "--size", &server.uri()]).trim().parse().expect("a number");
    assert!(size <= 2 * 512, "{size}");
}

/// The page's example is a RAM disk.
#[test]
fn the_example_of_the_page() {
    lua();
    let dir = temp();
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("man/nbdkit-lua-plugin.3.scd");
    let page = fs::read_to_string(page).expect("the page");
    let example = page.split("```").find(|text| text.contains("function pwrite")).expect("the example");
    let path = written(dir.path(), example);
    let python = "
h.pwrite(b'x' * 8192, 4096)
assert h.pread(16384, 0) == bytes(4096) + b'x' * 8192 + bytes(4096)
h.trim(4096, 4096)
seen = []
h.block_status(65536, 0, lambda context, at, entries, error: seen.extend(entries))
assert seen == [8192, 3, 4096, 0, 65536 - 12288, 3], seen
h.pwrite(b'y' * 4096, 65536)
h.zero(4096, 65536)
assert h.pread(4096, 65536) == bytes(4096)";
    serve(NBDKIT, &["lua", &path, "size=1M"], python);
    let words = ["--filter=blocksize", "lua", &path, "size=1M", "minblock=4096"];
    let mut mount = Mount::start(words);
    sh(&format!("mkfs.ext2 -q {0}; e2fsck -fn {0}", mount.file().display()));
    assert_eq!(mount.unmount(), 0);
}

/// The plugin is installed where both programs find it by its name.
#[test]
fn it_is_installed() {
    let dir = temp();
    let built: PathBuf = bridge("nbdkit-lua-plugin");
    let prefix = dir.path().join("usr");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    sh(&format!(
        "NBDKIT_BINARIES={} {} {}",
        built.parent().expect("a folder").display(),
        root.join("scripts/install").display(),
        prefix.display()
    ));
    let installed = prefix.join("lib/nbdkit/plugins/nbdkit-lua-plugin.so");
    let dump = run_ok([prefix.join("bin/nbdkit").to_str().expect("UTF-8"), "lua", "--dump-plugin"]);
    assert!(dump.contains(&format!("path={}\n", installed.display())), "{dump}");
}

/// A script that never comes back has its client and the interpreter, and the server ends all the same.
#[test]
fn a_callback_without_end_does_not_keep_the_server() {
    let dir = temp();
    let script = written(
        dir.path(),
        "function open() return 1 end function get_size() return 1 << 20 end
         function cleanup() print('cleaned up') end
         function pread(h, count, offset)
           io.stderr:write('for ever\\n')
           while true do end
         end",
    );
    let mut server = Server::start([lua(), script]);
    let mut raw = crate::util::raw::Raw::transmission(&server);
    raw.request(0, 0, 0, 512);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !server.stderr().contains("for ever") {
        assert!(std::time::Instant::now() < deadline, "it was not called: {}", server.stderr());
        std::thread::yield_now();
    }
    assert_eq!(server.terminate(), 0);
    assert!(server.stderr().contains("lua: the layers did not clean up in 20 s"), "{}", server.stderr());
}
