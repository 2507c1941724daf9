//! Requests that may block, but are quick, and then one is not.

use super::*;

/// Reads at 0 are quick, those at 1 wait for one at 2, those at 3 for the client or the server to leave.
struct Moody(Arc<Barrier>, Arc<AtomicUsize>);

struct OpenMoody(Arc<Barrier>, Arc<AtomicUsize>, Arc<Client>);

impl Plugin for Moody {
    fn info(&self) -> Info {
        Info::bundled("moody", "moody", "")
    }

    fn open(&self, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(OpenMoody(self.0.clone(), self.1.clone(), open.client.clone())))
    }
}

impl Handle for OpenMoody {
    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(SIZE).with_write(true))
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        buf.fill(offset as u8);
        match offset {
            1 | 2 => drop(self.0.wait()),
            3 => {
                self.1.fetch_add(1, SeqCst);
                self.2.sleep(Duration::MAX)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn pwrite(&self, _: &[u8], _: u64, _: Flags) -> Result<()> {
        Ok(())
    }
}

/// A client whose reads have been quick for long enough.
fn spoilt(served: Served) -> Served {
    let mut served = served.begin();
    quick(&mut served);
    served
}

fn quick(served: &mut Served) {
    for _ in 0..100 {
        served.send(&[request(0, cmd::READ, 1, 0, 1), write(2)].concat());
        let mut cookies = Vec::new();
        for _ in 0..2 {
            let reply = served.receive::<16>();
            cookies.push(reply[15]);
            if reply[15] == 1 {
                assert_eq!(served.receive(), [0]);
            }
        }
        cookies.sort_unstable();
        assert_eq!(cookies, [1, 2]);
    }
}

fn write(cookie: u64) -> Vec<u8> {
    [&request(0, cmd::WRITE, cookie, 0, 3)[..], b"abc"].concat()
}

fn moody() -> (Served, Arc<AtomicUsize>) {
    let sleeping = Arc::new(AtomicUsize::new(0));
    let served = serve(Moody(Arc::new(Barrier::new(2)), sleeping.clone()), Config::default());
    (spoilt(served), sleeping)
}

#[test]
fn a_slow_request_holds_up_no_others() {
    let (mut served, _) = moody();
    for _ in 0..5 {
        // The first one ends only if the second one is begun meanwhile; what came before is answered at once.
        served.send(&[request(0, cmd::READ, 7, 0, 1), request(0, cmd::READ, 8, 1, 1)].concat());
        assert_eq!(served.receive(), simple_reply(0, 7));
        assert_eq!(served.receive(), [0]);
        served.send(&[write(9), request(0, cmd::READ, 10, 2, 1)].concat());
        let mut seen = Vec::new();
        for _ in 0..3 {
            let reply = served.receive::<16>();
            assert_eq!(reply[7], 0);
            seen.push(reply[15]);
            match reply[15] {
                8 => assert_eq!(served.receive(), [1]),
                10 => assert_eq!(served.receive(), [2]),
                _ => {}
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, [8, 9, 10]);
        quick(&mut served);
    }
    served.ended();
}

#[test]
fn a_client_that_leaves_ends_a_slow_request() {
    let (mut served, _) = moody();
    served.send(&request(0, cmd::READ, 1, 3, 1));
    served.ended();
}

#[test]
fn a_server_that_stops_ends_a_slow_request() {
    const ESHUTDOWN: u8 = 108;
    let (mut served, sleeping) = moody();
    served.send(&request(0, cmd::READ, 5, 3, 1));
    while sleeping.load(SeqCst) == 0 {
        std::thread::yield_now();
    }
    served.stop.raise();
    assert_eq!(served.rest(), simple_reply(ESHUTDOWN, 5));
    served.ended();
}

#[test]
fn many_that_are_slow_run_together() {
    let (mut served, sleeping) = moody();
    for cookie in 0..16 {
        served.send(&request(0, cmd::READ, cookie, 3, 1));
    }
    while sleeping.load(SeqCst) < 16 {
        std::thread::yield_now();
    }
    served.ended();
}
