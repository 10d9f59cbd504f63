//! The broker: many clients, one agent, one command at a time and simple questions beside it. No I/O, no clock.
//!
//! ```text
//!                      guest opens the port              answer to our token, after 0xFF
//!   ┌────────┐ ───────────────────────────▶ ┌─────────┐ ─────────────────────────────▶ ┌──────┐
//!   │ Closed │                              │ Syncing │                                │ Idle │
//!   └────────┘ ◀──────┐       again, with a ▲ │   ▲ ◀── stray answer ──────────────────└──────┘
//!        ▲            │       new token, at └─┘   │                                     │   ▲
//!        └─ guest closes it, in any state         │ no answer in time, freeze given up, │   │
//!                                                 │ answer too long, half a request sent▼   │ answer
//!                                                 └──────────────────────────────────┌──────┐
//!                                                                                    │ Busy │
//!                                                                                    └──────┘
//! ```
//!
//! Answers to commands are not told apart by id: the agent of 2012 refuses requests that carry one. Being in
//! step is everything, so whenever that is in doubt the broker gets in step again with
//! `guest-sync-delimited` and a random token, and believes nothing before the answer to it. An agent that
//! can do several things at once takes that for a sign that nobody waits for the command any longer, and
//! answers although it may still work on it; so what has to be undone is undone by a command, never by
//! waiting.
//!
//! Questions that such an agent answers at once (`out_of_band.rs`) do have an id. They go out in Idle and Busy
//! alike, and say nothing about being in step: their answers may come before, after and between others.
//!
//! A client has at most one request here; further ones wait with the client. So the queue, first come first
//! served, is a round robin over clients (`turns.rs`).
//!
//! `guest-shutdown` and the suspend commands answer only if they fail. Right behind them the broker sends a
//! sync of its own: if that is answered first, or the port closes, or nothing comes in time, the command is
//! taken as accepted.

use std::collections::VecDeque;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::time::{Duration, Instant};

use protocol::{Decoder, Error, Handshake, Item, Limits, Map, ParseError, Progress, request_line};
use serde_json::{Value, json};

use super::command::{Command, FILE_REPLY_MAX, Kind, REPLY_MAX};
use super::freeze::Freezes;
use super::in_flight::{Asker, Ending, InFlight};
use super::out_of_band::{Ability, Answered, OutOfBand};
use super::outbox::Outbox;
use super::{AgentStatus, ChannelConfig, Client};

/// Bounds on one message of the guest.
const GUEST_LIMITS: Limits = Limits { message_bytes: FILE_REPLY_MAX, depth: 128, tokens: 256 << 10 };
/// Longest message the guest may send while nobody asked it.
const UNASKED_MAX: usize = 64 << 10;
/// Fed to the decoder at once, so that bounds are looked at often enough.
const PIECE: usize = 16 << 10;
/// First and longest pause between attempts to get in step.
const SYNC_RETRY: Duration = Duration::from_secs(5);
const SYNC_RETRY_MAX: Duration = Duration::from_secs(60);

mod turns;

/// What became of a request.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Who asked.
    pub(super) client: Client,
    /// The agent's answer, or ours in its place. `None`: accepted, and there is no answer.
    pub(super) result: Option<Result<Value, Error>>,
}

/// A request that has not been sent, or may have to be sent again.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) client: Client,
    pub(super) command: Command,
    arrived: Instant,
}

impl Queued {
    /// Not to overtake anything.
    pub(super) fn in_turn(mut self) -> Self {
        self.command.overtaking = None;
        self
    }
}

#[derive(Debug)]
enum Link {
    Closed,
    Syncing { handshake: Handshake, again: Instant, wait: Duration },
    Idle,
    Busy(InFlight),
}

#[derive(Debug)]
pub(super) struct Broker {
    // Fixed configuration.
    config: ChannelConfig,
    // The guest's side.
    link: Link,
    decoder: Decoder,
    /// Bytes of a message of the guest that has not ended yet.
    unfinished: usize,
    outbox: Outbox,
    out_of_band: OutOfBand,
    tokens: RandomState,
    tokens_used: u64,
    // The clients' side.
    queue: VecDeque<Queued>,
    outcomes: Vec<Outcome>,
    /// Since when requests cannot be sent.
    unready_since: Option<Instant>,
    /// Since when the VM has not been running, and how long it stood still before that.
    stopped_since: Option<Instant>,
    stood_still: Duration,
    freezes: Freezes,
    malformed: u64,
}

