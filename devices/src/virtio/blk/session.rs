//! What a driver has set in motion between DRIVER_OK and the reset: its queues and its requests.
//!
//! ```text
//!   queue ──pop, parse──▶ Request ──issue──▶ in flight ──last operation done──▶ complete ──▶ queue
//!                            │                   │  ▲                              ▲
//!                            └─ refused ─────────┼──┼──────────────────────────────┤
//!                                                ▼  │ retry, in order of arrival   │ report, ignore
//!                                          error ── held ◀── stop ── policy ───────┘
//! ```
//!
//! A session is dropped only when nothing of it is in flight: until then the kernel writes into the
//! guest memory it holds.

#![expect(unsafe_code, reason = "hands guest memory to the engine")]

use std::sync::Arc;

use block::{Completion, Drive, Errno, Operation};
use vm_memory::GuestMemoryMmap;

use super::policy::{DiskEvent, DiskOperation, ErrorAction, ErrorPolicy, EventSink};
use super::request::{Ask, ID_BYTES, Limits, Pending, Range, Request, SECTOR, Status, Work};
use super::statistics::Counters;
use crate::virtio::device::{Activation, Interrupt};
use crate::virtio::queue::{Violation, Virtqueue};

/// What a session needs from its disk while it works.
pub(super) struct Host<'a> {
    pub(super) disk: &'a Arc<str>,
    pub(super) serial: &'a [u8; ID_BYTES],
    pub(super) read_policy: ErrorPolicy,
    pub(super) write_policy: ErrorPolicy,
    pub(super) drive: &'a mut Drive,
    pub(super) counters: &'a Counters,
    pub(super) events: &'a mut EventSink,
}

/// A queue, and what is to be done about it.
struct Line {
    queue: Virtqueue,
    /// It may have requests that nobody has looked at.
    ready: bool,
    /// Requests were completed since the driver was last told.
    completed: bool,
}

/// A request whose work can be done again.
struct InFlight {
    /// Its queue.
    line: usize,
    /// Order of arrival.
    sequence: u64,
    work: Work,
    pending: Pending,
    /// Operations that have not completed.
    left: usize,
    /// The first error.
    error: Option<Errno>,
}

pub(super) struct Session {
    // Fixed.
    /// Which device it belongs to.
    owner: u64,
    memory: GuestMemoryMmap,
    features: u64,
    interrupt: Arc<Interrupt>,
    // Volatile.
    lines: Vec<Option<Line>>,
    /// By token.
    requests: Vec<Option<InFlight>>,
    free: Vec<usize>,
    /// Failed, to be tried again.
    held: Vec<InFlight>,
    /// The driver has reset the device; what is in flight is only waited for.
    leaving: bool,
    sequence: u64,
    /// The driver broke the rules: nothing is served any more.
    broken: bool,
}

impl Session {
    pub(super) fn new(owner: u64, activation: Activation) -> Self {
        let Activation { memory, features, queues, interrupt } = activation;
        let lines = queues.into_iter().map(|active| {
            let queue = Virtqueue::new(active?, memory.clone(), features);
            Some(Line { queue, ready: true, completed: false })
        });
        Self {
            owner,
            lines: lines.collect(),
            memory,
            features,
            interrupt,
            requests: Vec::new(),
            free: Vec::new(),
            held: Vec::new(),
            leaving: false,
            sequence: 0,
            broken: false,
        }
    }

    pub(super) fn owner(&self) -> u64 {
        self.owner
    }

    pub(super) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// The queues that are in use, by index.
    pub(super) fn queues(&self) -> impl Iterator<Item = (usize, &Virtqueue)> {
        self.lines.iter().enumerate().filter_map(|(index, line)| Some((index, &line.as_ref()?.queue)))
    }

    /// Requests given to the engine. Held ones are not.
    pub(super) fn in_flight(&self) -> usize {
        self.requests.len() - self.free.len()
    }

    /// Whether [`Self::take_requests`] has anything to look at.
    pub(super) fn is_ready(&self) -> bool {
        !self.broken && self.lines.iter().flatten().any(|line| line.ready)
    }

