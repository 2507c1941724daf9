use nbdkit_core::{Caps, Chain, Connection, Plugin, Session};

use super::*;
use crate::testing::{
    Answer, Spec, View, check_model, client, config_error, inline, is_watched, lent, needs_thread,
    read_inline, started,
};

/// A disk whose connections each have a cache of their own: a write is seen by others after a flush here, and their
/// writes are seen here after a flush too. It counts the flushes.
#[derive(Clone)]
struct Cached {
    disk: Arc<Mutex<u8>>,
    flushes: Arc<Mutex<Vec<u64>>>,
    multi_conn: bool,
    flush: bool,
    fail: Arc<AtomicBool>,
    model: ThreadModel,
    /// Flushed when another connection is finalized.
    other: Arc<Mutex<Option<Session>>>,
}

struct Cache {
    of: Cached,
    number: u64,
    /// What this connection believes, and whether it has written it.
    byte: Mutex<(Option<u8>, bool)>,
}

impl Plugin for Cached {
    fn info(&self) -> Info {
        Info::bundled("cached", "", "")
    }

    fn thread_model(&self) -> ThreadModel {
        self.model
    }

    fn open(&self, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Cache { of: self.clone(), number: open.client.number, byte: Mutex::default() }))
    }
}

impl Handle for Cache {
    fn finalize(&self) -> Result<()> {
        let other = self.of.other.lock().take();
        other.map_or(Ok(()), |session| session.flush())
    }

    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(512)
            .with_write(true)
            .with_flush(self.of.flush)
            .with_fua(if self.of.flush { Support::Emulate } else { Support::None })
            .with_multi_conn(self.of.multi_conn))
    }

    fn pread(&self, buf: &mut [u8], _: u64) -> Result<()> {
        let mut cached = self.byte.lock();
        buf.fill(*cached.0.get_or_insert_with(|| *self.of.disk.lock()));
        Ok(())
    }

    fn pwrite(&self, buf: &[u8], _: u64, _: Flags) -> Result<()> {
        *self.byte.lock() = (buf.first().copied(), true);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.of.flushes.lock().push(self.number);
        if self.of.fail.load(Ordering::SeqCst) {
            return Err(Errno::EIO.into());
        }
        if let (Some(byte), true) = std::mem::take(&mut *self.byte.lock()) {
            *self.of.disk.lock() = byte;
        }
        Ok(())
    }
}

struct Server {
    cached: Cached,
    chain: Arc<Chain>,
}

impl Server {
    fn over(cached: Cached, params: &[(&str, &str)]) -> Self {
        let mut chain = Chain::new(Box::new(cached.clone()), vec![new()]);
        for (key, value) in params {
            chain.config(key, OsStr::new(value)).unwrap();
        }
        chain.config_complete().unwrap();
        chain.get_ready().unwrap();
        Server { cached, chain: Arc::new(chain) }
    }

    fn new(params: &[(&str, &str)]) -> Self {
        Self::over(Cached::default(), params)
    }

    fn connect(&self, number: u64, export: &str) -> Result<Session> {
        let client = nbdkit_core::Client::new(number, Default::default(), client().server().clone());
        let connection: Arc<Connection> = Arc::new(self.chain.connect(Arc::new(client), false)?);
        connection.open(OsStr::new(export), false)
    }

    fn pair(&self) -> (Session, Session) {
        (self.connect(1, "a").unwrap(), self.connect(2, "a").unwrap())
    }

    /// The connections that were flushed, in order; then forgotten.
    fn flushed(&self) -> Vec<u64> {
        std::mem::take(&mut self.cached.flushes.lock())
    }
}

impl Default for Cached {
    fn default() -> Self {
        Cached {
            disk: Arc::default(),
            flushes: Arc::default(),
            multi_conn: false,
            flush: true,
            fail: Arc::default(),
            model: ThreadModel::Parallel,
            other: Arc::default(),
        }
    }
}

fn read(session: &Session) -> u8 {
    let mut byte = [0];
    session.pread(&mut byte, 0).unwrap();
    byte[0]
}

fn write(session: &Session, byte: u8, flags: Flags) {
    session.pwrite(&[byte], 0, flags).unwrap();
}

#[test]
fn model() {
    for mode in ["auto", "emulate", "plugin", "disable", "unsafe"] {
        for track in ["connection", "fast", "off"] {
            let params = [("multi-conn-mode", mode), ("multi-conn-track-dirty", track)];
            for spec in [Spec::sized(20_000), Spec::emulated(20_000)] {
                crate::testing::check_model_over(&spec, &["multi-conn"], &params, &View::same(20_000));
            }
        }
    }
    check_model(&["multi-conn"], &[("multi-conn-mode", "plugin")], 20_000, &View::same(20_000));
}

