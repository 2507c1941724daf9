//! The byte-array model: random requests go through a session and into an array, and must not differ; and over disks
//! that answer inline, on a thread and later, every answer must be the same.

use nbdkit_core::{Call, Errno, Extent, Flags, Op, Result, Session, Support};
use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError, TestRunner},
};

use super::{
    Disk, Spec, chain, client, open,
    submit::{May, extents, submit},
};

/// How the disk of a session lies on the test disk.
pub(crate) struct View {
    /// Size of the session's disk.
    pub(crate) size: u64,
    /// Where a byte of it is on the test disk; None: there it reads as zero and takes nothing but zeroes.
    pub(crate) map: fn(u64, &View) -> Option<u64>,
    /// A number for `map`.
    pub(crate) start: u64,
    /// Changes reach the test disk, and FUA makes them durable there.
    pub(crate) through: bool,
}

impl View {
    /// The session's disk is the test disk.
    pub(crate) fn same(size: u64) -> Self {
        View { size, map: |at, _| Some(at), start: 0, through: true }
    }

    /// The session's disk is the part of the test disk from `start` on.
    pub(crate) fn part(start: u64, size: u64) -> Self {
        View { size, map: |at, view| Some(view.start + at), start, through: true }
    }

    /// The session's disk is the start of the test disk, up to `real`, and then zeroes.
    pub(crate) fn padded(real: u64, size: u64) -> Self {
        View { size, map: |at, view| (at < view.start).then_some(at), start: real, through: true }
    }

    fn at(&self, byte: u64) -> Option<u64> {
        (self.map)(byte, self)
    }
}

/// A request of the model test.
#[derive(Clone, Copy, Debug)]
struct Request {
    op: Op,
    offset: u64,
    length: u64,
    flags: Flags,
    /// What a write writes.
    byte: u8,
}

/// Random requests within a disk of `size` bytes, often aligned to the usual boundaries.
fn requests(size: u64) -> impl Strategy<Value = Vec<Request>> {
    let op = prop_oneof![
        4 => Just(Op::Read),
        5 => Just(Op::Write),
        3 => Just(Op::Zero),
        2 => Just(Op::Trim),
        2 => Just(Op::Extents),
        1 => Just(Op::Cache),
        1 => Just(Op::Flush),
    ];
    let unit = prop_oneof![Just(1), Just(512), Just(4096)];
    let longest = prop_oneof![3 => Just(3000), 2 => Just(20_000), 1 => Just(size)];
    let request = (op, 0..size, 1..=size, unit, longest, any::<u32>(), any::<u8>()).prop_map(
        move |(op, offset, length, unit, longest, flags, byte)| {
            let offset = offset / unit * unit;
            let length = (length % longest / unit * unit).max(unit).min(size - offset);
            // A quarter of the writes are of zeroes.
            let byte = if byte % 4 == 0 { 0 } else { byte };
            Request { op, offset, length, flags: Flags::from_bits_truncate(flags), byte }
        },
    );
    proptest::collection::vec(request, 1..25)
}

/// Runs random requests through `filters` over disks of `disk_size` bytes with different capabilities, and compares
/// every answer with a byte array that `view` describes; and with each other, where the disks differ only in how they
/// answer.
pub(crate) fn check_model(filters: &[&str], params: &[(&str, &str)], disk_size: u64, view: &View) {
    let inline = Spec::sized(disk_size);
    let threads = Spec { blocks: |_| true, ..inline.clone() };
    let reads_on_threads =
        Spec { blocks: |op| matches!(op, Op::Read | Op::Extents | Op::Flush), ..inline.clone() };
    let later = Spec { later: true, ..inline.clone() };
    check_same(&[inline, threads, reads_on_threads, later], filters, params, view);
    for spec in [Spec::emulated(disk_size), Spec::minimal(disk_size)] {
        check_model_over(&spec, filters, params, view);
    }
}

/// As [`check_model`], over one kind of disk.
pub(crate) fn check_model_over(spec: &Spec, filters: &[&str], params: &[(&str, &str)], view: &View) {
    check_same(std::slice::from_ref(spec), filters, params, view);
}

/// As [`check_model`], over disks that must all give the same answers.
fn check_same(specs: &[Spec], filters: &[&str], params: &[(&str, &str)], view: &View) {
    let config = Config { cases: 48, failure_persistence: None, ..Config::default() };
    let result = TestRunner::new(config).run(&requests(view.size), |requests| {
        let mut first = None;
        for spec in specs {
            let disk = spec.clone().disk();
            let chain = chain(&disk, filters, params).unwrap();
            let session = open(&chain, client(), false).unwrap();
            let answers = Model::new(&session, &disk, view)
                .and_then(|model| model.run(&requests))
                .map_err(|e| TestCaseError::fail(format!("over {}: {e}", summary(spec))))?;
            let first = first.get_or_insert_with(|| answers.clone());
            for ((request, one), other) in requests.iter().zip(first).zip(&answers) {
                prop_assert!(one == other, "another answer to {:?} over {}", request, summary(spec));
            }
        }
        Ok(())
    });
    if let Err(failure) = result {
        panic!("{filters:?} {params:?}: {failure}");
    }
}

