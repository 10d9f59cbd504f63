//! The sole owner of the run state and the machine: asks [`RunState::on`] what an input means, does it, and only
//! then says so.
//!
//! ```text
//!   client verb ─┐                    ┌─ Pause:    vCPUs stop → disks drain and flush
//!   guest event ─┼─▶ RunState::on ────┼─ Resume:   disks go on (held requests first) → vCPUs run
//!   disk error  ─┘    │ denied        ├─ Reset:    machine dropped, built anew, run if it ran
//!                     │               ├─ Wake:     machine dropped, built anew around its memory, run
//!                     ▼               └─ Teardown: vCPUs end → disks drain and flush
//!                  error or log                  │ done: state and events are published
//!                                                ▼
//!                                       take_events ──▶ monitor
//! ```

mod block;
mod fixed;

use std::collections::VecDeque;
use std::mem;
use std::time::Duration;

use devices::virtio::blk::{BlkBackend, BlkError, DiskEvent, DiskOperation, ErrorAction, Ticket};

pub use self::fixed::Fixed;
use crate::config::GuestAction;
use crate::jobs::Jobs;
use crate::machine::builder::MachineError;
use crate::machine::{Kept, Machine};
use crate::monitor::{Event, IoErrorAction, PanicAction, ShutdownCause};
use crate::run_state::{Denied, Effect, Input, RunState};
use crate::vcpu::{VcpuError, VcpuEvent};

/// How long a disk may take to finish what is in flight and to flush: as long as slow storage is still alive.
const DISK_TIMEOUT: Duration = Duration::from_secs(60);

/// Why an input had no effect.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The state does not admit it.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// A vCPU does not do what it is told.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A disk cannot be drained or flushed: what the guest believes written may not be.
    #[error(transparent)]
    Disk(#[from] BlkError),
    /// The machine cannot be built again.
    #[error("Cannot build the machine again")]
    Rebuild {
        /// Why.
        source: MachineError,
    },
    /// What S3 keeps cannot be had.
    #[error("Cannot read the clock of the sleeping guest")]
    Clock {
        /// Why.
        source: kvm_ioctls::Error,
    },
}

/// How a VM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Exit status that policy asks for.
    pub exit: u8,
    /// Who ended it.
    pub cause: ShutdownCause,
}

/// The owner of a VM.
pub struct Controller {
    /// Before the disks that they work on.
    jobs: Jobs,
    fixed: Fixed,
    /// `None` only when a reset failed to build a new one.
    machine: Option<Machine>,
    state: RunState,
    /// What has not been told yet.
    events: Vec<Event>,
    ended: Option<Ended>,
    loss: Option<ControlError>,
    /// Counts machines: another number means other doorbells.
    generation: u64,
    /// Counts boots: another number means another guest.
    boots: u64,
    /// Ends of the guest that wait for an operation on its disks: machine, vCPU, event.
    deferred: VecDeque<(u64, u8, VcpuEvent)>,
    /// Disks whose last error stopped the VM: `true` when the host was out of space.
    failed_disks: Vec<Option<bool>>,
}

impl Controller {
    /// Builds the machine, in state prelaunch.
    ///
    /// # Errors
    ///
    /// It cannot be built.
    pub fn new(fixed: Fixed) -> Result<Self, MachineError> {
        let machine = fixed.build(0, None)?;
        let failed_disks = vec![None; fixed.disks.len()];
        let jobs = Jobs::new(fixed.nodes(), fixed.disks.len(), fixed.events.for_jobs());
        Ok(Self {
            jobs,
            fixed,
            machine: Some(machine),
            state: RunState::Prelaunch,
            events: vec![],
            ended: None,
            loss: None,
            generation: 0,
            boots: 1,
            deferred: VecDeque::new(),
            failed_disks,
        })
    }

    /// The configuration and the parts that outlive machines.
    pub fn fixed(&self) -> &Fixed {
        &self.fixed
    }

    /// The machine; `None` only after a failed reset.
    pub fn machine(&self) -> Option<&Machine> {
        self.machine.as_ref()
    }

    /// Counts machines: another number means other doorbells.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Counts boots: a machine that wakes has the guest that fell asleep, one that was reset another.
    pub fn boots(&self) -> u64 {
        self.boots
    }

    /// What `query-status` says.
    pub fn state(&self) -> RunState {
        self.state
    }

    /// How the VM ended, once it has.
    pub fn ended(&self) -> Option<Ended> {
        self.ended
    }

