use std::path::Path;

use nbdkit_core::{Errno, Flags, Session, ShutdownFlag};

use super::*;
use crate::testing::{
    Answer, Disk, Spec, View, chain, check_model, config_error, lent, needs_thread, open, session, started,
};

const FAST: &str = "1000000000000";
/// Any request waits for longer than a test runs, or until its client is gone.
const SLOW: [(&str, &str); 2] = [("burstiness", "0"), ("rate", "1")];

fn client(peer: Peer) -> Arc<Client> {
    Arc::new(Client::new(1, peer, Arc::new(ShutdownFlag::new())))
}

/// Whether a read of one byte has to wait. The client is gone, so that it does not.
fn waits(session: &Session) -> bool {
    session.client().gone.raise();
    session.pread(&mut [0], 0).is_err_and(|e| e.errno() == Errno::ESHUTDOWN)
}

fn with(kind: &str, value: &str) -> Vec<(String, String)> {
    vec![("burstiness".into(), "0".into()), (kind.into(), value.into())]
}

fn serving(disk: &Disk, params: &[(String, String)]) -> Arc<nbdkit_core::Chain> {
    let params: Vec<_> = params.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
    chain(disk, &["rate"], &params).unwrap()
}

fn opened(disk: &Disk, params: &[(String, String)]) -> Session {
    open(&serving(disk, params), client(Peer::Local), false).unwrap()
}

#[test]
fn model() {
    check_model(&["rate"], &[], 20_000, &View::same(20_000));
    let params = [("rate", FAST), ("connection-rate", FAST), ("address-rate", FAST)];
    check_model(&["rate"], &params, 20_000, &View::same(20_000));
}

#[test]
fn reads_and_writes_wait_and_nothing_else_does() {
    let disk = Spec::default().disk();
    let session = session(&disk, "rate", &SLOW);
    session.client().gone.raise();
    assert_eq!(session.pread(&mut [0], 0).unwrap_err().errno(), Errno::ESHUTDOWN);
    assert_eq!(session.pwrite(&[0], 0, Flags::empty()).unwrap_err().errno(), Errno::ESHUTDOWN);
    assert!(disk.calls().is_empty());
    session.zero(4096, 0, Flags::empty()).unwrap();
    session.trim(4096, 0, Flags::empty()).unwrap();
    session.flush().unwrap();
    session.cache(4096, 0).unwrap();
    session.extents(4096, 0, Flags::empty()).unwrap();
}

#[test]
fn a_burst_passes_and_the_directions_do_not_share() {
    let params = [("rate", "8"), ("burstiness", "1000000")];
    let session = session(&Spec::default().disk(), "rate", &params);
    session.client().gone.raise();
    let mut buf = [0; 50_000];
    // 400,000 bits each; 8 million are free.
    for _ in 0..20 {
        session.pread(&mut buf, 0).unwrap();
    }
    session.pread(&mut buf, 0).unwrap_err();
    session.pwrite(&buf, 0, Flags::empty()).unwrap();
}

#[test]
fn each_kind_of_limit_limits() {
    let disk = Spec::default().disk();
    for kind in ["rate", "connection-rate", "address-rate"] {
        assert!(waits(&opened(&disk, &with(kind, "1"))), "{kind}");
        assert!(!waits(&opened(&disk, &with(kind, "0"))), "{kind}");
    }
}

/// Which of two clients after one that took all it could has to wait: another of its address, one of another.
fn others_wait(kind: &str) -> (bool, bool) {
    let params = [("burstiness".into(), "1000000".into()), (kind.into(), "8".into())];
    let chain = serving(&Spec::default().disk(), &params);
    let at = |address: &str| Peer::Tcp((address.parse::<IpAddr>().unwrap(), 1).into());
    let greedy = open(&chain, client(at("10.0.0.1")), false).unwrap();
    greedy.client().gone.raise();
    let mut buf = [0; 60_000];
    while greedy.pread(&mut buf, 0).is_ok() {}
    drop(greedy);
    // An IPv4 address is the same on an IPv6 socket.
    let same = open(&chain, client(at("::ffff:10.0.0.1")), false).unwrap();
    let other = open(&chain, client(at("10.0.0.2")), false).unwrap();
    (waits(&same), waits(&other))
}

#[test]
fn who_shares_a_limit() {
    assert_eq!(others_wait("rate"), (true, true));
    assert_eq!(others_wait("address-rate"), (true, false));
    assert_eq!(others_wait("connection-rate"), (false, false));
}

