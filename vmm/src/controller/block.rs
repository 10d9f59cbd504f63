//! The controller's jobs.

use super::Controller;
use crate::jobs::registry::JobDone;
use crate::monitor::BlockLayer;

impl Controller {
    /// Block nodes and jobs, and the disks they work on.
    pub fn block(&mut self) -> BlockLayer<'_> {
        BlockLayer { jobs: &mut self.jobs, disks: &self.fixed.disks }
    }

    /// A job without a disk has come to its end.
    pub fn job_done(&mut self, done: JobDone) {
        self.jobs.done(&self.fixed.disks, done);
        self.events.append(&mut self.jobs.take_events());
    }

    /// Does what jobs have left for after a reply.
    pub fn settle_jobs(&mut self) {
        self.jobs.settle(&self.fixed.disks);
    }
}
