//! A device that is made up, for an engine: it moves sector by sector, in any order, one sector whenever it is told to,
//! reads and writes memory only at that moment, falls short, fails half-way, forgets what was not synced when a sync
//! fails, and leaves anything behind where it was told to discard.

#![expect(unsafe_code, reason = "follows the pointers of calls, as the kernel does")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::Random;
use crate::engine::call::{Call, CallKind};
use crate::engine::{Backend, Extent};

pub(super) const SECTOR: usize = 512;

/// Says what happens, with `TRACE` in the environment.
pub(super) fn trace(what: impl FnOnce() -> String) {
    static WANTED: OnceLock<bool> = OnceLock::new();
    if *WANTED.get_or_init(|| std::env::var_os("TRACE").is_some()) {
        println!("{}", what());
    }
}

struct Active {
    slot: u32,
    call: Call,
    /// Sectors of the call that are still to be done.
    todo: Vec<usize>,
    /// Of a sync: what it covers.
    covered: Vec<(usize, Vec<u8>)>,
    result: i32,
}

struct State {
    name: &'static str,
    image: Vec<u8>,
    /// Not holes.
    allocated: Vec<bool>,
    /// What a power failure would leave.
    durable: Vec<u8>,
    /// A failed sync forgets.
    forgets: bool,
    /// In percent, of calls of any kind.
    failures: u64,
    random: Random,
    calls: Vec<Active>,
    results: Vec<(u32, i32)>,
}

/// A handle on a device; clones share it.
#[derive(Clone)]
pub(super) struct Device(Arc<Mutex<State>>);

impl Device {
    /// `image` is durable at first; sectors of zeroes are holes.
    pub(super) fn new(name: &'static str, image: Vec<u8>, forgets: bool, random: Random) -> Self {
        let allocated = image.chunks(SECTOR).map(|sector| sector.iter().any(|byte| *byte != 0)).collect();
        Self(Arc::new(Mutex::new(State {
            name,
            durable: image.clone(),
            image,
            allocated,
            forgets,
            failures: 0,
            random,
            calls: Vec::new(),
            results: Vec::new(),
        })))
    }

    pub(super) fn backend(&self) -> Box<dyn Backend> {
        Box::new(self.clone())
    }

    pub(super) fn set_failures(&self, percent: u64) {
        self.0.lock().failures = percent;
    }

    pub(super) fn image(&self) -> Vec<u8> {
        self.0.lock().image.clone()
    }

    pub(super) fn durable(&self) -> Vec<u8> {
        self.0.lock().durable.clone()
    }

    pub(super) fn is_busy(&self) -> bool {
        !self.0.lock().calls.is_empty()
    }

    /// One sector of one call, or the end of one.
    pub(super) fn step(&self) {
        let mut state = self.0.lock();
        let State { calls, random, .. } = &mut *state;
        if calls.is_empty() {
            return;
        }
        let index = random.index(calls.len());
        match calls[index].todo.pop() {
            Some(sector) => state.touch(index, sector),
            None => {
                let Active { slot, call, covered, result, .. } = state.calls.swap_remove(index);
                if call.kind == CallKind::Sync {
                    state.synced(covered, result);
                }
                trace(|| format!("  {} {slot}: {:?} = {result}", state.name, call.kind));
                state.results.push((slot, result));
            }
        }
    }
}

impl State {
    fn touch(&mut self, index: usize, sector: usize) {
        let call = self.calls[index].call;
        let first = usize::try_from(call.offset).unwrap() / SECTOR;
        let at = first + sector;
        let bytes = at * SECTOR..(at + 1) * SECTOR;
        match call.kind {
            CallKind::Read => scatter(&call, sector * SECTOR, &self.image[bytes]),
            CallKind::Write | CallKind::DurableWrite => {
                gather(&call, sector * SECTOR, &mut self.image[bytes]);
                self.allocated[at] = true;
            }
            CallKind::PunchHole | CallKind::ZeroRange => {
                self.image[bytes].fill(0);
                self.allocated[at] = call.kind == CallKind::ZeroRange;
            }
            CallKind::DeviceDiscard => match self.random.below(3) {
                0 => self.image[bytes].fill(0),
                1 => self.image[bytes].fill(0xdd),
                _ => {}
            },
            CallKind::Extent => {
                let hole = !self.allocated[first];
                let count = self.allocated[first..].iter().take_while(|data| **data != hole).count();
                let end = if first + count == self.allocated.len() {
                    u64::MAX
                } else {
                    ((first + count) * SECTOR) as u64
                };
                // SAFETY: one segment with room for an extent, by the engine's check.
                let answer = unsafe { &*call.segments }.iov_base.cast::<Extent>();
                // SAFETY: as above.
                unsafe { answer.write_unaligned(Extent { hole, end }) };
            }
            CallKind::Sync => {}
        }
    }

