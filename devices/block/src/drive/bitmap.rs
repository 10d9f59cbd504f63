//! A bit for every chunk of a disk, and a summary that makes the next set one quick to find: a terabyte in chunks of
//! 64 KiB has sixteen million bits, and a summary of 32 KiB.

use std::ops::Range;

const WORD: u64 = 64;

/// Bits 0 to `length`, all clear at first. Ranges are clipped to the length.
pub(super) struct Bitmap {
    length: u64,
    words: Vec<u64>,
    /// A bit for each word that is not zero.
    summary: Vec<u64>,
    ones: u64,
}

/// Index of the word, and of the bit in it.
fn split(bit: u64) -> (usize, u32) {
    // Bitmaps are in memory; the remainder is below 64.
    (usize::try_from(bit / WORD).unwrap_or(usize::MAX), u32::try_from(bit % WORD).unwrap_or(0))
}

/// A word whose bits from `from` up to `to` are set; `to` may be 64.
fn mask(from: u32, to: u32) -> u64 {
    let below = |n: u32| 1_u64.checked_shl(n).map_or(u64::MAX, |bit| bit - 1);
    below(to) & !below(from)
}

impl Bitmap {
    pub(super) fn new(length: u64) -> Self {
        let words = split(length.next_multiple_of(WORD)).0;
        Self { length, words: vec![0; words], summary: vec![0; words.div_ceil(64)], ones: 0 }
    }

    /// How many are set.
    pub(super) fn ones(&self) -> u64 {
        self.ones
    }

    /// Sets all of `range`; returns how many were clear.
    pub(super) fn set(&mut self, range: &Range<u64>) -> u64 {
        let before = self.ones;
        self.for_words(range, |word, mask| word | mask);
        self.ones - before
    }

    /// Clears all of `range`; returns how many were set.
    pub(super) fn clear(&mut self, range: &Range<u64>) -> u64 {
        let before = self.ones;
        self.for_words(range, |word, mask| word & !mask);
        before - self.ones
    }

    /// Whether all of `range` are set.
    pub(super) fn is_all_set(&self, range: &Range<u64>) -> bool {
        let end = range.end.min(self.length);
        range.start >= end || self.next_clear(range.start, end) == end
    }

    /// The first that is set, from `from` on.
    pub(super) fn next_set(&self, from: u64) -> Option<u64> {
        if from >= self.length {
            return None;
        }
        let (index, bit) = split(from);
        let rest = self.words[index] & mask(bit, 64);
        let found = if rest != 0 { (index, rest) } else { self.next_word(index + 1)? };
        Some(found.0 as u64 * WORD + u64::from(found.1.trailing_zeros()))
    }

    /// The first that is clear, from `from` on but before `limit`; else `limit`, or the length where that is less.
    pub(super) fn next_clear(&self, from: u64, limit: u64) -> u64 {
        let limit = limit.min(self.length);
        let mut at = from;
        while at < limit {
            let (index, bit) = split(at);
            let clear = !self.words[index] & mask(bit, 64);
            let base = index as u64 * WORD;
            if clear != 0 {
                return (base + u64::from(clear.trailing_zeros())).min(limit);
            }
            at = base + WORD;
        }
        limit
    }

    /// Clears everything, and sets it in `other`, which is as long. Returns how many were clear there.
    pub(super) fn move_into(&mut self, other: &mut Self) -> u64 {
        let before = other.ones;
        self.drain(|index, word| other.update(index, |old| old | word));
        other.ones - before
    }

    /// Clears everything.
    pub(super) fn clear_all(&mut self) {
        self.drain(|_, _| {});
    }

    fn drain(&mut self, mut each: impl FnMut(usize, u64)) {
        let mut from = 0;
        while let Some((index, word)) = self.next_word(from) {
            each(index, word);
            self.update(index, |_| 0);
            from = index + 1;
        }
    }

    /// The first word that is not zero, from `from` on.
    fn next_word(&self, from: usize) -> Option<(usize, u64)> {
        let (mut at, bit) = split(from as u64);
        let mut summary = self.summary.get(at)? & mask(bit, 64);
        while summary == 0 {
            at += 1;
            summary = *self.summary.get(at)?;
        }
        let index = at * 64 + summary.trailing_zeros() as usize;
        Some((index, self.words[index]))
    }

    fn for_words(&mut self, range: &Range<u64>, change: impl Fn(u64, u64) -> u64) {
        let end = range.end.min(self.length);
        let mut at = range.start;
        while at < end {
            let (index, bit) = split(at);
            let next = (index as u64 + 1) * WORD;
            let to = if end < next { split(end).1 } else { 64 };
            self.update(index, |word| change(word, mask(bit, to)));
            at = next;
        }
    }

    fn update(&mut self, index: usize, change: impl FnOnce(u64) -> u64) {
        let old = self.words[index];
        let new = change(old);
        self.words[index] = new;
        self.ones = self.ones + u64::from(new.count_ones()) - u64::from(old.count_ones());
        let bit = 1 << (index % 64);
        if new == 0 {
            self.summary[index / 64] &= !bit;
        } else {
            self.summary[index / 64] |= bit;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drive::tests::Random;

    #[test]
    fn a_bitmap_agrees_with_a_list_of_booleans() {
        let mut random = Random::new();
        for _ in 0..40 {
            let length = 1 + random.below(9000);
            let mut bitmap = Bitmap::new(length);
            let mut other = Bitmap::new(length);
            let mut model = vec![false; usize::try_from(length).unwrap()];
            for _ in 0..60 {
                let start = random.below(length);
                let end = start + random.below(length - start + 70);
                let bits =
                    &mut model[usize::try_from(start).unwrap()..usize::try_from(end.min(length)).unwrap()];
                match random.below(8) {
                    0..4 => {
                        let fresh = bits.iter().filter(|bit| !**bit).count();
                        bits.fill(true);
                        assert_eq!(bitmap.set(&(start..end)), fresh as u64);
                    }
                    4..7 => {
                        let gone = bits.iter().filter(|bit| **bit).count();
                        bits.fill(false);
                        assert_eq!(bitmap.clear(&(start..end)), gone as u64);
                    }
                    _ => {
                        bitmap.move_into(&mut other);
                        assert_eq!((bitmap.ones(), bitmap.next_set(0)), (0, None));
                        other.move_into(&mut bitmap);
                    }
                }
                assert_eq!(bitmap.ones(), model.iter().filter(|bit| **bit).count() as u64);
                let from = random.below(length + 2);
                let index = usize::try_from(from).unwrap();
                let next = |value| (index..model.len()).find(|i| model[*i] == value).map(|i| i as u64);
                assert_eq!(bitmap.next_set(from), next(true));
                if from < length {
                    assert_eq!(bitmap.next_clear(from, length), next(false).unwrap_or(length));
                }
                let all = model[usize::try_from(start).unwrap()..usize::try_from(end.min(length)).unwrap()]
                    .iter()
                    .all(|bit| *bit);
                assert_eq!(bitmap.is_all_set(&(start..end)), all);
            }
            bitmap.clear_all();
            assert_eq!((bitmap.ones(), bitmap.next_set(0)), (0, None));
        }
    }

    #[test]
    fn a_bitmap_of_nothing_has_nothing_set() {
        let mut bitmap = Bitmap::new(0);
        assert_eq!(bitmap.set(&(0..10)), 0);
        assert_eq!(bitmap.next_set(0), None);
        assert_eq!(bitmap.next_clear(0, 5), 0);
    }
}
