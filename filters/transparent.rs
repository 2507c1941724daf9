//! The open handle of filters that change how the server runs, and no request.

use nbdkit_core::{Completion, Handle, Io, Loan, Next, Result};

/// Passes everything on, also what saves copies and waits.
pub(crate) struct Transparent(pub(crate) Next);

impl Handle for Transparent {
    fn next(&self) -> Option<&Next> {
        Some(&self.0)
    }

    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        self.0.pread_nowait(buf, offset)
    }

    fn may_skip_holes(&self) -> bool {
        self.0.may_skip_holes()
    }

    fn submit(&self, io: Io<'_>, offset: u64, done: Completion) -> Option<Completion> {
        self.0.submit(io, offset, done)
    }

    fn loan(&self, offset: u64, length: u64) -> Option<Loan<'_>> {
        self.0.loan(offset, length)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc::channel};

    use nbdkit_core::{Completion, Io};

    use crate::testing::{Spec, chain, client, open};

    /// Whether a read below a filter may end later, and where it began.
    fn submitted(filter: &str, params: &[(&str, &str)]) -> Option<u64> {
        let disk = Spec { later: true, ..Spec::default() }.disk();
        let chain = chain(&disk, &[filter], params).unwrap();
        let session = Arc::new(open(&chain, client(), false).unwrap());
        disk.take_calls();
        let (tell, told) = channel();
        let done = Completion::new(move |result| {
            tell.send(result.map(<[u8]>::to_vec)).unwrap();
            None
        });
        if let Some(done) = session.submit(Io::Read(100), 1000, done) {
            done.withdraw();
            return None;
        }
        let data = told.recv().unwrap().unwrap();
        let offset = disk.calls()[0].offset;
        assert!(data == disk.contents()[offset as usize..][..100]);
        Some(offset)
    }

    #[test]
    fn filters_that_look_on_or_shift_let_requests_end_later() {
        for filter in
            ["exitlast", "exportname", "limit", "nocache", "noextents", "nofilter", "nozero", "rotational"]
        {
            assert_eq!(submitted(filter, &[]), Some(1000), "{filter}");
        }
        assert_eq!(submitted("offset", &[("offset", "512")]), Some(1512));
        assert_eq!(submitted("stats", &[("statsfile", "/dev/null")]), Some(1000));
        for (filter, params) in [("delay", &[("rdelay", "1us")][..]), ("swab", &[]), ("noparallel", &[])] {
            assert_eq!(submitted(filter, params), None, "{filter}");
        }
    }
}
