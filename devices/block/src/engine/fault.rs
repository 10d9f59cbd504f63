//! Errors, short transfers and delays of single calls on demand, between an engine and its backend: for unit tests of
//! error policies, drains and jobs, on any image. What users ask for goes by operations: [`super::filter`].

#![expect(unsafe_code, reason = "passes calls on under the contract of Backend::start")]

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use parking_lot::Mutex;

use super::Backend;
use super::call::{Call, CallKind};
use super::memory::Buffer;
use crate::event::{Event, any_readable};

/// What to do to calls of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The call is not made; it fails with this `errno`.
    Error(i32),
    /// Only so many bytes of the first segment are transferred.
    Short(usize),
}

#[derive(Debug)]
struct Rule {
    kind: CallKind,
    fault: Fault,
    times: u32,
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    holding: bool,
    log: Vec<CallKind>,
    in_flight: usize,
}

struct Shared {
    state: Mutex<State>,
    changed: Event,
}

/// A handle on an engine's faults, kept by whoever decides on them. Clones share.
#[derive(Clone)]
pub struct Faults(Arc<Shared>);

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Faults").field(&self.0.state.lock().rules).finish()
    }
}

impl Faults {
    /// No faults yet.
    ///
    /// # Errors
    ///
    /// The host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Shared { state: Mutex::new(State::default()), changed: Event::new()? })))
    }

    /// Lets the next `times` calls of `kind` suffer `fault`.
    pub fn inject(&self, kind: CallKind, fault: Fault, times: u32) {
        self.0.state.lock().rules.push(Rule { kind, fault, times });
    }

    /// Forgets all faults.
    pub fn clear(&self) {
        self.0.state.lock().rules.clear();
    }

    /// Holds all further calls until [`Self::release`].
    pub fn hold(&self) {
        self.0.state.lock().holding = true;
    }

    /// Makes the held calls.
    pub fn release(&self) {
        self.0.state.lock().holding = false;
        self.0.changed.signal();
    }

    /// Calls started, held ones included, whose results were not reaped.
    pub fn in_flight(&self) -> usize {
        self.0.state.lock().in_flight
    }

    /// Every call since the last time, in order.
    pub fn take_log(&self) -> Vec<CallKind> {
        std::mem::take(&mut self.0.state.lock().log)
    }

    pub(crate) fn wrap(&self, inner: Box<dyn Backend>) -> io::Result<Box<dyn Backend>> {
        let event = any_readable(&[inner.event(), self.0.changed.as_fd()])?;
        let held = Vec::new();
        let faults = self.clone();
        Ok(Box::new(Faulty { faults, event, held, refused: Vec::new(), short: HashMap::new(), inner }))
    }
}

struct Faulty {
    faults: Faults,
    event: OwnedFd,
    held: Vec<(u32, Call)>,
    refused: Vec<(u32, i32)>,
    /// The only segment of calls that were cut short.
    short: HashMap<u32, Box<[Buffer; 1]>>,
    inner: Box<dyn Backend>,
}

impl Faulty {
    /// # Safety
    ///
    /// As [`Backend::start`].
    unsafe fn make(&mut self, slot: u32, mut call: Call) {
        let fault = {
            let mut state = self.faults.0.state.lock();
            state.log.push(call.kind);
            let rule = state.rules.iter_mut().find(|rule| rule.kind == call.kind && rule.times > 0);
            rule.map(|rule| {
                rule.times -= 1;
                rule.fault
            })
        };
        match fault {
            Some(Fault::Error(errno)) => {
                self.refused.push((slot, -errno));
                self.faults.0.changed.signal();
                return;
            }
            Some(Fault::Short(length)) if call.segment_count > 0 => {
                // SAFETY: at least one valid segment.
                let first = unsafe { *call.segments };
                let buffer = Buffer::new(first.iov_base.cast(), first.iov_len.min(length));
                let only = self.short.entry(slot).insert_entry(Box::new([buffer]));
                call.segments = Buffer::as_segments(&only.get()[..]);
                call.segment_count = 1;
            }
            _ => {}
        }
        // SAFETY: the contract is handed on; a shortened segment stays in `short`.
        unsafe { self.inner.start(slot, call) };
    }
}

impl Backend for Faulty {
    unsafe fn start(&mut self, slot: u32, call: Call) {
        let holding = {
            let mut state = self.faults.0.state.lock();
            state.in_flight += 1;
            state.holding
        };
        if holding {
            self.held.push((slot, call));
        } else {
            // SAFETY: the contract is handed on.
            unsafe { self.make(slot, call) };
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        self.inner.submit()
    }

    fn reap(&mut self, results: &mut Vec<(u32, i32)>) {
        self.faults.0.changed.clear();
        if !self.faults.0.state.lock().holding && !self.held.is_empty() {
            for (slot, call) in std::mem::take(&mut self.held) {
                // SAFETY: held calls are in flight, their memory still valid.
                unsafe { self.make(slot, call) };
            }
            // A failure shows again at the next submission.
            let _ = self.inner.submit();
        }
        let before = results.len();
        results.append(&mut self.refused);
        self.inner.reap(results);
        for (slot, _) in &results[before..] {
            self.short.remove(slot);
        }
        self.faults.0.state.lock().in_flight -= results.len() - before;
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