fn summary(spec: &Spec) -> String {
    format!("{:?}", Spec { data: Vec::new(), ..spec.clone() })
}

struct Model<'a> {
    session: &'a Session,
    disk: &'a Disk,
    view: &'a View,
    bytes: Vec<u8>,
    original: Vec<u8>,
    /// How many requests there were.
    count: usize,
    answers: Vec<Answered>,
}

/// What is compared between disks that answer in different ways.
#[derive(Clone, PartialEq)]
enum Answered {
    Nothing,
    Bytes(Vec<u8>),
    Extents(Vec<Extent>),
    Error(Errno),
}

type Check = std::result::Result<(), TestCaseError>;

impl<'a> Model<'a> {
    fn new(session: &'a Session, disk: &'a Disk, view: &'a View) -> std::result::Result<Self, TestCaseError> {
        let original = disk.contents();
        let bytes = (0..view.size).map(|i| view.at(i).map_or(0, |at| original[at as usize])).collect();
        prop_assert_eq!(session.size(), view.size, "size");
        Ok(Model { session, disk, view, bytes, original, count: 0, answers: Vec::new() })
    }

    fn run(mut self, requests: &[Request]) -> std::result::Result<Vec<Answered>, TestCaseError> {
        for request in requests {
            self.answers.push(Answered::Nothing);
            self.step(*request)
                .map_err(|e| TestCaseError::fail(format!("{request:?} of {requests:#?}: {e}")))?;
        }
        let size = self.view.size;
        prop_assert!(self.read(0, size)? == self.bytes, "the disk at the end");
        self.check_below()?;
        Ok(self.answers)
    }

    /// What must be on the test disk at the end.
    fn check_below(&self) -> Check {
        let mut expected = self.original.clone();
        if self.view.through {
            for (i, byte) in self.bytes.iter().enumerate() {
                if let Some(at) = self.view.at(i as u64) {
                    expected[at as usize] = *byte;
                }
            }
        }
        let found = self.disk.contents();
        let wrong = expected.iter().zip(&found).position(|(a, b)| a != b);
        prop_assert_eq!(wrong, None, "first wrong byte on the disk below");
        Ok(())
    }

    fn read(&mut self, offset: u64, length: u64) -> std::result::Result<Vec<u8>, TestCaseError> {
        self.submit(Call::new(Op::Read, offset, length), &[])
            .map_err(|e| TestCaseError::fail(format!("read: {e}")))
    }

    /// Runs a request as a front end does: where it is, if it does not need a thread. Every third one may not be started.
    fn submit(&mut self, call: Call, data: &[u8]) -> Result<Vec<u8>> {
        self.count += 1;
        let start = !self.count.is_multiple_of(3);
        let inline = May { start, ..May::default() };
        let result = submit(self.session, call, data, inline)
            .ended()
            .or_else(|| submit(self.session, call, data, May { wait: true, ..inline }).ended());
        result.expect("no layer needs a thread on a thread")
    }

    /// Notes what was answered to the request of now.
    fn answered(&mut self, answer: Answered) {
        if let Some(last) = self.answers.last_mut() {
            *last = answer;
        }
    }

    fn range(&self, request: Request) -> std::ops::Range<usize> {
        request.offset as usize..(request.offset + request.length) as usize
    }

