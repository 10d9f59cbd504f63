//! The run state of a VM, as a pure function: no I/O, every pair decided.
//!
//! ```text
//!                 cont                 stop
//!   prelaunch ──────────▶ running ◀─────────▶ paused
//!                          │  │  ╲   cont
//!           error, policy  │  │   ╲ guest shutdown, quit
//!              stop        │  │    ╲
//!                          ▼  │     ▼
//!                   io-error  │    shutdown          guest-panicked, internal-error:
//!                             └──────────────────▶   only `quit` and a reset lead out
//! ```
//!
//! The [`crate::controller`] asks [`RunState::on`], carries out the [`Effect`], and only then publishes
//! the new state and its event: `query-status` never lies.

use serde::Serialize;

/// QEMU's names (qapi/run-state.json), the part that Tarn can be in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Built, no vCPU has run yet (or: reset while paused).
    Prelaunch,
    /// vCPUs run.
    Running,
    /// vCPUs stopped and disks drained, at a client's wish.
    Paused,
    /// vCPUs stopped because a disk failed under policy `stop`; the request is held.
    IoError,
    /// The guest is in ACPI S3.
    Suspended,
    /// The guest told that it panicked.
    GuestPanicked,
    /// KVM cannot run the guest any further.
    InternalError,
    /// The guest has switched itself off, or the VM is being torn down.
    Shutdown,
}

impl RunState {
    /// All of them, for tests and for the schema.
    pub const ALL: [Self; 8] = [
        Self::Prelaunch,
        Self::Running,
        Self::Paused,
        Self::IoError,
        Self::Suspended,
        Self::GuestPanicked,
        Self::InternalError,
        Self::Shutdown,
    ];

    /// QEMU's spelling.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prelaunch => "prelaunch",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::IoError => "io-error",
            Self::Suspended => "suspended",
            Self::GuestPanicked => "guest-panicked",
            Self::InternalError => "internal-error",
            Self::Shutdown => "shutdown",
        }
    }

    /// Whether vCPUs run.
    pub fn is_running(self) -> bool {
        self == Self::Running
    }
}
