//! Hides which parts of the disk are holes or zeroes: clients see data everywhere.

use nbdkit_core::{Below, Caps, Filter, Handle, Info, Next, Open, Outcome, Request, Result};

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(NoExtents)
}

struct NoExtents;

impl Filter for NoExtents {
    fn info(&self) -> Info {
        Info::bundled("noextents", "nbdkit noextents filter", "")
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(Box::new(Opaque { next: next.open(open)? }))
    }
}

struct Opaque {
    next: Next,
}

impl Handle for Opaque {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn capabilities(&self) -> Result<Caps> {
        Ok(self.next.capabilities().with_extents(false))
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        self.next.pass(request)
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::{Flags, Op};

    use crate::testing::{Spec, View, check_model, lent, needs_thread, session};

    #[test]
    fn model() {
        check_model(&["noextents"], &[], 20_000, &View::same(20_000));
    }

    #[test]
    fn everything_is_data_and_nobody_is_asked() {
        let disk = Spec { data: vec![0; 8192], ..Spec::default() }.disk();
        let session = session(&disk, "noextents", &[]);
        assert!(!session.caps().extents);
        let extents = session.extents(8000, 100, Flags::empty()).unwrap();
        let found: Vec<_> = extents.iter().map(|e| (e.offset, e.length, e.kind())).collect();
        assert_eq!(found, [(100, 8000, 0)]);
        assert_eq!(disk.count(Op::Extents), 0);
    }

    #[test]
    fn loans_and_reads_without_a_wait_pass() {
        let spec = Spec { blocks: |op| op != Op::Read, ..Spec::default() };
        let session = session(&spec.disk(), "noextents", &[]);
        assert_eq!(lent(&session, Op::Write, 512, 512), Some(512));
        assert!(!needs_thread(&session, Op::Read) && needs_thread(&session, Op::Write));
    }
}
