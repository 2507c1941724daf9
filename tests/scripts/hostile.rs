//! Scripts that hang, that do not stop talking, and that look round in what they were given.

use std::fs;

use super::{captive, nbdsh, script};
use crate::util::{Mount, Server, nbdsh as shell, run, temp};

/// A script that sleeps when it is asked for the first byte, and tells who it is.
fn sleeper(pids: &std::path::Path) -> [String; 4] {
    let pids = pids.display();
    [
        "get_size=echo 1M".into(),
        format!(
            "pread=[ $4 -ge 4096 ] || {{ sleep 1000 & echo $$ $! >{pids}.new; mv {pids}.new {pids}; wait; }}; head -c $3 /dev/zero"
        ),
        "pwrite=cat >/dev/null".into(),
        "extents=exit 1".into(),
    ]
}

/// Python that waits for the sleeper to sleep.
fn asleep(pids: &std::path::Path) -> String {
    format!("import os\nwhile not os.path.exists(\"{}\"): h.poll(10)\n", pids.display())
}

/// Checks that processes have ended.
#[track_caller]
fn have_ended(pids: &std::path::Path) {
    for pid in fs::read_to_string(pids).expect("process IDs").split_whitespace() {
        let words =
            ["bash", "-c", "while [ -e /proc/$0 ] && ! grep -q 'State:.Z' /proc/$0/status; do :; done", pid];
        assert_eq!(run(["timeout", "20"].iter().chain(&words)).code, 0, "process {pid} lives on");
    }
}

#[test]
fn a_server_ends_though_a_script_hangs() {
    let dir = temp();
    let (pids, last) = (dir.path().join("pids"), dir.path().join("last"));
    let ends = [("close", "close"), ("unload", "unload $tmpdir")];
    let ends = ends.map(|(method, text)| format!("{method}=echo {text} >>{}", last.display()));
    let mut server = Server::start(["eval".to_owned()].into_iter().chain(sleeper(&pids)).chain(ends));
    let pid = server.pid();
    let script = format!(
        "c = h.aio_pread(nbd.Buffer(512), 0)\n{}os.kill({pid}, 15)\ntry:\n\
         \x20while not h.aio_command_completed(c): h.poll(-1)\nexcept nbd.Error as e: print(e.errno)",
        asleep(&pids)
    );
    assert_eq!(shell(&server.uri(), &script), "ESHUTDOWN\n");
    assert_eq!(server.wait(), 0);
    have_ended(&pids);
    let last = fs::read_to_string(last).expect("the last words");
    let directory = last.strip_prefix("close\nunload ").expect("both").trim();
    assert!(!fs::exists(directory).expect("look"), "{directory} is left");
}

#[test]
fn a_script_whose_client_is_gone_does_not_block_the_others() {
    let dir = temp();
    let pids = dir.path().join("pids");
    let server = Server::start(["eval".to_owned()].into_iter().chain(sleeper(&pids)));
    shell(&server.uri(), &format!("h.aio_pread(nbd.Buffer(512), 0)\n{}os._exit(0)", asleep(&pids)));
    shell(&server.uri(), "assert h.pread(512, 4096) == bytes(512)");
    have_ended(&pids);
}

#[test]
fn scripts_of_the_end_have_a_limit() {
    let words = ["eval", "get_size=echo 1M", "unload=sleep 1000", "cleanup=sleep 1001"];
    let run = captive(words, "nbdinfo --size \"$uri\"");
    assert!(run.stderr.contains("unload script did not end in time"), "{}", run.stderr);
    assert!(run.stderr.contains("cleanup script did not end in time"), "{}", run.stderr);
    assert_eq!(run.ok(), "1048576\n");
}

#[test]
fn one_that_does_not_stop_talking_is_stopped() {
    let errors = nbdsh("try: h.pread(512, 0)\nexcept nbd.Error as e: print(e.errno)");
    for pread in ["cat /dev/zero; sleep 1000", "cat /dev/zero >&2 & sleep 0.1; kill $!; exit 1"] {
        let run = captive(["eval", "get_size=echo 1M", &format!("pread={pread}")], &errors);
        assert_eq!(run.ok(), "EIO\n", "{pread}");
    }
    let run = captive(["eval", "get_size=cat /dev/zero"], "nbdinfo \"$uri\" >/dev/null 2>&1 || echo failed");
    assert!(run.stderr.contains("get_size script printed more than"), "{}", run.stderr);
    assert_eq!(run.ok(), "failed\n");
    // What nobody asked for is not kept either.
    let words = ["eval", "get_size=echo 1M", "pwrite=head -c 10000000 /dev/zero; cat >/dev/null"];
    captive(words, &nbdsh("h.pwrite(b\"x\" * 1000000, 0)")).ok();
}

