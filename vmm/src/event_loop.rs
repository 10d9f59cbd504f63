//! The control loop's ears: file descriptors with a [`Token`] each, on top of event-manager.
//!
//! One subscriber, the VM, owns every descriptor of the control loop; the token says what became ready. Parts of
//! the VM (monitor, guest channel, console) register through [`Watch`] and never see epoll.

use std::collections::HashMap;
use std::os::fd::RawFd;

use event_manager::{EventOps, EventSet, Events};

/// What a ready descriptor is. Packed into event-manager's 32 bits: kind above, index below.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Token {
    /// A vCPU or disk thread has posted a `VmEvent`.
    VmEvent,
    /// A signal arrived (signalfd).
    Signal,
    /// The earliest deadline has passed (timerfd).
    Timer,
    /// A client connects to the monitor.
    MonitorListener,
    /// A monitor client, by slot.
    MonitorClient(u16),
    /// A client connects to the guest channel.
    AgentListener,
    /// A client of the guest channel, by slot.
    AgentClient(u16),
    /// A client connects to the host end of a virtio-serial port, by port.
    PortListener(u16),
    /// The client at the host end of a virtio-serial port, by port.
    PortClient(u16),
    /// The terminal's input.
    Stdin,
    /// The terminal's output is writable again.
    Stdout,
    /// The guest rang a doorbell of the virtio-serial device, by queue.
    ConsoleQueue(u16),
    /// The guest rang the doorbell of the entropy device.
    RngQueue,
    /// The 16550 has output.
    Serial,
}

/// What a descriptor is watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest {
    /// Wake when it can be read, or its peer hung up.
    pub read: bool,
    /// Wake when it can be written.
    pub write: bool,
}

impl Interest {
    /// Input only.
    pub const READ: Self = Self { read: true, write: false };
    /// Output only.
    pub const WRITE: Self = Self { read: false, write: true };
    /// Both.
    pub const BOTH: Self = Self { read: true, write: true };
    /// Neither: the descriptor stays known, errors and hang-ups are still told.
    pub const NONE: Self = Self { read: false, write: false };
}

/// What a descriptor turned out to be ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// It can be read (or reading tells of the end).
    pub readable: bool,
    /// It can be written.
    pub writable: bool,
    /// The peer hung up or the descriptor failed; nothing more will come after what is readable now.
    pub hung_up: bool,
}

/// Where the parts of the control loop say what they wait for.
pub trait Watch {
    /// Watches `fd`, or changes what it is watched for.
    fn set(&mut self, fd: RawFd, token: Token, interest: Interest);
    /// Stops watching `fd`. Must come before `fd` is closed: registrations are keyed by number.
    fn remove(&mut self, fd: RawFd);
}

impl Token {
    /// Packed for event-manager: kind in the high half, index in the low one.
    pub fn pack(self) -> u32 {
        let (kind, index) = match self {
            Self::VmEvent => (0, 0),
            Self::Signal => (1, 0),
            Self::Timer => (2, 0),
            Self::MonitorListener => (3, 0),
            Self::MonitorClient(slot) => (4, slot),
            Self::AgentListener => (5, 0),
            Self::AgentClient(slot) => (6, slot),
            Self::PortListener(port) => (7, port),
            Self::PortClient(port) => (8, port),
            Self::Stdin => (9, 0),
            Self::Stdout => (10, 0),
            Self::ConsoleQueue(queue) => (11, queue),
            Self::RngQueue => (12, 0),
            Self::Serial => (13, 0),
        };
        (kind << 16) | u32::from(index)
    }

    /// The reverse of [`Self::pack`]; `None` for a number it never gives.
    pub fn unpack(packed: u32) -> Option<Self> {
        let index = u16::try_from(packed & 0xffff).ok()?;
        let single = |token| (index == 0).then_some(token);
        match packed >> 16 {
            0 => single(Self::VmEvent),
            1 => single(Self::Signal),
            2 => single(Self::Timer),
            3 => single(Self::MonitorListener),
            4 => Some(Self::MonitorClient(index)),
            5 => single(Self::AgentListener),
            6 => Some(Self::AgentClient(index)),
            7 => Some(Self::PortListener(index)),
            8 => Some(Self::PortClient(index)),
            9 => single(Self::Stdin),
            10 => single(Self::Stdout),
            11 => Some(Self::ConsoleQueue(index)),
            12 => single(Self::RngQueue),
            13 => single(Self::Serial),
            _ => None,
        }
    }
}

/// [`Watch`] on event-manager's registrations.
pub struct Registrations<'a, 'b> {
    ops: &'a mut EventOps<'b>,
    known: &'a mut HashMap<RawFd, (Token, Interest)>,
}

impl<'a, 'b> Registrations<'a, 'b> {
    /// `known` lives as long as the loop: event-manager does not tell what it has.
    pub fn new(ops: &'a mut EventOps<'b>, known: &'a mut HashMap<RawFd, (Token, Interest)>) -> Self {
        Self { ops, known }
    }
}

impl Watch for Registrations<'_, '_> {
    fn set(&mut self, fd: RawFd, token: Token, interest: Interest) {
        let before = self.known.insert(fd, (token, interest));
        if before == Some((token, interest)) {
            return;
        }
        let mut events = EventSet::empty();
        if interest.read {
            events |= EventSet::IN | EventSet::READ_HANG_UP;
        }
        if interest.write {
            events |= EventSet::OUT;
        }
        let events = Events::with_data_raw(fd, token.pack(), events);
        let done = if before.is_some() { self.ops.modify(events) } else { self.ops.add(events) };
        if let Err(error) = done {
            tracing::error!(%error, fd, ?token, "Cannot watch a descriptor");
            self.known.remove(&fd);
        }
    }

    fn remove(&mut self, fd: RawFd) {
        if self.known.remove(&fd).is_some()
            && let Err(error) = self.ops.remove(Events::empty_raw(fd))
        {
            tracing::error!(%error, fd, "Cannot stop watching a descriptor");
        }
    }
}

/// What epoll said, in our words.
pub fn ready(events: EventSet) -> Ready {
    let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR | EventSet::READ_HANG_UP);
    Ready {
        readable: events.contains(EventSet::IN) || hung_up,
        writable: events.contains(EventSet::OUT),
        hung_up,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_the_trip_through_event_manager() {
        let tokens = [
            Token::VmEvent,
            Token::Signal,
            Token::Timer,
            Token::MonitorListener,
            Token::MonitorClient(7),
            Token::AgentListener,
            Token::AgentClient(u16::MAX),
            Token::PortListener(3),
            Token::PortClient(31),
            Token::Stdin,
            Token::Stdout,
            Token::ConsoleQueue(64),
            Token::RngQueue,
            Token::Serial,
        ];
        for token in tokens {
            assert_eq!(Token::unpack(token.pack()), Some(token));
        }
        assert_eq!(Token::unpack(99 << 16), None);
        assert_eq!(Token::unpack(1), None, "a token without index has none");
    }
}
