//! Between the virtio-serial device and the host ends of its ports.

use std::any::Any;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use devices::legacy::serial::SerialPort;
use devices::virtio::console::{ConsoleHandle, PortEvent, PortSpec, Size};

use parking_lot::Mutex;

use super::core::Core;
use crate::config::{ConsoleSpec, VmSpec};
use crate::event_loop::{Interest, Token, Watch};
use crate::machine::Machine;
use crate::monitor::Event;
use crate::ports::channel::Change;
use crate::ports::terminal_io::Input;
use crate::ports::{CHUNK, ChannelHost, ConsoleHost};

/// The console's port.
pub(super) const CONSOLE_PORT: usize = 0;
/// The agent's port.
pub(super) const AGENT_PORT: usize = 1;
/// The first `--channel`.
pub(super) const FIRST_CHANNEL: usize = 2;

/// The name that every client of qemu-ga expects.
const AGENT_PORT_NAME: &str = "org.qemu.guest_agent.0";

/// Bytes moved through one port before others have their turn.
const TURN_MAX: usize = 1 << 20;

/// The ports of a VM, in order.
pub(super) fn specs(spec: &VmSpec) -> Vec<PortSpec> {
    let named = |name: &str| PortSpec { name: Some(name.to_owned()), console: false };
    let mut ports = vec![PortSpec { name: None, console: true }, named(AGENT_PORT_NAME)];
    ports.extend(spec.channels.iter().map(|channel| named(&channel.name)));
    ports
}

/// The host ends.
pub(super) struct PortHosts {
    pub console: ConsoleHost,
    pub channels: Vec<ChannelHost>,
    /// The terminal and console.sock belong to COM1 instead of hvc0.
    pub serial: bool,
    /// Registered descriptors of the machine that runs, each with what keeps it open: a descriptor must not be closed
    /// while it is registered.
    watched: Vec<Watched>,
    /// Doorbells are answered: the guest runs, and may find its memory written.
    answering: bool,
}

/// A descriptor of the machine that runs.
struct Watched {
    fd: RawFd,
    token: Token,
    _open: Box<dyn Any>,
}

impl PortHosts {
    pub(super) fn new(console: ConsoleHost, channels: Vec<ChannelHost>, spec: &VmSpec) -> Self {
        Self {
            console,
            channels,
            serial: spec.console == ConsoleSpec::Serial,
            watched: vec![],
            answering: true,
        }
    }

    /// Listens to a machine, and tells it what is open.
    pub(super) fn watch_doorbells(&mut self, machine: &Machine, watch: &mut dyn Watch) {
        self.answering = true;
        let mut add = |fd: RawFd, token, open: Box<dyn Any>| {
            watch.set(fd, token, Interest::READ);
            self.watched.push(Watched { fd, token, _open: open });
        };
        for (queue, doorbell) in (0_u16..).zip(&machine.doorbells.console) {
            add(doorbell.as_raw_fd(), Token::ConsoleQueue(queue), Box::new(Arc::clone(doorbell)));
        }
        let rng = &machine.doorbells.rng;
        add(rng.as_raw_fd(), Token::RngQueue, Box::new(Arc::clone(rng)));
        let serial = machine.serial.lock();
        for fd in [serial.output().ready().as_raw_fd(), serial.room().as_raw_fd()] {
            add(fd, Token::Serial, Box::new(Arc::clone(&machine.serial)));
        }
        drop(serial);
        let console = &machine.console;
        console.set_host_open(CONSOLE_PORT, true);
        console.set_host_open(AGENT_PORT, true);
        for (index, channel) in self.channels.iter().enumerate() {
            console.set_host_open(FIRST_CHANNEL + index, channel.is_open());
        }
        if let Some((cols, rows)) = crate::terminal::size() {
            console.resize(Size { cols, rows });
        }
    }

