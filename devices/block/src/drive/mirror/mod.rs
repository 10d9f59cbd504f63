//! The mirror itself, without I/O and without a clock: what comes in are a guest's operations, results and the time,
//! what goes out are [`Order`]s to the two images, completions for the guest, and events.
//!
//! ```text
//!   guest ─▶ reads, flushes ────────────────────────────────────────────────────▶ source
//!            tracked: source ─▶ mark ─▶ done                    background, discards, wide writes, paused, in error
//!            active:  claim ─▶ bounce ─▶ take ─▶ source ─▶ target ─▶ done          write-blocking
//!            held:    copies of what it changes ─▶ source ─▶ done                  a backup: see [`before`]
//!
//!   copier ─▶ claim ─▶ take ─▶ [extent?] ─▶ read source ─▶ write target ─▶ release     failed: put back
//!                                    └ hole ────────▶ zeroes ──┘
//! ```
//!
//! # Why the images become equal
//!
//! 1. A chunk is **marked after** the source's write is complete, well or badly, and **taken before** the source is
//!    read, or asked for an extent: so whatever a copy misses marks the chunk again afterwards. The same holds for
//!    an active write, which takes the chunks that it covers before it goes to the source. A tracked write may
//!    therefore overlap anything, needs no claim, and the copy mode may change at any moment.
//! 2. What goes to the target, copies and active writes, goes under a claim of its bytes, taken before the source is
//!    read or written and kept until the target has it: two of them never overlap.
//! 3. An active write sends the same bytes to both images, whatever the guest does to its memory meanwhile.
//! 4. What the target did not get, or may have lost, is marked.
//! 5. A discard leaves behind what nobody can know but by reading: it is always tracked. Zeroes are written as zeroes.
//! 6. Tracking begins with nothing in flight, and an end is one only with nothing in flight (the caller's gate; both
//!    are checked).

mod before;
mod bug;
mod control;
mod copier;
mod flights;
mod guest;
mod sync;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

pub(in crate::drive) use self::bug::Bug;
use self::copier::Copier;
use self::flights::{Flight, Flights};
use self::guest::Guests;
use self::sync::Syncs;
use super::claims::Claims;
use super::ledger::Ledger;
use super::options::{
    CopyMode, MirrorAction, MirrorError, MirrorEvent, MirrorOperation, MirrorOptions, MirrorSync, OnError,
    Side,
};
use crate::engine::{Completion, Operation};
use crate::errno::Errno;

/// How long to leave alone what has failed and is to be ignored.
const BACKOFF: Duration = Duration::from_millis(100);

/// An operation for one of the images. Its result comes back under the same `id`.
pub(super) struct Order {
    pub(super) side: Side,
    pub(super) id: u32,
    /// Nobody waits for it: not on the disk's own thread.
    pub(super) aside: bool,
    pub(super) operation: Operation,
}

/// Facts about the two images.
#[derive(Debug, Clone, Copy)]
pub(super) struct Images {
    /// Bytes to keep equal.
    pub(super) size: u64,
    /// The source tells where its holes are.
    pub(super) tells_extents: bool,
    /// A flush of the target that has failed will fail for ever.
    pub(super) sync_errors_stay: bool,
}

/// How much is done at a time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Copies in flight.
    pub(super) copies: usize,
    /// Bytes that one copy moves at a time.
    pub(super) piece: u64,
    /// The same while the guest works, whose requests may have to wait for it: for the range, or for a processor.
    pub(super) small_piece: u64,
    /// Bytes whose extents are asked for at a time while the guest does not wait for them.
    pub(super) reach: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { copies: 16, piece: 1 << 20, small_piece: 256 << 10, reach: 16 << 20 }
    }
}

/// Whether the target can be worked on.
#[derive(Debug, Clone, Copy)]
enum Health {
    Well,
    /// Left alone for a while; until when is decided by the next who knows the time.
    Ailing(MirrorError, Option<Instant>),
    Stopped(MirrorError),
    Failed(MirrorError),
}

/// Whether the caller holds the guest to reach an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    Finishing,
    Quiesced,
}

struct Condition {
    mode: CopyMode,
    paused: bool,
    /// The target is not wanted any more: paused for good.
    given_up: bool,
    health: Health,
    ready: bool,
    phase: Phase,
}

