//! Against a plain reference: every sector has a history, a flush is a point in it, and below there is never anything
//! older than the last one.

#![expect(clippy::cast_possible_truncation, reason = "small numbers, on 64-bit hosts")]

use super::*;
use crate::engine::tests::{Random as Noise, seed};

const SECTOR: u64 = 512;
const SECTORS: u64 = 64;

/// A disk whose writes end when the test lets them, and what it has to be.
struct Lab {
    cache: VolatileCache,
    below: Vec<u8>,
    in_flight: Vec<Order>,
    /// Every value that each sector has had; the place of the last one that is durable.
    histories: Vec<(Vec<u8>, usize)>,
    /// By token: how long the histories were.
    flushes: HashMap<u64, Vec<usize>>,
    token: u64,
    noise: Noise,
}

impl Lab {
    fn new(limit: u64, seed: Option<u64>, noise: u64) -> Self {
        Self {
            cache: VolatileCache::new(limit, 512, seed),
            below: vec![0; SECTORS as usize],
            in_flight: Vec::new(),
            histories: vec![(vec![0], 0); SECTORS as usize],
            flushes: HashMap::new(),
            token: 0,
            noise: Noise(noise),
        }
    }

    fn range(&mut self) -> Range<u64> {
        let start = self.noise.below(SECTORS as usize) as u64;
        start..(start + 1 + self.noise.below(16) as u64).min(SECTORS)
    }

    fn write(&mut self) {
        let range = self.range();
        let zero = self.noise.below(4) == 0;
        let value = if zero { 0 } else { 1 + self.noise.below(255) as u8 };
        let bytes = range.start * SECTOR..range.end * SECTOR;
        let content = match zero {
            true => Content::Zeroes { unmap: true },
            false => Content::Data(vec![value; (bytes.end - bytes.start) as usize].into()),
        };
        self.token += 1;
        self.cache.keep(bytes, content, Completion { token: self.token, result: Ok(()) });
        let refused =
            self.cache.output().done.iter().any(|end| end.token == self.token && end.result.is_err());
        for sector in range.filter(|_| !refused) {
            self.histories[sector as usize].0.push(value);
        }
        self.turn();
    }

    fn flush(&mut self) {
        self.token += 1;
        let now = self.histories.iter().map(|(values, _)| values.len() - 1).collect();
        self.flushes.insert(self.token, now);
        match self.cache.is_clean() {
            true => self.flushed(self.token),
            false => self.cache.flush(self.token),
        }
        self.turn();
    }

    fn turn(&mut self) {
        self.cache.pump();
        let output = std::mem::take(self.cache.output());
        self.in_flight.extend(output.orders);
        assert_eq!(self.in_flight.len(), self.cache.in_flight());
        output.synced.into_iter().for_each(|token| self.flushed(token));
        self.check();
    }

    fn flushed(&mut self, token: u64) {
        for ((_, durable), then) in self.histories.iter_mut().zip(&self.flushes[&token]) {
            *durable = then.max(durable).to_owned();
        }
        self.check();
    }

    /// One of the writes below ends, whichever.
    fn finish(&mut self, result: Result<(), Errno>) {
        if self.in_flight.is_empty() {
            return;
        }
        let order = self.in_flight.swap_remove(self.noise.below(self.in_flight.len()));
        if result.is_ok() {
            assert!(order.range.start.is_multiple_of(SECTOR) && order.range.end.is_multiple_of(SECTOR));
            for sector in order.range.start / SECTOR..order.range.end / SECTOR {
                self.below[sector as usize] = match &order.content {
                    Content::Data(bytes) => bytes[((sector * SECTOR) - order.range.start) as usize],
                    Content::Zeroes { .. } => 0,
                };
            }
        }
        self.cache.written(order.id, result);
        self.turn();
    }

    fn check(&self) {
        for (sector, (values, durable)) in self.histories.iter().enumerate() {
            let below = self.below[sector];
            assert!(values[*durable..].contains(&below), "sector {sector} has {below} of {values:?}");
        }
        let mut seen = self.below.clone();
        for (range, content) in self.cache.overlay(&(0..SECTORS * SECTOR)) {
            for sector in range.start / SECTOR..range.end / SECTOR {
                seen[sector as usize] = match &content {
                    Content::Data(bytes) => bytes[(sector * SECTOR - range.start) as usize],
                    Content::Zeroes { .. } => 0,
                };
            }
        }
        let expected: Vec<u8> = self.histories.iter().map(|(values, _)| *values.last().unwrap()).collect();
        assert_eq!(seen, expected);
        for sector in 0..SECTORS {
            if let Ok(Extent { hole: true, end }) = self.cache.extent(sector * SECTOR) {
                assert!(expected[sector as usize..(end / SECTOR) as usize].iter().all(|value| *value == 0));
            }
        }
    }

    fn finish_all(&mut self) {
        while !self.in_flight.is_empty() {
            self.finish(Ok(()));
        }
    }
}

