//! Flushes of the target: one at a time, each for all who asked before it began.

use std::time::{Duration, Instant};

use super::flights::Flight;
use super::{Bug, Mirror};
use crate::drive::options::{MirrorOperation, Side};
use crate::engine::Operation;
use crate::errno::Errno;

/// Who wants the target flushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Client {
    /// A guest's flush.
    Guest(u32),
    /// The mirror, to be ready or to finish.
    Own,
}

#[derive(Default)]
pub(super) struct Syncs {
    running: bool,
    /// For whom it runs.
    waiting: Vec<Client>,
    /// For whom the next one will.
    due: Vec<Client>,
    /// The mirror waits for one.
    own: bool,
    succeeded: bool,
    started: Option<Instant>,
    last: Option<Duration>,
}

impl Syncs {
    /// Takes the time of what is running.
    pub(super) fn measure(&mut self, now: Instant) {
        match (self.running, self.started) {
            (true, None) => self.started = Some(now),
            (false, Some(started)) => {
                self.last = Some(now.saturating_duration_since(started));
                self.started = None;
            }
            _ => {}
        }
    }

    /// How long the last one took.
    pub(super) fn last(&self) -> Option<Duration> {
        self.last
    }

    /// Whether the last one has succeeded, and none is running.
    pub(super) fn is_good(&self) -> bool {
        self.succeeded && !self.running
    }

    /// The guest's flushes that have waited until now.
    pub(super) fn forget_guests(&mut self) -> Vec<u32> {
        let mut guests = Vec::new();
        for list in [&mut self.waiting, &mut self.due] {
            list.retain(|client| match client {
                Client::Guest(id) => {
                    guests.push(*id);
                    false
                }
                Client::Own => true,
            });
        }
        guests
    }
}

impl Mirror {
    pub(super) fn want_sync(&mut self, guest: u32) {
        self.syncs.due.push(Client::Guest(guest));
        self.start_sync();
    }

    pub(super) fn want_own_sync(&mut self) {
        if !self.syncs.own {
            self.syncs.own = true;
            self.syncs.due.push(Client::Own);
            self.start_sync();
        }
    }

    fn start_sync(&mut self) {
        if self.syncs.running || self.syncs.due.is_empty() {
            return;
        }
        self.syncs.running = true;
        self.syncs.waiting = std::mem::take(&mut self.syncs.due);
        self.ledger.sync_started();
        let id = self.flights.reserve();
        self.flights.put(id, Flight::Sync);
        self.order(Side::Target, id, Operation::Flush);
    }

    pub(super) fn synced(&mut self, id: u32, result: Result<(), Errno>) {
        self.flights.end(id);
        self.syncs.running = false;
        self.syncs.succeeded = result.is_ok();
        let waiting = std::mem::take(&mut self.syncs.waiting);
        let own = waiting.contains(&Client::Own);
        self.syncs.own &= !own;
        self.copier.wake();
        match result {
            Ok(()) => {
                if self.has_bug(Bug::SyncCoversTheFuture) {
                    self.ledger.sync_started();
                }
                self.ledger.sync_succeeded();
                if own && self.condition.may_copy() {
                    self.become_ready();
                }
            }
            Err(_) if self.has_bug(Bug::SyncFailureNotMarked) => self.ledger.sync_succeeded(),
            Err(errno) => {
                self.ledger.sync_failed();
                // What is being written may have reached the page cache, and have been lost from there already.
                for range in self.flights.target_ranges() {
                    self.ledger.put_back(&range);
                }
                // The images are not equal any more; who wanted them to be will want it again.
                self.syncs.due.retain(|client| *client != Client::Own);
                self.syncs.own = false;
                // What a backup has saved and lost, nobody has any more.
                self.fail(Side::Target, MirrorOperation::Flush, errno, 0, self.is_backup());
            }
        }
        for client in waiting {
            if let Client::Guest(id) = client {
                self.target_flushed(id);
            }
        }
        self.start_sync();
    }
}
