//! When to stop waiting for a script.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use nbdkit_core::{Result, ShutdownFlag};
use rustix::event::{EventfdFlags, eventfd};

/// How long a script may go on when nobody wants its answer any more.
const GRACE: Duration = Duration::from_secs(2);

/// A [`ShutdownFlag`] as something that can be polled together with a script's pipes.
#[derive(Debug)]
pub(crate) struct Alarm {
    event: OwnedFd,
    since: OnceLock<Instant>,
}

impl Alarm {
    /// Goes off when `stop` is raised.
    pub(crate) fn on(stop: &ShutdownFlag) -> Result<Arc<Self>> {
        let event =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(std::io::Error::from)?;
        let alarm = Arc::new(Alarm { event, since: OnceLock::new() });
        let weak = Arc::downgrade(&alarm);
        stop.on_raise(move || {
            if let Some(alarm) = weak.upgrade() {
                let _ = alarm.since.set(Instant::now());
                // Never read, so that everyone who polls it sees it.
                let _ = rustix::io::write(&alarm.event, &1_u64.to_ne_bytes());
            }
        });
        Ok(alarm)
    }
}

/// How long to wait for a script: for ever, as long as it is wanted, or for some time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Patience<'a> {
    /// Once all of these went off, nobody wants the answer. None at all: it is always wanted.
    alarms: Vec<&'a Alarm>,
    /// Once one of them did.
    any: bool,
    /// The time it has in any case, from its start.
    at_least: Duration,
    /// The time it has at most, from its start.
    at_most: Option<Duration>,
}

impl<'a> Patience<'a> {
    /// Wanted until all alarms went off.
    pub(crate) fn until(alarms: impl IntoIterator<Item = &'a Arc<Alarm>>) -> Self {
        Patience { alarms: alarms.into_iter().map(|alarm| &**alarm).collect(), ..Self::default() }
    }

    /// Wanted until one of the alarms goes off.
    pub(crate) fn until_any(alarms: impl IntoIterator<Item = &'a Arc<Alarm>>) -> Self {
        Patience { any: true, ..Self::until(alarms) }
    }

    /// For some time only.
    pub(crate) fn at_most(time: Duration) -> Self {
        Patience { at_most: Some(time), ..Self::default() }
    }

    /// For some time even if it comes late.
    pub(crate) fn at_least(self, time: Duration) -> Self {
        Patience { at_least: time, ..self }
    }

    /// When a script that was started at `start` has to end, as far as is known.
    pub(crate) fn deadline(&self, start: Instant) -> Option<Instant> {
        if let Some(time) = self.at_most {
            return Some(start + time);
        }
        let mut since = self.alarms.iter().map(|alarm| alarm.since.get());
        let last = if self.any {
            since.flatten().min()?
        } else {
            let all: Option<Vec<_>> = since.by_ref().collect();
            all?.into_iter().max()?
        };
        Some((*last + GRACE).max(start + self.at_least))
    }

    /// What becomes readable when the deadline may have changed.
    pub(crate) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.alarms.iter().filter(|alarm| alarm.since.get().is_none()).map(|alarm| alarm.event.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_wanted_until_one_went_off() {
        let (client, server) = (ShutdownFlag::new(), ShutdownFlag::new());
        let alarms = [Alarm::on(&client).unwrap(), Alarm::on(&server).unwrap()];
        let patience = Patience::until_any(&alarms);
        assert_eq!(patience.deadline(Instant::now()), None);
        server.raise();
        assert!(patience.deadline(Instant::now()).is_some());
    }

    #[test]
    fn the_answer_is_wanted_until_all_alarms_went_off() {
        let (client, server) = (ShutdownFlag::new(), ShutdownFlag::new());
        let alarms = [Alarm::on(&client).unwrap(), Alarm::on(&server).unwrap()];
        let patience = Patience::until(&alarms);
        let start = Instant::now();
        assert_eq!((patience.deadline(start), patience.fds().count()), (None, 2));
        client.raise();
        assert_eq!((patience.deadline(start), patience.fds().count()), (None, 1));
        server.raise();
        assert_eq!(patience.fds().count(), 0);
        let deadline = patience.deadline(start).unwrap();
        assert!(deadline >= start + GRACE);
        let late = deadline + Duration::from_secs(60);
        assert_eq!(patience.deadline(late), Some(late), "no time is left");
        let hour = Duration::from_secs(3600);
        assert_eq!(patience.at_least(hour).deadline(late), Some(late + hour));
        assert_eq!(Patience::default().deadline(start), None);
        assert_eq!(Patience::at_most(hour).deadline(start), Some(start + hour));
    }
}
