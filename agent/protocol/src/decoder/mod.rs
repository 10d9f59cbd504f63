//! Streaming decoder for QEMU's JSON dialect.
//!
//! A message ends where its outermost bracket closes, or, for a bare scalar, at the byte after it;
//! newlines have no meaning between tokens. Additions to RFC 8259: strings in single quotes, `\'`
//! everywhere, and the NUL character as the two bytes C0 80. Stricter than many decoders: a
//! duplicate key is an error, and so is a number that no double can hold.
//!
//! ```text
//!                    token byte                 closing quote, terminator
//!      ┌─────────┐ ─────────────▶ ┌──────────────────────┐ ────────▶ Between
//!      │ Between │                │ Word, Number, Str    │
//!      └─────────┘ ◀───┐          └──────────┬───────────┘
//!        │    ▲        │ control byte, 0xFE  │ anything wrong: one Item::Error
//!        │    │        │ 0xFF (Sentinel)     ▼
//!        │    │        └──────────────── ┌──────┐
//!        └────┼─────────────────────────▶│ Skip │  counts brackets, keeps nothing
//!  wrong      └──────────────────────────└──────┘
//!  token        `{` or `[` once the brackets of the bad message are balanced
//! ```
//!
//! One run of garbage gives one error. It ends at a control byte other than TAB (so at the latest
//! with the line), at 0xFE or 0xFF, or when its brackets are balanced and a new object or array
//! begins. Objects nested in a broken message are never taken for messages of their own.
//!
//! 0xFF always means "forget what came before": it drops a partial message silently and is reported
//! as [`Item::Sentinel`], which servers ignore and which tells a client of `guest-sync-delimited`
//! where the awaited reply starts.

mod number;
mod partial;
mod text;

#[cfg(test)]
mod tests;

use serde_json::Value;

use self::number::NumberState;
use self::partial::Partial;
use self::text::Text;

/// Bounds on one message.
///
/// They hold for what the decoder keeps as well: it never stores more of a message than this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Length of one message in bytes, white space inside it included.
    pub message_bytes: usize,
    /// Objects and arrays open at the same time. At most [`Limits::MAX_DEPTH`] takes effect, because
    /// a [`Value`] is dropped recursively.
    pub depth: usize,
    /// Tokens in one message, punctuation included.
    pub tokens: usize,
}

impl Limits {
    /// Deepest nesting any decoder accepts; also QEMU's limit (`qobject/json-streamer.c`).
    pub const MAX_DEPTH: usize = 1024;

    /// The guest agent's limits: those of the reference agent.
    pub const AGENT: Self = Self { message_bytes: 64 << 20, depth: Self::MAX_DEPTH, tokens: 2 << 20 };

    /// The monitor's limits: far above any real request, small enough for many clients.
    pub const MONITOR: Self = Self { message_bytes: 1 << 20, depth: 64, tokens: 64 << 10 };
}

/// What [`Decoder::next_item`] found.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// One complete message.
    Value(Value),
    /// A run of garbage or a message beyond the limits; reported once, the rest is skipped.
    Error(ParseError),
    /// The byte 0xFF. Everything unfinished before it is forgotten.
    Sentinel,
}

/// Why a run of bytes is no message. The texts are those of the reference parser.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the texts say it")]
pub enum ParseError {
    #[error("JSON parse error, stray '{0}'")]
    Stray(char),
    #[error("JSON parse error, invalid keyword '{0}'")]
    InvalidKeyword(String),
    #[error("JSON parse error, expecting value")]
    ExpectingValue,
    #[error("JSON parse error, expected separator in dict")]
    ExpectedDictSeparator,
    #[error("JSON parse error, expected separator in list")]
    ExpectedListSeparator,
    #[error("JSON parse error, duplicate key")]
    DuplicateKey,
    #[error("JSON parse error, key is not a string in object")]
    KeyNotString,
    #[error("JSON parse error, missing : in object pair")]
    MissingColon,
    #[error("JSON parse error, invalid escape sequence in string")]
    InvalidEscape,
    #[error("JSON parse error, invalid UTF-8 sequence in string")]
    InvalidUtf8,
    #[error("JSON parse error, \\u{0:04x} is not a valid Unicode character")]
    InvalidCharacter(u16),
    #[error("JSON parse error, number out of range")]
    NumberOutOfRange,
    #[error("JSON token size limit exceeded")]
    TooLong,
    #[error("JSON token count limit exceeded")]
    TooManyTokens,
    #[error("JSON nesting depth limit exceeded")]
    TooDeep,
}

