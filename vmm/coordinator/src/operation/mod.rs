//! Operations on the disks of a running VM: pivot, mirror, backup; from the first check to the last trace, each step
//! written down before it has an effect. Whoever coordinates may die anywhere, and so may the VM.
//!
//! ```text
//!   journal     planned ─▶ prepared ─▶ mirroring ─▶ ready ─▶ [frozen] ─▶ [stopped] ─▶ intent ─▶ pivoted ─▶ config-committed …
//!   VM, guest         targets,      nodes,       jobs       freeze       stop           ═        the decision (A: witness,
//!                     stamps,       mirrors      ready                                             B: commit in the journal)
//!                     witness
//!   … config-committed ─▶ [resumed] ─▶ [thawed] ─▶ [source-retired] ─▶ done
//!
//!   before the intent      anything that fails: aborted ─▶ resumed, thawed, targets removed ─▶ done
//!   after it               only a definite answer of the VM is an outcome; without one the operation stays open, and
//!                          `recover` asks again, or reads the witness once the VM is proven dead
//! ```
//!
//! The same loop runs an operation and takes one up that another coordinator has left: [`run`](fn@run) begins one,
//! [`resume`] goes on, [`abort`] and [`recover`] come to an end without going on. What is next follows from the
//! journal, never from what a process remembers.
//!
//! A mirror and a backup decide nothing about the disks. They end as `copied`, a mirror after `end-intent`: from there on
//! they are finished and not undone, by whoever takes them up.
//!
//! **Protocol A** leaves the decision to the VM: `tarn-pivot` with a witness, one for all disks. **Protocol B** decides
//! here, over verbs that QEMU has, too: all mirrors pending, one commit in the journal, all finalized. Under B guest I/O
//! is held for as long as nobody coordinates, and another client can break it by cancelling a job.
//!
//! | file | holds |
//! |---|---|
//! | `request.rs` | what is asked, and what can be refused before anything has changed |
//! | `steps.rs` | the loop, and what all steps stand on |
//! | `copy.rs` | the copies, and how the guest is held for them |
//! | `decide.rs` | the decision, protocols A and B |
//! | `confirm.rs` | which images the VM works on, asked before anything is taken back |
//! | `conclude.rs` | what follows from it, and how everything is given back |
//! | `vm.rs`, `freeze.rs` | what is asked of the monitor and of the agent |

mod conclude;
mod confirm;
mod copy;
mod decide;
pub(crate) mod freeze;
mod report;
mod request;
mod steps;
mod vm;

use std::path::PathBuf;

use uuid::Uuid;

pub use self::report::{Copying, Observer, Report, Silent, Timeline};
pub use self::request::{CopyMode, Request, Settings};
use self::steps::{Halt, Runner};
use crate::journal::{ImageId, Journal, JournalError, OperationLog, Outcome, Stage};
use crate::resolve::{Reading, Resolution, ResolveError, Resolver};
use crate::state_dir::StateDir;
use crate::{DurableError, SessionError};

/// The sockets of a VM.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Of its monitor.
    pub monitor: PathBuf,
    /// Of its guest's agent.
    pub agent: Option<PathBuf>,
    /// It is another VMM's, such as QEMU's: nobody has a lock of its name while it runs, so only who asks its monitor knows
    /// that it does. An operation remembers that.
    pub foreign: bool,
}

/// Whether a VM runs.
#[derive(Clone, Debug)]
pub enum Liveness {
    /// It does, and is asked.
    Alive(Connection),
    /// It is proven not to, and stays so: the caller has the lock that its VMM would have. A socket that nobody answers
    /// proves nothing, and neither does the lock if the VM is [foreign](Connection::foreign).
    Dead,
}