    /// Whether disk `index` has stopped the VM: `Some(true)` when the host was out of space.
    pub fn disk_failure(&self, index: usize) -> Option<bool> {
        self.failed_disks.get(index).copied().flatten()
    }

    /// What happened since the last call, in order.
    pub fn take_events(&mut self) -> Vec<Event> {
        let mut events = mem::take(&mut self.events);
        events.append(&mut self.jobs.take_events());
        events
    }

    /// Lets the guest run.
    ///
    /// # Errors
    ///
    /// See [`ControlError`].
    pub fn cont(&mut self) -> Result<(), ControlError> {
        self.apply(Input::Cont, &[])
    }

    /// Stops the guest and brings its disks to rest.
    ///
    /// # Errors
    ///
    /// See [`ControlError`]; the guest runs on then, as far as it can.
    pub fn stop(&mut self) -> Result<(), ControlError> {
        self.apply(Input::Stop, &[])
    }

    /// Starts the guest again.
    ///
    /// # Errors
    ///
    /// See [`ControlError`]; the VM is in state internal-error then.
    pub fn reset(&mut self, cause: ShutdownCause) -> Result<(), ControlError> {
        self.apply(Input::Reset, &[Event::Reset(cause)])
    }

    /// Wakes the guest from S3. One that has not said where it wants to wake starts again, as firmware would have it.
    ///
    /// # Errors
    ///
    /// See [`ControlError`]. It does not sleep; or the VM is in state internal-error then.
    pub fn wake(&mut self) -> Result<(), ControlError> {
        let mut first = vec![Event::Wakeup];
        if self.state == RunState::Suspended && !self.machine.as_ref().is_some_and(Machine::can_wake) {
            tracing::warn!("The guest has left no waking vector: it starts again");
            first.push(Event::Reset(ShutdownCause::GuestReset));
        }
        self.apply(Input::Wake, &first)
    }

    /// Ends the VM.
    ///
    /// # Errors
    ///
    /// None in any state; the type is that of the other verbs.
    pub fn quit(&mut self, exit: u8, cause: ShutdownCause) -> Result<(), ControlError> {
        self.end(Input::Quit, Ended { exit, cause }, &[])
    }

    /// Why a disk was not brought to rest at the end: data that the guest had not flushed may be lost.
    pub fn take_loss(&mut self) -> Option<ControlError> {
        self.loss.take()
    }

    /// A vCPU of machine `machine` has something to say.
    ///
    /// # Errors
    ///
    /// What policy asks for cannot be done.
    pub fn vcpu_event(&mut self, machine: u64, index: u8, event: VcpuEvent) -> Result<(), ControlError> {
        if machine != self.generation || self.ended.is_some() {
            tracing::debug!(machine, index, ?event, "A vCPU of a machine that is gone");
            return Ok(());
        }
        if self.holds_back(machine, index, &event) {
            return Ok(());
        }
        let on = self.fixed.spec.on_guest;
        let done = match event {
            VcpuEvent::Shutdown => self.guest_end(on.shutdown, ShutdownCause::GuestShutdown, &[]),
            // The image on the disk has all there is to know: switched off like after any other shutdown.
            VcpuEvent::SuspendToDisk => {
                self.guest_end(on.shutdown, ShutdownCause::GuestShutdown, &[Event::SuspendDisk])
            }
            VcpuEvent::SuspendToRam => self.apply(Input::GuestSuspend, &[Event::Suspend]),
            VcpuEvent::Reset => self.guest_end(on.reset, ShutdownCause::GuestReset, &[]),
            VcpuEvent::TripleFault => {
                tracing::warn!(index, "The guest triple-faulted");
                self.guest_end(on.reset, ShutdownCause::GuestReset, &[])
            }
            VcpuEvent::Panicked => self.guest_panicked(on.panic),
            VcpuEvent::CrashLoaded => {
                tracing::warn!("The guest panicked, and its crash kernel takes over");
                Ok(())
            }
            VcpuEvent::Fault(fault) => {
                tracing::error!(index, "The guest cannot run any further: {fault}");
                self.apply(Input::VcpuFault, &[])
            }
        };
        // A leftover of a machine that has been stopped for good meanwhile.
        match done {
            Err(ControlError::Denied(denied)) => {
                tracing::debug!(%denied, "Late event of a vCPU");
                Ok(())
            }
            done => done,
        }
    }