/// A streaming decoder: [`feed`](Self::feed) bytes, then pull items until there is none.
///
/// ```
/// use protocol::{Decoder, Item, Limits};
///
/// let mut decoder = Decoder::new(Limits::AGENT);
/// decoder.feed(b"{'execute':'guest-pi");
/// assert_eq!(decoder.next_item(), None);
/// decoder.feed(b"ng'}{}");
/// assert_eq!(decoder.next_item(), Some(Item::Value(serde_json::json!({"execute": "guest-ping"}))));
/// assert_eq!(decoder.next_item(), Some(Item::Value(serde_json::json!({}))));
/// assert!(decoder.is_idle());
/// ```
#[derive(Debug)]
pub struct Decoder {
    // Fixed configuration.
    limits: Limits,
    // Bytes fed and not looked at yet: unread[cursor..].
    unread: Vec<u8>,
    cursor: usize,
    // The message being read.
    state: State,
    partial: Partial,
    bytes: usize,
    tokens: usize,
}

#[derive(Debug)]
enum State {
    /// Between two tokens; idle when the partial message is empty too.
    Between,
    /// In `true`, `false`, `null` or a misspelt one.
    Word(Vec<u8>),
    Number(NumberState, Vec<u8>),
    Str(Text),
    /// After an error.
    Skip {
        depth: usize,
        quoted: Option<Quoted>,
    },
}

/// A string inside a message that is being skipped.
#[derive(Clone, Copy, Debug)]
struct Quoted {
    quote: u8,
    escaped: bool,
}

/// What one byte did.
enum Step {
    /// The byte is used up.
    Consumed(Option<Item>),
    /// The byte ended a token, or made it bad, and is to be looked at again in the new state.
    Again(Option<Item>),
}

const SENTINEL: u8 = 0xFF;
/// Longest part of a bad keyword that an error repeats.
const KEYWORD_SHOWN: usize = 40;
/// An emptied input buffer larger than this is given back.
const KEEP_CAPACITY: usize = 64 << 10;

impl Decoder {
    /// A decoder with nothing read.
    pub fn new(limits: Limits) -> Self {
        let limits = Limits { depth: limits.depth.min(Limits::MAX_DEPTH), ..limits };
        Self {
            limits,
            unread: Vec::new(),
            cursor: 0,
            state: State::Between,
            partial: Partial::default(),
            bytes: 0,
            tokens: 0,
        }
    }

