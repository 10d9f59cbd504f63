//! A named virtio-serial port with a unix socket at its host end: one client, every byte.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Instant;

use crate::event_loop::{Interest, Token, Watch};
use crate::ports::CHUNK;
use crate::socket::{Connection, Listener, Received, SocketError};

/// Output held for a client before the guest has to wait.
const OUTPUT_MAX: usize = 256 << 10;

/// What became of the host end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// A client is there: open the port.
    Opened,
    /// It is gone: close the port, forget what it had not taken.
    Closed,
}

/// The host end of a channel.
pub struct ChannelHost {
    listener: Listener,
    client: Option<Connection>,
    token: u16,
    /// Bytes of the client that the guest has not taken.
    input: Vec<u8>,
    /// The client has shut down its sending side; it may still read.
    ended: bool,
    /// The client is gone altogether, and the guest has not taken all it sent.
    gone: bool,
}

impl ChannelHost {
    /// Listens on `path`. `token` is the index of its tokens.
    ///
    /// # Errors
    ///
    /// The socket cannot be made.
    pub fn bind(path: &Path, token: u16, watch: &mut dyn Watch) -> Result<Self, SocketError> {
        // The path is the user's: no lock of ours says whose it is.
        let listener = Listener::bind_unowned(path)?;
        watch.set(listener.as_raw_fd(), Token::PortListener(token), Interest::READ);
        Ok(Self { listener, client: None, token, input: Vec::new(), ended: false, gone: false })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        self.listener.path()
    }

    /// Whether a client is there.
    pub fn is_open(&self) -> bool {
        self.client.is_some()
    }

    /// Someone connects. One client at a time: others wait in the kernel's queue until it leaves.
    pub fn accept(&mut self, watch: &mut dyn Watch) -> Option<Change> {
        if self.client.is_some() {
            return None;
        }
        self.client = Some(self.listener.accept()?);
        (self.ended, self.gone) = (false, false);
        watch.set(self.listener.as_raw_fd(), Token::PortListener(self.token), Interest::NONE);
        self.settle(watch);
        Some(Change::Opened)
    }

    /// The client has sent something, taken something, or left.
    pub fn client_ready(&mut self, watch: &mut dyn Watch) -> Option<Change> {
        let client = self.client.as_mut()?;
        client.flush();
        let mut broken = client.is_broken();
        if self.input.is_empty() && !self.ended {
            let mut buffer = vec![0; CHUNK];
            match client.receive_bytes(&mut buffer) {
                Received::Data(len) => self.input.extend_from_slice(&buffer[..len]),
                Received::Nothing => {}
                Received::End => self.ended = true,
                Received::Broken => broken = true,
            }
        }
        // A client that only stopped sending stays until it has hung up, so that it gets its answers.
        let left = client.is_hung_up();
        if broken || (left && self.ended && self.input.is_empty()) {
            return self.close(watch);
        }
        if left {
            // What it sent first still goes to the guest; the descriptor would only tell of its end, again and again.
            self.gone = true;
            client.stop_watching(watch);
            return None;
        }
        self.settle(watch);
        None
    }

    /// Bytes for the guest.
    pub fn input(&self) -> &[u8] {
        &self.input
    }

    /// The guest has taken `count` of them.
    pub fn consumed(&mut self, count: usize, watch: &mut dyn Watch) -> Option<Change> {
        self.input.drain(..count.min(self.input.len()));
        if self.gone {
            // The rest of what it had sent, if there is more; then it is over.
            return if self.input.is_empty() { self.client_ready(watch) } else { None };
        }
        self.settle(watch);
        None
    }

    /// Gives the client what it has not taken, as long as it takes it: the end of the VM.
    pub fn finish(&mut self, deadline: Instant) {
        if let Some(client) = &mut self.client {
            client.flush_until(deadline);
        }
    }

    /// Whether bytes of the guest are wanted: not while the client lags behind.
    pub fn wants_output(&self) -> bool {
        self.client.as_ref().is_some_and(|client| client.queued() < OUTPUT_MAX)
    }

    /// Bytes of the guest.
    pub fn output(&mut self, bytes: &[u8], watch: &mut dyn Watch) {
        if let Some(client) = &mut self.client {
            client.send(bytes.to_vec());
            client.flush();
        }
        self.settle(watch);
    }

    fn settle(&mut self, watch: &mut dyn Watch) {
        let read = self.input.is_empty() && !self.ended;
        if let Some(client) = &mut self.client {
            let interest = Interest { read, write: client.queued() > 0 };
            client.watch(Token::PortClient(self.token), interest, watch);
        }
    }

