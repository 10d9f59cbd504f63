//! Freezing and thawing the guest's filesystems.
//!
//! ```text
//!           freeze: open all ─▶ state file ─▶ FIFREEZE, last mounted first
//!  ┌────────┐ ───────────────────────────────────────────────────────────▶ ┌────────┐
//!  │ Thawed │                                                              │ Frozen │ holds the
//!  └────────┘ ◀─────────────────────────────────────────────────────────── └────────┘ descriptors
//!           thaw: FITHAW until the kernel says no ─▶ unlink state file
//! ```
//!
//! Every descriptor is open before the first filesystem is frozen: a mount that cannot be opened fails
//! the freeze while nothing is frozen, and the thaw depends on no path. Holding them until the thaw
//! makes `umount` say busy instead of leaving a frozen filesystem that nobody can reach.
//!
//! The state file is there before the first filesystem is frozen and until the last one is thawed, so
//! that an agent that starts anew knows that it has to thaw. Its name is the reference agent's: either
//! takes over from the other.

mod linux;
mod mounts;

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) use self::linux::Linux;
pub(crate) use self::mounts::{Device, Superblock, mountpoints, superblocks};
use crate::log;

/// FITHAWs of one filesystem: each undoes one freeze, and nobody freezes this often.
const THAWS: usize = 1024;

/// What the engine needs of the kernel.
pub(crate) trait Kernel {
    /// An open directory (or file) on a filesystem.
    type Handle;

    /// The content of `/proc/self/mountinfo`.
    fn mountinfo(&self) -> io::Result<Vec<u8>>;

    /// The device number of the block device at `path`; `None` if that is something else.
    fn block_device(&self, path: &Path) -> Option<Device>;

    /// Opens a mount point. `NotFound` if the path leads elsewhere than to the mount with this id:
    /// another mount hides it.
    fn open(&self, path: &Path, mount: u64) -> io::Result<Self::Handle>;

    /// `ioctl(FIFREEZE)`: returns when everything dirty is on the disk.
    fn freeze(&self, handle: &Self::Handle) -> io::Result<()>;

    /// `ioctl(FITHAW)`.
    fn thaw(&self, handle: &Self::Handle) -> io::Result<()>;
}

/// Why a freeze or a thaw failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FreezeError {
    #[error("failed to open /proc/self/mountinfo")]
    Mounts(#[source] io::Error),
    #[error("failed to open {}", mountpoint.display())]
    Open { mountpoint: PathBuf, source: io::Error },
    #[error("failed to freeze {}", mountpoint.display())]
    Freeze { mountpoint: PathBuf, source: io::Error },
    #[error("failed to thaw {}", mountpoint.display())]
    Thaw { mountpoint: PathBuf, source: io::Error },
}

/// What other threads may know of a [`Freezer`].
#[derive(Debug, Default)]
pub(crate) struct Freezing {
    frozen: AtomicBool,
}

impl Freezing {
    pub(crate) fn is_frozen(&self) -> bool {
        self.frozen.load(Ordering::Acquire)
    }
}

/// Knows what is frozen, and freezes and thaws.
#[derive(Debug)]
pub(crate) struct Freezer<K: Kernel> {
    freezing: Arc<Freezing>,
    kernel: K,
    state_file: PathBuf,
    state: State<K::Handle>,
}

#[derive(Debug)]
enum State<H> {
    Thawed,
    /// By this agent (then these are held) or by a former one (then nothing is).
    Frozen(Vec<Held<H>>),
}

#[derive(Debug)]
struct Held<H> {
    superblock: Superblock,
    handle: H,
}

