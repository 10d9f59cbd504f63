//! The VM as its monitor sees it: run state reduced to running and paused.

use std::collections::HashSet;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use devices::virtio::blk::{BlkBackend, MirrorReport};
use protocol::Map;
use uuid::Uuid;
use vmm::guest_channel::AgentStatus;
use vmm::jobs::{Disks, Jobs};
use vmm::monitor::{
    BlockLayer, ChardevInfo, CpuInfo, DiskInfo, Event, IoStatus, SessionId, ShutdownCause, Vm, VmError,
};
use vmm::pauses::{Holder, Pauses};
use vmm::run_state::RunState;

use crate::guest::Guest;
use crate::setup::{Setup, is_target};
use crate::vmm::volatile;

const PATIENCE: Duration = Duration::from_secs(20);

/// A VM without a machine.
pub(crate) struct Machine {
    /// Before the disks that they work on.
    pub(crate) jobs: Jobs,
    pub(crate) disks: Vec<BlkBackend>,
    pub(crate) guest: Guest,
    pub(crate) log: File,
    pub(crate) state: RunState,
    pub(crate) pauses: Pauses,
    pub(crate) events: Vec<Event>,
    pub(crate) quit: bool,
    /// Names of nodes that have their cache and their fault.
    pub(crate) equipped: HashSet<String>,
    pub(crate) setup: Setup,
}

impl Machine {
    pub(crate) fn hear(&mut self, disk: &Arc<str>, report: MirrorReport) {
        if let Some(index) = self.disks.iter().position(|backend| backend.id() == disk) {
            self.jobs.hear(&self.disks, index, report.into());
        }
    }

    /// Targets lose power like the disks they are copies of, and fail as this run wants it.
    fn equip(&mut self) {
        let Self { jobs, equipped, setup, .. } = self;
        for node in jobs.nodes.list() {
            let Some(filters) = node.filters.filter(|_| is_target(Path::new(&node.filename))) else {
                continue;
            };
            if !equipped.insert(node.name) {
                continue;
            }
            let fault = setup.target_fault.map(|fault| fault.rule());
            for rule in fault.into_iter().chain(setup.power.then(|| volatile(setup.seed))) {
                filters.add_fault(rule).expect("a rule that makes sense");
            }
        }
    }

    fn each_disk(
        &self,
        verb: impl Fn(&BlkBackend) -> devices::virtio::blk::Ticket<()>,
    ) -> Result<(), VmError> {
        let tickets: Vec<_> = self.disks.iter().map(verb).collect();
        let waited = tickets.into_iter().map(|ticket| ticket.wait(PATIENCE));
        waited.collect::<Result<_, _>>().map_err(|error| VmError::Failed(Box::new(error)))
    }

    fn pause(&self) -> Result<(), VmError> {
        self.guest.stop();
        self.each_disk(BlkBackend::pause)
    }

    fn resume(&self) -> Result<(), VmError> {
        self.each_disk(BlkBackend::resume)?;
        self.guest.go();
        Ok(())
    }
}

impl Vm for Machine {
    fn name(&self) -> String {
        "vm".into()
    }

    fn uuid(&self) -> Uuid {
        Uuid::nil()
    }

    fn run_state(&self) -> RunState {
        self.state
    }

    fn cpus(&self) -> Vec<CpuInfo> {
        vec![]
    }

    fn chardevs(&self) -> Vec<ChardevInfo> {
        vec![]
    }

    fn disks(&self) -> Vec<DiskInfo> {
        let info = |disk: &BlkBackend| DiskInfo {
            device: disk.id().to_string(),
            virtual_size: disk.size(),
            block_size: disk.block_size(),
            io_status: IoStatus::Ok,
            filters: disk.filters().cloned(),
        };
        self.disks.iter().map(info).collect()
    }

    fn agent(&self) -> AgentStatus {
        AgentStatus {
            connected: false,
            in_sync: false,
            out_of_band: None,
            frozen: None,
            automatic_thaws: 0,
            malformed_replies: 0,
        }
    }

    fn stop(&mut self, by: Holder) -> Result<(), VmError> {
        let mut pauses = self.pauses.clone();
        pauses.add(by)?;
        if self.state == RunState::Running {
            if let Err(error) = self.pause() {
                self.resume()?;
                return Err(error);
            }
            self.state = RunState::Paused;
            self.events.push(Event::Stop);
        }
        self.pauses = pauses;
        Ok(())
    }

    fn cont(&mut self, by: Holder, force: bool) -> Result<(), VmError> {
        let mut pauses = self.pauses.clone();
        if pauses.remove(by, force)? && self.state != RunState::Running {
            self.resume()?;
            self.state = RunState::Running;
            self.events.push(Event::Resume);
        }
        self.pauses = pauses;
        Ok(())
    }

    fn paused_by(&self) -> Vec<Holder> {
        self.pauses.list()
    }

    fn system_reset(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn system_powerdown(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn system_wakeup(&mut self) -> Result<(), VmError> {
        Err(VmError::NotSuspended)
    }

    fn resize_disk(&mut self, _: usize, _: u64) -> Result<(), VmError> {
        Err(VmError::State(self.state.name()))
    }

    fn block(&mut self) -> BlockLayer<'_> {
        self.equip();
        let disks: &dyn Disks = &self.disks;
        BlockLayer { jobs: &mut self.jobs, disks }
    }

    /// As the controller ends: the operation in progress is decided, jobs end, disks come to rest.
    fn quit(&mut self) {
        self.events.push(Event::Shutdown(ShutdownCause::HostQuit));
        self.guest.stop();
        self.jobs.conclude_pivot(&self.disks);
        self.jobs.end_all(&self.disks);
        let _ = self.each_disk(BlkBackend::pause);
        self.quit = true;
    }

    fn take_events(&mut self) -> Vec<Event> {
        let mut events = std::mem::take(&mut self.events);
        events.append(&mut self.jobs.take_events());
        events
    }

    fn guest_request(&mut self, _: SessionId, _: String, _: Map) {}

    fn guest_session_closed(&mut self, _: SessionId) {}
}
