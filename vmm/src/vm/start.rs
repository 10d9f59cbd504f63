//! How a VM starts and ends.

use std::io::{self, IsTerminal};
use std::time::Duration;

use block::{Disk, DiskOptions, EngineKind, EngineOptions, Filters, OpenError};
use devices::virtio::blk::{BlkBackend, BlkOptions, ErrorPolicy, StartError};
use vmm_sys_util::timerfd::TimerFd;

use super::core::Core;
use super::ports::{self, PortHosts};
use super::{ControlLoop, Outcome, run_loop};
use crate::boot::{BootError, BootFiles};
use crate::config::{self, VmSpec};
use crate::controller::{ControlError, Controller, Fixed};
use crate::event_loop::{Interest, Token, Watch};
use crate::guest_channel::{ChannelConfig, GuestChannel};
use crate::host::{self, HostError};
use crate::machine::builder::MachineError;
use crate::machine::notify::{self, Notifier, VmEvent};
use crate::monitor::{Monitor, ShutdownCause};
use crate::pauses::Pauses;
use crate::ports::{ChannelHost, ConsoleHost, TerminalIo};
use crate::run_dir::{RunDir, VmPaths};
use crate::signals::{Signal, Signals};
use crate::socket::SocketError;

/// For the images of a VMM that was killed, after it is gone.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

/// Why a VM could not run, or could not be ended well.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No usable KVM.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk cannot be opened.
    #[error("Cannot open disk {id}")]
    Disk {
        /// Its device name.
        id: String,
        /// Why.
        source: OpenError,
    },
    /// A disk's thread cannot be started.
    #[error(transparent)]
    DiskThread(#[from] StartError),
    /// No machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A socket cannot be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The terminal, signals or timers.
    #[error("Cannot set up the {what}")]
    Setup {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The control loop failed.
    #[error("The control loop failed: {source}")]
    EventLoop {
        /// event-manager's words.
        source: event_manager::Error,
    },
    /// The VM could not be started, or not be ended without loss.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// What the terminal of the process is to the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Terminal {
    /// Standard input and output belong to the guest's console.
    Attached,
    /// They do not.
    Detached,
}

/// What surrounds the VM.
pub struct Foreground {
    /// The terminal.
    pub terminal: Terminal,
    /// Called once the VM runs (or is ready, in state prelaunch) and its sockets accept.
    pub ready: Option<Box<dyn FnOnce()>>,
}

/// Runs a VM until it ends.
///
/// # Errors
///
/// It could not be started: nothing is left behind. Or it has ended, and a disk could not be brought to rest.
pub fn run(spec: &VmSpec, dir: &RunDir, foreground: Foreground) -> Result<Outcome, RunError> {
    let setup = |what| move |source| RunError::Setup { what, source };
    // Before any thread starts: they inherit the mask.
    let job_control = foreground.terminal == Terminal::Attached && io::stdin().is_terminal();
    let mut signals = Signals::take(job_control).map_err(setup("signals"))?;
    let boot = BootFiles::open(spec)?;
    let (events, inbox) = notify::channel().map_err(setup("event queue"))?;
    let disks = open_disks(spec, &events)?;
    let kvm = host::open_kvm()?;
    let fixed = Fixed { spec: spec.clone(), kvm, boot, disks, ports: ports::specs(spec), events };
    let mut controller = Controller::new(fixed)?;
    // Nothing has happened yet that would have to be undone.
    if let Some(Signal::End(number)) = signals.take_next() {
        return Ok(Outcome { exit: signal_status(number), cause: "a signal, before the start".into() });
    }

    let mut registrations = Early::default();
    let watch = &mut registrations;
    let paths = VmPaths::clone(dir);
    let monitor = Monitor::bind(&paths.monitor_socket(), watch)?;
    let guest = GuestChannel::bind(&paths.agent_socket(), channel_config(spec), watch)?;
    let channels = (0_u16..)
        .zip(&spec.channels)
        .map(|(index, channel)| ChannelHost::bind(&channel.socket, index, watch))
        .collect::<Result<Vec<_>, _>>()?;
    let terminal = match foreground.terminal {
        Terminal::Attached => Some(TerminalIo::attach().map_err(setup("terminal"))?),
        Terminal::Detached => None,
    };
    let console = ConsoleHost::bind(&paths.console_socket(), terminal, watch)?;
    let timer = TimerFd::new().map_err(|e| RunError::Setup { what: "timer", source: e.into() })?;

    if !spec.start_paused {
        controller.cont()?;
    }
    let control = ControlLoop {
        core: Core { controller, guest, paths, events: vec![], pauses: Pauses::default() },
        monitor,
        ports: PortHosts::new(console, channels, spec),
        inbox,
        signals,
        known: registrations.0,
        generation: None,
        boots: Some(1),
        timer,
        armed: None,
    };
    if let Some(ready) = foreground.ready {
        ready();
    }
    finish(run_loop(control)?)
}

/// After the loop: clients get what they were promised, and what went wrong with the disks is told.
fn finish(control: ControlLoop) -> Result<Outcome, RunError> {
    let ControlLoop { mut core, mut monitor, mut ports, signals, .. } = control;
    // Whatever is waited for from here on, a signal ends it.
    drop(signals);
    let watch = &mut Early::default();
    for event in core.take_all_events() {
        monitor.emit(&event, &mut core, std::time::Instant::now(), watch);
    }
    monitor.close(watch);
    core.guest.close(std::time::Instant::now(), watch);
    ports.finish();
    let ended = core.controller.ended();
    let loss = core.controller.take_loss();
    if let Some(error) = loss {
        return Err(error.into());
    }
    let (exit, cause) = ended.map_or((1, ShutdownCause::HostError), |ended| (ended.exit, ended.cause));
    Ok(Outcome { exit, cause: describe(cause).to_owned() })
}

/// As a shell tells of a signal.
pub(super) fn signal_status(number: i32) -> u8 {
    u8::try_from(128 + number).unwrap_or(1)
}

fn describe(cause: ShutdownCause) -> &'static str {
    match cause {
        ShutdownCause::HostError => "the VMM failed",
        ShutdownCause::HostQuit => "a client asked for it",
        ShutdownCause::HostReset => "a client asked for a reset",
        ShutdownCause::HostSignal => "a signal",
        ShutdownCause::GuestShutdown => "the guest powered off",
        ShutdownCause::GuestReset => "the guest rebooted",
        ShutdownCause::GuestPanic => "the guest's kernel panicked",
    }
}

