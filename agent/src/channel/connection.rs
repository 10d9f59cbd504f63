//! One peer: what it said, and what it has still to be told.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use protocol::{Decoder, Item, Limits};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::poller::Ready;

/// Output beyond this stops the next request from being looked at, so that a host that asks and does
/// not read cannot fill the guest's memory. One reply may still be larger.
const OUTPUT_HIGH: usize = 256 << 10;
/// Bytes read at a time.
const CHUNK: usize = 32 << 10;
/// How long after its first bytes a peer may be unknown to the driver of the port.
const OPENING: Duration = Duration::from_millis(50);
/// An emptied output buffer larger than this is given back.
const KEEP_CAPACITY: usize = 64 << 10;

/// What hangs up means for the peer's descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A port: the same descriptor serves the next peer.
    Port,
    /// A serial line: nobody can tell who is at the other end, and what hangs up does so for good.
    Line,
    /// A socket: the client may have shut down its writing half and still wait for replies.
    Socket,
}

/// What [`Connection::next`] found.
#[derive(Debug)]
pub(super) enum Next {
    Item(Item),
    /// Nothing until the next edge.
    Blocked,
    /// The peer left. What it sent completely has been delivered.
    HungUp,
    /// The descriptor is of no use any more.
    Broken(io::Error),
}

/// A non-blocking descriptor with a decoder in front and an output queue behind.
#[derive(Debug)]
pub(super) struct Connection {
    // Fixed configuration.
    file: File,
    kind: Kind,
    // Volatile state.
    /// A read may bring something.
    readable: bool,
    /// A write may take something.
    writable: bool,
    /// Nobody reads: output is dropped.
    deaf: bool,
    /// The end of the input was met.
    ended: bool,
    /// The peer left and another one came.
    left: bool,
    /// The peer of a port has left, and its input was read to the end: what comes is the next one's. The driver learns
    /// of bytes and of openings on two queues, and may say for a while that nobody is there who sent them.
    vacant: bool,
    decoder: Decoder,
    output: Vec<u8>,
    sent: usize,
}

impl Connection {
    /// `fd` must be non-blocking.
    pub(super) fn new(fd: OwnedFd, kind: Kind) -> Self {
        Self {
            file: fd.into(),
            kind,
            readable: true,
            writable: true,
            deaf: false,
            ended: false,
            left: false,
            vacant: false,
            decoder: Decoder::new(Limits::AGENT),
            output: Vec::new(),
            sent: 0,
        }
    }

    /// An edge. A host end that closed and opened again since the last look was a hang-up all the
    /// same: half a request of the former peer must not swallow the first one of the new peer.
    pub(super) fn on_ready(&mut self, ready: Ready) {
        self.readable |= ready.readable || ready.hung_up;
        self.writable |= ready.writable;
        if self.vacant {
            self.vacant = ready.hung_up;
            return;
        }
        let has_left = ready.hung_up || self.deaf;
        if has_left && self.kind == Kind::Port && !self.is_hung_up() {
            self.reset();
            (self.readable, self.left) = (true, true);
            return;
        }
        if self.kind == Kind::Line {
            self.ended |= ready.hung_up;
            return;
        }
        self.deaf = ready.hung_up;
    }

    /// The next message, after sending what can be sent. A peer that sends no more has not left while it is `owed` a
    /// reply.
    pub(super) fn next(&mut self, owed: bool) -> Next {
        loop {
            if self.deaf {
                self.drop_output();
            } else if let Err(error) = self.flush() {
                match self.kind {
                    Kind::Port | Kind::Line => return Next::Broken(error),
                    // Requests of a client that is gone are still carried out.
                    Kind::Socket => self.deaf = true,
                }
                continue;
            }
            if self.pending() >= OUTPUT_HIGH {
                return Next::Blocked;
            }
            if let Some(item) = self.decoder.next_item() {
                return Next::Item(item);
            }
            if self.ended && self.kind == Kind::Line {
                return Next::Broken(ErrorKind::UnexpectedEof.into());
            }
            if self.ended {
                let waits = self.pending() > 0 || (owed && !self.deaf);
                return if waits { Next::Blocked } else { Next::HungUp };
            }
            if !self.readable {
                return Next::Blocked;
            }
            if let Err(error) = self.read() {
                return Next::Broken(error);
            }
        }
    }

    /// Whether another peer has taken the place of the one there was, since the last call.
    pub(super) fn take_left(&mut self) -> bool {
        std::mem::take(&mut self.left)
    }

    /// Whether everything sent has gone to the peer, as far as that can be told.
    pub(super) fn is_heard(&self) -> bool {
        self.pending() == 0
    }

    /// Whether the peer has left and reads no more, as far as is known.
    pub(super) fn is_deaf(&self) -> bool {
        self.deaf
    }

    /// Appends to the output queue.
    pub(super) fn send(&mut self, bytes: &[u8]) {
        self.output.extend_from_slice(bytes);
    }

