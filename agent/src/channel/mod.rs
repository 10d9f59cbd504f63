//! The way to the host.
//!
//! ```text
//!  virtio-serial   ┌────────┐ node appears, other user closes it  ┌──────┐
//!                  │ absent │ ──────────────────────────────────▶ │ open │ ─┐ hang-up: forget half
//!                  └────────┘ ◀────────────────────────────────── └──────┘ ◀┘ a request, drop output
//!                                unplugged: Lost
//!
//!  isa-serial      the same, but a line does not tell who is there: a hang-up loses it
//!
//!  unix-listen     ┌───────────┐   accept    ┌───────────┐
//!  vsock-listen    │ free seat │ ──────────▶ │ connected │   up to 8; others wait in the backlog
//!  inherited       └───────────┘ ◀────────── └───────────┘
//!                                 hang-up
//! ```
//!
//! A port stays open while no host end is: closing it would tell the host that no agent is there. It
//! hangs up instead, level-triggered and for as long as the host end is closed, so the port is watched
//! for edges only; the driver wakes its pollers when the host end opens (Linux
//! `drivers/char/virtio_console.c`, `handle_control_message`, `VIRTIO_CONSOLE_PORT_OPEN`).

mod connection;
mod listener;
mod port;
mod vsock;

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use protocol::Item;

use self::connection::{Connection, Kind, Next};
use self::listener::Listener;
use self::port::Port;
use crate::options::Address;
use crate::poller::{Poller, Ready, Token};

/// Clients of a socket that are served at the same time; others wait in the backlog.
const CLIENTS: usize = 8;

/// Where a peer sits. The next peer may sit there as soon as this one has left.
pub(crate) type Seat = u8;

/// The channel: a port has one peer at a time, a socket a few.
#[derive(Debug)]
pub(crate) struct Channel {
    source: Source,
    seats: Vec<Option<Connection>>,
    poller: Rc<Poller>,
}

#[derive(Debug)]
enum Source {
    Port(Port),
    Listener(Listener),
}

/// What [`Channel::receive`] found.
#[derive(Debug)]
pub(crate) enum Received {
    Item(Item),
    /// The peer left; the next one starts anew.
    Left,
    /// The device is gone; the channel waits for another one.
    Lost(io::Error),
    /// Nothing until the next event.
    Nothing,
}

impl Channel {
    /// Opens the port, or waits for it; or listens. A socket that was inherited and listens counts more than
    /// the address.
    ///
    /// # Errors
    ///
    /// Only for what waiting will not mend: a socket that cannot be bound, no descriptors left.
    pub(crate) fn open(
        address: &Address,
        inherited: Option<OwnedFd>,
        poller: Rc<Poller>,
    ) -> io::Result<Self> {
        let source = match (inherited, address) {
            (Some(socket), _) => Source::Listener(Listener::inherited(socket)),
            (None, Address::VirtioSerial(path)) => Source::Port(Port::new(path, Kind::Port)),
            (None, Address::IsaSerial(path)) => Source::Port(Port::new(path, Kind::Line)),
            (None, Address::UnixListen(path)) => Source::Listener(Listener::unix(path)?),
            (None, &Address::VsockListen { cid, port }) => Source::Listener(Listener::vsock(cid, port)?),
        };
        let seats = match &source {
            Source::Port(_) => 1,
            Source::Listener(listener) => {
                listener.register(&poller)?;
                CLIENTS
            }
        };
        let mut channel = Self { source, seats: (0..seats).map(|_| None).collect(), poller };
        channel.connect();
        Ok(channel)
    }

    /// The seats there are, taken or not.
    pub(crate) fn seats(&self) -> std::ops::Range<Seat> {
        0..Seat::try_from(self.seats.len()).unwrap_or(Seat::MAX)
    }

    /// An event of [`Token::Peer`].
    pub(crate) fn on_event(&mut self, seat: Seat, ready: Ready) {
        if let Some(Some(connection)) = self.seats.get_mut(usize::from(seat)) {
            connection.on_ready(ready);
        }
    }

