//! Files that have to survive a crash: everything that is written to one goes through here.
//!
//! ```text
//!   create    exclusively ▶ write ▶ fsync ▶ fsync directory
//!   write_at  write ▶ fdatasync                                      (journal and witness; their size never changes)
//!   replace   FILE.new: write ▶ fsync ▶ rename over FILE ▶ fsync directory
//!   place_new the same, and the rename fails if FILE is there
//!   remove    unlink ▶ fsync directory
//! ```
//!
//! Each returns when a power loss cannot undo it any more. One that has failed may have happened or not, and may
//! happen later: Linux tells a writeback error once and forgets it, so to sync the same bytes again proves nothing. To
//! *write* them again and then sync does.
//!
//! With the feature `failpoints` each step is a place where the process can be let die ([`crate::failpoint`]), and
//! beside each file lies `FILE.durable`, from which [`lose_power`] restores what a power loss would have left.

#[cfg(feature = "failpoints")]
mod power;

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, OFlags, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::failpoint;

#[cfg(feature = "failpoints")]
pub use power::lose_power;

/// tmpfs, ramfs and hugetlbfs (Linux `include/uapi/linux/magic.h`).
const VOLATILE: [u32; 3] = [0x0102_1994, 0x8584_58f6, 0x9584_58f6];

const DIRECTORY: &str = "the directory";

/// Why a file cannot be made to last.
#[derive(Debug, thiserror::Error)]
pub enum DurableError {
    /// The kernel refused.
    #[error("Cannot {action} {what} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what: `the journal`, …
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Files in memory take every sync and keep nothing.
    #[error("Cannot keep {what} {} on a filesystem in memory, which does not survive a crash of this machine", path.display())]
    Volatile {
        /// What was to be kept.
        what: &'static str,
        /// Where.
        path: PathBuf,
    },
}

impl DurableError {
    /// Whether the file was not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Whether the file was there already.
    pub fn is_already_there(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists)
    }
}

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Journal,
    Witness,
    Disks,
    Stamp,
}

impl Role {
    /// To failpoints.
    fn name(self) -> &'static str {
        match self {
            Self::Journal => "journal",
            Self::Witness => "witness",
            Self::Disks => "disks",
            Self::Stamp => "stamp",
        }
    }

    /// The mistake not to sync it.
    fn unsynced(self) -> &'static str {
        match self {
            Self::Journal => "journal-unsynced",
            Self::Witness => "witness-unsynced",
            Self::Disks | Self::Stamp => "unsynced",
        }
    }

    /// To people.
    fn words(self) -> &'static str {
        match self {
            Self::Journal => "the journal",
            Self::Witness => "the witness",
            Self::Disks => "the durable configuration",
            Self::Stamp => "the stamp",
        }
    }

    pub(crate) fn failed(
        self,
        action: &'static str,
        path: &Path,
    ) -> impl FnOnce(io::Error) -> DurableError + use<> {
        failed(action, self.words(), path)
    }
}

