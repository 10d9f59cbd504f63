//! The way to the host.
//!
//! ```text
//!  virtio-serial   ┌────────┐ node appears, other user closes it  ┌──────┐
//!                  │ absent │ ──────────────────────────────────▶ │ open │ ─┐ hang-up: forget half
//!                  └────────┘ ◀────────────────────────────────── └──────┘ ◀┘ a request, drop output
//!                                unplugged: Lost
//!
//!  unix-listen     ┌───────────┐   accept    ┌───────────┐
//!                  │ listening │ ──────────▶ │ connected │   others wait in the backlog
//!                  └───────────┘ ◀────────── └───────────┘
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

use std::io;
use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

use protocol::Item;

use self::connection::{Connection, Next};
use self::listener::Listener;
use self::port::Port;
use crate::options::Method;
use crate::poller::{Poller, Ready, Token};

/// The channel: at most one peer at a time, whoever it is.
#[derive(Debug)]
pub(crate) struct Channel {
    source: Source,
    connection: Option<Connection>,
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
    /// The device is gone; the channel waits for another one.
    Lost(io::Error),
    /// Nothing until the next event.
    Nothing,
}

impl Channel {
    /// Opens the port, or waits for it; or listens.
    ///
    /// # Errors
    ///
    /// Only for what waiting will not mend: a socket that cannot be bound, no descriptors left.
    pub(crate) fn open(method: Method, path: &Path, poller: Rc<Poller>) -> io::Result<Self> {
        let source = match method {
            Method::VirtioSerial => Source::Port(Port::new(path)),
            Method::UnixListen => Source::Listener(Listener::bind(path, &poller)?),
        };
        let mut channel = Self { source, connection: None, poller };
        channel.connect();
        Ok(channel)
    }

    /// An event of [`Token::Channel`] or [`Token::Waiting`].
    pub(crate) fn on_event(&mut self, token: Token, ready: Ready) {
        match (token, &mut self.connection) {
            (Token::Channel, Some(connection)) => connection.on_ready(ready),
            _ => self.connect(),
        }
    }

    /// When to try again to open the port, if nothing else would say so.
    pub(crate) fn retry_at(&self) -> Option<Instant> {
        match &self.source {
            Source::Port(port) if self.connection.is_none() => port.retry_at(),
            _ => None,
        }
    }

    /// Tries to get a connection, if there is none.
    pub(crate) fn connect(&mut self) {
        if self.connection.is_some() {
            return;
        }
        let connection = match &mut self.source {
            Source::Port(port) => port.try_open(&self.poller),
            Source::Listener(listener) => listener.try_accept(),
        };
        let Some(connection) = connection else { return };
        match self.poller.add_edges(&connection, Token::Channel) {
            Ok(()) => self.connection = Some(connection),
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

    /// The next message. Call it until it returns [`Received::Nothing`]: only then does the next
    /// event come.
    pub(crate) fn receive(&mut self) -> Received {
        loop {
            let Some(connection) = &mut self.connection else { return Received::Nothing };
            match connection.next() {
                Next::Item(item) => return Received::Item(item),
                Next::Blocked => return Received::Nothing,
                Next::HungUp => match self.source {
                    Source::Port(_) => connection.reset(),
                    Source::Listener(_) => {
                        self.connection = None;
                        self.connect();
                    }
                },
                Next::Broken(error) => {
                    self.connection = None;
                    match &mut self.source {
                        Source::Port(port) => {
                            port.lost(&self.poller);
                            return Received::Lost(error);
                        }
                        Source::Listener(_) => {
                            crate::log::debug(format_args!("The client is gone: {error}"));
                            self.connect();
                        }
                    }
                }
            }
        }
    }

    /// Queues a reply for the peer.
    pub(crate) fn send(&mut self, reply: &[u8]) {
        if let Some(connection) = &mut self.connection {
            connection.send(reply);
        }
    }

    /// Sends what the peer takes without waiting; for the last words before the agent ends.
    pub(crate) fn flush(&mut self) {
        if let Some(connection) = &mut self.connection {
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
        let mut channel = Channel::open(Method::VirtioSerial, file.path(), Rc::clone(&poller)).unwrap();
        for _ in 0..3 {
            assert_eq!(poller.wait(Some(std::time::Duration::ZERO)).unwrap(), []);
            assert!(channel.retry_at().is_some_and(|at| at > Instant::now()));
            assert!(matches!(channel.receive(), Received::Nothing));
            channel.connect();
        }
    }
}
