//! The lock of a state directory: one process at a time writes there.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};

use super::JournalError;
use super::log::is_same_file;
use crate::durable::Role;
use crate::state_dir::StateDir;

/// The lock of a state directory; the end of the process, whichever way it comes, lets it go.
#[derive(Debug)]
pub(super) struct Lock(pub(super) File);

impl Lock {
    /// Whether it is still the one that others look at.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        is_same_file(&self.0, path)
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing it would do, were there not processes that this one is just starting: until they execute their
        // program they have it open, too.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Takes the lock of a state directory.
pub(super) fn lock(state: &StateDir) -> Result<Lock, JournalError> {
    let path = state.lock();
    let fail = |source| JournalError::File(Role::Journal.failed("lock", &path)(source));
    loop {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(&path).map_err(fail)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let _ = file.read_to_string(&mut text);
                let by = text.trim().parse().ok();
                return Err(JournalError::Locked { vm: state.name().to_owned(), by });
            }
            Err(error) => return Err(fail(error.into())),
        }
        if is_same_file(&file, &path) {
            // For who is refused; nothing depends on it.
            let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
            return Ok(Lock(file));
        }
    }
}
