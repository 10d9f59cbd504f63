//! The agent's main loop: sleep, take what happened, answer what was asked.
//!
//! ```text
//!   peer ──▶ session: busy?  no ──▶ prompt command: answered at once
//!                            │  └──▶ worker command: busy until it ends
//!                            └ yes ─▶ waits, unless it overtakes:
//!                                     exec-oob      answered at once
//!                                     sync, 0xFF    the reply to the running command is dropped, whoever
//!                                                   synchronises does not wait for it; answered at once
//! ```
//!
//! So replies keep the order of requests, and yet a host can always find out whether the agent is there.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use protocol::{Args, Error, Request};
use serde_json::Value;

use crate::agent::Agent;
use crate::channel::{Channel, Received, Seat};
use crate::dispatch::{self, Incoming};
use crate::guest::Guest;
use crate::options::Options;
use crate::poller::{Poller, Ready, Token};
use crate::schema::{Command, Run};
use crate::signals::Signals;
use crate::worker::{Finished, Ticket, Worker};
use crate::{inheritance, log};

/// Requests of one peer answered before anybody else gets a turn.
const REQUESTS_PER_TURN: usize = 64;
/// Commands that may wait for the worker; beyond that requests wait with their peers.
const JOBS: usize = 16;
/// How long the end waits for filesystems to thaw.
const THAWING: Duration = Duration::from_secs(30);

