//! The agent's one loop: sleep, take what happened, answer what was asked.

use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::channel::{Channel, Received};
use crate::dispatch::Guest;
use crate::options::Options;
use crate::poller::{Poller, Token};
use crate::signals::Signals;
use crate::{inheritance, log};

/// Requests answered before signals and children get a turn.
const REQUESTS_PER_TURN: usize = 64;

/// Why the agent cannot serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error("Cannot set up")]
    SetUp(#[source] io::Error),
    #[error("Cannot wait for events")]
    Wait(#[source] io::Error),
}

/// Serves until SIGTERM or SIGINT. Filesystems that are still frozen then are thawed first: nobody
/// else would.
pub(crate) fn run(options: Options) -> Result<(), ServeError> {
    let Options { method, path, statedir, logfile: _, verbose: _ } = options;
    if let Err(error) = inheritance::keep_from_children() {
        log::warning(format_args!("Children will inherit open descriptors: {error}"));
    }
    let signals = Signals::block(&[libc::SIGTERM, libc::SIGINT, libc::SIGCHLD]).map_err(ServeError::SetUp)?;
    let poller = Rc::new(Poller::new().map_err(ServeError::SetUp)?);
    poller.add_readable(&signals, Token::Signals).map_err(ServeError::SetUp)?;
    let channel = Channel::open(method, &path, Rc::clone(&poller)).map_err(ServeError::SetUp)?;
    let guest = Guest::new(&statedir, Rc::clone(&poller));
    Server { signals, poller, channel, guest, unfinished: true }.run()
}

struct Server {
    // Wiring.
    signals: Signals,
    poller: Rc<Poller>,
    channel: Channel,
    // Volatile state.
    guest: Guest,
    /// The channel was left before it said that there is nothing more.
    unfinished: bool,
}

impl Server {
    fn run(mut self) -> Result<(), ServeError> {
        log::debug(format_args!("Guest agent {} started", env!("CARGO_PKG_VERSION")));
        loop {
            self.serve_channel();
            let events = self.poller.wait(self.limit()).map_err(ServeError::Wait)?;
            for (token, ready) in events {
                match token {
                    Token::Signals => {
                        if self.take_signals() {
                            self.end();
                            return Ok(());
                        }
                    }
                    Token::Channel | Token::Waiting => self.channel.on_event(token, ready),
                    Token::Child { pid, stream } => self.guest.children.on_ready(pid, stream),
                }
            }
            if self.channel.retry_at().is_some_and(|at| at <= Instant::now()) {
                self.channel.connect();
            }
        }
    }

    /// How long to sleep at most: for ever, unless something is known to be due.
    fn limit(&self) -> Option<Duration> {
        if self.unfinished {
            return Some(Duration::ZERO);
        }
        self.channel.retry_at().map(|at| at.saturating_duration_since(Instant::now()))
    }

    fn serve_channel(&mut self) {
        for _ in 0..REQUESTS_PER_TURN {
            match self.channel.receive() {
                Received::Item(item) => {
                    if let Some(reply) = self.guest.answer(item) {
                        self.channel.send(&reply);
                    }
                }
                Received::Lost(error) => {
                    log::warning(format_args!("The channel is gone: {error}"));
                    self.guest.thaw_for_nobody("the channel is gone");
                }
                Received::Nothing => {
                    self.unfinished = false;
                    return;
                }
            }
        }
        self.unfinished = true;
    }

    /// True if one of the signals asks the agent to end.
    fn take_signals(&mut self) -> bool {
        let mut end = false;
        while let Some(number) = self.signals.next() {
            match number {
                libc::SIGCHLD => self.guest.children.reap(),
                _ => end = true,
            }
        }
        end
    }

    fn end(&mut self) {
        self.guest.thaw_for_nobody("the agent ends");
        self.channel.flush();
        log::debug(format_args!("Guest agent ends"));
    }
}