    /// When to try again to open the port, if nothing else would say so.
    pub(crate) fn retry_at(&self) -> Option<Instant> {
        match &self.source {
            Source::Port(port) if self.seats.iter().all(Option::is_none) => port.retry_at(),
            _ => None,
        }
    }

    /// Fills the free seats, as far as somebody waits for one.
    pub(crate) fn connect(&mut self) {
        for seat in self.seats() {
            if self.seats[usize::from(seat)].is_some() {
                continue;
            }
            let connection = match &mut self.source {
                Source::Port(port) => port.try_open(&self.poller),
                Source::Listener(listener) => listener.try_accept(),
            };
            let Some(connection) = connection else { return };
            match self.poller.add_edges(&connection, Token::Peer(seat)) {
                Ok(()) => self.seats[usize::from(seat)] = Some(connection),
                Err(error) => {
                    crate::log::error(format_args!("Cannot wait for the channel: {error}"));
                    // Before the watch, which would take it for another process leaving the port.
                    drop(connection);
                    if let Source::Port(port) = &mut self.source {
                        port.lost(&self.poller);
                    }
                }
            }
        }
    }

    /// The next message of a peer, which may still be `owed` a reply. Call it until it returns [`Received::Nothing`]: only then does the next
    /// event come.
    pub(crate) fn receive(&mut self, seat: Seat, owed: bool) -> Received {
        let Some(Some(connection)) = self.seats.get_mut(usize::from(seat)) else { return Received::Nothing };
        match (connection.next(owed), &mut self.source) {
            (Next::Item(item), _) => Received::Item(item),
            (Next::Blocked, _) => Received::Nothing,
            (Next::HungUp, Source::Port(_)) => {
                connection.vacate();
                Received::Left
            }
            (Next::Broken(error), Source::Port(port)) => {
                self.seats[usize::from(seat)] = None;
                port.lost(&self.poller);
                Received::Lost(error)
            }
            (ended @ (Next::HungUp | Next::Broken(_)), Source::Listener(_)) => {
                if let Next::Broken(error) = ended {
                    crate::log::debug(format_args!("The client is gone: {error}"));
                }
                self.seats[usize::from(seat)] = None;
                self.connect();
                Received::Left
            }
        }
    }

    /// Whether nobody is there to read what is sent: the peer has left, or there is none.
    pub(crate) fn is_deaf(&self, seat: Seat) -> bool {
        let connection = self.seats.get(usize::from(seat)).and_then(Option::as_ref);
        connection.is_none_or(Connection::is_deaf)
    }

    /// Whether somebody else has come in the place of this seat's peer, since the last call.
    pub(crate) fn take_left(&mut self, seat: Seat) -> bool {
        let connection = self.seats.get_mut(usize::from(seat)).and_then(Option::as_mut);
        connection.is_some_and(Connection::take_left)
    }

    /// Whether everything sent has gone to the peer, as far as that can be told.
    pub(crate) fn is_heard(&self, seat: Seat) -> bool {
        let connection = self.seats.get(usize::from(seat)).and_then(Option::as_ref);
        connection.is_some_and(Connection::is_heard)
    }

    /// Queues a reply for the peer.
    pub(crate) fn send(&mut self, seat: Seat, reply: &[u8]) {
        if let Some(Some(connection)) = self.seats.get_mut(usize::from(seat)) {
            connection.send(reply);
        }
    }

    /// Sends what the peers take without waiting; for the last words before the agent ends.
    pub(crate) fn flush(&mut self) {
        for connection in self.seats.iter_mut().flatten() {
            let _ = connection.flush();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_fails_for_ever_is_tried_again_after_a_pause() {
        // A plain file opens and cannot be waited for.
        let file = tempfile::NamedTempFile::new().unwrap();
        let poller = Rc::new(Poller::new().unwrap());
        let address = Address::VirtioSerial(file.path().to_owned());
        let mut channel = Channel::open(&address, None, Rc::clone(&poller)).unwrap();
        for _ in 0..3 {
            assert_eq!(poller.wait(Some(std::time::Duration::ZERO)).unwrap(), []);
            assert!(channel.retry_at().is_some_and(|at| at > Instant::now()));
            assert!(matches!(channel.receive(0, false), Received::Nothing));
            channel.connect();
        }
    }
}
