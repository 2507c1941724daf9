//! Options of the command line, and what they do to a server.

use std::os::unix::fs::PermissionsExt;

use crate::util::{self, NBDKIT, Server, nbdsh, temp};

/// Runs nbdkit with these words, separated by blanks, which it must refuse.
#[track_caller]
fn refused(words: &str) -> String {
    util::run([NBDKIT].into_iter().chain(words.split_whitespace())).refused()
}

#[test]
fn options_that_exclude_each_other() {
    for pair in
        ["-p 1 -U x", "-p 1 -s", "-U x -s", "-s --run true", "-s --dump-plugin", "--vsock -U x", "--vsock -s"]
    {
        let line = refused(&format!("{pair} memory 1M"));
        assert!(line.contains("cannot be used together"), "{pair}: {line}");
    }
}

#[test]
fn several_listeners() {
    let dir = temp();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let script = "for uri in $(cat uris); do eval nbdinfo --size $uri; done; echo \"$uri|$unixsocket|$port\"";
    let out = util::sh(&format!(
        "cd {} && {NBDKIT} -U {} -U {} -i 127.0.0.1 -i ::1 -p 0 --print-uri memory 1M --run '{script}' > out; cat out",
        dir.path().display(),
        a.display(),
        b.display(),
    ));
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.len(), 7, "{out}");
    assert!(lines[0].contains(a.to_str().expect("UTF-8")) && lines[1].contains(b.to_str().expect("UTF-8")));
    assert!(lines[2].starts_with("nbd://127.0.0.1:") && lines[3].starts_with("nbd://[::1]:"), "{out}");
    let (uri, socket, port) = {
        let mut fields = lines[6].split('|');
        let mut next = || fields.next().expect("a field");
        (next(), next(), next())
    };
    assert!(uri.ends_with(socket) && socket == a.to_str().expect("UTF-8"), "{out}");
    assert!(port.parse::<u16>().expect("a port") > 0);
    // Every one of them takes clients.
    let mut server = Server::start(["-U", b.with_extension("2").to_str().expect("UTF-8"), "memory", "1M"]);
    for socket in [server.socket(), &b.with_extension("2")] {
        let uri = format!("nbd+unix://?socket={}", socket.display());
        assert_eq!(util::run_ok(["nbdinfo", "--size", &uri]).trim(), "1048576");
    }
    assert_eq!(server.terminate(), 0);
}

#[test]
fn vsock() {
    let run =
        util::run([NBDKIT, "--vsock", "-p", "10810", "-e", "x", "memory", "1M", "--run", "echo $uri $port"]);
    match run.code {
        0 => assert_eq!(run.stdout, "nbd+vsock://1:10810/x 10810\n"),
        // The kernel may lack it.
        _ => assert!(run.refused().contains("AF_VSOCK")),
    }
}

#[test]
fn clients_wait_when_there_are_enough() {
    let server = Server::start(["--max-connections=2", "memory", "1M"]);
    let script = "
import threading
others = [nbd.NBD() for _ in range(3)]
for other in others[:1]: other.connect_uri(uri)
done = []
waits = [threading.Thread(target=lambda o=o: (o.connect_uri(uri), done.append(o), o.shutdown())) for o in others[1:]]
for wait in waits: wait.start()
h.pwrite(b'x', 0)
assert others[0].pread(1, 0) == b'x'
assert done == [], 'one too many'
h.shutdown()
for wait in waits: wait.join()
assert len(done) == 2";
    nbdsh(&server.uri(), &format!("uri = '{}'{script}", server.uri()));
    assert!(refused("--max-connections=0 memory 1M").contains("at least 1"));
}

#[test]
fn privileges_are_dropped() {
    if !rustix::process::geteuid().is_root() {
        assert_eq!(util::run([NBDKIT, "-u", "0", "memory", "1M", "--run", "true"]).code, 1);
        return;
    }
    // Who is served is served by the new user.
    let script = "nbdinfo --size $uri && grep -E '^(Uid|Gid|Groups):' /proc/$PPID/status";
    for (user, group) in [("nobody", "nogroup"), ("65534", "65534")] {
        let out = util::run_ok([NBDKIT, "-u", user, "-g", group, "memory", "1M", "--run", script]);
        let words = out.split_whitespace().collect::<Vec<_>>().join(" ");
        let four = "65534 65534 65534 65534";
        assert_eq!(words, format!("1048576 Uid: {four} Gid: {four} Groups: 65534"));
    }
    // Without a group they are the user's, not root's.
    for (user, groups) in [("nobody", "65534"), ("54321", "65534")] {
        let script = "nbdinfo --size $uri && grep -E '^(Gid|Groups):' /proc/$PPID/status";
        let out = util::run_ok([NBDKIT, "-u", user, "memory", "1M", "--run", script]);
        let words = out.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(words, format!("1048576 Gid: 65534 65534 65534 65534 Groups: {groups}"));
    }
    // The command is the caller's, and the private socket goes all the same, from a directory like /tmp.
    let dir = temp();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o1777)).expect("chmod");
    let out = util::run_ok([
        "env",
        &format!("TMPDIR={}", dir.path().display()),
        NBDKIT,
        "-u",
        "nobody",
        "memory",
        "1M",
        "--run",
        "id -u; echo $unixsocket; nbdinfo --size $uri",
    ]);
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!((lines[0], lines[2]), ("0", "1048576"));
    assert_eq!(std::path::Path::new(lines[1]).parent(), Some(dir.path()));
    assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 0);
}

