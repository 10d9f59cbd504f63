//! What stands between a disk's user and its engine: limits and faults, decided on by whoever holds the handle.
//!
//! ```text
//!   Engine::queue ─▶ the device's ─▶ the node's ─▶ Engine: its volatile cache, if the node is to have one ─▶ calls
//!
//!   each:  ─▶ limits ─┬─▶ rules ─┬─▶ ready ─▶ the next, or refused at once
//!                     │          │               ▲
//!                  waiting    delayed            │
//!                (two lines)     │               │
//!                     └──────────┴── release ────┘ when the timer fires, or the handle has changed something
//!
//!   Filters (a handle, shared): limits, their account, rules ─── version, event ───▶ Filter (one per engine)
//! ```
//!
//! A device's filters are about its guest's operations, on whichever image it works. A node's are about all that is done
//! to one image, by guests and by jobs, and stay with it.
//!
//! Nothing waits on a thread: a timer is in the set that the engine's event is readable by. Without limits and rules an
//! operation passes with a look at one flag. Reads and writes wait in a line each, in order; what waits is bounded by
//! what the user has in flight. The handle keeps all state that is not an operation, so it goes from engine to engine.

pub(crate) mod fault;
pub(crate) mod throttle;
pub(crate) mod volatile;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use self::fault::{FaultRule, FaultStatus, RuleError, Rules};
use self::throttle::{Account, Direction, LimitsError, ThrottleLimits};
use super::memory::{self, Buffer};
use super::{Engine, Operation};
use crate::errno::Errno;
use crate::event::{Event, Timer, any_readable};

struct State {
    account: Account,
    rules: Rules,
}

struct Shared {
    state: Mutex<State>,
    /// Whether there is any limit or rule.
    active: AtomicBool,
    /// Counts changes; raised after `changed` was signalled, so that whoever has seen it can clear that.
    version: AtomicU64,
    changed: Event,
    /// Bytes in the volatile cache.
    unflushed: AtomicU64,
}

/// A handle on the limits and faults of a disk. Clones share.
#[derive(Clone)]
pub struct Filters(Arc<Shared>);

impl fmt::Debug for Filters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.state.lock();
        f.debug_struct("Filters").field("account", &state.account).field("rules", &state.rules).finish()
    }
}

/// The same handle.
impl PartialEq for Filters {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Filters {}

impl Filters {
    /// No limits, no faults.
    ///
    /// # Errors
    ///
    /// The host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let account = Account::new(ThrottleLimits::default(), Instant::now());
        Ok(Self(Arc::new(Shared {
            state: Mutex::new(State { account, rules: Rules::default() }),
            active: AtomicBool::new(false),
            version: AtomicU64::new(0),
            changed: Event::new()?,
            unflushed: AtomicU64::new(0),
        })))
    }

    /// The limits.
    pub fn limits(&self) -> ThrottleLimits {
        *self.0.state.lock().account.limits()
    }

    /// Replaces the limits, and forgets what was done under the old ones. Applies to what waits already.
    ///
    /// # Errors
    ///
    /// They contradict themselves; the old ones stay.
    pub fn set_limits(&self, limits: ThrottleLimits) -> Result<(), LimitsError> {
        limits.validate()?;
        self.change(|state| state.account = Account::new(limits, Instant::now()));
        Ok(())
    }

    /// Adds a rule after those there are; returns its id.
    ///
    /// # Errors
    ///
    /// It makes no sense, or there are too many.
    pub fn add_fault(&self, rule: FaultRule) -> Result<u64, RuleError> {
        self.change(|state| state.rules.add(rule))
    }

    /// Removes a rule; `false` if there is none of that id. What it delays stays delayed.
    pub fn remove_fault(&self, id: u64) -> bool {
        self.change(|state| state.rules.remove(id))
    }

    /// The rules, and how often they hit.
    pub fn faults(&self) -> Vec<FaultStatus> {
        self.0.state.lock().rules.list()
    }

    /// Bytes that the volatile cache takes, or has taken: what a power cut costs.
    pub fn unflushed(&self) -> u64 {
        self.0.unflushed.load(Ordering::Relaxed)
    }

    pub(super) fn set_unflushed(&self, bytes: u64) {
        self.0.unflushed.store(bytes, Ordering::Relaxed);
    }

    /// The rule that asks for a volatile cache.
    pub(super) fn cache(&self) -> Option<FaultRule> {
        self.0.state.lock().rules.cache().cloned()
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let shared = &*self.0;
        let mut state = shared.state.lock();
        let result = change(&mut state);
        let active = state.account.limits().is_limited() || !state.rules.is_empty();
        shared.active.store(active, Ordering::Release);
        shared.changed.signal();
        shared.version.fetch_add(1, Ordering::Release);
        result
    }
}

/// An operation on its way.
pub(super) struct Asked {
    pub(super) token: u64,
    /// `None`: nothing is done, and it fails.
    pub(super) operation: Option<Operation>,
    /// As for [`Engine::queue_aside`]: no limits.
    pub(super) aside: bool,
    /// It fails, whatever comes of it.
    pub(super) fails: Option<Errno>,
}

