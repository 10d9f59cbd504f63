//! What the agent sleeps on: one epoll, and a name for each of its members.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

/// A standard stream of a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Input,
    Output,
    Error,
}

/// Who an event is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    Signals,
    /// The port, or the client in this seat.
    Peer(u8),
    /// A command that ended on the worker.
    Worker,
    /// The watchdog has something to say.
    Watchdog,
    /// A freeze has begun.
    Freezing,
    /// The listening socket, or the watch on a port that is absent.
    Waiting,
    Child {
        pid: u32,
        stream: Stream,
    },
}

/// An event for nobody: the kernel gave back something that was never registered.
#[derive(Debug, thiserror::Error)]
#[error("Unknown epoll token {0:#x}")]
pub(crate) struct UnknownToken(u64);

const SIGNALS: u64 = 1;
const PEER: u64 = 2;
const WAITING: u64 = 3;
const CHILD_INPUT: u64 = 4;
const CHILD_OUTPUT: u64 = 5;
const CHILD_ERROR: u64 = 6;
const WORKER: u64 = 7;
const WATCHDOG: u64 = 8;
const FREEZING: u64 = 9;
/// The kind is below, a child's pid or a peer's seat above.
const KIND_BITS: u32 = 32;

impl From<Token> for u64 {
    fn from(token: Token) -> Self {
        match token {
            Token::Signals => SIGNALS,
            Token::Peer(seat) => Self::from(seat) << KIND_BITS | PEER,
            Token::Worker => WORKER,
            Token::Watchdog => WATCHDOG,
            Token::Freezing => FREEZING,
            Token::Waiting => WAITING,
            Token::Child { pid, stream } => {
                let kind = match stream {
                    Stream::Input => CHILD_INPUT,
                    Stream::Output => CHILD_OUTPUT,
                    Stream::Error => CHILD_ERROR,
                };
                Self::from(pid) << KIND_BITS | kind
            }
        }
    }
}

impl TryFrom<u64> for Token {
    type Error = UnknownToken;

    fn try_from(data: u64) -> Result<Self, UnknownToken> {
        let unknown = UnknownToken(data);
        let Ok(pid) = u32::try_from(data >> KIND_BITS) else { return Err(unknown) };
        let seat = u8::try_from(pid);
        match data & u64::from(u32::MAX) {
            SIGNALS => Ok(Self::Signals),
            PEER => seat.map(Self::Peer).map_err(|_| UnknownToken(data)),
            WORKER => Ok(Self::Worker),
            WATCHDOG => Ok(Self::Watchdog),
            FREEZING => Ok(Self::Freezing),
            WAITING => Ok(Self::Waiting),
            CHILD_INPUT => Ok(Self::Child { pid, stream: Stream::Input }),
            CHILD_OUTPUT => Ok(Self::Child { pid, stream: Stream::Output }),
            CHILD_ERROR => Ok(Self::Child { pid, stream: Stream::Error }),
            _ => Err(unknown),
        }
    }
}

/// What a descriptor is ready for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ready {
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// The other end is closed (or, for a port, not open yet).
    pub(crate) hung_up: bool,
}

impl From<EventFlags> for Ready {
    fn from(flags: EventFlags) -> Self {
        Self {
            readable: flags.intersects(EventFlags::IN | EventFlags::RDHUP),
            writable: flags.contains(EventFlags::OUT),
            hung_up: flags.intersects(EventFlags::HUP | EventFlags::ERR),
        }
    }
}

/// The epoll. A descriptor leaves it by being closed.
#[derive(Debug)]
pub(crate) struct Poller {
    epoll: OwnedFd,
}

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(CreateFlags::CLOEXEC)? })
    }

    /// Reports `source` as long as it is readable.
    pub(crate) fn add_readable(&self, source: impl AsFd, token: Token) -> io::Result<()> {
        self.add(source, token, EventFlags::IN)
    }

    /// Reports `source` as long as it is writable.
    pub(crate) fn add_writable(&self, source: impl AsFd, token: Token) -> io::Result<()> {
        self.add(source, token, EventFlags::OUT)
    }

    /// Reports `source` when something changes: data came, room to write came, the other end opened
    /// or closed. A level-triggered wait on a port would spin while the host end is closed, for then
    /// the port hangs up and stays readable (Linux `drivers/char/virtio_console.c`, `port_fops_poll`).
    pub(crate) fn add_edges(&self, source: impl AsFd, token: Token) -> io::Result<()> {
        let changes = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        self.add(source, token, changes)
    }

    /// Reports `source` no more, even if somebody keeps it open.
    pub(crate) fn remove(&self, source: impl AsFd) {
        // It may have left by itself.
        let _ = epoll::delete(&self.epoll, source);
    }

    fn add(&self, source: impl AsFd, token: Token, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, source, EventData::new_u64(token.into()), flags)?)
    }

    /// Sleeps until something happens or the time is up; no time means no limit.
    pub(crate) fn wait(&self, limit: Option<Duration>) -> io::Result<Vec<(Token, Ready)>> {
        let limit = limit.map(|limit| Timespec {
            tv_sec: limit.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        });
        let mut events = [Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; EVENTS];
        let count = match epoll::wait(&self.epoll, &mut events, limit.as_ref()) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        let named = events[..count].iter().map(|event| {
            let (flags, data) = (event.flags, event.data);
            Ok((Token::try_from(data.u64()).map_err(io::Error::other)?, flags.into()))
        });
        named.collect()
    }
}

/// Events taken per wait; the rest comes with the next one.
const EVENTS: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_kernel() {
        let child = |stream| Token::Child { pid: u32::MAX, stream };
        let all = [
            Token::Signals,
            Token::Peer(0),
            Token::Peer(u8::MAX),
            Token::Worker,
            Token::Watchdog,
            Token::Freezing,
            Token::Waiting,
            child(Stream::Input),
            child(Stream::Output),
            child(Stream::Error),
        ];
        for token in all {
            assert_eq!(Token::try_from(u64::from(token)).unwrap(), token);
        }
        assert!(Token::try_from(0).is_err());
        assert!(Token::try_from(99).is_err());
    }
}