    fn close(&mut self, watch: &mut dyn Watch) -> Option<Change> {
        self.client.take()?.close(watch);
        self.input.clear();
        watch.set(self.listener.as_raw_fd(), Token::PortListener(self.token), Interest::READ);
        Some(Change::Closed)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::io::{Read, Write};
    use std::os::fd::RawFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Remembers what is watched, as epoll would.
    #[derive(Default)]
    struct Watched(HashMap<RawFd, (Token, Interest)>);

    impl Watch for Watched {
        fn set(&mut self, fd: RawFd, token: Token, interest: Interest) {
            self.0.insert(fd, (token, interest));
        }
        fn remove(&mut self, fd: RawFd) {
            assert!(self.0.remove(&fd).is_some(), "removed what was not watched");
        }
    }

    impl Watched {
        fn client(&self) -> Option<Interest> {
            self.0.values().find(|(token, _)| *token == Token::PortClient(3)).map(|(_, interest)| *interest)
        }
    }

    struct Lab {
        _dir: tempfile::TempDir,
        watch: Watched,
        host: ChannelHost,
    }

    fn lab() -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let mut watch = Watched::default();
        let host = ChannelHost::bind(&dir.path().join("s"), 3, &mut watch).unwrap();
        Lab { _dir: dir, watch, host }
    }

    fn connect(lab: &mut Lab) -> UnixStream {
        let client = UnixStream::connect(lab.host.path()).unwrap();
        assert_eq!(lab.host.accept(&mut lab.watch), Some(Change::Opened));
        client
    }

    #[test]
    fn a_client_that_leaves_at_once_still_has_its_bytes_delivered_and_is_not_watched_meanwhile() {
        let mut lab = lab();
        let mut client = connect(&mut lab);
        client.write_all(b"last words").unwrap();
        drop(client);
        assert_eq!(lab.host.client_ready(&mut lab.watch), None);
        assert_eq!(lab.host.client_ready(&mut lab.watch), None);
        assert_eq!(lab.host.input(), b"last words");
        assert_eq!(lab.watch.client(), None, "a hang-up would be told again and again");
        assert_eq!(lab.host.consumed(5, &mut lab.watch), None);
        assert_eq!(lab.host.consumed(5, &mut lab.watch), Some(Change::Closed));
        assert!(!lab.host.is_open());
        connect(&mut lab);
    }

    #[test]
    fn a_client_that_only_stops_sending_still_gets_its_answer() {
        let mut lab = lab();
        let mut client = connect(&mut lab);
        client.write_all(b"question").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(lab.host.client_ready(&mut lab.watch), None);
        assert_eq!(lab.host.consumed(8, &mut lab.watch), None);
        assert_eq!(lab.host.client_ready(&mut lab.watch), None);
        assert_eq!(lab.watch.client(), Some(Interest::NONE), "its end is known; only a hang-up is awaited");
        lab.host.output(b"answer", &mut lab.watch);
        let mut answer = [0; 6];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
        drop(client);
        assert_eq!(lab.host.client_ready(&mut lab.watch), Some(Change::Closed));
    }

    #[test]
    fn a_client_that_does_not_read_stops_the_guest_and_loses_nothing() {
        let mut lab = lab();
        let mut client = connect(&mut lab);
        let mut sent = Vec::new();
        while lab.host.wants_output() {
            let piece = vec![u8::try_from(sent.len() % 251).unwrap(); CHUNK];
            lab.host.output(&piece, &mut lab.watch);
            sent.extend(piece);
        }
        assert!(sent.len() < OUTPUT_MAX + (2 << 20), "bounded: {}", sent.len());
        assert_eq!(lab.watch.client().map(|interest| interest.write), Some(true));
        client.set_nonblocking(true).unwrap();
        let (mut received, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
        while received.len() < sent.len() {
            match client.read(&mut buffer) {
                Ok(len) => received.extend_from_slice(&buffer[..len]),
                Err(_) => assert_eq!(lab.host.client_ready(&mut lab.watch), None),
            }
        }
        assert!(received == sent);
        assert!(lab.host.wants_output());
    }

    #[test]
    fn one_client_at_a_time_and_the_next_waits_its_turn() {
        let mut lab = lab();
        let first = connect(&mut lab);
        let _second = UnixStream::connect(lab.host.path()).unwrap();
        assert_eq!(lab.host.accept(&mut lab.watch), None);
        drop(first);
        assert_eq!(lab.host.client_ready(&mut lab.watch), Some(Change::Closed));
        assert_eq!(lab.host.accept(&mut lab.watch), Some(Change::Opened));
    }
}
