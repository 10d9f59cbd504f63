//! The commands, one verb family per file. Names, arguments, results and error texts are those of
//! qemu-ga, whose clients match them.

mod accounts;
mod child;
mod disk_address;
pub(crate) mod disks;
pub(crate) mod exec;
pub(crate) mod file;
pub(crate) mod filesystems;
pub(crate) mod fsfreeze;
pub(crate) mod memory_blocks;
pub(crate) mod network;
mod os_release;
mod payload;
mod root;
pub(crate) mod session;
pub(crate) mod shutdown;
pub(crate) mod ssh;
pub(crate) mod statistics;
pub(crate) mod suspend;
pub(crate) mod system;
pub(crate) mod time;
pub(crate) mod users;
pub(crate) mod vcpus;

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

#[cfg(test)]
mod tests {
    use protocol::{Args, ErrorClass, Map};

    use crate::dispatch;
    use crate::guest::Guest;
    use crate::schema::Run;

    #[test]
    fn whatever_this_machine_is_like_facts_about_it_are_of_their_declared_types() {
        let directory = tempfile::tempdir().unwrap();
        let mut guest = Guest::for_test(directory.path());
        let mut asked = 0;
        let is_get = |name: &str| name.starts_with("guest-get-") || name.starts_with("guest-network-get-");
        for command in dispatch::all().filter(|command| is_get(command.name)) {
            let Run::Worker(handler) = command.run else { panic!("{} may take long", command.name) };
            match handler(&mut guest, Args::new(Map::new())) {
                Ok(value) => {
                    let checked = command.returns.check(&value);
                    assert_eq!(checked, Ok(()), "{}", command.name);
                }
                // A container may lack what a machine has.
                Err(error) => assert_eq!(error.class, ErrorClass::GenericError, "{}: {error}", command.name),
            }
            asked += 1;
        }
        assert!(asked >= 14, "only {asked} commands tell facts");
    }
}