#[test]
fn addresses() {
    let unix = |uid, pid| Address::of(&Peer::Unix { pid, uid, gid: 1 });
    assert_eq!(unix(5, 1), unix(5, 2));
    assert_ne!(unix(5, 1), unix(6, 1));
    let vsock = |cid, port| Address::of(&Peer::Vsock { cid, port });
    assert_eq!(vsock(5, 1), vsock(5, 2));
    assert_ne!(vsock(5, 1), vsock(6, 1));
}

#[test]
fn addresses_that_owe_nothing_are_forgotten() {
    let mut rate = Rate {
        burst: Duration::from_secs(2),
        server: Source::default(),
        connection: Source::default(),
        address: Source { rate: 1 << 20, file: None },
        whole: None,
        addresses: Mutex::default(),
    };
    for n in 0..10 {
        drop(rate.address_limit(&Peer::Unix { pid: 1, uid: n, gid: 1 }));
    }
    assert_eq!(rate.addresses.get_mut().len(), 1);
    let kept = rate.address_limit(&Peer::Unix { pid: 1, uid: 1, gid: 1 });
    drop(rate.address_limit(&Peer::Unix { pid: 1, uid: 2, gid: 1 }));
    drop(rate.address_limit(&Peer::Unix { pid: 1, uid: 3, gid: 1 }));
    assert_eq!(rate.addresses.get_mut().len(), 2);
    drop(kept);
}

fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, path).unwrap();
}

#[test]
fn a_file_changes_the_rate_while_the_server_runs() {
    for kind in ["rate", "connection-rate", "address-rate"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rate");
        let params = with(&format!("{kind}-file"), path.to_str().unwrap());
        let session = opened(&Spec::default().disk(), &params);
        assert!(!waits(&session), "{kind}: there is no file");
        replace(&path, "1\n");
        assert!(waits(&session), "{kind}: the file says 1");
        replace(&path, "0");
        assert!(!waits(&session), "{kind}: the file says 0");
        replace(&path, "nonsense");
        assert!(!waits(&session), "{kind}: the file says nothing");
        replace(&path, "1");
        std::fs::remove_file(&path).unwrap();
        assert!(!waits(&session), "{kind}: the file went before it was read");
    }
}

#[test]
fn what_has_to_wait_needs_a_thread_and_is_not_lent_for() {
    let disk = Spec { later: true, ..Spec::default() }.disk();
    let slow = session(&disk, "rate", &SLOW);
    assert!(
        needs_thread(&slow, Op::Read) && needs_thread(&slow, Op::Write) && !needs_thread(&slow, Op::Zero)
    );
    assert!(lent(&slow, Op::Read, 0, 512).is_none() && lent(&slow, Op::Write, 0, 512).is_none());
    let answer = started(&slow, Call::new(Op::Read, 0, 512), &[]);
    assert!(matches!(answer, Answer::NeedsThread), "{answer:?}");
    let off = session(&disk, "rate", &[]);
    assert!(!needs_thread(&off, Op::Read) && lent(&off, Op::Write, 0, 512).is_some());
}

#[test]
fn what_need_not_wait_pays_all_the_same() {
    // 800,000 bits are free, and each of these takes 4096.
    let params = [("rate", "8"), ("burstiness", "100000")];
    let call = Call::new(Op::Read, 0, 512);
    let run = |spec: Spec, mut request: Box<dyn FnMut(&Session) -> bool>| {
        let session = session(&spec.disk(), "rate", &params);
        (0..1000).take_while(|_| request(&session)).count()
    };
    let inline = run(Spec::default(), Box::new(|session| !needs_thread(session, Op::Read)));
    let lent = run(Spec::default(), Box::new(|session| lent(session, Op::Read, 0, 512).is_some()));
    let later = Spec { later: true, ..Spec::default() };
    let started =
        run(later, Box::new(move |session| matches!(started(session, call, &[]), Answer::Started(Ok(_)))));
    assert_eq!((inline, lent, started), (195, 195, 195));
    // One that needs a thread for another reason pays once, there.
    let busy = session(&Spec { blocks: |_| true, ..Spec::default() }.disk(), "rate", &params);
    assert!((0..1000).all(|_| needs_thread(&busy, Op::Read)));
    busy.client().gone.raise();
    busy.pread(&mut [0; 512], 0).unwrap();
}

#[test]
fn values_that_are_no_rates_are_refused() {
    for key in ["rate", "connection-rate", "address-rate", "burstiness"] {
        let error = config_error("rate", &[(key, "fast")]);
        assert!(error.starts_with(&format!("{key}: ")) && error.contains("'fast'"), "{error}");
    }
}
