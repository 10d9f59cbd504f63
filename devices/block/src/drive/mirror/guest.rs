//! The guest's requests.

#![expect(unsafe_code, reason = "copies the guest's memory before it is written twice")]

use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::flights::Flight;
use super::{Bug, Mirror, Phase};
use crate::drive::options::{MirrorOperation, Side};
use crate::drive::pool::{Loan, Pool};
use crate::engine::{Completion, Operation, memory};
use crate::errno::Errno;

/// A guest that has asked for nothing for so long is not disturbed by large copies.
const QUIET: Duration = Duration::from_millis(100);

/// A write, of data or zeroes, to both images.
pub(super) struct Active {
    token: u64,
    range: Range<u64>,
    /// As the guest gave it.
    operation: Operation,
    /// Its claim is granted.
    pub(super) granted: bool,
    /// What it is copied to, once it has begun.
    bounce: Option<Loan>,
    /// The source has it.
    at_target: bool,
}

impl Active {
    pub(super) fn range(&self) -> &Range<u64> {
        &self.range
    }

    /// The source has it, and the target is yet to answer.
    pub(super) fn is_at_target(&self) -> bool {
        self.at_target
    }
}

/// A flush of both images. The guest hears of the source's result only.
#[derive(Clone, Copy)]
pub(super) struct Flush {
    pub(super) token: u64,
    pub(super) source: Option<Result<(), Errno>>,
    /// The target is done, or not waited for any more.
    pub(super) target: bool,
}

pub(super) struct Guests {
    /// Operations that have not completed.
    pub(super) in_flight: usize,
    /// Tracked writes among them.
    pub(super) tracked: usize,
    /// Active writes that have not begun, or writes that a backup holds, in the order in which they came.
    pub(super) queue: VecDeque<u32>,
    bounce: Pool,
    /// One has come since the last look.
    came: bool,
    /// When one was last known to have come.
    last: Option<Instant>,
    /// It works: copies are to keep out of its way.
    pub(super) busy: bool,
}

impl Guests {
    pub(super) fn new(bounce: u64) -> Self {
        Self {
            in_flight: 0,
            tracked: 0,
            queue: VecDeque::new(),
            bounce: Pool::new(bounce),
            came: false,
            last: None,
            busy: false,
        }
    }

    /// Whether it works is seen from when its requests come.
    pub(super) fn measure(&mut self, now: Instant) {
        if std::mem::take(&mut self.came) {
            self.last = Some(now);
        }
        self.busy = self.last.is_some_and(|last| now.saturating_duration_since(last) < QUIET);
    }

    pub(super) fn is_clean(&self) -> bool {
        self.in_flight == 0 && self.tracked == 0 && self.queue.is_empty() && self.bounce.is_whole()
    }
}

/// What an operation may change, and nothing when it is in vain: the engine says so.
fn changes(operation: &Operation, size: u64) -> Option<Range<u64>> {
    let (offset, length) = match operation {
        Operation::Write { offset, buffers } => (*offset, memory::total(buffers)?),
        Operation::Discard { offset, length } | Operation::WriteZeroes { offset, length, .. } => {
            (*offset, *length)
        }
        Operation::Read { .. } | Operation::Flush | Operation::Extent { .. } => return None,
    };
    let end = offset.checked_add(length)?.min(size);
    (offset < end).then_some(offset..end)
}

