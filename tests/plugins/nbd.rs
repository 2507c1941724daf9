//! The nbd plugin in front of other servers: what clients see through it is what the server has.

mod hostile;

use std::{os::unix::net::UnixListener, path::Path};

use crate::util::{
    Mount, NBDKIT, NBDKIT_MOUNT, Server, is_left_out, nbdsh, patterned, qemu_io, run, run_ok, sh, temp,
};

/// The distribution's server.
const C_NBDKIT: &str = "/usr/bin/nbdkit";

/// Runs a shell command with `$uri` leading to a proxy for `$unixsocket` of a server.
#[track_caller]
fn behind(server: &[&str], proxy: &str, command: &str) -> String {
    let (program, words) = server.split_first().expect("a server");
    let proxy = format!("exec {NBDKIT} -U - nbd socket=\"$unixsocket\" {proxy} --run '{command}'");
    let words = [*program, "-U", "-"].into_iter().chain(words.iter().copied()).chain(["--run", &proxy]);
    run_ok(words)
}

/// What nbdinfo tells of a disk, but for what names the way to it.
fn told(info: &str) -> Vec<String> {
    let names = ["uri:", "protocol:", "block_size_"];
    let lines = info.lines().map(str::trim).filter(|line| !names.iter().any(|name| line.starts_with(name)));
    lines.map(String::from).collect()
}

#[test]
fn a_disk_is_the_same_through_the_proxy() {
    let dir = temp();
    let image = patterned(dir.path(), "disk", 3 << 20);
    let file = std::fs::File::options().write(true).open(&image).expect("open");
    file.set_len(200 << 20).expect("make it longer");
    let image = image.to_str().expect("UTF-8");
    let copy = dir.path().join("copy");
    for program in [NBDKIT, C_NBDKIT] {
        let server = [program, "file", image];
        let direct =
            run_ok([program, "-U", "-", "file", image, "--run", "nbdinfo \"$uri\"; nbdinfo --map \"$uri\""]);
        let command = "nbdinfo \"$uri\"; nbdinfo --map \"$uri\"";
        assert_eq!(told(&behind(&server, "", command)), told(&direct), "{program}");
        behind(&server, "connections=3", &format!("nbdcopy \"$uri\" {}", copy.display()));
        run_ok(["cmp", image, copy.to_str().expect("UTF-8")]);
    }
}

#[test]
fn writes_arrive_and_are_what_was_written() {
    let dir = temp();
    for program in [NBDKIT, C_NBDKIT] {
        for (proxy, words) in
            [("", "memory 64M"), ("connections=4", "memory 64M"), ("shared=true", "memory 64M")]
        {
            let words: Vec<&str> = std::iter::once(program).chain(words.split(' ')).collect();
            let command = "qemu-io -f raw -c \"write -P 1 0 32M\" -c \"write -z 1M 1M\" -c \"discard 2M 1M\" \
                -c \"write -f -P 2 5000 300\" -c flush -c \"read -P 2 5000 300\" -c \"read -P 0 1M 1M\" \
                -c \"read -P 1 3M 29M\" \"$uri\" && \
                fio --name=x --ioengine=nbd --uri=\"$uri\" --rw=randrw --bsrange=512-128k --iodepth=32 --size=16M \
                --verify=crc32c --verify_fatal=1 --output=/dev/null";
            let out = behind(&words, proxy, command);
            assert!(!out.contains("failed"), "{program} {proxy}: {out}");
        }
    }
    drop(dir);
}

/// A server of an image format, started by the plugin, and what stands above it.
#[test]
fn qemu_nbd_is_run() {
    let dir = temp();
    let image = dir.path().join("disk.qcow2");
    let image = image.to_str().expect("UTF-8");
    run_ok(["qemu-img", "create", "-q", "-f", "qcow2", image, "64M"]);
    let words = ["nbd", "command=qemu-nbd", "arg=-f", "arg=qcow2", "arg=disk.qcow2"];
    let script = "qemu-io -f raw -c 'write -P 5 1M 1M' -c flush \"$uri\" && nbdinfo --map \"$uri\"";
    let words = words.map(String::from).join(" ");
    let map = sh(&format!("cd {} && {NBDKIT} -U - {words} --run \"$0\"", dir.path().display())
        .replace("$0", &script.replace('"', "\\\"").replace('$', "\\$")));
    assert!(map.contains("1048576     1048576    0"), "{map}");
    // It was ended, or the image would be locked.
    run_ok(["qemu-io", "-f", "qcow2", "-c", "read -P 5 1M 1M", image]);
}

