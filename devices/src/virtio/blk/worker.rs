//! The disk's thread: doorbells, completions and commands.
//!
//! ```text
//!   wait ─▶ commands ─▶ gate open? take requests ─▶ submit ─▶ reap ─▶ complete ─▶ notify ─▶ settle ─┐
//!    ▲                  (all queues, one batch)                        (one interrupt per queue)     │
//!    └───────────────────────────────────────────────────────────────────────────────────────────────┘
//!
//!   gate:    closed while paused · held · stopped by an error · somebody waits for the drain
//!   settle:  nothing in flight ─▶ pause: flush, then reply · deactivate: drop the session · resize
//! ```
//!
//! Doorbells are watched edge-triggered and never read: a ring is an edge, whatever the counter says,
//! and the system call is saved. The gate, the count of requests in flight and `settle` are where a
//! disk is exchanged underneath its guest: everything that must see no request in flight is a
//! [`Waiter`].

use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::Instant;

use block::{Completion, Drive, Engine, MirrorOptions};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::backend::{BlkError, BlkFacts, Command, Link, Reply};
use super::mirroring::{self, Changed, MirrorOrder, Mirroring, Purpose};
use super::policy::{DiskEvent, ErrorPolicy, EventSink, MirrorReport};
use super::request::ID_BYTES;
use super::session::{Host, Session};
use super::token::Token;

/// Tokens of flushes that no guest has asked for; a session's are indices.
const OWN: u64 = 1 << 63;
/// Descriptors looked at in one go.
const EVENTS: usize = 16;

/// Somebody who needs that nothing is in flight.
enum Waiter {
    Pause(Reply<()>),
    Deactivate(Reply<()>),
    /// The next machine is there before the last one's I/O is over.
    Activate(Box<Session>, Reply<()>),
    Resize {
        size: Option<u64>,
        reply: Reply<u64>,
    },
    Hold(Reply<()>),
    StartCopy {
        purpose: Purpose,
        target: Box<Engine>,
        options: MirrorOptions,
        reply: Reply<()>,
    },
}

/// A worker to be.
pub(super) struct Worker {
    pub(super) serial: [u8; ID_BYTES],
    /// For reads, for the rest.
    pub(super) policies: (ErrorPolicy, ErrorPolicy),
    pub(super) events: EventSink,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) drive: Drive,
}

impl Worker {
    /// Gets ready to run on another thread.
    ///
    /// # Errors
    ///
    /// The host has no descriptor left.
    pub(super) fn prepare(self, link: Arc<Link>) -> io::Result<Running> {
        let epoll = Epoll::new()?;
        let watch = |fd: i32, token: Token| {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token.into()))
        };
        watch(link.wake.as_raw_fd(), Token::Command)?;
        watch(self.drive.event().as_raw_fd(), Token::Engine)?;
        let Self { serial, policies, events, commands, drive } = self;
        Ok(Running {
            link,
            serial,
            policies,
            epoll,
            commands,
            events,
            drive,
            mirroring: Mirroring::default(),
            ends: Vec::new(),
            next: None,
            paused: false,
            holds: 0,
            waiters: Vec::new(),
            flushes: Vec::new(),
            next_flush: OWN,
            completions: Vec::new(),
            session: None,
        })
    }
}

/// A worker on its thread.
pub(super) struct Running {
    // Fixed.
    link: Arc<Link>,
    serial: [u8; ID_BYTES],
    policies: (ErrorPolicy, ErrorPolicy),
    epoll: Epoll,
    commands: mpsc::Receiver<Command>,
    // The disk's.
    events: EventSink,
    /// Before `session`: its drop waits for the I/O into the session's memory.
    drive: Drive,
    // Volatile.
    mirroring: Mirroring,
    /// Who waits for the end of the mirror.
    ends: Vec<Reply<()>>,
    /// When the mirror has to be looked after.
    next: Option<Instant>,
    paused: bool,
    /// So many keep the gate closed.
    holds: u32,
    waiters: Vec<Waiter>,
    /// Flushes of our own in flight, by token.
    flushes: Vec<(u64, Reply<()>)>,
    next_flush: u64,
    /// Kept for its memory.
    completions: Vec<Completion>,
    session: Option<Session>,
}

