//! The jobs of a VM: who asks what of which, and what becomes of it.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use block::CopyMode;
use protocol::Error;

use super::create::{self, Preallocation};
use super::disks::{Disks, NotDone};
use super::entry::{Entry, Maker, Work};
pub use super::entry::{Estimates, JobInfo};
use super::lifecycle::{Job, JobKind, JobOptions, JobRefused, Note, Order, Report, Request, Step};
use super::nodes::{Nodes, is_well_formed};
use super::passes;
use super::pivoting::Pivoting;
use super::state::{JobStatus, Verb};
use crate::monitor::Event;

/// Jobs at a time: a disk has one, and what is over waits for a client.
const JOBS_MAX: usize = 128;

/// What a thread beside the control loop has done.
#[derive(Debug, PartialEq, Eq)]
pub enum JobDone {
    /// A job that has no disk has come to its end.
    Made {
        /// Counts jobs: names are used again.
        number: u64,
        /// Why it has failed.
        result: Result<(), String>,
    },
    /// The witness of a pivot has been written to.
    Witnessed,
}

/// How the threads of jobs tell of their end.
pub type Post = Box<dyn Fn() -> Box<dyn FnOnce(JobDone) + Send>>;

/// All jobs and all nodes of a VM.
pub struct Jobs {
    /// Images by name.
    pub nodes: Nodes,
    pub(super) entries: Vec<Entry>,
    pub(super) pivoting: Pivoting,
    pub(super) numbers: u64,
    /// What comes after the reply to the command that caused it.
    due: VecDeque<(u64, Report)>,
    /// By disk: mirrors whose end was waited for, and whose report is still on its way.
    pub(super) heard_of: Vec<u32>,
    pub(super) events: Vec<Event>,
    pub(super) post: Post,
}

/// Which commands ask: they name a job that is not there differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `block-job-`.
    BlockJob,
    /// `job-`.
    Job,
}

/// What a client asks, and nobody but it waits for.
impl Jobs {
    /// No job yet. `post` gives each thread of a job its way to [`Self::done`].
    pub fn new(nodes: Nodes, disks: usize, post: Post) -> Self {
        let (entries, due, events) = (Vec::new(), VecDeque::new(), Vec::new());
        let pivoting = Pivoting::default();
        Self { nodes, entries, pivoting, numbers: 0, due, heard_of: vec![0; disks], events, post }
    }

    /// What happened since the last call, in order.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Asks something of a job.
    ///
    /// # Errors
    ///
    /// There is no such job, or it refuses.
    pub fn ask(
        &mut self,
        disks: &dyn Disks,
        family: Family,
        id: &str,
        request: Request,
    ) -> Result<(), Error> {
        let index = self.find(family, id)?;
        if !matches!(request, Request::SetSpeed(_)) {
            self.check_not_pivoting(index)?;
        }
        if let (Request::Finalize, Some(group)) = (request, self.entries[index].group) {
            self.entries[index].job.check(Verb::Finalize).map_err(JobRefused::from)?;
            self.finish_group(group, disks);
            return Ok(());
        }
        // What is done and what remains, as of now: a mirror that ends takes it along.
        self.entries[index].refresh(disks);
        let steps = self.entries[index].job.ask(request)?;
        let number = self.entries[index].number;
        let wait = request == Request::Finalize;
        self.carry_out(number, steps, disks, wait);
        Ok(())
    }