fn failed(
    action: &'static str,
    what: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> DurableError + use<> {
    let path = path.to_owned();
    move |source| DurableError::Io { action, what, path, source }
}

/// Refuses a file or directory that only lives in memory.
///
/// # Errors
/// [`DurableError`].
fn check_filesystem(fd: impl AsFd, what: &'static str, path: &Path) -> Result<(), DurableError> {
    let filesystem = rustix::fs::fstatfs(fd)
        .map_err(|error| failed("look at", "the filesystem of", path)(error.into()))?;
    let kind = u32::try_from(filesystem.f_type).unwrap_or_default();
    if VOLATILE.contains(&kind) {
        return Err(DurableError::Volatile { what, path: path.to_owned() });
    }
    Ok(())
}

/// A file whose writes last.
#[derive(Debug)]
pub(crate) struct Durable {
    role: Role,
    path: PathBuf,
    file: File,
}

impl Durable {
    /// Makes a file with this content.
    pub(crate) fn create(role: Role, path: &Path, content: &[u8]) -> Result<Self, DurableError> {
        let place = |point| failpoint::pass([role.name(), "create", point]);
        place("before").map_err(role.failed("create", path))?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(path).map_err(role.failed("create", path))?;
        let created = Self { role, path: path.to_owned(), file };
        check_filesystem(&created.file, role.words(), path)?;
        #[cfg(feature = "failpoints")]
        power::is_named(path, &created.file, &[]);
        created.file.write_all_at(content, 0).map_err(role.failed("write", path))?;
        place("written").map_err(role.failed("sync", path))?;
        created.file.sync_all().map_err(role.failed("sync", path))?;
        #[cfg(feature = "failpoints")]
        power::is_named(path, &created.file, content);
        place("synced").map_err(role.failed("sync", path))?;
        sync_directory_of(path)?;
        #[cfg(feature = "failpoints")]
        power::stays(path);
        place("done").map_err(role.failed("sync the directory of", path))?;
        Ok(created)
    }

    /// Opens a file for reading and writing.
    pub(crate) fn open(role: Role, path: &Path) -> Result<Self, DurableError> {
        let opened = OpenOptions::new().read(true).write(true).open(path);
        Self::check(Self { role, path: path.to_owned(), file: opened.map_err(role.failed("open", path))? })
    }

    /// Opens a file for reading.
    pub(crate) fn open_to_read(role: Role, path: &Path) -> Result<Self, DurableError> {
        let file = File::open(path).map_err(role.failed("open", path))?;
        Ok(Self { role, path: path.to_owned(), file })
    }

    /// Takes a file that somebody else opened; `name` is for messages.
    ///
    /// # Errors
    /// It cannot be read and written at any place, or it only lives in memory.
    pub(crate) fn adopt(role: Role, fd: OwnedFd, name: &str) -> Result<Self, DurableError> {
        let flags = rustix::fs::fcntl_getfl(&fd)
            .map_err(|error| role.failed("use", Path::new(name))(error.into()))?;
        // With O_APPEND a write goes to the end, wherever it is meant to go (pwrite(2)).
        if flags & OFlags::RWMODE != OFlags::RDWR || flags.contains(OFlags::APPEND) {
            return Err(role.failed("use", Path::new(name))(io::Error::new(
                io::ErrorKind::InvalidInput,
                "It has to be open for reading and writing, and not for appending",
            )));
        }
        Self::check(Self { role, path: name.into(), file: fd.into() })
    }

    fn check(self) -> Result<Self, DurableError> {
        check_filesystem(&self.file, self.role.words(), &self.path)?;
        #[cfg(feature = "failpoints")]
        power::is_there(&self.file);
        Ok(self)
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads from `offset` on, as much as there is: what is beyond the end stays as it was.
    pub(crate) fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<(), DurableError> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.file.read_at(&mut bytes[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.role.failed("read", &self.path)(error)),
            }
        }
        Ok(())
    }

    /// Makes its name last as well: who gave it that may have died before it did.
    pub(crate) fn sync_name(&self) -> Result<(), DurableError> {
        sync_directory_of(&self.path)?;
        #[cfg(feature = "failpoints")]
        power::stays(&self.path);
        Ok(())
    }

    /// Writes with one system call and syncs. `step` is the failpoint's.
    pub(crate) fn write_at(&self, bytes: &[u8], offset: u64, step: &str) -> Result<(), DurableError> {
        let place = |point| failpoint::pass([self.role.name(), step, point]);
        place("before").map_err(self.role.failed("write", &self.path))?;
        self.file.write_all_at(bytes, offset).map_err(self.role.failed("write", &self.path))?;
        place("written").map_err(self.role.failed("sync", &self.path))?;
        if !failpoint::mistake(self.role.unsynced()) {
            self.file.sync_data().map_err(self.role.failed("sync", &self.path))?;
            #[cfg(feature = "failpoints")]
            power::synced(&self.file, offset..offset + bytes.len() as u64);
        }
        place("synced").map_err(self.role.failed("sync", &self.path))
    }
}

