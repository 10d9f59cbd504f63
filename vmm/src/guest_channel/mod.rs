//! The guest channel: the one owner of the agent port, in front of it any number of clients.
//!
//! ```text
//!   agent.sock ─▶ AgentClient ─┐ one request each          ┌─▶ to_guest()   ─▶ virtio-serial port
//!   agent.sock ─▶ AgentClient ─┼──────────▶ Broker ────────┤
//!   monitor, guest-* ──────────┘   one at a time in the    └── receive()    ◀─ virtio-serial port
//!                                  guest; Freeze: who froze
//! ```
//!
//! Each connection to `agent.sock` speaks the guest agent's protocol, unchanged, as if it had the agent for
//! itself. The broker frames requests, so that half a message stays with the client that sent it; gives
//! them to the agent one at a time, except for what an agent answers beside its work (ping, info, sync, status)
//! if it is one that does; gives each answer to the client that asked, with its id, in order; and
//! drops the answers of clients that left. The monitor's `guest-*` commands are clients like any other.
//!
//! What a client finds different from an agent of its own: answers come with the `id` even from agents that
//! cannot echo it; 0xFF is swallowed instead of answered with an error line; a command that is not answered
//! in time is answered by the broker. A client that synchronises behind a command that may take long (freeze, thaw,
//! trim) is taken at its word: it does not wait for that command any longer. And a guest that was frozen by a client that left is thawed: the rule
//! is in the header of `freeze.rs`.
//!
//! # Bounds
//!
//! The guest is hostile, clients are nearly as bad. From the guest: one message, as long as the command in
//! flight justifies; nothing it sends unasked is kept. From each client: the
//! request it waits for and what it sends next, of up to 1 MiB each, and one client at a time may send a
//! longer one (`guest-file-write`). To each client: nothing further is asked
//! for it before it has taken its answers, and with 160 MiB waiting altogether, the client that
//! has not moved for longest is given up, as is any that does not move for a minute. So neither side ever
//! has to be slowed down for the other, and whatever the guest sends can be taken at once.

mod broker;
mod client;
mod command;
mod freeze;
mod in_flight;
mod out_of_band;
mod outbox;

#[cfg(test)]
mod tests;

use std::fmt;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use protocol::{Error, Map};
use serde_json::Value;

use self::broker::{Broker, Outcome};
use self::client::AgentClient;
use crate::event_loop::{Interest, Ready, Token, Watch};
use crate::socket::{Listener, SocketError};

/// Clients of the socket at a time; more are turned away.
const CLIENTS_MAX: usize = 64;
/// Read from a client at once.
const CHUNK: usize = 64 << 10;
/// Answers that clients have not taken, in bytes over all clients.
const OUTPUT_TOTAL: usize = 160 << 20;

/// How patient the channel is.
#[derive(Debug, Clone)]
pub struct ChannelConfig {
    /// How long a freeze outlives the client that made it; `None` is for ever.
    pub thaw_grace: Option<Duration>,
    /// How long a request waits for an agent that is not there.
    pub hold: Duration,
    /// How long the agent may take for most commands.
    pub timeout: Duration,
    /// How long it may take to freeze or trim: it waits for the guest's writers and storage.
    pub freeze_timeout: Duration,
    /// How long it may take to thaw.
    pub thaw_timeout: Duration,
}

impl Default for ChannelConfig {
    fn default() -> Self {
        Self {
            thaw_grace: Some(Duration::from_secs(crate::config::THAW_GRACE.into())),
            hold: Duration::from_secs(30),
            timeout: Duration::from_secs(60),
            freeze_timeout: Duration::from_secs(60 * 60),
            thaw_timeout: Duration::from_secs(10 * 60),
        }
    }
}

/// How the guest channel is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentStatus {
    /// The guest has opened the port.
    pub connected: bool,
    /// The agent has answered since then, and what it sends next answers what it is asked next.
    pub in_sync: bool,
    /// The agent answers simple questions while a command runs; `None` as long as nobody needed to know.
    pub out_of_band: Option<bool>,
    /// The guest's filesystems are frozen, as far as this side knows.
    pub frozen: Option<FreezeStatus>,
    /// Freezes that ended otherwise than by a client's thaw: the channel thawed in the place of one that was
    /// gone, or the guest turned out to be thawed, as when the lease of its agent runs out.
    pub automatic_thaws: u64,
    /// Messages from the guest that answered nothing or were none.
    pub malformed_replies: u64,
}

/// A freeze in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreezeStatus {
    /// Who froze, while it is connected.
    pub by: Option<String>,
    /// Time until the automatic thaw, if one is coming; the VM has to run for it to pass.
    pub thaw_in: Option<Duration>,
}

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Client {
    /// A connection to `agent.sock`, by number.
    Socket(u64),
    /// A session of the monitor, by number.
    Monitor(u64),
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(number) => write!(f, "agent client {number}"),
            Self::Monitor(number) => write!(f, "monitor client {number}"),
        }
    }
}

