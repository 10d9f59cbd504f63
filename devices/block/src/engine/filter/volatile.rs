//! A disk's volatile write cache, as a machine that loses power shows it: what was not flushed is gone. Pure.
//!
//! ```text
//!   write, zeroes, discard ─▶ fresh ──flush, or half of the limit reached──▶ settling ──all written──▶ the disk below
//!                               │  ▲                                             │                       (then the sync)
//!                      read ◀───┴──┼─────────────────────────────────────────────┘
//!                               │  └──── a write below has failed ◀──────────────┘
//!                               └─ seeded: at random, whole or torn, below early; it stays fresh
//! ```
//!
//! The process's memory plays the part of the disk's: `SIGKILL` is the power cut, and the image is left with what was
//! flushed. An engine that ends in order writes everything first.
//!
//! # Why what was flushed is there
//!
//! 1. What is kept does not overlap, in either layer: the order of writes below does not matter within one.
//! 2. A layer settles only when the one before, and whatever went below early, is over: older content never lands on
//!    newer.
//! 3. A flush waits for the layer that holds all that was complete when it came; if that cannot be written, it fails, and
//!    the layer's content goes back under what is fresh.
//! 4. Reads look at both layers when they begin, and keep what they have found.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use crate::engine::{Completion, Extent};
use crate::errno::Errno;

/// Bytes that are kept at most; beyond them the older half is written below without a flush, as a real disk does that
/// has only so much memory.
pub const MAX_UNFLUSHED: u64 = 64 << 20;
/// What a piece costs beside its data.
const PIECE_COST: u64 = 128;
/// Writes below in flight at a time.
const WRITES: usize = 16;

/// What a range holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::engine) enum Content {
    /// As many bytes as the range has.
    Data(Arc<[u8]>),
    Zeroes {
        unmap: bool,
    },
}

impl Content {
    /// The content of `part` of `whole`. What is left of data is copied, so that nothing holds more memory than it counts.
    fn part(&self, whole: &Range<u64>, part: &Range<u64>) -> Self {
        match self {
            Self::Data(_) if whole == part => self.clone(),
            Self::Data(bytes) => {
                let at = |offset: u64| usize::try_from(offset - whole.start).unwrap_or(usize::MAX);
                Self::Data(bytes[at(part.start)..at(part.end)].into())
            }
            Self::Zeroes { unmap } => Self::Zeroes { unmap: *unmap },
        }
    }
}

/// A range, and what it holds.
pub(in crate::engine) type Piece = (Range<u64>, Content);

/// Content by range; nothing overlaps.
#[derive(Debug, Default)]
struct Layer {
    /// By where they begin: where they end, and what they hold.
    pieces: BTreeMap<u64, (u64, Content)>,
    cost: u64,
}

fn cost(range: &Range<u64>, content: &Content) -> u64 {
    match content {
        Content::Data(_) => range.end - range.start + PIECE_COST,
        Content::Zeroes { .. } => PIECE_COST,
    }
}

impl Layer {
    fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Where pieces begin that overlap `range`.
    fn touching(&self, range: &Range<u64>) -> impl Iterator<Item = u64> {
        let before = self.pieces.range(..range.start).next_back();
        let before = before.filter(|(_, (end, _))| *end > range.start);
        before.into_iter().chain(self.pieces.range(range.clone())).map(|(start, _)| *start)
    }

    /// What it has of `range`, in order.
    fn within(&self, range: &Range<u64>) -> impl Iterator<Item = Piece> {
        self.touching(range).filter_map(|start| {
            let (end, content) = self.pieces.get(&start)?;
            let part = start.max(range.start)..range.end.min(*end);
            Some((part.clone(), content.part(&(start..*end), &part)))
        })
    }

    fn put(&mut self, range: Range<u64>, content: Content) {
        if range.start < range.end {
            self.cost += cost(&range, &content);
            self.pieces.insert(range.start, (range.end, content));
        }
    }

    /// Forgets what it has of `range`.
    fn cut(&mut self, range: &Range<u64>) {
        for start in self.touching(range).collect::<Vec<_>>() {
            let Some((end, content)) = self.pieces.remove(&start) else { continue };
            let whole = start..end;
            self.cost -= cost(&whole, &content);
            for rest in [start..range.start.min(end), range.end.max(start)..end] {
                if rest.start < rest.end {
                    let content = content.part(&whole, &rest);
                    self.put(rest, content);
                }
            }
        }
    }

    /// Puts `content` over what is there.
    fn cover(&mut self, range: Range<u64>, content: Content) {
        self.cut(&range);
        self.put(range, content);
    }
}