/// Why the agent cannot serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error("Cannot set up")]
    SetUp(#[source] io::Error),
    #[error("Cannot wait for events")]
    Wait(#[source] io::Error),
}

/// Opens the channel, and serves it nobody yet. A listening socket that was `inherited` counts more than the
/// address of the options.
pub(crate) fn start(options: Options, inherited: Option<OwnedFd>) -> Result<Server, ServeError> {
    let Options { address, statedir, access, .. } = options;
    if let Err(error) = inheritance::keep_from_children() {
        log::warning(format_args!("Children will inherit open descriptors: {error}"));
    }
    let signals = Signals::block(&[libc::SIGTERM, libc::SIGINT, libc::SIGCHLD]).map_err(ServeError::SetUp)?;
    let poller = Rc::new(Poller::new().map_err(ServeError::SetUp)?);
    poller.add_readable(&signals, Token::Signals).map_err(ServeError::SetUp)?;
    let guest = Guest::new(&statedir);
    let agent = Agent::new(access.clone(), Rc::clone(&poller), Arc::clone(guest.freezer.freezing()));
    let worker = Worker::start(guest, access).map_err(ServeError::SetUp)?;
    poller.add_readable(&worker, Token::Worker).map_err(ServeError::SetUp)?;
    let channel = Channel::open(&address, inherited, Rc::clone(&poller)).map_err(ServeError::SetUp)?;
    let sessions = channel.seats().map(|_| Session::default()).collect();
    Ok(Server { signals, poller, channel, agent, worker, sessions, unfinished: true })
}

/// What one peer waits for.
#[derive(Default)]
struct Session {
    /// The command on the worker whose reply is next.
    busy: Option<Busy>,
    /// The first message behind it.
    ahead: Option<Incoming>,
}

struct Busy {
    ticket: Ticket,
    command: &'static Command,
    request: Request,
}

impl Session {
    /// Whether a message has its turn.
    fn admits(&self, incoming: &Incoming) -> bool {
        match &self.busy {
            None => true,
            // Its silence is its success: it cannot be left without a reply to its failure.
            Some(busy) if incoming.is_fresh_start() => busy.command.success_response,
            Some(_) => incoming.is_out_of_band(),
        }
    }
}

/// The agent at work.
pub(crate) struct Server {
    // Wiring.
    signals: Signals,
    poller: Rc<Poller>,
    channel: Channel,
    worker: Worker,
    // Volatile state.
    agent: Agent,
    sessions: Vec<Session>,
    /// A peer was left before it said that there is nothing more.
    unfinished: bool,
}

impl Server {
    /// Serves until SIGTERM or SIGINT. Filesystems that are still frozen then are thawed first: nobody else would.
    pub(crate) fn run(mut self) -> Result<(), ServeError> {
        log::debug(format_args!("Guest agent {} started", env!("CARGO_PKG_VERSION")));
        loop {
            self.unfinished = false;
            for seat in self.channel.seats() {
                self.serve(seat);
            }
            let events = self.poller.wait(self.limit()).map_err(ServeError::Wait)?;
            for (token, ready) in events {
                if self.on_event(token, ready) {
                    self.end();
                    return Ok(());
                }
            }
            if self.channel.retry_at().is_some_and(|at| at <= Instant::now()) {
                self.channel.connect();
            }
        }
    }

    /// True if it asks the agent to end.
    fn on_event(&mut self, token: Token, ready: Ready) -> bool {
        match token {
            Token::Signals => return self.take_signals(),
            Token::Peer(seat) => self.channel.on_event(seat, ready),
            Token::Waiting => self.channel.connect(),
            Token::Worker => {
                for finished in self.worker.finished() {
                    self.on_finished(finished);
                }
            }
            Token::Child { pid, stream } => self.agent.children.on_ready(pid, stream),
        }
        false
    }

    /// How long to sleep at most: for ever, unless something is known to be due.
    fn limit(&self) -> Option<Duration> {
        if self.unfinished {
            return Some(Duration::ZERO);
        }
        self.channel.retry_at().map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Takes what a peer has sent, as far as it has its turn.
    fn serve(&mut self, seat: Seat) {
        let index = usize::from(seat);
        for _ in 0..REQUESTS_PER_TURN {
            if self.channel.is_deaf(seat) {
                self.sessions[index].busy = None;
            }
            let incoming = match self.sessions[index].ahead.take() {
                Some(incoming) => incoming,
                None => match self.channel.receive(seat) {
                    Received::Item(item) => Incoming::parse(item),
                    Received::Left => {
                        self.sessions[index] = Session::default();
                        continue;
                    }
                    Received::Lost(error) => {
                        self.sessions[index] = Session::default();
                        log::warning(format_args!("The channel is gone: {error}"));
                        self.thaw_for_nobody("the channel is gone");
                        continue;
                    }
                    Received::Nothing => return,
                },
            };
            let session = &self.sessions[index];
            if !session.admits(&incoming) || (session.busy.is_none() && self.worker.waiting() >= JOBS) {
                self.sessions[index].ahead = Some(incoming);
                return;
            }
            self.take(seat, incoming);
        }
        self.unfinished = true;
    }

    fn take(&mut self, seat: Seat, incoming: Incoming) {
        if incoming.is_fresh_start() {
            self.sessions[usize::from(seat)].busy = None;
        }
        match incoming {
            Incoming::Sentinel => {}
            Incoming::Refused(reply) => self.channel.send(seat, &reply),
            Incoming::Request(request) => self.carry_out(seat, request),
        }
    }

    fn carry_out(&mut self, seat: Seat, mut request: Request) {
        let args = Args::new(std::mem::take(&mut request.arguments));
        let frozen = self.agent.freezing.is_frozen();
        match dispatch::find(&request, &self.agent.access, frozen) {
            Err(error) => self.reply(seat, None, request, Err(error)),
            Ok(command) => {
                log::debug(format_args!("{}", command.name));
                match command.run {
                    Run::Prompt(handler) => {
                        let result = handler(&mut self.agent, args);
                        self.reply(seat, Some(command), request, result);
                    }
                    Run::Worker(handler) => {
                        let ticket = self.worker.submit(command, handler, args);
                        self.sessions[usize::from(seat)].busy = Some(Busy { ticket, command, request });
                    }
                }
            }
        }
    }

    fn reply(
        &mut self,
        seat: Seat,
        command: Option<&Command>,
        request: Request,
        result: Result<Value, Error>,
    ) {
        if let Some(reply) = dispatch::reply(command, request, result) {
            self.channel.send(seat, &reply);
        }
    }

    /// A command on the worker has ended. Its peer may have left, or wait for it no more.
    fn on_finished(&mut self, Finished { ticket, result }: Finished) {
        let asked = |session: &Session| session.busy.as_ref().is_some_and(|busy| busy.ticket == ticket);
        let seat = self.channel.seats().find(|&seat| asked(&self.sessions[usize::from(seat)]));
        let Some((seat, busy)) =
            seat.and_then(|seat| Some((seat, self.sessions[usize::from(seat)].busy.take()?)))
        else {
            return;
        };
        self.reply(seat, Some(busy.command), busy.request, result);
    }

    /// True if one of the signals asks the agent to end.
    fn take_signals(&mut self) -> bool {
        let mut end = false;
        while let Some(number) = self.signals.next() {
            match number {
                libc::SIGCHLD => self.agent.children.reap(),
                _ => end = true,
            }
        }
        end
    }
}

/// Thawing at the end.
impl Server {
    /// Thaws what is frozen when nobody is left to ask for it.
    fn thaw_for_nobody(&mut self, why: &str) {
        if !self.agent.freezing.is_frozen() {
            return;
        }
        log::warning(format_args!("Thawing: {why}"));
        let thaw = dispatch::all().find(|command| command.name == "guest-fsfreeze-thaw");
        if let Some((command, Run::Worker(handler))) = thaw.map(|command| (command, command.run)) {
            self.worker.submit(command, handler, Args::new(protocol::Map::new()));
        }
    }

    fn end(&mut self) {
        self.thaw_for_nobody("the agent ends");
        let deadline = Instant::now() + THAWING;
        while self.agent.freezing.is_frozen() && self.worker.waiting() > 0 {
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                log::error(format_args!("Filesystems are still frozen after {} s", THAWING.as_secs()));
                break;
            }
            match self.poller.wait(Some(rest)) {
                Ok(events) if events.iter().any(|(token, _)| *token == Token::Worker) => {
                    for finished in self.worker.finished() {
                        self.on_finished(finished);
                    }
                }
                _ => {}
            }
        }
        self.channel.flush();
        log::debug(format_args!("Guest agent ends"));
    }
}