/// Gives the file at `path` another content: a crash leaves the old one or the new one. `step` is the failpoint's.
pub(crate) fn replace(role: Role, path: &Path, content: &[u8], step: &str) -> Result<(), DurableError> {
    put(role, path, content, step, |new| fs::rename(new, path))
}

/// Makes a file that is not there yet, whole: a crash leaves none or all of it.
///
/// # Errors
/// [`DurableError::is_already_there`].
pub(crate) fn place_new(role: Role, path: &Path, content: &[u8], step: &str) -> Result<(), DurableError> {
    put(role, path, content, step, |new| match renameat_with(CWD, new, CWD, path, RenameFlags::NOREPLACE) {
        // Filesystems on a network know of no such thing.
        Err(Errno::INVAL) if !path.try_exists()? => fs::rename(new, path),
        renamed => Ok(renamed?),
    })
}

fn put(
    role: Role,
    path: &Path,
    content: &[u8],
    step: &str,
    rename: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<(), DurableError> {
    let place = |point| failpoint::pass([role.name(), step, point]);
    place("before").map_err(role.failed("write", path))?;
    let new = with_suffix(path, ".new");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let file = options.open(&new).map_err(role.failed("create", &new))?;
    check_filesystem(&file, role.words(), path)?;
    file.write_all_at(content, 0).map_err(role.failed("write", &new))?;
    place("written").map_err(role.failed("sync", &new))?;
    file.sync_all().map_err(role.failed("sync", &new))?;
    place("synced").map_err(role.failed("sync", &new))?;
    #[cfg(feature = "failpoints")]
    {
        power::is_as_before(path);
        power::is_named(path, &file, content);
    }
    rename(&new).map_err(role.failed("replace", path))?;
    place("renamed").map_err(role.failed("sync the directory of", path))?;
    sync_directory_of(path)?;
    #[cfg(feature = "failpoints")]
    power::stays(path);
    place("done").map_err(role.failed("sync the directory of", path))
}

/// Removes a file; `false` if there was none, which lasts as well.
pub(crate) fn remove(role: Role, path: &Path) -> Result<bool, DurableError> {
    let place = |point| failpoint::pass([role.name(), "remove", point]);
    place("before").map_err(role.failed("remove", path))?;
    #[cfg(feature = "failpoints")]
    power::is_as_before(path);
    match fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return stays_removed(path).map(|()| false),
        Err(error) => return Err(role.failed("remove", path)(error)),
    }
    place("written").map_err(role.failed("sync the directory of", path))?;
    sync_directory_of(path)?;
    #[cfg(feature = "failpoints")]
    power::is_gone(path);
    place("done").map_err(role.failed("sync the directory of", path))?;
    Ok(true)
}

/// Refuses a directory that only lives in memory.
pub(crate) fn check_directory(path: &Path, what: &'static str) -> Result<(), DurableError> {
    let directory = File::open(path).map_err(failed("open", DIRECTORY, path))?;
    check_filesystem(&directory, what, path)
}

const IMAGE: &str = "the image";

/// Makes an image of so many bytes, all zero; it lasts, like its name.
pub(crate) fn create_image(path: &Path, size: u64) -> Result<(), DurableError> {
    let place = |point| failpoint::pass(["image", "create", point]);
    place("before").map_err(failed("create", IMAGE, path))?;
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let file = file.map_err(failed("create", IMAGE, path))?;
    file.set_len(size).map_err(failed("size", IMAGE, path))?;
    place("written").map_err(failed("sync", IMAGE, path))?;
    file.sync_all().map_err(failed("sync", IMAGE, path))?;
    place("synced").map_err(failed("sync", IMAGE, path))?;
    sync_directory_of(path)?;
    place("done").map_err(failed("sync the directory of", IMAGE, path))
}

