//! A running VM: the control loop, and how it starts and ends.
//!
//! ```text
//!   run ─ open boot files and disks ─ build machine ─ bind sockets ─ cont ─▶ loop ─▶ tear down ─▶ Outcome
//!
//!   loop: one epoll (event-manager), one subscriber
//!     VmEvent ───────────▶ Controller ─────── events ──▶ Monitor ──▶ clients
//!     monitor sockets ───▶ Monitor ─── verbs ──▶ Core (dyn monitor::Vm) ─▶ Controller, GuestChannel
//!     agent sockets ─────▶ GuestChannel ◀──▶ agent port ◀──▶ guest
//!     doorbells ─────────▶ ConsoleHandle ──▶ ConsoleHost, ChannelHost, GuestChannel
//! ```
//!
//! After each turn the loop settles: whatever one part has for another is moved until nothing moves any more.

mod core;
mod ports;
mod start;

use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::timerfd::TimerFd;

use self::core::Core;
use self::ports::PortHosts;
use crate::controller::ControlError;
use crate::event_loop::{Interest, Ready, Registrations, Token, Watch, ready};
use crate::machine::notify::{Inbox, VmEvent};
use crate::monitor::{Monitor, SessionId, ShutdownCause, pivot_info};
use crate::ports::terminal_io::Input;
use crate::signals::{Signal, Signals};

use self::start::signal_status;
pub use self::start::{Foreground, RunError, Terminal, run};

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Exit status of the process.
    pub exit: u8,
    /// Who or what ended it, in words.
    pub cause: String,
}

/// Events of other threads in one turn of the loop: sockets and signals have theirs.
const EVENTS_PER_TURN: u32 = 64;

/// The one subscriber of the loop.
struct ControlLoop {
    core: Core,
    monitor: Monitor,
    ports: PortHosts,
    inbox: Inbox,
    signals: Signals,
    /// What is registered with event-manager.
    known: HashMap<RawFd, (Token, Interest)>,
    /// The machine whose doorbells are registered.
    generation: Option<u64>,
    /// The boot whose guest the guest channel knows.
    boots: Option<u64>,
    timer: TimerFd,
    /// What the timer is set to.
    armed: Option<Instant>,
}

impl MutEventSubscriber for ControlLoop {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let mut known = std::mem::take(&mut self.known);
        // What was asked for before the loop was there.
        for (fd, (token, interest)) in std::mem::take(&mut known) {
            Registrations::new(ops, &mut known).set(fd, token, interest);
        }
        let watch = &mut Registrations::new(ops, &mut known);
        watch.set(self.inbox.wake().as_raw_fd(), Token::VmEvent, Interest::READ);
        watch.set(self.signals.as_raw_fd(), Token::Signal, Interest::READ);
        watch.set(self.timer.as_raw_fd(), Token::Timer, Interest::READ);
        self.settle(watch);
        self.known = known;
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let mut known = std::mem::take(&mut self.known);
        let watch = &mut Registrations::new(ops, &mut known);
        match Token::unpack(events.data()) {
            Some(token) => self.dispatch(token, ready(events.event_set()), watch),
            None => tracing::error!(data = events.data(), "Event with an unknown token"),
        }
        self.settle(watch);
        self.known = known;
    }
}

impl ControlLoop {
    fn dispatch(&mut self, token: Token, ready: Ready, watch: &mut dyn Watch) {
        let now = Instant::now();
        match token {
            Token::VmEvent => self.vm_events(watch),
            Token::Signal => self.signals(),
            Token::Timer => self.tick(watch),
            Token::MonitorListener | Token::MonitorClient(_) => {
                self.monitor.ready(token, ready, &mut self.core, now, watch);
            }
            Token::AgentListener | Token::AgentClient(_) => {
                self.core.guest.ready(token, ready, now, watch);
            }
            Token::PortListener(_) | Token::PortClient(_) => {
                let console = self.core.controller.machine().map(|machine| machine.console.clone());
                self.ports.client_ready(token, console.as_ref(), watch);
            }
            Token::Stdin => self.terminal_input(watch),
            Token::Stdout => {
                if let Some(terminal) = self.ports.console.terminal() {
                    terminal.writable(watch);
                }
            }
            Token::ConsoleQueue(queue) => self.ports.doorbell(queue, &mut self.core, watch),
            Token::RngQueue => {
                self.ports.entropy(&self.core);
            }
            Token::Serial => self.ports.serial(&mut self.core, watch),
        }
    }

    fn vm_events(&mut self, watch: &mut dyn Watch) {
        self.ports.drain_output(&mut self.core, watch);
        for _ in 0..EVENTS_PER_TURN {
            let Some(event) = self.inbox.take_next() else { return };
            let done = match event {
                VmEvent::Vcpu { machine, index, event } => {
                    self.core.controller.vcpu_event(machine, index, event)
                }
                VmEvent::Disk(event) => self.core.controller.disk_event(&event),
                VmEvent::Job(done) => {
                    self.core.controller.job_done(done);
                    Ok(())
                }
            };
            log_failure(done);
        }
        self.inbox.wake_again();
    }

