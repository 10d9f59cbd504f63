//! Pivots carried out: what [`Pivots`] decides is done to the jobs and to the witness.
//!
//! ```text
//!   tarn-pivot ─▶ checks ─▶ Pivots::begin ─┐                     ┌─▶ job: complete, finalize, cancel ─▶ disk
//!   disk: quiesced, switched, detached ────┼─▶ Pivots::hear ─▶ Step ─▶ scribe: PIVOTED, REVOKED ─▶ witness
//!   scribe: written ───────────────────────┘                     └─▶ TARN_PIVOT, answers
//! ```
//!
//! The scribe is a thread: a disk may take its time to make the witness durable, and meanwhile the loop serves
//! everybody else. Whoever asked is answered when the operation is over. As long as it is not, its jobs obey it alone.

mod begin;
mod info;
mod scribe;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use coordinator::failpoint;
use coordinator::record::Operation;
use coordinator::record::witness::{Verdict, Witness};
use protocol::Error;
use uuid::Uuid;

pub use self::info::{PivotDisk, PivotInfo, WitnessState};
use self::scribe::Scribe;
use super::disks::Disks;
use super::lifecycle::{Action, Report, Request};
use super::passes;
use super::pivot::{self, PivotRefused, PivotState, Pivots, Step};
use super::registry::Jobs;

/// Disks that change together; more would not fit into a witness.
const DISKS_MAX: usize = 16;
/// Operations that are over and can be asked about.
const REMEMBERED: usize = 256;
/// How long guest I/O is held for something that does not happen. A guest complains after two minutes.
const HELD_MAX: Duration = Duration::from_secs(60);

/// Who asks, as a number of the caller's.
pub type Asker = u64;

/// An answer that had to wait.
pub type Answer = (Asker, Result<PivotInfo, Error>);

/// What a client asks for.
#[derive(Debug)]
pub struct PivotRequest {
    /// Which operation it is.
    pub operation: Operation,
    /// Names of the mirrors whose targets are to become the disks, all of them ready.
    pub jobs: Vec<String>,
    /// Where the decision is put down.
    pub witness: Option<Witness>,
}

/// What whoever asked wants to hear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Pivoted,
    Aborted,
}

/// The operation in progress.
struct Current {
    info: PivotInfo,
    /// Numbers of its jobs, and their disks.
    jobs: Vec<(u64, usize)>,
    scribe: Option<Scribe>,
    askers: Vec<(Asker, Wish)>,
    /// Until when disks may be held for others, or for the witness.
    deadline: Option<Instant>,
}

/// The pivots of a VM.
#[derive(Default)]
pub(super) struct Pivoting {
    machine: Pivots,
    current: Option<Current>,
    over: VecDeque<PivotInfo>,
    /// What has happened and has not been thought about yet.
    reports: VecDeque<pivot::Report>,
    answers: Vec<Answer>,
}

/// What clients ask.
impl Jobs {
    /// Makes the targets of mirrors the disks, all or none. `None`: `asker` is answered later
    /// ([`take_answers`](Self::take_answers)). An operation that was asked for before is not done again: its outcome is
    /// the answer.
    ///
    /// # Errors
    ///
    /// It is refused, and nothing has changed; or it was carried out before, and did not pivot.
    pub fn pivot(
        &mut self,
        disks: &dyn Disks,
        request: PivotRequest,
        asker: Asker,
    ) -> Result<Option<PivotInfo>, Error> {
        let PivotRequest { operation, jobs, witness } = request;
        if self.pivoting.machine.state(operation.id) != PivotState::None {
            self.pivoting.machine.begin(operation, 0, false)?;
            return self.join(operation.id, asker, Wish::Pivoted);
        }
        let jobs = self.pivot_jobs(&jobs)?;
        if witness.is_some() {
            self.check_durable(&jobs)?;
        }
        let members = jobs.iter().map(|(index, disk)| self.pivot_disk(*index, *disk, disks)).collect();
        let numbers = jobs.iter().map(|(index, disk)| (self.entries[*index].number, *disk)).collect();
        let info = PivotInfo {
            operation,
            state: PivotState::Draining,
            witness: if witness.is_some() { WitnessState::Pending } else { WitnessState::None },
            disks: members,
            held: None,
            error: None,
        };
        let mut machine = self.pivoting.machine.clone();
        let witnessed = witness.is_some() && !failpoint::mistake("switch-before-witness");
        let steps = machine.begin(operation, jobs.len(), witnessed)?;
        let scribe = witness.map(|witness| self.scribe(witness, &info)).transpose()?;
        passes("begin", "before");
        self.pivoting.machine = machine;
        self.events.push(info.event(info.state));
        let askers = vec![(asker, Wish::Pivoted)];
        self.pivoting.current = Some(Current { info, jobs: numbers, scribe, askers, deadline: None });
        self.pivot_steps(steps, disks);
        self.drive_pivot(disks);
        passes("begin", "done");
        Ok(None)
    }

