//! One run: a VM, a coordinator, a crash; recovery, once and again; and what is found then.
//!
//! ```text
//!   vmm ─ ready ─▶ coordinator ─▶ at the gate ─▶ stranger ─▶ deaths ─▶ what was not synced is gone ─▶ recovery, again
//!                       └──────── ended ────────────────────▶ │                                           │
//!                                     boot, and look into the images ◀── the VM, if it lives, and goes on ┘
//! ```

use std::error::Error;
use std::fs;
use std::path::Path;
use std::time::Duration;

use coordinator::journal::{OperationKind, Side};
use coordinator::operation::{self, Liveness, OperationError, Silent};
use coordinator::resolve::Resolver;
use coordinator::{MonitorSession, chain, lose_power};
use serde_json::{Value, json};

use crate::cells::{Cell, Fault, Place, Role, Stranger, Who};
use crate::process::{Gate, PATIENCE, Process, Waiting};
use crate::records::{Ledger, Promise};
use crate::setup::{SIZE, Setup, is_target};
use crate::strangers;
use crate::verdict::{self, Findings, by_table, differences, snapshot};

type Failure = Box<dyn Error>;

/// Writes of the guest after a recovery.
const MORE: &str = "20";

/// A run under way.
struct Run<'a> {
    cell: &'a Cell,
    setup: Setup,
    vmm: Process,
    coordinator: Process,
    is_vmm_dead: bool,
    /// What the guest had been promised when the operation began.
    early: Vec<Ledger>,
    findings: Findings,
}

/// Runs a cell in a directory of its own, which is there and empty.
pub(crate) fn run(cell: &Cell, directory: &Path) -> Result<Findings, Failure> {
    // Names of sockets are short.
    let sockets = tempfile::tempdir()?;
    let setup = Setup {
        recipe: cell.recipe,
        target_fault: if let Fault::Target(fault) = cell.fault { Some(fault) } else { None },
        power: cell.who.is_power(),
        seed: cell.seed,
        mistake: cell.mistake,
        directory: directory.to_owned(),
        sockets: sockets.path().to_owned(),
    };
    fs::create_dir(setup.images())?;
    for disk in 0..cell.recipe.disks {
        fs::File::create_new(setup.source(disk))?.set_len(SIZE)?;
        if cell.recipe.reuse {
            fs::write(setup.target(disk), Setup::left_behind())?;
            Setup::former().write(&setup.state(), &setup.target(disk))?;
        }
    }
    let gate = Gate::new(&setup)?;
    let mut vmm = Process::start(&setup, "vmm", &armed(cell, Role::Vmm))?;
    vmm.line()?;
    let early = Ledger::parse(&fs::read_to_string(setup.log())?, cell.recipe.disks);
    let coordinator = Process::start(&setup, "coordinator", &armed(cell, Role::Coordinator))?;
    let (is_vmm_dead, findings) = (false, Findings::default());
    let mut run = Run { cell, setup, vmm, coordinator, is_vmm_dead, early, findings };
    match gate.await_arrival(&run.coordinator) {
        Ok(Some(waiting)) => run.crash(waiting)?,
        Ok(None) => {
            if !run.coordinator.end()? && cell.is_undisturbed() {
                run.findings.other.push("The operation did not come to its end".into());
            }
            run.deaths(None);
        }
        Err(error) => run.findings.other.push(format!("The coordinator neither ends nor waits: {error}")),
    }
    run.coordinator.kill();
    let _open = gate.open()?;
    run.conclude()?;
    Ok(run.findings)
}

/// The places that a run has passed, of both processes.
pub(crate) fn places(directory: &Path) -> Vec<Place> {
    let of = |role, name: &str| {
        let log = fs::read_to_string(directory.join(format!("{name}.places"))).unwrap_or_default();
        Place::all(role, &log)
    };
    [of(Role::Coordinator, "coordinator"), of(Role::Vmm, "vmm")].concat()
}

fn armed(cell: &Cell, role: Role) -> String {
    let fault = match &cell.fault {
        Fault::Place { role: of, armed } if *of == role => Some(armed.clone()),
        _ => None,
    };
    let place = cell.place.as_ref().filter(|place| place.role == role).map(|place| place.armed("wait"));
    fault.into_iter().chain(place).collect::<Vec<_>>().join(",")
}

