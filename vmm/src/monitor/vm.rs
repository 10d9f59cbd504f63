//! What the monitor needs from the VM, as plain data and verbs.

use std::error::Error as StdError;

use coordinator::chain;
use protocol::{Error, Map};
use uuid::Uuid;

use super::events::Event;
use crate::guest_channel::AgentStatus;
use crate::jobs::{Disks, Jobs};
use crate::pauses::{Holder, PauseRefused};
use crate::run_state::RunState;

/// A VM as its monitor sees it.
///
/// Everything runs on the control loop. The verbs that change the run state return when the change is
/// done; each wait in them is bounded. Events that they cause are kept and handed over by
/// [`take_events`](Self::take_events), which the monitor calls before it replies: clients see STOP before
/// the return of `stop`.
pub trait Vm {
    /// The VM's name.
    fn name(&self) -> String;
    /// The VM's UUID.
    fn uuid(&self) -> Uuid;
    /// What the VM is in.
    fn run_state(&self) -> RunState;
    /// Its vCPUs in order.
    fn cpus(&self) -> Vec<CpuInfo>;
    /// The host ends of its character devices.
    fn chardevs(&self) -> Vec<ChardevInfo>;
    /// Its disks in order.
    fn disks(&self) -> Vec<DiskInfo>;
    /// How its guest channel is.
    fn agent(&self) -> AgentStatus;

    /// Stops the vCPUs, drains and flushes the disks. Succeeds if they are stopped already.
    ///
    /// # Errors
    ///
    /// The state does not allow it, or a part of it failed.
    fn stop(&mut self, by: Holder) -> Result<(), VmError>;
    /// Lets the vCPUs run, unless somebody else has stopped them as well. Succeeds if they run already.
    ///
    /// # Errors
    ///
    /// The state does not allow it, or an operation holds the VM, or a part of it failed.
    fn cont(&mut self, by: Holder, force: bool) -> Result<(), VmError>;
    /// Who has stopped the vCPUs.
    fn paused_by(&self) -> Vec<Holder>;
    /// Starts the guest again.
    ///
    /// # Errors
    ///
    /// It failed.
    fn system_reset(&mut self) -> Result<(), VmError>;
    /// Presses the power button; what follows is up to the guest.
    ///
    /// # Errors
    ///
    /// The guest cannot be told.
    fn system_powerdown(&mut self) -> Result<(), VmError>;
    /// Wakes the guest from suspend-to-RAM.
    ///
    /// # Errors
    ///
    /// [`VmError::NotSuspended`] in any other state than suspended.
    fn system_wakeup(&mut self) -> Result<(), VmError>;
    /// Changes the size in bytes of disk `index` of [`disks`](Self::disks), and tells the guest.
    ///
    /// # Errors
    ///
    /// The image cannot have that size; it stays as it was.
    fn resize_disk(&mut self, index: usize, size: u64) -> Result<(), VmError>;
    /// Its block nodes and jobs, and the disks they work on.
    fn block(&mut self) -> BlockLayer<'_>;
    /// Ends the VM. The loop ends after the reply has been sent.
    fn quit(&mut self);

    /// Events since the last call, in order.
    fn take_events(&mut self) -> Vec<Event>;

    /// Relays a command to the guest. Its outcome comes back with
    /// [`Monitor::complete`](super::Monitor::complete). A session has at most one on its way.
    fn guest_request(&mut self, session: SessionId, execute: String, arguments: Map);
    /// The session is gone: nobody waits for its outcome, and what it froze is nobody's any more.
    fn guest_session_closed(&mut self, session: SessionId);
}

/// What commands about nodes and jobs act on.
pub struct BlockLayer<'a> {
    /// Nodes and jobs.
    pub jobs: &'a mut Jobs,
    /// The disks.
    pub disks: &'a dyn Disks,
}

/// Names a monitor connection, once and for all time: numbers are not reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// `cont` in a state that only a reset leads out of.
    #[error("Resetting the Virtual Machine is required")]
    ResetRequired,
    /// `system_wakeup` of a guest that does not sleep, or that a client has stopped (QEMU's text).
    #[error("Unable to wake up: guest is not in suspended state")]
    NotSuspended,
    /// The state does not allow it.
    #[error("The virtual machine is in state '{0}', which does not allow this")]
    State(&'static str),
    /// Others have stopped the VM.
    #[error(transparent)]
    Paused(#[from] PauseRefused),
    /// It was tried and failed; the reply carries the whole chain.
    #[error("{}", chain(&**.0))]
    Failed(Box<dyn StdError + Send + Sync>),
}

impl From<VmError> for Error {
    fn from(error: VmError) -> Self {
        Self::generic(error.to_string())
    }
}

/// A vCPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuInfo {
    /// Its number, from 0.
    pub index: u32,
    /// Kernel id of the thread that runs it.
    pub thread_id: i32,
    /// Its place in the topology.
    pub socket: u32,
    /// Its place in the topology.
    pub core: u32,
    /// Its place in the topology.
    pub thread: u32,
}

/// The host end of a character device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChardevInfo {
    /// Its name; VSERPORT_CHANGE uses the same.
    pub label: String,
    /// What it is connected to, as in `unix:/run/tarn/NAME/agent.sock,server=on`.
    pub filename: String,
    /// Whether the guest has opened its end.
    pub frontend_open: bool,
}

/// A disk of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskInfo {
    /// Name of the device.
    pub device: String,
    /// Size the guest sees, in bytes.
    pub virtual_size: u64,
    /// Bytes in one logical block, as the guest sees it.
    pub block_size: u32,
    /// What the last failed operation that stopped the VM leaves behind.
    pub io_status: IoStatus,
    /// The handle on its limits and faults.
    pub filters: Option<block::Filters>,
}

impl DiskInfo {
    /// Path of its device.
    pub fn qdev(&self) -> String {
        format!("/machine/peripheral/{}/virtio-backend", self.device)
    }
}

/// QEMU's BlockDeviceIoStatus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoStatus {
    /// Nothing is wrong.
    Ok,
    /// An operation failed.
    Failed,
    /// The host is out of space.
    Nospace,
}
