//! A request on all its ways, through a chain of layers that do what a test tells them.

use std::{
    ffi::OsStr,
    fs::File,
    os::fd::AsFd as _,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
};

use parking_lot::Mutex;

use super::*;
use crate::{
    Below, Buffers, Caps, Chain, Client, Filter, Info, Next, Open, Peer, Plugin, Session, ShutdownFlag,
    Support, ThreadModel,
};

/// What a layer of a test does with a request.
type Act = fn(&Layer, &mut Request<'_>) -> Answer;

/// How it answers: as a layer, or with what was asked for beneath it.
enum Answer {
    Done(Result<()>),
    Start,
    Lend,
    NeedsThread,
    Run,
    Pass,
    Submit,
    Watch(u64),
    Transform(u64),
    Shift(u64),
    AtOnce,
}

/// A plugin or a filter.
struct Layer {
    act: Act,
    next: Option<Next>,
    shared: Arc<Shared>,
}

struct Shared {
    log: Mutex<Vec<String>>,
    pending: Mutex<Vec<Pending>>,
    file: File,
    model: ThreadModel,
}

struct TestPlugin(Act, Arc<Shared>);
struct TestFilter(Act, Arc<Shared>);

impl Plugin for TestPlugin {
    fn info(&self) -> Info {
        Info::bundled("plugin", "a plugin for tests", "")
    }

    fn thread_model(&self) -> ThreadModel {
        self.1.model
    }

    fn open(&self, _: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Layer { act: self.0, next: None, shared: self.1.clone() }))
    }
}

impl Filter for TestFilter {
    fn info(&self) -> Info {
        Info::bundled("filter", "a filter for tests", "")
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Layer { act: self.0, next: Some(next.open(open)?), shared: self.1.clone() }))
    }
}

impl Handle for Layer {
    fn next(&self) -> Option<&Next> {
        self.next.as_ref()
    }

    fn capabilities(&self) -> Result<Caps> {
        Ok(Caps::of_size(1000).with_write(true).with_flush(true).with_fua(Support::Emulate))
    }

    fn pread(&self, buf: &mut [u8], _: u64) -> Result<()> {
        buf.fill(1);
        Ok(())
    }

    fn pwrite(&self, _: &[u8], _: u64, _: Flags) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let answer = (self.act)(self, request);
        let next = || self.next.as_ref().expect("a filter");
        match answer {
            Answer::Done(result) => Outcome::Done(result),
            Answer::NeedsThread => Outcome::NeedsThread,
            Answer::Run => request.run(self),
            Answer::Lend => Outcome::Lent(Loan { fd: self.shared.file.as_fd(), offset: request.offset() }),
            Answer::Start => {
                let Some((pending, started)) = request.start() else { return Outcome::NeedsThread };
                self.shared.pending.lock().push(pending);
                Outcome::Started(started)
            }
            Answer::Pass => next().pass(request),
            Answer::Submit => next().submit(request),
            Answer::Watch(token) => next().watch(self, request, token),
            Answer::Transform(token) => next().transform(self, request, token),
            Answer::Shift(by) => next().shifted(request, request.offset() + by),
            Answer::AtOnce => next().at_once(request),
        }
    }

    fn ended(&self, call: &Call, token: u64, result: &mut Result<()>) {
        assert!(token != 666, "planted");
        let errno = result.as_ref().err().map(Error::errno);
        self.shared.log.lock().push(format!("{token}: {}+{} {errno:?}", call.offset, call.length));
        if token == 13 {
            *result = Err(Errno::ENOSPC.into());
        }
    }

    fn transform(&self, _: &Call, token: u64, data: &mut [u8]) -> Result<()> {
        data.iter_mut().for_each(|byte| *byte = *byte * 2 + token as u8);
        Ok(())
    }
}

struct Ends(Sender<Completed>);

impl Completions for Ends {
    fn post(&self, completed: Completed) -> bool {
        self.0.send(completed).is_ok()
    }

    fn wake(&self) {}
}

struct Lab {
    session: Session,
    shared: Arc<Shared>,
    ends: Receiver<Completed>,
    tell: Sender<Completed>,
}

/// A session of `filters`, the outermost first, over a plugin.
fn lab_with(model: ThreadModel, filters: &[Act], plugin: Act) -> Lab {
    let file = File::open("/dev/null").unwrap();
    let shared = Arc::new(Shared { log: Mutex::default(), pending: Mutex::default(), file, model });
    let filters = filters.iter().map(|act| Box::new(TestFilter(*act, shared.clone())) as Box<dyn Filter>);
    let mut chain = Chain::new(Box::new(TestPlugin(plugin, shared.clone())), filters.collect());
    chain.config_complete().unwrap();
    chain.get_ready().unwrap();
    let chain = Arc::new(chain);
    let client = Arc::new(Client::new(1, Peer::Local, Arc::new(ShutdownFlag::new())));
    let session = Arc::new(chain.connect(client, false).unwrap()).open(OsStr::new(""), false).unwrap();
    let (tell, ends) = channel();
    Lab { session, shared, ends, tell }
}

