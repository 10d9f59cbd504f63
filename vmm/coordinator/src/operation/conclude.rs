//! What follows from a decision, and how everything is given back: to the guest, to the VM, to the host.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::freeze::Freezer;
use super::steps::{Halt, Runner, is_untouched};
use super::vm::JobNow;
use crate::chain;
use crate::disks::DurableDisks;
use crate::durable;
use crate::journal::{Consistency, Entry, Hold, JournalError, Side, Stage};
use crate::record::witness::Witness;
use crate::resolve;
use crate::stamp::Stamp;

/// How long a job that was cancelled may take to leave.
const LEAVING: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(50);

impl Runner<'_> {
    /// The targets are the disks: in the durable configuration before the guest goes on, then everywhere else. A guest
    /// does not wait for a configuration that cannot be written: the journal says the same, and outranks it.
    pub(super) fn conclude_target(&mut self) -> Result<(), Halt> {
        let (state, plan) = (self.journal.state_dir().clone(), self.plan());
        if !self.progress().is_configured() {
            // Another client has moved some disks, and the others are pending.
            if self.log().entry(Stage::Resolved(Side::Target)).is_some() {
                self.move_all()?;
            }
            self.confirm_ours()?;
            let committed = DurableDisks::commit(&state, self.operation(), &plan);
            let committed = committed.map_err(|error| Halt::Unknown(chain(&error)));
            if let Err(halt) =
                committed.and_then(|_| self.append(Stage::ConfigCommitted, json!({})).map(drop))
            {
                self.release()?;
                return Err(halt);
            }
        }
        self.release()?;
        let concluded = resolve::conclude_target(&mut self.journal, self.id, &mut self.warnings);
        concluded.map_err(|error| Halt::Unknown(chain(&error)))?;
        let left = self.leave_vm()?;
        self.warnings.extend(left.err());
        // The images that were the disks; those that came with the VM have gone by themselves.
        for node in self.log().detail("nodes").and_then(Value::as_array).into_iter().flatten() {
            if let Some(node) = node.as_str().filter(|node| !node.starts_with('#')) {
                self.forget_node(node)?;
            }
        }
        self.done()
    }

    /// The sources are the disks, as before, and nothing is left of the targets that this operation has made.
    pub(super) fn conclude_source(&mut self) -> Result<(), Halt> {
        self.confirm_sources()?;
        self.tell_undetermined()?;
        self.release()?;
        self.leave_vm()?.map_err(Halt::Unknown)?;
        // Until its job had gone, any client could still move a disk.
        self.confirm_sources()?;
        for index in 0..self.plan().disks.len() {
            self.forget_node(&self.name(index))?;
        }
        self.remove_targets()?;
        self.done()
    }

    /// The targets are copies; nothing is stamped. Mirrors that are pending hold the guest's I/O, so they go before it is
    /// let go.
    pub(super) fn conclude_copy(&mut self) -> Result<(), Halt> {
        self.confirm_sources()?;
        self.leave_vm()?.map_err(Halt::Unknown)?;
        self.release()?;
        let (state, plan, operation) = (self.journal.state_dir().clone(), self.plan(), self.operation());
        for (index, disk) in plan.disks.iter().enumerate() {
            self.forget_node(&self.name(index))?;
            self.confirm_ours()?;
            let removed = Stamp::remove(&state, &disk.target, &operation);
            self.warn(removed.map(drop));
        }
        self.done()
    }

    /// The guest goes on, and is thawed, where this operation stopped and froze it. That the one cannot be written down
    /// does not keep the other from being done.
    pub(super) fn release(&mut self) -> Result<(), Halt> {
        match self.resume_vm() {
            Err(halt) if !matches!(halt, Halt::Journal(_)) => Err(halt),
            resumed => self.thaw_guest().and(resumed),
        }
    }

    fn resume_vm(&mut self) -> Result<(), Halt> {
        if self.progress().pause() == Hold::None {
            return Ok(());
        }
        self.place("cont", "before")?;
        self.cont()?;
        self.place("cont", "done")?;
        self.timeline.paused = self.paused_since.take().map(|since| since.elapsed());
        self.append(Stage::Resumed, json!({})).map(drop)
    }

    fn thaw_guest(&mut self) -> Result<(), Halt> {
        if self.progress().freeze() == Hold::None {
            return Ok(());
        }
        self.place("thaw", "before")?;
        let details = self.thaw()?;
        self.place("thaw", "done")?;
        self.timeline.frozen = self.frozen_since.take().map(|since| since.elapsed());
        self.append(Stage::Thawed, details).map(drop)
    }

    fn cont(&mut self) -> Result<(), Halt> {
        let log = self.log();
        let was_running = log.entry(Stage::StopIntent).and_then(|entry| entry.details.get("was-running"));
        // A VM that knows of operations takes back this one's pause and no other.
        if self.holder().is_some() || was_running != Some(&Value::Bool(false)) {
            let holder = self.holder();
            self.orders()?.cont(holder)?;
        }
        Ok(())
    }

    /// What becomes of the guest when nothing can be written down any more. Before anything is decided it is held for
    /// nothing: it goes on, without a record, and whoever settles the operation does the same once more. Where another
    /// coordinator has taken over, the guest is that one's to let go.
    pub(super) fn let_go(&mut self, halt: &Halt) {
        let progress = self.progress();
        if matches!(halt, Halt::Journal(JournalError::Fenced { .. })) {
            if let Some(freezer) = self.freezer.take() {
                freezer.leave();
            }
            return;
        }
        if !matches!(halt, Halt::Journal(_)) || progress.decision().is_some() || progress.is_intended() {
            return;
        }
        if progress.pause() != Hold::None {
            // There is nobody to tell but who settles it.
            let _ = self.cont();
        }
        if progress.freeze() != Hold::None {
            let _ = self.thaw();
        }
    }

    /// Thaws, and says what the freeze was worth. An agent that does not answer is not waited for without end: its lease
    /// thaws, and that nobody saw the guest frozen until now is what makes the freeze void.
    fn thaw(&mut self) -> Result<Value, Halt> {
        self.confirm_ours()?;
        // What another client has moved was moved at a moment that nobody knows.
        let is_known = |entry: &Entry| entry.details.get("by").is_none_or(|by| by != "client");
        let log = self.log();
        let matters = log.progress.decision() != Some(Side::Source) && log.entries.iter().all(is_known);
        let freezer = match (self.freezer.take(), &self.connection.agent) {
            // It would be waited for in vain, and be thawed by a request that nobody remembers when it goes on.
            (freezer, _) if !self.vm.is_running()? => {
                freezer.into_iter().for_each(Freezer::leave);
                let vm = self.journal.state_dir().name();
                Err(format!("somebody else has paused the VM; `tarn resume {vm}` lets it go on"))
            }
            (Some(freezer), _) => Ok(freezer),
            (None, Some(agent)) => Freezer::connect(agent).map_err(|error| chain(&error)),
            (None, None) => Err("the guest's agent is not known".to_owned()),
        };
        let thawed = freezer.and_then(|mut freezer| {
            let worth = freezer.consistency().map_err(|error| chain(&error));
            freezer.thaw().map_err(|error| chain(&error))?;
            worth
        });
        Ok(match thawed {
            Ok(worth) if matters => json!({"consistency": worth}),
            Ok(_) => json!({}),
            Err(error) => {
                self.warnings.push(format!("The guest cannot be thawed, its lease will do it: {error}"));
                json!({"by": "lease", "error": error, "consistency": Consistency::Void})
            }
        })
    }

    /// Ends and forgets this operation's jobs; the inner error says which do not end. One of those writes to its target
    /// still.
    fn leave_vm(&mut self) -> Result<Result<(), String>, Halt> {
        let began = Instant::now();
        let mut told = Vec::new();
        loop {
            let names: Vec<String> = (0..self.plan().disks.len()).map(|index| self.name(index)).collect();
            let mut jobs = self.vm.jobs()?;
            jobs.retain(|job| names.contains(&job.id));
            for JobNow { id, status, .. } in &jobs {
                let asked = if status == "concluded" {
                    self.orders()?.job("dismiss", id)
                } else if told.contains(id) {
                    continue;
                } else {
                    told.push(id.clone());
                    self.orders()?.cancel(id, true)
                };
                match asked {
                    Err(error) if error.refusal().is_none() => return Err(error.into()),
                    // It has gone by itself meanwhile, or is about to.
                    _ => {}
                }
            }
            if jobs.is_empty() {
                return Ok(Ok(()));
            }
            if began.elapsed() > LEAVING {
                let left: Vec<_> = jobs.iter().map(|job| format!("{} is {}", job.id, job.status)).collect();
                return Ok(Err(format!("Jobs do not end: {}", left.join(", "))));
            }
            if jobs.iter().any(|job| job.status != "concluded") {
                self.vm.await_event(LOOK)?;
            }
        }
    }

    fn forget_node(&mut self, name: &str) -> Result<(), Halt> {
        match self.orders()?.remove_node(name) {
            Err(error) if error.refusal().is_none() => Err(error.into()),
            // Never opened, or closed already.
            _ => Ok(()),
        }
    }

    /// Images that were there before stay: as they were, if nothing was copied to them yet, and stamped otherwise, as what
    /// they held is gone.
    fn remove_targets(&mut self) -> Result<(), Halt> {
        let (state, log, operation) = (self.journal.state_dir().clone(), self.log(), self.operation());
        for (index, disk) in log.plan.disks.iter().enumerate() {
            self.confirm_ours()?;
            let created = log.has_made(index);
            if !created && !log.may_have_copied() {
                let uncovered = Stamp::uncover(&state, &disk.target, &operation);
                self.warn(uncovered);
                continue;
            }
            let (path, prepared) = (&disk.target.path, log.entry(Stage::Prepared).is_some());
            let is_ours = if prepared { disk.target.is_file(path) } else { is_untouched(path) };
            // The image first: one without a stamp could be taken for a disk.
            let gone = match Stamp::read(&state, &disk.target) {
                // Another image has its name meanwhile.
                Ok(Some(stamp))
                    if created && stamp.operation.id == operation.id && path.exists() && !is_ours =>
                {
                    self.warnings
                        .push(format!("{} is another file than the target, and stays", path.display()));
                    true
                }
                Ok(Some(stamp)) if created && stamp.operation.id == operation.id => {
                    let removed = durable::remove_image(&disk.target.path);
                    let gone = removed.is_ok();
                    self.warn(removed);
                    gone
                }
                // Both are gone, but perhaps not for good.
                Ok(None) => created && !disk.target.path.exists(),
                _ => false,
            };
            if gone {
                let removed = Stamp::remove(&state, &disk.target, &operation);
                self.warn(removed.map(drop));
            }
        }
        Ok(())
    }

    fn done(&mut self) -> Result<(), Halt> {
        if let Some(path) = self.plan().witness {
            self.confirm_ours()?;
            let removed = Witness::remove(&path);
            self.warn(removed);
        }
        self.timeline.whole = Some(self.began.elapsed());
        let mut details = Map::new();
        details.insert("timeline".into(), self.timeline.to_json());
        self.append(Stage::Done, Value::Object(details)).map(drop)
    }

    fn warn<E: std::error::Error>(&mut self, result: Result<(), E>) {
        if let Err(error) = result {
            self.warnings.push(chain(&error));
        }
    }
}