/// A mount of an export by its URI and of a server that is run.
#[test]
fn mounts_take_uris_and_servers() {
    if is_left_out("fuse") {
        return;
    }
    let dir = temp();
    let image = patterned(dir.path(), "disk", 1 << 20);
    let server = Server::start(["file".as_ref(), image.as_os_str()]);
    let mut mount = Mount::start([server.uri()]);
    run_ok(["cmp".as_ref(), image.as_os_str(), mount.file().as_os_str()]);
    let ours = std::fs::File::options().write(true).open(mount.file()).expect("open");
    std::os::unix::fs::FileExt::write_all_at(&ours, b"hello", 5000).expect("write");
    ours.sync_all().expect("sync");
    drop(ours);
    assert_eq!(&std::fs::read(&image).expect("read")[5000..5005], b"hello");
    assert_eq!(mount.unmount(), 0);
    let uri = server.uri();
    let out = run_ok(
        [NBDKIT_MOUNT, "--run", "cmp \"$file\" \"$0\"", &uri]
            .map(|word| word.replace("$0", image.to_str().expect("UTF-8"))),
    );
    assert_eq!(out, "");
    // It has the image locked.
    drop(server);
    for words in [
        vec![
            "[".to_owned(),
            "qemu-nbd".into(),
            "-f".into(),
            "raw".into(),
            image.display().to_string(),
            "]".into(),
        ],
        vec![format!("[ qemu-nbd -f raw '{}' ]", image.display())],
    ] {
        let mut mount = Mount::start(&words);
        run_ok(["cmp".as_ref(), image.as_os_str(), mount.file().as_os_str()]);
        assert_eq!(mount.unmount(), 0);
    }
}

/// Exports by name, as the server has them.
#[test]
fn exports_are_chosen_by_the_user_or_the_client() {
    let dir = temp();
    patterned(dir.path(), "one", 4096);
    patterned(dir.path(), "two", 8192);
    let server = Server::start(["file".to_owned(), format!("dir={}", dir.path().display())]);
    let socket = format!("socket={}", server.socket().display());
    let fixed = Server::start(["nbd", &socket, "export=two"]);
    assert_eq!(nbdsh(&fixed.uri_of("anything"), "print(h.get_size())").trim(), "8192");
    let dynamic = Server::start(["nbd", &socket, "dynamic-export=true"]);
    assert_eq!(nbdsh(&dynamic.uri_of("one"), "print(h.get_size())").trim(), "4096");
    let list = run_ok(["nbdinfo", "--list", "--json", &dynamic.uri()]);
    assert!(list.contains("\"one\"") && list.contains("\"two\""), "{list}");
    let missing = run(["nbdinfo", &dynamic.uri_of("three")]);
    assert_ne!(missing.code, 0);
    assert!(dynamic.stderr().contains("no export 'three'"), "{}", dynamic.stderr());
}

/// qemu's dirty bitmaps, by their own context.
#[test]
fn metadata_contexts_pass_through() {
    let dir = temp();
    let image = dir.path().join("disk.qcow2");
    let image = image.to_str().expect("UTF-8");
    sh(&format!(
        "qemu-img create -q -f qcow2 {image} 1M && qemu-img bitmap --add {image} b && \
         qemu-io -f qcow2 -c 'write 0 128k' {image} > /dev/null"
    ));
    let words = ["command=qemu-nbd", "arg=-r", "arg=-f", "arg=qcow2", "arg=-B", "arg=b"];
    let image = format!("arg={image}");
    let server = Server::start(["nbd"].into_iter().chain(words).chain([&*image]));
    let list = run_ok(["nbdinfo", "--map=qemu:dirty-bitmap:b", &server.uri()]);
    let lines: Vec<Vec<&str>> = list.lines().map(|line| line.split_whitespace().take(3).collect()).collect();
    assert_eq!(lines, [["0", "131072", "1"], ["131072", "917504", "0"]], "{list}");
}

/// Old servers.
#[test]
fn oldstyle_servers_are_understood() {
    // The C nbdkit 1.32 refuses to flush when it speaks oldstyle.
    let out = behind(
        &[NBDKIT, "-o", "memory", "1M"],
        "",
        "qemu-io -f raw -c \"write -P 3 4k 4k\" -c \"read -P 3 4k 4k\" -c flush \"$uri\" && nbdinfo --size \"$uri\"",
    );
    assert!(out.ends_with("1048576\n"), "{out}");
    for mask in ["--mask-handshake=0", "--mask-handshake=1", "--no-sr"] {
        let out = behind(
            &[C_NBDKIT, mask, "memory", "1M"],
            "",
            "nbdcopy \"$uri\" null: && nbdinfo --size \"$uri\"",
        );
        assert_eq!(out, "1048576\n", "{mask}");
    }
}