impl Mirror {
    /// A guest's operation. Its completion carries `token`.
    ///
    /// # Safety
    ///
    /// As [`crate::Engine::queue`]; the orders that come of it as well.
    pub(in crate::drive) unsafe fn guest(&mut self, token: u64, operation: Operation) {
        self.guests.in_flight += 1;
        self.guests.came = true;
        let Some(range) = changes(&operation, self.plan.images.size) else {
            match operation {
                // A quiesced target is synced, and nothing was written since; an error of its would end the calm.
                Operation::Flush if self.condition.is_active() && self.condition.phase != Phase::Quiesced => {
                    self.flush_both(token);
                }
                _ => self.pass(token, operation),
            }
            return;
        };
        if self.is_backup() {
            self.write_after_copy(token, range, operation);
            return;
        }
        self.unfinish();
        let fits = range.end - range.start <= self.guests.bounce.capacity();
        let active = match &operation {
            Operation::Write { .. } => fits,
            Operation::WriteZeroes { .. } => true,
            _ => self.has_bug(Bug::DiscardAsZeroes),
        };
        if active && self.condition.is_active() {
            let id = self.flights.reserve();
            let granted = self.has_bug(Bug::ActiveWithoutClaim) || self.claims.claim(id, range.clone());
            let active = Active { token, range, operation, granted, bounce: None, at_target: false };
            self.flights.put(id, Flight::Active(active));
            self.guests.queue.push_back(id);
            self.settle();
        } else {
            let id = self.flights.reserve();
            self.track(id, token, range, operation);
        }
    }

    pub(super) fn pass(&mut self, token: u64, operation: Operation) {
        let id = self.flights.reserve();
        self.flights.put(id, Flight::Plain { token });
        self.order(Side::Source, id, operation);
    }

    fn track(&mut self, id: u32, token: u64, range: Range<u64>, operation: Operation) {
        if self.has_bug(Bug::MarkAtSubmit) {
            self.ledger.mark(&range);
        }
        self.guests.tracked += 1;
        self.flights.put(id, Flight::Tracked { token, range });
        self.order(Side::Source, id, operation);
    }

    pub(super) fn tracked(&mut self, id: u32, token: u64, range: &Range<u64>, result: Result<(), Errno>) {
        self.guests.tracked -= 1;
        let unmarked =
            self.has_bug(Bug::MarkAtSubmit) || (result.is_err() && self.has_bug(Bug::SourceFailureNotMarked));
        if !unmarked {
            self.ledger.mark(range);
        }
        self.copier.wake();
        self.flights.end(id);
        self.answer(token, result);
    }

    /// An operation of the guest's is over.
    pub(super) fn answer(&mut self, token: u64, result: Result<(), Errno>) {
        self.guests.in_flight -= 1;
        self.output.completions.push(Completion { token, result });
    }

    /// Begins active writes that have their claim, in the order in which they came as far as memory goes.
    pub(super) fn start_active(&mut self) {
        let mut queue = std::mem::take(&mut self.guests.queue);
        let mut starved = false;
        queue.retain(|id| !self.start(*id, &mut starved));
        self.guests.queue = queue;
    }

    /// Returns whether it has begun.
    fn start(&mut self, id: u32, starved: &mut bool) -> bool {
        let no_bounce = self.has_bug(Bug::NoBounce);
        let Some(Flight::Active(active)) = self.flights.get_mut(id) else { return true };
        if !active.granted {
            return false;
        }
        let range = active.range.clone();
        let length = range.end - range.start;
        let mut operation = None;
        if let Operation::Write { offset, buffers } = &active.operation {
            let Some(loan) = (!*starved).then(|| self.guests.bounce.lend(length)).flatten() else {
                *starved = true;
                return false;
            };
            // SAFETY: the guest's buffers are valid until its operation completes, by the contract of `guest`.
            unsafe { self.guests.bounce.gather(&loan, buffers) };
            let buffers = self.guests.bounce.buffers(&loan, length);
            operation = Some(Operation::Write { offset: *offset, buffers });
            active.bounce = Some(loan);
        }
        let operation = match operation {
            Some(bounced) if !no_bounce => bounced,
            _ => active.operation.clone(),
        };
        if !self.has_bug(Bug::TakeAfterActiveWrite) {
            self.take_active(&range);
        }
        self.order(Side::Source, id, operation);
        true
    }

    fn take_active(&mut self, range: &Range<u64>) {
        #[cfg(test)]
        if self.has_bug(Bug::TakeTouched) {
            return self.ledger.take_touched(range);
        }
        self.ledger.take(range);
    }

