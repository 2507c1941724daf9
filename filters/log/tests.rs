use std::{
    ffi::OsStr,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use nbdkit_core::{Connection, Errno, Extents, Flags, Op, Session};

use super::{
    entry::{List, Outcome, Quoted, Time},
    *,
};
use crate::testing::{
    Answer, Call, Spec, View, chain, check_model, client, config_error, lent, needs_thread, read_inline,
    session, started,
};

/// A directory with a log file in it.
struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    fn new() -> Self {
        Scratch { dir: tempfile::tempdir().unwrap() }
    }

    /// Path of the log file.
    fn log(&self) -> String {
        self.dir.path().join("log").to_str().unwrap().to_owned()
    }

    /// The lines of the log without their time, whose shape is checked.
    fn lines(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.log()).unwrap();
        text.lines().map(|line| timeless(line).to_owned()).collect()
    }
}

fn timeless(line: &str) -> &str {
    let (time, rest) = line.split_at("YYYY-MM-DD hh:mm:ss.uuuuuu ".len());
    let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '9' } else { c }).collect();
    assert_eq!(shape, "9999-99-99 99:99:99.999999 ", "{line}");
    rest
}

/// A session whose requests are logged to `scratch`.
fn logged(spec: Spec, scratch: &Scratch) -> Session {
    session(&spec.disk(), "log", &[("logfile", &scratch.log())])
}

/// What a request adds to the log.
fn lines_of(spec: Spec, request: impl FnOnce(&Session)) -> Vec<String> {
    let scratch = Scratch::new();
    let session = logged(spec, &scratch);
    let before = scratch.lines().len();
    request(&session);
    scratch.lines().split_off(before)
}

#[test]
fn model() {
    check_model(&["log"], &[], 20_000, &View::same(20_000));
    let scratch = Scratch::new();
    check_model(&["log"], &[("logfile", &scratch.log())], 20_000, &View::same(20_000));
}

#[test]
fn a_life() {
    let scratch = Scratch::new();
    let chain = chain(&Spec::sized(0x8000).disk(), &["log"], &[("logfile", &scratch.log())]).unwrap();
    let connection: Arc<Connection> = Arc::new(chain.connect(client(), false).unwrap());
    connection.list_exports(true).unwrap();
    drop(connection.open(OsStr::new("a b"), false).unwrap());
    let session = connection.open(OsStr::new(""), true).unwrap();
    session.pread(&mut [0; 512], 0).unwrap();
    drop(session);
    let caps = "size=0x8000 minsize=0x0 prefsize=0x0 maxsize=0x0 write=1 flush=1 rotational=0 trim=1 zero=2 \
                fua=2 extents=1 cache=2 fast_zero=1";
    assert_eq!(
        scratch.lines(),
        [
            "Ready thread_model=3",
            "Fork",
            "Preconnect id=1 readonly=0 ...",
            "...Preconnect id=1 return=0",
            "ListExports id=1 readonly=0 tls=1 ...",
            "...ListExports id=1 exports=(\"\") return=0",
            &format!("connection=1 Connect export=\"a b\" tls=0 {caps}"),
            "connection=1 Disconnect transactions=0",
            &format!("connection=2 Connect export=\"\" tls=1 {caps}"),
            "connection=2 Read id=1 offset=0x0 count=0x200 ...",
            "connection=2 ...Read id=1 return=0",
            "connection=2 Disconnect transactions=1",
        ]
    );
}