    fn step(&mut self, mut request: Request) -> Check {
        let caps = self.session.caps();
        let Request { op, offset, length, .. } = request;
        let range = self.range(request);
        let offered = match op {
            Op::Write => caps.write,
            Op::Flush => caps.flush,
            Op::Trim => caps.trim,
            Op::Zero => caps.zero != Support::None,
            Op::Cache => caps.cache != Support::None,
            Op::Read | Op::Extents => true,
        };
        if !offered {
            return Ok(());
        }
        if caps.fua == Support::None {
            request.flags -= Flags::FUA;
        }
        if !caps.fast_zero {
            request.flags -= Flags::FAST_ZERO;
        }
        let flags = request.flags;
        match op {
            Op::Read => {
                let found = self.read(offset, length)?;
                let wrong = found.iter().zip(&self.bytes[range]).position(|(a, b)| a != b);
                prop_assert_eq!(wrong, None, "first wrong byte of the read");
                self.answered(Answered::Bytes(found));
                Ok(())
            }
            Op::Write => {
                let data = vec![request.byte; length as usize];
                let flags = flags & Flags::FUA;
                let call = Call::new(op, offset, length).with_flags(flags);
                let result = self.submit(call, &data).map(drop);
                self.changed(request, result, &data)
            }
            Op::Zero => {
                let flags = flags & (Flags::FUA | Flags::MAY_TRIM | Flags::FAST_ZERO);
                let call = Call::new(op, offset, length).with_flags(flags);
                let result = self.submit(call, &[]).map(drop);
                if result.as_ref().is_err_and(|e| e.is_unsupported()) && flags.contains(Flags::FAST_ZERO) {
                    self.answered(Answered::Error(Errno::EOPNOTSUPP));
                    return Ok(());
                }
                self.changed(request, result, &vec![0; length as usize])
            }
            Op::Trim => {
                let call = Call::new(op, offset, length).with_flags(flags & Flags::FUA);
                self.submit(call, &[]).map_err(|e| TestCaseError::fail(e.to_string()))?;
                let now = self.read(offset, length)?;
                self.answered(Answered::Bytes(now.clone()));
                for (i, (before, now)) in self.bytes[range.clone()].iter().zip(&now).enumerate() {
                    prop_assert!(before == now || *now == 0, "byte {} after the trim is {}", i, now);
                }
                // What a trim has left alone need not be durable.
                let changed: Vec<_> =
                    range.clone().filter(|i| self.bytes[*i] != now[*i - range.start]).collect();
                self.bytes[range].copy_from_slice(&now);
                self.check_durable(flags, changed)
            }
            Op::Flush => {
                self.submit(Call::new(op, 0, 0), &[]).map_err(|e| TestCaseError::fail(e.to_string()))?;
                self.check_durable(Flags::FUA, 0..self.bytes.len())
            }
            Op::Cache => self
                .submit(Call::new(op, offset, length), &[])
                .map(drop)
                .map_err(|e| TestCaseError::fail(e.to_string())),
            Op::Extents => self.check_extents(request),
        }
    }

    /// A write or zero has ended: the model follows it.
    fn changed(&mut self, request: Request, result: Result<()>, data: &[u8]) -> Check {
        let range = self.range(request);
        let outside = (range.clone()).zip(data).any(|(i, b)| *b != 0 && self.view.at(i as u64).is_none());
        match result {
            Ok(()) => {
                prop_assert!(!outside, "data was taken where there is no disk");
                self.bytes[range.clone()].copy_from_slice(data);
                self.check_durable(request.flags, range)
            }
            Err(e) => {
                prop_assert!(outside, "unexpected error: {}", e);
                prop_assert_eq!(e.errno(), Errno::ENOSPC);
                self.answered(Answered::Error(e.errno()));
                // What the range holds after a failure is not defined.
                let now = self.read(request.offset, request.length)?;
                self.bytes[range].copy_from_slice(&now);
                Ok(())
            }
        }
    }

    /// After FUA the test disk would survive a power cut.
    fn check_durable(&self, flags: Flags, bytes: impl IntoIterator<Item = usize>) -> Check {
        if !self.view.through || !flags.contains(Flags::FUA) {
            return Ok(());
        }
        let (data, stable) = (self.disk.contents(), self.disk.stable());
        for i in bytes {
            if let Some(at) = self.view.at(i as u64) {
                prop_assert_eq!(data[at as usize], stable[at as usize], "byte {} is not durable", i);
            }
        }
        Ok(())
    }

    fn check_extents(&mut self, request: Request) -> Check {
        let Request { offset, length, flags, .. } = request;
        let flags = flags & Flags::REQ_ONE;
        let extents = extents(self.session, length, offset, flags)
            .map_err(|e| TestCaseError::fail(format!("extents: {e}")))?;
        prop_assert!(!extents.is_empty(), "no extents");
        prop_assert!(flags.is_empty() || extents.len() == 1, "one was asked for");
        let mut at = offset;
        for extent in &extents {
            prop_assert_eq!(extent.offset, at, "contiguous");
            at = extent.end();
            let end = if flags.is_empty() { self.bytes.len() as u64 } else { offset + length };
            prop_assert!(at <= end, "within the disk");
            let bytes = &self.bytes[extent.offset as usize..at as usize];
            prop_assert!(!extent.zero || bytes.iter().all(|b| *b == 0), "not zero: {:?}", extent);
        }
        self.answered(Answered::Extents(extents));
        Ok(())
    }
}

#[test]
fn the_model_passes_without_filters() {
    check_model(&[], &[], 40_000, &View::same(40_000));
}

#[test]
#[should_panic(expected = "Test failed")]
fn the_model_notices_a_wrong_view() {
    check_model(&[], &[], 40_000, &View { map: |at, _| Some(at ^ 1), ..View::same(40_000) });
}