impl Broker {
    pub(super) fn new(config: ChannelConfig) -> Self {
        Self {
            config,
            link: Link::Closed,
            decoder: Decoder::new(GUEST_LIMITS),
            unfinished: 0,
            outbox: Outbox::default(),
            out_of_band: OutOfBand::new(),
            tokens: RandomState::new(),
            tokens_used: 0,
            queue: VecDeque::new(),
            outcomes: Vec::new(),
            unready_since: None,
            stopped_since: None,
            stood_still: Duration::ZERO,
            freezes: Freezes::default(),
            malformed: 0,
        }
    }

    // ---- The clients' side ----

    /// A client asks. It must not ask again before the outcome.
    pub(super) fn request(&mut self, client: Client, name: String, arguments: Map, now: Instant) {
        match Command::new(name, arguments, &self.config) {
            Ok(command) => self.queue.push_back(Queued { client, command, arrived: now }),
            Err(error) => self.outcomes.push(Outcome { client, result: Some(Err(error)) }),
        }
        self.pump(now);
    }

    /// A client is gone; `informed` if it can have read all its answers. Its outcome is dropped.
    pub(super) fn client_gone(&mut self, client: Client, informed: bool, now: Instant) {
        self.queue.retain(|queued| queued.client != client);
        self.out_of_band.client_gone(client);
        let outcomes = self.outcomes.len();
        self.outcomes.retain(|outcome| outcome.client != client);
        let informed = informed && outcomes == self.outcomes.len();
        self.orphan_command(client, now);
        self.freezes.client_gone(client, informed, self.guest_time(now));
        self.pump(now);
    }

    /// Outcomes since the last call.
    pub(super) fn take_outcomes(&mut self) -> Vec<Outcome> {
        std::mem::take(&mut self.outcomes)
    }

    // ---- The guest's side ----

    /// The guest has opened the port.
    pub(super) fn port_opened(&mut self, now: Instant) {
        if matches!(self.link, Link::Closed) {
            self.sync(SYNC_RETRY, now);
        }
    }

    /// The guest has closed the port: what is on its way in either direction is lost.
    pub(super) fn port_closed(&mut self, now: Instant) {
        self.outbox.clear();
        self.decoder.reset();
        self.unfinished = 0;
        self.unready_since.get_or_insert(now);
        if let Link::Busy(request) = std::mem::replace(&mut self.link, Link::Closed) {
            let text = format!("Guest agent went away before it answered '{}'", request.name);
            let ending = request.lost(text);
            self.end(&request, ending, now);
        }
        self.ask_again_in_turn();
        self.out_of_band.forget_agent();
    }

    /// The guest starts again from nothing: its filesystems are not frozen any more.
    pub(super) fn guest_reset(&mut self, now: Instant) {
        self.port_closed(now);
        self.freezes.guest_reset();
    }

    /// The VM runs, or stands still. Timeouts of the guest stand still with it.
    pub(super) fn vm_running(&mut self, running: bool, now: Instant) {
        match (running, self.stopped_since) {
            (false, None) => {
                self.stopped_since = Some(now);
                self.unready_since.get_or_insert(now);
            }
            (true, Some(since)) => {
                self.stopped_since = None;
                self.stood_still += now.saturating_duration_since(since);
                if matches!(self.link, Link::Idle | Link::Busy(_)) {
                    self.unready_since = None;
                }
                self.pump(now);
            }
            (false, Some(_)) | (true, None) => {}
        }
    }

    /// Bytes for the guest.
    pub(super) fn to_guest(&self) -> &[u8] {
        self.outbox.bytes()
    }

    /// The guest has taken so many of them.
    pub(super) fn sent_to_guest(&mut self, count: usize) {
        self.outbox.advance(count);
    }

    /// Bytes from the guest. It may send what it likes, as much as it likes.
    pub(super) fn receive(&mut self, bytes: &[u8], now: Instant) {
        for piece in bytes.chunks(PIECE) {
            if matches!(self.link, Link::Closed) {
                return;
            }
            self.decoder.feed(piece);
            self.unfinished += piece.len();
            while let Some(item) = self.decoder.next_item() {
                self.unfinished = self.decoder.unread_bytes();
                self.on_item(item, now);
            }
            if self.decoder.is_idle() {
                self.unfinished = 0;
            }
            let limit = match &self.link {
                Link::Busy(request) => request.reply_max,
                // What comes before the answer to our token may be a late answer to a request.
                Link::Syncing { .. } => REPLY_MAX,
                Link::Idle | Link::Closed => UNASKED_MAX,
            };
            let limit = if self.out_of_band.is_empty() { limit } else { limit.max(REPLY_MAX) };
            if self.unfinished > limit {
                self.too_long(now);
            }
        }
    }

