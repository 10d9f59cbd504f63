//! Copies what is dirty from the source to the target.
//!
//! ```text
//!   start ─▶ Claiming ──granted──▶ Probing ─┬ data ─▶ Reading ─┬──▶ Writing ──▶ next piece, or the end
//!                          │                │                  └ zeroes onto zeroes ─▶
//!                          └ known data ────┼──────▶
//!                                           └ hole ─▶ Zeroing ──▶
//! ```
//!
//! A copy takes chunks, and moves them piece by piece: one piece where chunks are small, many where a chunk is larger
//! than what the guest should have to wait for. An extent is asked for where it is not known that there is data. That
//! there was data once may be remembered: to copy a hole as data is right too. A hole counts only for the copy that
//! has asked.

use std::ops::Range;
use std::time::Instant;

use super::flights::Flight;
use super::{Bug, Mirror, Order, Phase};
use crate::drive::options::{CopyMode, MirrorOperation, Side};
use crate::drive::pace::{Meter, SpeedLimit};
use crate::drive::pool::{Loan, Pool};
use crate::engine::Operation;
use crate::errno::Errno;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Waits for its claim; then asks for the extent, or not.
    Claiming {
        probe: bool,
    },
    Probing,
    Reading,
    Writing,
    Zeroing,
}

pub(super) struct Copy {
    /// What was taken, whole chunks.
    range: Range<u64>,
    /// What is claimed: from where everything before is done.
    piece: Range<u64>,
    stage: Stage,
    memory: Loan,
    /// A guest's write waits for it: it is made in any case, and asks for no extents.
    wanted: bool,
}

impl Copy {
    pub(super) fn piece(&self) -> &Range<u64> {
        &self.piece
    }

    /// What it has taken. When it fails half-way, all of a chunk is dirty again.
    pub(super) fn range(&self) -> &Range<u64> {
        &self.range
    }
}

pub(super) struct Copier {
    pub(super) in_flight: usize,
    pub(super) bytes_in_flight: u64,
    /// Bytes done since the beginning.
    pub(super) done: u64,
    pub(super) speed: SpeedLimit,
    /// Bytes that were begun and are not yet counted against the speed.
    owed: u64,
    /// Where to look for the next dirty chunk.
    cursor: u64,
    /// Data when last asked.
    data: Range<u64>,
    /// Copies that wait for an extent.
    probing: usize,
    pool: Pool,
    /// Something has changed since the last look.
    awake: bool,
    copied: Meter,
    changed: Meter,
}

impl Copier {
    pub(super) fn new(memory: u64, speed: u64) -> Self {
        let mut limit = SpeedLimit::default();
        limit.set(speed);
        Self {
            in_flight: 0,
            bytes_in_flight: 0,
            done: 0,
            speed: limit,
            owed: 0,
            cursor: 0,
            data: 0..0,
            probing: 0,
            pool: Pool::new(memory),
            awake: true,
            copied: Meter::default(),
            changed: Meter::default(),
        }
    }

    /// There may be something to start.
    pub(super) fn wake(&mut self) {
        self.awake = true;
    }

    /// Takes the time of copies, while there is something to copy, and of changes.
    pub(super) fn measure(&mut self, now: Instant, dirty: bool, changed: u64) {
        if dirty || self.in_flight > 0 {
            self.copied.sample(now, self.done);
        } else {
            self.copied.rest();
        }
        self.changed.sample(now, changed);
    }

    fn pay(&mut self, now: Instant) {
        self.speed.spend(std::mem::take(&mut self.owed), now);
    }

    /// Bytes per second: copied, and made dirty.
    pub(super) fn rates(&self) -> (Option<f64>, Option<f64>) {
        (self.copied.rate(), self.changed.rate())
    }

    pub(super) fn is_clean(&self) -> bool {
        self.in_flight == 0 && self.bytes_in_flight == 0 && self.probing == 0 && self.pool.is_whole()
    }
}