impl Run<'_> {
    /// Somebody waits at the gate.
    fn crash(&mut self, waiting: Waiting) -> Result<(), Failure> {
        self.findings.reached = true;
        // Half of the time the guest has used what it was given.
        if self.cell.seed & 8 == 0 || self.cell.mistake.is_some() {
            self.vmm.prod(MORE)?;
        }
        match self.cell.stranger {
            None => {}
            Some(Stranger::Successor) => return self.succeed(waiting),
            Some(Stranger::Coordinator) => {
                let before = snapshot(&self.setup)?;
                let done = Process::start(&self.setup, "second", "")?.end()?;
                if done {
                    self.findings.other.push("Two coordinators were at work".into());
                }
                let changed = differences(&before, &snapshot(&self.setup)?);
                let text =
                    changed.into_iter().map(|file| format!("The second coordinator has changed {file}"));
                self.findings.other.extend(text);
            }
            Some(stranger) => strangers::interfere(&self.setup, stranger)?,
        }
        self.deaths(Some(waiting));
        Ok(())
    }

    /// The first coordinator sleeps, another one takes over; then the first wakes.
    fn succeed(&mut self, waiting: Waiting) -> Result<(), Failure> {
        let locked = operation::recover(&self.setup.state(), &self.alive(), &mut Silent);
        let is_open = |setup: &Setup| {
            coordinator::journal::operations(&setup.state())
                .is_ok_and(|all| all.last().is_some_and(|last| last.is_open()))
        };
        if locked.is_ok() && is_open(&self.setup) {
            self.findings.other.push(format!("{} was not locked", waiting.place));
        }
        fs::remove_file(self.setup.state().lock())?;
        self.recover();
        let before = snapshot(&self.setup)?;
        let roots = self.roots()?;
        // In the middle of something it does not look around.
        let half_done = ["stamp.", "image."].iter().any(|file| waiting.place.starts_with(file));
        drop(waiting);
        self.await_coordinator();
        let changed = differences(&before, &snapshot(&self.setup)?);
        // Only what counts: a witness of its own, without an operation, is nobody's.
        let counts = |file: &String| match Path::new(file).starts_with(self.setup.images()) {
            true => !half_done,
            false => before.contains_key(Path::new(file)),
        };
        let changed = changed.into_iter().filter(|file| counts(file) && !file.ends_with(".new"));
        let text: Vec<_> = changed.map(|file| format!("The late coordinator has changed {file}")).collect();
        self.findings.other.extend(text);
        if self.roots()? != roots {
            self.findings.wrong.push("The late coordinator has moved a disk".into());
        }
        Ok(())
    }

    fn deaths(&mut self, waiting: Option<Waiting>) {
        let was_here = waiting.is_some();
        match self.cell.who {
            Who::Nobody => {}
            Who::Coordinator | Who::PowerLater => self.coordinator.kill(),
            Who::Vmm => self.kill_vmm(),
            Who::Both | Who::Power if self.cell.seed & 2 == 0 => {
                self.coordinator.kill();
                self.kill_vmm();
            }
            Who::Both | Who::Power => {
                self.kill_vmm();
                self.coordinator.kill();
            }
        }
        drop(waiting);
        if was_here {
            self.await_coordinator();
        }
        if self.cell.who == Who::Power {
            self.cut_power();
        }
    }

    fn await_coordinator(&mut self) {
        if let Err(error) = self.coordinator.end() {
            self.findings.other.push(format!("The coordinator does not end: {error}"));
            self.coordinator.kill();
        }
    }

    fn kill_vmm(&mut self) {
        self.vmm.kill();
        self.is_vmm_dead = true;
    }

    /// What was not synced is gone; tells what that was.
    fn cut_power(&self) -> Vec<String> {
        let directories = [self.setup.images(), self.setup.state().path()];
        let there = directories.iter().filter(|directory| directory.exists());
        there.flat_map(|directory| lose_power(directory)).map(|path| path.display().to_string()).collect()
    }

    /// Recovery, as often as it takes, and once more.
    fn conclude(&mut self) -> Result<(), Failure> {
        if self.vmm.has_ended() && !self.is_vmm_dead {
            self.findings.other.push("The VMM has ended by itself".into());
            self.is_vmm_dead = true;
        }
        let mut named = if self.is_vmm_dead { by_table(&self.setup)? } else { Side::Source };
        if let Some(nth) = self.cell.again {
            let role = if self.is_vmm_dead { "recover-dead" } else { "recover-alive" };
            Process::start(&self.setup, role, &format!("*.*.*:{nth}=kill"))?.end()?;
            if self.cell.who == Who::Power {
                self.cut_power();
            }
        }
        self.take_up();
        self.recover();
        let before = snapshot(&self.setup)?;
        self.recover();
        let changed = differences(&before, &snapshot(&self.setup)?);
        self.findings.repeated.extend(changed.into_iter().map(|file| format!("{file} has changed")));
        if !self.is_vmm_dead {
            named = self.go_on()?;
            self.kill_vmm();
            if self.cell.who == Who::PowerLater {
                self.cut_power();
                // That it is done may not have been synced by who died: then it is found out again, and the same.
                Resolver::new().run(&self.setup.state())?;
            }
        }
        let promise = if self.cell.who.is_power() { Promise::Flushed } else { Promise::Acknowledged };
        verdict::boot(&self.setup, named, promise, &mut self.findings)?;
        if self.cell.recipe.kind != OperationKind::Pivot {
            verdict::copies(&self.setup, &self.early, &mut self.findings)?;
        }
        if self.cell.recipe.reuse && named == Side::Source {
            // Or somebody stamps late, who was taken over from in the middle of it.
            let is_late = self.cell.stranger == Some(Stranger::Successor)
                && self.cell.place.as_ref().is_some_and(|place| place.name.starts_with("stamp."));
            let stamps_fail = is_late
                || matches!(&self.cell.fault, Fault::Place { armed, .. } if armed.starts_with("stamp."));
            verdict::left_behind(&self.setup, stamps_fail, &mut self.findings)?;
        }
        // What was decided was not only in memory.
        let gone = self.cut_power().into_iter().filter(|file| !self.is_excused(file, named));
        let text: Vec<_> = gone.map(|file| format!("{file} was not synced")).collect();
        self.findings.repeated.extend(text);
        Ok(())
    }

    /// Stamps and a witness whose removal failed in this run: that is told as a warning, and nothing depends on it. And
    /// the stamp of a target that is no disk: while the VM is dead nobody cleans up, and it keeps what is not complete
    /// from being booted.
    fn is_excused(&self, file: &str, named: Side) -> bool {
        if named == Side::Source && file.ends_with("-new.raw.stamp") {
            return true;
        }
        let Fault::Place { armed, .. } = &self.cell.fault else { return false };
        (armed.starts_with("stamp.") && file.ends_with(".stamp"))
            || (armed.starts_with("witness.remove.") && file.contains("witness-"))
    }

    fn alive(&self) -> Liveness {
        Liveness::Alive(self.setup.connection())
    }

    /// Two runs in three do something else first, where it can be done: another coordinator goes on, or takes it back. If
    /// that is refused, or does not come to an end, recovery does.
    fn take_up(&mut self) {
        let (state, vm) = (self.setup.state(), self.setup.connection());
        match (self.is_vmm_dead, (self.cell.seed >> 4) % 3) {
            (false, 1) => match operation::resume(&state, &vm, &mut Silent) {
                Ok(_) | Err(OperationError::Refused(_)) => {}
                Err(error) if self.can_be_resumed() => {
                    self.findings.other.push(format!("It was not resumed: {}", chain(&error)));
                }
                Err(_) => {}
            },
            (false, 2) => drop(operation::abort(&state, &vm, &mut Silent)),
            _ => {}
        }
    }

    /// Where nothing but a coordinator has died, another one goes on with what it did.
    fn can_be_resumed(&self) -> bool {
        let Cell { recipe, fault, who, stranger, again, .. } = self.cell;
        let undisturbed = *fault == Fault::None && stranger.is_none() && again.is_none();
        undisturbed && *who == Who::Coordinator && recipe.kind != OperationKind::Backup
    }

    fn recover(&mut self) {
        let state = self.setup.state();
        let recovered = match (self.is_vmm_dead, self.cell.seed & 4) {
            (true, 0) => Resolver::new().run(&state).map(drop).map_err(Failure::from),
            (true, _) => {
                operation::recover(&state, &Liveness::Dead, &mut Silent).map(drop).map_err(Failure::from)
            }
            (false, _) => {
                operation::recover(&state, &self.alive(), &mut Silent).map(drop).map_err(Failure::from)
            }
        };
        if let Err(error) = recovered {
            self.findings.other.push(format!("Recovery: {}", chain(&*error)));
        }
    }

    /// The images that the VM works on, by its own word.
    fn roots(&self) -> Result<Vec<Side>, Failure> {
        let mut session = MonitorSession::connect(&self.setup.monitor(), PATIENCE)?;
        let disks = session.execute("query-block", None, PATIENCE)?;
        let side = |disk: &Value| match disk["inserted"]["file"].as_str() {
            Some(file) if is_target(Path::new(file)) => Side::Target,
            _ => Side::Source,
        };
        Ok(disks.as_array().into_iter().flatten().map(side).collect())
    }

    /// The VM lives: it is in order, and its guest goes on.
    fn go_on(&mut self) -> Result<Side, Failure> {
        let mut session = MonitorSession::connect(&self.setup.monitor(), PATIENCE)?;
        let mut ask = |command: &str| session.execute(command, None, Duration::from_secs(20));
        let (status, jobs) = (ask("query-status")?, ask("query-jobs")?);
        if status["running"] != true {
            self.findings.other.push(format!("The VM does not go on: {status}"));
        }
        if jobs != json!([]) {
            self.findings.other.push(format!("Jobs are left: {jobs}"));
        }
        if let Err(error) = self.vmm.ask(MORE) {
            self.findings.other.push(format!("The guest does not go on: {error}"));
        }
        let roots = self.roots()?;
        let first = roots.first().copied().unwrap_or(Side::Source);
        if roots.iter().any(|root| *root != first) {
            self.findings.wrong.push(format!("Disks have moved apart: {roots:?}"));
        }
        Ok(first)
    }
}
