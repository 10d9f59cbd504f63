//! What is said on the control queues, as state: no queue is touched here.
//!
//! ```text
//!   guest                         host
//!     ── DEVICE_READY ──────────▶
//!     ◀────────────── PORT_ADD ──    for each port plugged in
//!     ── PORT_READY ────────────▶
//!     ◀─ CONSOLE_PORT, PORT_NAME,
//!        RESIZE, PORT_OPEN ──────
//!     ── PORT_OPEN 1 / 0 ───────▶    a program opens / closes /dev/vportNpM
//!     ◀────────── PORT_OPEN 0/1 ─    the host end closes (the program sees a hang-up) / opens
//!     ◀─────────── PORT_REMOVE ──    the port is unplugged
//! ```
//!
//! A driver that wakes from S3 or comes back from hibernation knows the ports it had: it begins with PORT_READY for
//! each, and PORT_OPEN where a program has one open (Linux `virtcons_restore()`).
//!
//! What remains to be said follows from a few flags per port instead of a queue of messages, so a guest that
//! gives no buffers, or asks the same thing for ever, cannot make it grow.

use super::PortSpec;

/// Wire size of `struct virtio_console_control` (virtio 1.2, section 5.3.6.2).
pub(super) const HEADER: usize = 8;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_REMOVE: u16 = 2;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Size {
    /// Characters in a line.
    pub cols: u16,
    /// Lines.
    pub rows: u16,
}

/// What the guest says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FromGuest {
    /// The driver has its queues; `false` when it failed.
    DeviceReady(bool),
    /// The driver has taken the port in; `false` when it failed.
    PortReady(u32, bool),
    /// A program has opened or closed the port.
    PortOpen(u32, bool),
    /// Nothing that a guest should say.
    Unknown(u16),
}

impl FromGuest {
    pub(super) fn parse([a, b, c, d, e, f, g, h]: [u8; HEADER]) -> Self {
        let port = u32::from_le_bytes([a, b, c, d]);
        let value = u16::from_le_bytes([g, h]) != 0;
        match u16::from_le_bytes([e, f]) {
            DEVICE_READY => Self::DeviceReady(value),
            PORT_READY => Self::PortReady(port, value),
            PORT_OPEN => Self::PortOpen(port, value),
            event => Self::Unknown(event),
        }
    }
}

/// What the host has to say about a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ToGuest {
    Add,
    Remove,
    Console,
    Name,
    Resize,
    Open(bool),
}

impl ToGuest {
    /// The message on the wire. A `Size` of 0×0 stands for "unknown" and is not sent by [`Control::pending`].
    pub(super) fn encode(self, port: u32, spec: &PortSpec, size: Size) -> Vec<u8> {
        let (event, value) = match self {
            Self::Add => (PORT_ADD, 1),
            Self::Remove => (PORT_REMOVE, 1),
            Self::Console => (CONSOLE_PORT, 1),
            Self::Name => (PORT_NAME, 1),
            Self::Resize => (RESIZE, 1),
            Self::Open(open) => (PORT_OPEN, u16::from(open)),
        };
        let mut message = port.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        match self {
            Self::Name => message.extend(spec.name.as_deref().unwrap_or_default().as_bytes()),
            // In the specification's order. Linux read rows first until its commit 5326ab737a47 of 2025, which stable
            // kernels have too; a guest older than that takes one for the other, and nothing tells which it is.
            Self::Resize => [size.cols, size.rows].iter().for_each(|n| message.extend(n.to_le_bytes())),
            Self::Add | Self::Remove | Self::Console | Self::Open(_) => {}
        }
        message
    }
}

/// Open or closed, and how much of that the other side has been told. It hears of every closing, even when the
/// port is open again before it listens; what it never knew of, it is spared.
#[derive(Debug, Default)]
pub(super) struct OpenState {
    now: bool,
    told: bool,
    /// Closed since it was last told anything.
    closed: bool,
}

impl OpenState {
    pub(super) fn is_open(&self) -> bool {
        self.now
    }

    pub(super) fn set(&mut self, open: bool) {
        self.now = open;
        self.closed |= !open;
    }

    /// What is to be told next.
    pub(super) fn pending(&self) -> Option<bool> {
        match (self.told, self.now && !self.closed) {
            (true, false) => Some(false),
            (false, _) if self.now => Some(true),
            _ => None,
        }
    }

    pub(super) fn tell(&mut self, open: bool) {
        self.told = open;
        self.closed = false;
    }

    /// The other side has lost its memory, or never knew.
    pub(super) fn forget(&mut self) {
        self.tell(false);
    }
}

/// The control state of one port.
#[derive(Debug)]
pub(super) struct Control {
    // Kept over a reset.
    plugged: bool,
    /// The host end, which the guest is told of.
    pub(super) host: OpenState,
    /// The guest end, which the VMM is told of.
    pub(super) guest: OpenState,

    // Since the last reset.
    added: bool,
    ready: bool,
    console_due: bool,
    name_due: bool,
    resize_due: bool,
}

impl Control {
    pub(super) fn new() -> Self {
        Self {
            plugged: true,
            host: OpenState::default(),
            guest: OpenState::default(),
            added: false,
            ready: false,
            console_due: false,
            name_due: false,
            resize_due: false,
        }
    }

    /// The guest has forgotten the port.
    pub(super) fn reset(&mut self) {
        let Self { plugged: _, host, guest, added, ready, console_due, name_due, resize_due } = self;
        host.forget();
        guest.set(false);
        (*added, *ready) = (false, false);
        (*console_due, *name_due, *resize_due) = (false, false, false);
    }

