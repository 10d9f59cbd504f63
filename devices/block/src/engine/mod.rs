//! Carries out operations on a disk, many at a time.
//!
//! ```text
//!   queue(token, operation) ─▶ checked ─▶ [waiting] ─▶ slot: Task ──next_call──▶ Backend
//!                                 │           ▲          ▲  │                       │
//!                                 │           │          │  └──────advance──────────┘ result
//!                                 ▼           │          └─ an exclusive task runs alone,
//!   reap() ◀── Completion ◀── refused      slots full       everything behind it waits
//! ```
//!
//! Before it is checked, an operation may have to pass [`filter`]: limits, and faults that users ask for. What is checked
//! may stay in a volatile cache: [`cached`].
//!
//! What an operation needs beyond one call (the rest of a short transfer, a fallback, a bounce
//! buffer) is a [`task::Task`]'s business and the same whoever makes the calls; a [`Backend`] makes
//! them: [`uring::Uring`] or [`threads::ThreadPool`], either behind [`fault::Faults`].

#![expect(unsafe_code, reason = "the caller's memory is read and written while calls are in flight")]

mod cached;
pub(crate) mod call;
mod check;
pub(crate) mod fault;
pub(crate) mod filter;
pub(crate) mod memory;
mod operation;
mod task;
mod threads;
mod uring;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use self::cached::Patch;
use self::call::Call;
pub use self::call::CallKind;
use self::fault::Faults;
use self::filter::volatile::VolatileCache;
use self::filter::{Asked, Filter, Filters};
pub use self::memory::Buffer;
pub use self::operation::{Completion, Extent, Operation};
use self::task::{Lacks, Progress, Target, Task};
use crate::disk::Disk;
use crate::errno::Errno;
use crate::error::ResizeError;
use crate::event::wait_readable;
use crate::options::Cache;

/// Makes calls and tells their results.
pub(crate) trait Backend: Send {
    /// Takes a call, to be made at the next [`Self::submit`].
    ///
    /// # Safety
    ///
    /// The call's file, segments and their memory stay valid until its result was reaped, and the
    /// backend is not dropped before.
    unsafe fn start(&mut self, slot: u32, call: Call);

    /// Makes the calls that were started.
    fn submit(&mut self) -> io::Result<()>;

    /// Appends the results that have come: bytes, zero or `-errno`. Never waits.
    fn reap(&mut self, results: &mut Vec<(u32, i32)>);

    /// Readable while results wait.
    fn event(&self) -> BorrowedFd<'_>;
}

/// Who makes the calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring.
    Uring,
    /// Threads that block.
    Threads,
}

/// How to run an engine.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// `None`: io_uring where the host allows it, else threads.
    pub kind: Option<EngineKind>,
    /// Calls in flight at a time, 1–1024; more operations wait in the engine.
    pub depth: u32,
    /// Errors and delays of calls to make up, for tests of everything above.
    pub faults: Option<Faults>,
    /// Limits and faults of the device that works on the disk.
    pub filters: Option<Filters>,
    /// Limits and faults of the disk itself, whoever works on it.
    pub node_filters: Option<Filters>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { kind: None, depth: 128, faults: None, filters: None, node_filters: None }
    }
}

struct Slot {
    token: u64,
    task: Task,
    /// Others wait for the caller's thread.
    aside: bool,
    /// It fails when it is done.
    fails: Option<Errno>,
    /// What the volatile cache has to say about the result.
    patch: Option<Patch>,
    /// It is the volatile cache's own, and the token its order.
    settles: bool,
}

impl Slot {
    fn new(token: u64, task: Task) -> Self {
        Self { token, task, aside: false, fails: None, patch: None, settles: false }
    }
}

