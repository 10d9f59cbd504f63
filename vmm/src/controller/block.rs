//! The controller's jobs.

use std::time::Instant;

use super::Controller;
use crate::jobs::pivoting::Answer;
use crate::jobs::registry::JobDone;
use crate::monitor::BlockLayer;
use crate::vcpu::VcpuEvent;

/// Ends of the guest that are kept; each vCPU has one to tell, or a few.
const DEFERRED_MAX: usize = 64;

impl Controller {
    /// Block nodes and jobs, and the disks they work on.
    pub fn block(&mut self) -> BlockLayer<'_> {
        BlockLayer { jobs: &mut self.jobs, disks: &self.fixed.disks }
    }

    /// A thread beside the loop has done what it was to do for a job.
    pub fn job_done(&mut self, done: JobDone) {
        self.jobs.done(&self.fixed.disks, done);
        self.events.append(&mut self.jobs.take_events());
    }

    /// Does what jobs have left for after a reply, and what had to wait for an operation.
    pub fn settle_jobs(&mut self) {
        self.jobs.settle(&self.fixed.disks);
        while self.jobs.open_operation().is_none()
            && let Some((machine, index, event)) = self.deferred.pop_front()
        {
            if let Err(error) = self.vcpu_event(machine, index, event) {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "What the guest asked for was not done"
                );
            }
        }
    }

    /// When [`Self::tick`] is next needed.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.jobs.next_deadline()
    }

    /// Ends what has held guest I/O for too long.
    pub fn tick(&mut self, now: Instant) {
        self.jobs.tick(&self.fixed.disks, now);
        self.events.append(&mut self.jobs.take_events());
    }

    /// Answers that had to wait for an operation.
    pub fn take_answers(&mut self) -> Vec<Answer> {
        self.jobs.take_answers()
    }

    /// A guest that ends while its disks are being exchanged waits until it is decided which they are: whatever is read
    /// from the outcome of the operation is true when the VM is gone.
    pub(super) fn holds_back(&mut self, machine: u64, index: u8, event: &VcpuEvent) -> bool {
        let ends = match event {
            VcpuEvent::Shutdown
            | VcpuEvent::SuspendToDisk
            | VcpuEvent::Reset
            | VcpuEvent::TripleFault
            | VcpuEvent::Panicked => true,
            VcpuEvent::SuspendToRam | VcpuEvent::CrashLoaded | VcpuEvent::Fault(_) => false,
        };
        let holds_back = ends && self.jobs.open_operation().is_some();
        if holds_back {
            tracing::warn!(
                index,
                ?event,
                "The guest ends: held back until the operation in progress is decided"
            );
            if self.deferred.len() < DEFERRED_MAX {
                self.deferred.push_back((machine, index, event.clone()));
            }
        }
        holds_back
    }

    /// Decides an operation that is in progress, and ends all jobs: the VM is about to end.
    pub(super) fn end_jobs(&mut self) {
        if self.jobs.conclude_pivot(&self.fixed.disks) {
            tracing::error!(
                "The VM ends with an operation undetermined: its disks are the same on both sides"
            );
        }
        // What was held goes on when the jobs end, on the source; somebody may have decided for the target. So the guest is
        // not told any more.
        self.machine = None;
        self.generation += 1;
        self.jobs.end_all(&self.fixed.disks);
    }
}