/// A write below.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::engine) struct Order {
    pub(in crate::engine) id: u64,
    pub(in crate::engine) range: Range<u64>,
    pub(in crate::engine) content: Content,
}

/// What there is to do, for the engine.
#[derive(Debug, Default)]
pub(in crate::engine) struct Output {
    /// To be written below.
    pub(in crate::engine) orders: Vec<Order>,
    /// Flushes whose data is below: to be synced.
    pub(in crate::engine) synced: Vec<u64>,
    /// Who is told.
    pub(in crate::engine) done: Vec<Completion>,
}

/// The cache of one engine.
#[derive(Debug)]
pub(in crate::engine) struct VolatileCache {
    // Fixed.
    limit: u64,
    /// Bytes that a disk writes all or none of.
    sector: u64,
    /// Decides what goes below early.
    random: Option<Random>,
    // Volatile.
    fresh: Layer,
    settling: Layer,
    /// Of `settling`, what was not ordered yet.
    due: Vec<u64>,
    /// In flight; kept because the kernel reads their data. `true`: early.
    orders: HashMap<u64, (Order, bool)>,
    next: u64,
    /// The first error of the layer that settles.
    failed: Option<Errno>,
    /// How settling went the last time; then there is no room beyond the limit.
    broken: Option<Errno>,
    /// Nothing new has come since settling failed.
    ailing: bool,
    /// What is fresh is to settle, flush or not.
    wanted: bool,
    /// Flushes that wait for what is fresh, and for what settles.
    flushes: [Vec<u64>; 2],
    /// Writes that are done when there is room.
    withheld: Vec<Completion>,
    output: Output,
}

impl VolatileCache {
    /// Keeps up to `limit` bytes; `sector` is a power of two.
    pub(in crate::engine) fn new(limit: u64, sector: u32, seed: Option<u64>) -> Self {
        Self {
            limit,
            sector: sector.into(),
            random: seed.map(Random),
            fresh: Layer::default(),
            settling: Layer::default(),
            due: Vec::new(),
            orders: HashMap::new(),
            next: 0,
            failed: None,
            broken: None,
            ailing: false,
            wanted: false,
            flushes: Default::default(),
            withheld: Vec::new(),
            output: Output::default(),
        }
    }

    /// Operations that were taken and are not done: flushes and writes of the user's.
    pub(in crate::engine) fn held(&self) -> usize {
        self.flushes.iter().map(Vec::len).sum::<usize>() + self.withheld.len()
    }

    /// Writes below in flight.
    pub(in crate::engine) fn in_flight(&self) -> usize {
        self.orders.len()
    }

    /// Bytes of memory that what is kept takes.
    pub(in crate::engine) fn cost(&self) -> u64 {
        self.fresh.cost + self.settling.cost
    }

    /// Whether the disk below has everything.
    pub(in crate::engine) fn is_clean(&self) -> bool {
        self.fresh.is_empty() && self.settling.is_empty() && self.orders.is_empty()
    }

    /// Whether nothing more comes of [`Self::settle`].
    pub(in crate::engine) fn is_settled(&self) -> bool {
        self.orders.is_empty() && self.settling.is_empty() && (self.fresh.is_empty() || self.ailing)
    }

    pub(in crate::engine) fn output(&mut self) -> &mut Output {
        &mut self.output
    }

    /// Takes a write, of data or zeroes, that ends with this.
    pub(in crate::engine) fn keep(&mut self, range: Range<u64>, content: Content, end: Completion) {
        // Another attempt, by whoever asks for one.
        self.ailing = false;
        if let Some(errno) = self.broken.filter(|_| self.cost() > self.limit) {
            self.output.done.push(Completion { result: Err(errno), ..end });
            return;
        }
        self.fresh.cover(range, content);
        if self.cost() > self.limit {
            self.withheld.push(end);
        } else {
            self.output.done.push(end);
        }
        self.leak();
    }

    /// Takes a flush.
    pub(in crate::engine) fn flush(&mut self, token: u64) {
        self.flushes[0].push(token);
        self.ailing = false;
    }

    /// Everything is to go below, though nobody flushes.
    pub(in crate::engine) fn settle(&mut self) {
        self.wanted = true;
        self.ailing = false;
    }

    /// What it has of `range`: later pieces lie over earlier ones.
    pub(in crate::engine) fn overlay(&self, range: &Range<u64>) -> Vec<Piece> {
        self.settling.within(range).chain(self.fresh.within(range)).collect()
    }

