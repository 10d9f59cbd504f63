//! The commands, one verb family per file. Names, arguments, results and error texts are those of
//! qemu-ga, whose clients match them.

pub(crate) mod exec;
pub(crate) mod file;
pub(crate) mod fsfreeze;
mod os_release;
mod payload;
pub(crate) mod session;
pub(crate) mod shutdown;
pub(crate) mod system;

use std::fmt::Display;
use std::io;

use protocol::Error;

/// `what`, a colon, and the system's text for the error.
fn failed(what: impl Display, error: &io::Error) -> Error {
    Error::generic(format!("{what}: {}", errno_text(error)))
}

/// The system's text for an error, without the number that `std` appends.
pub(crate) fn errno_text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rsplit_once(" (os error ") {
        Some((text, _)) => text.to_owned(),
        None => text,
    }
}