    /// `block-job-change`: only from the background to write-blocking, as in QEMU.
    ///
    /// # Errors
    ///
    /// There is no such job, it is no mirror, or its state does not admit it.
    pub fn change_mode(&mut self, disks: &dyn Disks, id: &str, wanted: CopyMode) -> Result<(), Error> {
        let index = self.find(Family::BlockJob, id)?;
        self.entries[index].job.check(Verb::Change).map_err(JobRefused::from)?;
        let kind = self.entries[index].job.kind();
        let unfit = || Err(Error::generic("Job type does not support change"));
        match &mut self.entries[index].work {
            Work::Create(_) => unfit(),
            Work::Mirror { .. } if kind != JobKind::Mirror => unfit(),
            Work::Mirror { mode, .. } if *mode == wanted => Ok(()),
            Work::Mirror { .. } if wanted == CopyMode::Background => {
                Err(Error::generic("Change to copy mode 'background' is not implemented"))
            }
            Work::Mirror { mode, .. } => {
                *mode = wanted;
                self.ask(disks, Family::BlockJob, id, Request::SetMode(wanted))
            }
        }
    }

    /// Makes an image in a job of its own.
    ///
    /// # Errors
    ///
    /// The name is none, or taken; no thread can be had.
    pub fn create(
        &mut self,
        id: String,
        path: PathBuf,
        size: u64,
        preallocation: Preallocation,
    ) -> Result<(), Error> {
        self.check_id(&id)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (post, stopped, number) = ((self.post)(), Arc::clone(&stop), self.numbers);
        let body = move || {
            let result = create::create(&path, size, preallocation, &stopped);
            post(JobDone::Made { number, result });
        };
        let spawned = thread::Builder::new().name(format!("job-{number}")).spawn(body);
        let thread = spawned.map_err(|error| Error::generic(format!("Cannot start the job: {error}")))?;
        let options =
            JobOptions { id, kind: JobKind::Create, speed: 0, auto_finalize: true, auto_dismiss: false };
        self.start(options, Work::Create(Maker { stop, thread: Some(thread) }));
        Ok(())
    }

    /// All jobs, the newest first.
    pub fn list(&mut self, disks: &dyn Disks) -> Vec<JobInfo> {
        self.entries.iter_mut().for_each(|entry| entry.refresh(disks));
        self.entries.iter().rev().map(Entry::info).collect()
    }

    /// The job that works on disk `disk`, if there is one.
    pub fn on_disk(&self, disk: usize) -> Option<&Job> {
        self.mirror_of(disk).map(|index| &self.entries[index].job)
    }
}

/// What happens to jobs.
impl Jobs {
    /// Disk `disk` reports of its mirror.
    pub fn hear(&mut self, disks: &dyn Disks, disk: usize, report: Report) {
        let ends = matches!(report, Report::Switched | Report::Detached);
        match self.heard_of.get_mut(disk) {
            None => return,
            // All of it is of a mirror whose end is known already.
            Some(0) => {}
            Some(left) => return *left -= u32::from(ends),
        }
        let Some(index) = self.mirror_of(disk) else { return };
        self.entries[index].refresh(disks);
        if report == Report::Quiesced {
            passes("quiesced", "before");
        }
        self.apply(index, disk, report, disks);
        self.drive_pivot(disks);
    }

    /// A thread has done what it was to do.
    pub fn done(&mut self, disks: &dyn Disks, done: JobDone) {
        match done {
            JobDone::Made { number, result: Ok(()) } => self.tell(number, Report::Done, disks),
            JobDone::Made { number, result: Err(error) } => {
                self.tell(number, Report::Failed(error), disks);
                self.tell(number, Report::Detached, disks);
            }
            JobDone::Witnessed => self.hear_scribe(disks),
        }
    }

    /// Does what was left for after the reply.
    pub fn settle(&mut self, disks: &dyn Disks) {
        while let Some((number, report)) = self.due.pop_front() {
            self.tell(number, report, disks);
        }
    }

    /// The VM goes on.
    pub fn forget_errors(&mut self) {
        self.entries.iter_mut().for_each(|entry| entry.job.forget_error());
    }

