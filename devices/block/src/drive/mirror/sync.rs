//! Flushes of the target: one at a time, each for all who asked before it began.

use std::time::{Duration, Instant};

use super::flights::Flight;
use super::{Bug, Mirror, Phase};
use crate::drive::options::{MirrorEvent, MirrorOperation, MirrorRefusal, Side};
use crate::engine::Operation;
use crate::errno::Errno;

/// How often the target is flushed to prepare an end, while the guest writes on.
const PREPARATIONS: u32 = 4;
/// What may be left to be flushed with the guest held, in bytes.
const SMALL: u64 = 4 << 20;

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
    /// How many more the owner is prepared to wait for before the end.
    preparing: u32,
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

    /// Flushes what would be flushed in the end, before the guest is held.
    pub(in crate::drive) fn prepare(&mut self) -> Result<(), MirrorRefusal> {
        self.may_end()?;
        if !self.condition.ready {
            return Err(MirrorRefusal::NotReady);
        }
        if self.condition.phase != Phase::Running {
            // The end itself is under way.
            return Err(MirrorRefusal::Busy);
        }
        self.syncs.preparing = PREPARATIONS;
        self.want_own_sync();
        Ok(())
    }

    fn prepared(&mut self) {
        if self.syncs.preparing == 0 {
            return;
        }
        self.syncs.preparing -= 1;
        if self.syncs.preparing > 0 && self.ledger.unsynced_bytes() > SMALL {
            self.want_own_sync();
        } else {
            self.syncs.preparing = 0;
            self.output.events.push_back(MirrorEvent::Prepared);
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
                if own {
                    self.prepared();
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
                if std::mem::take(&mut self.syncs.preparing) > 0 {
                    self.output.events.push_back(MirrorEvent::Unfinished);
                }
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
