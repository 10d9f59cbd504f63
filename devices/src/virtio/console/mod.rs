//! virtio-console with many ports: "virtio-serial" (virtio 1.2, section 5.3; Linux `drivers/char/virtio_console.c`).
//!
//! ```text
//!   queue   0 rx0   1 tx0   2 control rx   3 control tx   4 rx1   5 tx1   6 rx2   …
//!
//!   guest ══ doorbells ══▶ control loop: ConsoleHandle::doorbell(queue) ──▶ PortEvents
//!                              │ read / discard: pull from the guest's tx buffers
//!                              │ write: straight into the guest's rx buffers
//!   guest ◀═ interrupt ════════┘
//!   vCPU ── registers ──▶ MmioTransport ──▶ Console (activate, reset, configuration space)
//! ```
//!
//! # Threads
//!
//! [`Console`] sits in the transport; [`ConsoleHandle`] is for the control loop. They share one lock that is held
//! for a bounded amount of copying and never while waiting for anything.
//!
//! # Flow control
//!
//! No byte is buffered on the host. Data that nobody reads stays in the guest's transmit buffers until the guest
//! runs out of them: a program that writes to the port then blocks, a vCPU never does. With one exception: Linux
//! *spins with interrupts off* until a console's output is consumed, so a console port must always be read or
//! discarded, attached or not.
//!
//! # Open and closed
//!
//! Both ends of a port are open or closed. The guest's `write` blocks until the host end is open, and its `poll`
//! reports a hang-up when it closes; every closing reaches the guest, also one followed by an opening before it
//! looked. The other way round, the handle reports [`PortEvent::GuestOpened`] and [`PortEvent::GuestClosed`], the
//! latter also when the guest resets the device.
//!
//! # Broken rules
//!
//! A malformed ring or chain, or a buffer of the wrong direction, sets DEVICE_NEEDS_RESET; all ports are closed
//! then. Control messages that are too short, unknown, or about an unknown port are ignored.

mod control;
mod port;
mod spec;

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::EventFd;

pub use self::control::Size;
pub use self::spec::{MAX_NAME, MAX_PORTS, PortSpec, SpecError};

use self::control::{FromGuest, HEADER};
use self::port::{Port, RxTx};
use super::device::{Activation, ActiveQueue, Interrupt, VirtioDevice};
use super::queue::{Violation, Virtqueue, ring};

/// The configuration space has a size.
const VIRTIO_CONSOLE_F_SIZE: u32 = 0;
/// There are more ports than the first, and control queues.
const VIRTIO_CONSOLE_F_MULTIPORT: u32 = 1;

/// Linux fills the receive queue of every port with as many pages.
const DATA_QUEUE_SIZE: u16 = 64;
const CONTROL_QUEUE_SIZE: u16 = 32;
const CONTROL_RX: usize = 2;
const CONTROL_TX: usize = 3;
/// Control messages handled in one call.
const CONTROL_BUDGET: u16 = 64;

/// What has happened on a port, named by its index in the list of [`PortSpec`]s.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortEvent {
    /// A program in the guest has opened the port (or the kernel has taken a console into use). What could not be
    /// written before may fit now.
    GuestOpened(usize),
    /// The guest end was closed, or the guest has forgotten the port. If what it had sent before is still there to
    /// be read, [`PortEvent::Readable`] comes first.
    GuestClosed(usize),
    /// The guest has sent something.
    Readable(usize),
    /// The guest has room for more.
    Writable(usize),
}

/// The device, as the transport sees it.
pub struct Console {
    state: Arc<Mutex<State>>,
    queue_sizes: Vec<u16>,
}

/// The device, as the control loop sees it. Clones are the same device.
#[derive(Clone)]
pub struct ConsoleHandle {
    state: Arc<Mutex<State>>,
}

struct State {
    // Fixed, and what the host wants.
    ports: Vec<Port>,
    size: Size,
    /// Some doorbell the control loop listens to, to make it look after a reset.
    wake: Option<Arc<EventFd>>,

    // While the driver is there.
    active: Option<Active>,
}

struct Active {
    interrupt: Arc<Interrupt>,
    /// `VIRTIO_CONSOLE_F_SIZE` was negotiated.
    resizable: bool,
    multiport: bool,
    control_rx: Option<Virtqueue>,
    control_tx: Option<Virtqueue>,
    /// The driver has said DEVICE_READY, or what follows from it.
    device_ready: bool,
}

