//! The copies: mirrors until they are ready, backups until they are complete, and how the guest is held for either.

use std::time::{Duration, Instant};

use serde_json::json;

use super::freeze::Freezer;
use super::report::Copying;
use super::steps::{Halt, Runner};
use super::vm::{DiskNow, JobNow};
use crate::journal::{Hold, OperationKind, Stage};
use crate::{chain, durable};

/// How often a copy is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How long a mirror may be above the longest hold before each write goes to both images, and before it is given up.
const CONVERGE: Duration = Duration::from_secs(10);
const NEVER_CONVERGES: Duration = Duration::from_secs(60);
/// How long mirrors may take to end.
const PATIENCE: Duration = Duration::from_secs(300);

impl Runner<'_> {
    pub(super) fn mirror(&mut self) -> Result<(), Halt> {
        let nodes = self.disks_now()?.into_iter().map(|disk| disk.node).collect::<Vec<_>>();
        self.append(Stage::Mirroring, json!({"nodes": nodes}))?;
        self.mirror_again()
    }

    /// Begins what does not run yet.
    pub(super) fn mirror_again(&mut self) -> Result<(), Halt> {
        self.copying_since.get_or_insert_with(Instant::now);
        let (disks, jobs) = (self.disks_now()?, self.vm.jobs()?);
        for (index, disk) in disks.iter().enumerate() {
            let name = self.name(index);
            if jobs.iter().any(|job| job.id == name) {
                continue;
            }
            self.place("mirror", "before")?;
            self.open_target(index, disk)?;
            let mode = self.settings.copy_mode;
            self.orders()?.mirror(&name, disk, &name, mode)?;
            self.place("mirror", "done")?;
        }
        Ok(())
    }

    pub(super) fn open_target(&mut self, index: usize, disk: &DiskNow) -> Result<(), Halt> {
        let (name, plan) = (self.name(index), self.plan());
        // One that another coordinator has opened, and not used.
        match self.orders()?.remove_node(&name) {
            Err(error) if error.refusal().is_none() => return Err(error.into()),
            _ => {}
        }
        // What the path of a block device leads to may be another one than when the operation began.
        let image = plan.disks[index].target.locate().map_err(|error| Halt::Abort(chain(&error)))?;
        Ok(self.orders()?.add_node(&name, &image, disk)?)
    }

    pub(super) fn await_ready(&mut self) -> Result<(), Halt> {
        loop {
            let jobs = self.jobs_now()?;
            if let Some(job) =
                jobs.iter().find(|job| !matches!(job.status.as_str(), "created" | "running" | "ready"))
            {
                return Err(Halt::Abort(ended(job)));
            }
            self.tell(&jobs)?;
            if jobs.iter().all(|job| job.status == "ready") {
                break;
            }
            self.vm.await_event(LOOK)?;
        }
        self.timeline.copied = self.copying_since.map(|since| since.elapsed());
        self.append(Stage::Ready, json!({})).map(drop)
    }

    /// Waits until the guest would not be held for too long.
    fn converge(&mut self) -> Result<(), Halt> {
        let Some(limit) = self.settings.max_hold else { return Ok(()) };
        let (began, mut write_blocking) = (Instant::now(), false);
        loop {
            let jobs = self.jobs_now()?;
            self.tell(&jobs)?;
            let longest = jobs.iter().filter_map(|job| job.expected_hold).max().unwrap_or_default();
            if longest <= limit {
                return Ok(());
            }
            if began.elapsed() > NEVER_CONVERGES {
                return Err(Halt::Abort(format!(
                    "The guest writes so fast that it would have to be held for {longest:?}, and at most {limit:?} is wanted"
                )));
            }
            if began.elapsed() > CONVERGE && !write_blocking {
                for job in &jobs {
                    self.orders()?.write_blocking(&job.id)?;
                }
                write_blocking = true;
            }
            self.vm.await_event(LOOK)?;
        }
    }

    /// Freezes and stops, where that is wanted.
    pub(super) fn hold_all(&mut self) -> Result<(), Halt> {
        if self.plan().kind == OperationKind::Pivot {
            self.converge()?;
        }
        let flags = self.plan().flags;
        if flags.freeze && self.progress().freeze() == Hold::None {
            let agent = self.connection.agent.clone();
            let agent = agent.ok_or_else(|| Halt::Abort("The guest has no agent".to_owned()))?;
            let mut freezer = Freezer::connect(&agent)?;
            self.append(Stage::FreezeIntent, json!({}))?;
            self.place("freeze", "before")?;
            self.confirm_ours()?;
            self.frozen_since = Some(Instant::now());
            let frozen = freezer.freeze(self.settings.lease);
            self.freezer = Some(freezer);
            let filesystems = match frozen {
                // Nothing to thaw, and not by this operation.
                Err(error) if error.refusal().is_some() => {
                    (self.freezer, self.frozen_since) = (None, None);
                    self.append(Stage::Thawed, json!({"by": "refused"}))?;
                    return Err(error.into());
                }
                frozen => frozen?,
            };
            self.place("freeze", "done")?;
            self.append(Stage::Frozen, json!({"filesystems": filesystems}))?;
        }
        if flags.pause && self.progress().pause() == Hold::None {
            let was_running = self.vm.is_running()?;
            self.append(Stage::StopIntent, json!({"was-running": was_running}))?;
            self.place("stop", "before")?;
            let holder = self.holder();
            self.paused_since = Some(Instant::now());
            self.orders()?.stop(holder)?;
            self.place("stop", "done")?;
            self.append(Stage::Stopped, json!({}))?;
        }
        Ok(())
    }

    pub(super) fn back_up(&mut self) -> Result<(), Halt> {
        let disks = self.disks_now()?;
        self.append(Stage::Mirroring, json!({}))?;
        let mut jobs = Vec::new();
        for (index, disk) in disks.iter().enumerate() {
            self.open_target(index, disk)?;
            jobs.push((self.name(index), disk.node.clone(), self.name(index)));
        }
        self.copying_since = Some(Instant::now());
        self.place("backup", "before")?;
        self.orders()?.backup(&jobs)?;
        self.place("backup", "done")?;
        // The copy is of this moment: the guest goes on.
        self.release()
    }

    pub(super) fn await_backup(&mut self) -> Result<(), Halt> {
        loop {
            let jobs = self.jobs_now()?;
            self.tell(&jobs)?;
            let is_over = |job: &JobNow| job.status == "concluded";
            if let Some(job) = jobs.iter().find(|job| is_over(job) && job.error.is_some()) {
                return Err(Halt::Abort(ended(job)));
            }
            if let Some(job) = jobs.iter().find(|job| matches!(job.status.as_str(), "paused" | "standby")) {
                return Err(Halt::Abort(ended(job)));
            }
            if jobs.iter().all(is_over) {
                self.timeline.copied = self.copying_since.map(|since| since.elapsed());
                return Ok(());
            }
            self.vm.await_event(LOOK)?;
        }
    }

    pub(super) fn end_mirrors(&mut self) -> Result<(), Halt> {
        let jobs = self.jobs_now()?;
        // One that is pending, or about to be, was completed by another client: to finalize it would move the disk.
        if let Some(job) = jobs.iter().find(|job| job.status != "ready") {
            return Err(Halt::Abort(ended(job)));
        }
        self.append(Stage::EndIntent, json!({}))?;
        self.await_end()
    }

    /// Each mirror ends as the copy it is at that moment. All were ready when they were to be told; which of them another
    /// coordinator has told before it died, and which another client, nobody knows: so one that is pending already is as
    /// good a copy as any, but it is not finalized, which might move its disk.
    pub(super) fn await_end(&mut self) -> Result<(), Halt> {
        let (began, mut told) = (Instant::now(), Vec::new());
        loop {
            let jobs = self.jobs_now()?;
            let is_stuck = |job: &&JobNow| matches!(job.status.as_str(), "paused" | "standby");
            if let Some(job) = jobs.iter().find(|job| job.error.is_some() || is_stuck(job)) {
                return Err(Halt::Abort(ended(job)));
            }
            if began.elapsed() > PATIENCE {
                return Err(Halt::Abort("The mirrors do not end".to_owned()));
            }
            for JobNow { id, status, .. } in &jobs {
                match (status.as_str(), told.contains(id)) {
                    ("ready", false) => {
                        self.confirm_held()?;
                        self.place("end", "before")?;
                        self.orders()?.cancel(id, false)?;
                        told.push(id.clone());
                        self.place("end", "done")?;
                    }
                    ("pending", true) => self.orders()?.job("finalize", id)?,
                    _ => {}
                }
            }
            if jobs.iter().all(|job| job.status == "concluded") {
                self.confirm_sources()?;
                self.release()?;
                return self.complete();
            }
            if jobs
                .iter()
                .all(|job| job.status == "concluded" || job.status == "pending" && !told.contains(&job.id))
            {
                self.confirm_sources()?;
                return self.complete();
            }
            self.vm.await_event(LOOK)?;
        }
    }

    /// Copies that end after the guest went on are not of the moment at which it was held.
    fn confirm_held(&self) -> Result<(), Halt> {
        let (flags, progress) = (self.plan().flags, self.progress());
        let goes_on =
            flags.pause && progress.pause() == Hold::None || flags.freeze && progress.freeze() == Hold::None;
        match goes_on {
            true => Err(Halt::Abort("The guest went on before all mirrors had ended".to_owned())),
            false => Ok(()),
        }
    }

    /// The targets have all that they are to have: once that lasts and is written down, nothing undoes them any more.
    pub(super) fn complete(&mut self) -> Result<(), Halt> {
        for disk in self.plan().disks {
            self.confirm_ours()?;
            // One whose sync has failed is no copy, even if another sync were to succeed.
            durable::sync_image(&disk.target.path).map_err(|error| Halt::Abort(chain(&error)))?;
        }
        self.append(Stage::Copied, json!({})).map(drop)
    }

    fn tell(&mut self, jobs: &[JobNow]) -> Result<(), Halt> {
        self.observer.copying(&Copying {
            done: jobs.iter().map(|job| job.done).sum(),
            total: jobs.iter().map(|job| job.total).sum(),
            remaining: jobs.iter().filter_map(|job| job.remaining).max(),
            expected_hold: jobs.iter().filter_map(|job| job.expected_hold).max(),
        });
        self.go_on()
    }

    /// Unless its user does not want it any more.
    pub(super) fn go_on(&mut self) -> Result<(), Halt> {
        if self.observer.wants_end() {
            return Err(Halt::Abort("It was interrupted by its user".to_owned()));
        }
        Ok(())
    }
}

fn ended(job: &JobNow) -> String {
    match &job.error {
        Some(error) => format!("Job '{}' failed: {error}", job.id),
        None => format!("Job '{}' is {}: another client has meddled with it", job.id, job.status),
    }
}
