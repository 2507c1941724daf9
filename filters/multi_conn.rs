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
    Below, Call, Caps, Errno, Error, Filter, Flags, Handle, Info, Next, NextConfig, Op, Open, Outcome,
    Request, Result, Support, ThreadModel, params,
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
/// In the token of a flush: so the group was dirty before.
const GROUP: u8 = 4;
/// Other connections were dirty, too.
const OTHERS: u8 = 8;

impl Member {
    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        self.turn.as_ref().map(Mutex::lock)
    }

    /// The connection holds data again that a flush would have dealt with.
    fn taint(&self, dirty: u8) {
        self.dirty.fetch_or(dirty, Ordering::AcqRel);
    }

    /// Flushes. What comes in meanwhile is dirty again.
    fn flush(&self) -> Result<()> {
        let was = self.dirty.swap(0, Ordering::AcqRel);
        let _turn = self.turn();
        self.next.flush().inspect_err(|_| self.taint(was))
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

    /// The connection holds what a request left with it, or what a flush that failed did not deal with.
    fn taint(&self, token: u8) {
        self.member.taint(token & (READ | WRITTEN));
        if token & OTHERS != 0 {
            // Which of them it was is not known any more.
            self.group.members.read().iter().for_each(|member| member.taint(WRITTEN));
        }
        if token & (WRITTEN | GROUP) != 0 {
            self.group.dirty.store(true, Ordering::Release);
        }
    }

    /// Runs a request that has to be over when this returns.
    fn run_alone(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let _turn = self.member.turn();
        self.member.next.at_once(request)
    }

    /// Runs a request that writes with FUA, which must reach every connection.
    fn write_everywhere(&self, write: impl FnOnce(&Next) -> Result<()>) -> Result<()> {
        let turn = self.member.turn();
        let result = write(&self.member.next);
        drop(turn);
        self.taint(WRITTEN);
        result?;
        self.flush_all()
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

    fn flush_own(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let group_dirty = self.group.dirty.load(Ordering::Acquire);
        let needed = match self.track {
            Track::Off => true,
            Track::Fast => group_dirty,
            Track::Connection => group_dirty || self.member.dirty.load(Ordering::Acquire) & WRITTEN != 0,
        };
        if !needed {
            return Outcome::Done(Ok(()));
        }
        // One flush is enough for all where the layers below say so, or the user does.
        let covers_all = self.track == Track::Fast || self.member.next.caps().multi_conn;
        let group_was = covers_all && self.group.dirty.swap(false, Ordering::AcqRel);
        // What comes in meanwhile is dirty again.
        let mut was = self.member.dirty.swap(0, Ordering::AcqRel) | if group_was { GROUP } else { 0 };
        if covers_all {
            for member in &*self.group.members.read() {
                if member.dirty.swap(0, Ordering::AcqRel) != 0 {
                    was |= OTHERS;
                }
            }
        }
        let outcome = self.member.next.watch(self, request, was.into());
        if matches!(outcome, Outcome::NeedsThread) {
            self.taint(was);
        }
        outcome
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

    fn capabilities(&self) -> Result<Caps> {
        let mut caps = self.member.next.capabilities();
        if self.mode == Mode::Emulate && caps.write {
            caps = caps.with_fua(Support::Emulate);
        }
        Ok(match self.mode {
            Mode::Emulate | Mode::Unsafe => caps.with_multi_conn(true),
            Mode::Disable => caps.with_multi_conn(false),
            Mode::Plugin | Mode::Auto => caps,
        })
    }

    fn submit(&self, request: &mut Request<'_>) -> Outcome<'_> {
        let (op, next) = (request.op(), &self.member.next);
        let emulate = self.mode == Mode::Emulate;
        let writes = matches!(op, Op::Write | Op::Trim | Op::Zero);
        let everywhere = emulate && (op == Op::Flush || (writes && request.flags().contains(Flags::FUA)));
        if (everywhere || self.member.turn.is_some()) && !request.may_wait() {
            return Outcome::NeedsThread;
        }
        if everywhere {
            return request.run(self);
        }
        let token = match op {
            Op::Flush => return self.flush_own(request),
            Op::Read | Op::Cache if emulate => READ,
            _ if writes => WRITTEN,
            _ => 0,
        };
        // What is read is dirty at once: it may be there for others to change before the request has ended.
        self.member.taint(token & READ);
        if self.member.turn.is_some() {
            let outcome = self.run_alone(request);
            self.taint(token);
            return outcome;
        }
        if token == 0 { next.pass(request) } else { next.watch(self, request, token.into()) }
    }

    /// After the request: a flush that was at work meanwhile need not have covered it.
    fn ended(&self, call: &Call, token: u64, result: &mut Result<()>) {
        if call.op != Op::Flush || result.is_err() {
            self.taint(token as u8);
        }
    }

    fn flush(&self) -> Result<()> {
        self.flush_all()
    }

    fn pwrite(&self, buf: &[u8], offset: u64, flags: Flags) -> Result<()> {
        self.write_everywhere(|next| next.pwrite(buf, offset, flags - Flags::FUA))
    }

    fn trim(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.write_everywhere(|next| next.trim(length, offset, flags - Flags::FUA))
    }

    fn zero(&self, length: u64, offset: u64, flags: Flags) -> Result<()> {
        self.write_everywhere(|next| next.zero(length, offset, flags - Flags::FUA))
    }
}

#[cfg(test)]
mod tests;