#[test]
fn nothing_of_the_servers_is_open_in_a_script() {
    let dir = temp();
    let list = dir.path().join("list");
    let pread = format!("pread=ls -l /proc/self/fd >{}; head -c $3 /dev/zero", list.display());
    let server = Server::start(["eval", "get_size=echo 1M", &pread]);
    shell(&server.uri(), "import nbd as n\no = n.NBD()\no.connect_uri(h.get_uri())\nh.pread(4, 0)");
    let list = fs::read_to_string(list).expect("a list");
    assert!(list.contains(" 0 -> /dev/null"), "{list}");
    assert!(!list.contains("socket:") && !list.contains("anon_inode:"), "{list}");
}

#[test]
fn no_process_is_left_behind() {
    let mut server = Server::start([
        "eval",
        "get_size=echo 1M",
        "pread=head -c $3 /dev/zero",
        "thread_model=echo parallel",
    ]);
    let many =
        "for i in range(64): h.aio_pread(nbd.Buffer(512), i * 512)\nwhile h.aio_in_flight() > 0: h.poll(-1)";
    shell(&server.uri(), many);
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", server.pid())).expect("a list");
    assert_eq!(children, "");
    let zombies = run(["ps", "-o", "stat=", "--ppid", &server.pid().to_string()]).stdout;
    assert_eq!(zombies, "");
    assert_eq!(server.terminate(), 0);
}

#[test]
fn exit_codes_end_connections_and_the_server() {
    let words = |code: u32| {
        ["eval".to_owned(), "get_size=echo 1M".into(), format!("pread=head -c $3 /dev/zero; exit {code}")]
    };
    for (code, heard) in [(4, "done"), (5, "ESHUTDOWN")] {
        let mut server = Server::start(words(code));
        let script = "try:\n\x20h.pread(4, 0)\n\x20print(\"done\")\nexcept nbd.Error as e: print(e.errno)";
        assert_eq!(shell(&server.uri(), script).trim(), heard, "{code}");
        assert_eq!(server.wait(), 0);
    }
    for (code, heard) in [(6, "gone"), (7, "done"), (8, "ESHUTDOWN")] {
        let server = Server::start(words(code));
        let script = "try:\n\x20h.pread(4, 0)\n\x20print(\"done\")\n\
            except nbd.Error as e: print(e.errno if not h.aio_is_dead() and e.errno else \"gone\")\n\
            try:\n\x20h.pread(4, 0)\n\x20print(\"again\")\nexcept nbd.Error as e: print(\"over\")";
        let out = shell(&server.uri(), script);
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines[1..], ["over"], "{code}: {out}");
        assert!(lines[0] == heard || code == 6, "{code}: {out}");
        assert_eq!(run(["nbdinfo", "--size", &server.uri()]).ok(), "1048576\n", "others are served");
    }
}

#[test]
fn a_mount_ends_though_a_script_hangs() {
    let dir = temp();
    let pids = dir.path().join("pids");
    let mut mount = Mount::start(["eval".to_owned()].into_iter().chain(sleeper(&pids)));
    let reader = std::process::Command::new("dd")
        .args([format!("if={}", mount.file().display()), "of=/dev/null".into(), "count=1".into()])
        .stderr(std::process::Stdio::null())
        .spawn();
    let mut reader = reader.expect("run dd");
    let wait = format!("while ! [ -e {} ]; do :; done", pids.display());
    assert_eq!(run(["timeout", "30", "bash", "-c", &wait]).code, 0);
    mount.signal(rustix::process::Signal::TERM);
    assert!(!reader.wait().expect("wait").success(), "the read failed");
    have_ended(&pids);
}

#[test]
fn a_script_that_names_the_server_does_not_run_it_for_ever() {
    let dir = temp();
    let text = "#!/usr/sbin/nbdkit sh\ncase $1 in get_size) echo 3M ;; *) exit 2 ;; esac\n";
    let path = script(dir.path(), "nbdkit-three-plugin", text);
    let path = path.to_str().expect("UTF-8");
    for words in [&["sh", path][..], &[path]] {
        assert_eq!(captive(words, "nbdinfo --size \"$uri\"").ok(), "3145728\n", "{words:?}");
    }
    let plugins = format!("NBDKIT_PLUGINDIR={}", dir.path().display());
    let words =
        ["env", &plugins, crate::util::NBDKIT, "-U", "-", "three", "--run", "nbdinfo --size \"$uri\""];
    assert_eq!(run(words).ok(), "3145728\n");
}
