//! What the processes of one run have to know of it, handed to each as JSON.

use std::path::{Path, PathBuf};

use block::{EngineKind, Errno, FaultOperation, FaultRule};
use coordinator::StateDir;
use coordinator::journal::{OperationKind, Protocol};
use coordinator::operation::{Connection, CopyMode, Request, Settings};
use coordinator::record::Operation;
use coordinator::stamp::{Stamp, StampKind};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::mistakes::Mistake;

/// Bytes of each disk.
pub(crate) const SIZE: u64 = 1 << 20;
/// The VM's name.
const NAME: &str = "vm";

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Recipe {
    pub(crate) kind: OperationKind,
    pub(crate) protocol: Protocol,
    pub(crate) disks: usize,
    pub(crate) freeze: bool,
    pub(crate) pause: bool,
    /// Writes of the guest go to both images while they are mirrored.
    pub(crate) write_blocking: bool,
    /// The targets are there before, and another VM has left them behind.
    pub(crate) reuse: bool,
}

/// An error of the target's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TargetFault {
    /// Of flushes, or else of writes.
    pub(crate) flush: bool,
    /// Operations that pass before.
    pub(crate) after: u64,
    pub(crate) count: u64,
    /// ENOSPC, or else EIO.
    pub(crate) nospace: bool,
}

impl TargetFault {
    pub(crate) fn rule(self) -> FaultRule {
        let operation = if self.flush { FaultOperation::Flush } else { FaultOperation::Write };
        let errno = if self.nospace { libc::ENOSPC } else { libc::EIO };
        FaultRule {
            after: self.after,
            count: self.count,
            errno: Some(Errno::new(errno)),
            ..FaultRule::new(operation)
        }
    }
}

/// One run, as its processes see it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) recipe: Recipe,
    pub(crate) target_fault: Option<TargetFault>,
    /// Disks have volatile caches: whoever kills the VMM cuts the power.
    pub(crate) power: bool,
    pub(crate) seed: u64,
    pub(crate) mistake: Option<Mistake>,
    /// Images and state.
    pub(crate) directory: PathBuf,
    /// Sockets: names of those are short.
    pub(crate) sockets: PathBuf,
}

impl Setup {
    pub(crate) fn disk(index: usize) -> String {
        format!("vd{}", ["a", "b", "c"][index])
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.directory.join("images")
    }

    pub(crate) fn source(&self, disk: usize) -> PathBuf {
        self.images().join(format!("{}.raw", Self::disk(disk)))
    }

    pub(crate) fn target(&self, disk: usize) -> PathBuf {
        self.images().join(format!("{}-new.raw", Self::disk(disk)))
    }

    /// What a target holds that was there before.
    pub(crate) fn left_behind() -> Vec<u8> {
        vec![0xa5; usize::try_from(SIZE).expect("a small image")]
    }

    /// The stamp that it has: of an operation of another VM.
    pub(crate) fn former() -> Stamp {
        let operation = Operation { id: Uuid::from_u128(0xdb), generation: 7, epoch: 2 };
        Stamp { kind: StampKind::Superseded { by: "/images/db.raw".into() }, operation, vm: "db".into() }
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.directory.join("guest.log")
    }

    pub(crate) fn state(&self) -> StateDir {
        StateDir::below(&self.directory.join("state"), NAME).expect("a name")
    }

    pub(crate) fn monitor(&self) -> PathBuf {
        self.sockets.join("monitor")
    }

    pub(crate) fn agent(&self) -> PathBuf {
        self.sockets.join("agent")
    }

    pub(crate) fn gate(&self) -> PathBuf {
        self.sockets.join("gate")
    }

    pub(crate) fn connection(&self) -> Connection {
        Connection { monitor: self.monitor(), agent: Some(self.agent()), foreign: false }
    }

    /// Half of the runs use io_uring, where the host has it.
    pub(crate) fn engine(&self) -> Option<EngineKind> {
        if self.seed & 1 == 0 { None } else { Some(EngineKind::Threads) }
    }

    pub(crate) fn request(&self) -> Request {
        let Recipe { kind, protocol, disks, freeze, pause, write_blocking, reuse } = self.recipe;
        let copy_mode = if write_blocking { CopyMode::WriteBlocking } else { CopyMode::Background };
        let pairs = (0..disks).map(|disk| (Self::disk(disk), self.target(disk)));
        let settings = Settings { copy_mode, ..Settings::default() };
        let request = match kind {
            OperationKind::Pivot => Request::pivot(pairs),
            OperationKind::Mirror => Request::mirror(pairs),
            OperationKind::Backup => Request::backup(pairs),
        };
        Request { protocol, freeze, pause, reuse, settings, ..request }
    }
}

/// Whether `path` is one of the targets.
pub(crate) fn is_target(path: &Path) -> bool {
    path.to_string_lossy().ends_with("-new.raw")
}