#[test]
fn what_was_flushed_is_below_whatever_goes_there_early() {
    let first = seed();
    for round in 0..60 {
        // With little room, or with much.
        let limit = if round % 3 == 0 { 16 << 10 } else { 1 << 20 };
        let mut lab = Lab::new(limit, (round % 2 == 0).then_some(round), first + round);
        for _ in 0..600 {
            match lab.noise.below(16) {
                0..6 => lab.write(),
                6 => lab.flush(),
                7 => lab.finish(Err(Errno::new(libc::EIO))),
                _ => lab.finish(Ok(())),
            }
        }
        lab.finish_all();
        lab.flush();
        lab.finish_all();
        assert!(lab.cache.is_clean() && lab.cache.held() == 0 && lab.cache.cost() == 0);
    }
}

#[test]
fn without_a_seed_nothing_is_below_that_was_not_flushed() {
    let mut lab = Lab::new(1 << 20, None, 7);
    for _ in 0..50 {
        let before = lab.below.clone();
        (0..10).for_each(|_| lab.write());
        assert_eq!((lab.in_flight.len(), &lab.below), (0, &before));
        lab.flush();
        lab.finish_all();
        let now: Vec<u8> = lab.histories.iter().map(|(values, _)| *values.last().unwrap()).collect();
        assert_eq!(lab.below, now);
    }
}

#[test]
fn with_a_seed_some_is_early_and_some_is_torn_and_it_can_be_repeated() {
    let run = |seed| {
        let mut lab = Lab::new(1 << 20, Some(seed), 7);
        let mut below = Vec::new();
        for _ in 0..200 {
            lab.write();
            lab.finish_all();
            below.push(lab.below.clone());
        }
        below
    };
    let (first, other) = (run(3), run(4));
    assert_eq!(first, run(3));
    assert_ne!(first, other);
    assert!(first.last().unwrap().iter().any(|value| *value != 0), "nothing was early");

    let mut torn = 0;
    for seed in 0..100 {
        let mut cache = VolatileCache::new(1 << 20, 512, Some(seed));
        let data = Content::Data(vec![1; 4096].into());
        cache.keep(512..4608, data, Completion { token: 1, result: Ok(()) });
        let early = std::mem::take(cache.output()).orders;
        torn += early.iter().filter(|order| order.range.end < 4608).count();
        assert!(early.iter().all(|order| order.range.start == 512 && order.range.end > 512));
        assert!(early.iter().all(|order| order.range.end.is_multiple_of(512)));
    }
    assert!((10..50).contains(&torn), "{torn} of 100 are torn");
}

#[test]
fn beyond_the_limit_writes_wait_for_room_and_fail_when_there_is_none() {
    let mut cache = VolatileCache::new(8 << 10, 512, None);
    let done = |cache: &mut VolatileCache| {
        cache.pump();
        let output = std::mem::take(cache.output());
        (output.orders, output.done)
    };
    let keep = |cache: &mut VolatileCache, token: u64| {
        let range = (token * 2048)..(token * 2048 + 2048);
        cache.keep(range, Content::Data(vec![1; 2048].into()), Completion { token, result: Ok(()) });
        done(cache)
    };
    assert_eq!(keep(&mut cache, 0).1.len(), 1);
    let (orders, ended) = keep(&mut cache, 1);
    assert_eq!((orders.len(), ended.len()), (2, 1), "half of it is full, and goes below");
    assert_eq!(keep(&mut cache, 2).1.len(), 1);
    assert_eq!(keep(&mut cache, 3).1.len(), 0, "no room");
    assert_eq!(cache.held(), 1);
    let eio = Err(Errno::new(libc::EIO));
    cache.written(orders[0].id, eio);
    cache.written(orders[1].id, Ok(()));
    assert_eq!(done(&mut cache), (vec![], vec![Completion { token: 3, result: eio }]));
    // The next one is refused, but it makes for another attempt.
    let (orders, ended) = keep(&mut cache, 4);
    assert_eq!((orders.len(), ended), (4, vec![Completion { token: 4, result: eio }]));
    orders.iter().for_each(|order| cache.written(order.id, Ok(())));
    assert!(cache.is_clean());
    assert_eq!(keep(&mut cache, 5).1.len(), 1);
}

#[test]
fn what_is_left_of_a_piece_takes_no_more_memory_than_it_counts() {
    let mut layer = Layer::default();
    layer.cover(0..1 << 20, Content::Data(vec![1; 1 << 20].into()));
    layer.cover(512..(1 << 20) - 512, Content::Zeroes { unmap: false });
    assert_eq!(layer.cost, 1024 + 3 * PIECE_COST);
    for (range, content) in layer.within(&(0..u64::MAX)) {
        let Content::Data(bytes) = content else { continue };
        assert_eq!(bytes.len() as u64, range.end - range.start);
    }
    layer.cut(&(0..u64::MAX));
    assert_eq!(layer.cost, 0);
}