/// The guest channel of a VM.
///
/// It lives on the control loop, which
/// - hands over what is ready ([`ready`](Self::ready)) and calls [`tick`](Self::tick) at
///   [`next_deadline`](Self::next_deadline),
/// - moves bytes between it and the port ([`to_guest`](Self::to_guest), [`receive`](Self::receive)),
/// - after any call takes what it has for the monitor ([`take_relayed`](Self::take_relayed)).
#[derive(Debug)]
pub struct GuestChannel {
    listener: Listener,
    broker: Broker,
    /// By slot, as in [`Token::AgentClient`].
    clients: Vec<Option<AgentClient>>,
    /// Where the search for a free slot starts, so that a slot is not used again at once.
    next_slot: usize,
    clients_ever: u64,
    /// The client that may send a large request, until that is answered.
    permit: Option<u64>,
    relayed: Vec<(u64, Result<Value, Error>)>,
    /// What was read last; kept for its memory.
    buffer: Box<[u8]>,
}

impl GuestChannel {
    /// Listens on `path`. A stale socket there is replaced.
    ///
    /// # Errors
    ///
    /// The socket cannot be made.
    pub fn bind(path: &Path, config: ChannelConfig, watch: &mut dyn Watch) -> Result<Self, SocketError> {
        let listener = Listener::bind(path)?;
        watch.set(listener.as_raw_fd(), Token::AgentListener, Interest::READ);
        Ok(Self {
            listener,
            broker: Broker::new(config),
            clients: (0..CLIENTS_MAX).map(|_| None).collect(),
            next_slot: 0,
            clients_ever: 0,
            permit: None,
            relayed: Vec::new(),
            buffer: vec![0; CHUNK].into(),
        })
    }

    // ---- Clients ----

    /// Takes up what is ready: [`Token::AgentListener`] or a [`Token::AgentClient`].
    pub fn ready(&mut self, token: Token, ready: Ready, now: Instant, watch: &mut dyn Watch) {
        match token {
            Token::AgentListener => self.accept(now),
            Token::AgentClient(slot) => self.client_ready(slot.into(), ready, now),
            _ => {}
        }
        self.settle(now, watch);
    }

    /// A session of the monitor asks. It must not ask again before the outcome.
    pub fn request(&mut self, session: u64, execute: String, arguments: Map, now: Instant) {
        self.broker.request(Client::Monitor(session), execute, arguments, now);
        self.deliver(now);
    }

    /// A session of the monitor is gone: its outcome is dropped, and what it froze is nobody's.
    pub fn session_closed(&mut self, session: u64, now: Instant) {
        self.relayed.retain(|(relayed, _)| *relayed != session);
        self.broker.client_gone(Client::Monitor(session), true, now);
    }

    /// Outcomes for sessions of the monitor since the last call. A command that the agent does not answer
    /// returns an empty object here.
    pub fn take_relayed(&mut self) -> Vec<(u64, Result<Value, Error>)> {
        std::mem::take(&mut self.relayed)
    }

    // ---- The port ----

    /// The guest has opened the port.
    pub fn port_opened(&mut self, now: Instant, watch: &mut dyn Watch) {
        self.broker.port_opened(now);
        self.settle(now, watch);
    }

    /// The guest has closed the port; what was on its way in either direction is lost.
    pub fn port_closed(&mut self, now: Instant, watch: &mut dyn Watch) {
        self.broker.port_closed(now);
        self.settle(now, watch);
    }

    /// The guest starts again from nothing: the port is closed, and no filesystem is frozen.
    pub fn guest_reset(&mut self, now: Instant, watch: &mut dyn Watch) {
        self.broker.guest_reset(now);
        self.settle(now, watch);
    }

    /// The VM runs, or stands still: the agent cannot answer then, and its time does not pass. A channel
    /// begins with the VM running.
    pub fn vm_running(&mut self, running: bool, now: Instant) {
        self.broker.vm_running(running, now);
    }

    /// Bytes for the guest; to be offered to the port after any call.
    pub fn to_guest(&self) -> &[u8] {
        self.broker.to_guest()
    }

    /// The port has taken so many of them.
    pub fn sent_to_guest(&mut self, count: usize) {
        self.broker.sent_to_guest(count);
    }

    /// Bytes from the guest. They can always be taken.
    pub fn receive(&mut self, bytes: &[u8], now: Instant, watch: &mut dyn Watch) {
        self.broker.receive(bytes, now);
        self.settle(now, watch);
    }

    // ---- Time and state ----

    /// When [`tick`](Self::tick) is next needed.
    pub fn next_deadline(&self) -> Option<Instant> {
        let deadline = |client: &AgentClient| client.deadline(self.permit == Some(client.number));
        let clients = self.clients.iter().flatten().filter_map(deadline);
        clients.chain(self.broker.next_deadline()).min()
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Instant, watch: &mut dyn Watch) {
        self.broker.tick(now);
        for client in self.clients.iter_mut().flatten() {
            let has_permit = self.permit == Some(client.number);
            if client.deadline(has_permit).is_some_and(|deadline| deadline <= now) {
                client.give_up();
            }
        }
        self.settle(now, watch);
    }

