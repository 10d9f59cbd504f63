//! Opening, freezing and thawing, as far as it is between the agent and the kernel.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::mounts::{self, Device, Superblock, Survey};
use super::order::{self, Backing};
use super::report::{Filesystem, Outcome, Thaw};
use crate::commands::errno_text;

/// FITHAWs of one filesystem: each undoes one freeze, and nobody freezes this often.
pub(super) const THAWS: usize = 1024;

/// What the engine needs of the kernel.
pub(crate) trait Kernel {
    /// An open directory (or file) on a filesystem.
    type Handle;

    /// The content of `/proc/self/mountinfo`.
    fn mountinfo(&self) -> io::Result<Vec<u8>>;

    /// The device number of the block device at `path`; `None` if that is something else.
    fn block_device(&self, path: &Path) -> Option<Device>;

    /// What a block device lies on.
    fn backing(&self, device: Device) -> Vec<Backing>;

    /// Opens a mount point. `NotFound` if the path leads elsewhere than to the mount with this id:
    /// another mount hides it.
    fn open(&self, path: &Path, mount: u64) -> io::Result<Self::Handle>;

    /// Opens a filesystem to which no path leads.
    fn uncover(&self, superblock: &Superblock) -> io::Result<Self::Handle>;

    /// `syncfs(2)`.
    fn sync(&self, handle: &Self::Handle) -> io::Result<()>;

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
    #[error("failed to arm the watchdog")]
    Watchdog(#[source] io::Error),
    #[error("child process has failed to execute fsfreeze hook: {0}")]
    Hook(String),
    #[error("{0}")]
    Cancelled(String),
}

impl FreezeError {
    /// The text for the client: the system's error at its end.
    pub(crate) fn text(&self) -> String {
        match std::error::Error::source(self).and_then(|source| source.downcast_ref()) {
            Some(source) => format!("{self}: {}", errno_text(source)),
            None => self.to_string(),
        }
    }
}

/// A filesystem held open.
#[derive(Debug)]
pub(crate) struct Held<H> {
    pub(crate) superblock: Superblock,
    /// Shared with who has to tell a new watchdog of it.
    pub(crate) handle: Arc<H>,
}

impl<H> Held<H> {
    pub(crate) fn record(&self) -> Filesystem {
        Filesystem {
            mountpoint: self.superblock.mountpoint().to_owned(),
            identity: self.superblock.identity(),
            device: self.superblock.device(),
            fstype: self.superblock.fstype().to_owned(),
            writable: self.superblock.is_writable(),
            outcome: Outcome::Pending,
            took: std::time::Duration::ZERO,
            thaw: None,
        }
    }
}

/// Freezes and thaws; knows nothing of what came before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Engine<K> {
    kernel: K,
}

impl<K: Kernel> Engine<K> {
    pub(crate) fn new(kernel: K) -> Self {
        Self { kernel }
    }

    pub(crate) fn survey(&self) -> Result<Survey, FreezeError> {
        let text = self.kernel.mountinfo().map_err(FreezeError::Mounts)?;
        Ok(mounts::survey(&text, |path| self.kernel.block_device(path)))
    }

    /// Opens filesystems, in the order of freezing them.
    pub(crate) fn open_all(&self, superblocks: &[Superblock]) -> Result<Vec<Held<K::Handle>>, FreezeError> {
        let order = order::freezing_order(superblocks, |device| self.kernel.backing(device));
        let open = |index: usize| {
            let superblock = superblocks[index].clone();
            match self.open(&superblock) {
                Ok(handle) => Ok(Held { superblock, handle: Arc::new(handle) }),
                Err(source) => {
                    Err(FreezeError::Open { mountpoint: superblock.mountpoint().to_owned(), source })
                }
            }
        };
        order.into_iter().map(open).collect()
    }