impl Mirror {
    /// Whether copies are kept to the wanted speed: not while the guest is held.
    fn limited_until(&self, now: Instant) -> Option<Instant> {
        if self.condition.phase == Phase::Finishing { None } else { self.copier.speed.wait(now) }
    }

    pub(super) fn copy_deadline(&self, now: Instant) -> Option<Instant> {
        if self.copier.awake {
            return Some(now);
        }
        if self.ledger.is_dirty() && self.copier.in_flight < self.plan.limits.copies {
            self.limited_until(now)
        } else {
            None
        }
    }

    pub(super) fn start_copies(&mut self, now: Instant) {
        self.copier.awake = false;
        self.copier.pay(now);
        while self.copier.in_flight < self.plan.limits.copies && self.limited_until(now).is_none() {
            let Some(run) = self.next_run() else { return };
            if !self.start_copy(run) {
                return;
            }
            self.copier.pay(now);
        }
    }

    /// How much may be claimed to ask for its extent, and to be made zeroes.
    fn reach(&self) -> u64 {
        match self.condition.mode {
            CopyMode::Background => self.plan.limits.reach,
            CopyMode::WriteBlocking => self.piece(),
        }
    }

    /// How much is copied at a time.
    fn piece(&self) -> u64 {
        let limits = &self.plan.limits;
        let piece = if self.guests.busy { limits.small_piece } else { limits.piece };
        piece.min(self.copier.pool.capacity())
    }

    /// How much this one copies at a time: its memory was lent when the guest may have been busier.
    fn piece_of(&self, copy: &Copy) -> u64 {
        self.piece().min(copy.memory.bytes())
    }

    /// How much one copy takes on where there is data.
    fn share(&self) -> u64 {
        self.piece().min(self.copier.speed.step())
    }

    /// What to copy next: dirty chunks that nobody has claimed, from the cursor on and around; or any, for which the copy
    /// will wait in line, so that chunks that are always claimed get their turn.
    fn next_run(&self) -> Option<Range<u64>> {
        let longest = self.reach();
        let (mut from, mut around) = (self.copier.cursor, false);
        loop {
            let run = match self.ledger.next_dirty(from, longest) {
                Some(run) if !around || run.start < self.copier.cursor => run,
                None if !around => {
                    (from, around) = (0, true);
                    continue;
                }
                _ => break,
            };
            match self.claims.first_in(&run) {
                None => return Some(run),
                _ if self.has_bug(Bug::CopyWithoutClaim) => return Some(run),
                Some(claim) if self.ledger.floor(claim.start) > run.start => {
                    return Some(run.start..self.ledger.floor(claim.start));
                }
                Some(claim) => from = self.ledger.ceil(claim.end),
            }
        }
        if self.copier.in_flight == 0 { self.ledger.next_dirty(0, 1) } else { None }
    }

    /// Returns whether it can begin.
    fn start_copy(&mut self, run: Range<u64>) -> bool {
        let data = self.copier.data.clone();
        let probe = self.plan.images.tells_extents && !data.contains(&run.start);
        if probe && self.copier.probing > 0 {
            return false;
        }
        let range = if probe {
            run
        } else {
            // Beyond the known data there may be a hole.
            let known = if self.plan.images.tells_extents { data.end } else { u64::MAX };
            self.shortened(&run, known.min(run.start.saturating_add(self.share())))
        };
        self.begin(range, false)
    }

    /// A copy that a guest's write waits for. Returns where it ends, if it can begin.
    pub(super) fn start_wanted_copy(&mut self, run: Range<u64>) -> Option<u64> {
        let cursor = self.copier.cursor;
        let range = self.shortened(&run, run.start.saturating_add(self.piece()));
        let end = range.end;
        let begun = self.begin(range, true);
        self.copier.cursor = cursor;
        begun.then_some(end)
    }