/// Whom filters are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// A device: its guest's operations, as long as it works on this image.
    Device,
    /// An image: everybody's.
    Node,
}

/// The filters of one engine, of either scope.
pub(super) struct Filter {
    handle: Filters,
    scope: Scope,
    timer: Timer,
    armed: Option<Instant>,
    /// The handle's version that was heeded.
    seen: u64,
    /// Whether anything applies.
    filtering: bool,
    /// Whether the limits do.
    throttled: bool,
    /// Reads and writes over the limit.
    waiting: [VecDeque<Asked>; 2],
    /// Whose turn it is, of the two.
    turn: Direction,
    /// By time, then by order.
    delayed: BTreeMap<(Instant, u64), Asked>,
    sequence: u64,
    ready: VecDeque<Asked>,
}

impl Filter {
    pub(super) fn new(handle: Filters, scope: Scope) -> io::Result<Self> {
        Ok(Self {
            handle,
            scope,
            timer: Timer::new()?,
            armed: None,
            seen: 0,
            filtering: true,
            throttled: true,
            waiting: Default::default(),
            turn: Direction::Read,
            delayed: BTreeMap::new(),
            sequence: 0,
            ready: VecDeque::new(),
        })
    }

    /// Readable when there is something to release.
    fn events(&self) -> [BorrowedFd<'_>; 2] {
        [self.handle.0.changed.as_fd(), self.timer.as_fd()]
    }

    /// Operations that were taken and did not pass.
    pub(super) fn held(&self) -> usize {
        self.waiting.iter().map(VecDeque::len).sum::<usize>() + self.delayed.len() + self.ready.len()
    }

    /// Whether operations are to be given to it.
    pub(super) fn is_active(&self) -> bool {
        (self.filtering && self.handle.0.active.load(Ordering::Acquire)) || self.held() > 0
    }

    /// Whether the handle has changed something.
    pub(super) fn is_changed(&self) -> bool {
        self.handle.0.version.load(Ordering::Acquire) != self.seen
    }

    /// Whether [`Self::release`] may have something to do.
    pub(super) fn is_due(&self) -> bool {
        self.held() > 0 || self.is_changed()
    }

    pub(super) fn handle(&self) -> &Filters {
        &self.handle
    }

    /// Takes an operation.
    pub(super) fn offer(&mut self, asked: Asked, now: Instant) {
        let handle = self.handle.clone();
        let mut state = handle.0.state.lock();
        let Some((direction, bytes)) = asked.cost(self.scope) else {
            return self.pass(asked, &mut state, now);
        };
        let line = &mut self.waiting[direction as usize];
        if self.throttled && (!line.is_empty() || !state.account.wait(direction, now).is_zero()) {
            line.push_back(asked);
            self.arm(&mut state, now);
        } else {
            state.account.pour(direction, bytes);
            self.pass(asked, &mut state, now);
        }
    }

    /// Lets out what need not wait any longer.
    pub(super) fn release(&mut self, now: Instant) {
        let version = self.handle.0.version.load(Ordering::Acquire);
        if version != self.seen {
            self.seen = version;
            self.handle.0.changed.clear();
        }
        let handle = self.handle.clone();
        let mut state = handle.0.state.lock();
        while let Some(asked) = self.next_waiting(&mut state, now) {
            if let Some((direction, bytes)) = asked.cost(self.scope) {
                state.account.pour(direction, bytes);
                self.turn = direction.other();
            }
            self.pass(asked, &mut state, now);
        }
        while let Some(entry) = self.delayed.first_entry().filter(|entry| entry.key().0 <= now) {
            self.ready.push_back(entry.remove());
        }
        self.arm(&mut state, now);
    }

    /// The first in line that may go; the directions take turns.
    fn next_waiting(&mut self, state: &mut State, now: Instant) -> Option<Asked> {
        for direction in [self.turn, self.turn.other()] {
            let line = &mut self.waiting[direction as usize];
            let free = !self.throttled || state.account.wait(direction, now).is_zero();
            if free && let Some(asked) = line.pop_front() {
                return Some(asked);
            }
        }
        None
    }

    /// Past the limits; now the rules.
    fn pass(&mut self, mut asked: Asked, state: &mut State, now: Instant) {
        let Some(rule) = asked.operation.as_ref().and_then(|operation| state.rules.judge(operation)) else {
            self.ready.push_back(asked);
            return;
        };
        asked.fails = rule.errno;
        match (rule.torn, &mut asked.operation) {
            (Some(length), Some(Operation::Write { buffers, .. })) => truncate(buffers, length),
            _ if rule.errno.is_some() => asked.operation = None,
            _ => {}
        }
        if rule.delay.is_zero() {
            self.ready.push_back(asked);
        } else {
            self.sequence += 1;
            self.delayed.insert((now + rule.delay, self.sequence), asked);
            self.arm(state, now);
        }
    }