    /// Ends an operation on its sources. Where it is undetermined, the caller has put that down, durably.
    ///
    /// # Errors
    ///
    /// It is decided, or being decided.
    pub fn abort_pivot(
        &mut self,
        disks: &dyn Disks,
        operation: Operation,
        asker: Asker,
    ) -> Result<Option<PivotInfo>, Error> {
        let unknown = self.pivoting.machine.state(operation.id) == PivotState::None;
        let steps = self.pivoting.machine.abort(&operation)?;
        if unknown {
            // A command that is still on its way must not begin it later.
            let error = Some("It was aborted before it began".to_owned());
            let info = PivotInfo { error, ..PivotInfo::bare(operation, PivotState::Aborted) };
            self.pivoting.remember(info);
        } else if let Some(current) = &mut self.pivoting.current {
            current.info.error.get_or_insert_with(|| "It was aborted by a client".to_owned());
        }
        let over = matches!(steps.as_slice(), [Step::Answer(_)]);
        if over {
            return self.query_pivot(Some(operation.id)).map(Some);
        }
        if let Some(current) = &mut self.pivoting.current {
            current.askers.push((asker, Wish::Aborted));
        }
        self.pivot_steps(steps, disks);
        self.drive_pivot(disks);
        Ok(None)
    }

    /// What is known of an operation; without a name, of the one in progress or else of the last.
    ///
    /// # Errors
    ///
    /// Without a name: there was none yet.
    pub fn query_pivot(&self, id: Option<Uuid>) -> Result<PivotInfo, Error> {
        let Pivoting { current, over, machine, .. } = &self.pivoting;
        let known = current.iter().map(|current| &current.info).chain(over.iter().rev());
        let found = known.into_iter().find(|info| id.is_none_or(|id| info.operation.id == id));
        match (found, id) {
            (Some(info), _) => Ok(PivotInfo { state: machine.state(info.operation.id), ..info.clone() }),
            (None, Some(id)) => {
                let operation = Operation { id, generation: 0, epoch: 0 };
                Ok(PivotInfo::bare(operation, PivotState::None))
            }
            (None, None) => Err(Error::generic("There was no operation yet")),
        }
    }

    /// An operation of this VM's own making, later than all it knows.
    ///
    /// # Errors
    ///
    /// The kernel has no random numbers.
    pub fn next_operation(&self) -> Result<Operation, Error> {
        let mut bytes = [0; 16];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| Error::generic(format!("Cannot name the operation: {error}")))?;
        Ok(self.pivoting.machine.next(uuid::Builder::from_random_bytes(bytes).into_uuid()))
    }

    /// The operation in progress, which a shutdown of the guest has to wait for.
    pub fn open_operation(&self) -> Option<Operation> {
        self.pivoting.machine.open()
    }

    /// Answers that had to wait.
    pub fn take_answers(&mut self) -> Vec<Answer> {
        std::mem::take(&mut self.pivoting.answers)
    }

    /// Decides the operation in progress: the VM is about to end. Returns whether it could not be: then the guest must
    /// not see another request of its completed.
    pub fn conclude_pivot(&mut self, disks: &dyn Disks) -> bool {
        if let Some(operation) = self.pivoting.machine.open()
            && self.pivoting.machine.state(operation.id) == PivotState::Draining
        {
            if let Some(current) = &mut self.pivoting.current {
                current.info.error.get_or_insert_with(|| "The VM ended".to_owned());
            }
            let steps = self.pivoting.machine.abort(&operation).unwrap_or_default();
            self.pivot_steps(steps, disks);
            self.drive_pivot(disks);
        }
        while let Some(current) = &self.pivoting.current
            && self.pivoting.machine.is_deciding()
            && let Some(scribe) = &current.scribe
        {
            match scribe.wait() {
                Some(result) => self.witnessed(result, disks),
                None => return true,
            }
        }
        self.pivoting
            .machine
            .open()
            .is_some_and(|open| self.pivoting.machine.state(open.id) == PivotState::Undetermined)
    }
}

