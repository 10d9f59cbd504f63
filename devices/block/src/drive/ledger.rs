//! What is known of two images, chunk by chunk: where they may differ, what of the target may be lost by a power
//! failure, what of it is known to read as zeroes.
//!
//! ```text
//!   source changed ──mark──▶ dirty ──take──▶ (a copy is under way) ──written──▶ unsynced ──sync_started──▶ syncing
//!                              ▲                 │ put_back                                                 │
//!                              ├─────────────────┘                                │                         │
//!                              └──────────────────────── sync_failed ─────────────┴─────────────────────────┤
//!                                                                                             sync_succeeded └▶ –
//! ```
//!
//! Ranges are in bytes. To mark is always safe and touches every chunk of a range, the partly covered too; to take is
//! a promise, and takes whole chunks only.

use std::ops::Range;

use super::bitmap::Bitmap;

pub(super) struct Ledger {
    /// log2 of the bytes in a chunk.
    shift: u32,
    size: u64,
    /// The target may differ from the source.
    dirty: Bitmap,
    /// Bytes ever marked that were clean before, counted in chunks.
    changed: u64,
    /// Written to the target since the last sync began.
    unsynced: Bitmap,
    /// Written before the sync that is under way.
    syncing: Bitmap,
    /// Never written, on a target that was all zeroes.
    zero: Option<Bitmap>,
}

impl Ledger {
    /// For images of `size` bytes, in chunks of `granularity` bytes, a power of two.
    pub(super) fn new(size: u64, granularity: u32, target_is_zero: bool) -> Self {
        let shift = granularity.trailing_zeros();
        let chunks = size.div_ceil(u64::from(granularity));
        let bitmap = || Bitmap::new(chunks);
        let zero = target_is_zero.then(|| {
            let mut zero = bitmap();
            zero.set(&(0..chunks));
            zero
        });
        Self { shift, size, dirty: bitmap(), changed: 0, unsynced: bitmap(), syncing: bitmap(), zero }
    }

    /// The beginning of the chunk that `offset` is in.
    pub(super) fn floor(&self, offset: u64) -> u64 {
        offset >> self.shift << self.shift
    }

    /// `offset` where a chunk begins there, else where the next one does, or the end.
    pub(super) fn ceil(&self, offset: u64) -> u64 {
        let granularity = 1_u64 << self.shift;
        offset.checked_next_multiple_of(granularity).map_or(self.size, |end| end.min(self.size))
    }

    /// The chunks that have a part in `range`.
    fn touched(&self, range: &Range<u64>) -> Range<u64> {
        range.start >> self.shift..self.ceil(range.end).div_ceil(1 << self.shift)
    }

    /// The chunks that lie in `range` entirely; the last one may be short.
    fn covered(&self, range: &Range<u64>) -> Range<u64> {
        let end = if range.end >= self.size { self.ceil(self.size) } else { self.floor(range.end) };
        let start = range.start.div_ceil(1 << self.shift);
        start..end.div_ceil(1 << self.shift).max(start)
    }

    /// The source has changed, or may have, or the target is not what was written to it.
    pub(super) fn mark(&mut self, range: &Range<u64>) {
        let chunks = self.touched(range);
        self.changed += self.dirty.set(&chunks);
    }

    /// What was taken was not copied.
    pub(super) fn put_back(&mut self, range: &Range<u64>) {
        let chunks = self.touched(range);
        self.dirty.set(&chunks);
    }

    /// From now on `range` is on its way to the target.
    pub(super) fn take(&mut self, range: &Range<u64>) {
        let chunks = self.covered(range);
        self.dirty.clear(&chunks);
    }

    /// [`Self::take`] of chunks that are only touched: wrong.
    #[cfg(test)]
    pub(super) fn take_touched(&mut self, range: &Range<u64>) {
        let chunks = self.touched(range);
        self.dirty.clear(&chunks);
    }

    /// Dirty chunks that follow one another, the first of them at `from` or later: `longest` bytes at most, or one.
    pub(super) fn next_dirty(&self, from: u64, longest: u64) -> Option<Range<u64>> {
        let start = self.dirty.next_set(from.div_ceil(1 << self.shift))?;
        let most = (longest >> self.shift).max(1);
        let end = self.dirty.next_clear(start, start + most);
        Some(start << self.shift..(end << self.shift).min(self.size))
    }

    /// Whether the target may differ somewhere.
    pub(super) fn is_dirty(&self) -> bool {
        self.dirty.ones() > 0
    }

