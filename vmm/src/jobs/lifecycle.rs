//! One job from its creation to its end: what clients ask and what its disk reports go in, orders to the disk and
//! notes to the clients come out. No I/O, no clock.
//!
//! ```text
//!   complete             Quiesce ─▶ Quiesced: waiting, pending ─▶ [finalize] ─▶ Switch ─▶ Switched: COMPLETED
//!   cancel, when ready   Quiesce ─▶ Quiesced: waiting, pending ─▶ [finalize] ─▶ Detach ─▶ Detached: COMPLETED
//!   cancel, else         aborting ─▶ Detach ─▶ Detached: CANCELLED
//!   Failed               aborting ─▶ Detach ─▶ Detached: COMPLETED with an error
//!   Done                 waiting, pending, concluded: a job without a disk
//!   Ready of a backup    waiting ─▶ [the others of its group wait too] ─▶ pending ─▶ [finalize] ─▶ Detach ─▶ Detached: COMPLETED
//!   then                 concluded ─▶ [dismiss] ─▶ null
//! ```
//!
//! Between Quiesced and Switched (or Detached) the guest's I/O is held: both images are the same then, and the
//! target's is on its disk. Once Switch (or Detach, to keep the copy) is ordered there, the outcome is decided, and nobody
//! can take it back.

mod words;

pub use self::words::{Action, IoStatus, JobKind, JobRefused, Note, Order, Report, Request, Step};
use super::state::{JobStatus, Verb, VerbRefused};

/// What is to happen once the disk is quiet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goal {
    Pivot,
    /// Keep the source; the target is a copy as of that moment.
    Copy,
}

/// A job.
#[derive(Clone, Debug)]
pub struct Job {
    // Fixed configuration.
    id: String,
    kind: JobKind,
    auto_finalize: bool,
    auto_dismiss: bool,
    // Volatile state.
    status: JobStatus,
    speed: u64,
    io_status: IoStatus,
    user_paused: bool,
    goal: Option<Goal>,
    /// It stays in waiting until it is told that the others wait too.
    grouped: bool,
    /// The disk has been told how to end it.
    decided: bool,
    cancelled: bool,
    error: Option<String>,
}

/// What a job is made of.
#[derive(Clone, Debug)]
pub struct JobOptions {
    /// Its name.
    pub id: String,
    /// Its kind.
    pub kind: JobKind,
    /// Bytes per second; 0 is no limit.
    pub speed: u64,
    /// Whether it goes on by itself from pending.
    pub auto_finalize: bool,
    /// Whether it goes by itself once it is over.
    pub auto_dismiss: bool,
}

impl Job {
    /// A job that begins, and what clients are told of that.
    pub fn start(options: JobOptions) -> (Self, Vec<Step>) {
        let (mut job, mut steps) = Self::create(options);
        steps.append(&mut job.begin());
        (job, steps)
    }

    /// A job that does not begin yet.
    pub fn create(options: JobOptions) -> (Self, Vec<Step>) {
        let JobOptions { id, kind, speed, auto_finalize, auto_dismiss } = options;
        let job = Self {
            id,
            kind,
            auto_finalize,
            auto_dismiss,
            status: JobStatus::Created,
            speed,
            io_status: IoStatus::Ok,
            user_paused: false,
            goal: None,
            grouped: false,
            decided: false,
            cancelled: false,
            error: None,
        };
        (job, vec![Step::Note(Note::Status(JobStatus::Created))])
    }

    /// It begins.
    pub fn begin(&mut self) -> Vec<Step> {
        let mut steps = Vec::new();
        self.enter(JobStatus::Running, &mut steps);
        steps
    }

    /// It does not begin after all: another one of its transaction was refused.
    pub fn discard(&mut self) -> Vec<Step> {
        let mut steps = Vec::new();
        for next in [JobStatus::Aborting, JobStatus::Concluded, JobStatus::Null] {
            self.enter(next, &mut steps);
        }
        steps
    }

    /// From now on it goes on from waiting only by [`Self::go_together`].
    pub fn join(&mut self) {
        self.grouped = true;
    }