/// A disk at work.
pub struct Engine {
    // Fixed.
    kind: EngineKind,
    disk: Disk,
    backend: Box<dyn Backend>,
    // Volatile.
    /// What stands in front: the device's first, then the node's.
    device: Option<Filter>,
    node: Option<Filter>,
    /// Readable when the backend is, or one of these has something to do.
    event: Option<OwnedFd>,
    /// Its data outlives the calls that write it: the drop waits for them.
    cache: Option<VolatileCache>,
    target: Target,
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    /// An exclusive task is in flight.
    exclusive: bool,
    /// Who waits for the sync in flight: at most one at a time, because Linux tells a writeback error to one caller only,
    /// and whoever else synced at that moment would be told that all is well.
    syncing: Vec<u64>,
    /// Who waits for the next one: flushes, and writes of a writethrough disk.
    sync_due: Vec<u64>,
    /// Writes are done only when they were synced (writethrough through the page cache).
    sync_writes: bool,
    waiting: VecDeque<Slot>,
    done: Vec<Completion>,
    /// Kept for its memory.
    results: Vec<(u32, i32)>,
}

impl Engine {
    /// Puts `disk` to work.
    ///
    /// # Errors
    ///
    /// The host allows neither of the wanted backends.
    pub fn start(disk: Disk, options: &EngineOptions) -> io::Result<Self> {
        let depth = options.depth.clamp(1, 1024);
        let threads = || -> io::Result<Box<dyn Backend>> { Ok(Box::new(threads::ThreadPool::new()?)) };
        let uring = || -> io::Result<Box<dyn Backend>> { Ok(Box::new(uring::Uring::new(depth)?)) };
        let (kind, backend) = match options.kind {
            Some(EngineKind::Threads) => (EngineKind::Threads, threads()?),
            Some(EngineKind::Uring) => (EngineKind::Uring, uring()?),
            None => match uring() {
                Ok(backend) => (EngineKind::Uring, backend),
                Err(_) => (EngineKind::Threads, threads()?),
            },
        };
        let backend = match &options.faults {
            Some(faults) => faults.wrap(backend)?,
            None => backend,
        };
        let mut engine = Self::with_backend(disk, kind, backend, depth);
        engine.set_filters(options.filters.clone(), options.node_filters.clone())?;
        Ok(engine)
    }

    /// Puts `disk` to work with somebody to make the calls.
    pub(crate) fn with_backend(disk: Disk, kind: EngineKind, backend: Box<dyn Backend>, depth: u32) -> Self {
        let target = Target {
            fd: disk.file().as_raw_fd(),
            geometry: *disk.geometry(),
            durable: disk.cache() == Cache::Writethrough && disk.is_direct(),
            lacks: Lacks::default(),
            lost: None,
        };
        let sync_writes = disk.cache() == Cache::Writethrough && !disk.is_direct();
        Self {
            kind,
            disk,
            backend,
            device: None,
            node: None,
            event: None,
            cache: None,
            target,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            exclusive: false,
            syncing: Vec::new(),
            sync_due: Vec::new(),
            sync_writes,
            waiting: VecDeque::new(),
            done: Vec::new(),
            results: Vec::new(),
        }
    }

    /// Who makes the calls.
    pub fn kind(&self) -> EngineKind {
        self.kind
    }

    /// The disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// Changes the disk's size, in bytes, or learns what it has become. It may shrink only while nothing is in flight.
    ///
    /// # Errors
    ///
    /// As [`Disk::resize`] and [`Disk::refresh_size`].
    pub fn resize(&mut self, size: Option<u64>) -> Result<u64, ResizeError> {
        // What is kept for what will not be there is in nobody's way then.
        self.write_out();
        let size = match size {
            Some(size) => self.disk.resize(size).map(|()| size)?,
            None => self.disk.refresh_size()?,
        };
        if let Some(cache) = &mut self.cache {
            cache.truncate(size);
        }
        Ok(size)
    }