    /// Takes `range`, and begins with its first piece, if there is memory.
    fn begin(&mut self, range: Range<u64>, wanted: bool) -> bool {
        let bytes = range.end - range.start;
        let Some(memory) = self.copier.pool.lend(bytes.min(self.piece())) else { return false };
        if !self.has_bug(Bug::TakeAfterCopy) {
            self.ledger.take(&range);
        }
        self.copier.cursor = range.end;
        self.copier.in_flight += 1;
        self.copier.bytes_in_flight += bytes;
        let id = self.flights.reserve();
        let piece = range.start..range.start;
        self.next_piece(id, Copy { range, piece, stage: Stage::Probing, memory, wanted });
        true
    }

    /// `range` up to the last chunk that ends at or before `end`, but one chunk at least.
    fn shortened(&self, range: &Range<u64>, end: u64) -> Range<u64> {
        let end = if end >= range.end { range.end } else { self.ledger.floor(end) };
        let one = self.ledger.ceil(range.start + 1).min(range.end);
        range.start..end.max(one)
    }

    /// Goes on behind the piece that is done, which has no claim any more.
    fn next_piece(&mut self, id: u32, mut copy: Copy) {
        let at = copy.piece.end;
        if at >= copy.range.end {
            self.end_copy(id, copy);
            return;
        }
        if !copy.wanted && !self.condition.may_copy() {
            copy.piece = at..at;
            self.abandon(id, copy);
            return;
        }
        let probe = !copy.wanted && self.plan.images.tells_extents && !self.copier.data.contains(&at);
        let end = if probe { copy.range.end } else { copy.range.end.min(at + self.piece_of(&copy)) };
        copy.piece = at..end;
        copy.stage = Stage::Claiming { probe };
        self.copier.probing += usize::from(probe);
        if self.has_bug(Bug::CopyWithoutClaim) || self.claims.claim(id, copy.piece.clone()) {
            self.copy_granted(id, copy);
        } else {
            self.flights.put(id, Flight::Copy(copy));
        }
    }

    /// What is not done is left for later.
    fn abandon(&mut self, id: u32, copy: Copy) {
        self.ledger.put_back(&(copy.piece.start..copy.range.end));
        self.end_copy(id, copy);
    }

    fn end_copy(&mut self, id: u32, copy: Copy) {
        self.release(id);
        self.copier.in_flight -= 1;
        self.copier.bytes_in_flight -= copy.range.end - copy.range.start;
        self.copier.pool.give_back(copy.memory);
        self.copier.wake();
        self.flights.end(id);
    }

    /// It has claimed its piece.
    pub(super) fn copy_granted(&mut self, id: u32, mut copy: Copy) {
        if copy.stage == (Stage::Claiming { probe: false }) {
            self.read(id, copy);
            return;
        }
        copy.stage = Stage::Probing;
        match self.copier.pool.answer(&copy.memory) {
            Some(answer) => {
                let offset = copy.piece.start;
                self.order(Side::Source, id, Operation::Extent { offset, answer });
                self.flights.put(id, Flight::Copy(copy));
            }
            None => self.probed(id, copy, Ok(())),
        }
    }

    /// The result of what it has ordered last.
    pub(super) fn copy_step(&mut self, id: u32, copy: Copy, result: Result<(), Errno>) {
        match (copy.stage, result) {
            (Stage::Probing, result) => self.probed(id, copy, result),
            (Stage::Reading, Ok(())) => self.write(id, copy),
            (Stage::Writing | Stage::Zeroing, Ok(())) => {
                self.ledger.written(&copy.piece);
                self.piece_done(id, copy);
            }
            (Stage::Reading, Err(errno)) => {
                self.failed(id, copy, Side::Source, MirrorOperation::Read, errno);
            }
            (Stage::Writing | Stage::Zeroing, Err(errno)) => {
                self.failed(id, copy, Side::Target, MirrorOperation::Write, errno);
            }
            // It has ordered nothing.
            (Stage::Claiming { .. }, _) => self.flights.put(id, Flight::Copy(copy)),
        }
    }

