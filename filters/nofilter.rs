//! Does nothing: what a layer costs, and a stand-in in scripts that choose a filter.

use nbdkit_core::{Below, Filter, Handle, Info, Open, Result};

use crate::passthrough::Passthrough;

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(NoFilter)
}

struct NoFilter;

impl Filter for NoFilter {
    fn info(&self) -> Info {
        Info::bundled("nofilter", "nbdkit nofilter filter", "")
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Passthrough(next.open(open)?)))
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::{Errno, Flags, Op, ThreadModel};

    use crate::testing::{Call, Spec, View, chain, check_model, lent, needs_thread, session};

    #[test]
    fn model() {
        check_model(&["nofilter"], &[], 20_000, &View::same(20_000));
    }

    #[test]
    fn capabilities_are_those_below() {
        for spec in [Spec::sized(1000), Spec::emulated(1000), Spec::minimal(1000)] {
            let disk = spec.disk();
            let bare =
                crate::testing::open(&chain(&disk, &[], &[]).unwrap(), crate::testing::client(), false)
                    .unwrap();
            let filtered = session(&disk, "nofilter", &[]);
            assert_eq!(format!("{:?}", filtered.caps()), format!("{:?}", bare.caps()));
        }
    }

    #[test]
    fn each_request_arrives_once_with_its_flags() {
        let disk = Spec::default().disk();
        let session = session(&disk, "nofilter", &[]);
        session.pwrite(&[1; 10], 5, Flags::FUA).unwrap();
        session.zero(512, 1024, Flags::FAST_ZERO | Flags::MAY_TRIM).unwrap();
        let call = |op, offset, length, flags| Call::new(op, offset, length).with_flags(flags);
        assert_eq!(
            disk.calls(),
            [
                call(Op::Write, 5, 10, Flags::FUA),
                call(Op::Zero, 1024, 512, Flags::FAST_ZERO | Flags::MAY_TRIM)
            ]
        );
    }

    #[test]
    fn errors_keep_their_errno() {
        let spec = Spec { fail_after: Some(0), ..Spec::default() };
        let session = session(&spec.disk(), "nofilter", &[]);
        assert_eq!(session.flush().unwrap_err().errno(), Errno::EIO);
    }

    #[test]
    fn loans_and_reads_without_a_wait_pass() {
        let spec = Spec { blocks: |op| op != Op::Read, ..Spec::default() };
        let session = session(&spec.disk(), "nofilter", &[]);
        assert_eq!(lent(&session, Op::Write, 512, 512), Some(512));
        assert!(!needs_thread(&session, Op::Read) && needs_thread(&session, Op::Write));
    }

    #[test]
    fn the_thread_model_is_that_below() {
        let spec = Spec { thread_model: ThreadModel::SerializeRequests, ..Spec::default() };
        let chain = chain(&spec.disk(), &["nofilter"], &[]).unwrap();
        assert_eq!(chain.thread_model(), ThreadModel::SerializeRequests);
    }
}
