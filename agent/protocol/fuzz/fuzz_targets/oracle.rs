//! What must hold for every input of the decoder. It never panics, and
//!
//! - how the bytes are split makes no difference,
//! - a plain JSON object means what `serde_json` takes it to mean, and what that refuses is refused,
//! - what was decoded can be encoded, and is then read back by both alike,
//! - after 0xFF the next message is understood, whatever came before,
//! - no message is beyond the limits, and memory stays near them, however much comes in.

use std::fmt;

use protocol::{Decoder, Dialect, Item, Limits, ParseError, Request, encode};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value, json};

/// Limits that inputs of a fuzzer reach.
const NARROW: Limits = Limits { message_bytes: 64, depth: 4, tokens: 16 };

/// What a decoder with these limits may hold at once, with the item it has just given: the largest is an object in
/// an object and so on, for every one of which takes a tree node of more than half a KiB.
#[allow(dead_code, reason = "only the fuzz target can measure it")]
pub const MOST_MEMORY: usize = 8 * 1024;

/// Decodes with all limits and compares.
pub fn check(bytes: &[u8]) {
    for limits in [Limits::AGENT, NARROW] {
        let whole = items(limits, [bytes]);
        assert_eq!(items(limits, pieces(bytes)), whole, "the split matters");
        assert!(whole.len() <= bytes.len());
        for value in whole.iter().filter_map(value) {
            let size = Size::of(value);
            assert!(
                size.depth <= limits.depth && size.tokens <= limits.tokens,
                "{value:?} is beyond the limits"
            );
            assert!(size.text <= limits.message_bytes, "{value:?} is beyond the limits");
            round_trip(value);
        }
    }
    means_what_json_means(bytes);
    resynchronises(bytes);
}

fn value(item: &Item) -> Option<&Value> {
    match item {
        Item::Value(value) => Some(value),
        Item::Error(_) | Item::Sentinel => None,
    }
}

/// Decodes in pieces, and keeps nothing.
#[allow(dead_code, reason = "only the fuzz target measures its memory")]
pub fn decode_and_drop(bytes: &[u8]) {
    let mut decoder = Decoder::new(NARROW);
    for piece in pieces(bytes) {
        decoder.feed(piece);
        while decoder.next_item().is_some() {}
    }
}

fn items<'a>(limits: Limits, pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Item> {
    let mut decoder = Decoder::new(limits);
    let mut items = Vec::new();
    for piece in pieces {
        decoder.feed(piece);
        items.extend(std::iter::from_fn(|| decoder.next_item()));
    }
    items
}

/// The bytes in pieces of 1 to 16, the same ones each time.
fn pieces(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    // FNV-1a, which depends on all of them.
    let mut state = bytes.iter().fold(0xCBF2_9CE4_8422_2325_u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    let mut rest = bytes;
    std::iter::from_fn(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let length = 1 + usize::from(state.to_be_bytes()[0] & 15);
        let (piece, tail) = rest.split_at(length.min(rest.len()));
        rest = tail;
        (!piece.is_empty()).then_some(piece)
    })
}

/// A value survives both directions; a request is found to be one, or not, without a panic.
fn round_trip(value: &Value) {
    let line = encode(value);
    assert!(line.is_ascii() && !line.contains('\n'), "{line:?}");
    // A bare scalar ends with the byte after it.
    let ours = items(Limits::AGENT, [line.as_bytes(), b"\n"]);
    assert_eq!(ours, [Item::Value(value.clone())], "{line:?} reads back differently");
    if let Ok(Strict(theirs)) = serde_json::from_str(&line) {
        assert!(alike(value, &theirs), "{value:?} is encoded as {line:?}");
    } else {
        let beyond = Size::of(value).depth > SERDE_DEPTH || is_nearly_infinite(value);
        assert!(beyond, "serde_json does not read {line:?}");
    }
    if let Ok(request) = Request::parse(value.clone(), Dialect::Agent) {
        drop(request.respond(Ok(json!({}))).encode());
    }
}

/// `serde_json` recurses, and stops soon after this depth.
const SERDE_DEPTH: usize = 100;

