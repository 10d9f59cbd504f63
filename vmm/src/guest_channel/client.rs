//! A client of `agent.sock`: its connection, its half-read input, its request on the way.

use std::time::{Duration, Instant};

use protocol::{Decoder, Dialect, Error, Item, Limits, Request, Response};
use serde_json::{Value, json};

use crate::event_loop::{Interest, Token, Watch};
use crate::socket::{Connection, Received};

/// Bounds on one request: what the agent itself takes, in fewer tokens.
const LIMITS: Limits = Limits { message_bytes: 64 << 20, depth: 128, tokens: 256 << 10 };
/// A request longer than this needs a permit, of which there is one.
const LARGE: usize = 1 << 20;
/// Unsent output beyond which the client's next request waits.
const OUTPUT_PAUSE: usize = 64 << 10;
/// How long a client may neither go on with a large request nor take any of its output.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connected client.
#[derive(Debug)]
pub(super) struct AgentClient {
    /// Its number; not used again.
    pub(super) number: u64,
    connection: Connection,
    decoder: Decoder,
    /// Bytes of a request that has not ended yet.
    unfinished: usize,
    /// The request the broker has, and what its answer needs.
    asked: Option<Asked>,
    /// What comes after that.
    ahead: Option<Item>,
    /// When bytes last moved, in either direction.
    moved: Instant,
    /// It has sent more before it had its answer.
    hurried: bool,
    /// The client sends no more.
    ended: bool,
    lost: bool,
}

#[derive(Debug)]
struct Asked {
    id: Option<Value>,
    /// A successful answer is marked by a 0xFF before it.
    delimited: bool,
}

impl AgentClient {
    pub(super) fn new(number: u64, connection: Connection, now: Instant) -> Self {
        Self {
            number,
            connection,
            decoder: Decoder::new(LIMITS),
            unfinished: 0,
            asked: None,
            ahead: None,
            moved: now,
            hurried: false,
            ended: false,
            lost: false,
        }
    }

    /// Reads once, by way of `buffer`; `permit` to go on with a large request.
    pub(super) fn read(&mut self, permit: bool, buffer: &mut [u8], now: Instant) {
        if !self.is_reading(permit) {
            self.hurried = true;
            return;
        }
        match self.connection.receive_bytes(buffer) {
            Received::Data(length) => {
                self.decoder.feed(&buffer[..length]);
                self.unfinished += length;
                self.moved = now;
            }
            Received::Nothing => {}
            Received::End => self.ended = true,
            Received::Broken => self.lost = true,
        }
    }

    /// The next request for the broker. Faulty ones are answered on the way, in order.
    pub(super) fn next_request(&mut self) -> Option<Request> {
        loop {
            if self.connection.queued() > OUTPUT_PAUSE {
                self.connection.flush();
            }
            if !self.is_serving() {
                return None;
            }
            let item = self.ahead.take().or_else(|| self.next_item())?;
            let refusal = match item {
                Item::Value(message) => match Request::parse(message, Dialect::InBand) {
                    Ok(request) => return Some(self.ask(request)),
                    Err(refusal) => refusal,
                },
                Item::Error(error) => Response::error(error, None),
                // What was unfinished before it is forgotten, which is all that clients want of it.
                Item::Sentinel => continue,
            };
            self.send(&refusal, false);
        }
    }

    fn next_item(&mut self) -> Option<Item> {
        let item = self.decoder.next_item();
        if item.is_some() {
            self.unfinished = self.decoder.unread_bytes();
        } else if self.decoder.is_idle() {
            self.unfinished = 0;
        }
        item
    }

    /// Whether it synchronises although the broker has a request of it: it does not wait for the answer.
    pub(super) fn starts_afresh(&mut self) -> bool {
        if self.asked.is_none() || self.lost {
            return false;
        }
        if self.ahead.is_none() {
            self.ahead = self.next_item();
        }
        match &self.ahead {
            Some(Item::Sentinel) => true,
            Some(Item::Value(message)) => {
                matches!(message["execute"].as_str(), Some("guest-sync" | "guest-sync-delimited"))
            }
            Some(Item::Error(_)) | None => false,
        }
    }

    /// There will be no answer to its request.
    pub(super) fn forget_request(&mut self) {
        self.asked = None;
    }

