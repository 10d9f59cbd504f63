//! What a guest sees of its disk: 4 KiB past its page cache, one after the other (tests/clients/disk-io.rs).

use std::time::{Duration, Instant};

use base64::prelude::{BASE64_STANDARD, Engine};
use coordinator::{GuestSession, Map};
use serde_json::{Value, json};

use crate::contender::LIMIT;

/// How long a program in the guest may take to start, and to settle.
const SETTLE: Duration = Duration::from_millis(300);
const PROGRAM: &str = "/usr/bin/disk-io";

/// Microseconds.
#[derive(Debug, Clone, Copy)]
pub struct Latency {
    pub median: f64,
    pub tail: f64,
    /// Longest time between two completions.
    pub gap: f64,
}

/// A probe at work. Nobody asks the agent before it is over: that would disturb what it measures.
#[derive(Debug)]
pub struct Probe<'a> {
    session: &'a mut GuestSession,
    process: Value,
    over: Instant,
}

/// Reads or writes at random in the first `span` bytes of the guest's first disk, for `time`.
pub fn start(
    session: &mut GuestSession,
    write: bool,
    span: u64,
    time: Duration,
) -> Result<Probe<'_>, String> {
    let way = if write { "w" } else { "r" };
    let ms = (time + SETTLE).as_millis().to_string();
    let request = json!({
        "path": PROGRAM, "arg": ["/dev/vda", "time", way, span.to_string(), ms], "capture-output": true,
    });
    let process = ask(session, "guest-exec", &request)?;
    let over = Instant::now() + time + 2 * SETTLE;
    std::thread::sleep(SETTLE);
    Ok(Probe { session, process, over })
}

impl Probe<'_> {
    /// What it saw.
    pub fn end(self) -> Result<Latency, String> {
        std::thread::sleep(self.over.saturating_duration_since(Instant::now()));
        let patience = Instant::now() + LIMIT;
        while Instant::now() < patience {
            let status = ask(self.session, "guest-exec-status", &self.process)?;
            if status["exited"] == true {
                return parse(&status);
            }
            std::thread::sleep(SETTLE / 4);
        }
        Err(format!("{PROGRAM} does not end"))
    }
}

fn parse(status: &Value) -> Result<Latency, String> {
    let output = BASE64_STANDARD.decode(status["out-data"].as_str().unwrap_or_default());
    let text = String::from_utf8_lossy(&output.unwrap_or_default()).into_owned();
    let numbers: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    match numbers[..] {
        [count, median, tail, gap] if count > 0.0 => Ok(Latency { median, tail, gap }),
        _ => Err(format!("{PROGRAM}: {text} {status}")),
    }
}

fn ask(session: &mut GuestSession, command: &str, arguments: &Value) -> Result<Value, String> {
    let arguments: Option<Map> = arguments.as_object().map(|map| map.clone().into_iter().collect());
    session.execute(command, arguments, LIMIT).map_err(|error| format!("{command}: {error}"))
}
