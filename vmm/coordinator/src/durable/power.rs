//! What a power loss would leave, kept beside each file for tests: `FILE.durable` begins with `+` and has what was last
//! synced behind it, or is `-`, and the file would be gone.
//!
//! `FILE.unnamed` is there while the file has its name and the directory is not synced: what is synced into it then does
//! not count, as a power loss brings back what had the name before.
//!
//! It assumes the worst: whatever was not synced is lost, be it content or a name. That none of it is lost is what
//! happens to a process that is killed. A test that lets power go is over if it cannot write here, so failures panic.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::with_suffix;

const SUFFIX: &str = ".durable";
const UNNAMED: &str = ".unnamed";
const THERE: u8 = b'+';
const GONE: u8 = b'-';

/// A file is about to get a name that is not synced.
pub(super) fn is_new(path: &Path) {
    if !shadow(path).exists() {
        keep(path, &[GONE]);
    }
    let unnamed = fs::write(with_suffix(path, UNNAMED), "");
    unnamed.unwrap_or_else(|error| panic!("{path:?}: {error}"));
}

/// A file is about to be replaced or removed: until that is synced it has the content it had, or is not there.
pub(super) fn is_as_before(path: &Path) {
    if let Ok(file) = File::open(path)
        && path.is_file()
    {
        is_there(&file);
    }
    is_new(path);
}

/// Its name is synced, and so is all of its content.
pub(super) fn stays(path: &Path, file: &File) {
    keep(path, &content(file, path));
    let _ = fs::remove_file(with_suffix(path, UNNAMED));
}

/// The file was unlinked, durably.
pub(super) fn is_gone(path: &Path) {
    keep(path, &[GONE]);
    let _ = fs::remove_file(with_suffix(path, UNNAMED));
}

/// An open file was synced. Its name is as durable as it was.
pub(super) fn synced(file: &File) {
    let path = name_of(file);
    if !with_suffix(&path, UNNAMED).exists() {
        keep(&path, &content(file, &path));
    }
}

/// A file that somebody made without this: what is in it counts as synced.
pub(super) fn is_there(file: &File) {
    let path = name_of(file);
    if !shadow(&path).exists() {
        keep(&path, &content(file, &path));
    }
}

/// Puts back what a power loss would have left of the files in a directory, and tells which have changed.
///
/// # Panics
/// The directory cannot be read, or a file in it not be written.
pub fn lose_power(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap_or_else(|error| panic!("{directory:?}: {error}"));
    let mut changed = Vec::new();
    for shadow in entries.map(|entry| entry.expect("an entry of a directory").path()) {
        let name = shadow.to_string_lossy().into_owned();
        let Some(path) = name.strip_suffix(SUFFIX).map(PathBuf::from) else { continue };
        let _ = fs::remove_file(with_suffix(&path, UNNAMED));
        let kept = fs::read(&shadow).unwrap_or_else(|error| panic!("{shadow:?}: {error}"));
        let before = fs::read(&path).ok();
        let after = match kept.split_first() {
            Some((&THERE, content)) => Some(content.to_vec()),
            _ => None,
        };
        if before == after {
            continue;
        }
        let restored = match &after {
            Some(content) => fs::write(&path, content),
            None => fs::remove_file(&path),
        };
        restored.unwrap_or_else(|error| panic!("{path:?}: {error}"));
        changed.push(path);
    }
    changed.sort();
    changed
}

fn shadow(path: &Path) -> PathBuf {
    with_suffix(path, SUFFIX)
}

fn keep(path: &Path, bytes: &[u8]) {
    // In one step: a process may be killed anywhere.
    let new = with_suffix(path, &format!("{SUFFIX}-{}", std::process::id()));
    let kept = fs::write(&new, bytes).and_then(|()| fs::rename(&new, shadow(path)));
    kept.unwrap_or_else(|error| panic!("{path:?}: {error}"));
}

fn content(file: &File, path: &Path) -> Vec<u8> {
    let read = || -> io::Result<Vec<u8>> {
        let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let mut bytes = vec![THERE; length + 1];
        // A file that is open for writing only.
        let readable = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        readable.read_exact_at(&mut bytes[1..], 0)?;
        Ok(bytes)
    };
    read().unwrap_or_else(|error| panic!("{path:?}: {error}"))
}

/// Also of a file that came as a descriptor.
fn name_of(file: &File) -> PathBuf {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::read_link(&link).unwrap_or_else(|error| panic!("{link}: {error}"))
}