    fn signals(&mut self) {
        while let Some(signal) = self.signals.take_next() {
            match signal {
                Signal::End(number) => {
                    tracing::info!(number, "Signal: the VM ends");
                    let exit = signal_status(number);
                    log_failure(self.core.controller.quit(exit, ShutdownCause::HostSignal));
                }
                Signal::Resize => self.ports.resize(),
                Signal::Suspend => {
                    if let Some(terminal) = self.ports.console.terminal() {
                        terminal.suspend();
                    }
                    self.ports.resize();
                }
            }
        }
    }

    fn tick(&mut self, watch: &mut dyn Watch) {
        // Not read: setting it makes it unready, and an event that was overtaken by another setting must not wait.
        self.armed = None;
        if let Err(error) = self.timer.clear() {
            tracing::error!(%error, "Cannot clear the timer");
        }
        let now = Instant::now();
        self.monitor.tick(&mut self.core, now, watch);
        self.core.guest.tick(now, watch);
        self.core.controller.tick(now);
    }

    fn terminal_input(&mut self, watch: &mut dyn Watch) {
        let room = self.ports.console.input_room();
        let Some(terminal) = self.ports.console.terminal() else { return };
        match terminal.read(room, watch) {
            Input::Bytes(bytes) => self.ports.console.typed(&bytes),
            Input::Leave => {
                log_failure(self.core.controller.quit(0, ShutdownCause::HostQuit));
            }
            Input::End => {}
        }
    }

    /// After a reset: the doorbells are others, and perhaps the guest is.
    fn follow_machine(&mut self, now: Instant, watch: &mut dyn Watch) {
        if self.generation != Some(self.core.controller.generation()) {
            self.ports.forget_doorbells(&mut self.core, watch);
            if let Some(machine) = self.core.controller.machine() {
                self.ports.watch_doorbells(machine, watch);
            }
            // A guest that woke up is the one that fell asleep: what it froze is frozen.
            let boots =
                Some(self.core.controller.boots()).filter(|_| self.core.controller.machine().is_some());
            if self.boots != boots {
                self.core.guest.guest_reset(now, watch);
                self.boots = boots;
            }
            self.generation = Some(self.core.controller.generation());
        }
    }

    /// Moves what one part has for another until nothing moves any more.
    fn settle(&mut self, watch: &mut dyn Watch) {
        let now = Instant::now();
        self.follow_machine(now, watch);
        self.core.guest.vm_running(self.core.controller.state().is_running(), now);
        // An outcome lets a session's next request in; an event may close a session that froze the guest: both have
        // bytes for the port again.
        loop {
            self.ports.settle(&mut self.core, watch);
            self.core.controller.settle_jobs();
            // What the guest had to wait with may have been a reset.
            self.follow_machine(now, watch);
            let relayed = self.core.guest.take_relayed();
            let events = self.core.take_all_events();
            let answers = self.core.controller.take_answers();
            if relayed.is_empty() && events.is_empty() && answers.is_empty() {
                break;
            }
            for (session, result) in relayed {
                self.monitor.complete(SessionId(session), result, &mut self.core, now, watch);
            }
            for event in events {
                self.monitor.emit(&event, &mut self.core, now, watch);
            }
            // After the events that led to them.
            for (session, result) in answers {
                let result = result.map(|info| pivot_info(&info));
                self.monitor.complete(SessionId(session), result, &mut self.core, now, watch);
            }
        }
        self.arm_timer();
    }

    /// Arms the timer for the earliest deadline, if it would be late. Most deadlines go before they come: a timer that
    /// is early costs one turn of the loop in a minute, one that is always set right two system calls for a message.
    fn arm_timer(&mut self) {
        let deadlines = [
            self.monitor.next_deadline(),
            self.core.guest.next_deadline(),
            self.core.controller.next_deadline(),
        ];
        let Some(deadline) = deadlines.into_iter().flatten().min() else { return };
        if self.armed.is_some_and(|armed| armed <= deadline) {
            return;
        }
        self.armed = Some(deadline);
        // A timer of zero is a timer that is off.
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_micros(1));
        if let Err(error) = self.timer.reset(left, None) {
            tracing::error!(%error, "Cannot set the timer");
        }
    }
}

fn log_failure(done: Result<(), ControlError>) {
    if let Err(error) = done {
        tracing::error!(error = &error as &dyn std::error::Error, "The VM did not do what was to be done");
    }
}

/// Runs the loop until the VM has ended.
fn run_loop(control: ControlLoop) -> Result<ControlLoop, RunError> {
    let failed = |source| RunError::EventLoop { source };
    let mut manager = EventManager::<ControlLoop>::new_with_capacity(64).map_err(failed)?;
    let id = manager.add_subscriber(control);
    while manager.subscriber_mut(id).map_err(failed)?.core.controller.ended().is_none() {
        manager.run().map_err(failed)?;
    }
    manager.remove_subscriber(id).map_err(failed)
}
