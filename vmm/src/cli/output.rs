//! Standard output and standard error of the command line.

use std::io::{self, Write};

use anyhow::Context;

/// Whoever read our output has left (`tarn ps | head -1`): no reason to complain, but to stop.
#[derive(Debug, thiserror::Error)]
#[error("Standard output is closed")]
pub(super) struct Closed;

/// Writes `bytes` to standard output.
pub(super) fn print(bytes: impl AsRef<[u8]>) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    or_closed(stdout.write_all(bytes.as_ref()).and_then(|()| stdout.flush()))
}

/// Writes `value` to standard output, as JSON for people and programs.
pub(super) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(serde_json::to_string_pretty(value)? + "\n")
}

/// Tells a result of writing to standard output apart from the departure of its reader.
pub(super) fn or_closed(result: io::Result<()>) -> anyhow::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Closed.into()),
        result => result.context("Cannot write to standard output"),
    }
}

/// [`complain`], below whatever a guest has left in the current line of the terminal.
pub(super) fn complain_below(text: &str) {
    let _ = writeln!(io::stderr(), "\ntarn: {text}");
}

/// Says what is wrong, once, on standard error. There is nobody left to tell when that fails.
pub(super) fn complain(text: &str) {
    let _ = writeln!(io::stderr(), "tarn: {text}");
}
