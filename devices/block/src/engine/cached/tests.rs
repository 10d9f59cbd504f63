//! Over real files: the image is what a power cut would leave.

#![expect(clippy::cast_possible_truncation, reason = "small numbers, on 64-bit hosts")]

use std::fs;

use tempfile::NamedTempFile;

use super::*;
use crate::engine::EngineKind;
use crate::engine::call::CallKind;
use crate::engine::fault::Fault;
use crate::engine::filter::Filters;
use crate::engine::filter::fault::FaultOperation;
use crate::engine::tests::{Random, Rig, all_modes, buffer, errno, image, kinds, seed};
use crate::options::DiskOptions;

const SECTOR: usize = 512;

fn volatile(seed: Option<u64>) -> FaultRule {
    FaultRule { seed, ..FaultRule::new(FaultOperation::VolatileCache) }
}

fn cached(rig: &mut Rig, seed: Option<u64>) -> Filters {
    let filters = Filters::new().unwrap();
    filters.add_fault(volatile(seed)).unwrap();
    rig.engine.set_filters(None, Some(filters.clone())).unwrap();
    filters
}

/// A disk of a few sectors, what its user has written, and what a power cut may leave of each.
struct Model {
    rig: Rig,
    image: NamedTempFile,
    filters: Filters,
    rule: FaultRule,
    /// The rule's id while it applies.
    id: Option<u64>,
    now: Vec<u8>,
    /// By sector; the last is `now`'s.
    possible: Vec<Vec<[u8; SECTOR]>>,
    random: Random,
}

impl Model {
    fn new(rig: Rig, image: NamedTempFile, early: Option<u64>, noise: u64) -> Self {
        let now = fs::read(image.path()).unwrap();
        let filters = Filters::new().unwrap();
        let mut model = Self {
            rig,
            image,
            filters: filters.clone(),
            rule: volatile(early),
            id: None,
            possible: vec![Vec::new(); now.len() / SECTOR],
            now,
            random: Random(noise),
        };
        model.rig.engine.set_filters(None, Some(filters)).unwrap();
        model.settled();
        model
    }

    fn sectors(&self) -> impl Iterator<Item = [u8; SECTOR]> {
        self.now.chunks(SECTOR).map(|sector| sector.try_into().unwrap())
    }

    /// Everything is below.
    fn settled(&mut self) {
        self.possible = self.sectors().map(|sector| vec![sector]).collect();
    }

    /// Some may be, if anything is to be early.
    fn changed(&mut self) {
        if self.id.is_none() {
            return self.settled();
        }
        if self.rule.seed.is_some() {
            let now: Vec<_> = self.sectors().collect();
            self.possible.iter_mut().zip(now).for_each(|(possible, sector)| possible.push(sector));
        }
    }

    fn range(&mut self) -> std::ops::Range<usize> {
        let sectors = self.now.len() / SECTOR;
        let start = self.random.below(sectors);
        start * SECTOR..(start + 1 + self.random.below(24)).min(sectors) * SECTOR
    }

    fn write(&mut self) {
        let range = self.range();
        let (offset, length) = (range.start as u64, range.len() as u64);
        let mut data = vec![self.random.below(256) as u8; range.len()];
        data.iter_mut().step_by(7).for_each(|byte| *byte ^= self.random.below(256) as u8);
        let operation = match self.random.below(6) {
            0 => Operation::Discard { offset, length },
            1 => Operation::WriteZeroes { offset, length, unmap: true },
            2 => Operation::WriteZeroes { offset, length, unmap: false },
            _ => {
                let (first, second) = data.split_at_mut(SECTOR / 2);
                Operation::Write { offset, buffers: vec![buffer(first), buffer(second)] }
            }
        };
        let zeroes = !matches!(operation, Operation::Write { .. });
        self.rig.run(operation).unwrap();
        if zeroes {
            data.fill(0);
        }
        self.now[range].copy_from_slice(&data);
        self.changed();
    }

    /// A flush, and what comes while it is under way.
    fn flush(&mut self) {
        self.rig.queue(Operation::Flush);
        self.settled();
        let range = self.range();
        let (mut data, mut seen) = (vec![self.random.below(256) as u8; range.len()], vec![0; self.now.len()]);
        self.now[range.clone()].copy_from_slice(&data);
        self.rig.queue(Operation::Write { offset: range.start as u64, buffers: vec![buffer(&mut data)] });
        if self.id.is_some() {
            // What is complete when a read comes is seen, wherever it is.
            self.rig.queue(Operation::Read { offset: 0, buffers: vec![buffer(&mut seen)] });
        }
        let ended = self.rig.finish();
        assert!(ended.iter().all(|end| end.result.is_ok()));
        assert!(self.id.is_none() || seen == self.now);
        self.changed();
    }

    fn resize(&mut self) {
        let size = (16 + self.random.below(48)) * 4096;
        assert_eq!(self.rig.engine.resize(Some(size as u64)).unwrap(), size as u64);
        self.now.resize(size, 0);
        self.settled();
    }