fn means_what_json_means(bytes: &[u8]) {
    let mut decoder = Decoder::new(Limits::AGENT);
    decoder.feed(bytes);
    let ours: Vec<Item> = std::iter::from_fn(|| decoder.next_item()).collect();
    let whole = decoder.is_idle();
    match (&ours[..], serde_json::from_slice(bytes)) {
        (_, Ok(Strict(theirs))) if !theirs.is_object() => {}
        ([Item::Value(ours)], Ok(Strict(theirs))) => {
            assert!(alike(ours, &theirs), "{ours:?} is not {theirs:?}");
        }
        // Beyond the largest number by less than serde_json is off.
        ([Item::Error(ParseError::NumberOutOfRange), ..], Ok(Strict(theirs)))
            if is_nearly_infinite(&theirs) => {}
        (ours, Ok(Strict(theirs))) => panic!("{ours:?} instead of {theirs:?}"),
        ([Item::Value(ours)], Err(error)) if whole && ours.is_object() => {
            // The dialect has strings that JSON has not: in single quotes, and with the NUL of modified UTF-8.
            let is_dialect = bytes.iter().any(|byte| matches!(byte, b'\'' | 0xC0));
            let beyond = Size::of(ours).depth > SERDE_DEPTH || is_nearly_infinite(ours);
            assert!(is_dialect || beyond, "{ours:?}, but {error}");
        }
        _ => {}
    }
}

fn resynchronises(bytes: &[u8]) {
    let items = items(NARROW, [bytes, b"\xff{'a':1}"]);
    assert!(items.ends_with(&[Item::Sentinel, Item::Value(json!({"a": 1}))]), "{items:?}");
}

/// The same value. Fractions may differ in the last place: without its feature `float_roundtrip` `serde_json` is not
/// exact; and it keeps the sign of zero, which QEMU's integers do not have.
fn alike(ours: &Value, theirs: &Value) -> bool {
    match (ours, theirs) {
        (Value::Number(ours), Value::Number(theirs)) if ours != theirs => {
            let fractions = (ours.is_f64() || ours.as_u64() == Some(0)) && theirs.is_f64();
            let (Some(ours), Some(theirs)) = (ours.as_f64(), theirs.as_f64()) else { return false };
            fractions && (ours - theirs).abs() <= (ours.abs() * 4.0 * f64::EPSILON).max(FEW_SMALLEST)
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            ours.len() == theirs.len() && ours.iter().zip(theirs).all(|(ours, theirs)| alike(ours, theirs))
        }
        (Value::Object(ours), Value::Object(theirs)) => {
            let same =
                |(name, ours): (&String, &Value)| theirs.get(name).is_some_and(|theirs| alike(ours, theirs));
            ours.len() == theirs.len() && ours.iter().all(same)
        }
        (ours, theirs) => ours == theirs,
    }
}

/// A few times the smallest number above zero: so far apart may two be that have hardly a digit.
const FEW_SMALLEST: f64 = f64::from_bits(4);

/// Whether there is a number so large that one that is a little off, as those of `serde_json` are, is none any more.
fn is_nearly_infinite(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.as_f64().is_some_and(|number| number.abs() > f64::MAX * 0.999_999),
        Value::Array(values) => values.iter().any(is_nearly_infinite),
        Value::Object(members) => members.values().any(is_nearly_infinite),
        Value::Null | Value::Bool(_) | Value::String(_) => false,
    }
}

/// How much of each limit a message must have taken at least.
#[derive(Default)]
struct Size {
    depth: usize,
    tokens: usize,
    /// Bytes of all strings.
    text: usize,
}

impl Size {
    fn of(value: &Value) -> Self {
        let scalar = |text| Self { depth: 0, tokens: 1, text };
        match value {
            Value::Null | Value::Bool(_) | Value::Number(_) => scalar(0),
            Value::String(string) => scalar(string.len()),
            Value::Array(values) => Self::around(values.iter().map(Self::of)),
            Value::Object(members) => Self::around(members.iter().map(|(name, value)| {
                let Self { depth, tokens, text } = Self::of(value);
                // Name and colon.
                Self { depth, tokens: tokens + 2, text: text + name.len() }
            })),
        }
    }

    /// Brackets around elements, commas between them.
    fn around(elements: impl Iterator<Item = Self>) -> Self {
        let mut all = Self { depth: 1, tokens: 2, text: 0 };
        for (index, Self { depth, tokens, text }) in elements.enumerate() {
            all.depth = all.depth.max(depth + 1);
            all.tokens += tokens + usize::from(index > 0);
            all.text += text;
        }
        all
    }
}

/// JSON as `serde_json` reads it, but for a name that comes twice in an object, which is an error on this wire.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Self)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(Strict(value)) = elements.next_element()? {
            values.push(value);
        }
        Ok(values.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some((name, Strict(value))) = members.next_entry()? {
            if object.insert(name, value).is_some() {
                return Err(A::Error::custom("a name comes twice"));
            }
        }
        Ok(object.into())
    }
}