impl Running {
    /// Works until told to stop, or until there is nobody left to tell.
    pub(super) fn run(mut self) {
        let mut events = [EpollEvent::default(); EVENTS];
        let mut busy = false;
        loop {
            let count = match self.epoll.wait(self.limit(busy), &mut events) {
                Ok(count) => count,
                // Completions may interrupt the wait.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => {
                    tracing::error!(disk = %self.link.facts.id, %error, "The disk's thread cannot wait");
                    return;
                }
            };
            let mut commanded = false;
            for event in &events[..count] {
                match Token::from(event.data()) {
                    Token::Command => commanded = true,
                    Token::Doorbell(queue) => {
                        self.session.iter_mut().for_each(|session| session.ring(queue));
                    }
                    // Completions are looked for in any case.
                    Token::Engine | Token::Target => {}
                }
            }
            if commanded && self.obey().is_break() {
                return;
            }
            busy = self.work();
        }
    }

    /// How long to sleep at most, in milliseconds as epoll takes them, rounded up; -1 is for ever.
    fn limit(&self, busy: bool) -> i32 {
        if busy {
            return 0;
        }
        let Some(next) = self.next else { return -1 };
        let rest = next.saturating_duration_since(Instant::now());
        i32::try_from(rest.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
    }

    /// One round. Returns whether the next should follow at once.
    fn work(&mut self) -> bool {
        let open = self.is_open();
        // Whoever waits for what is in flight does not wait for limits.
        let awaited = self.mirroring.is_holding() || (!open && !self.is_drained());
        self.drive.set_throttled(!awaited, !awaited && !self.mirroring.is_ending());
        if open {
            self.with_session(|session, host| session.take_requests(host));
        }
        if let Err(error) = self.drive.submit() {
            tracing::error!(disk = %self.link.facts.id, %error, "Disk I/O cannot be submitted");
        }
        self.complete();
        let mirrored = self.mirror();
        if let Some(session) = &mut self.session {
            session.notify();
        }
        let settled = self.settle() || mirrored;
        self.link.counters.set_in_flight(self.session.as_ref().map_or(0, Session::in_flight));
        settled || (self.is_open() && self.session.as_ref().is_some_and(Session::is_ready))
    }

    /// Whether requests may be taken.
    fn is_open(&self) -> bool {
        !self.paused
            && self.holds == 0
            && !self.mirroring.is_holding()
            && !self.link.stopped.load(Ordering::Relaxed)
            && self.waiters.is_empty()
    }

    fn is_drained(&self) -> bool {
        self.session.as_ref().is_none_or(|session| session.in_flight() == 0)
    }

    fn with_session<T>(&mut self, run: impl FnOnce(&mut Session, &mut Host<'_>) -> T) -> Option<T> {
        let Self { link, serial, policies, drive, events, session, .. } = self;
        let mut host = Host {
            disk: &link.facts.id,
            serial,
            read_policy: policies.0,
            write_policy: policies.1,
            drive,
            counters: &link.counters,
            events,
        };
        session.as_mut().map(|session| run(session, &mut host))
    }

    fn complete(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        if let Err(error) = self.drive.reap(&mut completions) {
            tracing::error!(disk = %self.link.facts.id, %error, "Disk I/O cannot be continued");
        }
        for completion in completions.drain(..) {
            if completion.token & OWN != 0 {
                self.flushed(&completion);
            } else if self.with_session(|session, host| session.finish(&completion, host)) == Some(true) {
                self.link.stopped.store(true, Ordering::Release);
            }
        }
        self.completions = completions;
    }

    /// Does everything commands ask for. Breaks when the thread is to end.
    fn obey(&mut self) -> std::ops::ControlFlow<()> {
        // Before the commands are taken: a later one wakes us again.
        let _ = self.link.wake.read();
        loop {
            match self.commands.try_recv() {
                Ok(Command::Stop) | Err(mpsc::TryRecvError::Disconnected) => {
                    return std::ops::ControlFlow::Break(());
                }
                Ok(command) => self.command(command),
                Err(mpsc::TryRecvError::Empty) => return std::ops::ControlFlow::Continue(()),
            }
        }
    }

    fn command(&mut self, command: Command) {
        // Whoever has given up waiting for a reply does not get it.
        match command {
            Command::Activate { owner, activation, reply } => {
                let session = Session::new(owner, activation);
                if self.waiters.iter().any(|waiter| matches!(waiter, Waiter::Deactivate(_))) {
                    self.waiters.push(Waiter::Activate(Box::new(session), reply));
                } else {
                    let _ = reply.send(self.activate(session));
                }
            }
            Command::Deactivate { owner, reply } => match &mut self.session {
                Some(session) if session.owner() == owner => {
                    session.forget_held();
                    self.waiters.push(Waiter::Deactivate(reply));
                }
                _ => {
                    let _ = reply.send(Ok(()));
                }
            },
            Command::Pause { reply } => {
                self.paused = true;
                self.waiters.push(Waiter::Pause(reply));
            }
            Command::Resume { reply } => {
                self.resume();
                let _ = reply.send(Ok(()));
            }
            Command::Flush { reply } => self.flush(reply),
            Command::Resize { size, reply } => self.waiters.push(Waiter::Resize { size, reply }),
            Command::StartCopy { purpose, target, options, reply } => {
                self.waiters.push(Waiter::StartCopy { purpose, target, options, reply });
            }
            Command::Hold { reply } => {
                self.holds += 1;
                self.waiters.push(Waiter::Hold(reply));
            }
            Command::LetGo => {
                self.holds = self.holds.saturating_sub(1);
                self.ring_all();
            }
            Command::Mirror { order, reply } => {
                if order == MirrorOrder::Detach {
                    // One that has not begun yet: nobody wants it any more.
                    self.waiters.retain(|waiter| !matches!(waiter, Waiter::StartCopy { .. }));
                }
                let done = self.mirroring.order(&mut self.drive, order);
                self.ring_all();
                if done.is_ok() && order.is_end() {
                    self.ends.push(reply);
                } else {
                    mirroring::answer(done, &self.link.facts.id, &reply);
                }
            }
            // `obey` has dealt with it.
            Command::Stop => {}
        }
    }

    fn activate(&mut self, session: Session) -> Result<(), BlkError> {
        let disk = &self.link.facts.id;
        if self.session.is_some() {
            return Err(BlkError::Busy { disk: Arc::clone(disk) });
        }
        for (index, queue) in session.queues() {
            let token = Token::Doorbell(index).into();
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
            if let Err(source) = self.epoll.ctl(ControlOperation::Add, queue.doorbell().as_raw_fd(), event) {
                self.unwatch(&session);
                return Err(BlkError::Watch { disk: Arc::clone(disk), source });
            }
        }
        self.session = Some(session);
        Ok(())
    }

    fn unwatch(&self, session: &Session) {
        for (_, queue) in session.queues() {
            // Some may not have been watched.
            let fd = queue.doorbell().as_raw_fd();
            let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }

    fn resume(&mut self) {
        self.paused = false;
        self.link.stopped.store(false, Ordering::Release);
        // A pause that was not over is over now; its ticket learns of it.
        self.waiters.retain(|waiter| !matches!(waiter, Waiter::Pause(_)));
        self.ring_all();
    }

    /// The gate may be open again: looks at what waits behind it, held requests first.
    fn ring_all(&mut self) {
        if self.is_open()
            && let Some(session) = &mut self.session
        {
            session.retry_held(&mut self.drive);
            session.ring_all();
        }
    }

    /// Lets the mirror work, and does what it leads to. Returns whether there is something new to do.
    fn mirror(&mut self) -> bool {
        if self.drive.target().is_none() {
            return false;
        }
        let disk = Arc::clone(&self.link.facts.id);
        self.next = mirroring::advance(&mut self.drive, &self.link, Instant::now());
        // What it has completed of the guest's is handed out in the next round.
        let (was_holding, held) = (self.mirroring.is_holding(), self.mirroring.held());
        self.mirroring.report(&mut self.drive, &disk, &mut self.events);
        let drained = self.is_drained() && self.flushes.is_empty();
        let changed = self.mirroring.settle(&mut self.drive, drained, &disk);
        let begun = matches!(changed, Changed::Begun);
        let report = match changed {
            Changed::Nothing | Changed::Begun => None,
            Changed::Target => Some(MirrorReport::Detached),
            Changed::Switched => {
                if let Err(error) = self.watch_images() {
                    tracing::error!(%disk, %error, "The disk's thread cannot watch the new image");
                }
                *self.link.current.lock() =
                    BlkFacts::of(&self.drive, Arc::clone(&disk), self.link.facts.queues);
                Some(MirrorReport::Switched)
            }
        };
        if let Some(report) = report {
            self.next = None;
            *self.link.mirror.lock() = None;
            *self.link.held.lock() = held;
            for reply in self.ends.drain(..) {
                mirroring::answer(Ok(()), &disk, &reply);
            }
            self.events.send(DiskEvent::Mirror { disk, report });
        } else if !self.mirroring.is_ending() {
            // One that failed to end: the tickets learn of it.
            self.ends.clear();
        }
        if was_holding && !self.mirroring.is_holding() {
            self.ring_all();
        }
        begun
            || was_holding != self.mirroring.is_holding()
            || self.next.is_some_and(|next| next <= Instant::now())
    }

    /// After a switch: the former image's descriptors have left by being closed.
    fn watch_images(&self) -> io::Result<()> {
        let watch = |fd: i32, operation, token: Token| {
            self.epoll.ctl(operation, fd, EpollEvent::new(EventSet::IN, token.into()))
        };
        // It was watched as the target's.
        watch(self.drive.event().as_raw_fd(), ControlOperation::Modify, Token::Engine)
    }

    fn start_copy(&mut self, target: (Purpose, Engine), options: &MirrorOptions) -> Result<(), BlkError> {
        let disk = &self.link.facts.id;
        self.mirroring.start(&mut self.drive, target, options, disk)?;
        if let Some(event) = self.drive.target_event() {
            let event = event.as_raw_fd();
            let watched = EpollEvent::new(EventSet::IN, Token::Target.into());
            if let Err(source) = self.epoll.ctl(ControlOperation::Add, event, watched) {
                let disk = Arc::clone(disk);
                // Nothing is in flight yet.
                drop(self.drive.detach());
                return Err(BlkError::Watch { disk, source });
            }
        }
        *self.link.mirror.lock() = self.drive.mirror_status();
        Ok(())
    }

    fn flush(&mut self, reply: Reply<()>) {
        self.flushes.push((self.next_flush, reply));
        self.drive.queue_flush(self.next_flush);
        self.next_flush = self.next_flush.wrapping_add(1) | OWN;
    }

    fn flushed(&mut self, completion: &Completion) {
        if let Some(at) = self.flushes.iter().position(|(token, _)| *token == completion.token) {
            let (_, reply) = self.flushes.swap_remove(at);
            let disk = Arc::clone(&self.link.facts.id);
            let _ = reply.send(completion.result.map_err(|source| BlkError::Flush { disk, source }));
        }
    }

    /// Serves those who wait for the drain. Returns whether there is something new to do.
    fn settle(&mut self) -> bool {
        if self.waiters.is_empty() || !self.is_drained() {
            return false;
        }
        for waiter in std::mem::take(&mut self.waiters) {
            match waiter {
                Waiter::Pause(reply) => self.flush(reply),
                Waiter::Deactivate(reply) => {
                    if let Some(session) = self.session.take() {
                        self.unwatch(&session);
                    }
                    let _ = reply.send(Ok(()));
                }
                Waiter::Activate(session, reply) => {
                    let _ = reply.send(self.activate(*session));
                }
                Waiter::Resize { size, reply } => {
                    let _ = reply.send(self.resize(size));
                }
                // Flushes of our own are I/O as well.
                waiter @ (Waiter::Hold(_) | Waiter::StartCopy { .. }) if !self.flushes.is_empty() => {
                    self.waiters.push(waiter);
                }
                Waiter::Hold(reply) => {
                    let _ = reply.send(Ok(()));
                }
                Waiter::StartCopy { purpose, target, options, reply } => {
                    let _ = reply.send(self.start_copy((purpose, *target), &options));
                }
            }
        }
        true
    }

    fn resize(&mut self, size: Option<u64>) -> Result<u64, BlkError> {
        let result = self.drive.resize(size);
        let size =
            result.map_err(|source| BlkError::Resize { disk: Arc::clone(&self.link.facts.id), source })?;
        if self.link.size.swap(size, Ordering::AcqRel) != size
            && let Some(session) = &self.session
        {
            session.interrupt().config_changed();
        }
        Ok(size)
    }
}