#[test]
fn users_that_do_not_exist() {
    assert!(
        refused("-u no-such-user memory 1M")
            .contains("-u option: no-such-user is not a valid user name or uid")
    );
    assert!(
        refused("-g no-such-group memory 1M").contains("-g option: no-such-group is not a valid group name")
    );
}

#[test]
fn a_label_needs_selinux() {
    if !std::path::Path::new("/sys/fs/selinux/enforce").exists() {
        assert!(refused("--selinux-label=a:b:c:s0 -U - memory 1M").contains("is SELinux enabled?"));
    }
}

/// Runs `words` with sockets handed over as systemd does, and connects once.
fn activated(count: usize, words: &str) -> String {
    let dir = temp();
    let listen: String = (0..count).map(|i| format!("-l {}/{i} ", dir.path().display())).collect();
    util::sh(&format!(
        "cd {dir}; systemd-socket-activate {listen} {NBDKIT} -P {dir}/pid {words} 2> err & activator=$!
        trap 'kill $activator' EXIT
        until test -S {last}; do :; done
        for ((i = 0; i < {count}; i++)); do nbdinfo --size nbd+unix://?socket=$PWD/$i; done
        test $(cat pid) = $activator; tr '\\0' '\\n' < /proc/$activator/environ | grep -c ^LISTEN_ || true
        ls -l /proc/$activator/fd/3 | grep -c socket; grep flags /proc/$activator/fdinfo/3",
        dir = dir.path().display(),
        last = count - 1,
    ))
}

#[test]
fn socket_activation() {
    for count in [1, 3, 16] {
        let out = activated(count, "memory 1M");
        let sizes = out.lines().filter(|line| *line == "1048576").count();
        assert_eq!(sizes, count, "{out}");
        // O_CLOEXEC
        let flags = out.lines().last().and_then(|l| l.split_whitespace().last()).expect("flags");
        assert_ne!(u32::from_str_radix(flags, 8).expect("octal") & 0o2_000_000, 0, "{out}");
    }
}

#[test]
fn socket_activation_that_makes_no_sense() {
    let run = |pid: &str, count: &str, words: &str| {
        let script = format!("export LISTEN_PID={pid} LISTEN_FDS={count}; exec {NBDKIT} {words} 3</dev/null");
        util::run(["bash", "-c", &script])
    };
    assert!(run("$$", "17", "null").refused().contains("LISTEN_FDS=17"));
    assert!(run("$$", "0", "null").refused().contains("LISTEN_FDS=0"));
    assert!(run("$$", "x", "null").refused().contains("LISTEN_FDS=x"));
    assert!(run("$$", "1", "null").refused().contains("file descriptor 3 is not a listening socket"));
    assert!(run("$$", "2", "null").refused().contains("file descriptor 3 is not a listening socket"));
    // That of another process is none of ours, and is left alone.
    assert_eq!(run("1", "1", "null --run 'echo $LISTEN_PID'").ok(), "1\n");
    for option in ["-i ::1", "-p 1", "--run true", "-s", "-U x", "--vsock"] {
        let script = "
import os, socket, sys
s = socket.socket(socket.AF_UNIX); s.bind('\\0nbdkit-test-%d' % os.getpid()); s.listen()
os.dup2(s.fileno(), 3); os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')
os.execv(sys.argv[1], sys.argv[1:])";
        let words =
            ["/usr/bin/python3", "-c", script, NBDKIT].into_iter().chain(option.split(' ')).chain(["null"]);
        let line = util::run(words).refused();
        assert!(line.contains("socket activation") && line.contains("cannot be used together"), "{line}");
    }
}

