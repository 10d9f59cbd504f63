//! Who may work on which bytes of both images. A claim is all or nothing, and waits for every claim made before it
//! that overlaps it: nobody holds one part while he waits for another, so nobody waits for ever.

use std::ops::Range;

struct Claim {
    id: u32,
    range: Range<u64>,
    granted: bool,
}

/// Claims in the order in which they were made.
#[derive(Default)]
pub(super) struct Claims {
    list: Vec<Claim>,
    waiting: usize,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

impl Claims {
    /// Claims `range` for `id`, which has no other claim. Returns whether it is granted at once; else [`Self::grant`]
    /// will say so.
    pub(super) fn claim(&mut self, id: u32, range: Range<u64>) -> bool {
        let granted = !self.list.iter().any(|claim| overlap(&claim.range, &range));
        self.waiting += usize::from(!granted);
        self.list.push(Claim { id, range, granted });
        granted
    }

    /// Gives up a claim, or the wait for it.
    pub(super) fn release(&mut self, id: u32) {
        if let Some(index) = self.list.iter().position(|claim| claim.id == id) {
            let claim = self.list.remove(index);
            self.waiting -= usize::from(!claim.granted);
        }
    }

    /// Makes a claim smaller.
    pub(super) fn narrow(&mut self, id: u32, range: Range<u64>) {
        if let Some(claim) = self.list.iter_mut().find(|claim| claim.id == id) {
            claim.range = range;
        }
    }

    /// Grants what can be granted since something was released or narrowed.
    pub(super) fn grant(&mut self) -> Vec<u32> {
        let mut granted = Vec::new();
        let mut index = 0;
        while index < self.list.len() && self.waiting > 0 {
            let (before, rest) = self.list.split_at_mut(index);
            let claim = &mut rest[0];
            if !claim.granted && !before.iter().any(|other| overlap(&other.range, &claim.range)) {
                claim.granted = true;
                self.waiting -= 1;
                granted.push(claim.id);
            }
            index += 1;
        }
        granted
    }

    /// The claim in `range`, granted or not, that begins first.
    pub(super) fn first_in(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let inside = self.list.iter().filter(|claim| overlap(&claim.range, range));
        inside.min_by_key(|claim| claim.range.start).map(|claim| claim.range.clone())
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_that_overlap_are_granted_in_order_and_whole() {
        let mut claims = Claims::default();
        assert!(claims.claim(1, 0..10));
        assert!(claims.claim(2, 20..30));
        assert!(!claims.claim(3, 5..25));
        // It would be free, but an earlier claim waits for it.
        assert!(!claims.claim(4, 15..18));
        assert!(claims.claim(5, 30..40));
        claims.release(1);
        assert_eq!(claims.grant(), []);
        claims.release(2);
        assert_eq!(claims.grant(), [3]);
        claims.narrow(3, 5..10);
        assert_eq!(claims.grant(), [4]);
        [3, 4, 5].into_iter().for_each(|id| claims.release(id));
        assert!(claims.is_empty());
    }

    #[test]
    fn who_gives_up_waiting_is_waited_for_no_more() {
        let mut claims = Claims::default();
        assert!(claims.claim(1, 0..10));
        assert!(!claims.claim(2, 0..20));
        assert!(!claims.claim(3, 10..20));
        claims.release(2);
        assert_eq!(claims.grant(), [3]);
        assert_eq!(claims.first_in(&(5..20)), Some(0..10));
        assert_eq!(claims.first_in(&(20..30)), None);
    }
}