impl<K: Kernel> Freezer<K> {
    /// Frozen if the state file is there, and also if that cannot be told: then a thaw does no harm.
    pub(crate) fn new(kernel: K, statedir: &Path) -> Self {
        let state_file = statedir.join("qga.state.isfrozen");
        let state = match fs::symlink_metadata(&state_file) {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                State::Thawed
            }
            found => {
                let why = found.err().map_or_else(|| "exists".into(), |error| error.to_string());
                log::warning(format_args!(
                    "{}: {why}; taking the filesystems to be frozen until guest-fsfreeze-thaw",
                    state_file.display()
                ));
                log::hold();
                State::Frozen(Vec::new())
            }
        };
        let freezing = Arc::new(Freezing { frozen: AtomicBool::new(matches!(state, State::Frozen(_))) });
        Self { freezing, kernel, state_file, state }
    }

    /// What other threads may know.
    pub(crate) fn freezing(&self) -> &Arc<Freezing> {
        &self.freezing
    }

    fn set(&mut self, state: State<K::Handle>) {
        self.freezing.frozen.store(matches!(state, State::Frozen(_)), Ordering::Release);
        self.state = state;
    }

    pub(crate) fn is_frozen(&self) -> bool {
        matches!(self.state, State::Frozen(_))
    }

    /// Freezes every filesystem on a block device; returns how many. Filesystems that cannot freeze
    /// and those that somebody else froze do not count.
    ///
    /// # Errors
    ///
    /// The first failure, after everything was thawed again.
    pub(crate) fn freeze(&mut self) -> Result<u64, FreezeError> {
        let handles = self.open_all()?;
        if let Err(error) = self.create_state_file() {
            log::warning(format_args!("Cannot create {}: {error}", self.state_file.display()));
        }
        let mut frozen = Vec::new();
        for held in handles.into_iter().rev() {
            match self.kernel.freeze(&held.handle) {
                Ok(()) => frozen.push(held),
                Err(error) if is_no_failure(&error) => {}
                Err(source) => {
                    let mountpoint = held.superblock.mountpoint().to_owned();
                    self.set(State::Frozen(frozen));
                    if let Err(error) = self.thaw() {
                        log::error(format_args!("{error} after a failed freeze"));
                    }
                    return Err(FreezeError::Freeze { mountpoint, source });
                }
            }
        }
        let count = frozen.len() as u64;
        if frozen.is_empty() {
            self.unlink_state_file();
        } else {
            self.set(State::Frozen(frozen));
        }
        Ok(count)
    }

    /// Thaws everything, whoever froze it and whether or not anything is known to be frozen; returns
    /// how many filesystems were frozen.
    ///
    /// # Errors
    ///
    /// When a filesystem stays frozen, or when it cannot be told what is mounted and nothing was
    /// thawed. The state stays "frozen" then, and another thaw is allowed.
    pub(crate) fn thaw(&mut self) -> Result<u64, FreezeError> {
        let (was_frozen, held) = match std::mem::replace(&mut self.state, State::Thawed) {
            State::Thawed => (false, Vec::new()),
            State::Frozen(held) => (true, held),
        };
        let mut count = 0;
        let mut failure = None;
        let mut seen = Vec::new();
        let mut stuck = Vec::new();
        for held in held.into_iter().rev() {
            match self.thaw_one(&held.handle) {
                Ok(thawed) => {
                    count += u64::from(thawed);
                    seen.push(held.superblock.device());
                }
                Err(source) => {
                    let mountpoint = held.superblock.mountpoint().to_owned();
                    failure.get_or_insert(FreezeError::Thaw { mountpoint, source });
                    stuck.push(held);
                }
            }
        }
        match self.superblocks() {
            Ok(superblocks) => {
                let others = superblocks.iter().filter(|superblock| !seen.contains(&superblock.device()));
                count += others.map(|superblock| u64::from(self.thaw_at_mountpoint(superblock))).sum::<u64>();
            }
            Err(error) if count == 0 => failure = failure.or(Some(error)),
            Err(error) => log::warning(format_args!("{error}")),
        }
        match failure {
            None => {
                self.set(State::Thawed);
                self.unlink_state_file();
                Ok(count)
            }
            Some(error) => {
                if was_frozen {
                    self.set(State::Frozen(stuck));
                }
                Err(error)
            }
        }
    }

    fn superblocks(&self) -> Result<Vec<Superblock>, FreezeError> {
        let text = self.kernel.mountinfo().map_err(FreezeError::Mounts)?;
        Ok(mounts::superblocks(&text, |path| self.kernel.block_device(path)))
    }

    fn open_all(&self) -> Result<Vec<Held<K::Handle>>, FreezeError> {
        let open = |superblock: Superblock| match self.open(&superblock) {
            Ok(handle) => Ok(Held { superblock, handle }),
            Err(source) => Err(FreezeError::Open { mountpoint: superblock.mountpoint().to_owned(), source }),
        };
        self.superblocks()?.into_iter().map(open).collect()
    }

    /// Opens a filesystem by whichever of its mounts can be reached; the error is the first one's.
    fn open(&self, superblock: &Superblock) -> io::Result<K::Handle> {
        let mut failure = None;
        for mount in superblock.mounts() {
            match self.kernel.open(&mount.mountpoint, mount.id) {
                Ok(handle) => return Ok(handle),
                Err(error) => {
                    failure.get_or_insert(error);
                }
            }
        }
        Err(failure.unwrap_or_else(|| ErrorKind::NotFound.into()))
    }

    /// A filesystem this agent did not freeze: whether it was frozen, and is not any more.
    fn thaw_at_mountpoint(&self, superblock: &Superblock) -> bool {
        let handle = self.open(superblock).ok();
        handle.is_some_and(|handle| self.thaw_one(&handle).unwrap_or(false))
    }

    /// Thaws until the kernel says that there is nothing to thaw; whether there was anything.
    fn thaw_one(&self, handle: &K::Handle) -> io::Result<bool> {
        for thawed in 0..THAWS {
            match self.kernel.thaw(handle) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(thawed > 0),
                Err(_) if thawed > 0 => return Ok(true),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn create_state_file(&self) -> io::Result<()> {
        OpenOptions::new().append(true).create(true).mode(0o600).open(&self.state_file).map(drop)
    }

    fn unlink_state_file(&self) {
        match fs::remove_file(&self.state_file) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                log::warning(format_args!("Cannot remove {}: {error}", self.state_file.display()));
            }
            _ => {}
        }
    }
}

/// The filesystem has no freeze, or is frozen already.
fn is_no_failure(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EBUSY))
}

#[cfg(test)]
mod tests;