/// What makes no sense is refused at the start, in one line.
#[test]
fn parameters_that_make_no_sense() {
    for (words, why) in [
        ("", "[uri=]URI"),
        ("nbd://h socket=/s", "uri= and socket= cannot be used together"),
        ("nbd://h nbd://i", "uri= was given twice"),
        ("nbd://h export=x", "the URI has the name"),
        ("socket=/s port=1", "port= is for"),
        ("hostname=h port=65536", "65535"),
        ("hostname=h port=nonsense", "service"),
        ("hostname=h arg=x", "arg= is for command="),
        ("socket=/s dynamic-export=true export=x", "cannot be used together"),
        ("socket=/s dynamic-export=true shared=true", "shared=true"),
        ("command=x dynamic-export=true", "command"),
        ("socket=/s tls=maybe", "off, on or require"),
        ("nbds+unix://?socket=/s tls=off", "wants TLS"),
        ("socket=/s tls-psk=/nonexistent", "/nonexistent"),
        ("socket=/s tls-certificates=/nonexistent", "ca-cert.pem"),
        ("socket-fd=77", "not open"),
        ("socket=/s connections=0", "1 to 16"),
        ("socket=/s timeout=x", "delay 'x'"),
        ("socket=/s retry=-1", "out of range"),
        ("socket=/nonexistent shared=true", "no server listens there"),
        ("command=/nonexistent/program", "was not found"),
        ("command=false", "exit code 1"),
        ("hostname=host.invalid shared=true", "host.invalid"),
    ] {
        let words: Vec<&str> = words.split(' ').filter(|word| !word.is_empty()).collect();
        let all =
            [NBDKIT, "-U", "-", "nbd"].into_iter().chain(words.iter().copied()).chain(["--run", "true"]);
        let message = run(all).refused();
        assert!(message.contains(why), "{words:?}: {message}");
    }
}

/// A server on a socket of the test's.
fn server_on(socket: &Path, words: &[&str]) -> Server {
    Server::start(["-U", socket.to_str().expect("UTF-8")].iter().chain(words))
}

/// With `retry`, requests that were under way when the server went are answered by the next one.
#[test]
fn a_lost_connection_is_made_again() {
    let dir = temp();
    let image = patterned(dir.path(), "disk", 1 << 20);
    let image = image.to_str().expect("UTF-8");
    let socket = dir.path().join("sock");
    let slow = server_on(&socket, &["--filter=delay", "file", image, "rdelay=600"]);
    let proxy = Server::start(["nbd", &format!("socket={}", socket.display()), "retry=60"]);
    let client = format!(
        "import os\nb = nbd.Buffer(4096)\nc = h.aio_pread(b, 8192)\nwhile h.aio_in_flight() == 1 and not os.path.exists('{0}'):\n  h.poll(100)\n  open('{1}', 'w')\nwhile not h.aio_command_completed(c):\n  h.poll(-1)\nassert b.to_bytearray() == open('{image}', 'rb').read()[8192:12288]\nh.pwrite(bytearray(b'x' * 512), 512)\nh.flush()\nprint('done')",
        dir.path().join("gone").display(),
        dir.path().join("asked").display()
    );
    let uri = proxy.uri();
    let thread = std::thread::spawn(move || nbdsh(&uri, &client));
    wait_for(&dir.path().join("asked"));
    drop(slow);
    std::fs::write(dir.path().join("gone"), "").expect("write");
    let again = server_on(&socket, &["file", image]);
    assert_eq!(thread.join().expect("the client").trim(), "done");
    assert!(proxy.stderr().contains("connecting again"), "{}", proxy.stderr());
    drop(again);
}

/// Waits for a file, which another thread makes.
fn wait_for(path: &Path) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !path.exists() {
        assert!(std::time::Instant::now() < deadline, "{} does not come", path.display());
        std::thread::yield_now();
    }
}