    /// The driver has rung.
    pub(super) fn ring(&mut self, index: usize) {
        if let Some(Some(line)) = self.lines.get_mut(index) {
            line.ready = true;
        }
    }

    /// Looks at all queues again: doorbells were not listened to for a while.
    pub(super) fn ring_all(&mut self) {
        self.lines.iter_mut().flatten().for_each(|line| line.ready = true);
    }

    /// Starts what the driver has asked for, up to one queueful per queue.
    pub(super) fn take_requests(&mut self, host: &mut Host<'_>) {
        for index in 0..self.lines.len() {
            if self.broken {
                return;
            }
            if let Err(violation) = self.serve(index, host) {
                self.violated(&violation);
            }
        }
    }

    fn serve(&mut self, index: usize, host: &mut Host<'_>) -> Result<(), Violation> {
        let Some(Some(line)) = self.lines.get_mut(index) else { return Ok(()) };
        if !line.ready {
            return Ok(());
        }
        line.queue.disable_doorbell()?;
        let budget = line.queue.size();
        for _ in 0..budget {
            let Some(Some(line)) = self.lines.get_mut(index) else { return Ok(()) };
            match line.queue.pop()? {
                Some(chain) => {
                    let disk = host.drive.disk();
                    let limits =
                        Limits { size: disk.size(), read_only: disk.is_read_only(), features: self.features };
                    let request = Request::parse(&self.memory, chain, &limits)?;
                    self.start(index, request, host)?;
                }
                None => {
                    line.ready = line.queue.enable_doorbell()?;
                    if !line.ready {
                        return Ok(());
                    }
                    line.queue.disable_doorbell()?;
                }
            }
        }
        Ok(())
    }

    fn start(&mut self, line: usize, request: Request, host: &mut Host<'_>) -> Result<(), Violation> {
        let Request { ask, pending } = request;
        match ask {
            Ask::Refused(status) => {
                host.counters.invalid();
                self.complete(line, pending, status, 0)
            }
            Ask::Identify(data) => {
                let written = data.fill(&self.memory, host.serial);
                self.complete(line, pending, Status::Ok, written)
            }
            Ask::Work(work) => {
                self.sequence += 1;
                let sequence = self.sequence;
                self.issue(InFlight { line, sequence, work, pending, left: 0, error: None }, host.drive)
            }
        }
    }

    /// Gives a request's operations to the engine.
    fn issue(&mut self, mut request: InFlight, drive: &mut Drive) -> Result<(), Violation> {
        let operations = operations(&request.work, &self.memory)?;
        request.left = operations.len();
        request.error = None;
        let index = self.free.pop().unwrap_or_else(|| {
            self.requests.push(None);
            self.requests.len() - 1
        });
        self.requests[index] = Some(request);
        for operation in operations {
            // SAFETY: the buffers are in `self.memory`, which is mapped while the session lives, and it
            // lives until nothing is in flight (the worker's `settle`), or until after the engine, whose
            // drop waits.
            unsafe { drive.queue(index as u64, operation) };
        }
        Ok(())
    }

    /// An operation is over. Returns whether the disk has to stop.
    pub(super) fn finish(&mut self, completion: &Completion, host: &mut Host<'_>) -> bool {
        let index = usize::try_from(completion.token).unwrap_or(usize::MAX);
        let Some(Some(request)) = self.requests.get_mut(index) else { return false };
        request.left -= 1;
        request.error = request.error.or(completion.result.err());
        if request.left > 0 {
            return false;
        }
        let Some(request) = self.requests[index].take() else { return false };
        self.free.push(index);
        self.conclude(request, host)
    }

