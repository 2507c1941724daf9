//! Checks that what is written is there already, and changes nothing: for testing programs that copy.

use nbdkit_core::{
    Below, Caps, Errno, Error, Extents, Filter, Flags, Handle, Info, Next, Op, Open, Outcome, Request, Result,
};

use crate::compare::{equals, holds, is_zero};

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(CheckWrite)
}

struct CheckWrite;

impl Filter for CheckWrite {
    fn info(&self) -> Info {
        Info::bundled("checkwrite", "nbdkit checkwrite filter", "")
    }

    fn opens_readonly(&self) -> bool {
        true
    }

    /// The layers below are opened read-only. They would forbid writes, but this filter has none for them.
    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(&Open { readonly: true, ..open.clone() })?;
        Ok(Box::new(Checked { next }))
    }
}

struct Checked {
    next: Next,
}

impl Checked {
    fn differ(&self, what: &str, length: u64, offset: u64) -> Error {
        Error::new(Errno::EIO, format!("{what} of {length} bytes at {offset} is not what the disk holds"))
    }

    /// Fails unless the range is zero. What the layer below knows to be zero is not read.
    fn check_zero(&self, what: &str, length: u64, offset: u64) -> Result<()> {
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let mut extents = Extents::new(at, end);
            if self.next.caps().block_size.minimum > 1 {
                extents.add_data(at, end - at)?;
            } else {
                self.next.extents(end - at, at, Flags::empty(), &mut extents)?;
            }
            for extent in extents.as_slice() {
                let length = extent.end().min(end) - extent.offset;
                if !extent.zero && !holds(&self.next, length, extent.offset, is_zero)? {
                    return Err(self.differ(what, length, extent.offset));
                }
            }
            at = extents.covered_to();
        }
        Ok(())
    }
}

impl Handle for Checked {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn capabilities(&self) -> Result<Caps> {
        Ok(self
            .next
            .capabilities()
            .with_native_writes()
            // Nothing ever changes.
            .with_multi_conn(true)
            .with_skip_holes(self.next.caps().skip_holes))
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        match request.op() {
            Op::Read | Op::Cache | Op::Extents => self.next.pass(request),
            Op::Flush => Outcome::Done(Ok(())),
            Op::Write | Op::Trim | Op::Zero if request.may_wait() => request.run(self),
            Op::Write | Op::Trim | Op::Zero => Outcome::NeedsThread,
        }
    }

    fn pwrite(&self, buf: &[u8], offset: u64, _: Flags) -> Result<()> {
        let length = buf.len() as u64;
        if holds(&self.next, length, offset, equals(buf, offset))? {
            Ok(())
        } else {
            Err(self.differ("the write", length, offset))
        }
    }

    fn trim(&self, length: u64, offset: u64, _: Flags) -> Result<()> {
        self.check_zero("the trim", length, offset)
    }