    /// Ends all jobs, and waits for it: the VM is about to end.
    pub fn end_all(&mut self, disks: &dyn Disks) {
        for number in self.entries.iter().map(|entry| entry.number).collect::<Vec<_>>() {
            let Some(index) = self.position(number) else { continue };
            self.entries[index].refresh(disks);
            // One that has been told how to end, or is over, refuses.
            if let Ok(steps) = self.entries[index].job.ask(Request::Cancel { force: true }) {
                self.carry_out(number, steps, disks, false);
            }
        }
        for number in self.entries.iter().map(|entry| entry.number).collect::<Vec<_>>() {
            self.await_end(number, disks);
            if let Some(index) = self.position(number)
                && matches!(self.entries[index].work, Work::Create(_))
            {
                self.tell(number, Report::Detached, disks);
            }
            if let Some(index) = self.position(number)
                && let Ok(steps) = self.entries[index].job.ask(Request::Dismiss)
            {
                self.carry_out(number, steps, disks, false);
            }
        }
        self.drive_pivot(disks);
    }
}

/// The parts.
impl Jobs {
    pub(super) fn check_id(&self, id: &str) -> Result<(), Error> {
        if !is_well_formed(id) {
            return Err(Error::generic(format!("Invalid job ID '{id}'")));
        }
        if self.entries.iter().any(|entry| entry.job.id() == id) {
            return Err(Error::generic(format!("Job ID '{id}' already in use")));
        }
        if self.entries.len() >= JOBS_MAX {
            return Err(Error::generic(format!("Too many jobs, at most {JOBS_MAX}")));
        }
        Ok(())
    }

    pub(super) fn start(&mut self, options: JobOptions, work: Work) -> u64 {
        self.enlist(Job::start(options), work, None)
    }

    pub(super) fn enlist(&mut self, (job, steps): (Job, Vec<Step>), work: Work, group: Option<u64>) -> u64 {
        let number = self.numbers;
        self.numbers += 1;
        self.entries.push(Entry::new(number, group, job, work));
        self.publish(number, &steps);
        number
    }

    /// Has a job fail once the command that made it is answered.
    pub(super) fn fail_later(&mut self, number: u64, error: &str) {
        self.due.push_back((number, Report::Failed(error.to_owned())));
    }

    /// Whether there is a block job of that name.
    ///
    /// # Errors
    ///
    /// There is none.
    pub fn check_block_job(&self, id: &str) -> Result<(), Error> {
        self.find(Family::BlockJob, id).map(|_| ())
    }

    pub(super) fn find(&self, family: Family, id: &str) -> Result<usize, Error> {
        let found = self.entries.iter().position(|entry| {
            entry.job.id() == id && (family == Family::Job || entry.job.kind().is_block_job())
        });
        found.ok_or_else(|| match family {
            Family::BlockJob => Error::device_not_active(format!("Block job '{id}' not found")),
            Family::Job => Error::generic("Job not found"),
        })
    }

    pub(super) fn position(&self, number: u64) -> Option<usize> {
        self.entries.iter().position(|entry| entry.number == number)
    }

    pub(super) fn mirror_of(&self, disk: usize) -> Option<usize> {
        let mirrors =
            |entry: &Entry| matches!(entry.work, Work::Mirror { disk: of, attached: true, .. } if of == disk);
        self.entries.iter().position(mirrors)
    }

    fn tell(&mut self, number: u64, report: Report, disks: &dyn Disks) {
        let Some(index) = self.position(number) else { return };
        self.note_for_pivot(number, &report);
        let steps = self.entries[index].job.hear(report);
        self.carry_out(number, steps, disks, false);
    }

    /// A report of an attached mirror: the nodes follow first, so that whoever hears of it finds it true.
    fn apply(&mut self, index: usize, disk: usize, report: Report, disks: &dyn Disks) {
        let ended = match report {
            Report::Switched => {
                self.nodes.switched(disk);
                true
            }
            Report::Detached => {
                self.nodes.detached(disk);
                true
            }
            _ => false,
        };
        let entry = &mut self.entries[index];
        if ended {
            entry.leaving = None;
            if let Work::Mirror { attached, .. } = &mut entry.work {
                *attached = false;
            }
        }
        let number = entry.number;
        self.note_for_pivot(number, &report);
        let steps = self.entries[index].job.hear(report);
        self.carry_out(number, steps, disks, false);
    }

