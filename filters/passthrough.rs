//! The open handle of filters that change how the server runs, and no request.

use nbdkit_core::{Caps, Handle, Next, Outcome, Request, Result};

/// Passes everything on, also what saves copies and waits.
pub(crate) struct Passthrough(pub(crate) Next);

impl Handle for Passthrough {
    fn next(&self) -> Option<&Next> {
        Some(&self.0)
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        self.0.pass(request)
    }

    fn capabilities(&self) -> Result<Caps> {
        Ok(self.0.capabilities().with_skip_holes(self.0.caps().skip_holes))
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::{Call, Op};

    use crate::testing::{Answer, Spec, session, started};

    /// Whether a read may be started below a filter, and where it began.
    fn submitted(filter: &str, params: &[(&str, &str)]) -> Option<u64> {
        let disk = Spec { later: true, ..Spec::default() }.disk();
        let session = session(&disk, filter, params);
        disk.take_calls();
        let Answer::Started(data) = started(&session, Call::new(Op::Read, 1000, 100), &[]) else {
            return None;
        };
        let offset = disk.calls()[0].offset;
        assert!(data.unwrap() == disk.contents()[offset as usize..][..100]);
        Some(offset)
    }

    #[test]
    fn filters_that_do_not_see_the_data_let_requests_be_started() {
        for filter in
            ["exitlast", "exportname", "limit", "nocache", "noextents", "nofilter", "nozero", "rotational"]
        {
            assert_eq!(submitted(filter, &[]), Some(1000), "{filter}");
        }
        assert_eq!(submitted("offset", &[("offset", "512")]), Some(1512));
        assert_eq!(submitted("stats", &[("statsfile", "/dev/null")]), Some(1000));
        for (filter, params) in [("delay", &[("rdelay", "1us")][..]), ("noparallel", &[])] {
            assert_eq!(submitted(filter, params), None, "{filter}");
        }
    }
}