impl Condition {
    fn may_copy(&self) -> bool {
        !self.paused && matches!(self.health, Health::Well)
    }

    /// Whether writes go to both images.
    fn is_active(&self) -> bool {
        self.mode == CopyMode::WriteBlocking && self.may_copy()
    }

    fn error(&self) -> Option<MirrorError> {
        match self.health {
            Health::Well => None,
            Health::Ailing(error, _) | Health::Stopped(error) | Health::Failed(error) => Some(error),
        }
    }
}

/// What it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// To be equal to the source.
    Mirror,
    /// To be what the source was in the beginning; copied in the background, or only where the guest writes.
    Backup { background: bool },
}

/// What does not change.
struct Plan {
    kind: Kind,
    images: Images,
    limits: Limits,
    unmap: bool,
    on_source_error: OnError,
    on_target_error: OnError,
}

pub(super) struct Mirror {
    // Fixed.
    plan: Plan,
    // Volatile.
    condition: Condition,
    ledger: Ledger,
    claims: Claims,
    /// Claims may be granted that were not.
    released: bool,
    flights: Flights,
    guests: Guests,
    copier: Copier,
    syncs: Syncs,
    output: Output,
    #[cfg(test)]
    pub(super) bug: Option<Bug>,
}

/// What there is to do and to tell.
#[derive(Default)]
pub(super) struct Output {
    pub(super) orders: Vec<Order>,
    pub(super) completions: Vec<Completion>,
    pub(super) events: VecDeque<MirrorEvent>,
}

impl Mirror {
    pub(super) fn new(kind: Kind, images: Images, options: &MirrorOptions, limits: Limits) -> Self {
        let mut ledger = Ledger::new(images.size, options.granularity, options.target_is_zero);
        if options.sync == MirrorSync::Full || kind != Kind::Mirror {
            ledger.put_back(&(0..images.size));
        }
        let plan = Plan {
            kind,
            images,
            limits,
            unmap: options.unmap,
            on_source_error: options.on_source_error,
            on_target_error: options.on_target_error,
        };
        Self {
            plan,
            condition: Condition {
                mode: if kind == Kind::Mirror { options.mode } else { CopyMode::Background },
                paused: false,
                given_up: false,
                health: Health::Well,
                ready: false,
                phase: Phase::Running,
            },
            ledger,
            claims: Claims::default(),
            released: false,
            flights: Flights::default(),
            guests: Guests::new(options.buf_size),
            copier: Copier::new(options.buf_size, options.speed),
            syncs: Syncs::default(),
            output: Output::default(),
            #[cfg(test)]
            bug: None,
        }
    }

    /// What there is to do and to tell now; whoever takes something out does it.
    pub(super) fn output(&mut self) -> &mut Output {
        &mut self.output
    }

    /// The result of an order. Returns whether it was one.
    pub(super) fn completed(&mut self, side: Side, id: u64, result: Result<(), Errno>) -> bool {
        let Some((id, flight)) = u32::try_from(id).ok().and_then(|id| Some((id, self.flights.take(id)?)))
        else {
            return false;
        };
        match flight {
            Flight::Plain { token } => {
                self.flights.end(id);
                self.answer(token, result);
            }
            Flight::Tracked { token, range } => self.tracked(id, token, &range, result),
            Flight::Active(active) => self.active_step(id, active, side, result),
            Flight::Abandoned { bounce } => self.end_active(id, bounce),
            Flight::Flush(flush) => self.flushed(id, flush, result),
            Flight::Copy(copy) => self.copy_step(id, copy, result),
            Flight::Sync => self.synced(id, result),
            // It has ordered nothing.
            held @ Flight::Held(_) => self.flights.put(id, held),
        }
        self.settle();
        true
    }

    /// Starts what the time allows.
    pub(super) fn pump(&mut self, now: Instant) {
        if let Health::Ailing(error, until) = self.condition.health {
            match until {
                None => self.condition.health = Health::Ailing(error, Some(now + BACKOFF)),
                Some(until) if until <= now => self.condition.health = Health::Well,
                Some(_) => {}
            }
        }
        self.guests.measure(now);
        self.syncs.measure(now);
        self.copier.measure(now, self.ledger.is_dirty(), self.ledger.changed_bytes());
        if self.condition.may_copy() {
            // Without a background it has no end of its own.
            if self.plan.kind != (Kind::Backup { background: false }) {
                self.start_copies(now);
                self.conclude();
            }
        }
        self.syncs.measure(now);
        self.settle();
    }

