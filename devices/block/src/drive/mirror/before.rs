//! Backups: what the guest is about to change is copied first.
//!
//! ```text
//!   guest's write ─▶ all saved, or the backup is over? ──yes──▶ source ─▶ done
//!                          │ no                  ▲
//!                          ▼                     │ a copy is over: look again
//!                    copies of what is dirty ─▶ held
//! ```
//!
//! Dirty is here what is not saved yet; nothing that is saved becomes dirty again. A write that touches what is dirty,
//! or is being copied, is held and copies are begun, until nothing of what it changes is either. A copy that a write
//! waits for is made even while the backup is paused, and when it fails, so has the backup: the guest is not told, and
//! never waits for an administrator.

use std::ops::Range;

use super::flights::Flight;
use super::{Bug, Health, Kind, Mirror};
use crate::engine::Operation;

/// A guest's write that waits for copies of what it changes.
pub(super) struct Held {
    token: u64,
    /// What it changes.
    range: Range<u64>,
    operation: Operation,
}

impl Mirror {
    pub(super) fn is_backup(&self) -> bool {
        self.plan.kind != Kind::Mirror
    }

    pub(super) fn write_after_copy(&mut self, token: u64, range: Range<u64>, operation: Operation) {
        let id = self.flights.reserve();
        self.consider(id, Held { token, range, operation });
        self.settle();
    }

    /// Lets a write go, or has copied what it changes.
    fn consider(&mut self, id: u32, held: Held) {
        let range = held.range.clone();
        if !self.is_unsaved(&range) {
            self.let_go(id, held);
            return;
        }
        self.flights.put(id, Flight::Held(held));
        let end = self.ledger.ceil(range.end);
        let mut from = self.ledger.floor(range.start);
        while from < end
            && let Some(run) = self.ledger.next_dirty(from, end - from)
            && run.start < end
            && let Some(taken) = self.start_wanted_copy(run.start..run.end.min(end))
        {
            from = taken;
        }
        self.guests.queue.push_back(id);
    }

    /// Whether a part of it may yet be read for the target.
    fn is_unsaved(&self, range: &Range<u64>) -> bool {
        if self.is_over() || self.has_bug(Bug::WriteBeforeCopy) {
            return false;
        }
        let dirty = self
            .ledger
            .next_dirty(self.ledger.floor(range.start), 1)
            .is_some_and(|run| run.start < range.end);
        dirty
            || (!self.has_bug(Bug::WriteDuringCopy)
                && self.copier.in_flight > 0
                && self.flights.is_copied(range))
    }

    fn let_go(&mut self, id: u32, held: Held) {
        self.flights.end(id);
        self.pass(held.token, held.operation);
    }

    /// Looks again at what is held: copies are over, and have given back memory.
    pub(super) fn retry_held(&mut self) {
        for id in std::mem::take(&mut self.guests.queue) {
            if let Some(Flight::Held(held)) = self.flights.take(id) {
                self.consider(id, held);
            }
        }
    }

    /// Nothing has to be saved any more.
    fn is_over(&self) -> bool {
        self.condition.given_up || matches!(self.condition.health, Health::Failed(_))
    }

    /// Lets go what is held, if it is over.
    pub(super) fn let_all_go(&mut self) {
        if self.is_over() {
            self.retry_held();
        }
    }
}