/// What happens to an operation.
impl Jobs {
    /// When [`tick`](Self::tick) is next needed.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.pivoting.current.as_ref()?.deadline
    }

    /// Ends what has held guest I/O for too long: one disk for another that does not come to rest, or all for a witness
    /// that does not become durable.
    pub fn tick(&mut self, disks: &dyn Disks, now: Instant) {
        let Some(current) = &mut self.pivoting.current else { return };
        let waits = self.pivoting.machine.is_deciding()
            || self.pivoting.machine.state(current.info.operation.id) == PivotState::Draining;
        if current.deadline.take_if(|deadline| *deadline <= now).is_some() && waits {
            let error = format!("Guest I/O was held for {} s", HELD_MAX.as_secs());
            tracing::error!(operation = %current.info.operation.id, "{error}");
            current.info.error.get_or_insert(error);
            if current.info.witness != WitnessState::None && self.pivoting.machine.is_deciding() {
                current.info.witness = WitnessState::Failed;
                // What it still has to say is of no interest any more.
                current.scribe = None;
            }
            self.pivoting.reports.push_back(pivot::Report::Late);
            self.drive_pivot(disks);
        }
    }

    /// The witness has been written to, or not.
    pub(super) fn hear_scribe(&mut self, disks: &dyn Disks) {
        while let Some(Current { scribe: Some(scribe), .. }) = &self.pivoting.current
            && let Some(result) = scribe.take()
        {
            self.witnessed(result, disks);
        }
    }

    fn witnessed(&mut self, result: Result<(), String>, disks: &dyn Disks) {
        passes("witnessed", "before");
        let Some(current) = &mut self.pivoting.current else { return };
        let revoking = current.info.witness == WitnessState::Failed;
        current.info.witness = match &result {
            Ok(()) if revoking => WitnessState::Revoked,
            Ok(()) => WitnessState::Durable,
            Err(_) => WitnessState::Failed,
        };
        let durable = result.is_ok();
        if let Err(error) = result {
            tracing::error!(operation = %current.info.operation.id, "{error}");
            current.info.error.get_or_insert(error);
        }
        self.pivoting.reports.push_back(pivot::Report::Written { durable });
        self.drive_pivot(disks);
    }

    /// Keeps in mind what a job's disk reports, if it is part of the operation in progress.
    pub(super) fn note_for_pivot(&mut self, number: u64, report: &Report) {
        let Some(current) = &mut self.pivoting.current else { return };
        let Some(job) = current.jobs.iter().position(|(part, _)| *part == number) else { return };
        let why = |current: &mut Current, error: &str| {
            let device = &current.info.disks[job].device;
            let text = format!("Disk '{device}': {error}");
            current.info.error.get_or_insert(text);
        };
        let heard = match report {
            Report::Quiesced => {
                current.deadline.get_or_insert_with(|| Instant::now() + HELD_MAX);
                pivot::Report::Pending(job)
            }
            Report::Failed(error) => {
                why(current, error);
                pivot::Report::Failed(job)
            }
            // It would hold the others for as long as it stands still.
            Report::Error { action: Action::Stop, nospace, .. } => {
                why(current, if *nospace { "No space left on device" } else { "Input/output error" });
                pivot::Report::Stopped
            }
            Report::Switched => pivot::Report::Switched(job),
            Report::Detached => pivot::Report::Ended(job),
            Report::Ready | Report::Error { .. } | Report::Done => return,
        };
        self.pivoting.reports.push_back(heard);
    }

    /// Does what follows from all that has happened.
    pub(super) fn drive_pivot(&mut self, disks: &dyn Disks) {
        while let Some(report) = self.pivoting.reports.pop_front() {
            let steps = self.pivoting.machine.hear(report);
            self.pivot_steps(steps, disks);
        }
    }

    /// Whether a job is part of the operation in progress.
    pub(super) fn is_pivoting(&self, number: u64) -> bool {
        self.pivoting.part(number).is_some()
    }

    /// Refuses what others ask of a job of the operation in progress.
    pub(super) fn check_not_pivoting(&self, index: usize) -> Result<(), Error> {
        let entry = &self.entries[index];
        match self.pivoting.part(entry.number) {
            None => Ok(()),
            Some(operation) => Err(Error::generic(format!(
                "Job '{}' is part of operation {operation}, which is in progress; 'tarn-pivot-abort' ends it",
                entry.job.id()
            ))),
        }
    }

    fn scribe(&self, witness: Witness, info: &PivotInfo) -> Result<Scribe, Error> {
        Scribe::start(witness, info, [(self.post)(), (self.post)()])
    }

    fn pivot_steps(&mut self, steps: Vec<Step>, disks: &dyn Disks) {
        for step in steps {
            let number = |job: usize| self.pivoting.current.as_ref().map(|current| current.jobs[job].0);
            match step {
                Step::Hold(job) => {
                    let Some(index) = number(job).and_then(|number| self.position(number)) else { continue };
                    if self.entries[index].job.hold() {
                        self.pivoting.reports.push_back(pivot::Report::Pending(job));
                    } else {
                        self.ask_of_pivot(index, Request::Complete, disks);
                    }
                }
                Step::Switch(job) | Step::End(job) => {
                    let Some(index) = number(job).and_then(|number| self.position(number)) else {
                        // It has ended by itself.
                        self.pivoting.reports.push_back(pivot::Report::Ended(job));
                        continue;
                    };
                    let switch = matches!(step, Step::Switch(_));
                    let request = if switch { Request::Finalize } else { Request::Cancel { force: true } };
                    self.ask_of_pivot(index, request, disks);
                }
                Step::Decide => self.write(Verdict::Pivoted),
                Step::Revoke => self.write(Verdict::Revoked),
                Step::Answer(state) => self.answer_pivot(state, disks),
            }
        }
    }

    fn ask_of_pivot(&mut self, index: usize, request: Request, disks: &dyn Disks) {
        self.entries[index].refresh(disks);
        let number = self.entries[index].number;
        match self.entries[index].job.ask(request) {
            Ok(steps) => self.carry_out(number, steps, disks, request == Request::Finalize),
            // One that has failed meanwhile cannot be cancelled; it ends by itself.
            Err(error) => tracing::debug!(%error, "A job of a pivot"),
        }
    }

    fn write(&mut self, verdict: Verdict) {
        let Some(current) = &mut self.pivoting.current else { return };
        current.deadline = Some(Instant::now() + HELD_MAX);
        if verdict == Verdict::Pivoted {
            self.events.push(current.info.event(PivotState::Held));
        }
        let sent = current.scribe.as_ref().is_some_and(|scribe| scribe.write(verdict));
        if !sent {
            // Its thread is gone: it has panicked, and nobody can tell what it wrote.
            self.pivoting.reports.push_back(pivot::Report::Written { durable: false });
        }
    }

    fn answer_pivot(&mut self, state: PivotState, disks: &dyn Disks) {
        passes("answer", "before");
        let Some(current) = &mut self.pivoting.current else { return };
        current.info.state = state;
        current.deadline = None;
        let held = current.jobs.iter().filter_map(|(_, disk)| disks.held(*disk)).max();
        let over = matches!(state, PivotState::Pivoted | PivotState::Aborted);
        if over {
            current.info.held = held;
        }
        let info = current.info.clone();
        let askers = std::mem::take(&mut current.askers);
        self.events.push(info.event(info.state));
        let answers = askers.into_iter().map(|(asker, wish)| (asker, answer(info.clone(), wish)));
        self.pivoting.answers.extend(answers);
        if over {
            self.pivoting.current = None;
            self.pivoting.remember(info);
        }
    }
}