    /// At most how many bytes of the target may differ.
    pub(super) fn dirty_bytes(&self) -> u64 {
        (self.dirty.ones() << self.shift).min(self.size)
    }

    /// How many bytes were ever marked that were clean: a rate's numerator.
    pub(super) fn changed_bytes(&self) -> u64 {
        self.changed << self.shift
    }

    /// A write to the target begins.
    pub(super) fn writing(&mut self, range: &Range<u64>) {
        let chunks = self.touched(range);
        if let Some(zero) = &mut self.zero {
            zero.clear(&chunks);
        }
    }

    /// A write to the target is complete.
    pub(super) fn written(&mut self, range: &Range<u64>) {
        let chunks = self.touched(range);
        self.unsynced.set(&chunks);
    }

    /// Whether the target is known to read as zeroes there.
    pub(super) fn is_known_zero(&self, range: &Range<u64>) -> bool {
        self.zero.as_ref().is_some_and(|zero| zero.is_all_set(&self.touched(range)))
    }

    /// The target is made durable as far as it is written now.
    pub(super) fn sync_started(&mut self) {
        self.unsynced.move_into(&mut self.syncing);
    }

    /// It is durable as far as it was written when the sync began.
    pub(super) fn sync_succeeded(&mut self) {
        self.syncing.clear_all();
    }

    /// Nobody knows what the target holds of all that was written since the last sync that succeeded, until now: what was
    /// written while the sync was under way may have been part of it.
    pub(super) fn sync_failed(&mut self) {
        self.syncing.move_into(&mut self.dirty);
        self.unsynced.move_into(&mut self.dirty);
    }

    /// At most how many bytes were written to the target since the last sync began.
    pub(super) fn unsynced_bytes(&self) -> u64 {
        self.unsynced.ones() << self.shift
    }

    /// Whether everything written to the target is durable.
    pub(super) fn is_synced(&self) -> bool {
        self.unsynced.ones() == 0 && self.syncing.ones() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marking_touches_and_taking_covers() {
        let mut ledger = Ledger::new(10_000, 1024, false);
        ledger.mark(&(1000..1030));
        assert_eq!(ledger.next_dirty(0, u64::MAX), Some(0..2048));
        assert_eq!(ledger.next_dirty(0, 1024), Some(0..1024));
        ledger.take(&(1..2048));
        assert_eq!(ledger.next_dirty(0, 0), Some(0..1024));
        ledger.take(&(0..1023));
        assert_eq!((ledger.dirty_bytes(), ledger.changed_bytes()), (1024, 2048));
        ledger.take(&(0..1024));
        assert!(!ledger.is_dirty());
    }

    #[test]
    fn a_last_chunk_that_is_short_is_covered_by_what_reaches_the_end() {
        let mut ledger = Ledger::new(10_000, 1024, false);
        ledger.mark(&(9999..10_000));
        assert_eq!(ledger.next_dirty(0, u64::MAX), Some(9216..10_000));
        ledger.take(&(9217..10_000));
        assert!(ledger.is_dirty());
        ledger.take(&(9216..9999));
        assert!(ledger.is_dirty());
        ledger.take(&(9216..10_000));
        assert!(!ledger.is_dirty());
        ledger.mark(&(9000..u64::MAX));
        assert_eq!(ledger.next_dirty(0, u64::MAX), Some(8192..10_000));
    }

    #[test]
    fn a_sync_that_fails_makes_dirty_what_was_written_since_the_last_good_one_and_nothing_else() {
        let mut ledger = Ledger::new(10_240, 1024, false);
        ledger.written(&(0..1024));
        ledger.sync_started();
        ledger.written(&(2048..3072));
        ledger.sync_succeeded();
        assert!(!ledger.is_synced());
        ledger.sync_started();
        ledger.written(&(4096..5120));
        ledger.sync_failed();
        assert_eq!(ledger.next_dirty(0, u64::MAX), Some(2048..3072));
        assert_eq!(ledger.next_dirty(3072, u64::MAX), Some(4096..5120));
        assert_eq!(ledger.next_dirty(5120, u64::MAX), None);
        assert!(ledger.is_synced());
    }

    #[test]
    fn a_target_is_known_zero_until_it_is_written() {
        let mut ledger = Ledger::new(10_000, 1024, true);
        assert!(ledger.is_known_zero(&(0..10_000)));
        ledger.writing(&(9999..10_000));
        assert!(ledger.is_known_zero(&(0..9216)));
        assert!(!ledger.is_known_zero(&(9000..9300)));
        assert!(!Ledger::new(10_000, 1024, false).is_known_zero(&(0..1)));
    }
}
