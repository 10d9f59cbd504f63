//! What the main loop has to do with freezing: it is never in the way of a thaw.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use protocol::Error;

use super::{Busy, Server};
use crate::channel::Seat;
use crate::freeze::{Cause, Phase};
use crate::log;
use crate::poller::Token;
use crate::schema::{Command, Role};
use crate::watchdog::News;
use crate::worker::Chore;

/// How long the end waits for filesystems to thaw.
const THAWING: Duration = Duration::from_secs(30);

impl Server {
    /// What a command means for a freeze before it runs.
    pub(super) fn before(&mut self, command: &Command, oob: bool) {
        match command.role {
            Role::Thaw => self.cancel_freeze("The freeze was cancelled by guest-fsfreeze-thaw"),
            // Whoever only watches asks out of band.
            Role::FreezeStatus if !oob && self.agent.freezing.renew() => {
                self.tell_watchdog(self.agent.watchdog.renew());
            }
            Role::None | Role::Freeze | Role::FreezeStatus => {}
        }
    }

    /// When the lease ends, while there is no watchdog to see to that.
    pub(super) fn unwatched_lease_end(&self) -> Option<Instant> {
        self.restart.due.and_then(|_| self.agent.freezing.lease_end())
    }

    pub(super) fn freeze_overdue_at(&self) -> Option<Instant> {
        self.agent.freezing.overdue_at(self.freeze_timeout?)
    }

    /// Ends a freeze in progress, if there is one. The kernel cannot be stopped: what it is freezing right now
    /// is thawed when it is done with it, everything else at once. The client does not wait for that.
    pub(super) fn cancel_freeze(&mut self, why: &str) {
        let Some(number) = self.agent.freezing.cancel(why) else { return };
        self.tell_watchdog(self.agent.watchdog.thaw(number, Cause::Failure));
        log::warning(format_args!("{why}"));
        let current = self.worker.current();
        let is_it = |busy: &Busy| busy.pending.ticket == current && busy.command.role == Role::Freeze;
        if let Some((seat, busy)) = self.take_busy(is_it) {
            self.reply(seat, Some(busy.command), busy.request, Err(Error::generic(why)));
        }
    }

    pub(super) fn hear_watchdog(&mut self) {
        while let Some(news) = self.agent.watchdog.news() {
            match news {
                News::Thawed { number, .. } if number != self.agent.freezing.number() => {}
                News::Thawed { cause, .. } => {
                    log::warning(format_args!("The watchdog has thawed: {}", cause.name()));
                    self.agent.freezing.lost(cause);
                    self.cancel_freeze("The lease ran out before everything was frozen");
                    self.submit_thaw(self.agent.freezing.number(), cause);
                }
                News::Dead => {
                    log::error(format_args!("The watchdog has died"));
                    self.poller.remove(&*self.agent.watchdog.socket());
                    self.agent.watchdog.reap();
                    self.restart.died(Instant::now());
                    return;
                }
            }
        }
    }

    pub(super) fn restart_watchdog(&mut self) {
        let watchdog = Arc::clone(&self.agent.watchdog);
        let restarted = watchdog
            .restart()
            .and_then(|()| self.poller.add_readable(&*watchdog.socket(), Token::Watchdog))
            .and_then(|()| self.agent.freezing.rearm(&watchdog));
        match restarted {
            Ok(()) => {
                self.restart.succeeded(Instant::now());
                if !self.agent.freezing.is_frozen() {
                    watchdog.listen();
                }
            }
            Err(error) => {
                watchdog.kill();
                self.poller.remove(&*watchdog.socket());
                self.restart.died(Instant::now());
                log::error(format_args!(
                    "Cannot start a watchdog, and nothing can be frozen without: {error}"
                ));
            }
        }
    }

    pub(super) fn tell_watchdog(&self, told: io::Result<()>) {
        if let Err(error) = told {
            log::error(format_args!("Cannot tell the watchdog: {error}"));
        }
    }

    /// Thaws what is frozen when nobody is left to ask for it.
    pub(super) fn thaw_for(&mut self, cause: Cause) {
        if self.agent.freezing.is_frozen() {
            log::warning(format_args!("Thawing: {}", cause.name()));
            self.cancel_freeze("The agent thaws for want of a host");
            self.submit_thaw(self.agent.freezing.number(), cause);
        }
    }

    /// Thaws a freeze that nobody has heard of, if it is still the last one.
    pub(super) fn thaw_unheard(&mut self, freeze: u64) {
        if freeze == self.agent.freezing.number() {
            self.thaw_for(Cause::Unheard);
        }
    }

    pub(super) fn submit_thaw(&mut self, freeze: u64, cause: Cause) {
        self.worker.submit_chore(thaw_chore(freeze, cause));
    }

    /// Filesystems that are still frozen are thawed. If one hangs, the watchdog stays with it. Whether all are thawed.
    pub(super) fn end(&mut self) -> bool {
        let seats = self.channel.seats();
        let freezes = |seat: &Seat| {
            let busy = &self.sessions[usize::from(*seat)].busy;
            busy.as_ref().is_some_and(|busy| busy.command.role == Role::Freeze)
        };
        let freezing: Vec<Seat> = seats.filter(freezes).collect();
        freezing.iter().for_each(|&seat| self.give_up_waiting(seat, "The agent ends"));
        if self.agent.freezing.is_frozen() || !freezing.is_empty() {
            self.thaw_for(Cause::AgentEnds);
            let deadline = Instant::now() + THAWING;
            // The hooks after the thaw are the worker's, too.
            while self.worker.waiting() > 0 {
                let rest = deadline.saturating_duration_since(Instant::now());
                if rest.is_zero() {
                    break;
                }
                for (token, ready) in self.poller.wait(Some(rest)).unwrap_or_default() {
                    self.on_event(token, ready);
                }
            }
        }
        self.channel.flush();
        let thawed = self.agent.freezing.phase() == Phase::Thawed;
        if !thawed {
            log::error(format_args!("Filesystems are still frozen"));
        }
        log::debug(format_args!("Guest agent ends"));
        thawed
    }
}

/// Thaws the freeze of this number, if it is still the last one.
pub(super) fn thaw_chore(freeze: u64, cause: Cause) -> Chore {
    Box::new(move |guest| {
        if freeze != guest.freezer.freezing().number() {
            return;
        }
        if let Err(error) = guest.freezer.thaw_for(cause) {
            log::error(format_args!("{}", error.text()));
        }
    })
}
