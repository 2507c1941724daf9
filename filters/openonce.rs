//! Opens the layers below once for each export, and lets all clients share what is open.

use std::{collections::HashMap, ffi::OsString, sync::Arc};

use nbdkit_core::{
    Below, Caps, Client, Filter, Handle, Info, Next, Open, Outcome, Peer, Request, Result, ThreadModel,
};
use parking_lot::Mutex;

use crate::finalize_on_drop::FinalizeOnDrop;

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(OpenOnce::default())
}

#[derive(Default)]
struct OpenOnce {
    open: Mutex<HashMap<Key, Arc<Shared>>>,
}

/// What makes a difference below: the export, read-only or not, TLS or not.
type Key = (OsString, bool, bool);

/// Open layers, and the client on whose behalf they are open: one of the server's own, which stays when others go.
struct Shared {
    next: FinalizeOnDrop,
    _client: Arc<Client>,
}

impl Shared {
    fn new(next: &Below, open: &Open) -> Result<Self> {
        let server = open.client.server().clone();
        let client = Arc::new(Client::new(0, Peer::Local, server.clone()));
        let stopped = Arc::downgrade(&client);
        server.on_raise(move || {
            if let Some(client) = stopped.upgrade() {
                client.gone.raise();
            }
        });
        let next = next.open(&Open { client: client.clone(), ..open.clone() })?.into();
        Ok(Shared { next, _client: client })
    }
}

impl Filter for OpenOnce {
    fn info(&self) -> Info {
        Info::bundled("openonce", "nbdkit openonce filter", "")
    }

    /// Where a connection may have one request at a time, all clients are one connection now.
    fn thread_model(&self, next: ThreadModel) -> ThreadModel {
        match next {
            ThreadModel::SerializeRequests => ThreadModel::SerializeAllRequests,
            other => other,
        }
    }

    fn cleanup(&self, _: &Below) {
        let open = std::mem::take(&mut *self.open.lock());
        drop(open);
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        // Held while the layers are opened: two clients who come at once do not open them twice.
        let mut shared = self.open.lock();
        let key = (open.export_name.clone(), open.readonly, open.tls);
        let shared = match shared.get(&key) {
            Some(open) => open.clone(),
            None => {
                let new = Arc::new(Shared::new(next, open)?);
                shared.insert(key, new.clone());
                new
            }
        };
        Ok(Box::new(User(shared)))
    }
}

/// A client's handle on what is shared. The layer below is not its [`next`](Handle::next), which would be finalized
/// with it.
struct User(Arc<Shared>);

impl Handle for User {
    fn below(&self) -> Option<&Next> {
        Some(&self.0.next)
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        self.0.next.pass(request)
    }