    fn ask(&mut self, mut request: Request) -> Request {
        let delimited = request.execute == "guest-sync-delimited";
        self.asked = Some(Asked { id: request.id.take(), delimited });
        request
    }

    /// The outcome of its request; `None` if there is no answer.
    pub(super) fn complete(&mut self, result: Option<Result<Value, Error>>, now: Instant) {
        let Some(Asked { id, delimited }) = self.asked.take() else { return };
        self.moved = now;
        if let Some(result) = result {
            let delimited = delimited && result.is_ok();
            self.send(&Response { result, id }, delimited);
        }
    }

    fn send(&mut self, response: &Response, delimited: bool) {
        let mut line = response.encode().into_bytes();
        line.push(b'\n');
        if delimited {
            line.insert(0, 0xFF);
        }
        self.connection.send(line);
    }

    /// Writes what the client takes.
    pub(super) fn flush(&mut self, now: Instant) {
        if self.connection.flush() > 0 {
            self.moved = now;
        }
    }

    /// The peer has closed both directions. What it sent before is still read, if it can be.
    pub(super) fn hung_up(&mut self, permit: bool) {
        self.lost |= !self.is_over() && !self.is_reading(permit) && self.connection.is_hung_up();
    }

    /// To be closed, whatever is on its way.
    pub(super) fn give_up(&mut self) {
        tracing::warn!(client = self.number, "Guest channel client does not move, giving it up");
        self.lost = true;
    }

    /// Whether nothing is left to do for it.
    pub(super) fn is_over(&self) -> bool {
        let served = self.ended && self.asked.is_none() && !self.has_unserved();
        self.lost || self.connection.is_broken() || (served && self.connection.queued() == 0)
    }

    /// Whether it can have read every answer it was owed.
    pub(super) fn is_informed(&self) -> bool {
        !self.lost && !self.connection.is_broken() && self.asked.is_none() && self.connection.queued() == 0
    }

    /// Whether it needs, or still uses, the permit for large requests.
    pub(super) fn is_large(&self) -> bool {
        self.unfinished > LARGE
    }

    /// Whether the broker has a request of it.
    pub(super) fn is_waiting(&self) -> bool {
        self.asked.is_some()
    }

    /// Bytes it has not taken yet; none if it never will.
    pub(super) fn queued(&self) -> usize {
        if self.lost { 0 } else { self.connection.queued() }
    }

    /// When to give it up: it takes no output, or it stopped inside a large request that it has the permit
    /// for.
    pub(super) fn deadline(&self, has_permit: bool) -> Option<Instant> {
        let stalled = has_permit && self.is_large() && self.asked.is_none();
        let slow = stalled || self.connection.queued() > 0;
        (slow && !self.lost).then(|| self.moved + PATIENCE)
    }

    fn has_unserved(&self) -> bool {
        self.ahead.is_some() || self.decoder.unread_bytes() > 0
    }

    fn is_serving(&self) -> bool {
        self.asked.is_none() && !self.lost && self.connection.queued() <= OUTPUT_PAUSE
    }

    fn is_reading(&self, permit: bool) -> bool {
        // While the broker has a request, only to see whether the client still waits for it.
        let allowed = !self.is_large() || (permit && self.asked.is_none());
        let can_answer = !self.lost && self.connection.queued() <= OUTPUT_PAUSE;
        can_answer && !self.ended && allowed && !self.has_unserved()
    }

    /// Tells the loop what to wait for.
    pub(super) fn watch(&mut self, token: Token, permit: bool, watch: &mut dyn Watch) {
        // Input that is already here is served once there is room for the answers.
        let backlog = self.is_serving() && self.has_unserved();
        let write = backlog || self.connection.queued() > 0;
        let reading = self.is_reading(permit);
        self.hurried &= !reading;
        // Few clients send more before they have their answer: the loop is told not to look when one does.
        let read = reading || (self.asked.is_some() && !self.hurried && !self.ended);
        self.connection.watch(token, Interest { read, write }, watch);
    }

    pub(super) fn close(self, watch: &mut dyn Watch) {
        self.connection.close(watch);
    }
}

/// What a client of the monitor gets for a command that has no answer.
pub(super) fn nothing() -> Value {
    json!({})
}
