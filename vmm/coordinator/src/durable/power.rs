//! What a power loss would leave, kept beside each file for tests.
//!
//! * `FILE.durable` begins with `+` and has what was last synced behind it, or is `-`: the file would be gone.
//! * `FILE.unnamed` is there while the directory is not synced that gave a new file its name: the new file's inode, and
//!   what of it was synced. A power loss brings back what had the name before.
//!
//! It assumes the worst: whatever was not synced is lost, be it content or a name. What was written, and its sync failed,
//! is not made to last by a later sync of something else, as Linux takes it for clean. That none of it is lost is what
//! happens to a process that is killed.
//!
//! A test that lets power go is over if it cannot write here, so failures panic.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::with_suffix;

const DURABLE: &str = ".durable";
const UNNAMED: &str = ".unnamed";
const THERE: u8 = b'+';
const GONE: u8 = b'-';
/// The inode at the beginning of `FILE.unnamed`.
const INODE: usize = size_of::<u64>();

/// A file gets a name that is not synced; this of its content is.
pub(super) fn is_named(path: &Path, file: &File, content: &[u8]) {
    if !with_suffix(path, DURABLE).exists() {
        keep(path, DURABLE, &[GONE]);
    }
    let inode = inode(file.metadata(), path);
    keep(path, UNNAMED, &[&inode.to_le_bytes(), content].concat());
}

/// A file is about to be replaced or removed: until that is synced it has the content it had.
pub(super) fn is_as_before(path: &Path) {
    if let Ok(file) = File::open(path)
        && path.is_file()
    {
        is_there(&file);
    }
}

/// The directory of a file is synced.
pub(super) fn stays(path: &Path) {
    let unnamed = with_suffix(path, UNNAMED);
    if let Ok(new) = fs::read(&unnamed) {
        // If it did get the name.
        if new[..INODE] == inode(fs::metadata(path), path).to_le_bytes() {
            keep(path, DURABLE, &[&[THERE], &new[INODE..]].concat());
        }
        let _ = fs::remove_file(unnamed);
    }
}

/// The file was unlinked, durably.
pub(super) fn is_gone(path: &Path) {
    keep(path, DURABLE, &[GONE]);
    let _ = fs::remove_file(with_suffix(path, UNNAMED));
}

/// A part of an open file was written and synced. Its name is as durable as it was.
pub(super) fn synced(file: &File, range: Range<u64>) {
    let path = name_of(file);
    let place = |at: u64| usize::try_from(at).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    let range = place(range.start)..place(range.end);
    let written = content(file, &path);
    let patch = |suffix: &str, header: usize| {
        let mut kept = fs::read(with_suffix(&path, suffix)).unwrap_or_default();
        kept.resize(kept.len().max(header + range.end), 0);
        kept[header + range.start..header + range.end].copy_from_slice(&written[range.clone()]);
        keep(&path, suffix, &kept);
    };
    let unnamed = fs::read(with_suffix(&path, UNNAMED)).ok();
    if unnamed.is_some_and(|new| new[..INODE] == inode(file.metadata(), &path).to_le_bytes()) {
        patch(UNNAMED, INODE);
    } else {
        patch(DURABLE, 1);
    }
}

/// A file that somebody made without this: what is in it counts as synced.
pub(super) fn is_there(file: &File) {
    let path = name_of(file);
    if !with_suffix(&path, DURABLE).exists() {
        keep(&path, DURABLE, &[&[THERE], &content(file, &path)[..]].concat());
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
        let Some(path) = name.strip_suffix(DURABLE).map(PathBuf::from) else { continue };
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

fn keep(path: &Path, suffix: &str, bytes: &[u8]) {
    // In one step: a process may be killed anywhere.
    let new = with_suffix(path, &format!("{DURABLE}-{}", std::process::id()));
    let kept = fs::write(&new, bytes).and_then(|()| fs::rename(&new, with_suffix(path, suffix)));
    kept.unwrap_or_else(|error| panic!("{path:?}: {error}"));
}

fn content(file: &File, path: &Path) -> Vec<u8> {
    let read = || -> io::Result<Vec<u8>> {
        let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let mut bytes = vec![0; length];
        // A file that is open for writing only.
        let readable = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        readable.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    };
    read().unwrap_or_else(|error| panic!("{path:?}: {error}"))
}

fn inode(metadata: io::Result<fs::Metadata>, path: &Path) -> u64 {
    metadata.unwrap_or_else(|error| panic!("{path:?}: {error}")).ino()
}

/// Also of a file that came as a descriptor.
fn name_of(file: &File) -> PathBuf {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::read_link(&link).unwrap_or_else(|error| panic!("{link}: {error}"))
}
