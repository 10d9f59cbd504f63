//! The control loop's ears: file descriptors with a [`Token`] each, on top of event-manager.
//!
//! One subscriber, the VM, owns every descriptor of the control loop; the token says what became ready. Parts of
//! the VM (monitor, guest channel, console) register through [`Watch`] and never see epoll.

use std::os::fd::RawFd;

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
