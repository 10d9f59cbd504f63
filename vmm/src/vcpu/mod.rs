//! vCPUs: a thread each, commanded through a channel and a kick, answering with acknowledgements.
//!
//! ```text
//!   control loop                                   vcpu-N
//!   ────────────                                   ──────
//!   VcpuCommand ──channel──▶                  ┌─▶ Paused ──Resume──▶ Running ─┐ KVM_RUN, exits → buses
//!   SIGRTMIN ─kick─▶ immediate_exit = 1       │     ▲                   │     │
//!                    ◀──── Ack ───────────────┘     └──Pause / event────┘ ◀───┘
//! ```
//!
//! A kick is a signal whose handler sets `immediate_exit` in the vCPU's own `kvm_run`: whether it arrives in the
//! guest, in the kernel or between two exits, the next `KVM_RUN` returns `EINTR` and the thread looks at its
//! commands. Before a vCPU acknowledges a pause it re-enters KVM once with `immediate_exit`, so that a half-done
//! MMIO or port access is retired and the guest's state is consistent (Documentation/virt/kvm/api.rst, KVM_RUN).

mod exit;
mod thread;

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::bus::Bus;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN};

pub use exit::{VcpuEvent, VcpuFault};

use crate::machine::notify::Notifier;

/// How long a vCPU may take to acknowledge: generous, because the host may be emulated or overloaded.
pub const ACK_TIMEOUT: Duration = Duration::from_secs(30);

/// What the control loop asks of a vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VcpuCommand {
    /// Leave the guest, retire the exit under way, wait.
    Pause,
    /// Enter the guest.
    Resume,
    /// End the thread.
    Finish,
}

/// Why a vCPU did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// No thread.
    #[error("Cannot start the thread of vCPU {index}")]
    Spawn {
        /// Which one.
        index: u8,
        /// Why.
        source: std::io::Error,
    },
    /// Nothing came back in time.
    #[error("vCPU {index} did not acknowledge {command:?} within {} s", ACK_TIMEOUT.as_secs())]
    Timeout {
        /// Which one.
        index: u8,
        /// What it was asked.
        command: VcpuCommand,
    },
    /// The thread is gone.
    #[error("vCPU {index} is gone")]
    Gone {
        /// Which one.
        index: u8,
    },
    /// The kick signal's handler cannot be installed.
    #[error("Cannot install the vCPU kick signal")]
    Signal {
        /// Why.
        source: vmm_sys_util::errno::Error,
    },
}

/// The two address spaces of a machine.
#[derive(Clone)]
pub struct Buses {
    /// Ports.
    pub pio: Arc<Bus>,
    /// Memory-mapped registers.
    pub mmio: Arc<Bus>,
}

/// The owner of a vCPU thread. Dropped, it ends and joins it.
pub struct VcpuHandle {
    index: u8,
    thread: Option<JoinHandle<()>>,
    thread_id: libc::pid_t,
    commands: Sender<VcpuCommand>,
    acks: Receiver<VcpuCommand>,
}

impl VcpuHandle {
    /// Starts the thread of vCPU `index`, paused.
    ///
    /// # Errors
    ///
    /// No thread, or no signal handler.
    pub fn spawn(index: u8, fd: VcpuFd, buses: Buses, events: Notifier) -> Result<Self, VcpuError> {
        thread::install_kick().map_err(|source| VcpuError::Signal { source })?;
        let (commands, receiver) = mpsc::channel();
        let (ack, acks) = mpsc::channel();
        let (id_sender, id) = mpsc::channel();
        let body = move || {
            // The receiver waits below for exactly this.
            let _ = id_sender.send(thread::gettid());
            let (commands, acks) = (receiver, ack);
            thread::VcpuThread { index, fd, buses, commands, acks, events, ran: false, crash_told: false }
                .run();
        };
        let thread = std::thread::Builder::new()
            .name(format!("vcpu-{index}"))
            .stack_size(256 << 10)
            .spawn(body)
            .map_err(|source| VcpuError::Spawn { index, source })?;
        let thread_id = id.recv_timeout(ACK_TIMEOUT).map_err(|_| VcpuError::Gone { index })?;
        Ok(Self { index, thread: Some(thread), thread_id, commands, acks })
    }

    /// Host thread ID, for `query-cpus-fast`.
    pub fn thread_id(&self) -> libc::pid_t {
        self.thread_id
    }

    /// Sends a command without waiting for the acknowledgement; [`Self::wait`] does.
    ///
    /// # Errors
    ///
    /// The thread is gone.
    pub fn send(&self, command: VcpuCommand) -> Result<(), VcpuError> {
        self.commands.send(command).map_err(|_| VcpuError::Gone { index: self.index })?;
        if let Some(thread) = &self.thread {
            thread.kill(SIGRTMIN()).map_err(|_| VcpuError::Gone { index: self.index })?;
        }
        Ok(())
    }

    /// Waits until `command` is acknowledged.
    ///
    /// # Errors
    ///
    /// `deadline` has passed, or the thread is gone.
    pub fn wait(&self, command: VcpuCommand, deadline: Instant) -> Result<(), VcpuError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.acks.recv_timeout(left) {
                Ok(ack) if ack == command => return Ok(()),
                Ok(_late) => {} // the acknowledgement of a command whose wait had timed out
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    return Err(VcpuError::Timeout { index: self.index, command });
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(VcpuError::Gone { index: self.index });
                }
            }
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        let finished = self.commands.send(VcpuCommand::Finish).is_err()
            || (thread.kill(SIGRTMIN()).is_ok()
                && self.wait(VcpuCommand::Finish, Instant::now() + ACK_TIMEOUT).is_ok());
        if finished {
            if thread.join().is_err() {
                tracing::error!(index = self.index, "vCPU thread panicked");
            }
        } else {
            // Joining could hang for ever; the process is about to end or to say why it cannot go on.
            tracing::error!(index = self.index, "vCPU thread does not end; leaving it behind");
        }
    }
}

/// Sends `command` to all of `vcpus`, then waits for all: as long as the slowest, not as the sum.
///
/// # Errors
///
/// The first that did not acknowledge; the others were asked all the same.
pub fn command_all(vcpus: &[VcpuHandle], command: VcpuCommand) -> Result<(), VcpuError> {
    let sent: Vec<_> = vcpus.iter().map(|vcpu| vcpu.send(command)).collect();
    let deadline = Instant::now() + ACK_TIMEOUT;
    let waited = vcpus.iter().zip(sent).map(|(vcpu, sent)| sent.and_then(|()| vcpu.wait(command, deadline)));
    waited.fold(Ok(()), Result::and)
}
