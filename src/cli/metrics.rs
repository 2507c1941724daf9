//! `--metrics`: what the chain has counted, for Prometheus and for `--stats`.
//!
//! An HTTP server that knows two paths and answers one question at a time: `/metrics` in the text format of Prometheus,
//! `/stats` for the viewer. Whoever connects has five seconds and a few kilobytes, so a slow or hostile client costs the
//! scraper a moment and the chain nothing. The format is lines of text over counters that the core has anyway; a metrics
//! library would count all of it a second time.

use std::{
    ffi::OsStr,
    fmt::Write as _,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};
use nbdkit_core::{
    Chain, params,
    stats::{ERRNOS, OPS, Totals},
};

use crate::version;

/// How long one question may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// The longest question that is read, in bytes.
const MAX_QUESTION: usize = 8 << 10;
/// The longest answer that a viewer reads.
const MAX_ANSWER: u64 = 16 << 20;
/// The upper bounds of the histograms, in nanoseconds as powers of two: about a microsecond to 17 seconds.
const BOUNDS: std::ops::RangeInclusive<u32> = 10..=34;

/// What answers `/stats`.
type Document = fn(&Chain) -> Option<String>;

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A place where metrics are served. Dropping it removes its socket.
#[derive(Debug)]
pub struct Endpoint {
    listener: Option<Listener>,
    socket: Option<PathBuf>,
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if let Some(socket) = &self.socket {
            let _ = std::fs::remove_file(socket);
        }
    }
}

/// An address as it was given: a path, or `[HOST]:PORT` or `PORT` with this machine's own address as the default.
enum Address<'a> {
    Path(&'a Path),
    Host(String),
}

impl<'a> Address<'a> {
    fn new(word: &'a OsStr) -> Result<Self> {
        if word.as_encoded_bytes().contains(&b'/') {
            return Ok(Address::Path(Path::new(word)));
        }
        let text = params::text(word)?;
        let is_port = |text: &str| text.parse::<u16>().is_ok();
        match text.rsplit_once(':') {
            None if is_port(text) => Ok(Address::Host(format!("127.0.0.1:{text}"))),
            Some(("", port)) if is_port(port) => Ok(Address::Host(format!("127.0.0.1:{port}"))),
            Some((_, port)) if is_port(port) => Ok(Address::Host(text.to_owned())),
            _ => bail!(
                "'{text}' is neither HOST:PORT, PORT nor the path of a socket (./NAME for one in this directory)"
            ),
        }
    }
}

impl Endpoint {
    /// Listens at an address: `[HOST]:PORT`, `PORT`, or a path with a slash in it, where a Unix socket is made.
    ///
    /// # Errors
    /// For another word, and an address where nobody can listen.
    pub fn bind(word: &OsStr) -> Result<Self> {
        let refused = || format!("--metrics={}: cannot listen there", word.display());
        Ok(match Address::new(word).context("--metrics")? {
            Address::Path(path) => {
                let listener = UnixListener::bind(path).with_context(refused)?;
                let socket = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
                Endpoint { listener: Some(Listener::Unix(listener)), socket: Some(socket) }
            }
            Address::Host(host) => {
                let listener = TcpListener::bind(&host).with_context(refused)?;
                log::debug!("metrics are served at {:?}", listener.local_addr());
                Endpoint { listener: Some(Listener::Tcp(listener)), socket: None }
            }
        })
    }

    /// Answers questions on a thread from now on, for as long as the process runs.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn serve(&mut self, chain: Arc<Chain>, document: Document) -> Result<()> {
        let Some(listener) = self.listener.take() else { return Ok(()) };
        // Not to keep its layers from being unloaded at the end.
        let chain = Arc::downgrade(&chain);
        let serve = move || {
            loop {
                let answer = |stream: &mut dyn Stream| match chain.upgrade() {
                    Some(chain) => answer(stream, &chain, document),
                    None => Ok(()),
                };
                // One that is gone already is not worth a word.
                let _ = match &listener {
                    Listener::Tcp(listener) => listener
                        .accept()
                        .and_then(|(stream, _)| limited_tcp(stream))
                        .and_then(|mut s| answer(&mut s)),
                    Listener::Unix(listener) => listener
                        .accept()
                        .and_then(|(stream, _)| limited_unix(stream))
                        .and_then(|mut s| answer(&mut s)),
                };
            }
        };
        std::thread::Builder::new().name("metrics".into()).spawn(serve).context("cannot start a thread")?;
        Ok(())
    }
}

