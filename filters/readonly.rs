//! Makes the disk read-only: for good, or for as long as a file exists.
//!
//! For good, the layers below are opened read-only, so that they take no write lock and need no write permission.
//! With a file, the disk is offered as it is and the file is looked for at each request that would write: a client
//! is told once what an export can do, at the start.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use nbdkit_core::{
    Below, Caps, Errno, Error, Filter, Handle, Info, Next, NextConfig, Op, Open, Outcome, Request, Result,
};
use rustix::fs::{Access, access};

const HELP: &str = "readonly-file=<PATH>   Read-only only while this file exists (default: always).";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(ReadOnly { file: None })
}

struct ReadOnly {
    /// Absolute, since the server leaves its directory when it goes to the background.
    file: Option<Arc<Path>>,
}

impl Filter for ReadOnly {
    fn info(&self) -> Info {
        Info::bundled("readonly", "nbdkit readonly filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        if key != "readonly-file" {
            return next(key, value);
        }
        let path = std::path::absolute(PathBuf::from(value))
            .with_context(|| format!("readonly-file='{}' is not a path", value.display()))?;
        self.file = Some(path.into());
        Ok(())
    }

    fn opens_readonly(&self) -> bool {
        self.file.is_none()
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        Ok(match &self.file {
            Some(file) => Box::new(Switched { file: file.clone(), next: next.open(open)? }),
            None => Box::new(Always { next: next.open(&Open { readonly: true, ..open.clone() })? }),
        })
    }
}

struct Always {
    next: Next,
}

impl Handle for Always {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn capabilities(&self) -> Result<Caps> {
        Ok(self.next.capabilities().with_write(false))
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        self.next.pass(request)
    }
}

struct Switched {
    file: Arc<Path>,
    next: Next,
}

impl Switched {
    fn check(&self) -> Result<()> {
        if access(&*self.file, Access::EXISTS).is_ok() {
            return Err(Error::new(
                Errno::EPERM,
                format!("the disk is read-only while {} exists", self.file.display()),
            ));
        }
        Ok(())
    }
}

impl Handle for Switched {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        if !matches!(request.op(), Op::Write | Op::Trim | Op::Zero) {
            return self.next.pass(request);
        }
        match self.check() {
            // Each write has to come by here: watched, a loan is for this one only.
            Ok(()) => self.next.watch(self, request, 0),
            Err(e) => Outcome::Done(Err(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use nbdkit_core::{Call, Flags, Support};

    use super::*;
    use crate::testing::{
        Answer, Spec, View, chain, check_model, client, is_watched, lent, needs_thread, open, session,
        started,
    };

    #[test]
    fn model() {
        check_model(&["readonly"], &[], 20_000, &View::same(20_000));
        check_model(&["readonly"], &[("readonly-file", "/nonexistent")], 20_000, &View::same(20_000));
    }

    #[test]
    fn nothing_that_writes_is_offered() {
        let disk = Spec::default().disk();
        let session = session(&disk, "readonly", &[]);
        let caps = session.caps();
        assert!(!caps.write && !caps.trim && caps.zero == Support::None && caps.fua == Support::None);
        assert!(caps.flush && caps.extents && caps.multi_conn && caps.cache == Support::Native);
        assert_eq!(session.pwrite(&[1], 0, Flags::empty()).unwrap_err().errno(), Errno::EPERM);
        assert_eq!(session.zero(1, 0, Flags::empty()).unwrap_err().errno(), Errno::EPERM);
        assert_eq!(session.trim(1, 0, Flags::empty()).unwrap_err().errno(), Errno::EPERM);
        assert!(disk.calls().is_empty());
    }

    #[test]
    fn the_layers_below_are_opened_read_only() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let params = [("logfile", log.to_str().unwrap())];
        let chain = chain(&Spec::default().disk(), &["readonly", "log"], &params).unwrap();
        open(&chain, client(), false).unwrap();
        let log = std::fs::read_to_string(&log).unwrap();
        assert!(log.contains(" write=0 "), "{log}");
    }

    #[test]
    fn a_file_switches_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ro");
        let disk = Spec::default().disk();
        let session = session(&disk, "readonly", &[("readonly-file", path.to_str().unwrap())]);
        assert!(session.caps().write);
        session.pwrite(&[1; 8], 0, Flags::empty()).unwrap();

        std::fs::write(&path, "").unwrap();
        disk.take_calls();
        assert_eq!(session.pwrite(&[2; 8], 0, Flags::empty()).unwrap_err().errno(), Errno::EPERM);
        assert_eq!(session.zero(8, 0, Flags::FAST_ZERO).unwrap_err().errno(), Errno::EPERM);
        assert_eq!(session.trim(8, 0, Flags::empty()).unwrap_err().errno(), Errno::EPERM);
        assert!(disk.take_calls().is_empty());
        let mut buf = [0; 8];
        session.pread(&mut buf, 0).unwrap();
        assert_eq!(buf, [1; 8]);
        session.flush().unwrap();

        std::fs::remove_file(&path).unwrap();
        session.pwrite(&[3; 8], 0, Flags::empty()).unwrap();
        assert_eq!(disk.contents()[..8], [3; 8]);
    }

    #[test]
    fn reads_pass_and_writes_as_long_as_they_may() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ro");
        let spec = Spec { later: true, blocks: |op| op != Op::Read, ..Spec::default() };
        for params in [&[][..], &[("readonly-file", path.to_str().unwrap())]] {
            let session = session(&spec.clone().disk(), "readonly", params);
            let read = started(&session, Call::new(Op::Read, 512, 512), &[]);
            assert!(matches!(read, Answer::Started(Ok(_))), "{read:?}");
            assert!(!needs_thread(&session, Op::Read) && needs_thread(&session, Op::Flush));
            assert_eq!(lent(&session, Op::Read, 512, 512), Some(512));
            let writable = || {
                let write = started(&session, Call::new(Op::Write, 512, 512), &[0; 512]);
                let writes = matches!(write, Answer::Started(Ok(_)));
                assert_eq!(lent(&session, Op::Write, 512, 512).is_some(), writes);
                writes
            };
            assert_eq!(writable(), !params.is_empty());
            std::fs::write(&path, "").unwrap();
            assert!(!writable());
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn a_loan_to_write_to_is_for_one_request() {
        let disk = Spec::default().disk();
        let session = session(&disk, "readonly", &[("readonly-file", "/nonexistent")]);
        assert!(is_watched(&session, Op::Write) && !is_watched(&session, Op::Read));
    }
}