    fn zero(&self, length: u64, offset: u64, _: Flags) -> Result<()> {
        self.check_zero("the zero", length, offset)
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::{BlockSize, Support};

    use super::*;
    use crate::testing::{
        Answer, Call, Spec, chain, client, lent, needs_thread, open, pattern, read_inline, session, started,
    };

    const SIZE: u64 = 20_000;

    fn kinds() -> [Spec; 4] {
        let block_size = BlockSize { minimum: 512, preferred: 512, maximum: 4096 };
        [
            Spec::sized(SIZE),
            Spec::emulated(SIZE),
            Spec::minimal(SIZE),
            Spec { block_size, ..Spec::sized(20_480) },
        ]
    }

    #[test]
    fn what_is_there_can_be_written_and_nothing_else() {
        for spec in kinds() {
            let disk = spec.disk();
            let session = session(&disk, "checkwrite", &[]);
            let before = disk.contents();
            session.pwrite(&before, 0, Flags::FUA).unwrap();
            session.pwrite(&before[600..9000], 600, Flags::empty()).unwrap();
            for wrong in [0, 600, 8999, 19_999] {
                let mut buf = before[..SIZE as usize].to_vec();
                buf[wrong] ^= 1;
                assert_eq!(session.pwrite(&buf, 0, Flags::empty()).unwrap_err().errno(), Errno::EIO);
                let one = [before[wrong] ^ 1];
                assert!(session.pwrite(&one, wrong as u64, Flags::empty()).is_err(), "{wrong}");
            }
            assert!(disk.calls().iter().all(|call| call.op == Op::Read), "nothing is written");
            assert_eq!(disk.contents(), before);
        }
    }

    #[test]
    fn zero_and_trim_need_zeroes() {
        // In the test pattern every third unit of 512 bytes is zero.
        for spec in kinds() {
            let disk = spec.disk();
            let session = session(&disk, "checkwrite", &[]);
            session.zero(512, 0, Flags::MAY_TRIM).unwrap();
            session.zero(100, 1600, Flags::FAST_ZERO).unwrap();
            session.trim(512, 1536, Flags::FUA).unwrap();
            for (length, offset) in [(513, 0), (1, 512), (2, 1535), (SIZE, 0)] {
                let error = session.zero(length, offset, Flags::empty()).unwrap_err();
                assert_eq!(error.errno(), Errno::EIO, "{length}@{offset}");
                assert!(session.trim(length, offset, Flags::empty()).is_err(), "{length}@{offset}");
            }
            assert!(disk.calls().iter().all(|call| matches!(call.op, Op::Read | Op::Extents)));
        }
    }

    #[test]
    fn holes_are_not_read() {
        let disk = Spec { data: vec![0; 1 << 20], ..Spec::default() }.disk();
        session(&disk, "checkwrite", &[]).zero(1 << 20, 0, Flags::empty()).unwrap();
        assert_eq!((disk.count(Op::Read), disk.count(Op::Extents)), (0, 1));
    }

    #[test]
    fn everything_that_writes_is_offered() {
        for spec in kinds() {
            let disk = Spec { write: false, ..spec }.disk();
            let session = session(&disk, "checkwrite", &[]);
            let caps = session.caps();
            assert!(caps.write && caps.flush && caps.trim && caps.fast_zero && caps.multi_conn);
            assert_eq!((caps.zero, caps.fua), (Support::Native, Support::Native));
            session.flush().unwrap();
            assert_eq!(disk.count(Op::Flush), 0);
        }
    }

    #[test]
    fn the_layers_below_are_opened_read_only() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let params = [("logfile", log.to_str().unwrap())];
        let chain = chain(&Spec::default().disk(), &["checkwrite", "log"], &params).unwrap();
        open(&chain, client(), false).unwrap();
        let log = std::fs::read_to_string(&log).unwrap();
        assert!(log.contains(" write=0 "), "{log}");
    }

    #[test]
    fn an_error_below_is_not_a_difference() {
        let disk = Spec { fail_after: Some(0), ..Spec::sized(SIZE) }.disk();
        let session = session(&disk, "checkwrite", &[]);
        let error = session.pwrite(&pattern(512), 0, Flags::empty()).unwrap_err();
        assert_eq!(error.to_string(), "the test disk fails from here on");
    }

    #[test]
    fn loans_are_to_read_from() {
        let session =
            session(&Spec { blocks: |op| op != Op::Read, ..Spec::default() }.disk(), "checkwrite", &[]);
        assert_eq!(lent(&session, Op::Read, 0, 512), Some(0));
        assert_eq!(lent(&session, Op::Write, 0, 512), None);
        assert!(read_inline(&session, &mut [0; 8], 0).unwrap());
        let waits = |op| needs_thread(&session, op);
        assert!(waits(Op::Write) && waits(Op::Trim) && !waits(Op::Flush));
    }

    #[test]
    fn reads_may_be_started() {
        let disk = Spec { later: true, ..Spec::default() }.disk();
        let session = session(&disk, "checkwrite", &[]);
        let Answer::Started(data) = started(&session, Call::new(Op::Read, 600, 100), &[]) else {
            panic!("the read was not started");
        };
        assert_eq!(data.unwrap(), disk.contents()[600..700]);
    }
}