impl Pivoting {
    fn part(&self, number: u64) -> Option<Uuid> {
        let current = self.current.as_ref()?;
        current.jobs.iter().any(|(part, _)| *part == number).then_some(current.info.operation.id)
    }

    fn remember(&mut self, info: PivotInfo) {
        if self.over.len() == REMEMBERED {
            self.over.pop_front();
        }
        self.over.push_back(info);
    }
}

fn answer(info: PivotInfo, wish: Wish) -> Result<PivotInfo, Error> {
    let id = info.operation.id;
    let error = info.error.as_deref().unwrap_or("for an unknown reason");
    match (info.state, wish) {
        (PivotState::Pivoted, Wish::Pivoted) | (PivotState::Aborted, Wish::Aborted) => Ok(info),
        (PivotState::Undetermined, _) => Err(Error::generic(format!(
            "Operation {id} is undetermined: its witness can neither be made durable nor be revoked ({error}). Guest \
             I/O is held: put down durably that it is aborted, then use 'tarn-pivot-abort'"
        ))),
        (PivotState::Aborted, Wish::Pivoted) => {
            Err(Error::generic(format!("Operation {id} was aborted: {error}")))
        }
        (state, _) => Err(PivotRefused::Late { id, state }.into()),
    }
}

impl From<PivotRefused> for Error {
    fn from(error: PivotRefused) -> Self {
        Self::generic(error.to_string())
    }
}