    fn on_item(&mut self, item: Item, now: Instant) {
        let item = match item {
            Item::Value(message) => match self.out_of_band.answered(message) {
                Ok(answer) => return self.on_answer_out_of_band(answer, now),
                Err(message) => Item::Value(message),
            },
            item => item,
        };
        match &mut self.link {
            Link::Closed => {}
            Link::Syncing { handshake, .. } => {
                if handshake.on(&item) == Progress::Done {
                    self.link = Link::Idle;
                    if self.stopped_since.is_none() {
                        self.unready_since = None;
                    }
                    self.pump(now);
                }
            }
            Link::Idle => match item {
                Item::Sentinel => {}
                Item::Error(_) => self.malformed += 1,
                // To a question that is no longer waited for.
                Item::Value(message) if message.get("id").is_some_and(|id| !id.is_null()) => {
                    self.malformed += 1;
                }
                Item::Value(_) => {
                    // An answer to nothing: the next one may be late as well.
                    self.malformed += 1;
                    self.resync(now);
                }
            },
            Link::Busy(request) => match item {
                Item::Sentinel => request.marked = true,
                Item::Error(ParseError::TooLong | ParseError::TooManyTokens | ParseError::TooDeep) => {
                    self.too_long(now);
                }
                Item::Error(_) => {
                    request.marked = false;
                    self.malformed += 1;
                }
                Item::Value(message) => match request.on_message(message) {
                    Some(ending) => self.finish(ending, now),
                    None => self.malformed += 1,
                },
            },
        }
    }

    fn on_answer_out_of_band(&mut self, answer: Answered, now: Instant) {
        if let Link::Busy(request) = &mut self.link {
            request.marked = false;
        }
        if answer.is_refused() {
            // It has the sign and does not know the envelope.
            self.out_of_band.learn(None);
            self.queue.extend(answer.request.map(Queued::in_turn));
        } else if let Some(Queued { client, command, .. }) = answer.request {
            if command.kind == Kind::Status
                && !answer.outdated
                && let Ok(status) = &answer.result
            {
                self.freezes.status_answered(status);
            }
            self.outcomes.push(Outcome { client, result: Some(answer.result) });
        }
        self.pump(now);
    }

    fn too_long(&mut self, now: Instant) {
        self.malformed += 1;
        self.decoder.reset();
        self.unfinished = 0;
        match &self.link {
            Link::Busy(request) => {
                let text = format!("Guest agent's answer to '{}' is beyond all bounds", request.name);
                self.finish(Ending::Unknown(Error::generic(text)), now);
            }
            Link::Idle => self.resync(now),
            Link::Syncing { .. } | Link::Closed => {}
        }
    }

    // ---- One command ----

    fn dispatch(&mut self, asker: Asker, mut command: Command, now: Instant) {
        let timeout = match command.kind {
            Kind::Freeze | Kind::Trim => self.config.freeze_timeout,
            Kind::Thaw => self.config.thaw_timeout,
            Kind::Info if asker == Asker::Broker => self.config.hold,
            Kind::Ordinary | Kind::Status | Kind::Info | Kind::Sync(_) | Kind::NoReply => self.config.timeout,
        };
        if matches!(command.kind, Kind::Freeze | Kind::Thaw) {
            self.out_of_band.freeze_changes();
        }
        let mut line = std::mem::take(&mut command.line);
        let probe = (command.kind == Kind::NoReply).then(|| self.token());
        if let Some(token) = probe {
            let arguments = Map::from_iter([("id".to_owned(), json!(token))]);
            // Without the usual 0xFF before it: that would be answered, too, by an error.
            line.extend_from_slice(request_line("guest-sync-delimited", Some(arguments), None).as_bytes());
        }
        self.outbox.command(line);
        let deadline = self.guest_time(now) + timeout;
        self.link = Link::Busy(InFlight::new(asker, command, deadline, probe));
    }

    /// The command in the guest has ended.
    fn finish(&mut self, ending: Ending, now: Instant) {
        let Link::Busy(request) = std::mem::replace(&mut self.link, Link::Idle) else { return };
        let answered = matches!(ending, Ending::Answered(_));
        let unknown = matches!(ending, Ending::Unknown(_));
        self.end(&request, ending, now);
        match request.probe {
            // The answer to the probe is still to come.
            Some(token) if answered && !self.outbox.holds_command() => {
                let again = self.guest_time(now) + SYNC_RETRY;
                self.unready_since.get_or_insert(now);
                self.link = Link::Syncing { handshake: Handshake::new(token), again, wait: SYNC_RETRY };
            }
            _ if unknown || self.outbox.holds_command() => self.resync(now),
            _ => self.pump(now),
        }
    }

