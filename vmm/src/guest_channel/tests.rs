//! The broker by itself, then the whole channel over real sockets, each against a fake agent.

mod broker;
mod channel;
mod model;
mod out_of_band;

use protocol::{Decoder, Item, Limits, Map};
use serde_json::{Value, json};

/// What is sent to the guest, taken apart.
struct Wire(Decoder);

impl Wire {
    fn new() -> Self {
        Self(Decoder::new(Limits::AGENT))
    }

    fn items(&mut self, bytes: &[u8]) -> Vec<Item> {
        self.0.feed(bytes);
        std::iter::from_fn(|| self.0.next_item()).collect()
    }

    fn requests(&mut self, bytes: &[u8]) -> Vec<Value> {
        let value = |item| match item {
            Item::Value(value) => Some(value),
            Item::Sentinel => None,
            Item::Error(error) => panic!("the broker sent garbage: {error}"),
        };
        self.items(bytes).into_iter().filter_map(value).collect()
    }
}

fn arguments(value: Value) -> Map {
    let Value::Object(arguments) = value else { panic!("not an object: {value}") };
    arguments
}

fn reply(value: &Value) -> Vec<u8> {
    format!("{}\n", json!({"return": value})).into_bytes()
}

fn marked_reply(value: &Value) -> Vec<u8> {
    [&[0xFF], reply(value).as_slice()].concat()
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((mixed ^ (mixed >> 31)) % bound as u64).unwrap()
    }
}