/// A connection of either kind.
trait Stream: Read + Write {}
impl<S: Read + Write> Stream for S {}

fn limited_tcp(stream: TcpStream) -> std::io::Result<TcpStream> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn limited_unix(stream: UnixStream) -> std::io::Result<UnixStream> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Reads a question and answers it.
fn answer(stream: &mut dyn Stream, chain: &Chain, document: Document) -> std::io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut question = Vec::new();
    let mut buffer = [0; 1024];
    while !question.windows(4).any(|end| end == b"\r\n\r\n") {
        let count = stream.read(&mut buffer)?;
        question.extend_from_slice(&buffer[..count]);
        if count == 0 || question.len() > MAX_QUESTION || Instant::now() > deadline {
            return Ok(());
        }
    }
    let line = String::from_utf8_lossy(&question);
    let mut words = line.split_ascii_whitespace();
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (status, kind, body) = match (method, path.split('?').next().unwrap_or_default()) {
        ("GET" | "HEAD", "/metrics") => ("200 OK", "text/plain; version=0.0.4; charset=utf-8", text(chain)),
        ("GET" | "HEAD", "/stats") => ("200 OK", "application/json", document(chain).unwrap_or_default()),
        ("GET" | "HEAD", _) => ("404 Not Found", "text/plain", "there are /metrics and /stats\n".into()),
        _ => ("405 Method Not Allowed", "text/plain", "GET is all there is\n".into()),
    };
    let length = body.len();
    let body = if method == "HEAD" { "" } else { &body };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    stream.write_all((head + body).as_bytes())
}

/// Asks the endpoint of a running server for what `/stats` has.
///
/// # Errors
/// If nobody answers there.
pub fn fetch(word: &OsStr) -> Result<Vec<u8>> {
    let refused = || format!("cannot ask {}: is a server with --metrics={0} running?", word.display());
    match Address::new(word)? {
        Address::Path(path) => {
            let stream = UnixStream::connect(path).with_context(refused)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            ask(stream)
        }
        Address::Host(host) => {
            let stream = TcpStream::connect(&host).with_context(refused)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            ask(stream)
        }
    }
}

