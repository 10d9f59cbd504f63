//! The agent of a guest without a system: it freezes by not writing.
//!
//! It has no lease and no broker in front of it, so that a guest that nobody thaws stays frozen, and is found.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use protocol::{Decoder, Item, Limits, encode};
use serde_json::{Value, json};

use crate::setup::Setup;

const DISABLED: &str = "The command guest-fsfreeze-freeze has been disabled";

/// Listens for as long as the process lives.
pub(crate) fn start(setup: &Setup, frozen: Arc<AtomicBool>) -> io::Result<()> {
    let listener = UnixListener::bind(setup.agent())?;
    let blocked = Arc::new(AtomicBool::new(false));
    let body = move || {
        for client in listener.incoming().map_while(Result::ok) {
            let (frozen, blocked) = (Arc::clone(&frozen), Arc::clone(&blocked));
            // One that leaves is no matter to the others.
            thread::spawn(move || drop(serve(client, &frozen, &blocked)));
        }
    };
    thread::Builder::new().name("agent".into()).spawn(body).map(drop)
}

fn serve(mut client: UnixStream, frozen: &AtomicBool, blocked: &AtomicBool) -> io::Result<()> {
    let mut decoder = Decoder::new(Limits::AGENT);
    let mut bytes = [0; 4096];
    loop {
        while let Some(item) = decoder.next_item() {
            let Item::Value(request) = item else { continue };
            // A frozen guest does next to nothing for anybody, as the real agent has it.
            let is_refused = request["execute"] == "guest-fsfreeze-freeze"
                && (frozen.load(Ordering::SeqCst) || blocked.load(Ordering::SeqCst));
            // As if it had been started with --block-rpcs.
            if request["execute"] == "block-freeze" {
                blocked.store(true, Ordering::SeqCst);
            }
            let answer = match is_refused {
                true => json!({"error": {"class": "GenericError", "desc": DISABLED}}),
                false => json!({"return": answer(&request, frozen)}),
            };
            let sentinel: &[u8] = if request["execute"] == "guest-sync-delimited" { b"\xff" } else { b"" };
            client.write_all(&[sentinel, encode(&answer).as_bytes(), b"\n"].concat())?;
        }
        match client.read(&mut bytes)? {
            0 => return Ok(()),
            count => decoder.feed(&bytes[..count]),
        }
    }
}

fn answer(request: &Value, frozen: &AtomicBool) -> Value {
    match request["execute"].as_str().unwrap_or_default() {
        "guest-sync" | "guest-sync-delimited" => request["arguments"]["id"].clone(),
        "guest-fsfreeze-freeze" => u8::from(!frozen.swap(true, Ordering::SeqCst)).into(),
        "guest-fsfreeze-thaw" => u8::from(frozen.swap(false, Ordering::SeqCst)).into(),
        "guest-fsfreeze-status" => if frozen.load(Ordering::SeqCst) { "frozen" } else { "thawed" }.into(),
        "tarn-fsfreeze-report" => json!({"void": false, "hooks": []}),
        _ => json!({}),
    }
}
