//! The disk's thread: doorbells, completions and commands.
//!
//! ```text
//!   wait ─▶ commands ─▶ gate open? take requests ─▶ submit ─▶ reap ─▶ complete ─▶ notify ─▶ settle ─┐
//!    ▲                  (all queues, one batch)                        (one interrupt per queue)     │
//!    └───────────────────────────────────────────────────────────────────────────────────────────────┘
//!
//!   gate:    closed while paused · stopped by an error · somebody waits for the drain
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

use block::{Completion, Engine};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::backend::{BlkError, Command, Link, Reply};
use super::policy::{ErrorPolicy, EventSink};
use super::request::ID_BYTES;
use super::session::{Host, Session};

/// Tokens of flushes that no guest has asked for; a session's are indices.
const OWN: u64 = 1 << 63;
/// Descriptors looked at in one go.
const EVENTS: usize = 16;

/// What wakes the thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Command,
    Engine,
    /// Of a queue.
    Doorbell(usize),
}

impl From<Token> for u64 {
    fn from(token: Token) -> Self {
        match token {
            Token::Command => 0,
            Token::Engine => 1,
            Token::Doorbell(queue) => 2 + queue as u64,
        }
    }
}

impl From<u64> for Token {
    fn from(data: u64) -> Self {
        match data {
            0 => Self::Command,
            1 => Self::Engine,
            queue => Self::Doorbell(usize::try_from(queue - 2).unwrap_or(usize::MAX)),
        }
    }
}

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
}

/// A worker to be.
pub(super) struct Worker {
    pub(super) serial: [u8; ID_BYTES],
    /// For reads, for the rest.
    pub(super) policies: (ErrorPolicy, ErrorPolicy),
    pub(super) events: EventSink,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) engine: Engine,
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
        watch(self.engine.event().as_raw_fd(), Token::Engine)?;
        let Self { serial, policies, events, commands, engine } = self;
        Ok(Running {
            link,
            serial,
            policies,
            epoll,
            commands,
            events,
            engine,
            paused: false,
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
    engine: Engine,
    // Volatile.
    paused: bool,
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
            let count = match self.epoll.wait(if busy { 0 } else { -1 }, &mut events) {
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
                    Token::Engine => {}
                }
            }
            if commanded && self.obey().is_break() {
                return;
            }
            busy = self.work();
        }
    }

    /// One round. Returns whether the next should follow at once.
    fn work(&mut self) -> bool {
        if self.is_open() {
            self.with_session(|session, host| session.take_requests(host));
        }
        if let Err(error) = self.engine.submit() {
            tracing::error!(disk = %self.link.facts.id, %error, "Disk I/O cannot be submitted");
        }
        self.complete();
        if let Some(session) = &mut self.session {
            session.notify();
        }
        let settled = self.settle();
        self.link.counters.set_in_flight(self.session.as_ref().map_or(0, Session::in_flight));
        settled || (self.is_open() && self.session.as_ref().is_some_and(Session::is_ready))
    }

    /// Whether requests may be taken.
    fn is_open(&self) -> bool {
        !self.paused && !self.link.stopped.load(Ordering::Relaxed) && self.waiters.is_empty()
    }

    fn with_session<T>(&mut self, run: impl FnOnce(&mut Session, &mut Host<'_>) -> T) -> Option<T> {
        let Self { link, serial, policies, engine, events, session, .. } = self;
        let mut host = Host {
            disk: &link.facts.id,
            serial,
            read_policy: policies.0,
            write_policy: policies.1,
            engine,
            counters: &link.counters,
            events,
        };
        session.as_mut().map(|session| run(session, &mut host))
    }

    fn complete(&mut self) {
        let mut completions = std::mem::take(&mut self.completions);
        if let Err(error) = self.engine.reap(&mut completions) {
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
        if let Some(session) = &mut self.session {
            session.retry_held(&mut self.engine);
            session.ring_all();
        }
    }

    fn flush(&mut self, reply: Reply<()>) {
        self.flushes.push((self.next_flush, reply));
        self.engine.queue_flush(self.next_flush);
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
        if self.waiters.is_empty() || self.session.as_ref().is_some_and(|session| session.in_flight() > 0) {
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
            }
        }
        true
    }

    fn resize(&mut self, size: Option<u64>) -> Result<u64, BlkError> {
        let disk = self.engine.disk_mut();
        let result = match size {
            Some(size) => disk.resize(size).map(|()| size),
            None => disk.refresh_size(),
        };
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