    /// How it is.
    pub fn status(&self, now: Instant) -> AgentStatus {
        self.broker.status(now)
    }

    /// Sends what clients take at once and closes everything: the end of the VM.
    pub fn close(mut self, now: Instant, watch: &mut dyn Watch) {
        self.settle(now, watch);
        for client in self.clients.into_iter().flatten() {
            client.close(watch);
        }
        watch.remove(self.listener.as_raw_fd());
    }

    fn accept(&mut self, now: Instant) {
        while let Some(connection) = self.listener.accept() {
            let free = (0..CLIENTS_MAX)
                .map(|offset| (self.next_slot + offset) % CLIENTS_MAX)
                .find(|slot| self.clients[*slot].is_none());
            let Some(slot) = free else {
                self.listener.turn_away(connection, CLIENTS_MAX);
                continue;
            };
            self.next_slot = slot + 1;
            self.clients_ever += 1;
            self.clients[slot] = Some(AgentClient::new(self.clients_ever, connection, now));
        }
    }

    fn client_ready(&mut self, slot: usize, ready: Ready, now: Instant) {
        let Some(Some(client)) = self.clients.get_mut(slot) else { return };
        if ready.writable {
            client.flush(now);
        }
        if ready.readable || ready.hung_up {
            client.read(self.permit.is_none_or(|holder| holder == client.number), &mut self.buffer, now);
        }
        if client.starts_afresh() && self.broker.start_afresh(Client::Socket(client.number), now) {
            client.forget_request();
        }
        self.serve(slot, now);
        if let Some(Some(client)) = self.clients.get_mut(slot)
            && ready.hung_up
        {
            client.hung_up(self.permit.is_none_or(|holder| holder == client.number));
        }
    }

    /// Gives the broker the client's next request, if it has none yet.
    fn serve(&mut self, slot: usize, now: Instant) {
        let Some(Some(client)) = self.clients.get_mut(slot) else { return };
        let large = client.is_large() && !client.is_waiting();
        if let Some(request) = client.next_request() {
            let asker = Client::Socket(client.number);
            self.broker.request(asker, request.execute, request.arguments, now);
        }
        if large && self.permit.is_none() {
            self.permit = Some(client.number);
        }
    }

    /// Hands out outcomes until there are none: an answer lets its client's next request in, which may have
    /// an outcome at once.
    fn deliver(&mut self, now: Instant) {
        loop {
            let outcomes = self.broker.take_outcomes();
            if outcomes.is_empty() {
                return;
            }
            for outcome in outcomes {
                match outcome.client {
                    Client::Monitor(session) => self.relay(session, outcome.result),
                    Client::Socket(number) => self.answer(number, outcome, now),
                }
            }
        }
    }

    fn relay(&mut self, session: u64, result: Option<Result<Value, Error>>) {
        self.relayed.push((session, result.unwrap_or_else(|| Ok(client::nothing()))));
    }

    fn answer(&mut self, number: u64, outcome: Outcome, now: Instant) {
        let is_asker = |client: &Option<AgentClient>| client.as_ref().is_some_and(|c| c.number == number);
        let Some(slot) = self.clients.iter().position(is_asker) else { return };
        if let Some(client) = &mut self.clients[slot] {
            client.complete(outcome.result, now);
            client.flush(now);
        }
        self.bound_output(number);
        self.serve(slot, now);
    }

    /// Gives up clients that do not take their answers when there is too much of them.
    fn bound_output(&mut self, newest: u64) {
        while self.clients.iter().flatten().map(AgentClient::queued).sum::<usize>() > OUTPUT_TOTAL {
            let others = self.clients.iter_mut().flatten().filter(|client| client.number != newest);
            let waiting = others.filter(|client| client.queued() > 0);
            match waiting.min_by_key(|client| client.deadline(false)) {
                Some(slowest) => slowest.give_up(),
                None => return,
            }
        }
    }

    /// Hands out answers, writes what can be written, drops who is done, and tells the loop what to wait for.
    fn settle(&mut self, now: Instant, watch: &mut dyn Watch) {
        self.deliver(now);
        for slot in &mut self.clients {
            let Some(client) = slot else { continue };
            client.flush(now);
            let needs_permit = client.is_large() || client.is_waiting();
            if self.permit == Some(client.number) && (client.is_over() || !needs_permit) {
                self.permit = None;
            }
            if let Some(client) = slot.take_if(|client| client.is_over()) {
                self.broker.client_gone(Client::Socket(client.number), client.is_informed(), now);
                client.close(watch);
            }
        }
        for (token, client) in (0..).map(Token::AgentClient).zip(&mut self.clients) {
            if let Some(client) = client {
                let permit = self.permit.is_none_or(|holder| holder == client.number);
                client.watch(token, permit, watch);
            }
        }
    }
}