    fn failed(&mut self, id: u32, mut copy: Copy, side: Side, operation: MirrorOperation, errno: Errno) {
        let (offset, wanted) = (copy.piece.start, copy.wanted);
        if side == Side::Target && self.has_bug(Bug::TargetFailureNotMarked) {
            copy.piece = copy.piece.end..copy.piece.end;
        }
        self.abandon(id, copy);
        self.fail(side, operation, errno, offset, wanted);
    }

    /// The extent at its piece is told.
    fn probed(&mut self, id: u32, mut copy: Copy, result: Result<(), Errno>) {
        self.copier.probing -= 1;
        self.copier.wake();
        let at = copy.piece.start;
        let extent = match result {
            Ok(()) => self.copier.pool.told(&copy.memory),
            // Whoever cannot tell has data.
            Err(_) => crate::engine::Extent::UNKNOWN,
        };
        let hole = extent.hole && extent.end > at;
        let known = if extent.end > at { extent.end } else { copy.range.end };
        if at == copy.range.start {
            self.shorten(&mut copy, if hole { known } else { known.min(at + self.share()) });
        }
        let end = if hole { known } else { known.min(at + self.piece_of(&copy)) };
        copy.piece.end = copy.range.end.min(end);
        self.claims.narrow(id, copy.piece.clone());
        self.released = true;
        if hole {
            if self.has_bug(Bug::StaleExtent) {
                self.ledger.take(&copy.piece);
            }
            self.zero(id, copy);
        } else {
            self.copier.data = at..known;
            self.read(id, copy);
        }
    }

    /// Leaves to others what is beyond `end`.
    fn shorten(&mut self, copy: &mut Copy, end: u64) {
        let range = self.shortened(&copy.range, end);
        if range.end < copy.range.end {
            self.ledger.put_back(&(range.end..copy.range.end));
            self.copier.bytes_in_flight -= copy.range.end - range.end;
            self.copier.cursor = range.end;
            copy.range = range;
        }
    }

    fn read(&mut self, id: u32, mut copy: Copy) {
        copy.stage = Stage::Reading;
        let Range { start: offset, end } = copy.piece;
        self.copier.owed += end - offset;
        let buffers = self.copier.pool.buffers(&copy.memory, end - offset);
        self.order_aside(Side::Source, id, Operation::Read { offset, buffers });
        self.flights.put(id, Flight::Copy(copy));
    }

    fn write(&mut self, id: u32, mut copy: Copy) {
        let Range { start: offset, end } = copy.piece;
        let length = end - offset;
        if self.ledger.is_known_zero(&copy.piece) && self.copier.pool.is_zero(&copy.memory, length) {
            self.piece_done(id, copy);
            return;
        }
        copy.stage = Stage::Writing;
        let buffers = self.copier.pool.buffers(&copy.memory, length);
        self.write_copy(id, copy, Operation::Write { offset, buffers });
    }

    fn zero(&mut self, id: u32, mut copy: Copy) {
        if self.ledger.is_known_zero(&copy.piece) {
            self.piece_done(id, copy);
            return;
        }
        copy.stage = Stage::Zeroing;
        let Range { start: offset, end } = copy.piece;
        let unmap = self.plan.unmap;
        self.write_copy(id, copy, Operation::WriteZeroes { offset, length: end - offset, unmap });
    }

    fn write_copy(&mut self, id: u32, copy: Copy, operation: Operation) {
        if !self.has_bug(Bug::ZeroForEver) {
            self.ledger.writing(&copy.piece);
        }
        self.order_aside(Side::Target, id, operation);
        self.flights.put(id, Flight::Copy(copy));
    }

    fn order_aside(&mut self, side: Side, id: u32, operation: Operation) {
        self.output.orders.push(Order { side, id, aside: true, operation });
    }

    fn piece_done(&mut self, id: u32, copy: Copy) {
        if self.has_bug(Bug::TakeAfterCopy) {
            self.ledger.take(&copy.piece);
        }
        self.copier.done += copy.piece.end - copy.piece.start;
        self.release(id);
        self.next_piece(id, copy);
    }
}