#[test]
fn every_request() {
    let lines = lines_of(Spec { data: vec![0; 0x4000], ..Spec::default() }, |session| {
        session.pread(&mut [0; 1], 3).unwrap();
        session.pwrite(&[1; 4096], 4096, Flags::FUA).unwrap();
        session.flush().unwrap();
        session.trim(512, 0, Flags::empty()).unwrap();
        session.zero(512, 512, Flags::MAY_TRIM | Flags::FAST_ZERO).unwrap();
        session.zero(512, 512, Flags::FUA).unwrap();
        session.cache(1024, 0).unwrap();
        session.extents(0x4000, 0, Flags::empty()).unwrap();
        session.extents(0x800, 0x1000, Flags::REQ_ONE).unwrap();
    });
    let expected = [
        "Read id=1 offset=0x3 count=0x1 ...",
        "...Read id=1 return=0",
        "Write id=2 offset=0x1000 count=0x1000 fua=1 ...",
        "...Write id=2 return=0",
        "Flush id=3 ...",
        "...Flush id=3 return=0",
        "Trim id=4 offset=0x0 count=0x200 fua=0 ...",
        "...Trim id=4 return=0",
        "Zero id=5 offset=0x200 count=0x200 trim=1 fua=0 fast=1 ...",
        "...Zero id=5 return=0",
        "Zero id=6 offset=0x200 count=0x200 trim=0 fua=1 fast=0 ...",
        "...Zero id=6 return=0",
        "Cache id=7 offset=0x0 count=0x400 ...",
        "...Cache id=7 return=0",
        "Extents id=8 offset=0x0 count=0x4000 req_one=0 ...",
        "...Extents id=8 extents=(0x0 0x1000 \"hole,zero\" 0x1000 0x1000 \"\" 0x2000 0x2000 \"hole,zero\") return=0",
        "Extents id=9 offset=0x1000 count=0x800 req_one=1 ...",
        "...Extents id=9 extents=(0x1000 0x800 \"\") return=0",
    ];
    assert_eq!(lines, expected.map(|line| format!("connection=1 {line}")));
}

#[test]
fn failures_name_their_error() {
    let lines = lines_of(Spec { fail_after: Some(0), ..Spec::default() }, |session| {
        session.pread(&mut [0; 512], 0).unwrap_err();
        session.extents(512, 0, Flags::empty()).unwrap_err();
    });
    assert_eq!(lines[1], "connection=1 ...Read id=1 return=-1 error=EIO");
    assert_eq!(lines[3], "connection=1 ...Extents id=2 return=-1 error=EIO");
    let outcome = |errno: Errno| Outcome(Some(&errno.into())).to_string();
    assert_eq!(outcome(Errno::EROFS), " return=-1 error=EPERM");
    assert_eq!(outcome(Errno::EFBIG), " return=-1 error=ENOSPC");
    assert_eq!(outcome(Errno::EOPNOTSUPP), " return=-1 error=ENOTSUP");
}

#[test]
fn a_read_without_a_wait_is_logged_if_it_happens() {
    let read = |session: &Session| read_inline(session, &mut [0; 512], 0).unwrap();
    let slow = Spec { blocks: |_| true, ..Spec::default() };
    assert!(lines_of(slow, |session| assert!(!read(session))).is_empty());
    let cached = Spec { blocks: |op| op != Op::Read, ..Spec::default() };
    assert_eq!(
        lines_of(cached, |session| assert!(read(session))),
        ["connection=1 Read id=1 offset=0x0 count=0x200 ...", "connection=1 ...Read id=1 return=0"]
    );
}

#[test]
fn what_could_be_started_is_logged_as_it_happens() {
    let later = Spec { later: true, ..Spec::default() };
    let write = Call::new(Op::Write, 512, 512);
    let lines = lines_of(later, |session| {
        assert!(matches!(started(session, write, &[1; 512]), Answer::Done(Ok(_))));
    });
    let expected = ["Write id=1 offset=0x200 count=0x200 fua=0 ...", "...Write id=1 return=0"];
    assert_eq!(lines, expected.map(|line| format!("connection=1 {line}")));
}

#[test]
fn nothing_is_lent_behind_the_log() {
    let scratch = Scratch::new();
    assert_eq!(lent(&logged(Spec::default(), &scratch), Op::Read, 0, 512), None);
    let script = session(&Spec::default().disk(), "log", &[("logscript", "true")]);
    assert_eq!(lent(&script, Op::Read, 0, 512), None);
}

#[test]
fn without_a_reader_everything_passes() {
    let spec = Spec { blocks: |op| op != Op::Read, later: true, ..Spec::default() };
    let session = session(&spec.disk(), "log", &[]);
    assert_eq!(lent(&session, Op::Write, 0, 512), Some(0));
    assert!(read_inline(&session, &mut [0; 8], 0).unwrap());
    assert!(matches!(started(&session, Call::new(Op::Read, 0, 8), &[]), Answer::Started(Ok(_))));
}

#[test]
fn a_file_is_overwritten_or_appended_to() {
    let scratch = Scratch::new();
    let old = "2026-01-01 00:00:00.000000 old";
    std::fs::write(scratch.log(), format!("{old}\n")).unwrap();
    let file = ("logfile", scratch.log());
    let start = |append: &str| {
        chain(&Spec::default().disk(), &["log"], &[(file.0, &file.1), ("logappend", append)]).unwrap();
        scratch.lines()
    };
    assert_eq!(start("true"), ["old", "Ready thread_model=3", "Fork"]);
    assert_eq!(start("false"), ["Ready thread_model=3", "Fork"]);
}