impl Console {
    /// A device with the given ports, all of them plugged in and their host ends closed, and the handle to it. A
    /// driver without `VIRTIO_CONSOLE_F_MULTIPORT` sees the first port alone, and only if that is a console.
    ///
    /// # Errors
    ///
    /// [`SpecError`] when there are too many or too few ports, or their names are no good.
    pub fn new(specs: Vec<PortSpec>) -> Result<(Self, ConsoleHandle), SpecError> {
        if specs.is_empty() || specs.len() > MAX_PORTS {
            return Err(SpecError::Count { count: specs.len() });
        }
        let names: Vec<&String> = specs.iter().filter_map(|spec| spec.name.as_ref()).collect();
        for (at, &name) in names.iter().enumerate() {
            if !(1..=MAX_NAME).contains(&name.len()) || name.contains(|c: char| c == '/' || c.is_control()) {
                return Err(SpecError::Name { name: name.clone() });
            }
            if names[..at].contains(&name) {
                return Err(SpecError::Duplicate { name: name.clone() });
            }
        }
        let mut queue_sizes = vec![DATA_QUEUE_SIZE, DATA_QUEUE_SIZE, CONTROL_QUEUE_SIZE, CONTROL_QUEUE_SIZE];
        queue_sizes.resize(2 + 2 * specs.len(), DATA_QUEUE_SIZE);
        let ports = specs.into_iter().map(Port::new).collect();
        let state = State { ports, size: Size::default(), wake: None, active: None };
        let state = Arc::new(Mutex::new(state));
        Ok((Self { state: Arc::clone(&state), queue_sizes }, ConsoleHandle { state }))
    }
}

impl VirtioDevice for Console {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn device_features(&self) -> u64 {
        1 << VIRTIO_CONSOLE_F_SIZE | 1 << VIRTIO_CONSOLE_F_MULTIPORT
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock();
        let max_nr_ports = u32::try_from(state.ports.len()).unwrap_or(u32::MAX);
        let mut config = [0; 8];
        config[..2].copy_from_slice(&state.size.cols.to_le_bytes());
        config[2..4].copy_from_slice(&state.size.rows.to_le_bytes());
        config[4..].copy_from_slice(&max_nr_ports.to_le_bytes());
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
        for (byte, &value) in data.iter_mut().zip(&config[from..]) {
            *byte = value;
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.state.lock().activate(activation);
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        self.state.lock().reset();
        Ok(())
    }
}

/// Every call is bounded, never blocks, and does nothing while no driver is there.
impl ConsoleHandle {
    /// Serves a doorbell. Call it after reading the eventfd of `queue`, also when nobody seems to have rung, and do
    /// what the events ask for; [`Self::read`] and [`Self::write`] say when the next event comes.
    pub fn doorbell(&self, queue: usize) -> Vec<PortEvent> {
        let mut state = self.state.lock();
        let data = state.attempt(|state, _| state.serve(queue)).flatten();
        let mut events = state.take_open_events();
        events.extend(data);
        events
    }

    /// Takes bytes that the guest has sent through `port`. The guest gets a buffer back when it was read to the
    /// end.
    ///
    /// Returns the number of bytes. Only after 0 (for a `target` that is not empty) does the next
    /// [`PortEvent::Readable`] come; who stops before, for example because the host end is full, calls again by
    /// itself, or asks for another event by [`Self::ring`]. Either way [`Self::announce`] comes last.
    pub fn read(&self, port: usize, target: &mut [u8]) -> usize {
        if target.is_empty() {
            return 0;
        }
        self.on_port(port, |port, _| port.read(target)).unwrap_or(0)
    }

    /// Tells the guest of the buffers that it got back from [`Self::read`], if it wants to hear of them: call it when
    /// what was read has been handled. Linux waits for its buffer in a loop, and has seen it by then: no interrupt.
    pub fn announce(&self, port: usize) {
        self.on_port(port, Port::announce);
    }

    /// Throws away all that the guest has sent through `port`. A guest that sends faster than one bounded call can
    /// throw away makes for another [`PortEvent::Readable`].
    pub fn discard(&self, port: usize) {
        self.on_port(port, Port::discard);
    }

    /// Makes for another [`PortEvent::Readable`] in a later turn of the loop, if there is anything to read then.
    pub fn ring(&self, port: usize) {
        self.on_port(port, |port, _| {
            port.ring();
            Ok(())
        });
    }

    /// Puts bytes into the buffers that the guest has supplied on `port`.
    ///
    /// Returns how many were taken. Only after 0 (for a `source` that is not empty) does the next
    /// [`PortEvent::Writable`] or [`PortEvent::GuestOpened`] come; nothing is taken while the guest end is closed,
    /// because Linux would throw it away.
    pub fn write(&self, port: usize, source: &[u8]) -> usize {
        self.on_port(port, |port, interrupt| port.write(interrupt, source)).unwrap_or(0)
    }

