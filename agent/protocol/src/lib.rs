//! The wire that the guest agent and the QMP monitor share: codec, envelope, errors, client side.
//!
//! Sans-I/O: nothing here opens, reads or writes. Bytes go in, items come out; whoever owns the
//! descriptor decides when.
//!
//! ```text
//!            server                                   client
//!  bytes ─▶ Decoder ─▶ Item::Value ─▶ Request         request_line() ─▶ bytes
//!                 └──▶ Item::Error ─▶ Error           bytes ─▶ Decoder ─▶ Item::Value ─▶ Reply
//!  Request.arguments ─▶ Args ─▶ handler                          └──▶ Item::Sentinel ─▶ Handshake
//!  Result<Value, Error> ─▶ Response ─▶ encode() ─▶ bytes
//! ```
//!
//! The dialect is QEMU's: JSON with single-quoted strings, replies of one ASCII line with `", "` and
//! `": "` between members, and the byte 0xFF as a point from which both sides can start afresh. Where
//! the reference implementation answers one fault with a cascade of errors, this one answers once.
//!
//! What comes in is hostile. The decoder holds at most [`Limits`] of one message, needs linear time,
//! never recurses and never panics, whatever the bytes.

mod args;
mod client;
mod decoder;
mod encoder;
mod envelope;
mod error;

pub use args::Args;
pub use client::{Event, Handshake, NotAReply, Progress, Reply, request_line};
pub use decoder::{Decoder, Item, Limits, ParseError};
pub use encoder::encode;
pub use envelope::{Dialect, Request, Response};
pub use error::{Error, ErrorClass};

/// An object of the wire: member names and values.
pub type Map = serde_json::Map<String, serde_json::Value>;