    /// A disk has met an error.
    ///
    /// # Errors
    ///
    /// The vCPUs cannot be stopped.
    pub fn disk_event(&mut self, event: &DiskEvent) -> Result<(), ControlError> {
        let (disk, operation, action, nospace, errno, sector) = match event {
            DiskEvent::IoError { disk, operation, action, nospace, errno, sector } => {
                (disk, operation, action, nospace, errno, sector)
            }
            DiskEvent::Mirror { disk, report } => {
                if let Some(index) = self.disk_index(disk) {
                    self.jobs.hear(&self.fixed.disks, index, report.clone().into());
                    self.events.append(&mut self.jobs.take_events());
                }
                return Ok(());
            }
        };
        let index = self.disk_index(disk);
        let root = index.and_then(|index| self.jobs.nodes.root(index));
        self.events.push(Event::BlockIoError {
            device: disk.to_string(),
            node_name: root.map(|root| root.name).unwrap_or_default(),
            write: *operation != DiskOperation::Read,
            action: match action {
                ErrorAction::Report => IoErrorAction::Report,
                ErrorAction::Ignore => IoErrorAction::Ignore,
                ErrorAction::Stop => IoErrorAction::Stop,
            },
            nospace: *nospace,
            reason: errno.to_string(),
        });
        if *action != ErrorAction::Stop {
            return Ok(());
        }
        let Some(index) = index else { return Ok(()) };
        if !self.fixed.disks[index].is_stopped() {
            tracing::debug!(%disk, "A disk had stopped, and goes on already");
            return Ok(());
        }
        // Once for all that was in flight.
        if self.state.is_running() {
            tracing::error!(%disk, ?operation, sector, "{errno}: the VM stops, `cont` tries again");
        }
        match self.apply(Input::IoError, &[]) {
            Err(ControlError::Denied(_)) => Ok(()),
            done => {
                self.failed_disks[index] = Some(*nospace);
                done
            }
        }
    }

    fn disk_index(&self, id: &str) -> Option<usize> {
        self.fixed.disks.iter().position(|backend| *backend.facts().id == *id)
    }

    /// Changes the size of disk `index`, in bytes.
    ///
    /// # Errors
    ///
    /// It stays as it was.
    pub fn resize_disk(&mut self, index: usize, size: u64) -> Result<(), ControlError> {
        if let Some(disk) = self.fixed.disks.get(index) {
            disk.resize(size).wait(DISK_TIMEOUT)?;
        }
        Ok(())
    }

    /// The guest has come to an end of its own; `first` is told before that.
    fn guest_end(
        &mut self,
        action: GuestAction,
        cause: ShutdownCause,
        first: &[Event],
    ) -> Result<(), ControlError> {
        let then = |event| [first, &[event]].concat();
        match action {
            GuestAction::Exit(exit) => self.end(Input::GuestShutdown, Ended { exit, cause }, first),
            GuestAction::Pause => self.apply(Input::GuestShutdownKept, &then(Event::Shutdown(cause))),
            GuestAction::Reset => self.apply(Input::GuestReset, &then(Event::Reset(cause))),
        }
    }

    fn guest_panicked(&mut self, action: GuestAction) -> Result<(), ControlError> {
        tracing::error!("The guest's kernel panicked");
        let told = match action {
            GuestAction::Exit(_) => PanicAction::Poweroff,
            GuestAction::Pause => PanicAction::Pause,
            GuestAction::Reset => PanicAction::Run,
        };
        let event = Event::GuestPanicked(told);
        match action {
            GuestAction::Exit(exit) => match self.apply(Input::GuestPanic, &[event]) {
                Err(ControlError::Denied(denied)) => Err(denied.into()),
                // A disk that does not come to rest does not keep a dead guest alive; the end tries it again.
                _ => self.end(Input::Quit, Ended { exit, cause: ShutdownCause::GuestPanic }, &[]),
            },
            GuestAction::Pause => self.apply(Input::GuestPanic, &[event]),
            GuestAction::Reset => {
                self.apply(Input::GuestReset, &[event, Event::Reset(ShutdownCause::GuestPanic)])
            }
        }
    }

    fn end(&mut self, input: Input, ended: Ended, first: &[Event]) -> Result<(), ControlError> {
        if self.ended.is_some() {
            return Ok(());
        }
        let (state, _) = self.state.on(input)?;
        // First SHUTDOWN, then the end of each job, as in QEMU.
        self.events.append(&mut self.jobs.take_events());
        self.events.extend_from_slice(first);
        self.events.push(Event::Shutdown(ended.cause));
        self.end_jobs();
        self.tear_down();
        self.state = state;
        self.ended = Some(ended);
        Ok(())
    }

