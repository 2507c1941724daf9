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
use nbdkit_core::{Below, Errno, Error, Filter, Flags, Handle, Info, Loan, Next, NextConfig, Open, Result};
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

    fn can_write(&self) -> Result<bool> {
        Ok(false)
    }

    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        self.next.pread_nowait(buf, offset)
    }

    fn loan(&self, offset: u64, length: u64) -> Option<Loan<'_>> {
        read_loan(&self.next, offset, length)
    }
}

struct Switched {
    file: Arc<Path>,
    next: Next,
}

impl Switched {
    /// The next layer, for a request that writes.
    fn writable(&self) -> Result<&Next> {
        if access(&*self.file, Access::EXISTS).is_ok() {
            return Err(Error::new(
                Errno::EPERM,
                format!("the disk is read-only while {} exists", self.file.display()),
            ));
        }
        Ok(&self.next)
    }
}

impl Handle for Switched {
    fn next(&self) -> Option<&Next> {
        Some(&self.next)
    }

    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        self.next.pread_nowait(buf, offset)
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        self.writable()?.pwrite(buf, offset, flags)
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.writable()?.trim(length, offset, flags)
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.writable()?.zero(length, offset, flags)
    }

    fn loan(&self, offset: u64, length: u64) -> Option<Loan<'_>> {
        read_loan(&self.next, offset, length)
    }
}

/// What the next layer lends, but only to read from.
fn read_loan(next: &Next, offset: u64, length: u64) -> Option<Loan<'_>> {
    next.loan(offset, length).map(|loan| Loan { writable: false, ..loan })
}

#[cfg(test)]
mod tests {
    use nbdkit_core::{Op, Support};

    use super::*;
    use crate::testing::{Spec, View, chain, check_model, client, open, session};

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
    fn loans_are_to_read_from() {
        let spec = Spec { may_block: true, cached: true, ..Spec::default() };
        for params in [&[][..], &[("readonly-file", "/nonexistent")]] {
            let session = session(&spec.clone().disk(), "readonly", params);
            let loan = session.loan(512, 512).unwrap();
            assert_eq!((loan.offset, loan.writable), (512, false));
            assert!(session.may_block(Op::Read));
            assert!(session.pread_nowait(&mut [0; 8], 0).unwrap());
        }
    }
}