/// Why an operation has not done what was asked.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// Nothing has changed.
    #[error("{0}")]
    Refused(String),
    /// Nothing has changed; the VM says why.
    #[error("Cannot ask the VM")]
    Session(#[from] SessionError),
    /// Nothing has changed, or nothing more: the journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Something that has to last cannot be written.
    #[error(transparent)]
    Durable(#[from] DurableError),
    /// What a dead VM has left cannot be resolved.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// All is as it was before.
    #[error("Operation {id} was aborted: {reason}")]
    Aborted {
        /// The operation.
        id: Uuid,
        /// Why.
        reason: String,
        /// What of the rest could not be done.
        warnings: Vec<String>,
    },
    /// It is open, and nobody may assume anything about it until it is settled.
    #[error("Operation {id} is not settled: {reason}. {next}")]
    Unsettled {
        /// The operation.
        id: Uuid,
        /// Why.
        reason: String,
        /// What is known of it, and the commands that go on.
        next: String,
    },
}

/// What [`recover`] found and did.
#[derive(Clone, Debug, PartialEq)]
pub struct Recovery {
    /// The operation that was open, as it is now; `None`: there was none, and nothing has changed.
    pub operation: Option<OperationLog>,
    /// What it was found at.
    pub found: Option<Stage>,
    /// In words: what happened and why it ended as it did.
    pub story: Vec<String>,
    /// What of the rest could not be done.
    pub warnings: Vec<String>,
}

impl Recovery {
    fn nothing() -> Self {
        Self { operation: None, found: None, story: vec![], warnings: vec![] }
    }
}

/// Carries out an operation from its beginning to its end.
///
/// ```no_run
/// use coordinator::StateDir;
/// use coordinator::operation::{self, Connection, Request, Silent};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let run = std::path::Path::new("/run/tarn/db");
/// let vm = Connection { monitor: run.join("monitor.sock"), agent: Some(run.join("agent.sock")), foreign: false };
/// let request = Request { freeze: true, ..Request::pivot([("disk0", "/images/new.raw")]) };
/// let report = operation::run(&StateDir::of("db")?, &vm, &request, &mut Silent)?;
/// println!("{:?}, held for {:?}", report.consistency, report.timeline.held);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// [`OperationError`].
pub fn run(
    state: &StateDir,
    vm: &Connection,
    request: &Request,
    observer: &mut dyn Observer,
) -> Result<Report, OperationError> {
    let (runner, plan, details) = request::begin(state, vm, request, observer)?;
    runner.begin(&plan, details)?.run()
}

/// Goes on with the operation that is open.
///
/// # Errors
///
/// [`OperationError`]; [`OperationError::Refused`] if none is.
pub fn resume(
    state: &StateDir,
    vm: &Connection,
    observer: &mut dyn Observer,
) -> Result<Report, OperationError> {
    match attach(state, vm, observer)? {
        Some(runner) => runner.resume(),
        None => Err(OperationError::Refused(nothing_open(state))),
    }
}

/// Ends the operation that is open, on its sources.
///
/// # Errors
///
/// [`OperationError`]; [`OperationError::Refused`] if none is open, or it is decided for its targets.
pub fn abort(
    state: &StateDir,
    vm: &Connection,
    observer: &mut dyn Observer,
) -> Result<Recovery, OperationError> {
    match attach(state, vm, observer)? {
        Some(runner) => runner.abort(),
        None => Err(OperationError::Refused(nothing_open(state))),
    }
}

/// Settles what is open: what is decided is finished, what is not is undone. The second time it changes nothing.
///
/// # Errors
///
/// [`OperationError`].
pub fn recover(
    state: &StateDir,
    vm: &Liveness,
    observer: &mut dyn Observer,
) -> Result<Recovery, OperationError> {
    match vm {
        Liveness::Dead => Ok(resolved(Resolver::new().run(state)?)),
        Liveness::Alive(vm) => match attach(state, vm, observer)? {
            Some(runner) => runner.recover(),
            None => Ok(Recovery::nothing()),
        },
    }
}

/// What a resolver has done, in words.
pub fn resolved(resolution: Resolution) -> Recovery {
    let Some(resolved) = resolution.resolved else { return Recovery::nothing() };
    let (operation, mut warnings) = (resolved.operation, resolved.warnings);
    let found = operation.entries.iter().rev().map(|entry| entry.stage).find(|stage| {
        !matches!(stage, Stage::Done | Stage::Resolved(_) | Stage::ConfigCommitted | Stage::SourceRetired)
    });
    let witness = match resolved.witness {
        Reading::Unplanned => String::new(),
        witness => format!("; its witness is {}", witness.name()),
    };
    let stage = found.map_or("new", Stage::name);
    let mut story = vec![format!("The VM ended when operation {} was at {stage}{witness}", operation.id())];
    story.extend(operation.plan.disks.iter().map(|disk| {
        let (id, source, target) = (&disk.disk, disk.source.path.display(), disk.target.path.display());
        let mut now = |image: &ImageId| match image.locate() {
            Ok(now) if now != image.path => format!("{} (now {})", image.path.display(), now.display()),
            Ok(now) => now.display().to_string(),
            Err(displaced) => {
                warnings.push(displaced.to_string());
                image.path.display().to_string()
            }
        };
        match operation.outcome() {
            Outcome::Pivoted => format!("disk '{id}' is {}, not {source}", now(&disk.target)),
            Outcome::Completed => {
                format!("disk '{id}' is {}, and {target} is a complete copy", now(&disk.source))
            }
            Outcome::Aborted | Outcome::Open => format!("disk '{id}' is {}, not {target}", now(&disk.source)),
        }
    }));
    if operation.outcome() == Outcome::Aborted {
        let disks = operation.plan.disks.iter().enumerate();
        let left = disks.filter(|(index, disk)| operation.has_made(*index) && disk.target.path.exists());
        story.extend(left.map(|(_, disk)| {
            format!(
                "{} was made for it, is incomplete, and is left for you to remove",
                disk.target.path.display()
            )
        }));
    }
    Recovery { operation: Some(operation), found, story, warnings }
}

fn nothing_open(state: &StateDir) -> String {
    format!("No operation of VM {} is open", state.name())
}

/// The operation that is open, taken over by this coordinator.
fn attach<'a>(
    state: &StateDir,
    vm: &Connection,
    observer: &'a mut dyn Observer,
) -> Result<Option<Runner<'a>>, OperationError> {
    if crate::journal::operations(state)?.last().is_none_or(|last| !last.is_open()) {
        return Ok(None);
    }
    let journal = Journal::open(state)?;
    let Some(open) = journal.open_operation() else { return Ok(None) };
    let (id, settings) = (open.id(), Settings::of(open));
    Ok(Some(Runner::new(journal, id, vm, settings, observer)?))
}

impl From<Halt> for OperationError {
    fn from(halt: Halt) -> Self {
        match halt {
            Halt::Journal(error) => Self::Journal(error),
            Halt::Durable(error) => Self::Durable(error),
            Halt::Abort(reason) | Halt::Unknown(reason) | Halt::Stopped { reason, .. } => {
                Self::Refused(reason)
            }
        }
    }
}