    /// One of the images has done its part.
    pub(super) fn active_step(&mut self, id: u32, active: Active, side: Side, result: Result<(), Errno>) {
        let range = active.range.clone();
        match (side, result) {
            (Side::Source, Ok(())) if self.condition.is_active() => {
                self.write_target(id, active);
                return;
            }
            // Not active any more: what the target lacks is copied when it is well again.
            (Side::Source, Ok(())) => self.ledger.mark(&range),
            (Side::Source, Err(_)) => {
                if !self.has_bug(Bug::SourceFailureNotMarked) {
                    self.ledger.mark(&range);
                }
            }
            (Side::Target, Ok(())) => {
                if self.has_bug(Bug::TakeAfterActiveWrite) {
                    self.take_active(&range);
                }
                self.ledger.written(&range);
            }
            (Side::Target, Err(errno)) => {
                if !self.has_bug(Bug::TargetFailureNotMarked) {
                    self.ledger.mark(&range);
                }
                self.fail(Side::Target, MirrorOperation::Write, errno, range.start, false);
            }
        }
        self.end_active(id, active.bounce);
        // The guest does not hear of the target.
        self.answer(active.token, if side == Side::Source { result } else { Ok(()) });
    }

    pub(super) fn end_active(&mut self, id: u32, bounce: Option<Loan>) {
        if let Some(loan) = bounce {
            self.guests.bounce.give_back(loan);
        }
        self.release(id);
        self.copier.wake();
        self.flights.end(id);
    }

    fn write_target(&mut self, id: u32, mut active: Active) {
        active.at_target = true;
        let Range { start: offset, end } = active.range;
        let operation = match (&active.operation, &active.bounce) {
            (Operation::Write { buffers, .. }, Some(loan)) => {
                let bounced = self.guests.bounce.buffers(loan, end - offset);
                let buffers = if self.has_bug(Bug::NoBounce) { buffers.clone() } else { bounced };
                Operation::Write { offset, buffers }
            }
            (Operation::WriteZeroes { unmap, .. }, _) => {
                Operation::WriteZeroes { offset, length: end - offset, unmap: *unmap && self.plan.unmap }
            }
            _ => Operation::WriteZeroes { offset, length: end - offset, unmap: self.plan.unmap },
        };
        if !self.has_bug(Bug::ZeroForEver) {
            self.ledger.writing(&active.range);
        }
        self.flights.put(id, Flight::Active(active));
        self.order(Side::Target, id, operation);
    }

    fn flush_both(&mut self, token: u64) {
        let id = self.flights.reserve();
        self.flights.put(id, Flight::Flush(Flush { token, source: None, target: false }));
        self.order(Side::Source, id, Operation::Flush);
        self.want_sync(id);
    }

    /// The source is flushed.
    pub(super) fn flushed(&mut self, id: u32, flush: Flush, result: Result<(), Errno>) {
        self.flush_step(id, Flush { source: Some(result), ..flush });
    }

    /// The target is flushed, or is not waited for.
    pub(super) fn target_flushed(&mut self, id: u32) {
        if let Some(Flight::Flush(flush)) = self.flights.take(id) {
            self.flush_step(id, Flush { target: true, ..flush });
        }
    }

    fn flush_step(&mut self, id: u32, flush: Flush) {
        match flush {
            Flush { token, source: Some(result), target: true } => {
                self.flights.end(id);
                self.answer(token, result);
            }
            flush => self.flights.put(id, Flight::Flush(flush)),
        }
    }

    /// What waits for the target alone waits no more: nobody will ever look at it.
    pub(super) fn abandon_active(&mut self) {
        for id in self.flights.active_at_target() {
            if let Some(Flight::Active(Active { token, bounce, .. })) = self.flights.take(id) {
                self.flights.put(id, Flight::Abandoned { bounce });
                self.answer(token, Ok(()));
            }
        }
    }

    /// From now on the guest does not wait for the target, as far as it can be helped.
    pub(super) fn leave_active(&mut self) {
        if self.is_backup() {
            self.let_all_go();
            return;
        }
        for id in std::mem::take(&mut self.guests.queue) {
            if let Some(Flight::Active(Active { token, range, operation, .. })) = self.flights.take(id) {
                self.release(id);
                self.track(id, token, range, operation);
            }
        }
        for id in self.syncs.forget_guests() {
            self.target_flushed(id);
        }
        self.settle();
    }
}
