//! What is under way, by the number that its orders carry.

use std::ops::Range;

use super::before::Held;
use super::copier::Copy;
use super::guest::{Active, Flush};
use crate::drive::pool::Loan;

pub(super) enum Flight {
    /// A guest's operation that concerns the source alone and changes nothing.
    Plain { token: u64 },
    /// A guest's write that is copied later.
    Tracked { token: u64, range: Range<u64> },
    /// A guest's write that goes to both images.
    Active(Active),
    /// An active write that is answered, because the mirror was given up: the target has it still.
    Abandoned { bounce: Option<Loan> },
    /// A guest's flush that goes to both images.
    Flush(Flush),
    /// A guest's write that waits until what it changes is copied.
    Held(Held),
    /// A copy.
    Copy(Copy),
    /// A flush of the target.
    Sync,
}

#[derive(Default)]
pub(super) struct Flights {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

enum Slot {
    Free,
    /// Its flight is in somebody's hands.
    Taken,
    Kept(Flight),
}

impl Flights {
    /// A number for a flight that is put there later.
    pub(super) fn reserve(&mut self) -> u32 {
        match self.free.pop() {
            Some(id) => {
                self.slots[id as usize] = Slot::Taken;
                id
            }
            None => {
                self.slots.push(Slot::Taken);
                u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
            }
        }
    }

    /// Keeps a flight under a number that is reserved, or whose flight was taken.
    pub(super) fn put(&mut self, id: u32, flight: Flight) {
        self.slots[id as usize] = Slot::Kept(flight);
    }

    /// Takes a flight out, to be put back or to be over.
    pub(super) fn take(&mut self, id: u32) -> Option<Flight> {
        let slot = self.slots.get_mut(id as usize)?;
        match std::mem::replace(slot, Slot::Taken) {
            Slot::Kept(flight) => Some(flight),
            other => {
                *slot = other;
                None
            }
        }
    }

    /// A flight that stays.
    pub(super) fn get_mut(&mut self, id: u32) -> Option<&mut Flight> {
        match self.slots.get_mut(id as usize)? {
            Slot::Kept(flight) => Some(flight),
            Slot::Free | Slot::Taken => None,
        }
    }

    /// What copies and active writes may be writing to the target.
    pub(super) fn target_ranges(&self) -> Vec<Range<u64>> {
        let range = |slot: &Slot| match slot {
            Slot::Kept(Flight::Active(active)) => Some(active.range().clone()),
            Slot::Kept(Flight::Copy(copy)) => Some(copy.piece().clone()),
            _ => None,
        };
        self.slots.iter().filter_map(range).collect()
    }

    /// Whether a copy has taken a part of `range`, and is not over.
    pub(super) fn is_copied(&self, range: &Range<u64>) -> bool {
        let overlaps = |slot: &Slot| match slot {
            Slot::Kept(Flight::Copy(copy)) => {
                copy.range().start < range.end && range.start < copy.range().end
            }
            _ => false,
        };
        self.slots.iter().any(overlaps)
    }

    /// A flight is over, and its number free.
    pub(super) fn end(&mut self, id: u32) {
        self.slots[id as usize] = Slot::Free;
        self.free.push(id);
    }

    /// The numbers of the active writes that the target has.
    pub(super) fn active_at_target(&self) -> Vec<u32> {
        let at_target =
            |slot: &Slot| matches!(slot, Slot::Kept(Flight::Active(active)) if active.is_at_target());
        (0..).zip(&self.slots).filter(|(_, slot)| at_target(slot)).map(|(id, _)| id).collect()
    }

    /// Whether none of them needs the target, or is a copy. A flush that does waits for a [`Flight::Sync`].
    pub(super) fn are_the_guests(&self) -> bool {
        self.slots.iter().all(|slot| match slot {
            Slot::Kept(flight) => {
                matches!(flight, Flight::Plain { .. } | Flight::Tracked { .. } | Flight::Flush(_))
            }
            Slot::Free | Slot::Taken => true,
        })
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }
}
