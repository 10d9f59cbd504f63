//! A scripted server at the other end of a session.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use protocol::{Decoder, Item, Limits};
use serde_json::{Value, json};

const SYNC: &str = "guest-sync-delimited";

/// Serves one client by a script; a script that fails fails the test when the server is dropped.
pub(crate) struct Server {
    socket: PathBuf,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Server {
    pub(crate) fn start(script: impl FnOnce(&mut Client) + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            script(&mut Client { stream, decoder: Decoder::new(Limits::AGENT) });
        });
        Self { socket, thread: Some(thread), _dir: dir }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take()
            && !std::thread::panicking()
        {
            thread.join().expect("the server's script");
        }
    }
}

/// The client, seen from the server.
pub(crate) struct Client {
    stream: UnixStream,
    decoder: Decoder,
}

impl Client {
    /// The next request, which must be `command`. Handshakes in between are answered: a client on a slow machine
    /// repeats them.
    pub(crate) fn request(&mut self, command: &str) -> Value {
        loop {
            let request = self.any_request().expect("a request before the client leaves");
            if request["execute"] == SYNC && command != SYNC {
                self.answer_handshake(&request);
                continue;
            }
            assert_eq!(request["execute"], command);
            return request;
        }
    }

    fn answer_handshake(&mut self, request: &Value) {
        self.send_bytes(b"\xff");
        self.send(json!({"return": request["arguments"]["id"]}));
    }

    pub(crate) fn any_request(&mut self) -> Option<Value> {
        loop {
            match self.decoder.next_item() {
                Some(Item::Value(value)) => return Some(value),
                Some(Item::Sentinel) => continue,
                Some(Item::Error(error)) => panic!("the client sent {error}"),
                None => {}
            }
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) | Err(_) => return None,
                Ok(count) => self.decoder.feed(&buffer[..count]),
            }
        }
    }

    #[expect(clippy::needless_pass_by_value, reason = "scripts read better without ampersands")]
    pub(crate) fn send(&mut self, message: Value) {
        self.send_bytes(format!("{}\r\n", protocol::encode(&message)).as_bytes());
    }

    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub(crate) fn negotiate(&mut self) {
        self.send(greeting());
        let id = self.request("qmp_capabilities")["id"].clone();
        self.send(json!({"return": {}, "id": id}));
    }

    pub(crate) fn synchronise(&mut self) {
        let request = self.request(SYNC);
        self.answer_handshake(&request);
    }

    /// Answers handshakes, and nothing else, until the client leaves.
    pub(crate) fn synchronise_until_end(&mut self) {
        while let Some(request) = self.any_request() {
            self.answer_handshake(&request);
        }
    }

    /// Says nothing until the client leaves.
    pub(crate) fn wait_for_end(&mut self) {
        while self.any_request().is_some() {}
    }
}

pub(crate) fn greeting() -> Value {
    json!({"QMP": {"version": {"qemu": {"micro": 0, "minor": 1, "major": 0}, "package": ""}, "capabilities": []}})
}