    /// Begins or ends to cache.
    fn toggle(&mut self) {
        match self.id.take() {
            Some(id) => assert!(self.filters.remove_fault(id)),
            None => self.id = Some(self.filters.add_fault(self.rule.clone()).unwrap()),
        }
        self.rig.finish();
        if self.id.is_none() {
            self.settled();
            assert_eq!(self.filters.unflushed(), 0);
        }
    }

    fn check(&mut self) {
        let mut seen = vec![1; self.now.len()];
        self.rig.read(0, &mut seen).unwrap();
        assert!(seen == self.now, "reads are not what was written");
        let image = fs::read(self.image.path()).unwrap();
        assert_eq!(image.len(), self.now.len());
        for (sector, (left, possible)) in image.chunks(SECTOR).zip(&self.possible).enumerate() {
            assert!(possible.iter().any(|possible| possible == left), "sector {sector} after a power cut");
        }
        let mut extent = [0; size_of::<Extent>()];
        let offset = self.range().start as u64;
        self.rig.run(Operation::Extent { offset, answer: buffer(&mut extent) }).unwrap();
        // SAFETY: an engine has written an extent there.
        let extent = unsafe { extent.as_ptr().cast::<Extent>().read_unaligned() };
        let end = extent.end.min(self.now.len() as u64);
        let zero = self.now[offset as usize..end as usize].iter().all(|byte| *byte == 0);
        assert!(!extent.hole || zero, "data is called a hole");
    }
}

#[test]
fn a_power_cut_leaves_what_was_flushed() {
    let seed = seed();
    for (round, (kind, direct)) in (0..).zip(all_modes()) {
        for early in [None, Some(seed)] {
            let image = image(128 << 10);
            let rig = Rig::new(kind, &image, |options| options.direct = direct);
            let mut model = Model::new(rig, image, early, seed.wrapping_add(round) | 1);
            model.toggle();
            for _ in 0..400 {
                match model.random.below(20) {
                    0 => model.resize(),
                    1 => model.toggle(),
                    2..5 => model.flush(),
                    _ => model.write(),
                }
                model.check();
            }
            // An end in order loses nothing.
            let Model { rig, image, now, .. } = model;
            drop(rig);
            assert!(fs::read(image.path()).unwrap() == now);
        }
    }
}

#[test]
fn a_flush_that_cannot_be_written_fails_and_nothing_is_lost() {
    for kind in kinds() {
        let image = image(64 << 10);
        let mut rig = Rig::new(kind, &image, |_| ());
        let filters = cached(&mut rig, None);
        let mut data = [5; 4096];
        rig.write(0, &mut data).unwrap();
        rig.faults.inject(CallKind::Write, Fault::Error(libc::ENOSPC), 1);
        assert_eq!(rig.run(Operation::Flush), errno(libc::ENOSPC));
        // Neither can it be removed.
        rig.faults.inject(CallKind::Write, Fault::Error(libc::EIO), 1);
        let id = filters.faults()[0].id;
        assert!(filters.remove_fault(id));
        assert!(rig.finish().is_empty());
        assert!(filters.unflushed() > 4096);
        let mut seen = [0; 4096];
        rig.read(0, &mut seen).unwrap();
        assert_eq!(seen, data);
        assert_eq!(rig.run(Operation::Flush), Ok(()));
        assert_eq!(filters.unflushed(), 0);
        assert_eq!(fs::read(image.path()).unwrap()[..4096], data);
        rig.write(4096, &mut data).unwrap();
        assert_eq!(fs::read(image.path()).unwrap()[4096..8192], data, "it is gone now");
    }
}

#[test]
fn the_mode_of_the_cache_says_what_a_flush_is_worth() {
    for (cache, below, flushed) in
        [(Cache::Writethrough, true, true), (Cache::Writeback, false, true), (Cache::Unsafe, false, false)]
    {
        let image = image(4096);
        let mut rig =
            Rig::new(EngineKind::Threads, &image, |options: &mut DiskOptions| options.cache = cache);
        cached(&mut rig, None);
        let left = || fs::read(image.path()).unwrap()[0] == 7;
        rig.write(0, &mut [7; 512]).unwrap();
        assert_eq!(left(), below, "{cache:?}");
        rig.run(Operation::Flush).unwrap();
        assert_eq!(left(), flushed, "{cache:?}");
        drop(rig);
        assert!(left());
    }
}

#[test]
fn more_than_fits_goes_below() {
    // A third half would be full with 96 MiB.
    let image = image(90 << 20);
    let mut rig = Rig::new(EngineKind::Threads, &image, |_| ());
    let filters = cached(&mut rig, None);
    let mut data = vec![6; 1 << 20];
    for mib in 0..90 {
        rig.write(mib << 20, &mut data).unwrap();
        assert!(filters.unflushed() <= MAX_UNFLUSHED + (2 << 20), "{}", filters.unflushed());
    }
    let left = fs::read(image.path()).unwrap();
    assert!(left[..32 << 20].iter().all(|byte| *byte == 6) && left[89 << 20] == 0, "the older are below");
    rig.run(Operation::Flush).unwrap();
    assert!(fs::read(image.path()).unwrap().iter().all(|byte| *byte == 6));
}