fn ask(mut stream: impl Read + Write) -> Result<Vec<u8>> {
    stream.write_all(b"GET /stats HTTP/1.1\r\nHost: nbdkit\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
    let at = answer.windows(4).position(|end| end == b"\r\n\r\n").context("the answer is no HTTP")?;
    if !answer.starts_with(b"HTTP/1.1 200 ") {
        bail!("it is no server of this kind");
    }
    Ok(answer.split_off(at + 4))
}

/// All metrics, in the text format of Prometheus.
pub fn text(chain: &Chain) -> String {
    let Some(stats) = chain.stats() else { return String::new() };
    let mut text = String::new();
    let layers: Vec<_> = (0..).map_while(|layer| stats.of_layer(layer)).collect();
    let total = stats.total();

    head(&mut text, "nbdkit_build_info", "gauge", "Version of the server, which is always 1.");
    let _ = writeln!(
        text,
        "nbdkit_build_info{{version=\"{}\",commit=\"{}\",plugin=\"{}\"}} 1",
        version::OWN,
        version::COMMIT,
        escaped(chain.plugin_name())
    );
    let start = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().saturating_sub(stats.age());
    head(&mut text, "nbdkit_start_time_seconds", "gauge", "When the server was started, as Unix time.");
    let _ = writeln!(text, "nbdkit_start_time_seconds {:.3}", start.as_secs_f64());
    let (came, open) = stats.connections();
    head(&mut text, "nbdkit_connections_total", "counter", "Clients that have connected; a mount is one.");
    let _ = writeln!(text, "nbdkit_connections_total {came}");
    head(&mut text, "nbdkit_connections", "gauge", "Clients that are connected.");
    let _ = writeln!(text, "nbdkit_connections {open}");
    head(
        &mut text,
        "nbdkit_cache_hits_total",
        "counter",
        "Reads that needed no wait, since the data were in memory.",
    );
    let _ = writeln!(text, "nbdkit_cache_hits_total {}", total.at_once);
    head(&mut text, "nbdkit_errors_total", "counter", "Requests that failed, by error.");
    for (name, count) in ERRNOS.iter().map(|(name, _)| *name).chain(["other"]).zip(total.errnos) {
        let _ = writeln!(text, "nbdkit_errors_total{{errno=\"{name}\"}} {count}");
    }

    per_operation(&mut text, "nbdkit_requests_total", "Requests of all clients.", &total, |op| op.count);
    per_operation(
        &mut text,
        "nbdkit_request_bytes_total",
        "Bytes of requests that succeeded.",
        &total,
        |op| op.bytes,
    );
    per_operation(&mut text, "nbdkit_request_errors_total", "Requests that failed.", &total, |op| op.errors);
    let what = "How long requests took; of many, one in eight is timed.";
    head(&mut text, "nbdkit_request_duration_seconds", "histogram", what);
    for (kind, op) in OPS.iter().zip(&total.ops) {
        let kind = operation(*kind);
        for power in BOUNDS {
            let bound = Duration::from_nanos(1 << power).as_secs_f64();
            let count = op.latency.at_most(1 << power);
            let labels = format!("operation=\"{kind}\",le=\"{bound}\"");
            let _ = writeln!(text, "nbdkit_request_duration_seconds_bucket{{{labels}}} {count}");
        }
        let (count, sum) = (op.latency.count(), op.latency.sum() / 1e9);
        let name = "nbdkit_request_duration_seconds";
        let _ = writeln!(text, "{name}_bucket{{operation=\"{kind}\",le=\"+Inf\"}} {count}");
        let _ = writeln!(text, "{name}_sum{{operation=\"{kind}\"}} {sum}");
        let _ = writeln!(text, "{name}_count{{operation=\"{kind}\"}} {count}");
    }

    head(
        &mut text,
        "nbdkit_layer_requests_total",
        "counter",
        "Requests that reached a layer; the plugin has the highest position.",
    );
    each_layer(&mut text, "nbdkit_layer_requests_total", &layers, |op| op.count);
    head(&mut text, "nbdkit_layer_errors_total", "counter", "Requests that failed in a layer or below it.");
    each_layer(&mut text, "nbdkit_layer_errors_total", &layers, |op| op.errors);
    text
}

fn head(text: &mut String, name: &str, kind: &str, what: &str) {
    let _ = writeln!(text, "# HELP {name} {what}\n# TYPE {name} {kind}");
}

fn operation(op: nbdkit_core::Op) -> String {
    format!("{op:?}").to_lowercase()
}

fn per_operation(
    text: &mut String,
    name: &str,
    what: &str,
    totals: &Totals,
    count: impl Fn(&nbdkit_core::stats::OpTotals) -> u64,
) {
    head(text, name, "counter", what);
    for (kind, op) in OPS.iter().zip(&totals.ops) {
        let _ = writeln!(text, "{name}{{operation=\"{}\"}} {}", operation(*kind), count(op));
    }
}

fn each_layer(
    text: &mut String,
    name: &str,
    layers: &[(&str, Totals)],
    count: impl Fn(&nbdkit_core::stats::OpTotals) -> u64,
) {
    for (position, (layer, totals)) in layers.iter().enumerate() {
        for (kind, op) in OPS.iter().zip(&totals.ops) {
            let labels = format!(
                "layer=\"{}\",position=\"{position}\",operation=\"{}\"",
                escaped(layer),
                operation(*kind)
            );
            let _ = writeln!(text, "{name}{{{labels}}} {}", count(op));
        }
    }
}

/// A value of a label.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (word, host) in [
            ("9100", "127.0.0.1:9100"),
            (":9100", "127.0.0.1:9100"),
            ("[::]:80", "[::]:80"),
            ("a.b:1", "a.b:1"),
        ] {
            assert!(
                matches!(Address::new(OsStr::new(word)).unwrap(), Address::Host(found) if found == host),
                "{word}"
            );
        }
        assert!(
            matches!(Address::new(OsStr::new("./s")).unwrap(), Address::Path(path) if path == Path::new("./s"))
        );
        for word in ["", "x", "x:", "host:99999", "host"] {
            assert!(Address::new(OsStr::new(word)).is_err(), "{word}");
        }
    }
}