    fn conclude(&mut self, request: InFlight, host: &mut Host<'_>) -> bool {
        let (operation, sector, bytes) = describe(&request.work);
        let status = match request.error {
            None => {
                host.counters.succeeded(operation, bytes);
                Status::Ok
            }
            Some(errno) => {
                host.counters.failed(operation);
                let policy = match operation {
                    DiskOperation::Read => host.read_policy,
                    DiskOperation::Write | DiskOperation::Flush | DiskOperation::Discard => host.write_policy,
                };
                // A driver that has gone waits for nothing, and the VM does not stop for it.
                let action = if self.leaving { ErrorAction::Report } else { policy.action(errno) };
                let nospace = errno.is_no_space();
                let disk = Arc::clone(host.disk);
                if !self.leaving {
                    host.events.send(DiskEvent::IoError { disk, operation, action, nospace, errno, sector });
                }
                match action {
                    ErrorAction::Stop => {
                        self.held.push(request);
                        return true;
                    }
                    ErrorAction::Report => Status::IoError,
                    ErrorAction::Ignore => {
                        if let Work::Read { data, .. } = &request.work {
                            data.clear(&self.memory);
                        }
                        Status::Ok
                    }
                }
            }
        };
        let written = match (&request.work, status) {
            (Work::Read { data, .. }, Status::Ok) => data.length(),
            _ => 0,
        };
        // What is still in flight when the queue has broken is not answered: nobody knows what it would
        // be written over.
        if !self.broken
            && let Err(violation) = self.complete(request.line, request.pending, status, written)
        {
            self.violated(&violation);
        }
        false
    }

    fn complete(
        &mut self,
        line: usize,
        pending: Pending,
        status: Status,
        written: u32,
    ) -> Result<(), Violation> {
        let Some(Some(line)) = self.lines.get_mut(line) else { return Ok(()) };
        line.completed = true;
        pending.complete(&mut line.queue, status, written)
    }

    /// Interrupts the driver where it waits for what was completed.
    pub(super) fn notify(&mut self) {
        for line in self.lines.iter_mut().flatten().filter(|line| line.completed) {
            line.completed = false;
            if let Err(violation) = line.queue.notify(&self.interrupt) {
                self.broken = true;
                self.interrupt.violated(&violation);
            }
        }
    }

    /// Does the held requests again, in the order in which they came.
    pub(super) fn retry_held(&mut self, drive: &mut Drive) {
        let mut held = std::mem::take(&mut self.held);
        if self.broken {
            return;
        }
        held.sort_by_key(|request| request.sequence);
        for request in held {
            if let Err(violation) = self.issue(request, drive) {
                self.violated(&violation);
            }
        }
    }

    /// The driver has reset the device: it does not wait for them any more.
    pub(super) fn forget_held(&mut self) {
        self.held.clear();
        self.leaving = true;
    }

    fn violated(&mut self, violation: &Violation) {
        self.broken = true;
        self.interrupt.violated(violation);
    }
}

/// What the engine is to do: one operation at least.
fn operations(work: &Work, memory: &GuestMemoryMmap) -> Result<Vec<Operation>, Violation> {
    Ok(match work {
        Work::Read { offset, data } => {
            vec![Operation::Read { offset: *offset, buffers: data.map(memory)? }]
        }
        Work::Write { offset, data } => {
            vec![Operation::Write { offset: *offset, buffers: data.map(memory)? }]
        }
        Work::Flush => vec![Operation::Flush],
        Work::Discard(ranges) => {
            let discard = |range: &Range| Operation::Discard { offset: range.offset, length: range.length };
            ranges.iter().map(discard).collect()
        }
        Work::WriteZeroes(ranges) => ranges
            .iter()
            .map(|&Range { offset, length, unmap }| Operation::WriteZeroes { offset, length, unmap })
            .collect(),
    })
}

/// For events and statistics: what it is, its first sector, its bytes.
fn describe(work: &Work) -> (DiskOperation, u64, u64) {
    let first = |ranges: &[Range]| ranges.first().map_or(0, |range| range.offset / SECTOR);
    let sum = |ranges: &[Range]| ranges.iter().map(|range| range.length).sum();
    match work {
        Work::Read { offset, data } => (DiskOperation::Read, offset / SECTOR, u64::from(data.length())),
        Work::Write { offset, data } => (DiskOperation::Write, offset / SECTOR, u64::from(data.length())),
        Work::Flush => (DiskOperation::Flush, 0, 0),
        Work::Discard(ranges) => (DiskOperation::Discard, first(ranges), sum(ranges)),
        Work::WriteZeroes(ranges) => (DiskOperation::Write, first(ranges), sum(ranges)),
    }
}