    /// What it has at `offset`, or else where it has something next; `u64::MAX` if nowhere.
    pub(in crate::engine) fn extent(&self, offset: u64) -> Result<Extent, u64> {
        let first = |layer: &Layer| {
            let start = layer.touching(&(offset..u64::MAX)).next()?;
            let (end, content) = layer.pieces.get(&start)?;
            Some((start.max(offset), Extent { hole: matches!(content, Content::Zeroes { .. }), end: *end }))
        };
        let none = (u64::MAX, Extent::UNKNOWN);
        let (over, under) = (first(&self.fresh).unwrap_or(none), first(&self.settling).unwrap_or(none));
        match (over, under) {
            ((start, extent), _) if start == offset => Ok(extent),
            ((next, _), (start, extent)) if start == offset => {
                Ok(Extent { end: extent.end.min(next), ..extent })
            }
            ((one, _), (other, _)) => Err(one.min(other)),
        }
    }

    /// The disk has become smaller; nothing is in flight.
    pub(in crate::engine) fn truncate(&mut self, size: u64) {
        self.fresh.cut(&(size..u64::MAX));
    }

    /// Orders what can be done now.
    pub(in crate::engine) fn pump(&mut self) {
        let idle = self.orders.is_empty() && self.settling.is_empty();
        let wanted = self.wanted || !self.flushes[0].is_empty() || self.fresh.cost > self.limit / 2;
        if idle && wanted && !self.ailing {
            self.wanted = false;
            self.settling = std::mem::take(&mut self.fresh);
            self.flushes[1] = std::mem::take(&mut self.flushes[0]);
            self.due = self.settling.pieces.keys().rev().copied().collect();
            self.conclude();
        }
        while self.orders.len() < WRITES
            && let Some(start) = self.due.pop()
        {
            if let Some((end, content)) = self.settling.pieces.get(&start).cloned() {
                self.order(start..end, content, false);
            }
        }
    }

    fn order(&mut self, range: Range<u64>, content: Content, early: bool) {
        let order = Order { id: self.next, range, content };
        self.next += 1;
        self.orders.insert(order.id, (order.clone(), early));
        self.output.orders.push(order);
    }

    /// The result of an order.
    pub(in crate::engine) fn written(&mut self, id: u64, result: Result<(), Errno>) {
        // What goes below early is in nobody's way, nor missed.
        if let (Some((_, false)), Err(errno)) = (self.orders.remove(&id), result) {
            self.failed.get_or_insert(errno);
            self.due.clear();
        }
        self.conclude();
    }

    /// Ends the settling of a layer, if it is over.
    fn conclude(&mut self) {
        let busy = !self.due.is_empty() || self.orders.values().any(|(_, early)| !early);
        if busy || (self.settling.is_empty() && self.flushes[1].is_empty()) {
            return;
        }
        let settled = std::mem::take(&mut self.settling);
        let flushes = std::mem::take(&mut self.flushes[1]);
        let failed = self.failed.take();
        self.broken = failed;
        match failed {
            None => self.output.synced.extend(flushes),
            Some(errno) => {
                let newer = std::mem::replace(&mut self.fresh, settled);
                for (start, (end, content)) in newer.pieces {
                    self.fresh.cover(start..end, content);
                }
                self.ailing = self.flushes[0].is_empty();
                let failed = flushes.into_iter().map(|token| Completion { token, result: Err(errno) });
                self.output.done.extend(failed);
            }
        }
        if failed.is_some() || self.cost() <= self.limit {
            let end = |end: Completion| Completion { result: failed.map_or(end.result, Err), ..end };
            self.output.done.extend(self.withheld.drain(..).map(end));
        }
    }

    /// With a seed, every other write makes something go below early, as far as the power lasts.
    fn leak(&mut self) {
        let Some(random) = &mut self.random else { return };
        if random.below(2) == 0 || self.orders.len() >= WRITES {
            return;
        }
        let Some((last, _)) = self.fresh.pieces.last_key_value() else { return };
        let from = random.below(last + 1);
        let Some((start, (end, content))) = self.fresh.pieces.range(from..).next() else { return };
        let (whole, content) = (*start..*end, content.clone());
        // Where it may be torn.
        let first = whole.start / self.sector + 1;
        let tears = whole.end.div_ceil(self.sector).saturating_sub(first);
        let end = match tears > 0 && random.below(2) == 0 {
            true => (first + random.below(tears)) * self.sector,
            false => whole.end,
        };
        let part = whole.start..end;
        let content = content.part(&whole, &part);
        self.order(part, content, true);
    }
}

/// Repeatable chance (SplitMix64).
#[derive(Debug)]
struct Random(u64);

impl Random {
    /// Any number below `n` > 0.
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % n
    }
}

#[cfg(test)]
mod tests;
