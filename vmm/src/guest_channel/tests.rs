//! The broker by itself, then the whole channel over real sockets, each against a fake agent.

mod broker;
mod channel;

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
