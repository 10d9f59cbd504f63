//! The daemon's pid file: locked for as long as the agent lives, removed when it ends.
//!
//! The lock belongs to the process (fcntl(2), `F_SETLK`): it goes with the agent and not with a watchdog that
//! outlives it, and a reference agent with the same pid file respects it. While filesystems are frozen the file cannot be
//! created; an agent that starts frozen makes up for it after the thaw.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rustix::fs::{FlockOperation, fcntl_lock};

use crate::log;

#[derive(Debug)]
enum PidFile {
    None,
    /// To be created after the thaw.
    Deferred(PathBuf),
    /// The file is kept open, for closing it would drop the lock.
    Held(PathBuf, File),
}

static PID_FILE: Mutex<PidFile> = Mutex::new(PidFile::None);

/// Creates the file and locks it.
///
/// # Errors
///
/// Also if another agent has it.
pub(crate) fn create(path: &Path) -> io::Result<()> {
    let file = write(path)?;
    *PID_FILE.lock() = PidFile::Held(path.to_owned(), file);
    Ok(())
}

/// Leaves that to [`release`].
pub(crate) fn defer(path: &Path) {
    *PID_FILE.lock() = PidFile::Deferred(path.to_owned());
}

/// The filesystems have thawed: creates the file if it was deferred. By now the agent serves, so it goes on without
/// if that fails.
pub(crate) fn release() {
    let mut pid_file = PID_FILE.lock();
    let PidFile::Deferred(path) = &*pid_file else { return };
    match write(path) {
        Ok(file) => *pid_file = PidFile::Held(path.clone(), file),
        Err(error) => {
            log::error(format_args!("Cannot create the pid file {}: {error}", path.display()));
            *pid_file = PidFile::None;
        }
    }
}

/// Removes the file, if it is there. Only while nothing is frozen.
pub(crate) fn remove() {
    if let PidFile::Held(path, _locked) = std::mem::replace(&mut *PID_FILE.lock(), PidFile::None) {
        let _ = fs::remove_file(path);
    }
}

fn write(path: &Path) -> io::Result<File> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)?;
    file.set_len(0)?;
    writeln!(file, "{}", std::process::id())?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deferred_file_appears_with_the_thaw_and_goes_at_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pid");
        defer(&path);
        assert!(!path.exists());
        release();
        let content = fs::read_to_string(&path).unwrap();
        assert_eq!(content, format!("{}\n", std::process::id()));
        release();
        remove();
        assert!(!path.exists());
        release();
        assert!(!path.exists());
    }
}