#[test]
fn without_the_filter_the_others_stay_behind() {
    let server = Server::new(&[("multi-conn-mode", "unsafe")]);
    let (first, second) = server.pair();
    assert_eq!(read(&second), 0);
    write(&first, 7, Flags::empty());
    first.flush().unwrap();
    assert_eq!(read(&second), 0, "this test disk is not consistent by itself");
}

#[test]
fn a_flush_on_one_covers_all() {
    for track in ["connection", "fast", "off"] {
        for model in [ThreadModel::Parallel, ThreadModel::SerializeRequests] {
            let server =
                Server::over(Cached { model, ..Cached::default() }, &[("multi-conn-track-dirty", track)]);
            let (first, second) = server.pair();
            assert!(first.caps().multi_conn);
            assert_eq!(read(&second), 0);
            write(&first, 7, Flags::empty());
            first.flush().unwrap();
            assert_eq!(read(&second), 7, "{track}: flushed where it was written");
            write(&first, 8, Flags::empty());
            second.flush().unwrap();
            assert_eq!(read(&second), 8, "{track}: flushed elsewhere");
            write(&first, 9, Flags::FUA);
            assert_eq!(read(&second), 9, "{track}: FUA");
        }
    }
}

#[test]
fn which_flushes_are_left_out() {
    let run = |track| {
        let server = Server::new(&[("multi-conn-mode", "emulate"), ("multi-conn-track-dirty", track)]);
        let (first, second) = server.pair();
        let mut seen = Vec::new();
        first.flush().unwrap();
        seen.push(server.flushed());
        write(&first, 1, Flags::empty());
        first.flush().unwrap();
        seen.push(server.flushed());
        read(&second);
        write(&first, 1, Flags::empty());
        second.flush().unwrap();
        first.flush().unwrap();
        seen.push(server.flushed());
        seen
    };
    assert_eq!(run("connection"), [vec![], vec![1], vec![1, 2]]);
    assert_eq!(run("fast"), [vec![], vec![1, 2], vec![1, 2]]);
    assert_eq!(run("off"), [vec![1, 2], vec![1, 2], vec![1, 2, 1, 2]]);
}

#[test]
fn which_flushes_are_left_out_when_the_plugin_is_consistent() {
    let run = |multi_conn, track| {
        let cached = Cached { multi_conn, ..Cached::default() };
        let params = [("multi-conn-mode", "plugin"), ("multi-conn-track-dirty", track)];
        let server = Server::over(cached, &params);
        let (first, second) = server.pair();
        second.flush().unwrap();
        write(&first, 1, Flags::empty());
        second.flush().unwrap();
        first.flush().unwrap();
        server.flushed()
    };
    assert_eq!(run(true, "connection"), [2], "that flush covers the one that wrote");
    assert_eq!(run(false, "connection"), [2, 1]);
    assert_eq!(run(true, "fast"), [2]);
    assert_eq!(run(false, "fast"), [2]);
    assert_eq!(run(true, "off"), [2, 2, 1]);
}

#[test]
fn what_is_offered() {
    let offered = |mode, multi_conn, model| {
        let cached = Cached { multi_conn, model, ..Cached::default() };
        let server = Server::over(cached, &[("multi-conn-mode", mode)]);
        server.connect(1, "").unwrap().caps().multi_conn
    };
    use ThreadModel::{Parallel, SerializeConnections};
    assert!(offered("auto", false, Parallel) && offered("auto", true, Parallel));
    assert!(offered("emulate", false, Parallel) && offered("unsafe", false, Parallel));
    assert!(!offered("plugin", false, Parallel) && offered("plugin", true, Parallel));
    assert!(!offered("disable", true, Parallel));
    assert!(!offered("auto", true, SerializeConnections));
}

#[test]
fn emulation_needs_flush() {
    for mode in ["auto", "emulate"] {
        let server = Server::over(Cached { flush: false, ..Cached::default() }, &[("multi-conn-mode", mode)]);
        let error = server.connect(1, "").unwrap_err().to_string();
        assert!(error.contains("does not offer flush: use another multi-conn-mode"), "{error}");
    }
    Server::over(Cached { flush: false, ..Cached::default() }, &[("multi-conn-mode", "plugin")])
        .connect(1, "")
        .unwrap();
}

#[test]
fn other_exports_are_left_alone_when_asked() {
    for (by_name, expected) in [("true", vec![1]), ("false", vec![1, 2])] {
        let params = [("multi-conn-exportname", by_name), ("multi-conn-track-dirty", "off")];
        let server = Server::new(&params);
        let (first, _second) = (server.connect(1, "a").unwrap(), server.connect(2, "b").unwrap());
        first.flush().unwrap();
        assert_eq!(server.flushed(), expected, "{by_name}");
    }
}

#[test]
fn a_connection_that_left_is_not_flushed() {
    let server = Server::new(&[("multi-conn-track-dirty", "off")]);
    let (first, second) = server.pair();
    drop(second);
    first.flush().unwrap();
    assert_eq!(server.flushed(), [1]);
}