    /// The machine is gone.
    pub(super) fn forget_doorbells(&mut self, watch: &mut dyn Watch) {
        for watched in self.watched.drain(..) {
            watch.remove(watched.fd);
        }
    }

    /// The guest runs, or stands still: then nothing writes its memory, and its doorbells wait, rung as they are.
    fn answer(&mut self, running: bool, watch: &mut dyn Watch) {
        if self.answering != running {
            self.answering = running;
            let interest = if running { Interest::READ } else { Interest::NONE };
            for watched in &self.watched {
                watch.set(watched.fd, watched.token, interest);
            }
        }
    }

    /// The terminal has another size.
    pub(super) fn resize(&self, core: &Core) {
        if let (Some(machine), Some((cols, rows))) = (core.controller.machine(), crate::terminal::size()) {
            machine.console.resize(Size { cols, rows });
        }
    }

    /// The guest has rung.
    pub(super) fn doorbell(&mut self, queue: u16, core: &mut Core, watch: &mut dyn Watch) {
        if !self.answering {
            return;
        }
        let Some(machine) = core.controller.machine() else { return };
        let queue = usize::from(queue);
        let Some(doorbell) = machine.doorbells.console.get(queue) else { return };
        // Already drained is fine.
        let _ = doorbell.read();
        let console = machine.console.clone();
        for event in console.doorbell(queue) {
            match event {
                PortEvent::GuestOpened(port) => Self::guest_end(port, true, core, watch),
                PortEvent::GuestClosed(port) => Self::guest_end(port, false, core, watch),
                PortEvent::Readable(port) => self.pull(port, &console, core, watch),
                // Whatever waits is written when the loop settles.
                PortEvent::Writable(_) => {}
            }
        }
    }

    /// The guest wants entropy.
    pub(super) fn entropy(&self, core: &Core) {
        if let (true, Some(machine)) = (self.answering, core.controller.machine()) {
            // Already drained is fine.
            let _ = machine.doorbells.rng.read();
            machine.rng.doorbell();
        }
    }

    fn guest_end(port: usize, open: bool, core: &mut Core, watch: &mut dyn Watch) {
        let id = match port {
            CONSOLE_PORT => return,
            AGENT_PORT if open => {
                core.guest.port_opened(Instant::now(), watch);
                "agent".to_owned()
            }
            AGENT_PORT => {
                core.guest.port_closed(Instant::now(), watch);
                "agent".to_owned()
            }
            channel => match core.controller.fixed().spec.channels.get(channel - FIRST_CHANNEL) {
                Some(spec) => spec.name.clone(),
                None => return,
            },
        };
        core.events.push(Event::VserportChange { id, open });
    }

    /// Takes what the guest has sent through `port`, as far as its host end wants it.
    fn pull(&mut self, port: usize, console: &ConsoleHandle, core: &mut Core, watch: &mut dyn Watch) {
        let unread = match port {
            CONSOLE_PORT => self.serial,
            AGENT_PORT => false,
            // Meant for a client that has left, not for the next one.
            channel => !self.channels.get(channel - FIRST_CHANNEL).is_some_and(ChannelHost::is_open),
        };
        if unread {
            return console.discard(port);
        }
        let mut buffer = vec![0; CHUNK];
        let mut moved = 0;
        while self.wants(port) {
            let len = console.read(port, &mut buffer);
            if len == 0 {
                return;
            }
            let bytes = &buffer[..len];
            match port {
                CONSOLE_PORT => self.console.output(bytes, watch),
                AGENT_PORT => core.guest.receive(bytes, Instant::now(), watch),
                channel => self.channels[channel - FIRST_CHANNEL].output(bytes, watch),
            }
            moved += len;
            if moved >= TURN_MAX {
                return console.ring(port);
            }
        }
    }

    fn wants(&self, port: usize) -> bool {
        match port {
            // Both can take whatever the guest sends: the console drops, the guest channel bounds what it keeps.
            CONSOLE_PORT | AGENT_PORT => true,
            channel => self.channels.get(channel - FIRST_CHANNEL).is_some_and(ChannelHost::wants_output),
        }
    }

