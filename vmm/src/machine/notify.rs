//! How vCPU and disk threads tell the control loop something: post and go on, never wait.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use devices::virtio::blk::DiskEvent;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::jobs::registry::{JobDone, Post};
use crate::vcpu::VcpuEvent;

/// What other threads have to say.
#[derive(Debug)]
pub enum VmEvent {
    /// A vCPU stopped by itself and is parked, or tells of the guest.
    Vcpu {
        /// The machine it belongs to: after a reset, what the old one's threads had to say is of no interest.
        machine: u64,
        /// Which one.
        index: u8,
        /// What happened.
        event: VcpuEvent,
    },
    /// A disk has met an I/O error, or reports of its mirror.
    Disk(DiskEvent),
    /// A job without a disk has come to its end.
    Job(JobDone),
}

/// The sending side; one clone per thread.
#[derive(Clone)]
pub struct Notifier {
    events: Sender<VmEvent>,
    wake: Arc<EventFd>,
    machine: u64,
}

impl Notifier {
    /// The same, for the threads of machine number `machine`.
    pub fn for_machine(&self, machine: u64) -> Self {
        Self { machine, ..self.clone() }
    }

    /// The way of each job's thread to the control loop.
    pub fn for_jobs(&self) -> Post {
        let notifier = self.clone();
        Box::new(move || {
            let notifier = notifier.clone();
            Box::new(move |done| notifier.post(VmEvent::Job(done)))
        })
    }

    /// A vCPU has something to say.
    pub fn post_vcpu(&self, index: u8, event: VcpuEvent) {
        self.post(VmEvent::Vcpu { machine: self.machine, index, event });
    }

    /// Posts. The control loop may be gone already: then nobody is interested.
    pub fn post(&self, event: VmEvent) {
        if self.events.send(event).is_ok()
            && let Err(error) = self.wake.write(1)
        {
            tracing::error!(%error, "Cannot wake the control loop");
        }
    }
}

/// The control loop's side.
pub struct Inbox {
    events: Receiver<VmEvent>,
    wake: Arc<EventFd>,
}

impl Inbox {
    /// Readable when something was posted.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Makes the loop come back: there may be more than it has taken.
    pub fn wake_again(&self) {
        if let Err(error) = self.wake.write(1) {
            tracing::error!(%error, "Cannot wake the control loop");
        }
    }

    /// The next event. Drains the wake-up first, so that none is missed.
    pub fn take_next(&self) -> Option<VmEvent> {
        // Nothing to read is fine: the event may have been taken by an earlier round.
        let _ = self.wake.read();
        self.events.try_recv().ok()
    }
}

/// A pair.
///
/// # Errors
///
/// No descriptor left.
pub fn channel() -> std::io::Result<(Notifier, Inbox)> {
    let (sender, receiver) = mpsc::channel();
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    Ok((Notifier { events: sender, wake: Arc::clone(&wake), machine: 0 }, Inbox { events: receiver, wake }))
}