#[test]
fn a_connection_that_is_about_to_leave_is_not_flushed() {
    let server = Server::new(&[("multi-conn-track-dirty", "off")]);
    let (first, second) = server.pair();
    *server.cached.other.lock() = Some(first);
    drop(second);
    assert_eq!(server.flushed(), [1]);
}

#[test]
fn a_failed_flush_is_made_again() {
    for mode in ["emulate", "plugin"] {
        let server = Server::new(&[("multi-conn-mode", mode)]);
        let (first, _second) = server.pair();
        write(&first, 1, Flags::empty());
        server.cached.fail.store(true, Ordering::SeqCst);
        assert_eq!(first.flush().unwrap_err().errno(), Errno::EIO);
        server.cached.fail.store(false, Ordering::SeqCst);
        first.flush().unwrap();
        assert_eq!(server.flushed(), [1, 1], "{mode}");
    }
}

#[test]
fn what_writes_is_seen_to_write_however_it_ends() {
    let disk = Spec { later: true, ..Spec::default() }.disk();
    let flushes = || disk.take_calls().iter().filter(|call| call.op == Op::Flush).count();
    for mode in ["emulate", "plugin"] {
        let params = [("multi-conn-mode", mode)];
        let session = crate::testing::session(&disk, "multi-conn", &params);
        let write = Call::new(Op::Write, 0, 1);
        let ways: [&dyn Fn(); 3] = [
            &|| assert!(lent(&session, Op::Write, 0, 512).is_some()),
            &|| assert!(matches!(started(&session, write, &[1]), Answer::Started(Ok(_)))),
            &|| assert!(matches!(inline(&session, write, &[1]), Answer::Done(Ok(_)))),
        ];
        for way in ways {
            session.flush().unwrap();
            flushes();
            session.flush().unwrap();
            assert_eq!(flushes(), 0, "{mode}");
            way();
            session.flush().unwrap();
            assert_eq!(flushes(), 1, "{mode}");
        }
        assert!(is_watched(&session, Op::Write), "a loan to write to is for one request");
        assert!(read_inline(&session, &mut [0], 0).unwrap());
    }
}

#[test]
fn what_reads_is_seen_to_read_where_that_matters() {
    let watched = |mode| {
        let params = [("multi-conn-mode", mode)];
        is_watched(&crate::testing::session(&Spec::default().disk(), "multi-conn", &params), Op::Read)
    };
    assert!(watched("emulate") && !watched("plugin"));
}

#[test]
fn what_flushes_all_connections_needs_a_thread() {
    let disk = Spec { later: true, ..Spec::default() }.disk();
    let flush = Call::new(Op::Flush, 0, 0);
    let fua = Call::new(Op::Write, 0, 1).with_flags(Flags::FUA);
    let emulate = crate::testing::session(&disk, "multi-conn", &[("multi-conn-mode", "emulate")]);
    assert!(matches!(started(&emulate, flush, &[]), Answer::NeedsThread));
    assert!(matches!(started(&emulate, fua, &[1]), Answer::NeedsThread));
    let plugin = crate::testing::session(&disk, "multi-conn", &[("multi-conn-mode", "plugin")]);
    assert!(matches!(started(&plugin, fua, &[1]), Answer::Started(Ok(_))));
    assert!(matches!(started(&plugin, flush, &[]), Answer::Started(Ok(_))));
    assert!(matches!(started(&plugin, flush, &[]), Answer::Done(Ok(_))), "nobody has written");
}

#[test]
fn a_flush_that_fails_later_or_needs_a_thread_is_made_again() {
    let disk = Spec { later: true, fail_after: Some(1), ..Spec::default() }.disk();
    let session = crate::testing::session(&disk, "multi-conn", &[("multi-conn-mode", "plugin")]);
    session.pwrite(&[1], 0, Flags::empty()).unwrap();
    for _ in 0..2 {
        let answer = started(&session, Call::new(Op::Flush, 0, 0), &[]);
        assert!(matches!(answer, Answer::Started(Err(_))), "{answer:?}");
    }
    let disk = Spec { blocks: |op| op == Op::Flush, ..Spec::default() }.disk();
    let session = crate::testing::session(&disk, "multi-conn", &[("multi-conn-mode", "plugin")]);
    session.pwrite(&[1], 0, Flags::empty()).unwrap();
    assert!(needs_thread(&session, Op::Flush));
    session.flush().unwrap();
    assert_eq!(disk.count(Op::Flush), 1);
    assert!(!needs_thread(&session, Op::Flush), "nobody has written");
}

#[test]
fn unknown_modes_are_refused() {
    assert!(config_error("multi-conn", &[("multi-conn-mode", "x")]).contains("use auto, emulate"));
    assert!(config_error("multi-conn", &[("multi-conn-track-dirty", "x")]).contains("use connection, fast"));
}
