//! The message being put together: an explicit stack instead of recursion.

use serde_json::Value;

use super::ParseError;
use crate::Map;

/// Open objects and arrays, outermost first, and what may come next.
#[derive(Debug, Default)]
pub(super) struct Partial {
    stack: Vec<Frame>,
    expect: Expect,
}

#[derive(Debug)]
enum Frame {
    Array(Vec<Value>),
    Object {
        members: Map,
        /// The key whose value is awaited.
        key: String,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expect {
    #[default]
    Value,
    /// Just after `[`.
    ValueOrEnd,
    /// After a comma in an object.
    Key,
    /// Just after `{`.
    KeyOrEnd,
    Colon,
    CommaOrEnd,
}

type Placed = Result<Option<Value>, ParseError>;

impl Partial {
    pub(super) fn is_empty(&self) -> bool {
        self.stack.is_empty()
    }

    pub(super) fn depth(&self) -> usize {
        self.stack.len()
    }

    pub(super) fn clear(&mut self) {
        let Self { stack, expect } = self;
        stack.clear();
        *expect = Expect::default();
    }

    pub(super) fn may_start_scalar(&self) -> Result<(), ParseError> {
        match self.expect {
            Expect::Value | Expect::ValueOrEnd => Ok(()),
            _ => Err(self.misplaced()),
        }
    }

    pub(super) fn may_start_string(&self) -> Result<(), ParseError> {
        match self.expect {
            Expect::Key | Expect::KeyOrEnd => Ok(()),
            _ => self.may_start_scalar(),
        }
    }

    pub(super) fn open_object(&mut self) -> Result<(), ParseError> {
        self.may_start_scalar()?;
        self.stack.push(Frame::Object { members: Map::new(), key: String::new() });
        self.expect = Expect::KeyOrEnd;
        Ok(())
    }

    pub(super) fn open_array(&mut self) -> Result<(), ParseError> {
        self.may_start_scalar()?;
        self.stack.push(Frame::Array(Vec::new()));
        self.expect = Expect::ValueOrEnd;
        Ok(())
    }

    pub(super) fn close_object(&mut self) -> Placed {
        match (self.stack.last_mut(), self.expect) {
            (Some(Frame::Object { members, .. }), Expect::KeyOrEnd | Expect::CommaOrEnd) => {
                let value = Value::Object(std::mem::take(members));
                self.stack.pop();
                Ok(self.place(value))
            }
            _ => Err(self.misplaced()),
        }
    }

    pub(super) fn close_array(&mut self) -> Placed {
        match (self.stack.last_mut(), self.expect) {
            (Some(Frame::Array(values)), Expect::ValueOrEnd | Expect::CommaOrEnd) => {
                let value = Value::Array(std::mem::take(values));
                self.stack.pop();
                Ok(self.place(value))
            }
            _ => Err(self.misplaced()),
        }
    }

    pub(super) fn comma(&mut self) -> Result<(), ParseError> {
        self.expect = match (self.stack.last(), self.expect) {
            (Some(Frame::Object { .. }), Expect::CommaOrEnd) => Expect::Key,
            (Some(Frame::Array(_)), Expect::CommaOrEnd) => Expect::Value,
            _ => return Err(self.misplaced()),
        };
        Ok(())
    }

    pub(super) fn colon(&mut self) -> Result<(), ParseError> {
        if self.expect != Expect::Colon {
            return Err(self.misplaced());
        }
        self.expect = Expect::Value;
        Ok(())
    }

    /// A complete string: a key where one is due, else a value.
    pub(super) fn string(&mut self, string: String) -> Placed {
        match (self.stack.last_mut(), self.expect) {
            (Some(Frame::Object { members, key }), Expect::Key | Expect::KeyOrEnd) => {
                if members.contains_key(&string) {
                    return Err(ParseError::DuplicateKey);
                }
                *key = string;
                self.expect = Expect::Colon;
                Ok(None)
            }
            _ => Ok(self.place(Value::String(string))),
        }
    }

    /// A complete value, put where it belongs. Returns it if it is the whole message.
    pub(super) fn place(&mut self, value: Value) -> Option<Value> {
        self.expect = Expect::CommaOrEnd;
        match self.stack.last_mut() {
            None => return Some(value),
            Some(Frame::Array(values)) => values.push(value),
            Some(Frame::Object { members, key }) => {
                members.insert(std::mem::take(key), value);
            }
        }
        None
    }

    fn misplaced(&self) -> ParseError {
        match (self.expect, self.stack.last()) {
            (Expect::Value | Expect::ValueOrEnd, _) => ParseError::ExpectingValue,
            (Expect::Key | Expect::KeyOrEnd, _) => ParseError::KeyNotString,
            (Expect::Colon, _) => ParseError::MissingColon,
            (Expect::CommaOrEnd, Some(Frame::Array(_))) => ParseError::ExpectedListSeparator,
            (Expect::CommaOrEnd, _) => ParseError::ExpectedDictSeparator,
        }
    }
}