    /// Appends input. It is held until [`next_item`](Self::next_item) comes to it, so a caller that
    /// wants bounded memory pulls until `None` before it reads on.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.cursor > self.unread.len() / 2 {
            self.unread.drain(..self.cursor);
            self.cursor = 0;
        }
        self.unread.extend_from_slice(bytes);
    }

    /// The next message, error or sentinel; `None` when more input is needed.
    pub fn next_item(&mut self) -> Option<Item> {
        while let Some(&byte) = self.unread.get(self.cursor) {
            let step = if byte == SENTINEL {
                self.forget();
                Step::Consumed(Some(Item::Sentinel))
            } else if self.is_over_long() {
                Step::Again(Some(self.fail(ParseError::TooLong)))
            } else if self.take_plain_text() {
                continue;
            } else {
                self.step(byte)
            };
            let item = match step {
                Step::Consumed(item) => {
                    self.cursor += 1;
                    if self.is_in_message() {
                        self.bytes += 1;
                    }
                    item
                }
                Step::Again(item) => item,
            };
            if item.is_some() {
                return item;
            }
        }
        self.unread.clear();
        self.cursor = 0;
        if self.unread.capacity() > KEEP_CAPACITY {
            self.unread.shrink_to(KEEP_CAPACITY);
        }
        None
    }

    /// Forgets everything: the partial message and the input not looked at yet. For a peer that went
    /// away.
    pub fn reset(&mut self) {
        let Self { limits: _, unread, cursor, state: _, partial: _, bytes: _, tokens: _ } = self;
        unread.clear();
        *cursor = 0;
        self.forget();
    }

    /// True if no message is under way: everything fed has been looked at, and it ended with a
    /// complete item, white space, or garbage whose brackets are balanced. Ask after
    /// [`next_item`](Self::next_item) returned `None`.
    pub fn is_idle(&self) -> bool {
        let between_messages = match self.state {
            State::Between => self.partial.is_empty(),
            State::Skip { depth, quoted } => depth == 0 && quoted.is_none(),
            State::Word(_) | State::Number(..) | State::Str(_) => false,
        };
        between_messages && self.unread_bytes() == 0
    }

    /// Number of bytes fed that [`next_item`](Self::next_item) has not come to yet.
    pub fn unread_bytes(&self) -> usize {
        self.unread.len() - self.cursor
    }

    /// Drops the partial message and any error state.
    fn forget(&mut self) {
        self.state = State::Between;
        self.partial.clear();
        self.bytes = 0;
        self.tokens = 0;
    }

    fn is_in_message(&self) -> bool {
        match self.state {
            State::Between => !self.partial.is_empty(),
            State::Skip { .. } => false,
            State::Word(_) | State::Number(..) | State::Str(_) => true,
        }
    }

    fn is_over_long(&self) -> bool {
        self.is_in_message() && self.bytes >= self.limits.message_bytes
    }

    /// Moves a run of ordinary string bytes in one go; this is what keeps long strings cheap.
    fn take_plain_text(&mut self) -> bool {
        let State::Str(text) = &mut self.state else { return false };
        let room = self.limits.message_bytes - self.bytes;
        let input = &self.unread[self.cursor..];
        let taken = text.take_plain(&input[..input.len().min(room)]);
        self.cursor += taken;
        self.bytes += taken;
        taken > 0
    }

    fn step(&mut self, byte: u8) -> Step {
        match &mut self.state {
            State::Between => self.between(byte),
            State::Word(word) if byte.is_ascii_lowercase() => {
                word.push(byte);
                Step::Consumed(None)
            }
            State::Word(word) => {
                let word = std::mem::take(word);
                Step::Again(self.end_word(&word))
            }
            State::Number(state, digits) => match state.after(byte) {
                Some(next) => {
                    *state = next;
                    digits.push(byte);
                    Step::Consumed(None)
                }
                None => {
                    let (state, digits) = (*state, std::mem::take(digits));
                    Step::Again(self.end_number(state, &digits, byte))
                }
            },
            State::Str(text) => match text.push(byte) {
                text::Pushed::More => Step::Consumed(None),
                text::Pushed::End(result) => {
                    self.state = State::Between;
                    Step::Consumed(match result {
                        Ok(string) => self.end_string(string),
                        Err(error) => Some(self.fail(error)),
                    })
                }
                // The skipper looks at the byte too: it may be a control byte, or end the string.
                text::Pushed::Bad(error) => Step::Again(Some(self.fail(error))),
            },
            State::Skip { depth, quoted } => {
                let (depth, quoted) = (*depth, *quoted);
                self.skip(byte, depth, quoted)
            }
        }
    }

    /// A byte where a token may start.
    fn between(&mut self, byte: u8) -> Step {
        match byte {
            b' ' | b'\t' | b'\n' | b'\r' => return Step::Consumed(None),
            // The skipper ends at once here, so this is one error and a clean start.
            _ if is_resync(byte) => return Step::Again(Some(self.fail(ParseError::Stray(shown(byte))))),
            _ => {}
        }
        self.tokens += 1;
        if self.tokens > self.limits.tokens {
            return Step::Again(Some(self.fail(ParseError::TooManyTokens)));
        }
        let started = match byte {
            b'{' | b'[' if self.partial.depth() >= self.limits.depth => Err(ParseError::TooDeep),
            b'{' => self.partial.open_object().map(|()| None),
            b'[' => self.partial.open_array().map(|()| None),
            b'}' => self.partial.close_object(),
            b']' => self.partial.close_array(),
            b',' => self.partial.comma().map(|()| None),
            b':' => self.partial.colon().map(|()| None),
            b'"' | b'\'' => self.partial.may_start_string().map(|()| {
                self.state = State::Str(Text::new(byte));
                None
            }),
            b'-' | b'0'..=b'9' => self.partial.may_start_scalar().map(|()| {
                self.state = State::Number(NumberState::start(byte), vec![byte]);
                None
            }),
            b'a'..=b'z' => self.partial.may_start_scalar().map(|()| {
                self.state = State::Word(vec![byte]);
                None
            }),
            _ => Err(ParseError::Stray(shown(byte))),
        };
        match started {
            Ok(None) => Step::Consumed(None),
            Ok(Some(value)) => Step::Consumed(Some(self.finish(value))),
            Err(error) => Step::Again(Some(self.fail(error))),
        }
    }

    fn end_word(&mut self, word: &[u8]) -> Option<Item> {
        self.state = State::Between;
        match word {
            b"true" => self.place(Value::Bool(true)),
            b"false" => self.place(Value::Bool(false)),
            b"null" => self.place(Value::Null),
            _ => {
                let shown = &word[..word.len().min(KEYWORD_SHOWN)];
                let word = String::from_utf8_lossy(shown).into_owned();
                Some(self.fail(ParseError::InvalidKeyword(word)))
            }
        }
    }

    /// `terminator` cannot continue the number; if the number is not complete it is the stray byte.
    fn end_number(&mut self, state: NumberState, digits: &[u8], terminator: u8) -> Option<Item> {
        self.state = State::Between;
        if !state.is_complete(terminator) {
            return Some(self.fail(ParseError::Stray(shown(terminator))));
        }
        match number::parse(digits) {
            Some(number) => self.place(Value::Number(number)),
            None => Some(self.fail(ParseError::NumberOutOfRange)),
        }
    }

    fn end_string(&mut self, string: String) -> Option<Item> {
        match self.partial.string(string) {
            Ok(value) => value.map(|value| self.finish(value)),
            Err(error) => Some(self.fail(error)),
        }
    }

    fn place(&mut self, value: Value) -> Option<Item> {
        self.partial.place(value).map(|value| self.finish(value))
    }

    fn finish(&mut self, value: Value) -> Item {
        self.forget();
        Item::Value(value)
    }

    fn fail(&mut self, error: ParseError) -> Item {
        let quoted = match &self.state {
            State::Str(text) => Some(Quoted { quote: text.quote(), escaped: text.is_escaped() }),
            _ => None,
        };
        let depth = self.partial.depth();
        self.forget();
        self.state = State::Skip { depth, quoted };
        Item::Error(error)
    }

    /// A byte of a bad message. Strings are told apart from structure only inside brackets: prose at
    /// the top level is full of apostrophes.
    fn skip(&mut self, byte: u8, mut depth: usize, mut quoted: Option<Quoted>) -> Step {
        if is_resync(byte) {
            self.forget();
            return Step::Consumed(None);
        }
        match &mut quoted {
            Some(string) if string.escaped => string.escaped = false,
            Some(string) if byte == b'\\' => string.escaped = true,
            Some(string) if byte == string.quote => quoted = None,
            Some(_) => {}
            None => match byte {
                b'{' | b'[' if depth == 0 => {
                    self.forget();
                    return Step::Again(None);
                }
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth = depth.saturating_sub(1),
                b'"' | b'\'' if depth > 0 => quoted = Some(Quoted { quote: byte, escaped: false }),
                _ => {}
            },
        }
        self.state = State::Skip { depth, quoted };
        Step::Consumed(None)
    }
}

/// Bytes that end a run of garbage: control characters other than TAB, and 0xFE (0xFF is met earlier).
fn is_resync(byte: u8) -> bool {
    (byte < 0x20 && byte != b'\t') || byte >= 0xFE
}

/// A byte as an error text shows it.
fn shown(byte: u8) -> char {
    if byte.is_ascii() { char::from(byte) } else { char::REPLACEMENT_CHARACTER }
}