#[test]
fn a_file_that_cannot_be_opened_is_an_error_at_the_start() {
    let error = config_error("log", &[("logfile", "/nonexistent/log")]);
    assert!(error.starts_with("cannot open the log file '/nonexistent/log': No such file"), "{error}");
    assert!(config_error("log", &[("logappend", "maybe")]).contains("maybe"));
}

#[test]
fn a_script_gets_the_entry_as_variables() {
    let scratch = Scratch::new();
    let out = scratch.log();
    let script = format!(
        "printf '%s|' $act $type \"$connection\" \"$id\" \"$offset\" \"$return\" \"$error\" \
         \"${{#extents[@]}}\" \"${{extents[2]}}\" \"$export\" >>{out}; echo >>{out}; exit 3"
    );
    let disk = Spec { data: vec![0; 0x1000], fail_after: Some(1), ..Spec::default() }.disk();
    let chain = chain(&disk, &["log"], &[("logscript", &script)]).unwrap();
    let connection = Arc::new(chain.connect(client(), false).unwrap());
    let session = connection.open(OsStr::new("it's $(id)\n\"`id`\\"), false).unwrap();
    assert!(needs_thread(&session, Op::Read));
    assert!(!read_inline(&session, &mut [0; 8], 0).unwrap());
    session.extents(0x1000, 0, Flags::empty()).unwrap();
    session.pread(&mut [0; 8], 16).unwrap_err();
    assert_eq!(
        std::fs::read_to_string(scratch.log()).unwrap(),
        "Ready|PRINT||||||0|||\n\
         Fork|PRINT||||||0|||\n\
         Preconnect|ENTER||1||||0|||\n\
         Preconnect|LEAVE||1||0||0|||\n\
         Connect|PRINT|1|||||1||it's $(id)\n\"`id`\\|\n\
         Extents|ENTER|1|1|0x0|||0|||\n\
         Extents|LEAVE|1|1||0||3|hole,zero||\n\
         Read|ENTER|1|2|0x10|||0|||\n\
         Read|LEAVE|1|2||-1|EIO|0|||\n"
    );
}

#[test]
fn strings_are_words_of_the_shell() {
    use std::os::unix::ffi::OsStrExt as _;
    for (name, word) in [
        (&b""[..], "\"\""),
        (b"plain", "plain"),
        (b"a,b-c.d/e:f=g_h", "a,b-c.d/e:f=g_h"),
        (b"a b", "\"a b\""),
        (b"it's", "\"it's\""),
        (b"q\"\\$x`", "\"q\\\"\\\\\\$x\\`\""),
        ("größe".as_bytes(), "\"größe\""),
        (b"two\nlines'", "$'two\\x0alines\\''"),
        (b"\xff0", "$'\\xff0'"),
    ] {
        assert_eq!(Quoted(OsStr::from_bytes(name)).to_string(), word);
    }
}

#[test]
fn lists_are_arrays_of_the_shell() {
    let mut exports = Exports::new();
    assert_eq!(List(&exports).to_string(), "()");
    for name in ["", "plain", "a b"] {
        exports.add(name, None).unwrap();
    }
    assert_eq!(List(&exports).to_string(), "(\"\" plain \"a b\")");
    let mut extents = Extents::new(0, 100);
    for (offset, hole, zero) in [(0, true, false), (10, false, true), (20, false, false), (30, true, true)] {
        extents.add(offset, 10, hole, zero).unwrap();
    }
    let expected = "(0x0 0xa \"hole\" 0xa 0xa \"zero\" 0x14 0xa \"\" 0x1e 0xa \"hole,zero\")";
    assert_eq!(List(&extents).to_string(), expected);
}

#[test]
fn times_are_in_utc() {
    for (seconds, text) in [
        (0, "1970-01-01 00:00:00"),
        (951_782_399, "2000-02-28 23:59:59"),
        (951_782_400, "2000-02-29 00:00:00"),
        (951_868_800, "2000-03-01 00:00:00"),
        (1_582_934_400, "2020-02-29 00:00:00"),
        (1_798_761_599, "2026-12-31 23:59:59"),
        (4_107_542_400, "2100-03-01 00:00:00"),
    ] {
        let time = UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_micros(42);
        assert_eq!(Time(time).to_string(), format!("{text}.000042"));
    }
}
