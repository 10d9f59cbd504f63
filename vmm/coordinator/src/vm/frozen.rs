//! A guest whose filesystems are frozen, for as long as a value lives.

use std::path::Path;
use std::time::Duration;

use super::VmError;
use crate::SessionError;
use crate::journal::Consistency;
use crate::operation::freeze::Freezer;

/// The filesystems of a guest are frozen: programs in it that write there wait, and its disks hold whole filesystems.
///
/// Three things thaw it: [`thaw`](Self::thaw), the end of this value, and the end of the lease, which no bug on this side
/// can forget. If this process dies, the VM's broker notices and thaws, too.
#[derive(Debug)]
#[must_use = "the guest is thawed when this is dropped"]
pub struct Frozen {
    /// Thaws when it goes.
    freezer: Freezer,
    filesystems: u64,
}

impl Frozen {
    pub(super) fn freeze(socket: &Path, lease: Duration) -> Result<Self, SessionError> {
        let mut freezer = Freezer::connect(socket)?;
        let filesystems = freezer.freeze(lease)?;
        Ok(Self { freezer, filesystems })
    }

    /// How many filesystems were frozen.
    pub fn filesystems(&self) -> u64 {
        self.filesystems
    }

    /// What a copy is worth that was made since the freeze, as of now: [`Consistency::Void`] when the guest has thawed in
    /// the meantime. To ask is a sign of life: the lease begins anew.
    ///
    /// # Errors
    /// The agent cannot be asked.
    pub fn consistency(&mut self) -> Result<Consistency, VmError> {
        Ok(self.freezer.consistency()?)
    }

    /// Thaws; what a copy is worth that was made in between.
    ///
    /// # Errors
    /// The agent cannot be asked: then nobody knows whether the guest stayed frozen, and the copy is void.
    pub fn thaw(mut self) -> Result<Consistency, VmError> {
        let worth = self.freezer.consistency();
        self.freezer.thaw()?;
        Ok(worth?)
    }
}
