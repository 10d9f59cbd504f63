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

mod freezing;
mod restart;

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use protocol::{Args, Error, Request};
use serde_json::Value;

use self::freezing::thaw_chore;
use self::restart::Restart;
use crate::agent::Agent;
use crate::channel::{Channel, Received, Seat};
use crate::dispatch::{self, Incoming};
use crate::freeze::{Cause, Freezer, Hooks, Linux};
use crate::guest::Guest;
use crate::options::Options;
use crate::poller::{Poller, Ready, Token};
use crate::schema::{Command, Role, Run};
use crate::signals::Signals;
use crate::watchdog::Watchdog;
use crate::worker::{Finished, Pending, Worker};
use crate::{inheritance, log};

/// Requests of one peer answered before anybody else gets a turn.
const REQUESTS_PER_TURN: usize = 64;
/// Commands that may wait for the worker; beyond that they are refused.
const JOBS: usize = 16;

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
    let Options { address, statedir, access, freeze, .. } = options;
    if let Err(error) = inheritance::keep_from_children() {
        log::warning(format_args!("Children will inherit open descriptors: {error}"));
    }
    let signals = Signals::block(&[libc::SIGTERM, libc::SIGINT, libc::SIGCHLD]).map_err(ServeError::SetUp)?;
    let poller = Rc::new(Poller::new().map_err(ServeError::SetUp)?);
    poller.add_readable(&signals, Token::Signals).map_err(ServeError::SetUp)?;
    let hooks = Hooks::new(freeze.hook, freeze.hook_dir, freeze.hook_timeout).map_err(ServeError::SetUp)?;
    let (watchdog, inheritance) = Watchdog::start(&statedir, hooks.clone()).map_err(ServeError::SetUp)?;
    let watchdog = Arc::new(watchdog);
    poller.add_readable(&*watchdog.socket(), Token::Watchdog).map_err(ServeError::SetUp)?;
    let freezer = Freezer::new(Linux, &statedir, hooks, freeze.lease, (Arc::clone(&watchdog), inheritance));
    let guest = Guest::new(&statedir, freezer.map_err(ServeError::SetUp)?);
    let freezing = Arc::clone(guest.freezer.freezing());
    poller.add_readable(freezing.begun(), Token::Freezing).map_err(ServeError::SetUp)?;
    let agent = Agent::new(access.clone(), Rc::clone(&poller), freezing, watchdog);
    let unfinished = guest.freezer.unfinished();
    let mut worker = Worker::start(guest, access).map_err(ServeError::SetUp)?;
    poller.add_readable(&worker, Token::Worker).map_err(ServeError::SetUp)?;
    if let Some(cause) = unfinished {
        worker.submit_chore(thaw_chore(agent.freezing.number(), cause));
    }
    let channel = Channel::open(&address, inherited, Rc::clone(&poller)).map_err(ServeError::SetUp)?;
    let sessions = channel.seats().map(|_| Session::default()).collect();
    let freeze_timeout = freeze.timeout;
    Ok(Server {
        signals,
        poller,
        channel,
        agent,
        worker,
        sessions,
        freeze_timeout,
        restart: Restart::new(),
        unfinished: true,
    })
}

/// What one peer waits for.
#[derive(Default)]
struct Session {
    /// The command on the worker whose reply is next.
    busy: Option<Busy>,
    /// The first message behind it.
    ahead: Option<Incoming>,
    /// It was told of this freeze and may not have read that yet.
    unheard: Option<u64>,
}

struct Busy {
    pending: Pending,
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
    // Fixed configuration.
    /// The longest a freeze may take.
    freeze_timeout: Option<Duration>,
    // Volatile state.
    restart: Restart,
    agent: Agent,
    sessions: Vec<Session>,
    /// A peer was left before it said that there is nothing more.
    unfinished: bool,
}