    /// Opens or closes the host end of `port`; it stays so over resets of the guest. After opening it, read once:
    /// events for what is there already may have been ignored. What the guest sends while it is closed is for the
    /// caller to discard, or to leave for the next opening.
    pub fn set_host_open(&self, port: usize, open: bool) {
        let mut state = self.state.lock();
        if let Some(port) = state.ports.get_mut(port) {
            port.control.host.set(open);
            state.attempt(|state, _| state.flush_control());
        }
    }

    /// Whether the guest end of `port` is open.
    pub fn guest_open(&self, port: usize) -> bool {
        self.state.lock().ports.get(port).is_some_and(|port| port.control.guest.is_open())
    }

    /// Sets the size of the terminal behind the console ports.
    pub fn resize(&self, size: Size) {
        let mut state = self.state.lock();
        state.size = size;
        state.ports.iter_mut().for_each(|port| port.control.resized(&port.spec));
        state.attempt(|state, interrupt| {
            if state.active.as_ref().is_some_and(|active| active.resizable) {
                interrupt.config_changed();
            }
            state.flush_control()
        });
    }

    /// Unplugs `port`, or plugs it in again. The guest sees the device node go and come.
    pub fn set_plugged(&self, port: usize, plugged: bool) {
        let mut state = self.state.lock();
        if let Some(port) = state.ports.get_mut(port) {
            port.control.set_plugged(plugged);
            state.attempt(|state, _| state.flush_control());
        }
    }

    fn on_port<T>(
        &self,
        port: usize,
        act: impl FnOnce(&mut Port, &Interrupt) -> Result<T, Violation>,
    ) -> Option<T> {
        let mut state = self.state.lock();
        state.attempt(|state, interrupt| {
            state.ports.get_mut(port).map(|port| act(port, interrupt)).transpose()
        })?
    }
}

impl State {
    fn activate(&mut self, activation: Activation) {
        let resizable = activation.has(VIRTIO_CONSOLE_F_SIZE);
        let multiport = activation.has(VIRTIO_CONSOLE_F_MULTIPORT);
        let Activation { memory, features, mut queues, interrupt } = activation;
        self.wake = queues.iter().flatten().next().map(|queue| Arc::clone(&queue.doorbell));
        let mut take = |index: usize| queues.get_mut(index).and_then(Option::take);
        let build = |active: ActiveQueue| Virtqueue::new(active, memory.clone(), features);
        let usable = if multiport { self.ports.len() } else { 1 };
        for (index, port) in self.ports.iter_mut().enumerate().take(usable) {
            let rx = rx_queue(index);
            port.activate(build, RxTx { rx: take(rx), tx: take(rx + 1) });
            if !multiport {
                port.control.guest.set(port.spec.console);
            }
        }
        let control_rx = take(CONTROL_RX).filter(|_| multiport).map(build);
        let control_tx = take(CONTROL_TX).filter(|_| multiport).map(build);
        if resizable && !multiport && self.size != Size::default() {
            // Linux looks at the size when it is told of a change, not before.
            interrupt.config_changed();
        }
        let active = Active { interrupt, resizable, multiport, control_rx, control_tx, device_ready: false };
        self.active = Some(active);
    }

    /// Forgets the driver, and has the control loop look at the ports that are closed by that.
    fn reset(&mut self) {
        let Self { ports, size: _, wake, active } = self;
        *active = None;
        ports.iter_mut().for_each(Port::reset);
        if let Some(doorbell) = wake {
            ring(doorbell);
        }
    }

    /// Does something with the driver, unless there is none or it has broken the rules, now or before.
    fn attempt<T>(&mut self, act: impl FnOnce(&mut Self, &Interrupt) -> Result<T, Violation>) -> Option<T> {
        let interrupt = Arc::clone(&self.active.as_ref()?.interrupt);
        if interrupt.is_reset_needed() {
            self.reset();
            return None;
        }
        match act(self, &interrupt) {
            Ok(value) => Some(value),
            Err(violation) => {
                interrupt.violated(&violation);
                self.reset();
                None
            }
        }
    }

    fn serve(&mut self, queue: usize) -> Result<Option<PortEvent>, Violation> {
        match queue {
            CONTROL_RX => self.flush_control()?,
            CONTROL_TX => {
                self.serve_control()?;
                self.flush_control()?;
            }
            _ => return self.serve_data(queue),
        }
        Ok(None)
    }

