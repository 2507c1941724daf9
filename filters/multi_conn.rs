//! Offers, makes or hides the promise that a flush on one connection covers them all (`CAN_MULTI_CONN`).
//!
//! Where the layers below do not keep it, it is made by flushing every connection when a client flushes one. That is
//! dear, so it is remembered which connections have anything to flush.

use std::{
    ffi::{OsStr, OsString},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
};

use anyhow::bail;
use nbdkit_core::{
    Below, Errno, Error, Filter, Flags, Handle, Info, Loan, Next, NextConfig, Op, Open, Result, Support,
    ThreadModel, params,
};
use parking_lot::{Mutex, MutexGuard, RwLock};

const HELP: &str = "\
multi-conn-mode=<MODE>           'auto' (default), 'emulate', 'plugin', 'disable' or 'unsafe'.
multi-conn-track-dirty=<LEVEL>   'connection' (default), 'fast' or 'off': which flushes are left out.
multi-conn-exportname=<BOOL>     Whether connections to other exports need no flush (default false).";

pub(crate) fn new() -> Box<dyn Filter> {
    Box::new(MultiConn {
        mode: Mode::Auto,
        track: Track::Connection,
        by_name: false,
        model: ThreadModel::Parallel,
        groups: Mutex::default(),
    })
}

struct MultiConn {
    mode: Mode,
    track: Track,
    by_name: bool,
    model: ThreadModel,
    /// One for each export name, or a single one.
    groups: Mutex<Vec<(OsString, Arc<Group>)>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// The best that is possible.
    Auto,
    /// The promise is made, and kept by this filter.
    Emulate,
    /// As the layers below say.
    Plugin,
    /// The promise is not made.
    Disable,
    /// The promise is made, and not kept.
    Unsafe,
}

/// Which flushes are known to be needless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Track {
    /// Those of a connection that has nothing to flush.
    Connection,
    /// Those after which nobody has written.
    Fast,
    /// None.
    Off,
}

/// Connections that see one disk.
#[derive(Default)]
struct Group {
    members: RwLock<Vec<Arc<Member>>>,
    /// Somebody has written since the last flush.
    dirty: AtomicBool,
}

/// One connection.
struct Member {
    next: Next,
    dirty: AtomicU8,
    /// Taken by each request where the layers below serve one at a time on a connection: flushes come from others.
    turn: Option<Mutex<()>>,
}

/// The connection may hold data that was read before others wrote.
const READ: u8 = 1;
/// The connection may hold data that it was given to write.
const WRITTEN: u8 = 2;

impl Member {
    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        self.turn.as_ref().map(Mutex::lock)
    }

    /// Flushes. What comes in meanwhile is dirty again.
    fn flush(&self) -> Result<()> {
        let was = self.dirty.swap(0, Ordering::AcqRel);
        let _turn = self.turn();
        self.next.flush().inspect_err(|_| {
            self.dirty.fetch_or(was, Ordering::AcqRel);
        })
    }
}

impl MultiConn {
    fn group(&self, name: &OsStr) -> Arc<Group> {
        let name = if self.by_name { name } else { OsStr::new("") };
        let mut groups = self.groups.lock();
        groups.retain(|(_, group)| Arc::strong_count(group) > 1);
        if let Some((_, group)) = groups.iter().find(|(other, _)| other == name) {
            return group.clone();
        }
        let group = Arc::<Group>::default();
        groups.push((name.to_owned(), group.clone()));
        group
    }
}

impl Filter for MultiConn {
    fn info(&self) -> Info {
        Info::bundled("multi-conn", "nbdkit multi-conn filter", HELP)
    }

    fn config(&mut self, key: &str, value: &OsStr, next: &mut NextConfig<'_>) -> anyhow::Result<()> {
        match key {
            "multi-conn-mode" => {
                self.mode = match params::text(value)? {
                    "auto" => Mode::Auto,
                    "emulate" => Mode::Emulate,
                    "plugin" => Mode::Plugin,
                    "disable" => Mode::Disable,
                    "unsafe" => Mode::Unsafe,
                    other => bail!(
                        "unknown multi-conn-mode '{other}': use auto, emulate, plugin, disable or unsafe"
                    ),
                }
            }
            "multi-conn-track-dirty" => {
                self.track = match params::text(value)? {
                    "connection" | "conn" => Track::Connection,
                    "fast" => Track::Fast,
                    "off" => Track::Off,
                    other => {
                        bail!("unknown multi-conn-track-dirty '{other}': use connection, fast or off")
                    }
                }
            }
            "multi-conn-exportname" | "multi-conn-export-name" => self.by_name = params::boolean(value)?,
            _ => return next(key, value),
        }
        Ok(())
    }

    fn get_ready(&mut self, model: ThreadModel) -> anyhow::Result<()> {
        self.model = model;
        Ok(())
    }

    fn open(&self, next: &Below, open: &Open) -> Result<Box<dyn Handle>> {
        let next = next.open(open)?;
        let mode = match self.mode {
            Mode::Auto if self.model == ThreadModel::SerializeConnections => Mode::Disable,
            Mode::Auto if next.caps().multi_conn => Mode::Plugin,
            Mode::Auto => Mode::Emulate,
            chosen => chosen,
        };
        if mode == Mode::Emulate && !next.caps().flush {
            return Err(Error::new(
                Errno::EINVAL,
                format!(
                    "multi-conn cannot be emulated, since {} does not offer flush: use another multi-conn-mode",
                    next.name()
                ),
            ));
        }
        let turn =
            (self.model == ThreadModel::SerializeRequests && mode == Mode::Emulate).then(Mutex::default);
        let member = Arc::new(Member { next, dirty: AtomicU8::new(0), turn });
        let group = self.group(&open.export_name);
        group.members.write().push(member.clone());
        Ok(Box::new(Shared { mode, track: self.track, group, member }))
    }
}

