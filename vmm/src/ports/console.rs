//! The host end of the guest's console: everybody sees what it prints, everybody may type.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::event_loop::{Interest, Token, Watch};
use crate::ports::{CHUNK, TerminalIo};
use crate::socket::{Connection, Listener, Received, SocketError};

/// Clients of console.sock at a time.
const CLIENTS_MAX: usize = 16;
/// Output held for a slow client before it loses some.
const OUTPUT_MAX: usize = 1 << 20;
/// What a client that connects is shown of the past.
const SCROLLBACK_MAX: usize = 64 << 10;
/// Typed bytes that wait for the guest.
const INPUT_MAX: usize = 64 << 10;

/// The host end of the console.
pub struct ConsoleHost {
    listener: Listener,
    /// By slot; the token's index is `first_token` + slot.
    clients: Vec<Option<Connection>>,
    terminal: Option<TerminalIo>,
    scrollback: VecDeque<u8>,
    input: VecDeque<u8>,
}

impl ConsoleHost {
    /// Index of the console's listener token, and of its first client's.
    pub const TOKEN: u16 = 0x1000;

    /// Listens on `path`.
    ///
    /// # Errors
    ///
    /// The socket cannot be made.
    pub fn bind(
        path: &Path,
        terminal: Option<TerminalIo>,
        watch: &mut dyn Watch,
    ) -> Result<Self, SocketError> {
        let listener = Listener::bind(path)?;
        watch.set(listener.as_raw_fd(), Token::PortListener(Self::TOKEN), Interest::READ);
        Ok(Self {
            listener,
            clients: (0..CLIENTS_MAX).map(|_| None).collect(),
            terminal,
            scrollback: VecDeque::new(),
            input: VecDeque::new(),
        })
    }

    /// The terminal of a foreground VM.
    pub fn terminal(&mut self) -> Option<&mut TerminalIo> {
        self.terminal.as_mut()
    }

    /// The guest printed something.
    pub fn output(&mut self, bytes: &[u8], watch: &mut dyn Watch) {
        self.scrollback.extend(bytes);
        let excess = self.scrollback.len().saturating_sub(SCROLLBACK_MAX);
        self.scrollback.drain(..excess);
        if let Some(terminal) = &mut self.terminal {
            terminal.print(bytes, watch);
        }
        for (slot, client) in self.clients.iter_mut().enumerate() {
            if let Some(client) = client {
                send(client, bytes);
                client.flush();
                watch_client(client, slot, watch);
            }
        }
        self.sweep(watch);
    }

    /// Clients connect. Each is shown the recent past first.
    pub fn accept(&mut self, watch: &mut dyn Watch) {
        while let Some(mut client) = self.listener.accept() {
            let Some(slot) = self.clients.iter().position(Option::is_none) else {
                tracing::warn!("More than {CLIENTS_MAX} console clients, turning one away");
                client.close(watch);
                continue;
            };
            let (old, new) = self.scrollback.as_slices();
            client.send([old, new].concat());
            client.flush();
            watch_client(&mut client, slot, watch);
            self.clients[slot] = Some(client);
        }
    }

    /// A client typed, read or left. `index` is that of its token.
    pub fn client_ready(&mut self, index: u16, watch: &mut dyn Watch) {
        let slot = usize::from(index - Self::TOKEN);
        let Some(client) = self.clients.get_mut(slot).and_then(Option::as_mut) else { return };
        client.flush();
        let mut buffer = [0; 4096];
        match client.receive_bytes(&mut buffer) {
            Received::Data(len) => self.typed(&buffer[..len]),
            Received::Nothing => {}
            Received::End | Received::Broken => {
                if let Some(client) = self.clients[slot].take() {
                    client.close(watch);
                }
            }
        }
        if let Some(client) = &mut self.clients[slot] {
            watch_client(client, slot, watch);
        }
        self.sweep(watch);
    }

    /// Bytes for the guest. What a guest without a reader does not take is bounded: the newest is dropped, as a
    /// full tty does.
    pub fn typed(&mut self, bytes: &[u8]) {
        let room = INPUT_MAX - self.input.len().min(INPUT_MAX);
        self.input.extend(&bytes[..bytes.len().min(room)]);
    }

    /// Bytes for the guest, as far as they lie together.
    pub fn input(&self) -> &[u8] {
        let (first, second) = self.input.as_slices();
        if first.is_empty() { second } else { first }
    }

    /// Room for typed bytes.
    pub fn input_room(&self) -> usize {
        INPUT_MAX.saturating_sub(self.input.len()).min(CHUNK)
    }

    /// The guest has taken `count` of them.
    pub fn consumed(&mut self, count: usize) {
        self.input.drain(..count.min(self.input.len()));
    }

    /// The end of what the guest has printed, for an error message.
    pub fn last_lines(&self, count: usize) -> String {
        let (old, new) = self.scrollback.as_slices();
        let text = String::from_utf8_lossy(&[old, new].concat()).replace('\r', "");
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        self.listener.path()
    }

    fn sweep(&mut self, watch: &mut dyn Watch) {
        for slot in &mut self.clients {
            if slot.as_ref().is_some_and(Connection::is_broken)
                && let Some(client) = slot.take()
            {
                client.close(watch);
            }
        }
    }
}

fn client_token(slot: usize) -> Token {
    Token::PortClient(ConsoleHost::TOKEN + u16::try_from(slot).unwrap_or(0))
}

fn watch_client(client: &mut Connection, slot: usize, watch: &mut dyn Watch) {
    let interest = Interest { read: true, write: client.queued() > 0 };
    client.watch(client_token(slot), interest, watch);
}

/// Queues `bytes`, or what a client that is far behind gets instead.
fn send(client: &mut Connection, bytes: &[u8]) {
    if client.queued() + bytes.len() > OUTPUT_MAX {
        client.drop_expendable();
        client.send_expendable(b"\r\n[tarn: console output lost, the reader is too slow]\r\n".to_vec());
    }
    client.send_expendable(bytes.to_vec());
}
