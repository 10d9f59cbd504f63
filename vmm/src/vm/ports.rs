//! Between the virtio-serial device and the host ends of its ports.

use std::any::Any;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

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

/// How long clients of channels have at the end of the VM to take what is theirs.
const FAREWELL: Duration = Duration::from_secs(5);

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
    /// The virtio-serial device of that machine.
    console_device: Option<ConsoleHandle>,
    /// Doorbells are answered: the guest runs, and may find its memory written.
    answering: bool,
    /// What the guest is to be told when it runs again: ports whose client left meanwhile, another terminal size.
    closed_meanwhile: Vec<usize>,
    resized: bool,
    /// Where bytes of the guest pass through.
    buffer: Box<[u8]>,
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
            console_device: None,
            answering: true,
            closed_meanwhile: vec![],
            resized: false,
            buffer: vec![0; CHUNK].into(),
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
        self.console_device = Some(console.clone());
        console.set_host_open(CONSOLE_PORT, true);
        console.set_host_open(AGENT_PORT, true);
        self.closed_meanwhile.clear();
        self.tell_guest(console);
    }

    /// Whose client is there, and how large the terminal is.
    fn tell_guest(&mut self, console: &ConsoleHandle) {
        for port in self.closed_meanwhile.drain(..) {
            console.set_host_open(port, false);
        }
        for (index, channel) in self.channels.iter().enumerate() {
            console.set_host_open(FIRST_CHANNEL + index, channel.is_open());
        }
        if let Some((cols, rows)) = crate::terminal::size() {
            console.resize(Size { cols, rows });
        }
    }

    /// The machine is gone, and its guest ends with it, unless the VM is about to end.
    pub(super) fn forget_doorbells(&mut self, core: &mut Core, watch: &mut dyn Watch) {
        for watched in self.watched.drain(..) {
            watch.remove(watched.fd);
        }
        if let Some(console) = self.console_device.take()
            && core.controller.machine().is_some()
        {
            self.port_events(0, &console, core, watch);
        }
    }

    /// The guest runs, or stands still: then nothing writes its memory, and its doorbells wait, rung as they are.
    fn answer(&mut self, running: bool, console: &ConsoleHandle, watch: &mut dyn Watch) {
        if self.answering != running {
            self.answering = running;
            if running {
                self.tell_guest(console);
            }
            let interest = if running { Interest::READ } else { Interest::NONE };
            for watched in &self.watched {
                watch.set(watched.fd, watched.token, interest);
            }
        }
    }

    /// The terminal has another size.
    pub(super) fn resize(&mut self) {
        self.resized = true;
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
        self.port_events(queue, &console, core, watch);
    }

    fn port_events(&mut self, queue: usize, console: &ConsoleHandle, core: &mut Core, watch: &mut dyn Watch) {
        for event in console.doorbell(queue) {
            match event {
                PortEvent::GuestOpened(port) => Self::guest_end(port, true, core, watch),
                PortEvent::GuestClosed(port) => Self::guest_end(port, false, core, watch),
                PortEvent::Readable(port) => self.pull(port, console, core, watch),
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
        let mut moved = 0;
        while self.wants(port) {
            let len = console.read(port, &mut self.buffer);
            if len == 0 {
                break;
            }
            let bytes = &self.buffer[..len];
            match port {
                CONSOLE_PORT => self.console.output(bytes, watch),
                AGENT_PORT => core.guest.receive(bytes, Instant::now(), watch),
                channel => self.channels[channel - FIRST_CHANNEL].output(bytes, watch),
            }
            moved += len;
            if moved >= TURN_MAX {
                console.ring(port);
                break;
            }
        }
        console.announce(port);
    }

    fn wants(&self, port: usize) -> bool {
        match port {
            // Both can take whatever the guest sends: the console drops, the guest channel bounds what it keeps.
            CONSOLE_PORT | AGENT_PORT => true,
            channel => self.channels.get(channel - FIRST_CHANNEL).is_some_and(ChannelHost::wants_output),
        }
    }

    /// A client of the console or of a channel connects, types, reads or leaves.
    pub(super) fn client_ready(
        &mut self,
        token: Token,
        console: Option<&ConsoleHandle>,
        watch: &mut dyn Watch,
    ) {
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
        self.changed(FIRST_CHANNEL + usize::from(index), change, console);
    }

    /// The host end of `port` was opened or closed: the guest hears of it now, or when it runs again.
    fn changed(&mut self, port: usize, change: Option<Change>, console: Option<&ConsoleHandle>) {
        match (change, console) {
            (Some(change), Some(console)) if self.answering => {
                console.set_host_open(port, change == Change::Opened);
            }
            (Some(Change::Closed), _) => self.closed_meanwhile.push(port),
            _ => {}
        }
    }

    /// Takes what the guest has printed so far: its last words, before its machine goes.
    pub(super) fn drain_output(&mut self, core: &mut Core, watch: &mut dyn Watch) {
        self.serial(core, watch);
        if let (true, Some(machine)) = (self.answering, core.controller.machine()) {
            let console = machine.console.clone();
            self.pull(CONSOLE_PORT, &console, core, watch);
            for port in FIRST_CHANNEL..FIRST_CHANNEL + self.channels.len() {
                self.pull(port, &console, core, watch);
            }
            // A guest that falls asleep has closed its ports, and nobody listens while it sleeps.
            self.port_events(0, &console, core, watch);
        }
    }

    /// Gives clients what they have not taken yet: the end of the VM.
    pub(super) fn finish(&mut self) {
        let deadline = Instant::now() + FAREWELL;
        for channel in &mut self.channels {
            channel.finish(deadline);
        }
        if let Some(terminal) = self.console.terminal() {
            terminal.finish();
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
        let Some(machine) = core.controller.machine() else { return };
        let console = machine.console.clone();
        let serial = Arc::clone(&machine.serial);
        let running = core.controller.state().is_running();
        self.answer(running, &console, watch);
        self.watch_terminal(watch);
        if !running {
            return;
        }
        if std::mem::take(&mut self.resized)
            && let Some((cols, rows)) = crate::terminal::size()
        {
            console.resize(Size { cols, rows });
        }
        self.console_input(&console, &serial, watch);
        for index in 0..self.channels.len() {
            let port = FIRST_CHANNEL + index;
            loop {
                let taken = console.write(port, self.channels[index].input());
                if taken == 0 {
                    break;
                }
                let change = self.channels[index].consumed(taken, watch);
                self.changed(port, change, Some(&console));
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

    fn watch_terminal(&mut self, watch: &mut dyn Watch) {
        let room = self.console.input_room() > 0;
        if let Some(terminal) = self.console.terminal() {
            terminal.watch_input(room, watch);
        }
    }

    fn console_input(&mut self, console: &ConsoleHandle, serial: &Mutex<SerialPort>, watch: &mut dyn Watch) {
        loop {
            let input = self.console.input();
            let taken =
                if self.serial { serial.lock().input(input) } else { console.write(CONSOLE_PORT, input) };
            self.console.consumed(taken);
            // Input that epoll never tells of is read when there is room for it, until the guest takes no more.
            let refilled = self.console.input().is_empty() && self.read_silent_input(watch);
            if taken == 0 && !refilled {
                break;
            }
        }
        self.watch_terminal(watch);
    }

    fn read_silent_input(&mut self, watch: &mut dyn Watch) -> bool {
        let room = self.console.input_room();
        let Some(terminal) = self.console.terminal().filter(|terminal| terminal.has_silent_input()) else {
            return false;
        };
        match terminal.read(room, watch) {
            Input::Bytes(bytes) => {
                self.console.typed(&bytes);
                !bytes.is_empty()
            }
            Input::Leave | Input::End => false,
        }
    }
}