    /// A client of the console or of a channel connects, types, reads or leaves.
    pub(super) fn client_ready(&mut self, token: Token, console: &ConsoleHandle, watch: &mut dyn Watch) {
        let (index, change) = match token {
            Token::PortListener(ConsoleHost::TOKEN) => return self.console.accept(watch),
            Token::PortClient(index) if index >= ConsoleHost::TOKEN => {
                return self.console.client_ready(index, watch);
            }
            Token::PortListener(index) => {
                (index, self.channels.get_mut(usize::from(index)).and_then(|c| c.accept(watch)))
            }
            Token::PortClient(index) => {
                (index, self.channels.get_mut(usize::from(index)).and_then(|c| c.client_ready(watch)))
            }
            _ => return,
        };
        let port = FIRST_CHANNEL + usize::from(index);
        match change {
            Some(Change::Opened) => console.set_host_open(port, true),
            Some(Change::Closed) => {
                console.set_host_open(port, false);
            }
            None => {}
        }
    }

    /// Takes what the guest has printed so far: its last words, before its machine goes.
    pub(super) fn drain_output(&mut self, core: &mut Core, watch: &mut dyn Watch) {
        self.serial(core, watch);
        if let Some(machine) = core.controller.machine() {
            let console = machine.console.clone();
            self.pull(CONSOLE_PORT, &console, core, watch);
        }
    }

    /// COM1 has printed something, or has room for input.
    pub(super) fn serial(&mut self, core: &mut Core, watch: &mut dyn Watch) {
        let Some(machine) = core.controller.machine() else { return };
        let output = {
            let serial = machine.serial.lock();
            // Whichever of the two it was; input is tried when the loop settles.
            let _ = serial.room().read();
            serial.output()
        };
        let _ = output.ready().read();
        let (bytes, lost) = output.take();
        if lost > 0 {
            tracing::warn!(lost, "COM1 printed faster than it was read");
        }
        if self.serial {
            self.console.output(&bytes, watch);
        } else if !bytes.is_empty() {
            tracing::debug!(text = %String::from_utf8_lossy(&bytes), "COM1");
        }
    }

    /// Moves what waits on the host to the guest, and what the guest holds back to hosts that have room again.
    pub(super) fn settle(&mut self, core: &mut Core, watch: &mut dyn Watch) {
        let running = core.controller.state().is_running();
        self.answer(running, watch);
        let Some(machine) = core.controller.machine() else { return };
        if !running {
            return;
        }
        let console = machine.console.clone();
        let serial = Arc::clone(&machine.serial);
        self.console_input(&console, &serial, watch);
        for index in 0..self.channels.len() {
            let port = FIRST_CHANNEL + index;
            loop {
                let taken = console.write(port, self.channels[index].input());
                if taken == 0 {
                    break;
                }
                self.channels[index].consumed(taken, watch);
            }
            self.pull(port, &console, core, watch);
        }
        loop {
            let taken = console.write(AGENT_PORT, core.guest.to_guest());
            if taken == 0 {
                break;
            }
            core.guest.sent_to_guest(taken);
        }
    }

    fn console_input(&mut self, console: &ConsoleHandle, serial: &Mutex<SerialPort>, watch: &mut dyn Watch) {
        loop {
            let input = self.console.input();
            let taken =
                if self.serial { serial.lock().input(input) } else { console.write(CONSOLE_PORT, input) };
            if taken == 0 {
                break;
            }
            self.console.consumed(taken);
        }
        let room = self.console.input_room();
        let Some(terminal) = self.console.terminal() else { return };
        terminal.watch_input(room > 0, watch);
        if room > 0
            && terminal.has_silent_input()
            && let Input::Bytes(bytes) = terminal.read(room, watch)
        {
            self.console.typed(&bytes);
        }
    }
}