#[test]
fn readiness_is_told() {
    let dir = temp();
    let script = "
import os, socket, subprocess, sys
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.bind(sys.argv[3])
address = sys.argv[3].replace('\\0', '@')
r, w = os.pipe()
server = subprocess.Popen([sys.argv[1], '-f', '-U', sys.argv[2], '--ready-fd', str(w), 'memory', '1M'],
                          pass_fds=[w], env=dict(os.environ, NOTIFY_SOCKET=address))
os.close(w)
print(os.read(r, 100), os.read(r, 100), manager.recv(100), os.path.exists(sys.argv[2]))
server.terminate()
server.wait()";
    for (n, manager) in
        [dir.path().join("m").display().to_string(), "abstract".into()].into_iter().enumerate()
    {
        let manager = if n == 0 { format!("'{manager}'") } else { format!("'\\0{}'", dir.path().display()) };
        let script = script.replace("sys.argv[3]", &manager);
        let socket = dir.path().join(format!("s{n}"));
        let out = util::run_ok(["/usr/bin/python3", "-c", &script, NBDKIT, socket.to_str().expect("UTF-8")]);
        assert_eq!(out.trim(), "b'READY=1\\n' b'' b'READY=1\\n' True");
    }
    assert!(refused("--ready-fd=77 memory 1M").contains("not open"));
    let line = util::run([
        "bash",
        "-c",
        &format!("LISTEN_PID=$$ LISTEN_FDS=1 exec {NBDKIT} --ready-fd=3 null 3</dev/null"),
    ]);
    assert!(line.refused().contains("socket activation"));
    assert!(refused("--ready-fd=1 memory 1M").contains("above 2"));
}

#[test]
fn the_parents_end_is_noticed_without_privileges_too() {
    if util::is_left_out("root") {
        return;
    }
    let dir = temp();
    let path = dir.path().display();
    let out = util::sh(&format!(
        "chmod 777 {path}
        {NBDKIT} --exit-with-parent -u nobody -U {path}/s -P {path}/pid memory 1M & until test -s {path}/pid; do :; done
        cat {path}/pid"
    ));
    util::sh(&format!("tail --pid={} -f /dev/null", out.trim()));
}

#[test]
fn memory_is_locked_for_swapping() {
    let script = "nbdinfo --size \"$uri\" && grep VmLck /proc/$PPID/status";
    let locked = |words: &[&str]| {
        let run = util::run([NBDKIT].iter().chain(words).copied().chain(["memory", "1M", "--run", script]));
        let kilobytes = run.stdout.split_whitespace().nth(2).and_then(|n| n.parse::<u64>().ok());
        (run.code, kilobytes.unwrap_or(0), run.stderr)
    };
    assert_eq!(locked(&[]).1, 0);
    let (code, kilobytes, stderr) = locked(&["--swap"]);
    match code {
        0 => assert!(kilobytes > 1024, "{kilobytes} kB"),
        _ => assert!(stderr.contains("--swap: cannot lock memory"), "{stderr}"),
    }
}

#[test]
fn idle_tcp_clients_are_probed() {
    // The timer of the server's end of the connection, once its replies are acknowledged: 02 is keepalive's.
    let script = "nbdsh -u \"$uri\" -c '
h.pread(1, 0)
port = \"%04X\" % int(__import__(\"os\").environ[\"PORT\"])
timers = [\"01\"]
while not timers or \"01\" in timers:
    lines = [l.split() for l in open(\"/proc/net/tcp\")]
    timers = [l[5][:2] for l in lines if l[1].endswith(\":\" + port) and l[3] == \"01\"]
print(sorted(set(timers)))'";
    for (option, timer) in [("--keepalive", "02"), ("-4", "00")] {
        let script = format!("export PORT=$port; {script}");
        let out =
            util::run_ok([NBDKIT, option, "-i", "127.0.0.1", "-p", "0", "memory", "1M", "--run", &script]);
        assert_eq!(out.trim(), format!("['{timer}']"));
    }
}

#[test]
fn a_pidfile_is_overwritten_and_readable() {
    use std::os::unix::fs::PermissionsExt;
    let dir = temp();
    let file = dir.path().join("pid");
    std::fs::write(&file, "a longer text of somebody else\n".repeat(10)).expect("write");
    let words = ["-P", file.to_str().expect("UTF-8"), "memory", "1M", "--run", "echo $PPID"];
    let pid = util::run_ok([NBDKIT].into_iter().chain(words));
    assert_eq!(std::fs::read_to_string(&file).expect("the pidfile stays"), pid);
    assert_eq!(std::fs::metadata(&file).expect("the pidfile").permissions().mode() & 0o777, 0o644);
}