    /// The one place where a state changes: decide, do, publish. `first` are events that come before STOP or RESUME.
    ///
    /// A client's wish that cannot be carried out is undone, and the state stays. What has happened has happened: the
    /// state follows even when the disks do not, and the error is told on top.
    fn apply(&mut self, input: Input, first: &[Event]) -> Result<(), ControlError> {
        let before = self.state;
        if self.ended.is_some() {
            return Err(Denied { state: before, input }.into());
        }
        let (state, effect) = before.on(input)?;
        let done = match effect {
            Effect::Nothing => Ok(()),
            Effect::Pause => self.pause(),
            Effect::Halt => self.with_machine(Machine::pause_vcpus),
            Effect::Resume => self.resume(),
            Effect::Reset => self.rebuild(None, state),
            Effect::Wake => self.keep().and_then(|kept| self.rebuild(kept.as_ref(), state)),
            Effect::Teardown => {
                self.tear_down();
                Ok(())
            }
        };
        let state = match (&done, effect) {
            (Ok(()), _) => state,
            (Err(_), Effect::Reset | Effect::Wake) => RunState::InternalError,
            (Err(_), _) if input.is_fact() => state,
            (Err(_), _) => {
                self.undo(before);
                return done;
            }
        };
        self.publish(before, state, first);
        done
    }

    fn publish(&mut self, before: RunState, state: RunState, first: &[Event]) {
        self.state = state;
        self.events.extend_from_slice(first);
        match (before.is_live(), state.is_live()) {
            (true, false) => self.events.push(Event::Stop),
            (false, true) => {
                self.failed_disks.fill(None);
                self.jobs.forget_errors();
                self.events.push(Event::Resume);
            }
            _ => {}
        }
    }

    /// A wish failed half way: back to where everything was, as far as it goes.
    fn undo(&self, before: RunState) {
        let back = if before.is_running() { self.resume() } else { self.pause() };
        if let Err(error) = back {
            tracing::error!(
                error = &error as &dyn std::error::Error,
                "Nor can the VM go back to where it was"
            );
        }
    }

    fn with_machine(&self, verb: impl Fn(&Machine) -> Result<(), VcpuError>) -> Result<(), ControlError> {
        self.machine.as_ref().map_or(Ok(()), |machine| Ok(verb(machine)?))
    }

    /// vCPUs first, then the disks, each drained and flushed.
    fn pause(&self) -> Result<(), ControlError> {
        self.with_machine(Machine::pause_vcpus)?;
        self.each_disk(BlkBackend::pause)
    }

    fn resume(&self) -> Result<(), ControlError> {
        self.each_disk(BlkBackend::resume)?;
        self.with_machine(Machine::resume_vcpus)
    }

    /// Tells all disks, then waits for all: as long as the slowest. The first error is returned, the others logged.
    fn each_disk(&self, verb: impl Fn(&BlkBackend) -> Ticket<()>) -> Result<(), ControlError> {
        let tickets: Vec<_> = self.fixed.disks.iter().map(verb).collect();
        let mut result = Ok(());
        for ticket in tickets {
            if let Err(error) = ticket.wait(DISK_TIMEOUT) {
                tracing::error!(error = &error as &dyn std::error::Error, "A disk does not follow");
                result = result.and(Err(error.into()));
            }
        }
        result
    }

    /// What is left of a machine in S3.
    fn keep(&self) -> Result<Option<Kept>, ControlError> {
        let Some(machine) = &self.machine else { return Ok(None) };
        machine.keep().map_err(|source| ControlError::Clock { source })
    }

    fn rebuild(&mut self, kept: Option<&Kept>, next: RunState) -> Result<(), ControlError> {
        self.machine = None;
        self.generation += 1;
        self.boots += u64::from(kept.is_none());
        self.failed_disks.fill(None);
        let machine =
            self.fixed.build(self.generation, kept).map_err(|source| ControlError::Rebuild { source })?;
        self.machine = Some(machine);
        if next.is_running() { self.resume() } else { Ok(()) }
    }

    /// Ends the vCPUs, then brings every disk to rest. What fails is kept for [`Self::take_loss`].
    fn tear_down(&mut self) {
        self.machine = None;
        self.generation += 1;
        self.loss = self.each_disk(BlkBackend::pause).err();
    }
}
