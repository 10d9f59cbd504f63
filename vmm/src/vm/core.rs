//! The VM as its monitor sees it: verbs on the [`Controller`], requests to the guest.

use std::time::Instant;

use protocol::Map;
use uuid::Uuid;

use super::ports::{AGENT_PORT, CONSOLE_PORT, FIRST_CHANNEL};
use crate::config::DiskSpec;
use crate::controller::{ControlError, Controller};
use crate::guest_channel::{AgentStatus, GuestChannel};
use crate::monitor::{
    BlockLayer, ChardevInfo, CpuInfo, DiskInfo, Event, IoStatus, SessionId, ShutdownCause, Vm, VmError,
};
use crate::pauses::{Holder, Pauses};
use crate::run_dir::VmPaths;
use crate::run_state::{Denied, RunState};

/// What the monitor acts on.
pub(super) struct Core {
    pub controller: Controller,
    pub guest: GuestChannel,
    pub paths: VmPaths,
    /// Events that do not come from the controller.
    pub events: Vec<Event>,
    /// Who has stopped the VM.
    pub pauses: Pauses,
}

impl Core {
    /// Events of the controller and of the ports since the last call.
    pub(super) fn take_all_events(&mut self) -> Vec<Event> {
        let mut events = std::mem::take(&mut self.events);
        events.extend(self.controller.take_events());
        events
    }

    fn disk(&self, index: usize, spec: &DiskSpec) -> DiskInfo {
        let backend = &self.controller.fixed().disks[index];
        let io_status = match self.controller.disk_failure(index) {
            None => IoStatus::Ok,
            Some(false) => IoStatus::Failed,
            Some(true) => IoStatus::Nospace,
        };
        DiskInfo {
            device: spec.id.clone(),
            virtual_size: backend.size(),
            block_size: backend.block_size(),
            io_status,
            filters: backend.filters().cloned(),
        }
    }

    fn guest_open(&self, port: usize) -> bool {
        self.controller.machine().is_some_and(|machine| machine.console.guest_open(port))
    }
}

impl From<ControlError> for VmError {
    fn from(error: ControlError) -> Self {
        use RunState::{GuestPanicked, InternalError, Shutdown};
        match error {
            ControlError::Denied(Denied { state: GuestPanicked | InternalError | Shutdown, .. }) => {
                Self::ResetRequired
            }
            ControlError::Denied(Denied { state, .. }) => Self::State(state.name()),
            other => Self::Failed(Box::new(other)),
        }
    }
}

impl Vm for Core {
    fn name(&self) -> String {
        self.controller.fixed().spec.name.clone()
    }

    fn uuid(&self) -> Uuid {
        self.controller.fixed().spec.uuid
    }

    fn run_state(&self) -> RunState {
        self.controller.state()
    }

    fn cpus(&self) -> Vec<CpuInfo> {
        let ids = self.controller.machine().map(crate::machine::Machine::thread_ids).unwrap_or_default();
        (0..)
            .zip(ids)
            .map(|(index, thread_id)| CpuInfo { index, thread_id, socket: 0, core: index, thread: 0 })
            .collect()
    }

    fn chardevs(&self) -> Vec<ChardevInfo> {
        let unix = |path: &std::path::Path| format!("unix:{},server=on", path.display());
        let mut all = vec![
            ChardevInfo {
                label: "console".into(),
                filename: unix(&self.paths.console_socket()),
                frontend_open: self.guest_open(CONSOLE_PORT),
            },
            ChardevInfo {
                label: "agent".into(),
                filename: unix(&self.paths.agent_socket()),
                frontend_open: self.guest_open(AGENT_PORT),
            },
            ChardevInfo {
                label: "monitor".into(),
                filename: unix(&self.paths.monitor_socket()),
                frontend_open: true,
            },
        ];
        let channels = self.controller.fixed().spec.channels.iter().enumerate();
        all.extend(channels.map(|(index, channel)| ChardevInfo {
            label: channel.name.clone(),
            filename: unix(&channel.socket),
            frontend_open: self.guest_open(FIRST_CHANNEL + index),
        }));
        all
    }

    fn disks(&self) -> Vec<DiskInfo> {
        let specs = &self.controller.fixed().spec.disks;
        specs.iter().enumerate().map(|(index, spec)| self.disk(index, spec)).collect()
    }

    fn agent(&self) -> AgentStatus {
        self.guest.status(Instant::now())
    }

    fn stop(&mut self, by: Holder) -> Result<(), VmError> {
        let mut pauses = self.pauses.clone();
        // One that nobody has let run yet, or that an error has stopped, is not for an operation to start.
        if by != Holder::User && !self.controller.state().is_live() && pauses.list().is_empty() {
            pauses.add(Holder::User)?;
        }
        pauses.add(by)?;
        let stopped = match self.controller.stop() {
            // As under QEMU's -S: stopped already, and still prelaunch.
            Err(ControlError::Denied(Denied { state: RunState::Prelaunch, .. })) => Ok(()),
            // The guest does not run: nothing to stop, and no error either.
            Err(ControlError::Denied(_)) => Ok(()),
            done => Ok(done?),
        };
        if stopped.is_ok() {
            self.pauses = pauses;
        }
        stopped
    }

    fn cont(&mut self, by: Holder, force: bool) -> Result<(), VmError> {
        let mut pauses = self.pauses.clone();
        if pauses.remove(by, force)? {
            self.controller.cont()?;
        }
        self.pauses = pauses;
        Ok(())
    }

    fn paused_by(&self) -> Vec<Holder> {
        self.pauses.list()
    }

    fn system_reset(&mut self) -> Result<(), VmError> {
        Ok(self.controller.reset(ShutdownCause::HostReset)?)
    }

    /// A press of the button wakes a guest that sleeps, and does no more (ACPI 6.5, section 4.8.3.1.1): it finds the
    /// button pressed and takes that for what woke it.
    fn system_powerdown(&mut self) -> Result<(), VmError> {
        if let Some(machine) = self.controller.machine() {
            machine.power.lock().press_power_button();
        }
        self.events.push(Event::Powerdown);
        if self.controller.state() == RunState::Suspended { Ok(self.controller.wake()?) } else { Ok(()) }
    }

    fn system_wakeup(&mut self) -> Result<(), VmError> {
        match self.controller.wake() {
            Err(ControlError::Denied(_)) => Err(VmError::NotSuspended),
            done => Ok(done?),
        }
    }

    fn resize_disk(&mut self, index: usize, size: u64) -> Result<(), VmError> {
        Ok(self.controller.resize_disk(index, size)?)
    }

    fn block(&mut self) -> BlockLayer<'_> {
        self.controller.block()
    }

    fn quit(&mut self) {
        // The reply has to go out whatever the disks say; what they say is in the log and the exit status.
        let _ = self.controller.quit(0, ShutdownCause::HostQuit);
    }

    fn take_events(&mut self) -> Vec<Event> {
        self.take_all_events()
    }

    fn guest_request(&mut self, session: SessionId, execute: String, arguments: Map) {
        self.guest.request(session.0, execute, arguments, Instant::now());
    }

    fn guest_session_closed(&mut self, session: SessionId) {
        self.guest.session_closed(session.0, Instant::now());
    }
}
