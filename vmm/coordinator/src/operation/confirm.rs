//! Which images the VM works on, whatever the journal says: other clients can finalize a job, and pivot, too.
//!
//! ```text
//!   before "aborted" is written     no disk on its target ──▶ aborted           (unless the witness says that it pivoted)
//!                                   all of them, complete ──▶ resolved-target   (B, intended: commit)
//!                                   some of them ───────────▶ the VM stops, and nothing is decided
//!   before the guest goes on and    no disk on its target ──▶ on
//!   before a target is removed      any of them ────────────▶ the VM stops, and nothing is removed
//! ```

use serde_json::{Value, json};

use super::steps::{Halt, Runner};
use crate::journal::{Consistency, Hold, OperationKind, Protocol, Side, Stage};
use crate::resolve::Reading;

impl Runner<'_> {
    /// Writes down that the sources stay the disks, if a VM that lives confirms it. Where another client has moved all
    /// disks already, the targets are what the guest writes to: then they are the disks.
    pub(super) fn abort_live(&mut self, details: Value) -> Result<(), Halt> {
        let moved = self.moved()?;
        if moved.is_empty() {
            self.confirm_witness()?;
            return self.append(Stage::Aborted, details).map(drop);
        }
        let plan = self.plan();
        let all = plan.kind == OperationKind::Pivot && moved.len() == plan.disks.len() && self.is_copied()?;
        let stage = match plan.protocol {
            Protocol::A if all => Stage::Resolved(Side::Target),
            Protocol::B if all && self.progress().is_intended() => Stage::Commit,
            _ => return Err(self.stop_moved(&moved)),
        };
        self.warnings.push("Another client has moved the disks to the targets".to_owned());
        // Nobody can tell whether the guest was frozen at that moment.
        let froze = self.log().entry(Stage::FreezeIntent).is_some() || self.progress().freeze() != Hold::None;
        let consistency = if froze { Consistency::Void } else { Consistency::Crash };
        self.append(stage, json!({"by": "client", "consistency": consistency})).map(drop)
    }

    /// A VM that has not pivoted although the witness says so is another one than that which wrote the witness.
    fn confirm_witness(&self) -> Result<(), Halt> {
        let log = self.log();
        match Reading::of(log.plan.witness.as_deref(), &log.operation) {
            (Reading::Pivoted, _) => Err(Halt::Unknown(
                "the witness says that the VM has pivoted, and this VM has not: it was started on images that were the \
                 disks before. End it first"
                    .to_owned(),
            )),
            _ => Ok(()),
        }
    }

    /// Neither may the guest go on on a target that is not the disk, nor may such a target be removed.
    pub(super) fn confirm_sources(&mut self) -> Result<(), Halt> {
        let moved = self.moved()?;
        if moved.is_empty() { Ok(()) } else { Err(self.stop_moved(&moved)) }
    }

    /// What the guest writes now is lost, whatever is decided later: it must not.
    pub(super) fn stop_moved(&mut self, moved: &[String]) -> Halt {
        if let Err(halt) = self.stop_for_all() {
            return halt;
        }
        Halt::Unknown(format!(
            "another client has moved the VM to {}, which this operation has not decided. The VM is stopped, and nothing \
             was removed",
            moved.join(", ")
        ))
    }

    /// In nobody's name: no operation lets it go on. That a VM cannot be stopped is not worse than what it is stopped for.
    pub(super) fn stop_for_all(&mut self) -> Result<(), Halt> {
        let _ = self.orders()?.stop(None);
        Ok(())
    }

    /// The targets that are the image of a disk, be it this operation's or another one.
    fn moved(&mut self) -> Result<Vec<String>, Halt> {
        let now = self.vm.disks()?;
        let targets = self.plan().disks.into_iter().map(|disk| disk.target);
        let moved = targets.filter(|target| now.iter().any(|disk| target.is_at(&disk.file)));
        Ok(moved.map(|target| target.path.display().to_string()).collect())
    }

    /// Each target has had all that its source has.
    fn is_copied(&mut self) -> Result<bool, Halt> {
        let plan = self.plan();
        if self.log().entry(Stage::Ready).is_some() {
            return Ok(true);
        }
        let jobs = self.vm.jobs()?;
        Ok((0..plan.disks.len()).map(|index| self.name(index)).all(|name| {
            jobs.iter().any(|job| job.id == name && job.status == "concluded" && job.error.is_none())
        }))
    }
}