fn lab(filters: &[Act], plugin: Act) -> Lab {
    lab_with(ThreadModel::Parallel, filters, plugin)
}

impl Lab {
    fn task(&self) -> Box<Task> {
        let mut task = Task::new(Arc::new(Ends(self.tell.clone())));
        task.arm(7);
        task
    }

    /// Offers a read of 10 bytes at 100, which may be started.
    fn read(&self, buf: &mut [u8; 10]) -> Outcome<'_> {
        self.session.submit(&mut Request::read(buf, 100).startable(self.task()))
    }

    fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.log.lock())
    }

    /// The plugin completes what it has, and the front end takes it back through the layers.
    fn complete(&self, result: Result<Payload>) -> Completed {
        let pending = self.shared.pending.lock().pop().expect("a request was started");
        drop(pending.complete(result));
        self.end()
    }

    fn end(&self) -> Completed {
        let mut completed = self.ends.try_recv().expect("it was posted");
        self.session.finish(&mut completed);
        assert_eq!(completed.task.tag(), 7);
        completed
    }
}

fn bytes(byte: u8) -> Payload {
    let mut memory = Buffers::default().take(10).unwrap();
    memory.fill(byte);
    Payload::Memory(memory, 0..10)
}

const RUN: Act = |_, _| Answer::Run;
const START: Act = |_, request| if request.may_wait() { Answer::Run } else { Answer::Start };
const PASS: Act = |_, _| Answer::Pass;

#[test]
fn what_is_done_at_once_is_told_from_the_inside_out() {
    let lab = lab(&[|_, _| Answer::Watch(1), |_, _| Answer::Shift(50), |_, _| Answer::Watch(2)], RUN);
    let mut buf = [0; 10];
    assert!(matches!(lab.read(&mut buf), Outcome::Done(Ok(()))));
    assert_eq!(buf, [1; 10]);
    assert_eq!(lab.log(), ["2: 150+10 None", "1: 100+10 None"]);
    assert!(lab.ends.try_recv().is_err(), "nothing is posted");
}

#[test]
fn what_is_started_is_told_in_the_same_way() {
    let lab = lab(
        &[
            |_, _| Answer::Watch(1),
            PASS,
            |_, _| Answer::Transform(3),
            |_, _| Answer::Shift(50),
            |_, _| Answer::Transform(4),
            |_, _| Answer::Watch(2),
        ],
        START,
    );
    for (sent, received) in [(1, 15), (5, 31)] {
        assert!(matches!(lab.read(&mut [0; 10]), Outcome::Started(_)));
        assert!(lab.log().is_empty());
        let completed = lab.complete(Ok(bytes(sent)));
        assert!(completed.result.is_ok());
        assert_eq!(completed.payload.bytes(), [received; 10]);
        assert_eq!(lab.log(), ["2: 150+10 None", "1: 100+10 None"]);
    }
    // On a thread, by the same methods.
    let mut buf = [0; 10];
    lab.session.pread(&mut buf, 100).unwrap();
    assert_eq!(buf, [15; 10]);
    assert_eq!(lab.log(), ["2: 150+10 None", "1: 100+10 None"]);
}

#[test]
fn what_needs_a_thread_is_told_only_there() {
    let wary: Act = |_, request| if request.may_wait() { Answer::Run } else { Answer::NeedsThread };
    let lab = lab(&[|_, _| Answer::Watch(1)], wary);
    assert!(matches!(lab.read(&mut [0; 10]), Outcome::NeedsThread));
    assert!(lab.log().is_empty());
    lab.session.pread(&mut [0; 10], 100).unwrap();
    assert_eq!(lab.log(), ["1: 100+10 None"]);
}

#[test]
fn a_layer_may_turn_an_end_into_another_one() {
    let lab = lab(&[|_, _| Answer::Watch(1), |_, _| Answer::Watch(13)], START);
    assert!(matches!(lab.read(&mut [0; 10]), Outcome::Started(_)));
    let completed = lab.complete(Ok(bytes(1)));
    assert_eq!(completed.result.unwrap_err().errno(), Errno::ENOSPC);
    assert_eq!(lab.log(), ["13: 100+10 None", "1: 100+10 Some(ENOSPC)"]);
}

#[test]
fn what_is_forgotten_has_failed_and_is_told_once() {
    let lab = lab(&[|_, _| Answer::Watch(1)], START);
    assert!(matches!(lab.read(&mut [0; 10]), Outcome::Started(_)));
    drop(lab.shared.pending.lock().pop());
    assert_eq!(lab.end().result.unwrap_err().errno(), Errno::EIO);
    assert_eq!(lab.log(), ["1: 100+10 Some(EIO)"]);
    assert!(lab.ends.try_recv().is_err());
}