impl Server {
    /// Serves until SIGTERM or SIGINT. Filesystems that are still frozen then are thawed first; whether that worked.
    pub(crate) fn run(mut self) -> Result<bool, ServeError> {
        log::debug(format_args!("Guest agent {} started", env!("CARGO_PKG_VERSION")));
        loop {
            self.unfinished = false;
            for seat in self.channel.seats() {
                self.serve(seat);
            }
            let events = self.poller.wait(self.limit()).map_err(ServeError::Wait)?;
            for (token, ready) in events {
                if self.on_event(token, ready) {
                    return Ok(self.end());
                }
            }
            if self.channel.retry_at().is_some_and(|at| at <= Instant::now()) {
                self.channel.connect();
            }
            if self.freeze_overdue_at().is_some_and(|at| at <= Instant::now()) {
                self.cancel_freeze("The freeze took too long");
            }
            if self.unwatched_lease_end().is_some_and(|at| at <= Instant::now()) {
                self.agent.freezing.lapse();
                self.thaw_for(Cause::Lease);
            }
            if self.restart.due.is_some_and(|at| at <= Instant::now()) {
                self.restart_watchdog();
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
            Token::Watchdog => self.hear_watchdog(),
            // Its time limit counts from the next sleep on.
            Token::Freezing => self.agent.freezing.hear(),
            Token::Child { pid, stream } => self.agent.children.on_ready(pid, stream),
        }
        false
    }

    /// How long to sleep at most: for ever, unless something is known to be due.
    fn limit(&self) -> Option<Duration> {
        if self.unfinished {
            return Some(Duration::ZERO);
        }
        let due =
            [self.channel.retry_at(), self.freeze_overdue_at(), self.restart.due, self.unwatched_lease_end()]
                .into_iter()
                .flatten()
                .min();
        due.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Takes what a peer has sent, as far as it has its turn.
    fn serve(&mut self, seat: Seat) {
        let index = usize::from(seat);
        for _ in 0..REQUESTS_PER_TURN {
            self.look_whether_it_left(seat);
            let incoming = match self.sessions[index].ahead.take() {
                Some(incoming) => incoming,
                None => match self.channel.receive(seat, self.sessions[index].busy.is_some()) {
                    Received::Item(item) => Incoming::parse(item),
                    Received::Left => {
                        self.forget(seat);
                        continue;
                    }
                    Received::Lost(error) => {
                        self.forget(seat);
                        log::warning(format_args!("The channel is gone: {error}"));
                        self.thaw_for(Cause::ChannelLost);
                        continue;
                    }
                    Received::Nothing => {
                        // What it was told may have gone to it just now.
                        self.look_whether_it_left(seat);
                        return;
                    }
                },
            };
            if !self.sessions[index].admits(&incoming) {
                self.sessions[index].ahead = Some(incoming);
                return;
            }
            self.take(seat, incoming);
        }
        self.unfinished = true;
    }

    fn look_whether_it_left(&mut self, seat: Seat) {
        let index = usize::from(seat);
        if self.channel.take_left(seat) {
            self.forget(seat);
        } else if self.channel.is_deaf(seat) {
            // What it asked for is still carried out.
            self.give_up_waiting(seat, "The client that asked for the freeze has left");
            if let Some(freeze) = self.sessions[index].unheard.take() {
                self.thaw_unheard(freeze);
            }
        } else if self.channel.is_heard(seat) {
            self.sessions[index].unheard = None;
        }
    }

    /// Another peer may take the seat.
    fn forget(&mut self, seat: Seat) {
        self.give_up_waiting(seat, "The client that asked for the freeze has left");
        if let Some(freeze) = std::mem::take(&mut self.sessions[usize::from(seat)]).unheard {
            self.thaw_unheard(freeze);
        }
    }

    /// The peer does not wait for its command any more. A freeze that nobody would hear of is none.
    fn give_up_waiting(&mut self, seat: Seat, why: &str) {
        let Some(busy) = self.sessions[usize::from(seat)].busy.take() else { return };
        busy.pending.wanted.store(false, Ordering::SeqCst);
        if busy.command.role == Role::Freeze && self.worker.current() == busy.pending.ticket {
            self.cancel_freeze(why);
        }
    }

    fn take(&mut self, seat: Seat, incoming: Incoming) {
        if incoming.is_fresh_start() {
            self.give_up_waiting(seat, "The client gave up on the freeze");
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
                self.before(command, request.oob);
                match command.run {
                    Run::Prompt(handler) => {
                        let result = handler(&mut self.agent, args);
                        self.reply(seat, Some(command), request, result);
                    }
                    Run::Worker(_) if self.worker.waiting() >= jobs(command) => {
                        let busy = Error::generic("The agent is busy: too many commands wait already");
                        self.reply(seat, Some(command), request, Err(busy));
                    }
                    Run::Worker(handler) => {
                        let pending = self.worker.submit(command, handler, args);
                        self.sessions[usize::from(seat)].busy = Some(Busy { pending, command, request });
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
    fn on_finished(&mut self, Finished { ticket, role, freeze, result }: Finished) {
        let froze = role == Role::Freeze && result.as_ref().is_ok_and(|count| *count != 0);
        match self.take_busy(|busy| busy.pending.ticket == ticket) {
            Some((seat, busy)) => {
                self.reply(seat, Some(busy.command), busy.request, result);
                self.sessions[usize::from(seat)].unheard = froze.then_some(freeze);
            }
            None if froze => self.thaw_unheard(freeze),
            None => {}
        }
    }

    /// The first peer that waits for such a command, and what it waits for.
    fn take_busy(&mut self, is_it: impl Fn(&Busy) -> bool) -> Option<(Seat, Busy)> {
        self.channel.seats().find_map(|seat| {
            let busy = &mut self.sessions[usize::from(seat)].busy;
            Some((seat, busy.take_if(|busy| is_it(busy))?))
        })
    }

    /// True if one of the signals asks the agent to end.
    fn take_signals(&mut self) -> bool {
        let mut end = false;
        while let Some(number) = self.signals.next() {
            match number {
                libc::SIGCHLD => {
                    self.agent.children.reap();
                    self.agent.watchdog.reap();
                }
                _ => end = true,
            }
        }
        end
    }
}

/// Commands that may wait: a thaw finds room where nothing else does.
fn jobs(command: &Command) -> usize {
    if command.role == Role::Thaw { 2 * JOBS } else { JOBS }
}