fn open_disks(spec: &VmSpec, events: &Notifier) -> Result<Vec<BlkBackend>, RunError> {
    let open = |disk: &config::DiskSpec| {
        let image = Disk::open_after_another(|| options(disk), LOCK_PATIENCE)
            .map_err(|source| RunError::Disk { id: disk.id.clone(), source })?;
        let events = events.clone();
        let engine =
            engine_options(disk).map_err(|source| RunError::Setup { what: "limits and faults", source })?;
        Ok(BlkBackend::start(image, blk_options(disk, engine), move |event| {
            events.post(VmEvent::Disk(event));
        })?)
    };
    spec.disks.iter().map(open).collect()
}

fn options(disk: &config::DiskSpec) -> DiskOptions {
    DiskOptions {
        format: disk.format.map(|config::ImageFormat::Raw| block::Format::Raw),
        read_only: disk.read_only,
        direct: disk.direct,
        cache: match disk.cache {
            config::CacheMode::Writeback => block::Cache::Writeback,
            config::CacheMode::Writethrough => block::Cache::Writethrough,
            config::CacheMode::Unsafe => block::Cache::Unsafe,
        },
        discard: disk.discard,
        ..DiskOptions::path(&disk.path)
    }
}

/// With the limits and faults of the configuration, which was validated: limits are the device's, faults its image's.
fn engine_options(disk: &config::DiskSpec) -> io::Result<EngineOptions> {
    let (device, node) = (Filters::new()?, Filters::new()?);
    device.set_limits(disk.throttle.0).map_err(io::Error::other)?;
    for fault in &disk.faults {
        let rule = fault.rule().map_err(io::Error::other)?;
        node.add_fault(rule).map_err(io::Error::other)?;
        tracing::warn!(disk = disk.id, ?fault, "A fault is injected");
    }
    let kind = match disk.engine {
        config::IoEngine::Auto => None,
        config::IoEngine::IoUring => Some(EngineKind::Uring),
        config::IoEngine::Threads => Some(EngineKind::Threads),
    };
    Ok(EngineOptions { kind, filters: Some(device), node_filters: Some(node), ..EngineOptions::default() })
}

fn channel_config(spec: &VmSpec) -> ChannelConfig {
    let thaw_grace = (spec.thaw_grace > 0).then(|| Duration::from_secs(spec.thaw_grace.into()));
    ChannelConfig { thaw_grace, ..ChannelConfig::default() }
}

fn blk_options(disk: &config::DiskSpec, engine: EngineOptions) -> BlkOptions {
    let policy = |policy| match policy {
        config::ErrorPolicy::Report => ErrorPolicy::Report,
        config::ErrorPolicy::Ignore => ErrorPolicy::Ignore,
        config::ErrorPolicy::Stop => ErrorPolicy::Stop,
        config::ErrorPolicy::Enospc => ErrorPolicy::Enospc,
    };
    BlkOptions {
        serial: disk.serial.clone().unwrap_or_else(|| disk.id.chars().take(20).collect()),
        queues: disk.queues.into(),
        read_error: policy(disk.rerror),
        write_error: policy(disk.werror),
        engine,
        ..BlkOptions::new(&disk.id)
    }
}

/// Registrations made before the loop is there.
#[derive(Default)]
struct Early(std::collections::HashMap<std::os::fd::RawFd, (Token, Interest)>);

impl Watch for Early {
    fn set(&mut self, fd: std::os::fd::RawFd, token: Token, interest: Interest) {
        self.0.insert(fd, (token, interest));
    }

    fn remove(&mut self, fd: std::os::fd::RawFd) {
        self.0.remove(&fd);
    }
}