    /// Readable while completions wait that the host has sent. Level-triggered, nothing to read.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_ref().map_or_else(|| self.backend.event(), OwnedFd::as_fd)
    }

    /// Operations queued whose completions were not reaped.
    pub fn in_flight(&self) -> usize {
        // Many may ride on the one sync.
        let calls = self.active() - usize::from(!self.syncing.is_empty());
        let held: usize = self.device.iter().chain(&self.node).map(Filter::held).sum();
        let (kept, own) = self.cache.as_ref().map_or((0, 0), |cache| (cache.held(), cache.in_flight()));
        held + kept + calls + self.syncing.len() + self.sync_due.len() + self.waiting.len() + self.done.len()
            - own
    }

    /// Takes an operation, which starts at the next [`Self::submit`]. It always completes: what is out
    /// of range, or writes to a read-only disk, with an error. `token` is given back with the
    /// completion and means nothing here.
    ///
    /// # Safety
    ///
    /// The buffers stay valid for reading (writes) or writing (reads) until [`Self::reap`] has handed
    /// out the completion, or the engine was dropped.
    pub unsafe fn queue(&mut self, token: u64, operation: Operation) {
        // SAFETY: handed on under the same contract.
        unsafe { self.take(token, operation, false) };
    }

    /// [`Self::queue`] for what is large and not urgent: it is never done on the caller's thread, which the kernel would
    /// use to copy to and from the page cache. Nor do limits apply: it is not the device's own.
    ///
    /// # Safety
    ///
    /// As [`Self::queue`].
    pub(crate) unsafe fn queue_aside(&mut self, token: u64, operation: Operation) {
        // SAFETY: handed on under the same contract.
        unsafe { self.take(token, operation, true) };
    }

    /// # Safety
    ///
    /// As [`Self::queue`].
    unsafe fn take(&mut self, token: u64, operation: Operation, aside: bool) {
        self.offer(Asked { token, operation: Some(operation), aside, fails: None });
    }

    /// Takes an operation that has passed the filter. What its buffers must be is the contract of [`Self::queue`].
    fn accept(&mut self, asked: Asked) {
        let Asked { token, operation, aside, fails } = asked;
        let kept = self.cache.as_ref().and_then(|_| operation.clone());
        match operation.map_or(Ok(None), |operation| self.check(operation)) {
            Ok(Some(task)) => {
                let slot = Slot { aside, fails, ..Slot::new(token, task) };
                match kept {
                    Some(operation) => self.accept_cached(operation, slot),
                    None => self.start_task(slot),
                }
            }
            Ok(None) => self.done.push(Completion { token, result: fails.map_or(Ok(()), Err) }),
            Err(errno) => self.done.push(Completion { token, result: Err(errno) }),
        }
    }

    fn start_task(&mut self, slot: Slot) {
        match slot.task {
            Task::Sync => self.sync_due.push(slot.token),
            _ => self.waiting.push_back(slot),
        }
        self.dispatch();
    }

    /// [`Self::queue`] for [`Operation::Flush`], which needs no memory.
    pub fn queue_flush(&mut self, token: u64) {
        // SAFETY: there are no buffers.
        unsafe { self.queue(token, Operation::Flush) };
    }

    /// Starts what was queued, in one system call where possible. Follow it by [`Self::reap`]: much is
    /// complete at once, and what was refused never shows at [`Self::event`].
    ///
    /// # Errors
    ///
    /// The backend is broken; queued operations may never complete.
    pub fn submit(&mut self) -> io::Result<()> {
        self.backend.submit()
    }

    /// Appends the completions that have come. Never waits.
    ///
    /// # Errors
    ///
    /// As [`Self::submit`], which continues unfinished operations.
    pub fn reap(&mut self, completions: &mut Vec<Completion>) -> io::Result<()> {
        let any = self.take_results();
        let any = self.release_due() || any;
        completions.append(&mut self.done);
        if any {
            self.dispatch();
            self.backend.submit()?;
        }
        Ok(())
    }

    /// Goes on with what has results. Returns whether there were any.
    fn take_results(&mut self) -> bool {
        let mut results = std::mem::take(&mut self.results);
        self.backend.reap(&mut results);
        let any = !results.is_empty();
        for (slot, result) in results.drain(..) {
            self.advance(slot, result);
        }
        self.results = results;
        any
    }

    /// Whether completions wait that [`Self::event`] does not show.
    pub(crate) fn has_done(&self) -> bool {
        !self.done.is_empty()
    }

    /// Waits until completions can be reaped, or `timeout` is over. Returns whether there are any.
    pub fn wait(&self, timeout: Duration) -> bool {
        !self.done.is_empty() || wait_readable(self.event(), timeout)
    }

    fn active(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Starts the next sync, for all who wait for one; what they want synced is complete. After one has failed there are no
    /// more: the data is gone, so all are told so, with the error that says nothing but that.
    fn dispatch_sync(&mut self) {
        if self.target.lost.is_some() {
            let result = Err(Errno::new(libc::EIO));
            self.done.extend(self.sync_due.drain(..).map(|token| Completion { token, result }));
        }
        if self.exclusive || !self.syncing.is_empty() || self.sync_due.is_empty() {
            return;
        }
        if let Some(index) = self.free.pop() {
            self.syncing = std::mem::take(&mut self.sync_due);
            self.slots[index as usize] = Some(Slot::new(0, Task::Sync));
            self.call(index);
        }
    }

    /// Fills free slots from the waiting line, in order.
    fn dispatch(&mut self) {
        self.dispatch_sync();
        while !self.exclusive
            && let Some(next) = self.waiting.front()
            && let Some(&index) = self.free.last()
        {
            let alone = next.task.is_exclusive(&self.target);
            if alone && self.active() > 0 {
                return;
            }
            self.exclusive = alone;
            self.free.pop();
            let slot = self.waiting.pop_front();
            self.slots[index as usize] = slot;
            self.call(index);
        }
    }

    /// Starts the next call of the task in a slot.
    fn call(&mut self, index: u32) {
        if let Some(slot) = &mut self.slots[index as usize] {
            let call = Call { aside: slot.aside, ..slot.task.next_call(&self.target) };
            // SAFETY: the task stays in its slot, and so do its segments, until the result was reaped;
            // the caller's memory by the contract of `queue`; the file lives in `disk`.
            unsafe { self.backend.start(index, call) };
        }
    }

    fn advance(&mut self, index: u32, result: i32) {
        let Some(Some(slot)) = self.slots.get_mut(index as usize) else { return };
        match slot.task.advance(&mut self.target, result) {
            Progress::Next => self.call(index),
            Progress::Done(result) => {
                if let Some(slot) = self.slots[index as usize].take() {
                    self.free.push(index);
                    // An exclusive task was the only one.
                    self.exclusive = false;
                    self.complete(&slot, result);
                }
            }
        }
    }

    fn complete(&mut self, slot: &Slot, result: Result<(), Errno>) {
        if let Some(patch) = slot.patch.as_ref().filter(|_| result.is_ok()) {
            patch.apply();
        }
        let result = slot.fails.map_or(result, Err);
        match &slot.task {
            Task::Sync => {
                let synced = self.syncing.drain(..);
                self.done.extend(synced.map(|token| Completion { token, result }));
            }
            _ if slot.settles => self.settled(slot.token, result),
            task if self.sync_writes && task.is_write() && result.is_ok() => {
                self.sync_due.push(slot.token);
            }
            _ => self.done.push(Completion { token: slot.token, result }),
        }
    }
}

impl Drop for Engine {
    /// Waits for the calls in flight: the kernel uses the caller's memory until then. What is still
    /// waiting is forgotten, but what a volatile cache keeps is written: it is for the power to go, not for the owner.
    fn drop(&mut self) {
        self.write_out();
        // A call that was started but not submitted must run as well, or its result would never come.
        let mut broken = self.backend.submit().is_err();
        while self.active() > 0 && !broken {
            wait_readable(self.backend.event(), Duration::from_secs(1));
            let mut results = std::mem::take(&mut self.results);
            self.backend.reap(&mut results);
            for (slot, _) in results.drain(..) {
                if self.slots[slot as usize].take().is_some() {
                    self.free.push(slot);
                }
            }
            self.results = results;
            broken = self.backend.submit().is_err();
        }
        if self.active() > 0 {
            // The kernel may still read and write the callers' memory, and nobody can tell until when: to go on would be to
            // give that memory to somebody else.
            eprintln!("Disk I/O is under way that can neither be finished nor stopped; ending the process");
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests;