    pub(super) fn set_plugged(&mut self, plugged: bool) {
        self.plugged = plugged;
        if !plugged {
            self.guest.set(false);
        }
    }

    /// DEVICE_READY: the guest wants to hear of the port, whatever it knew.
    pub(super) fn device_ready(&mut self) {
        self.added = false;
    }

    /// PORT_READY: the guest knows the port. One that wakes up may say so twice, and is answered twice.
    pub(super) fn port_ready(&mut self, spec: &PortSpec, ok: bool) {
        self.added = true;
        self.ready = ok && self.plugged;
        self.console_due = spec.console;
        self.name_due = spec.name.is_some();
        self.resize_due = spec.console;
        self.host.forget();
        if !self.ready {
            self.guest.set(false);
        }
    }

    /// PORT_OPEN from the guest.
    pub(super) fn port_open(&mut self, open: bool) {
        self.guest.set(open && self.plugged);
    }

    pub(super) fn resized(&mut self, spec: &PortSpec) {
        self.resize_due = spec.console;
    }

    /// What is to be said next about the port, once the guest has said DEVICE_READY. `size` says whether a
    /// size can be sent.
    pub(super) fn pending(&self, size: bool) -> Option<ToGuest> {
        match self {
            Self { plugged: false, added: true, .. } => Some(ToGuest::Remove),
            Self { plugged: true, added: false, .. } => Some(ToGuest::Add),
            Self { ready: false, .. } | Self { plugged: false, .. } => None,
            Self { console_due: true, .. } => Some(ToGuest::Console),
            Self { name_due: true, .. } => Some(ToGuest::Name),
            Self { resize_due: true, .. } if size => Some(ToGuest::Resize),
            Self { host, .. } => host.pending().map(ToGuest::Open),
        }
    }

    pub(super) fn sent(&mut self, message: ToGuest) {
        match message {
            ToGuest::Add => self.added = true,
            ToGuest::Remove => {
                (self.added, self.ready) = (false, false);
                self.host.forget();
            }
            ToGuest::Console => self.console_due = false,
            ToGuest::Name => self.name_due = false,
            ToGuest::Resize => self.resize_due = false,
            ToGuest::Open(open) => self.host.tell(open),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(state: &mut OpenState) -> Vec<bool> {
        let mut all = Vec::new();
        while let Some(open) = state.pending() {
            state.tell(open);
            all.push(open);
        }
        all
    }

    #[test]
    fn every_closing_is_told_but_not_what_came_and_went_unseen() {
        let mut state = OpenState::default();
        state.set(true);
        state.set(false);
        assert_eq!(told(&mut state), []);
        state.set(true);
        assert_eq!(told(&mut state), [true]);
        for _ in 0..3 {
            state.set(false);
            state.set(true);
        }
        assert_eq!(told(&mut state), [false, true]);
        state.set(false);
        state.set(true);
        state.set(false);
        assert_eq!(told(&mut state), [false]);
        state.set(false);
        assert_eq!(told(&mut state), []);
    }

    #[test]
    fn the_messages_are_laid_out_as_on_the_wire() {
        let spec = PortSpec { name: Some("a.b".into()), console: true };
        let size = Size { cols: 0x0102, rows: 0x0304 };
        let encode = |message: ToGuest| message.encode(5, &spec, size);
        assert_eq!(encode(ToGuest::Add), [5, 0, 0, 0, 1, 0, 1, 0]);
        assert_eq!(encode(ToGuest::Remove), [5, 0, 0, 0, 2, 0, 1, 0]);
        assert_eq!(encode(ToGuest::Console), [5, 0, 0, 0, 4, 0, 1, 0]);
        assert_eq!(encode(ToGuest::Resize), [5, 0, 0, 0, 5, 0, 1, 0, 2, 1, 4, 3]);
        assert_eq!(encode(ToGuest::Open(false)), [5, 0, 0, 0, 6, 0, 0, 0]);
        assert_eq!(encode(ToGuest::Open(true)), [5, 0, 0, 0, 6, 0, 1, 0]);
        assert_eq!(encode(ToGuest::Name), b"\x05\0\0\0\x07\0\x01\0a.b");
        assert_eq!(FromGuest::parse([0xff, 0xff, 0xff, 0xff, 0, 0, 1, 0]), FromGuest::DeviceReady(true));
        assert_eq!(FromGuest::parse([2, 1, 0, 0, 3, 0, 0, 0]), FromGuest::PortReady(0x102, false));
        assert_eq!(FromGuest::parse([2, 0, 0, 0, 6, 0, 0, 1]), FromGuest::PortOpen(2, true));
        assert_eq!(FromGuest::parse([2, 0, 0, 0, 1, 0, 1, 0]), FromGuest::Unknown(1));
    }

    #[test]
    fn a_port_is_introduced_in_order_and_said_only_once() {
        let spec = PortSpec { name: Some("x".into()), console: true };
        let mut control = Control::new();
        control.host.set(true);
        let mut said = Vec::new();
        while let Some(message) = control.pending(true) {
            said.push(message);
            control.sent(message);
        }
        assert_eq!(said, [ToGuest::Add]);
        control.port_ready(&spec, true);
        control.port_ready(&spec, true);
        said.clear();
        while let Some(message) = control.pending(true) {
            said.push(message);
            control.sent(message);
        }
        assert_eq!(said, [ToGuest::Console, ToGuest::Name, ToGuest::Resize, ToGuest::Open(true)]);
        control.set_plugged(false);
        assert_eq!(control.pending(true), Some(ToGuest::Remove));
        control.sent(ToGuest::Remove);
        assert_eq!(control.pending(true), None);
    }
}