    /// Tells the client, and keeps the books on freezes.
    fn end(&mut self, request: &InFlight, ending: Ending, now: Instant) {
        self.freezes.command_ended(request, &ending, self.guest_time(now));
        match (request.kind, &ending) {
            (Kind::Info, Ending::Answered(Ok(info))) => self.out_of_band.learn(Some(info)),
            (Kind::Info, _) if request.asker == Asker::Broker => self.out_of_band.learn(None),
            _ => {}
        }
        if let Asker::Client(client) = request.asker {
            let result = match ending {
                Ending::Answered(result) => Some(result),
                Ending::Accepted => None,
                Ending::Unknown(error) => Some(Err(error)),
            };
            self.outcomes.push(Outcome { client, result });
        }
    }

    // ---- Getting in step ----

    fn resync(&mut self, now: Instant) {
        self.unready_since.get_or_insert(now);
        self.sync(SYNC_RETRY, now);
    }

    /// Asks the agent for a token; what has not been sent is dropped, and the agent told to forget what it
    /// has of it.
    fn sync(&mut self, wait: Duration, now: Instant) {
        self.ask_again_in_turn();
        let handshake = Handshake::new(self.token());
        self.outbox.clear();
        self.outbox.command(handshake.request());
        self.link = Link::Syncing { handshake, again: self.guest_time(now) + wait, wait };
    }

    /// A token that no former attempt has used and no other VMM is likely to.
    fn token(&mut self) -> i64 {
        self.tokens_used += 1;
        // Some clients' languages know no integers beyond 2^53; agents might be written in one.
        i64::try_from(self.tokens.hash_one(self.tokens_used) >> 12).unwrap_or_default()
    }

    // ---- Time ----

    /// The time by which the guest is measured. It stands still with the VM.
    fn guest_time(&self, now: Instant) -> Instant {
        let now = self.stopped_since.unwrap_or(now);
        now.checked_sub(self.stood_still).unwrap_or(now)
    }

    /// When [`tick`](Self::tick) is next needed.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let guest = if self.stopped_since.is_some() {
            None
        } else {
            match &self.link {
                Link::Closed => None,
                Link::Syncing { again, .. } => Some(*again),
                Link::Busy(request) => Some(request.deadline),
                Link::Idle => self.freezes.deadline(),
            }
        };
        let asked = self.out_of_band.deadline().filter(|_| self.stopped_since.is_none());
        let guest = guest.into_iter().chain(asked).min().map(|deadline| deadline + self.stood_still);
        let held = self.queue.iter().filter_map(|queued| self.held_until(queued)).min();
        guest.into_iter().chain(held).min()
    }

    /// Does what is due.
    pub(super) fn tick(&mut self, now: Instant) {
        self.refuse_held(now);
        if self.stopped_since.is_some() {
            return;
        }
        let guest_time = self.guest_time(now);
        for Queued { client, command, .. } in self.out_of_band.take_overdue(guest_time) {
            let text = format!("Guest agent did not answer '{}' in time", command.name);
            self.outcomes.push(Outcome { client, result: Some(Err(Error::generic(text))) });
        }
        match &self.link {
            Link::Syncing { again, wait, .. } if *again <= guest_time => {
                let wait = (*wait * 2).min(SYNC_RETRY_MAX);
                self.sync(wait, now);
            }
            Link::Busy(request) if request.deadline <= guest_time => self.time_out(now),
            Link::Closed | Link::Syncing { .. } | Link::Idle | Link::Busy(_) => self.pump(now),
        }
    }

    fn time_out(&mut self, now: Instant) {
        if let Link::Busy(request) = std::mem::replace(&mut self.link, Link::Idle) {
            let text = format!("Guest agent did not answer '{}' in time", request.name);
            let ending = request.lost(text);
            self.end(&request, ending, now);
            self.resync(now);
        }
    }

    pub(super) fn status(&self, now: Instant) -> AgentStatus {
        AgentStatus {
            connected: !matches!(self.link, Link::Closed),
            in_sync: matches!(self.link, Link::Idle | Link::Busy(_)),
            out_of_band: match self.out_of_band.ability() {
                Ability::Unknown => None,
                Ability::Absent => Some(false),
                Ability::Present => Some(true),
            },
            frozen: self.freezes.status(self.guest_time(now)),
            automatic_thaws: self.freezes.automatic_thaws(),
            malformed_replies: self.malformed,
        }
    }
}