    fn serve_data(&mut self, queue: usize) -> Result<Option<PortEvent>, Violation> {
        let index = if queue < CONTROL_RX { 0 } else { queue / 2 - 1 };
        let is_rx = queue.is_multiple_of(2);
        let Some(active) = &self.active else { return Ok(None) };
        let Some(port) = self.ports.get_mut(index) else { return Ok(None) };
        if is_rx {
            return Ok(port.is_writable()?.then_some(PortEvent::Writable(index)));
        }
        if !active.multiport && !port.spec.console {
            // A driver that takes any first port for its console.
            port.discard(&active.interrupt)?;
        }
        Ok(port.is_readable()?.then_some(PortEvent::Readable(index)))
    }

    /// Hears what the guest says.
    fn serve_control(&mut self) -> Result<(), Violation> {
        let Self { ports, active: Some(active), .. } = self else { return Ok(()) };
        let Active { interrupt, control_tx: Some(queue), device_ready, .. } = active else { return Ok(()) };
        queue.serve(CONTROL_BUDGET, interrupt, |queue, mut chain| {
            if chain.writable.remaining() > 0 {
                return Err(Violation::Protocol {
                    reason: "a writable buffer in the control transmit queue",
                });
            }
            let mut header = [0; HEADER];
            let len = chain.readable.read(queue.memory(), &mut header)?;
            queue.complete(chain.head, 0)?;
            if len == HEADER {
                hear(ports, device_ready, FromGuest::parse(header));
            } else {
                tracing::debug!(len, "Console control message is too short");
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Says what there is to say, as far as the guest has supplied buffers for it.
    fn flush_control(&mut self) -> Result<(), Violation> {
        let Self { ports, size, active: Some(active), .. } = self else { return Ok(()) };
        let Active { interrupt, control_rx: Some(queue), resizable, device_ready: true, .. } = active else {
            return Ok(());
        };
        let has_size = *resizable && *size != Size::default();
        queue.disable_doorbell()?;
        let mut budget = CONTROL_BUDGET;
        loop {
            if budget == 0 {
                // There may be more to say and room for it: in another turn.
                queue.ring();
                break;
            }
            budget -= 1;
            let next = (0u32..).zip(ports.iter_mut()).find_map(|(id, port)| {
                let message = port.control.pending(has_size)?;
                Some((id, port, message))
            });
            let Some((id, port, message)) = next else { break };
            let Some(mut chain) = queue.pop_or_arm()? else { break };
            let bytes = message.encode(id, &port.spec, *size);
            let room = chain.writable.remaining();
            if chain.readable.remaining() > 0 {
                return Err(Violation::Protocol { reason: "a readable buffer in the control receive queue" });
            }
            if chain.writable.write(queue.memory(), &bytes)? < bytes.len() {
                return Err(Violation::Protocol { reason: "a buffer too small for a control message" });
            }
            queue.complete(chain.head, room - chain.writable.remaining())?;
            port.control.sent(message);
        }
        queue.notify(interrupt)
    }

    fn take_open_events(&mut self) -> Vec<PortEvent> {
        let mut events = Vec::new();
        for (index, port) in self.ports.iter_mut().enumerate() {
            while let Some(open) = port.control.guest.pending() {
                port.control.guest.tell(open);
                // The doorbells of data and control may be answered in any order; last words come before the end.
                if !open && port.is_readable().unwrap_or(false) {
                    events.push(PortEvent::Readable(index));
                }
                events.push(if open { PortEvent::GuestOpened(index) } else { PortEvent::GuestClosed(index) });
            }
        }
        events
    }
}

fn hear(ports: &mut [Port], device_ready: &mut bool, message: FromGuest) {
    let port = |id: u32| usize::try_from(id).ok();
    match message {
        FromGuest::DeviceReady(ok) => {
            *device_ready = ok;
            ports.iter_mut().for_each(|port| port.control.device_ready());
        }
        FromGuest::PortReady(id, ok) => {
            if let Some(Port { spec, control, .. }) = port(id).and_then(|index| ports.get_mut(index)) {
                control.port_ready(spec, ok);
                // A driver that wakes up does not say DEVICE_READY again.
                *device_ready |= ok;
            }
        }
        FromGuest::PortOpen(id, open) => {
            if let Some(Port { control, .. }) = port(id).and_then(|index| ports.get_mut(index)) {
                control.port_open(open);
            }
        }
        FromGuest::Unknown(event) => tracing::debug!(event, "Unknown console control message"),
    }
}

/// Index of a port's receive queue; its transmit queue is the next.
fn rx_queue(port: usize) -> usize {
    if port == 0 { 0 } else { 2 + 2 * port }
}

#[cfg(test)]
mod tests;