    fn synced(&mut self, covered: Vec<(usize, Vec<u8>)>, result: i32) {
        for (sector, content) in covered {
            let bytes = sector * SECTOR..(sector + 1) * SECTOR;
            if result == 0 {
                self.durable[bytes].copy_from_slice(&content);
            } else if self.forgets && self.random.percent(50) && self.image[bytes.clone()] == content[..] {
                self.image[bytes.clone()].copy_from_slice(&self.durable[bytes]);
            }
        }
    }
}

impl Backend for Device {
    unsafe fn start(&mut self, slot: u32, call: Call) {
        let mut state = self.0.lock();
        let state = &mut *state;
        let sectors = match call.kind {
            CallKind::Sync => 0,
            CallKind::Extent => 1,
            CallKind::Read | CallKind::Write | CallKind::DurableWrite => length(&call) / SECTOR,
            _ => usize::try_from(call.length).unwrap() / SECTOR,
        };
        let mut todo: Vec<usize> = (0..sectors).collect();
        let transfer = call.segment_count > 0 && call.kind != CallKind::Extent;
        let mut result = if transfer { i32::try_from(sectors * SECTOR).unwrap() } else { 0 };
        if state.random.percent(state.failures) {
            result = -state.random.among(&[libc::EIO, libc::ENOSPC]);
        } else if transfer && sectors > 1 && state.random.percent(10) {
            todo.truncate(1 + state.random.index(sectors - 1));
            result = i32::try_from(todo.len() * SECTOR).unwrap();
        }
        for i in (1..todo.len()).rev() {
            todo.swap(i, state.random.index(i + 1));
        }
        if result < 0 {
            todo.truncate(state.random.index(todo.len() + 1));
        }
        let mut covered = Vec::new();
        if call.kind == CallKind::Sync {
            let sectors = state.image.chunks(SECTOR).zip(state.durable.chunks(SECTOR)).enumerate();
            let changed = sectors.filter(|(_, (now, then))| now != then);
            covered = changed.map(|(sector, (now, _))| (sector, now.to_vec())).collect();
        }
        trace(|| format!("  {} {slot}: {:?} {}", state.name, call.kind, call.offset / SECTOR as u64));
        state.calls.push(Active { slot, call, todo, covered, result });
    }

    fn submit(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reap(&mut self, results: &mut Vec<(u32, i32)>) {
        let mut state = self.0.lock();
        let State { results: ready, random, .. } = &mut *state;
        for i in (1..ready.len()).rev() {
            ready.swap(i, random.index(i + 1));
        }
        results.append(ready);
    }

    fn event(&self) -> BorrowedFd<'_> {
        static NOTHING: OnceLock<File> = OnceLock::new();
        NOTHING.get_or_init(|| File::open("/dev/null").unwrap()).as_fd()
    }
}

fn segments(call: &Call) -> &[libc::iovec] {
    // SAFETY: valid until the call's result is reaped, by the contract of `Backend::start`.
    unsafe { std::slice::from_raw_parts(call.segments, call.segment_count as usize) }
}

fn length(call: &Call) -> usize {
    segments(call).iter().map(|segment| segment.iov_len).sum()
}

/// Where byte `skip` of a call's memory is; sectors do not straddle segments here.
fn place(call: &Call, mut skip: usize) -> *mut u8 {
    for segment in segments(call) {
        if skip < segment.iov_len {
            return segment.iov_base.cast::<u8>().wrapping_add(skip);
        }
        skip -= segment.iov_len;
    }
    panic!("a sector outside of the call's memory");
}

fn gather(call: &Call, skip: usize, sector: &mut [u8]) {
    // SAFETY: valid until the call's result is reaped.
    unsafe { std::ptr::copy_nonoverlapping(place(call, skip), sector.as_mut_ptr(), sector.len()) };
}

fn scatter(call: &Call, skip: usize, sector: &[u8]) {
    // SAFETY: valid until the call's result is reaped.
    unsafe { std::ptr::copy_nonoverlapping(sector.as_ptr(), place(call, skip), sector.len()) };
}