    /// Sets the timer for what comes first.
    fn arm(&mut self, state: &mut State, now: Instant) {
        let mut first = self.delayed.keys().next().map(|(due, _)| *due);
        for direction in [Direction::Read, Direction::Write] {
            if !self.waiting[direction as usize].is_empty() {
                let due = now + state.account.wait(direction, now);
                first = Some(first.map_or(due, |first| first.min(due)));
            }
        }
        if first != self.armed {
            self.armed = first;
            // Setting it also takes back that it has fired.
            self.timer.set(first.map(|due| due.saturating_duration_since(now).max(Duration::from_nanos(1))));
        }
    }
}

impl Asked {
    /// What it costs, of what is limited there.
    fn cost(&self, scope: Scope) -> Option<(Direction, u64)> {
        let total = |buffers: &[Buffer]| memory::total(buffers).unwrap_or(u64::MAX);
        let limited = scope == Scope::Node || !self.aside;
        match self.operation.as_ref().filter(|_| limited)? {
            Operation::Read { buffers, .. } => Some((Direction::Read, total(buffers))),
            Operation::Write { buffers, .. } => Some((Direction::Write, total(buffers))),
            Operation::WriteZeroes { length, .. } => Some((Direction::Write, *length)),
            Operation::Flush | Operation::Discard { .. } | Operation::Extent { .. } => None,
        }
    }
}

/// Keeps the first `length` bytes.
fn truncate(buffers: &mut Vec<Buffer>, length: u64) {
    let mut left = usize::try_from(length).unwrap_or(usize::MAX);
    for buffer in buffers.iter_mut() {
        let kept = buffer.len().min(left);
        *buffer = Buffer::new(buffer.base(), kept);
        left -= kept;
    }
    buffers.retain(|buffer| !buffer.is_empty());
}

/// Filters in front of an engine.
impl Engine {
    /// Lets the limits and faults of these handles apply, of the device's and of the node's, or none. Only while nothing
    /// is in flight; [`Self::event`] is another one then.
    ///
    /// # Errors
    ///
    /// The host has no descriptor left.
    pub fn set_filters(&mut self, device: Option<Filters>, node: Option<Filters>) -> io::Result<()> {
        let device = device.map(|filters| Filter::new(filters, Scope::Device)).transpose()?;
        let node = node.map(|filters| Filter::new(filters, Scope::Node)).transpose()?;
        let mut events: Vec<_> = device.iter().chain(&node).flat_map(Filter::events).collect();
        events.push(self.backend.event());
        self.event = if events.len() > 1 { Some(any_readable(&events)?) } else { None };
        (self.device, self.node) = (device, node);
        self.heed_cache();
        Ok(())
    }

    /// The handle on the limits and faults of the disk itself.
    pub fn node_filters(&self) -> Option<&Filters> {
        self.node.as_ref().map(Filter::handle)
    }

    /// Whether this engine is the one that the device works on, as it is at first. Only while nothing is in flight: this
    /// is how the device's limits and faults go with it from one engine to another.
    pub fn set_filtering(&mut self, filtering: bool) {
        if let Some(filter) = &mut self.device {
            filter.filtering = filtering;
        }
    }

    /// Whether limits apply, as they do at first. Whoever waits for all that is in flight lifts them, or it may take as long
    /// as the limits are low: what waits starts at the next [`Self::submit`].
    pub fn set_throttled(&mut self, throttled: bool) {
        let mut any = false;
        for filter in self.device.iter_mut().chain(&mut self.node) {
            filter.throttled = throttled;
            if !throttled && filter.held() > 0 {
                filter.release(Instant::now());
                any = true;
            }
        }
        if any {
            self.admit();
        }
    }

    /// Lets pass what has waited long enough. Returns whether there was anything.
    pub(super) fn release_due(&mut self) -> bool {
        let changed = self.node.as_ref().is_some_and(Filter::is_changed);
        let mut any = false;
        for filter in self.device.iter_mut().chain(&mut self.node).filter(|filter| filter.is_due()) {
            filter.release(Instant::now());
            any = true;
        }
        if changed {
            self.heed_cache();
        }
        any && self.admit()
    }

    /// Takes an operation, which passes what stands in front.
    pub(super) fn offer(&mut self, asked: Asked) {
        // Whoever has asked for a volatile cache finds that there is one.
        if self.node.as_ref().is_some_and(Filter::is_changed) {
            self.release_due();
        }
        match &mut self.device {
            Some(filter) if filter.is_active() => {
                filter.offer(asked, Instant::now());
                self.admit();
            }
            _ => self.offer_to_node(asked),
        }
    }

    fn offer_to_node(&mut self, asked: Asked) {
        match &mut self.node {
            Some(filter) if filter.is_active() => {
                filter.offer(asked, Instant::now());
                self.admit();
            }
            _ => self.accept(asked),
        }
    }

    /// Takes what the filters let pass. Returns whether there was anything.
    fn admit(&mut self) -> bool {
        let mut any = false;
        while let Some(asked) = self.device.as_mut().and_then(|filter| filter.ready.pop_front()) {
            self.offer_to_node(asked);
            any = true;
        }
        while let Some(asked) = self.node.as_mut().and_then(|filter| filter.ready.pop_front()) {
            self.accept(asked);
            any = true;
        }
        any
    }
}

#[cfg(test)]
mod tests;
