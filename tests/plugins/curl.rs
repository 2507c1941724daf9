//! The curl plugin in front of a web server that does as its paths say.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use crate::util::{NBDKIT, Server, nbdsh, patterned, run, run_ok, temp};

/// A web server: it prints its port, and for each request a line.
const WEB: &str = r#"
import sys, threading, hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
data = open(sys.argv[1], 'rb').read()
version = [0]
class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass
    def do_HEAD(self): self.answer(False)
    def do_GET(self): self.answer(True)
    def end(self, status, body=b'', **headers):
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD': self.wfile.write(body)
    def answer(self, get):
        path = self.path
        if path == '/count': return self.end(200, str(threading.active_count()).encode())
        if path == '/missing': return self.end(404)
        if path == '/broken': return self.end(503)
        if path == '/nohead' and not get: return self.end(405)
        if path == '/token' and self.headers.get('X-Token') != '0 /token': return self.end(403)
        if path == '/cookie' and self.headers.get('Cookie') != 'a=1; b=2': return self.end(401)
        if path == '/moved': return self.end(302, Location='/disk')
        if path == '/loop': return self.end(302, Location='/loop')
        if path == '/change': version[0] += 1
        if not get:
            self.send_response(200)
            self.send_header('Accept-Ranges', 'none' if path == '/whole' else 'bytes')
            self.send_header('Content-Length', str(len(data)))
            self.send_header('ETag', '"%d"' % version[0])
            return self.end_headers()
        wanted = self.headers.get('Range')
        if path in ('/whole', '/lying') or not wanted: return self.end(200, data)
        start, last = (int(n) for n in wanted[len('bytes='):].split('-'))
        part = data[start:last + 1]
        told = start
        if path == '/other': told, part = 0, data[:len(part)]
        if path == '/longer': part += b'x'
        self.send_response(206)
        self.send_header('Content-Range', 'bytes %d-%d/%d' % (told, told + len(part) - 1, len(data)))
        self.send_header('Content-Length', str(len(part) + (100 if path == '/cut' else 0)))
        self.send_header('ETag', '"%d"' % version[0])
        self.end_headers()
        self.wfile.write(part)
        if path == '/cut': self.close_connection = True
server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
server.daemon_threads = True
print(server.server_port, flush=True)
server.serve_forever()
"#;

struct Web {
    process: Child,
    port: u16,
}

impl Web {
    fn start(file: &Path) -> Self {
        let mut process = Command::new("/usr/bin/python3")
            .args(["-c", WEB])
            .arg(file)
            .stdout(Stdio::piped())
            .spawn()
            .expect("start python3");
        let mut line = String::new();
        let output = process.stdout.take().expect("its output");
        BufReader::new(output).read_line(&mut line).expect("the port");
        Web { process, port: line.trim().parse().expect("a port") }
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}/{path}", self.port)
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_file_of_a_web_server_is_a_disk() {
    let dir = temp();
    let image = patterned(dir.path(), "disk", (5 << 20) + 100);
    let web = Web::start(&image);
    let copy = dir.path().join("copy");
    for (path, more) in [
        ("disk", ""),
        ("nohead", ""),
        ("moved", "connections=1"),
        ("token", "header-script=echo \"X-Token: $iteration /${url##*/}\""),
        ("cookie", "cookie-script=echo a=1; echo b=2"),
        ("cookie", "cookie=a=1; b=2"),
        ("disk", "http-version=1.1"),
    ] {
        let url = web.url(path);
        let copy = copy.to_str().expect("UTF-8");
        let command = format!("nbdcopy --request-size=65536 \"$uri\" {copy} && nbdinfo --can read \"$uri\"");
        let words = [NBDKIT, "-U", "-", "curl", &url, more];
        run_ok(words.into_iter().filter(|word| !word.is_empty()).chain(["--run", &command]));
        run_ok(["cmp", image.to_str().expect("UTF-8"), copy]);
    }
    let url = format!("file://{}", image.display());
    let copy = format!("nbdcopy \"$uri\" - | cmp - {}", image.display());
    run_ok([NBDKIT, "-U", "-", "curl", &url, "--run", &copy]);
}

/// What is wrong is told in one sentence, at the open or with the read.
#[test]
fn servers_that_cannot_or_lie() {
    let dir = temp();
    let image = patterned(dir.path(), "disk", 1 << 20);
    let web = Web::start(&image);
    let script = "try:\n  h.pread(4096, 8192)\n  print('read')\nexcept nbd.Error as e:\n  print(e.errno)";
    for (path, more, opens, why) in [
        ("missing", "change=fail", false, "there is no such file (status 404)"),
        ("broken", "change=fail", false, "status 503"),
        ("token", "change=fail", false, "does not allow it"),
        ("whole", "change=fail", false, "does not send parts"),
        ("loop", "change=fail", false, "redirect"),
        ("moved", "followlocation=false", false, "leads somewhere else"),
        ("disk", "protocols=https", false, "rotocol"),
        ("lying", "change=fail", true, "does not send parts"),
        ("other", "change=fail", true, "begins at 0 instead of 8192"),
        ("longer", "change=fail", true, "more than was asked for"),
        ("cut", "change=fail", true, "curl: pread: "),
    ] {
        let server = Server::start(["curl", &web.url(path), more]);
        if opens {
            assert_eq!(nbdsh(&server.uri(), script).trim(), "EIO", "{path}");
        } else {
            assert_ne!(run(["nbdinfo", &server.uri()]).code, 0, "{path}");
        }
        assert!(server.stderr().contains(why), "{path}: {}", server.stderr());
    }
}

#[test]
fn a_file_that_changes_is_another_disk() {
    let dir = temp();
    let image = patterned(dir.path(), "disk", 1 << 20);
    let web = Web::start(&image);
    for (change, result) in [("fail", "EIO"), ("ignore", "read")] {
        let server = Server::start(["curl", &web.url("change"), &format!("change={change}")]);
        let script = "try:\n  h.pread(4096, 8192)\n  print('read')\nexcept nbd.Error as e:\n  print(e.errno)";
        assert_eq!(nbdsh(&server.uri(), script).trim(), result);
        assert_eq!(server.stderr().contains("has changed"), change == "fail", "{}", server.stderr());
    }
}

#[test]
fn parameters_that_make_no_sense() {
    for (words, why) in [
        (&[][..], "url"),
        (&["http://h", "url=http://i"], "given twice"),
        (&["http://h", "change=maybe"], "fail or ignore"),
        (&["http://h", "connections=0"], "at least one"),
        (&["http://h", "http-version=4"], "unknown http-version=4: use none, 1.0"),
        (&["http://h", "password=+/nonexistent"], "/nonexistent"),
        (&["http://h", "header-script-renew=5"], "header-script"),
        (&["http://h", "timeout=x"], "timeout"),
    ] {
        let words = [NBDKIT, "-U", "-", "curl"].iter().chain(words).chain(&["--run", "true"]);
        let message = run(words).refused();
        assert!(message.contains(why), "{message}");
    }
}
