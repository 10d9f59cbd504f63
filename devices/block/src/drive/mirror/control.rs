//! What the owner of a mirror may ask and tell.

use super::{Bug, Health, Mirror, Phase};
use crate::drive::options::{CopyMode, MirrorRefusal, MirrorStatus};
use crate::drive::pace;

impl Mirror {
    pub(in crate::drive) fn pause(&mut self) {
        if !self.condition.paused {
            self.condition.paused = true;
            self.unfinish();
            self.leave_active();
        }
    }

    /// Nobody wants the target any more, and the guest waits for it no more: nor for what the target has already.
    pub(in crate::drive) fn give_up(&mut self) {
        self.condition.given_up = true;
        self.condition.paused = true;
        self.unfinish();
        self.leave_active();
        self.abandon_active();
    }

    /// Ends a pause, and tries again what was stopped by an error.
    pub(in crate::drive) fn resume(&mut self) {
        self.condition.paused = self.condition.given_up;
        if matches!(self.condition.health, Health::Stopped(_) | Health::Ailing(..)) {
            self.condition.health = Health::Well;
        }
        self.copier.wake();
    }

    pub(in crate::drive) fn set_speed(&mut self, speed: u64) {
        self.copier.speed.set(speed);
        self.copier.wake();
    }

    pub(in crate::drive) fn set_mode(&mut self, mode: CopyMode) -> Result<(), MirrorRefusal> {
        if self.is_backup() {
            return Err(MirrorRefusal::Backup);
        }
        self.condition.mode = mode;
        self.copier.wake();
        if !self.condition.is_active() {
            self.leave_active();
        }
        Ok(())
    }

    /// Whether an end can be reached as things are.
    pub(super) fn may_end(&self) -> Result<(), MirrorRefusal> {
        match self.condition.health {
            _ if self.is_backup() => Err(MirrorRefusal::Backup),
            Health::Failed(error) => Err(MirrorRefusal::Failed(error)),
            Health::Stopped(_) => Err(MirrorRefusal::Paused),
            Health::Well | Health::Ailing(..) if self.condition.paused => Err(MirrorRefusal::Paused),
            Health::Well | Health::Ailing(..) => Ok(()),
        }
    }

    /// Begins the last pass, with the guest held.
    pub(in crate::drive) fn finish(&mut self, limit: u64) -> Result<(), MirrorRefusal> {
        if self.guests.in_flight > 0 && !self.has_bug(Bug::FinishWithoutDrain) {
            return Err(MirrorRefusal::Busy);
        }
        self.may_end()?;
        let remaining = self.remaining();
        if remaining > limit {
            return Err(MirrorRefusal::NotConverged { remaining });
        }
        if self.condition.phase == Phase::Running {
            self.condition.phase = Phase::Finishing;
            self.copier.wake();
        }
        Ok(())
    }

    /// The guest is let go on.
    pub(in crate::drive) fn reopen(&mut self) {
        self.condition.phase = Phase::Running;
    }

    /// Whether nothing of the guest's or of the mirror's own is in flight.
    pub(in crate::drive) fn is_idle(&self) -> bool {
        self.flights.is_empty() && self.output.orders.is_empty()
    }

    /// Whether nothing is in flight but what concerns the source and the guest alone.
    pub(in crate::drive) fn is_left_to_the_guest(&self) -> bool {
        self.flights.are_the_guests()
    }

    /// Whether an idle mirror has everything back that it had lent or claimed.
    pub(in crate::drive) fn is_clean(&self) -> bool {
        self.is_idle() && self.claims.is_empty() && self.guests.is_clean() && self.copier.is_clean()
    }

    pub(in crate::drive) fn is_quiesced(&self) -> bool {
        self.condition.phase == Phase::Quiesced
    }

    /// The guest's completions that wait to be handed out.
    pub(in crate::drive) fn completions(&self) -> usize {
        self.output.completions.len()
    }

    /// The guest's operations that have not completed.
    pub(in crate::drive) fn guests_in_flight(&self) -> usize {
        self.guests.in_flight
    }

    fn remaining(&self) -> u64 {
        self.ledger.dirty_bytes().saturating_add(self.copier.bytes_in_flight).min(self.plan.images.size)
    }

    pub(in crate::drive) fn status(&self) -> MirrorStatus {
        let remaining = self.remaining();
        let (copy_rate, dirty_rate) = self.copier.rates();
        let gain = copy_rate.unwrap_or(0.0) - dirty_rate.unwrap_or(0.0);
        // An idle disk needs no rate.
        let copying = pace::duration(remaining, copy_rate.unwrap_or(0.0));
        MirrorStatus {
            mode: self.condition.mode,
            total: self.copier.done.saturating_add(remaining),
            done: self.copier.done,
            remaining,
            in_flight: self.copier.bytes_in_flight,
            speed: self.copier.speed.speed(),
            ready: self.condition.ready,
            paused: self.condition.paused,
            stopped: matches!(self.condition.health, Health::Stopped(_)),
            failed: matches!(self.condition.health, Health::Failed(_)),
            actively_synced: self.condition.is_active() && remaining == 0 && self.guests.tracked == 0,
            quiesced: self.is_quiesced(),
            error: self.condition.error(),
            copy_rate: copy_rate.map(pace::whole),
            dirty_rate: dirty_rate.map(pace::whole),
            remaining_time: pace::duration(remaining, gain),
            expected_hold: copying
                .zip(self.syncs.last())
                .and_then(|(copying, sync)| copying.checked_add(sync)),
        }
    }
}