/// Syncs what others have written to an image.
pub(crate) fn sync_image(path: &Path) -> Result<(), DurableError> {
    let place = |point| failpoint::pass(["image", "sync", point]);
    place("before").map_err(failed("sync", IMAGE, path))?;
    let file = OpenOptions::new().write(true).open(path).map_err(failed("open", IMAGE, path))?;
    file.sync_all().map_err(failed("sync", IMAGE, path))?;
    place("done").map_err(failed("sync", IMAGE, path))
}

/// Removes an image, durably. One that is not there is no error.
pub(crate) fn remove_image(path: &Path) -> Result<(), DurableError> {
    let place = |point| failpoint::pass(["image", "remove", point]);
    place("before").map_err(failed("remove", IMAGE, path))?;
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => {
            removed.map_err(failed("remove", IMAGE, path))?;
            place("written").map_err(failed("sync the directory of", IMAGE, path))?;
            sync_directory_of(path)?;
            place("done").map_err(failed("sync the directory of", IMAGE, path))
        }
    }
}

/// Who removed it may have died before that was to last.
fn stays_removed(path: &Path) -> Result<(), DurableError> {
    match sync_directory_of(path) {
        Err(error) if error.is_not_found() => return Ok(()),
        synced => synced?,
    }
    #[cfg(feature = "failpoints")]
    power::is_gone(path);
    Ok(())
}

/// Makes a directory and those above it, for this user alone; it lasts, like its name.
pub(crate) fn make_directory(path: &Path) -> Result<(), DurableError> {
    let parent = directory_of(path);
    match DirBuilder::new().mode(0o700).create(path) {
        // One that was there may have been made just before a crash of its maker: its name is synced all the same.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound && parent != path => {
            make_directory(parent)?;
            return make_directory(path);
        }
        created => created.map_err(failed("create", DIRECTORY, path))?,
    }
    let directory = File::open(path).map_err(failed("open", DIRECTORY, path))?;
    check_filesystem(&directory, DIRECTORY, path)?;
    sync_directory_of(path)
}

fn sync_directory_of(path: &Path) -> Result<(), DurableError> {
    let directory = directory_of(path);
    let opened = File::open(directory).map_err(failed("open", DIRECTORY, directory))?;
    opened.sync_all().map_err(failed("sync", DIRECTORY, directory))
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// `path` with something behind its last name.
pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_made_with_all_above_it_and_once_more_is_no_mistake() {
        let base = tempfile::tempdir().unwrap();
        let deep = base.path().join("a/b/c");
        make_directory(&deep).unwrap();
        make_directory(&deep).unwrap();
        assert!(deep.is_dir());
        fs::write(base.path().join("file"), "").unwrap();
        assert!(make_directory(&base.path().join("file")).is_err());
        assert!(make_directory(&base.path().join("file/below")).is_err());
    }

    #[test]
    fn memory_is_no_place_for_what_has_to_last() {
        let base = tempfile::tempdir_in("/dev/shm").unwrap();
        let error = make_directory(&base.path().join("vm")).unwrap_err();
        assert!(matches!(error, DurableError::Volatile { .. }), "{error}");
        let error = replace(Role::Disks, &base.path().join("disks.json"), b"{}", "commit").unwrap_err();
        assert!(matches!(error, DurableError::Volatile { .. }), "{error}");
        assert!(!base.path().join("disks.json").exists());
    }

    #[test]
    fn a_new_file_takes_no_other_ones_place() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("f");
        place_new(Role::Stamp, &path, b"first", "incomplete").unwrap();
        let error = place_new(Role::Stamp, &path, b"second", "incomplete").unwrap_err();
        assert!(error.is_already_there(), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "first");
    }

    #[test]
    fn a_file_is_replaced_whole_and_removed_once() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("f");
        for content in ["first", "second, longer", "3"] {
            replace(Role::Disks, &path, content.as_bytes(), "commit").unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
        assert!(remove(Role::Disks, &path).unwrap());
        assert!(!remove(Role::Disks, &path).unwrap());
    }
}
