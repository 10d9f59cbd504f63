//! The decision: by the VM, or here.
//!
//! ```text
//!   A   pivot-intent ─▶ tarn-pivot ─┬─ pivoted ───────────────▶ pivoted
//!                                   ├─ aborted ───────────────▶ aborted
//!                                   ├─ undetermined ──────────▶ aborted; then tarn-pivot-abort, and the guest goes on
//!                                   └─ no answer ─────────────▶ nothing: it stays open until somebody can ask
//!   B   complete-intent ─▶ all jobs complete ─▶ all pending ─▶ commit ─▶ all finalized ─▶ pivoted
//!                                   └─ one fails ─────────────▶ aborted
//! ```

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::steps::{Halt, Runner};
use super::vm::PivotNow;
use crate::journal::{Hold, Protocol, Stage};

/// How often the VM is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// How long disks may take to copy what is left, and to sync.
const PATIENCE: Duration = Duration::from_secs(300);

impl Runner<'_> {
    pub(super) fn decide(&mut self) -> Result<(), Halt> {
        match self.plan().protocol {
            Protocol::A => {
                self.append(Stage::PivotIntent, json!({}))?;
                self.decide_by_vm()
            }
            Protocol::B => {
                self.append(Stage::CompleteIntent, json!({}))?;
                self.decide_here()
            }
        }
    }

    /// Another coordinator has come as far as the intent.
    pub(super) fn decide_further(&mut self) -> Result<(), Halt> {
        match self.plan().protocol {
            Protocol::A => match self.vm.query_pivot(self.id)?.state.as_str() {
                "none" => self.decide_by_vm(),
                _ => self.ask_what_became_of_it(None),
            },
            Protocol::B => self.decide_here(),
        }
    }

    fn decide_by_vm(&mut self) -> Result<(), Halt> {
        let (operation, plan) = (self.operation(), self.plan());
        let jobs: Vec<String> = (0..plan.disks.len()).map(|index| self.name(index)).collect();
        let witness = plan.witness.ok_or_else(|| Halt::Unknown("The operation has no witness".to_owned()))?;
        self.place("pivot", "before")?;
        let answer = self.orders()?.pivot(&operation, &jobs, &witness);
        self.place("pivot", "done")?;
        match answer {
            Ok(now) => self.pivoted(&now),
            Err(error) => match error.refusal() {
                Some(refusal) => {
                    let reason = refusal.desc.clone();
                    self.ask_what_became_of_it(Some(&reason))
                }
                None => Err(error.into()),
            },
        }
    }

    /// Only what the VM says counts. What it has not begun it is told not to begin; what it is at is awaited, or, with
    /// a `reason`, ended where that is still possible.
    pub(super) fn ask_what_became_of_it(&mut self, reason: Option<&str>) -> Result<(), Halt> {
        let began = Instant::now();
        let mut told = false;
        loop {
            let now = self.vm.query_pivot(self.id)?;
            let why = || now.error.clone().or_else(|| reason.map(str::to_owned));
            match now.state.as_str() {
                "pivoted" => return self.pivoted(&now),
                "aborted" => return self.abort_live(json!({"reason": why()})),
                "undetermined" => {
                    self.confirm_sources()?;
                    // Durably here first: from then on no witness counts.
                    return self
                        .append(Stage::Aborted, json!({"reason": why(), "witness": "undetermined"}))
                        .map(drop);
                }
                "none" | "draining" if !told && (reason.is_some() || now.state == "none") => {
                    told = true;
                    let operation = self.operation();
                    let Err(error) = self.orders()?.abort_pivot(&operation) else { continue };
                    let Some(refusal) = error.refusal() else { return Err(error.into()) };
                    let refusal = refusal.desc.clone();
                    // Too late: then there is another answer to the question. If there is none, it is for its generation,
                    // as another client has pivoted meanwhile: nor can this one begin any more.
                    if self.vm.query_pivot(self.id)?.state == "none" {
                        return self.abort_live(json!({"reason": refusal}));
                    }
                }
                state if began.elapsed() > PATIENCE => {
                    return Err(Halt::Unknown(format!("The VM still says '{state}'")));
                }
                _ => self.vm.await_event(LOOK)?,
            }
        }
    }

    /// A VM that could not tell holds its guest until it is told. Whoever wrote the decision down may have died before he
    /// told it.
    pub(super) fn tell_undetermined(&mut self) -> Result<(), Halt> {
        if self.plan().protocol == Protocol::B || self.log().entry(Stage::PivotIntent).is_none() {
            return Ok(());
        }
        match self.vm.query_pivot(self.id)?.state.as_str() {
            "undetermined" => {
                self.place("abort", "before")?;
                let operation = self.operation();
                self.orders()?.abort_pivot(&operation)?;
                self.place("abort", "done")
            }
            "pivoted" => {
                let targets =
                    self.plan().disks.into_iter().map(|disk| disk.target.path.display().to_string());
                Err(self.stop_moved(&targets.collect::<Vec<_>>()))
            }
            _ => Ok(()),
        }
    }

    fn pivoted(&mut self, now: &PivotNow) -> Result<(), Halt> {
        self.timeline.held = now.held;
        let held = now.held.map(|held| u64::try_from(held.as_micros()).unwrap_or(u64::MAX));
        self.append(Stage::Pivoted, json!({"held-us": held, "consistency": self.unfrozen()})).map(drop)
    }

    /// Without a freeze nothing more will be known.
    fn unfrozen(&self) -> Value {
        if self.progress().freeze() == Hold::None { "crash".into() } else { Value::Null }
    }

    fn decide_here(&mut self) -> Result<(), Halt> {
        self.place("complete", "before")?;
        let held = Instant::now();
        match self.await_pending() {
            Ok(()) => {}
            // Nobody here has told a job to finalize; another client may have.
            Err(Halt::Abort(reason)) => return self.abort_live(json!({"reason": reason})),
            Err(halt) => return Err(halt),
        }
        self.place("complete", "done")?;
        self.append(Stage::Commit, json!({}))?;
        self.finalize_all()?;
        self.timeline.held = Some(held.elapsed());
        Ok(())
    }

    fn await_pending(&mut self) -> Result<(), Halt> {
        for job in self.jobs_now()? {
            match job.status.as_str() {
                // Refused if a coordinator that is dead by now has told it: it is ready until its disk has come to rest.
                "ready" => match self.orders()?.job("complete", &job.id) {
                    Err(error) if error.refusal().is_none() => return Err(error.into()),
                    _ => {}
                },
                // Told already.
                "waiting" | "pending" => {}
                _ => return Err(Halt::Abort(format!("Job '{}' is {}", job.id, job.status))),
            }
        }
        let began = Instant::now();
        loop {
            let jobs = self.jobs_now()?;
            if jobs.iter().all(|job| job.status == "pending") {
                return Ok(());
            }
            if let Some(job) = jobs.iter().find(|job| job.error.is_some() || job.status == "concluded") {
                let error = job.error.as_deref().unwrap_or("it has ended");
                return Err(Halt::Abort(format!("Job '{}': {error}", job.id)));
            }
            if began.elapsed() > PATIENCE {
                return Err(Halt::Abort("The disks do not come to rest".to_owned()));
            }
            self.vm.await_event(LOOK)?;
        }
    }

    /// Protocol B, after the commit: forward, and never back.
    pub(super) fn finalize_all(&mut self) -> Result<(), Halt> {
        self.move_all()?;
        let log = self.log();
        let known = log.entry(Stage::Commit).and_then(|commit| commit.details.get("consistency"));
        let consistency = known.cloned().unwrap_or_else(|| self.unfrozen());
        self.append(Stage::Pivoted, json!({"consistency": consistency})).map(drop)
    }

    /// After a decision for the targets: jobs that are pending are finalized, and every disk is where it is to be.
    pub(super) fn move_all(&mut self) -> Result<(), Halt> {
        self.place("finalize", "before")?;
        let plan = self.plan();
        let names: Vec<String> = (0..plan.disks.len()).map(|index| self.name(index)).collect();
        let jobs = self.vm.jobs()?;
        for name in &names {
            if jobs.iter().any(|job| job.id == *name && job.status == "pending") {
                self.orders()?.job("finalize", name)?;
                self.place("finalize", "done")?;
            }
        }
        let began = Instant::now();
        loop {
            let disks = self.disks_now()?;
            let stays = disks.iter().zip(&plan.disks).find(|(now, plan)| !plan.target.is_at(&now.file));
            let Some((now, disk)) = stays else { return Ok(()) };
            let jobs = self.vm.jobs()?;
            let under_way = jobs.iter().any(|job| {
                names.contains(&job.id) && matches!(job.status.as_str(), "waiting" | "pending" | "ready")
            });
            if !under_way || began.elapsed() > PATIENCE {
                // Another client has taken the decision back. What the guest writes now is lost: it must not.
                self.stop_for_all()?;
                let reason = format!(
                    "disk '{}' works on {}, although it is decided that it is {}: another client has cancelled its job. The \
                     VM is stopped",
                    disk.disk,
                    now.file.display(),
                    disk.target.path.display()
                );
                return Err(self.stopped(reason, "Move it to its target"));
            }
            self.vm.await_event(LOOK)?;
        }
    }
}