    fn capabilities(&self) -> Result<Caps> {
        let next = &self.0.next;
        Ok(next.capabilities().with_skip_holes(next.caps().skip_holes))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::OsStr,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use nbdkit_core::{Call, Chain, Connection, Errno, Op, Plugin, Session, ShutdownFlag};

    use super::*;
    use crate::testing::{Answer, Disk, Spec, View, chain, check_model, client, lent, needs_thread, started};

    /// Counts how often a disk is opened and closed.
    #[derive(Clone)]
    struct Watched {
        disk: Disk,
        opened: Arc<Mutex<Vec<String>>>,
        closed: Arc<AtomicUsize>,
    }

    impl Plugin for Watched {
        fn info(&self) -> Info {
            self.disk.info()
        }

        fn thread_model(&self) -> ThreadModel {
            self.disk.thread_model()
        }

        fn open(&self, open: &Open) -> Result<Box<dyn Handle>> {
            let name = open.export_name.to_string_lossy().into_owned();
            if name == "none" {
                return Err(Errno::ENOENT.into());
            }
            self.opened.lock().push(format!("{name} readonly={} tls={}", open.readonly, open.tls));
            Ok(Box::new(Closing { closed: self.closed.clone() }))
        }
    }

    struct Closing {
        closed: Arc<AtomicUsize>,
    }

    impl Handle for Closing {
        fn capabilities(&self) -> Result<Caps> {
            Ok(Caps::of_size(512))
        }

        fn finalize(&self) -> Result<()> {
            self.closed.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    fn watched() -> (Watched, Arc<Chain>) {
        let disk = Spec::default().disk();
        let watched = Watched { disk, opened: Arc::default(), closed: Arc::default() };
        let mut chain = Chain::new(Box::new(watched.clone()), vec![new()]);
        chain.config_complete().unwrap();
        (watched, Arc::new(chain))
    }

    fn open(chain: &Arc<Chain>, name: &str, readonly: bool, tls: bool) -> Result<Session> {
        let connection: Arc<Connection> = Arc::new(chain.connect(client(), readonly)?);
        connection.open(OsStr::new(name), tls)
    }

    #[test]
    fn model() {
        check_model(&["openonce"], &[], 20_000, &View::same(20_000));
    }

    #[test]
    fn each_export_is_opened_once_and_closed_at_the_end() {
        let (watched, chain) = watched();
        for _ in 0..3 {
            let sessions = [
                open(&chain, "a", false, false).unwrap(),
                open(&chain, "a", false, false).unwrap(),
                open(&chain, "b", false, false).unwrap(),
                open(&chain, "a", true, false).unwrap(),
                open(&chain, "a", false, true).unwrap(),
            ];
            drop(sessions);
        }
        assert_eq!(
            *watched.opened.lock(),
            [
                "a readonly=false tls=false",
                "b readonly=false tls=false",
                "a readonly=true tls=false",
                "a readonly=false tls=true"
            ]
        );
        assert_eq!(watched.closed.load(Ordering::SeqCst), 0);
        chain.cleanup();
        assert_eq!(watched.closed.load(Ordering::SeqCst), 4);
    }

    #[test]
    fn a_failed_open_is_tried_again() {
        let (watched, chain) = watched();
        for _ in 0..2 {
            assert_eq!(open(&chain, "none", false, false).unwrap_err().errno(), Errno::ENOENT);
        }
        open(&chain, "a", false, false).unwrap();
        assert_eq!(watched.opened.lock().len(), 1);
    }

    #[test]
    fn what_is_below_does_not_go_with_the_first_client() {
        let disk = Spec::default().disk();
        let chain = chain(&disk, &["openonce", "delay"], &[("rdelay", "1ns")]).unwrap();
        let first = open(&chain, "", false, false).unwrap();
        let second = open(&chain, "", false, false).unwrap();
        first.client().gone.raise();
        drop(first);
        // Would the delay belong to the first client, it would end early.
        second.pread(&mut [0], 0).unwrap();
    }

    #[test]
    fn what_is_below_stops_with_the_server() {
        let chain = chain(&Spec::default().disk(), &["openonce", "delay"], &[("rdelay", "1000000")]).unwrap();
        let server = Arc::new(ShutdownFlag::new());
        let client = Arc::new(Client::new(1, Peer::Local, server.clone()));
        let session = crate::testing::open(&chain, client, false).unwrap();
        server.raise();
        assert_eq!(session.pread(&mut [0], 0).unwrap_err().errno(), Errno::ESHUTDOWN);
    }

    #[test]
    fn capabilities_are_those_below() {
        for spec in [Spec::sized(1000), Spec::emulated(1000), Spec::minimal(1000)] {
            let disk = spec.disk();
            let bare = open(&chain(&disk, &[], &[]).unwrap(), "", false, false).unwrap();
            let shared = open(&chain(&disk, &["openonce"], &[]).unwrap(), "", false, false).unwrap();
            assert_eq!(format!("{:?}", shared.caps()), format!("{:?}", bare.caps()));
        }
        let chain = chain(&Spec::default().disk(), &["openonce"], &[]).unwrap();
        let session = open(&chain, "", false, false).unwrap();
        assert!(lent(&session, Op::Write, 0, 512).is_some() && !needs_thread(&session, Op::Read));
    }

    #[test]
    fn requests_that_are_started_come_back() {
        let disk = Spec { later: true, ..Spec::default() }.disk();
        // What is below wants to know how each ends, and changes what is read.
        let params = [("statsfile", "/dev/null")];
        let chain = chain(&disk, &["openonce", "stats", "swab"], &params).unwrap();
        let session = open(&chain, "", false, false).unwrap();
        let answer = started(&session, Call::new(Op::Read, 600, 2), &[]);
        let Answer::Started(Ok(data)) = answer else { panic!("{answer:?}") };
        let disk = disk.contents();
        assert_eq!(data, [disk[601], disk[600]]);
    }

    #[test]
    fn one_request_at_a_time_holds_for_all_clients() {
        let model = |thread_model| {
            let disk = Spec { thread_model, ..Spec::default() }.disk();
            chain(&disk, &["openonce"], &[]).unwrap().thread_model()
        };
        use ThreadModel::*;
        assert_eq!(model(SerializeRequests), SerializeAllRequests);
        for other in [SerializeConnections, SerializeAllRequests, Parallel] {
            assert_eq!(model(other), other);
        }
    }

    /// A disk that cannot say whether it can zero.
    struct Undecided;

    impl Plugin for Undecided {
        fn info(&self) -> Info {
            Info::bundled("undecided", "", "")
        }

        fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
            Ok(Box::new(Undecided))
        }
    }

    impl Handle for Undecided {
        fn capabilities(&self) -> Result<Caps> {
            Ok(Caps::of_size(512).with_write(true).with_zero(Err(Errno::EBUSY.into())))
        }
    }

    #[test]
    fn a_failed_answer_fails_the_open_unless_another_filter_has_its_own() {
        for (filters, opens) in
            [(vec!["openonce"], false), (vec!["retry"], false), (vec!["nozero", "openonce"], true)]
        {
            let layers = filters.iter().map(|name| crate::load(name).unwrap()).collect();
            let mut chain = Chain::new(Box::new(Undecided), layers);
            chain.config_complete().unwrap();
            let error = open(&Arc::new(chain), "", false, false).err().map(|e| e.errno());
            assert_eq!(error, (!opens).then_some(Errno::EBUSY), "{filters:?}");
        }
    }
}