    /// Gives orders and tells clients, in the order of `steps`. A switch is waited for, any other end if `wait`.
    pub(super) fn carry_out(&mut self, number: u64, steps: Vec<Step>, disks: &dyn Disks, wait: bool) {
        let group = self.position(number).and_then(|index| self.entries[index].group);
        for step in steps {
            let Some(index) = self.position(number) else { break };
            let Step::Order(order) = step else {
                self.publish(number, &[step]);
                continue;
            };
            match &self.entries[index].work {
                Work::Create(maker) => maker.stop.store(true, Ordering::Relaxed),
                Work::Mirror { disk, attached: true, .. } => {
                    let step = visible(order);
                    step.inspect(|step| passes(step, "before"));
                    let answer = disks.order(*disk, order);
                    step.inspect(|step| passes(step, "ordered"));
                    if matches!(order, Order::Switch | Order::Detach) {
                        self.entries[index].leaving = Some(answer);
                    }
                    if wait || order == Order::Switch {
                        self.await_end(number, disks);
                        step.inspect(|step| passes(step, "done"));
                    }
                }
                // It has not come to a mirror.
                Work::Mirror { attached: false, .. } if order == Order::Detach => {
                    self.tell(number, Report::Detached, disks);
                }
                Work::Mirror { attached: false, .. } => {}
            }
        }
        if let Some(group) = group {
            self.rally(group, disks);
        }
    }

    /// Waits until the disk has ended the mirror as it was told.
    fn await_end(&mut self, number: u64, disks: &dyn Disks) {
        let Some(index) = self.position(number) else { return };
        let Work::Mirror { disk, attached: true, .. } = self.entries[index].work else { return };
        let Some(answer) = self.entries[index].leaving.take() else { return };
        let switches =
            self.entries[index].job.status() == JobStatus::Pending && self.entries[index].job.pivots();
        let report = match answer() {
            Ok(()) if switches => Report::Switched,
            Ok(()) => Report::Detached,
            Err(NotDone::Late(error)) => {
                tracing::error!(job = self.entries[index].job.id(), "The end of a job is late: {error}");
                return;
            }
            // The witness says that it has switched, so the guest must not go on with the source.
            Err(NotDone::Refused(error)) if switches && self.is_pivoting(number) => {
                tracing::error!(
                    job = self.entries[index].job.id(),
                    "A disk does not pivot, it stays held: {error}"
                );
                return;
            }
            Err(NotDone::Refused(error)) if self.entries[index].job.status() == JobStatus::Aborting => {
                tracing::error!(job = self.entries[index].job.id(), "A mirror does not end: {error}");
                return;
            }
            Err(NotDone::Refused(error)) => {
                return self.tell(number, Report::Failed(error), disks);
            }
        };
        self.heard_of[disk] += 1;
        self.apply(index, disk, report, disks);
    }

    /// Tells clients. A job that is gone is forgotten.
    pub(super) fn publish(&mut self, number: u64, steps: &[Step]) {
        let Some(index) = self.position(number) else { return };
        for step in steps {
            let Step::Note(note) = step else { continue };
            self.events.extend(self.entries[index].event(note));
            if *note == Note::Status(JobStatus::Null) {
                self.entries.remove(index);
                return;
            }
        }
    }
}

/// The name, to tests of crashes, of an order that changes which image the guest's next write goes to, or holds it.
fn visible(order: Order) -> Option<&'static str> {
    match order {
        Order::Quiesce => Some("quiesce"),
        Order::Switch => Some("switch"),
        Order::Detach => Some("detach"),
        Order::Pause | Order::Resume | Order::SetSpeed(_) | Order::SetMode(_) => None,
    }
}

impl From<JobRefused> for Error {
    fn from(error: JobRefused) -> Self {
        Self::generic(error.to_string())
    }
}
