//! How a pivot begins: which jobs it is about, and what is refused.

use block::Cache;
use protocol::Error;
use uuid::Uuid;

use super::super::disks::Disks;
use super::super::entry::Work;
use super::super::nodes::NodeInfo;
use super::super::pivot::PivotState;
use super::super::registry::{Family, Jobs};
use super::super::state::{JobStatus, Verb};
use super::{Asker, DISKS_MAX, PivotDisk, PivotInfo, Wish, answer};

impl Jobs {
    pub(super) fn join(&mut self, id: Uuid, asker: Asker, wish: Wish) -> Result<Option<PivotInfo>, Error> {
        let info = self.query_pivot(Some(id))?;
        match (info.state, &mut self.pivoting.current) {
            (PivotState::Draining | PivotState::Held, Some(current)) => {
                current.askers.push((asker, wish));
                Ok(None)
            }
            _ => answer(info, wish).map(Some),
        }
    }

    /// Indexes of the jobs, and their disks.
    pub(super) fn pivot_jobs(&self, ids: &[String]) -> Result<Vec<(usize, usize)>, Error> {
        if ids.is_empty() || ids.len() > DISKS_MAX {
            return Err(Error::invalid_parameter_value("jobs", "1 to 16 jobs"));
        }
        let mut jobs = Vec::new();
        for id in ids {
            let index = self.find(Family::BlockJob, id)?;
            let entry = &self.entries[index];
            let Work::Mirror { disk, attached: true, .. } = entry.work else {
                return Err(Error::generic(format!("Job '{id}' is not a mirror that can be completed")));
            };
            if jobs.iter().any(|(known, _)| *known == index) {
                return Err(Error::generic(format!("Job '{id}' is named twice")));
            }
            self.check_not_pivoting(index)?;
            match entry.job.status() {
                JobStatus::Pending if entry.job.pivots() => entry.job.check(Verb::Finalize),
                JobStatus::Ready => entry.job.check(Verb::Complete),
                status => Err(status.refuse(id, Verb::Complete)),
            }
            .map_err(|error| Error::generic(error.to_string()))?;
            if entry.job.is_copying() {
                return Err(Error::generic(format!("The active block job '{id}' cannot be completed")));
            }
            jobs.push((index, disk));
        }
        Ok(jobs)
    }

    /// What a witness says must be true after a power cut.
    pub(super) fn check_durable(&self, jobs: &[(usize, usize)]) -> Result<(), Error> {
        let mut targets = jobs.iter().filter_map(|(_, disk)| self.nodes.target(*disk));
        match targets.find(|target| target.cache == Cache::Unsafe) {
            None => Ok(()),
            Some(target) => Err(Error::generic(format!(
                "Node '{}' ignores flushes: it would not survive a power cut, whatever the witness says",
                target.name
            ))),
        }
    }

    pub(super) fn pivot_disk(&self, index: usize, disk: usize, disks: &dyn Disks) -> PivotDisk {
        let filename = |node: Option<NodeInfo>| node.map(|node| node.filename).unwrap_or_default();
        PivotDisk {
            device: disks.facts(disk).device,
            job: self.entries[index].job.id().to_owned(),
            source: filename(self.nodes.root(disk)),
            target: filename(self.nodes.target(disk)),
        }
    }
}
