//! Which images the VM works on, whatever the journal says: other clients can finalize a job, and pivot, too.
//!
//! ```text
//!   before "aborted" is written     no disk on its target ──▶ aborted           (unless the witness says that it pivoted)
//!                                   all of them, complete ──▶ resolved-target   (B: commit)
//!                                   some of them ───────────▶ the others follow as far as pending, then the same; where
//!                                                             one cannot, the VM stops, and nothing is decided
//!   before the guest goes on and    no disk on its target ──▶ on
//!   before a target is removed      any of them ────────────▶ the VM stops, and nothing is removed
//! ```

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::steps::{Halt, Runner};
use crate::journal::{Consistency, Hold, OperationKind, Protocol, Side, Stage};
use crate::resolve::Reading;

/// How often disks that follow are looked at, and how long they may take.
const LOOK: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(300);

impl Runner<'_> {
    /// Writes down that the sources stay the disks, if a VM that lives confirms it. Where another client has moved disks
    /// already, the targets are what the guest writes to: then they are the disks, and those that stayed follow.
    pub(super) fn abort_live(&mut self, details: Value) -> Result<(), Halt> {
        let moved = self.moved()?;
        if moved.is_empty() {
            self.confirm_witness()?;
            return self.append(Stage::Aborted, details).map(drop);
        }
        let (plan, progress) = (self.plan(), self.progress());
        let may_follow = plan.kind == OperationKind::Pivot
            && match plan.protocol {
                Protocol::A => true,
                Protocol::B => progress.is_intended() || progress.on(Stage::CompleteIntent).is_ok(),
            };
        if !may_follow {
            return Err(self.stop_moved(&moved));
        }
        let behind = self.catch_up()?;
        if !behind.is_empty() || moved.len() == plan.disks.len() && !self.is_copied()? {
            return Err(self.stop_parted(&moved, &behind));
        }
        let some = if moved.len() == plan.disks.len() { "the" } else { "some" };
        self.warnings
            .push(format!("Another client has moved {some} disks to their targets: so all have moved"));
        // Nobody can tell whether the guest was frozen at that moment.
        let froze = self.log().entry(Stage::FreezeIntent).is_some() || progress.freeze() != Hold::None;
        let consistency = if froze { Consistency::Void } else { Consistency::Crash };
        let details = json!({"by": "client", "consistency": consistency});
        if plan.protocol == Protocol::A {
            return self.append(Stage::Resolved(Side::Target), details).map(drop);
        }
        if !progress.is_intended() {
            self.append(Stage::CompleteIntent, json!({}))?;
        }
        self.append(Stage::Commit, details).map(drop)
    }

    /// Where another client has moved some of the disks, lets the others follow as far as pending, where their targets have
    /// all that they have. Tells what is with those that cannot.
    fn catch_up(&mut self) -> Result<Vec<String>, Halt> {
        let (plan, began, mut told) = (self.plan(), Instant::now(), Vec::new());
        loop {
            let (disks, jobs) = (self.disks_now()?, self.vm.jobs()?);
            let (mut behind, mut stuck) = (Vec::new(), Vec::new());
            for (index, (now, disk)) in disks.iter().zip(&plan.disks).enumerate() {
                if disk.target.is_at(&now.file) {
                    continue;
                }
                let name = self.name(index);
                let job = jobs.iter().find(|job| job.id == name && job.error.is_none());
                let status = job.map_or("gone or has failed", |job| job.status.as_str());
                let text =
                    format!("disk '{}' works on {}, and its job is {status}", disk.disk, now.file.display());
                match status {
                    "pending" => {}
                    "waiting" => behind.push(text),
                    "ready" => {
                        behind.push(text);
                        if !told.contains(&name) {
                            self.place("follow", "before")?;
                            // Refused, it does not come any further, and is told of below.
                            match self.orders()?.job("complete", &name) {
                                Err(error) if error.refusal().is_none() => return Err(error.into()),
                                _ => told.push(name),
                            }
                        }
                    }
                    _ => stuck.push(text),
                }
            }
            if behind.is_empty() || !stuck.is_empty() || began.elapsed() > PATIENCE {
                return Ok([stuck, behind].concat());
            }
            self.vm.await_event(LOOK)?;
        }
    }

    /// Some disks are on their targets, and the others cannot follow.
    fn stop_parted(&mut self, moved: &[String], behind: &[String]) -> Halt {
        if let Err(halt) = self.stop_for_all() {
            return halt;
        }
        let behind = match behind {
            [] => "it is not known that they were complete".to_owned(),
            behind => behind.join(", "),
        };
        let reason = format!(
            "another client has moved the VM to {}, but {behind}. The VM is stopped, and nothing was removed",
            moved.join(", ")
        );
        self.stopped(reason, "Move these disks to their targets, too")
    }

    /// The VM is, and only a person can get it out of it.
    pub(super) fn stopped(&self, reason: String, way_out: &str) -> Halt {
        let vm = self.journal.state_dir().name();
        let next = format!(
            "Do not end it: it would start on images that lack what the guest has written since. {way_out} (\
             blockdev-mirror and job-complete; `tarn op show {vm}` names the images); then `tarn recover {vm}` settles the \
             operation, and `tarn resume {vm}` lets the guest go on"
        );
        Halt::Stopped { reason, next }
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
        let reason = format!(
            "another client has moved the VM to {}, which this operation has not decided. The VM is stopped, and nothing \
             was removed",
            moved.join(", ")
        );
        self.stopped(reason, "Move its disks back")
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