    /// All of its group wait.
    pub fn go_together(&mut self) -> Vec<Step> {
        let mut steps = Vec::new();
        self.enter(JobStatus::Pending, &mut steps);
        if !self.auto_finalize {
            steps.push(Step::Note(Note::Pending));
        }
        steps
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its kind.
    pub fn kind(&self) -> JobKind {
        self.kind
    }

    /// Where it is.
    pub fn status(&self) -> JobStatus {
        self.status
    }

    /// Bytes per second; 0 is no limit.
    pub fn speed(&self) -> u64 {
        self.speed
    }

    /// Whether an error has stopped it.
    pub fn io_status(&self) -> IoStatus {
        self.io_status
    }

    /// Whether it goes on by itself from pending, and goes by itself once it is over.
    pub fn automatic(&self) -> (bool, bool) {
        (self.auto_finalize, self.auto_dismiss)
    }

    /// Why it failed, if it did.
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// Whether its end makes the target the disk.
    pub fn pivots(&self) -> bool {
        self.goal == Some(Goal::Pivot) && !self.cancelled
    }

    /// Whether it ends as a copy, the source staying the disk.
    pub fn is_copying(&self) -> bool {
        self.goal == Some(Goal::Copy)
    }

    /// From now on it does not go on by itself from pending. Returns whether it is there already.
    pub fn hold(&mut self) -> bool {
        self.auto_finalize = false;
        self.status == JobStatus::Pending
    }

    /// Whether it works, or would if it had something to do.
    pub fn is_busy(&self) -> bool {
        matches!(self.status, JobStatus::Running | JobStatus::Ready)
    }

    /// Refuses a verb that the job's state does not admit.
    ///
    /// # Errors
    ///
    /// [`VerbRefused`].
    pub fn check(&self, verb: Verb) -> Result<(), VerbRefused> {
        let decided = self.decided && self.status == JobStatus::Pending;
        if decided { Err(self.status.refuse(&self.id, verb)) } else { self.status.check(&self.id, verb) }
    }

    /// The VM goes on: an error that has stopped the job is no news any more. It stays paused.
    pub fn forget_error(&mut self) {
        self.io_status = IoStatus::Ok;
    }

    /// A client asks.
    ///
    /// # Errors
    ///
    /// [`JobRefused`]; nothing has changed then.
    pub fn ask(&mut self, request: Request) -> Result<Vec<Step>, JobRefused> {
        self.check(request.verb())?;
        let mut steps = Vec::new();
        match request {
            Request::Pause if self.user_paused => return Err(JobRefused::AlreadyPaused),
            Request::Pause => {
                self.user_paused = true;
                steps.push(Step::Order(Order::Pause));
                self.stand_still(&mut steps);
            }
            Request::Resume if !self.user_paused => return Err(JobRefused::NotPaused),
            Request::Resume => {
                self.user_paused = false;
                self.io_status = IoStatus::Ok;
                steps.push(Step::Order(Order::Resume));
                self.go_on(&mut steps);
            }
            Request::SetSpeed(speed) => {
                self.speed = speed;
                steps.push(Step::Order(Order::SetSpeed(speed)));
            }
            Request::SetMode(mode) => steps.push(Step::Order(Order::SetMode(mode))),
            Request::Complete if self.goal.is_some() => {
                return Err(JobRefused::Completing(self.id.clone()));
            }
            Request::Complete => self.aim(Goal::Pivot, &mut steps),
            Request::Cancel { force: false } if self.user_paused => {
                return Err(JobRefused::Paused(self.id.clone()));
            }
            Request::Cancel { force: false } if self.is_ready() => {
                if self.goal.is_none() {
                    self.aim(Goal::Copy, &mut steps);
                }
            }
            Request::Cancel { .. } => {
                self.cancelled = true;
                self.abort("Operation canceled".to_owned(), &mut steps);
            }
            Request::Finalize => self.finalize(&mut steps),
            Request::Dismiss => self.enter(JobStatus::Null, &mut steps),
        }
        Ok(steps)
    }

    /// The disk reports. What comes after the end is a leftover.
    pub fn hear(&mut self, report: Report) -> Vec<Step> {
        let mut steps = Vec::new();
        match report {
            _ if self.status.is_over() => {}
            // It was too late to stop it.
            Report::Done if self.status == JobStatus::Aborting => self.conclude(&mut steps),
            Report::Ready if self.kind == JobKind::Backup => self.copied(&mut steps),
            Report::Ready => {
                let next = if self.status.is_paused() { JobStatus::Standby } else { JobStatus::Ready };
                match (self.status, next) {
                    (JobStatus::Running, _) => self.enter(JobStatus::Ready, &mut steps),
                    (JobStatus::Paused, _) => {
                        // The last bytes were under way when it was paused.
                        self.enter(JobStatus::Running, &mut steps);
                        self.enter(JobStatus::Ready, &mut steps);
                    }
                    _ => return steps,
                }
                steps.push(Step::Note(Note::Ready));
                if next == JobStatus::Standby {
                    self.enter(JobStatus::Standby, &mut steps);
                }
            }
            Report::Error { is_read, action, nospace } => {
                steps.push(Step::Note(Note::Error { is_read, action }));
                if action == Action::Stop {
                    self.io_status = if nospace { IoStatus::NoSpace } else { IoStatus::Failed };
                    self.user_paused = true;
                    self.stand_still(&mut steps);
                }
            }
            Report::Failed(error) => self.abort(error, &mut steps),
            Report::Quiesced if self.is_ready() && self.goal.is_some() => {
                if self.status == JobStatus::Standby {
                    self.enter(JobStatus::Ready, &mut steps);
                }
                self.enter(JobStatus::Waiting, &mut steps);
                self.enter(JobStatus::Pending, &mut steps);
                self.pend(&mut steps);
            }
            // Overtaken by a cancel.
            Report::Quiesced => {}
            Report::Switched | Report::Detached => self.conclude(&mut steps),
            Report::Done => {
                if self.status == JobStatus::Paused {
                    self.enter(JobStatus::Running, &mut steps);
                }
                self.enter(JobStatus::Waiting, &mut steps);
                self.enter(JobStatus::Pending, &mut steps);
                self.conclude(&mut steps);
            }
        }
        steps
    }

    /// A backup is complete.
    fn copied(&mut self, steps: &mut Vec<Step>) {
        match self.status {
            JobStatus::Running => {}
            // The last bytes were under way when it was paused.
            JobStatus::Paused => self.enter(JobStatus::Running, steps),
            // Overtaken by a cancel.
            _ => return,
        }
        self.enter(JobStatus::Waiting, steps);
        if !self.grouped {
            self.enter(JobStatus::Pending, steps);
            self.pend(steps);
        }
    }

    fn pend(&mut self, steps: &mut Vec<Step>) {
        if self.auto_finalize {
            self.finalize(steps);
        } else {
            steps.push(Step::Note(Note::Pending));
        }
    }

    fn is_ready(&self) -> bool {
        matches!(self.status, JobStatus::Ready | JobStatus::Standby)
    }

    fn aim(&mut self, goal: Goal, steps: &mut Vec<Step>) {
        self.goal = Some(goal);
        // A job that stands still completes when it is resumed.
        if !self.status.is_paused() {
            steps.push(Step::Order(Order::Quiesce));
        }
    }

    fn stand_still(&mut self, steps: &mut Vec<Step>) {
        match self.status {
            JobStatus::Running => self.enter(JobStatus::Paused, steps),
            JobStatus::Ready => self.enter(JobStatus::Standby, steps),
            _ => {}
        }
    }

    fn go_on(&mut self, steps: &mut Vec<Step>) {
        match self.status {
            JobStatus::Paused => self.enter(JobStatus::Running, steps),
            JobStatus::Standby => {
                self.enter(JobStatus::Ready, steps);
                if self.goal.is_some() {
                    steps.push(Step::Order(Order::Quiesce));
                }
            }
            _ => {}
        }
    }

    fn finalize(&mut self, steps: &mut Vec<Step>) {
        self.decided = true;
        let order = match self.goal {
            Some(Goal::Pivot) => Order::Switch,
            Some(Goal::Copy) | None => Order::Detach,
        };
        steps.push(Step::Order(order));
    }

    fn abort(&mut self, error: String, steps: &mut Vec<Step>) {
        self.error.get_or_insert(error);
        match self.status {
            JobStatus::Aborting => return,
            JobStatus::Paused => self.enter(JobStatus::Running, steps),
            JobStatus::Standby => self.enter(JobStatus::Ready, steps),
            _ => {}
        }
        self.enter(JobStatus::Aborting, steps);
        steps.push(Step::Order(Order::Detach));
    }

    fn conclude(&mut self, steps: &mut Vec<Step>) {
        let note = if self.cancelled { Note::Cancelled } else { Note::Completed(self.error.clone()) };
        steps.push(Step::Note(note));
        self.enter(JobStatus::Concluded, steps);
        if self.auto_dismiss {
            self.enter(JobStatus::Null, steps);
        }
    }

    fn enter(&mut self, next: JobStatus, steps: &mut Vec<Step>) {
        debug_assert!(self.status.may_become(next), "{:?} to {next:?}", self.status);
        self.status = next;
        steps.push(Step::Note(Note::Status(next)));
    }
}

#[cfg(test)]
mod tests;