struct Shared {
    mode: Mode,
    track: Track,
    group: Arc<Group>,
    member: Arc<Member>,
}

impl Shared {
    /// From now on nobody flushes this connection. Waits for one who does.
    fn leave(&self) {
        self.group.members.write().retain(|member| !Arc::ptr_eq(member, &self.member));
    }

    fn reads(&self) {
        self.member.dirty.fetch_or(READ, Ordering::AcqRel);
    }

    /// Runs a request that writes, and the flush that FUA means when that must reach every connection.
    fn write(&self, flags: Flags, request: impl FnOnce(&Next, Flags) -> Result<()>) -> Result<()> {
        let everywhere = self.mode == Mode::Emulate && flags.contains(Flags::FUA);
        let below = if everywhere { flags - Flags::FUA } else { flags };
        let turn = self.member.turn();
        let result = request(&self.member.next, below);
        drop(turn);
        // After the request: a flush that was at work meanwhile need not have covered it.
        self.member.dirty.fetch_or(WRITTEN, Ordering::AcqRel);
        self.group.dirty.store(true, Ordering::Release);
        result?;
        if everywhere { self.flush_all() } else { Ok(()) }
    }

    fn flush_all(&self) -> Result<()> {
        let group_dirty = self.group.dirty.swap(false, Ordering::AcqRel);
        for member in &*self.group.members.read() {
            let dirty = member.dirty.load(Ordering::Acquire);
            let needed = match self.track {
                Track::Off => true,
                Track::Fast => group_dirty,
                Track::Connection => dirty & WRITTEN != 0 || (group_dirty && dirty & READ != 0),
            };
            if needed {
                member.flush().inspect_err(|_| self.group.dirty.store(true, Ordering::Release))?;
            }
        }
        Ok(())
    }

    fn flush_own(&self) -> Result<()> {
        let group_dirty = self.group.dirty.load(Ordering::Acquire);
        let needed = match self.track {
            Track::Off => true,
            Track::Fast => group_dirty,
            Track::Connection => group_dirty || self.member.dirty.load(Ordering::Acquire) & WRITTEN != 0,
        };
        if !needed {
            return Ok(());
        }
        // One flush is enough for all where the layers below say so, or the user does.
        let covers_all = self.track == Track::Fast || self.member.next.caps().multi_conn;
        if !covers_all {
            return self.member.flush().inspect_err(|_| self.group.dirty.store(true, Ordering::Release));
        }
        // What comes in while the flush is under way is dirty again.
        self.group.dirty.store(false, Ordering::Release);
        let members: Vec<_> = self.group.members.read().clone();
        let was: Vec<_> = members.iter().map(|member| member.dirty.swap(0, Ordering::AcqRel)).collect();
        self.member.flush().inspect_err(|_| {
            for (member, was) in members.iter().zip(was) {
                member.dirty.fetch_or(was, Ordering::AcqRel);
            }
            self.group.dirty.store(true, Ordering::Release);
        })
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.leave();
    }
}

impl Handle for Shared {
    fn next(&self) -> Option<&Next> {
        Some(&self.member.next)
    }

    fn finalize(&self) -> Result<()> {
        self.leave();
        Ok(())
    }

    fn can_multi_conn(&self) -> Result<bool> {
        Ok(match self.mode {
            Mode::Emulate | Mode::Unsafe => true,
            Mode::Disable => false,
            Mode::Plugin | Mode::Auto => self.member.next.caps().multi_conn,
        })
    }

    fn can_fua(&self) -> Result<Support> {
        let caps = self.member.next.caps();
        Ok(if self.mode == Mode::Emulate && caps.write { Support::Emulate } else { caps.fua })
    }

    fn pread(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.reads();
        let _turn = self.member.turn();
        self.member.next.pread(buf, offset)
    }

    fn pread_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool> {
        if self.member.turn.is_some() {
            return Ok(false);
        }
        self.reads();
        self.member.next.pread_nowait(buf, offset)
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        self.write(flags, |next, flags| next.pwrite(buf, offset, flags))
    }

    fn flush(&self) -> Result<()> {
        if self.mode == Mode::Emulate { self.flush_all() } else { self.flush_own() }
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.write(flags, |next, flags| next.trim(length, offset, flags))
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.write(flags, |next, flags| next.zero(length, offset, flags))
    }

    fn extents(
        &self,
        length: u64,
        offset: u64,
        flags: Flags,
        extents: &mut nbdkit_core::Extents,
    ) -> Result<()> {
        let _turn = self.member.turn();
        self.member.next.extents(length, offset, flags, extents)
    }

    fn cache(&self, length: u64, offset: u64) -> Result<()> {
        self.reads();
        let _turn = self.member.turn();
        self.member.next.cache(length, offset)
    }

    fn may_block(&self, op: Op) -> bool {
        let next = &self.member.next;
        let flushes = self.mode == Mode::Emulate && matches!(op, Op::Write | Op::Trim | Op::Zero);
        self.member.turn.is_some() || next.may_block(op) || (flushes && next.may_block(Op::Flush))
    }

    /// Who writes to a loan is not seen to write.
    fn loan(&self, offset: u64, length: u64) -> Option<Loan<'_>> {
        self.reads();
        self.member.next.loan(offset, length).map(|loan| Loan { writable: false, ..loan })
    }
}

#[cfg(test)]
mod tests;
