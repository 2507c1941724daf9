//! The byte-array model: random requests go through a session and into an array, and must not differ.

use std::sync::{Arc, mpsc::channel};

use nbdkit_core::{Completion, Errno, Flags, Io, Op, Result, Session, Support};
use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError, TestRunner},
};

use super::{Disk, Spec, chain, client, open};

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
/// every answer with a byte array that `view` describes.
pub(crate) fn check_model(filters: &[&str], params: &[(&str, &str)], disk_size: u64, view: &View) {
    let later = Spec { later: true, ..Spec::sized(disk_size) };
    for spec in [Spec::sized(disk_size), later, Spec::emulated(disk_size), Spec::minimal(disk_size)] {
        check_model_over(&spec, filters, params, view);
    }
}

/// As [`check_model`], over one kind of disk.
pub(crate) fn check_model_over(spec: &Spec, filters: &[&str], params: &[(&str, &str)], view: &View) {
    let config = Config { cases: 48, failure_persistence: None, ..Config::default() };
    let result = TestRunner::new(config).run(&requests(view.size), |requests| {
        let disk = spec.clone().disk();
        let chain = chain(&disk, filters, params).unwrap();
        let session = Arc::new(open(&chain, client(), false).unwrap());
        Model::new(&session, &disk, view)?.run(&requests)
    });
    if let Err(failure) = result {
        panic!("{filters:?} {params:?} over {}: {failure}", summary(spec));
    }
}

fn summary(spec: &Spec) -> String {
    format!("{:?}", Spec { data: Vec::new(), ..spec.clone() })
}

struct Model<'a> {
    session: &'a Arc<Session>,
    disk: &'a Disk,
    view: &'a View,
    bytes: Vec<u8>,
    original: Vec<u8>,
}

type Check = std::result::Result<(), TestCaseError>;

impl<'a> Model<'a> {
    fn new(
        session: &'a Arc<Session>,
        disk: &'a Disk,
        view: &'a View,
    ) -> std::result::Result<Self, TestCaseError> {
        let original = disk.contents();
        let bytes = (0..view.size).map(|i| view.at(i).map_or(0, |at| original[at as usize])).collect();
        prop_assert_eq!(session.size(), view.size, "size");
        Ok(Model { session, disk, view, bytes, original })
    }

    fn run(mut self, requests: &[Request]) -> Check {
        for request in requests {
            self.step(*request)
                .map_err(|e| TestCaseError::fail(format!("{request:?} of {requests:#?}: {e}")))?;
        }
        let size = self.view.size;
        prop_assert!(self.read(0, size)? == self.bytes, "the disk at the end");
        self.check_below()
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

    fn read(&self, offset: u64, length: u64) -> std::result::Result<Vec<u8>, TestCaseError> {
        if let Some(result) = self.submit(Io::Read(length as usize), offset) {
            return result.map_err(|e| TestCaseError::fail(format!("read: {e}")));
        }
        let mut buf = vec![0xaa; length as usize];
        self.session.pread(&mut buf, offset).map_err(|e| TestCaseError::fail(format!("read: {e}")))?;
        Ok(buf)
    }

    /// Runs a request without a thread of ours, if the chain takes it.
    fn submit(&self, io: Io<'_>, offset: u64) -> Option<Result<Vec<u8>>> {
        let (tell, told) = channel();
        let done = Completion::new(move |result| {
            let _ = tell.send(result.map(<[u8]>::to_vec));
            None
        });
        match self.session.submit(io, offset, done) {
            None => told.recv().ok(),
            Some(done) => {
                done.withdraw();
                None
            }
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
                Ok(())
            }
            Op::Write => {
                let data = vec![request.byte; length as usize];
                let flags = flags & Flags::FUA;
                let result = match self.submit(Io::Write(&data, flags), offset) {
                    Some(result) => result.map(drop),
                    None => self.session.pwrite(&data, offset, flags),
                };
                self.changed(request, result, &data)
            }
            Op::Zero => {
                let flags = flags & (Flags::FUA | Flags::MAY_TRIM | Flags::FAST_ZERO);
                let result = self.session.zero(length, offset, flags);
                if result.as_ref().is_err_and(|e| e.is_unsupported()) && flags.contains(Flags::FAST_ZERO) {
                    return Ok(());
                }
                self.changed(request, result, &vec![0; length as usize])
            }
            Op::Trim => {
                self.session
                    .trim(length, offset, flags & Flags::FUA)
                    .map_err(|e| TestCaseError::fail(e.to_string()))?;
                let now = self.read(offset, length)?;
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
                self.session.flush().map_err(|e| TestCaseError::fail(e.to_string()))?;
                self.check_durable(Flags::FUA, 0..self.bytes.len())
            }
            Op::Cache => self.session.cache(length, offset).map_err(|e| TestCaseError::fail(e.to_string())),
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

    fn check_extents(&self, request: Request) -> Check {
        let Request { offset, length, flags, .. } = request;
        let flags = flags & Flags::REQ_ONE;
        let extents = self
            .session
            .extents(length, offset, flags)
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
