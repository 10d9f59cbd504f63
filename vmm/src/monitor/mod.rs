//! The monitor: QMP, QEMU's machine protocol, on a unix socket with any number of clients.
//!
//! ```text
//!                         ┌──────────────────────── Monitor ───────────────────────────┐
//!  socket ─▶ Connection ─▶│ Session: Decoder ─▶ Request ─▶ commands::find ─▶ dyn Vm     │
//!         ◀─ (bounded) ◀──│    ▲                              │ guest-*                │
//!                         │    ├── Response ◀─────────────────┤                        │
//!                         │    └── events ◀── Throttle ◀── emit()                      │
//!                         └───────────────────────────────────┼────────────────────────┘
//!                                                             ▼
//!                     Vm::guest_request ─▶ guest channel ─▶ complete()
//! ```
//!
//! Each client negotiates for itself and is served in order, one request at a time; a command that is
//! relayed to the guest holds up the client that sent it and nobody else. Events go to every client that has
//! negotiated; those caused by a command come before its response.
//!
//! What differs from QEMU, on purpose: one socket serves many clients at once; a faulty message gets one
//! error instead of a cascade; input, output, nesting and descriptors are bounded per client; out-of-band
//! execution is not offered, nor is `human-monitor-command`.
//!
//! Everything runs on the control loop. Nothing here waits except the verbs of [`Vm`], which are bounded.

mod commands;
mod events;
mod fds;
mod schema;
mod session;
mod vm;

#[cfg(test)]
mod tests;

use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Instant;

use protocol::{Args, Error, Request};
use serde_json::Value;

pub use self::commands::pivot_info;
pub use self::events::{BlockJobFacts, Event, IoErrorAction, PanicAction, ShutdownCause};
use self::events::{EventLine, Throttle};
pub use self::fds::{FdSets, ReceivedFds};
use self::schema::check_arguments;
use self::session::Session;
pub use self::vm::{BlockLayer, ChardevInfo, CpuInfo, DiskInfo, IoStatus, SessionId, Vm, VmError};
use crate::event_loop::{Interest, Ready, Token, Watch};
use crate::socket::{Listener, SocketError};

/// Clients at a time; more are turned away.
const CLIENTS_MAX: usize = 32;

/// The monitor of a VM.
#[derive(Debug)]
pub struct Monitor {
    listener: Listener,
    /// By slot, as in [`Token::MonitorClient`].
    sessions: Vec<Option<Session>>,
    /// Where the search for a free slot starts, so that a slot is not used again at once.
    next_slot: usize,
    sessions_ever: u64,
    fdsets: FdSets,
    throttle: Throttle,
}

impl Monitor {
    /// Listens on `path`. A stale socket there is replaced.
    ///
    /// # Errors
    ///
    /// The socket cannot be made.
    pub fn bind(path: &Path, watch: &mut dyn Watch) -> Result<Self, SocketError> {
        let listener = Listener::bind(path)?;
        watch.set(listener.as_raw_fd(), Token::MonitorListener, Interest::READ);
        Ok(Self {
            listener,
            sessions: (0..CLIENTS_MAX).map(|_| None).collect(),
            next_slot: 0,
            sessions_ever: 0,
            fdsets: FdSets::default(),
            throttle: Throttle::default(),
        })
    }

    /// Takes up what is ready: [`Token::MonitorListener`] or a [`Token::MonitorClient`].
    pub fn ready(
        &mut self,
        token: Token,
        ready: Ready,
        vm: &mut dyn Vm,
        now: Instant,
        watch: &mut dyn Watch,
    ) {
        match token {
            Token::MonitorListener => self.accept(),
            Token::MonitorClient(slot) => self.client_ready(slot.into(), ready, vm, now),
            _ => {}
        }
        self.settle(vm, watch);
    }

    /// Tells every client what happened.
    pub fn emit(&mut self, event: &Event, vm: &mut dyn Vm, now: Instant, watch: &mut dyn Watch) {
        self.queue(event, now);
        self.settle(vm, watch);
    }

    /// The outcome of a command that was relayed, or that takes its time. Ignored if its session is gone.
    pub fn complete(
        &mut self,
        session: SessionId,
        result: Result<Value, Error>,
        vm: &mut dyn Vm,
        now: Instant,
        watch: &mut dyn Watch,
    ) {
        let found = self.sessions.iter_mut().enumerate().find_map(|(slot, candidate)| {
            candidate.as_mut().filter(|candidate| candidate.id == session).map(|found| (slot, found))
        });
        if let Some((slot, found)) = found {
            found.complete(result);
            self.serve(slot, vm, now);
        }
        self.settle(vm, watch);
    }