    /// Writes until the queue is empty or the peer takes no more.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while self.writable && self.pending() > 0 {
            match self.file.write(&self.output[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.pending() == 0 {
            self.drop_output();
        }
        Ok(())
    }

    /// Ready for another peer on the same descriptor.
    pub(super) fn reset(&mut self) {
        let Self {
            file: _,
            kind: _,
            left: _,
            readable,
            writable,
            deaf,
            ended,
            vacant,
            decoder,
            output: _,
            sent: _,
        } = self;
        *readable = false;
        // A full queue of the device is emptied when the host end closes.
        *writable = true;
        *deaf = false;
        *ended = false;
        *vacant = false;
        decoder.reset();
        self.drop_output();
    }

    /// The same, after the former peer was listened to the end.
    pub(super) fn vacate(&mut self) {
        self.reset();
        self.vacant = self.kind == Kind::Port;
    }

    fn read(&mut self) -> io::Result<()> {
        let mut chunk = [0; CHUNK];
        match self.file.read(&mut chunk) {
            Ok(0) => {
                self.readable = false;
                self.ended = true;
                // A port has no input left only while its host end is closed.
                self.deaf |= self.kind == Kind::Port;
                Ok(())
            }
            Ok(count) => {
                self.attribute_input();
                self.decoder.feed(&chunk[..count]);
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn pending(&self) -> usize {
        self.output.len() - self.sent
    }

    fn drop_output(&mut self) {
        self.output.clear();
        self.output.shrink_to(KEEP_CAPACITY);
        self.sent = 0;
    }

    /// Before input of a port whose peer has left is looked at: whose is it?
    fn attribute_input(&mut self) {
        if std::mem::take(&mut self.vacant) {
            self.deaf = !self.opens_soon();
        } else if self.deaf && self.kind == Kind::Port && !self.is_hung_up() {
            // The next peer came while the former one's last words were read. If these are not its own, it gets an answer
            // too much, which every client can tell from its own; otherwise it would wait for ever.
            self.deaf = false;
            self.decoder.reset();
        }
    }

    /// Whether somebody is, or soon will be, known to be at the other end. Nobody if the peer has left already: then
    /// nobody must get the answer to what it sent.
    fn opens_soon(&self) -> bool {
        let pause = Duration::from_millis(1);
        let mut waited = Duration::ZERO;
        while self.is_hung_up() {
            if waited >= OPENING {
                return false;
            }
            std::thread::sleep(pause);
            waited += pause;
        }
        true
    }

    /// Whether the other end is closed right now.
    fn is_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.file, PollFlags::empty())];
        let now = Timespec::default();
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::HUP)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use serde_json::json;

    use super::*;

    fn pair(kind: Kind) -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        (Connection::new(ours.into(), kind), theirs)
    }

    fn edge() -> Ready {
        Ready { readable: true, writable: true, hung_up: false }
    }

    #[test]
    fn a_client_that_shut_down_its_writing_half_still_gets_its_replies() {
        let (mut connection, mut client) = pair(Kind::Socket);
        client.write_all(b"{}").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(matches!(connection.next(false), Next::Item(Item::Value(_))));
        connection.send(b"reply\n");
        assert!(matches!(connection.next(false), Next::HungUp));
        let mut reply = [0; 16];
        assert_eq!(client.read(&mut reply).unwrap(), 6);
    }

    #[test]
    fn a_client_that_sends_no_more_has_not_left_before_it_was_answered() {
        let (mut connection, mut client) = pair(Kind::Socket);
        client.write_all(b"{}").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(matches!(connection.next(true), Next::Item(Item::Value(_))));
        assert!(matches!(connection.next(true), Next::Blocked));
        connection.send(b"reply\n");
        assert!(matches!(connection.next(false), Next::HungUp));
    }

    #[test]
    fn requests_of_a_client_that_left_are_delivered_and_their_replies_dropped() {
        let (mut connection, mut client) = pair(Kind::Socket);
        client.write_all(b"{}{}").unwrap();
        drop(client);
        connection.on_ready(Ready { hung_up: true, ..edge() });
        for _ in 0..2 {
            assert!(matches!(connection.next(false), Next::Item(Item::Value(_))));
            connection.send(b"reply\n");
        }
        assert!(matches!(connection.next(false), Next::HungUp));
    }

    #[test]
    fn a_peer_that_does_not_read_is_not_listened_to() {
        let (mut connection, mut client) = pair(Kind::Port);
        let reply = vec![b'x'; OUTPUT_HIGH];
        let mut answered = 0;
        for _ in 0..100 {
            let _ = client.write(b"{}");
            connection.on_ready(Ready { writable: false, ..edge() });
            while let Next::Item(_) = connection.next(false) {
                answered += 1;
                connection.send(&reply);
            }
        }
        assert!(answered < 10, "{answered} requests answered");
        assert!(connection.output.len() <= 2 * OUTPUT_HIGH);
        let mut drained = vec![0; 1 << 20];
        while answered < 100 {
            while client.read(&mut drained).is_ok_and(|count| count > 0) {}
            connection.on_ready(edge());
            while let Next::Item(_) = connection.next(false) {
                answered += 1;
                connection.send(&reply);
            }
        }
    }

    #[test]
    fn a_line_that_hangs_up_is_lost_after_what_it_still_brought() {
        let (mut connection, mut client) = pair(Kind::Line);
        client.write_all(b"{}").unwrap();
        drop(client);
        connection.on_ready(Ready { hung_up: true, ..edge() });
        assert!(matches!(connection.next(false), Next::Broken(_)));
        let (mut connection, mut client) = pair(Kind::Line);
        client.write_all(b"{}").unwrap();
        drop(client);
        assert!(matches!(connection.next(false), Next::Item(Item::Value(_))));
        assert!(matches!(connection.next(false), Next::Broken(_)));
    }

    #[test]
    fn half_a_request_and_unsent_output_end_with_the_peer() {
        let (mut connection, mut client) = pair(Kind::Port);
        client.write_all(b"{'execute'").unwrap();
        assert!(matches!(connection.next(false), Next::Blocked));
        connection.send(b"stale");
        client.shutdown(std::net::Shutdown::Both).unwrap();
        connection.on_ready(Ready { hung_up: true, ..edge() });
        assert!(matches!(connection.next(false), Next::HungUp));
        connection.reset();
        assert_eq!(connection.pending(), 0);
        connection.decoder.feed(b"{'fresh':1}");
        assert!(
            matches!(connection.next(false), Next::Item(Item::Value(value)) if value == json!({"fresh": 1}))
        );
    }
}