/// Writes that the server had acknowledged may have gone with it: the flush does not claim otherwise, once.
#[test]
fn a_flush_after_a_loss_is_no_lie() {
    let dir = temp();
    let image = patterned(dir.path(), "disk", 1 << 20);
    let image = image.to_str().expect("UTF-8");
    let socket = dir.path().join("sock");
    for (before, first) in
        [("h.pwrite(bytearray(512), 0)", "EIO"), ("h.pwrite(bytearray(512), 0); h.flush()", "ok")]
    {
        let _ = std::fs::remove_file(dir.path().join("written"));
        let _ = std::fs::remove_file(dir.path().join("gone"));
        let first_server = server_on(&socket, &["file", image]);
        let proxy = Server::start(["nbd", &format!("socket={}", socket.display()), "retry=60"]);
        let client = format!(
            "import os\n{before}\nopen('{}', 'w')\nwhile not os.path.exists('{}'): pass\n\
             def flush():\n  try:\n    h.flush()\n    return 'ok'\n  except nbd.Error as e:\n    return e.errno\nh.pread(512, 0)\nprint(flush(), flush())",
            dir.path().join("written").display(),
            dir.path().join("gone").display()
        );
        let uri = proxy.uri();
        let thread = std::thread::spawn(move || nbdsh(&uri, &client));
        wait_for(&dir.path().join("written"));
        drop(first_server);
        let again = server_on(&socket, &["file", image]);
        std::fs::write(dir.path().join("gone"), "").expect("write");
        assert_eq!(thread.join().expect("the client").trim(), format!("{first} ok"), "{before}");
        drop(again);
    }
}

/// Without `retry` requests fail, and the next client gets a new connection.
#[test]
fn a_lost_connection_is_an_error_without_retry() {
    for shared in ["shared=false", "shared=true"] {
        let dir = temp();
        let image = patterned(dir.path(), "disk", 1 << 20);
        let image = image.to_str().expect("UTF-8");
        let socket = dir.path().join("sock");
        let first = server_on(&socket, &["file", image]);
        let proxy = Server::start(["nbd", &format!("socket={}", socket.display()), shared]);
        let gone = dir.path().join("gone");
        let client = format!(
            "import os\nh.pread(512, 0)\nopen('{}', 'w')\nwhile not os.path.exists('{}'): pass\n\
             try:\n  h.pread(512, 0)\nexcept nbd.Error as e:\n  print(e.errno)",
            dir.path().join("read").display(),
            gone.display()
        );
        let uri = proxy.uri();
        let thread = std::thread::spawn(move || nbdsh(&uri, &client));
        wait_for(&dir.path().join("read"));
        drop(first);
        std::fs::write(&gone, "").expect("write");
        assert_eq!(thread.join().expect("the client").trim(), "EIO");
        let again = server_on(&socket, &["file", image]);
        qemu_io(&proxy.uri(), &["read 0 4k"]);
        drop(again);
    }
}

/// Encrypted to the server, by keys and by certificates.
#[test]
fn connections_are_encrypted() {
    let dir = temp();
    let dir = dir.path().display();
    sh(&format!(
        "cd {dir} && psktool -u alice -p keys.psk > /dev/null 2>&1 && psktool -u bob -p others.psk > /dev/null 2>&1"
    ));
    let tls = |server: &str, proxy: &str| {
        run([
            "bash",
            "-c",
            &format!(
                "cd {dir} && exec {server} -U - --tls=require memory 1M --run \
             'exec {NBDKIT} -U - nbd socket=$unixsocket {proxy} --run \"qemu-io -f raw -c \\\"write -P 9 0 1M\\\" -c \\\"read -P 9 0 1M\\\" \\$uri\"'"
            ),
        ])
    };
    for server in [NBDKIT, C_NBDKIT] {
        let server = format!("{server} --tls-psk=keys.psk");
        let out = tls(&server, "tls=require tls-psk=keys.psk tls-username=alice connections=2").ok();
        assert!(!out.contains("failed"), "{out}");
        for (proxy, why) in [
            ("", "requires TLS"),
            ("tls-psk=keys.psk tls-username=bob", "no key for the user 'bob'"),
            ("tls-psk=others.psk tls-username=bob", "TLS handshake failed"),
        ] {
            let refused = tls(&server, &format!("shared=true {proxy}"));
            assert_ne!(refused.code, 0);
            assert!(refused.stderr.contains(why), "{proxy}: {}", refused.stderr);
        }
    }
}

/// A listening socket of the test's.
fn listener(dir: &Path) -> (UnixListener, String) {
    let path = dir.join("hostile");
    let listener = UnixListener::bind(&path).expect("a socket");
    (listener, format!("socket={}", path.display()))
}
