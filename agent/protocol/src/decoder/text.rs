//! The inside of a string: escapes and character encoding.

use super::ParseError;

/// A string whose closing quote has not come yet.
#[derive(Debug)]
pub(super) struct Text {
    quote: u8,
    bytes: Vec<u8>,
    escape: Escape,
    /// A `\uD800`–`\uDBFF` that needs its second half next.
    high: Option<u16>,
}

#[derive(Clone, Copy, Debug)]
enum Escape {
    None,
    Backslash,
    Hex { unit: u16, digits: u8 },
}

/// What one byte did to the string.
pub(super) enum Pushed {
    More,
    /// The closing quote, consumed.
    End(Result<String, ParseError>),
    /// The string cannot be right; the byte is not consumed.
    Bad(ParseError),
}

impl Text {
    pub(super) fn new(quote: u8) -> Self {
        Self { quote, bytes: Vec::new(), escape: Escape::None, high: None }
    }

    pub(super) fn quote(&self) -> u8 {
        self.quote
    }

    /// True if the last byte was a backslash that starts an escape.
    pub(super) fn is_escaped(&self) -> bool {
        matches!(self.escape, Escape::Backslash)
    }

    /// Takes the leading bytes of `input` that mean themselves; returns how many.
    pub(super) fn take_plain(&mut self, input: &[u8]) -> usize {
        if !matches!(self.escape, Escape::None) || self.high.is_some() {
            return 0;
        }
        let plain = |&byte: &u8| byte != self.quote && byte != b'\\' && (0x20..0xFE).contains(&byte);
        let taken = input.iter().position(|byte| !plain(byte)).unwrap_or(input.len());
        self.bytes.extend_from_slice(&input[..taken]);
        taken
    }

    pub(super) fn push(&mut self, byte: u8) -> Pushed {
        match self.escape {
            Escape::None => self.push_plain(byte),
            Escape::Backslash => self.push_escaped(byte),
            Escape::Hex { unit, digits } => self.push_hex(byte, unit, digits),
        }
    }

    fn push_plain(&mut self, byte: u8) -> Pushed {
        match (self.high, byte) {
            (_, b'\\') => {
                self.escape = Escape::Backslash;
                Pushed::More
            }
            (Some(high), _) => Pushed::Bad(ParseError::InvalidCharacter(high)),
            (None, _) if byte == self.quote => Pushed::End(utf8(std::mem::take(&mut self.bytes))),
            (None, 0x20..0xFE) => {
                self.bytes.push(byte);
                Pushed::More
            }
            (None, _) => Pushed::Bad(ParseError::Stray(super::shown(byte))),
        }
    }

    fn push_escaped(&mut self, byte: u8) -> Pushed {
        if byte == b'u' {
            self.escape = Escape::Hex { unit: 0, digits: 0 };
            return Pushed::More;
        }
        if let Some(high) = self.high {
            return Pushed::Bad(ParseError::InvalidCharacter(high));
        }
        let meant = match byte {
            b'"' | b'\'' | b'\\' | b'/' => byte,
            b'b' => 0x08,
            b'f' => 0x0C,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            _ => return Pushed::Bad(ParseError::InvalidEscape),
        };
        self.bytes.push(meant);
        self.escape = Escape::None;
        Pushed::More
    }

    fn push_hex(&mut self, byte: u8, unit: u16, digits: u8) -> Pushed {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            b'A'..=b'F' => byte - b'A' + 10,
            _ => return Pushed::Bad(ParseError::InvalidEscape),
        };
        let unit = unit << 4 | u16::from(digit);
        if digits < 3 {
            self.escape = Escape::Hex { unit, digits: digits + 1 };
            return Pushed::More;
        }
        self.escape = Escape::None;
        match self.push_unit(unit) {
            Ok(()) => Pushed::More,
            Err(error) => Pushed::Bad(error),
        }
    }

    /// A UTF-16 code unit from a `\u` escape.
    fn push_unit(&mut self, unit: u16) -> Result<(), ParseError> {
        let units = match (self.high.take(), unit) {
            (None, 0xD800..=0xDBFF) => {
                self.high = Some(unit);
                return Ok(());
            }
            (None, _) => [unit, 0],
            (Some(high), 0xDC00..=0xDFFF) => [high, unit],
            (Some(high), _) => return Err(ParseError::InvalidCharacter(high)),
        };
        let character = char::decode_utf16(units).next();
        let character = character.and_then(Result::ok).ok_or(ParseError::InvalidCharacter(unit))?;
        let mut buffer = [0; 4];
        self.bytes.extend_from_slice(character.encode_utf8(&mut buffer).as_bytes());
        Ok(())
    }
}

/// UTF-8, plus C0 80 for the NUL character.
fn utf8(bytes: Vec<u8>) -> Result<String, ParseError> {
    let bytes = match String::from_utf8(bytes) {
        Ok(string) => return Ok(string),
        Err(error) => error.into_bytes(),
    };
    let mut standard = Vec::with_capacity(bytes.len());
    let mut rest = bytes.as_slice();
    while let [first, tail @ ..] = rest {
        rest = if let [0xC0, 0x80, tail @ ..] = rest {
            standard.push(0);
            tail
        } else {
            standard.push(*first);
            tail
        };
    }
    String::from_utf8(standard).map_err(|_| ParseError::InvalidUtf8)
}