#[test]
fn a_panic_fails_the_request_wherever_it_is() {
    // Before anything was started; after it was; and on the way back.
    let early = lab(&[|_, _| Answer::Watch(1)], |_, _| panic!("planted"));
    let Outcome::Done(Err(error)) = early.read(&mut [0; 10]) else { panic!("it must fail") };
    assert_eq!(error.errno(), Errno::EIO);
    assert!(error.to_string().contains("planted"), "{error}");

    let late = lab(&[|_, _| Answer::Watch(1)], |_, request| {
        let _started = request.start();
        panic!("planted")
    });
    assert!(matches!(late.read(&mut [0; 10]), Outcome::Started(_)), "to drop it was an answer");
    assert_eq!(late.end().result.unwrap_err().errno(), Errno::EIO);
    assert_eq!(late.log(), ["1: 100+10 Some(EIO)"]);

    let back = lab(&[|_, _| Answer::Watch(666)], START);
    assert!(matches!(back.read(&mut [0; 10]), Outcome::Started(_)));
    let completed = back.complete(Ok(bytes(1)));
    assert_eq!(completed.result.unwrap_err().errno(), Errno::EIO);
    // The same task serves again.
    assert!(completed.task.frames.is_empty());
    let mut again = completed.task;
    again.arm(7);
    let mut buf = [0; 10];
    let outcome = back.session.submit(&mut Request::read(&mut buf, 0).startable(again));
    assert!(matches!(outcome, Outcome::Started(_)));
}

#[test]
fn an_answer_beside_a_started_request_does_not_count() {
    let lab = lab(&[], |layer, request| {
        let (pending, _) = request.start().unwrap();
        layer.shared.pending.lock().push(pending);
        Answer::Done(Ok(()))
    });
    assert!(matches!(lab.read(&mut [0; 10]), Outcome::Started(_)));
    assert!(lab.complete(Ok(bytes(1))).result.is_ok());
}

#[test]
fn a_layer_with_more_to_do_starts_nothing_below() {
    let lab = lab(&[|_, _| Answer::AtOnce], START);
    assert!(matches!(lab.read(&mut [0; 10]), Outcome::NeedsThread));
    lab.session.pread(&mut [0; 10], 0).unwrap();
}

#[test]
fn nothing_starts_where_requests_take_turns() {
    for model in [ThreadModel::SerializeRequests, ThreadModel::SerializeAllRequests] {
        let lab = lab_with(model, &[PASS], START);
        assert!(matches!(lab.read(&mut [0; 10]), Outcome::NeedsThread));
        lab.session.pread(&mut [0; 10], 0).unwrap();
    }
}

#[test]
fn a_loan_passes_all_but_those_who_look_at_the_data() {
    const LEND: Act = |_, request| if request.may_lend() { Answer::Lend } else { Answer::Run };
    let ask = |lab: &Lab| {
        let call = Call::new(Op::Read, 100, 10);
        let mut request = Request::new(call, Data::None).lendable(lab.task());
        let offset = match lab.session.submit(&mut request) {
            Outcome::Lent(loan) => Some(loan.offset),
            _ => None,
        };
        (offset, request.is_watched(), request.into_task().unwrap())
    };
    let lent = lab(&[PASS, |_, _| Answer::Shift(50)], LEND);
    assert!(matches!(ask(&lent), (Some(150), false, _)));
    let watched = lab(&[PASS, |_, _| Answer::Watch(1)], LEND);
    let (offset, true, task) = ask(&watched) else { panic!("it is watched") };
    assert_eq!((offset, watched.log().len()), (Some(100), 0));
    let (_, result) = watched.session.finish_lent(task, Ok(()));
    assert!(result.is_ok());
    assert_eq!(watched.log(), ["1: 100+10 None"]);
    for filter in [(|_, _| Answer::Transform(1)) as Act, |_, _| Answer::AtOnce, |_, _| Answer::Submit] {
        assert!(ask(&lab(&[filter], LEND)).0.is_none());
    }
    // Without being asked for one a plugin has nothing to lend.
    let honest = lab(&[], LEND);
    let mut buf = [0; 10];
    assert!(matches!(honest.read(&mut buf), Outcome::Done(Ok(()))) && buf == [1; 10]);
}

#[test]
fn wakes_cover_each_other() {
    struct Asleep(Sender<u8>);
    impl Completions for Asleep {
        fn post(&self, _: Completed) -> bool {
            true
        }
        fn wake(&self) {
            self.0.send(1).unwrap();
        }
    }
    let (tell, woken) = channel();
    let one: Arc<dyn Completions> = Arc::new(Asleep(tell.clone()));
    let other: Arc<dyn Completions> = Arc::new(Asleep(tell));
    let wake = |front_end: &Arc<dyn Completions>| {
        Pending(Some(Task::new(front_end.clone()))).complete(Ok(Payload::None))
    };
    let (first, second, third) = (wake(&one), wake(&one), wake(&other));
    assert!(second.is_covered_by(&first) && !third.is_covered_by(&first));
    second.forget();
    assert!(woken.try_recv().is_err());
    drop((first, third));
    assert_eq!(woken.try_iter().count(), 2);
}