    /// When [`tick`](Self::tick) is next needed.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.throttle.next_deadline()
    }

    /// Sends what had to wait.
    pub fn tick(&mut self, vm: &mut dyn Vm, now: Instant, watch: &mut dyn Watch) {
        for line in self.throttle.due(now) {
            self.broadcast(&line);
        }
        self.settle(vm, watch);
    }

    /// Descriptor sets, for whoever opens `/dev/fdset/N`.
    pub fn fdsets(&self) -> &FdSets {
        &self.fdsets
    }

    /// Sends what clients take at once and closes everything: the end of the VM.
    pub fn close(self, watch: &mut dyn Watch) {
        for mut session in self.sessions.into_iter().flatten() {
            session.flush();
            session.close(watch);
        }
        watch.remove(self.listener.as_raw_fd());
    }

    fn accept(&mut self) {
        while let Some(connection) = self.listener.accept() {
            let free = (0..CLIENTS_MAX)
                .map(|offset| (self.next_slot + offset) % CLIENTS_MAX)
                .find(|slot| self.sessions[*slot].is_none());
            let Some(slot) = free else {
                self.listener.turn_away(connection, CLIENTS_MAX);
                continue;
            };
            self.next_slot = slot + 1;
            self.sessions_ever += 1;
            self.sessions[slot] = Some(Session::new(SessionId(self.sessions_ever), connection));
        }
    }

    fn client_ready(&mut self, slot: usize, ready: Ready, vm: &mut dyn Vm, now: Instant) {
        let Some(session) = self.session(slot) else { return };
        if ready.writable {
            session.flush();
        }
        if ready.readable || ready.hung_up {
            session.read();
        }
        self.serve(slot, vm, now);
        if ready.hung_up
            && let Some(session) = self.session(slot)
        {
            session.hung_up();
        }
    }

    fn session(&mut self, slot: usize) -> Option<&mut Session> {
        self.sessions.get_mut(slot)?.as_mut()
    }

    /// Serves what the client has sent, as far as it takes the answers.
    fn serve(&mut self, slot: usize, vm: &mut dyn Vm, now: Instant) {
        while let Some(request) = self.session(slot).and_then(Session::next_request) {
            self.execute(slot, request, vm, now);
        }
    }

    fn execute(&mut self, slot: usize, mut request: Request, vm: &mut dyn Vm, now: Instant) {
        let Some(Some(session)) = self.sessions.get_mut(slot) else { return };
        if commands::is_relayed(&request.execute) {
            session.relayed = true;
            session.wait(request.id);
            return vm.guest_request(session.id, request.execute, request.arguments);
        }
        let arguments = std::mem::take(&mut request.arguments);
        let mut later = false;
        let result = match commands::find(&request.execute) {
            None => Err(Error::command_not_found(&request.execute)),
            Some(command) => check_arguments(&arguments, command.arguments).and_then(|()| {
                let (args, session, fds) = (Args::new(arguments), session.id, &mut session.fds);
                let fdsets = &mut self.fdsets;
                let mut call = commands::Call { vm, fds, fdsets, args, session, later };
                let result = (command.run)(&mut call);
                later = call.later;
                result
            }),
        };
        for event in vm.take_events() {
            self.queue(&event, now);
        }
        match self.session(slot) {
            Some(session) if later => session.wait(request.id),
            Some(session) => session.respond(&request.respond(result)),
            None => {}
        }
    }

    fn queue(&mut self, event: &Event, now: Instant) {
        if let Some(line) = self.throttle.admit(event, now) {
            self.broadcast(&line);
        }
    }

    fn broadcast(&mut self, line: &EventLine) {
        for session in self.sessions.iter_mut().flatten().filter(|session| session.is_negotiated()) {
            session.tell(line);
        }
    }

    /// Writes what can be written, drops who is done, and tells the loop what to wait for.
    fn settle(&mut self, vm: &mut dyn Vm, watch: &mut dyn Watch) {
        for (token, slot) in (0..).map(Token::MonitorClient).zip(&mut self.sessions) {
            let Some(session) = slot else { continue };
            session.flush();
            if !session.is_over() {
                session.watch(token, watch);
            } else if let Some(session) = slot.take() {
                if session.relayed {
                    vm.guest_session_closed(session.id);
                }
                session.close(watch);
            }
        }
    }
}