    /// Opens those filesystems that can be opened, in the order of freezing them.
    pub(crate) fn open_any(&self, superblocks: &[Superblock]) -> Vec<Held<K::Handle>> {
        let order = order::freezing_order(superblocks, |device| self.kernel.backing(device));
        let open = |index: usize| {
            let superblock = superblocks[index].clone();
            self.open(&superblock).ok().map(|handle| Held { superblock, handle: Arc::new(handle) })
        };
        order.into_iter().filter_map(open).collect()
    }

    /// Writes back what is dirty, so that the freeze that follows has less to do while writers wait. A
    /// failure here is the freeze's to report.
    pub(crate) fn sync(&self, held: &Held<K::Handle>) {
        if let Err(error) = self.kernel.sync(&held.handle) {
            crate::log::warning(format_args!(
                "Cannot sync {}: {error}",
                held.superblock.mountpoint().display()
            ));
        }
    }

    /// Freezes one filesystem.
    pub(crate) fn freeze(&self, held: &Held<K::Handle>, record: &mut Filesystem) -> Result<(), FreezeError> {
        let start = Instant::now();
        let result = self.kernel.freeze(&held.handle);
        record.took = start.elapsed();
        record.outcome = match &result {
            Ok(()) => Outcome::Frozen,
            Err(error) => match error.raw_os_error() {
                Some(libc::EOPNOTSUPP) => Outcome::Unsupported,
                Some(libc::EBUSY) => Outcome::Busy,
                _ => Outcome::Failed(errno_text(error)),
            },
        };
        match (result, &record.outcome) {
            (Err(source), Outcome::Failed(_)) => {
                Err(FreezeError::Freeze { mountpoint: record.mountpoint.clone(), source })
            }
            _ => Ok(()),
        }
    }

    /// Thaws until the kernel says that there is nothing to thaw; whether there was anything.
    pub(crate) fn thaw(&self, handle: &K::Handle) -> io::Result<bool> {
        for thawed in 0..THAWS {
            match self.kernel.thaw(handle) {
                Ok(()) => {}
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(thawed > 0),
                // Cannot freeze, so it is not frozen.
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(false),
                Err(_) if thawed > 0 => return Ok(true),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Thaws a filesystem that is held.
    pub(crate) fn thaw_held(&self, held: &Held<K::Handle>) -> (Thaw, Result<bool, FreezeError>) {
        match self.thaw(&held.handle) {
            Ok(true) => (Thaw::Thawed, Ok(true)),
            Ok(false) => (Thaw::NotFrozen, Ok(false)),
            Err(source) => {
                let mountpoint = held.superblock.mountpoint().to_owned();
                (Thaw::Failed(errno_text(&source)), Err(FreezeError::Thaw { mountpoint, source }))
            }
        }
    }

    /// Thaws every filesystem but those in `seen`, whoever froze it; returns how many were frozen.
    pub(crate) fn thaw_others(&self, seen: &[Device]) -> Result<u64, FreezeError> {
        let survey = self.survey()?;
        let others = survey.superblocks.iter().filter(|superblock| !seen.contains(&superblock.identity()));
        let thawed = others.filter(|superblock| {
            let handle = self.open(superblock).ok();
            handle.is_some_and(|handle| self.thaw(&handle).unwrap_or(false))
        });
        Ok(thawed.count() as u64)
    }

    /// Opens a filesystem by whichever of its mounts can be reached; the error is the first one's.
    fn open(&self, superblock: &Superblock) -> io::Result<K::Handle> {
        let mut failure: Option<io::Error> = None;
        for mount in superblock.mounts() {
            match self.kernel.open(&mount.mountpoint, mount.id) {
                Ok(handle) => return Ok(handle),
                Err(error) => {
                    failure.get_or_insert(error);
                }
            }
        }
        let failure = failure.unwrap_or_else(|| ErrorKind::NotFound.into());
        if matches!(failure.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
            && let Ok(handle) = self.kernel.uncover(superblock)
        {
            return Ok(handle);
        }
        Err(failure)
    }
}