    /// When [`Self::pump`] could do something that it cannot do now.
    pub(super) fn deadline(&self, now: Instant) -> Option<Instant> {
        match self.condition.health {
            Health::Ailing(_, until) => Some(until.unwrap_or(now)),
            Health::Well if !self.condition.paused => self.copy_deadline(now),
            _ => None,
        }
    }

    /// Tells the caller what it has waited for, once the images are equal.
    fn conclude(&mut self) {
        let skipped = self.has_bug(Bug::NoLastPass) && self.condition.phase == Phase::Finishing;
        if (self.ledger.is_dirty() || self.copier.in_flight > 0) && !skipped {
            return;
        }
        let durable = self.syncs.is_good() && self.ledger.is_synced();
        match self.condition.phase {
            Phase::Running if self.condition.ready => {}
            Phase::Finishing if durable || self.has_bug(Bug::NoLastSync) => {
                self.become_ready();
                self.condition.phase = Phase::Quiesced;
                self.output.events.push_back(MirrorEvent::Quiesced);
            }
            Phase::Running | Phase::Finishing => self.want_own_sync(),
            Phase::Quiesced => {}
        }
    }

    /// The images were equal, and the target is durable as it was then.
    fn become_ready(&mut self) {
        if !self.condition.ready {
            self.condition.ready = true;
            self.output.events.push_back(MirrorEvent::Ready);
        }
    }

    /// Grants what was released, and starts what waited for it.
    fn settle(&mut self) {
        while std::mem::take(&mut self.released) {
            for id in self.claims.grant() {
                self.granted(id);
            }
            if self.is_backup() {
                self.retry_held();
            }
        }
        if !self.is_backup() {
            self.start_active();
        }
    }

    fn granted(&mut self, id: u32) {
        match self.flights.take(id) {
            Some(Flight::Active(mut active)) => {
                active.granted = true;
                self.flights.put(id, Flight::Active(active));
            }
            Some(Flight::Copy(copy)) => self.copy_granted(id, copy),
            Some(other) => self.flights.put(id, other),
            None => {}
        }
    }

    fn release(&mut self, id: u32) {
        self.claims.release(id);
        self.released = true;
    }

    fn order(&mut self, side: Side, id: u32, operation: Operation) {
        self.output.orders.push(Order { side, id, aside: false, operation });
    }

    /// Decides on an error of the mirror's own, whose range was put back. `fatal`: nothing can make up for it.
    fn fail(&mut self, side: Side, operation: MirrorOperation, errno: Errno, offset: u64, fatal: bool) {
        let error = MirrorError { side, operation, errno, offset };
        let policy = match side {
            Side::Source => self.plan.on_source_error,
            Side::Target => self.plan.on_target_error,
        };
        let action = match policy.action(errno) {
            _ if fatal => MirrorAction::Report,
            // It would be tried again for ever.
            MirrorAction::Ignore
                if operation == MirrorOperation::Flush && self.plan.images.sync_errors_stay =>
            {
                MirrorAction::Report
            }
            action => action,
        };
        self.condition.health = match (action, self.condition.health) {
            // As bad already, or worse.
            (_, Health::Failed(_))
            | (MirrorAction::Stop | MirrorAction::Ignore, Health::Stopped(_))
            | (MirrorAction::Ignore, Health::Ailing(..)) => return,
            (MirrorAction::Report, _) => Health::Failed(error),
            (MirrorAction::Stop, _) => Health::Stopped(error),
            (MirrorAction::Ignore, Health::Well) => Health::Ailing(error, None),
        };
        self.output.events.push_back(MirrorEvent::Error { error, action });
        self.unfinish();
        self.leave_active();
    }

    /// The end that the caller wants will not be reached like this.
    fn unfinish(&mut self) {
        if self.condition.phase != Phase::Running {
            self.condition.phase = Phase::Running;
            self.output.events.push_back(MirrorEvent::Unfinished);
        }
    }
}
