//! A 16550A UART: the console before there is any other.
//!
//! ```text
//!   guest ──THR──▶ vm_superio::Serial ──▶ SerialOutput (bounded) ──eventfd──▶ control loop ──▶ stdout, socket, log
//!   guest ◀──RBR── 64-byte FIFO ◀── SerialPort::input ◀──eventfd (room)── control loop ◀── stdin, socket
//! ```
//!
//! The transmitter is always empty and idle (LSR reads 0x60), so a guest never waits for it, and a vCPU never waits
//! for whoever reads the output: what nobody takes in time is lost, oldest first, because the last lines before a
//! crash are worth the most.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::{Action, BusDevice};
use crate::irq::InterruptLine;

/// Bytes of output that are kept until they are taken: some boot log.
pub const OUTPUT_CAPACITY: usize = 64 << 10;

/// What the guest has printed and nobody has taken yet. Clones share it; no device lock is needed.
#[derive(Clone)]
pub struct SerialOutput {
    shared: Arc<Output>,
}

struct Output {
    waiting: Mutex<Waiting>,
    /// Readable when there may be output.
    ready: EventFd,
}

#[derive(Default)]
struct Waiting {
    bytes: VecDeque<u8>,
    lost: u64,
}

impl SerialOutput {
    fn new() -> io::Result<Self> {
        let ready = event()?;
        Ok(Self { shared: Arc::new(Output { waiting: Mutex::default(), ready }) })
    }

    /// Readable when there is output: read it, then [`Self::take`].
    pub fn ready(&self) -> &EventFd {
        &self.shared.ready
    }

    /// All there is, and how many bytes before it were lost since the last call.
    pub fn take(&self) -> (Vec<u8>, u64) {
        let Waiting { bytes, lost } = std::mem::take(&mut *self.shared.waiting.lock());
        (bytes.into(), lost)
    }

    fn push(&self, byte: u8) {
        let mut waiting = self.shared.waiting.lock();
        if waiting.bytes.len() >= OUTPUT_CAPACITY {
            waiting.bytes.pop_front();
            waiting.lost = waiting.lost.saturating_add(1);
        }
        waiting.bytes.push_back(byte);
        if waiting.bytes.len() == 1 {
            signal(&self.shared.ready);
        }
    }
}

/// For `vm-superio`, which knows no bounds.
impl Write for SerialOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|&byte| self.push(byte));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The device. The VMM keeps it behind the same lock as the bus, for [`SerialPort::input`].
pub struct SerialPort {
    uart: Serial<Line, Arc<Room>, SerialOutput>,
    line: Arc<dyn InterruptLine>,
    room: Arc<Room>,
    output: SerialOutput,
}

impl SerialPort {
    /// The customary first port of COM1.
    pub const COM1: u64 = 0x3f8;
    /// The customary interrupt of COM1, edge-triggered.
    pub const COM1_IRQ: u32 = 4;
    /// Number of ports.
    pub const LEN: u64 = 8;

    /// A UART with its interrupt on `line`.
    ///
    /// # Errors
    ///
    /// No eventfd can be created.
    pub fn new(line: Box<dyn InterruptLine>) -> io::Result<Self> {
        let output = SerialOutput::new()?;
        let room = Arc::new(Room { wanted: AtomicBool::new(false), ready: event()? });
        let line = Arc::from(line);
        let uart = Serial::with_events(Line(Arc::clone(&line)), Arc::clone(&room), output.clone());
        Ok(Self { uart, line, room, output })
    }

    /// Where the output goes.
    pub fn output(&self) -> SerialOutput {
        self.output.clone()
    }

    /// Gives the guest something to read. Returns how many bytes fit into the FIFO; when that is not all,
    /// [`Self::room`] becomes readable when it is time for the rest.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let fits = bytes.len().min(self.uart.fifo_capacity());
        let taken = match fits {
            0 => 0,
            _ => self.uart.enqueue_raw_bytes(&bytes[..fits]).unwrap_or_else(|error| {
                // The bytes are in the FIFO; only the interrupt failed.
                tracing::warn!(%error, "Cannot raise the interrupt of the serial port");
                fits
            }),
        };
        self.room.wanted.store(taken < bytes.len(), Ordering::Relaxed);
        taken
    }

    /// Back to the state after power-on, for a reset of the machine. Output that was not taken yet stays.
    pub fn reset(&mut self) {
        let Self { uart, line, room, output } = self;
        *uart = Serial::with_events(Line(Arc::clone(line)), Arc::clone(room), output.clone());
    }

    /// Readable when the guest has read what an incomplete [`Self::input`] had left in its way.
    pub fn room(&self) -> &EventFd {
        &self.room.ready
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            *value = self.uart.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        if let (&[value], Ok(offset)) = (data, u8::try_from(offset))
            && let Err(error) = self.uart.write(offset, value)
        {
            tracing::debug!(%error, offset, "Serial port");
        }
        Action::None
    }
}

/// Tells the control loop that the FIFO is empty again, if it wants to know.
struct Room {
    wanted: AtomicBool,
    ready: EventFd,
}

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if self.wanted.swap(false, Ordering::Relaxed) {
            signal(&self.ready);
        }
    }
}

struct Line(Arc<dyn InterruptLine>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

fn event() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

/// It fails only when the counter is full: then it is readable already.
fn signal(event: &EventFd) {
    let _ = event.write(1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeLine;

    const DATA: u64 = 0;
    const IER: u64 = 1;
    const LSR: u64 = 5;

    fn port() -> (SerialPort, FakeLine) {
        let line = FakeLine::default();
        (SerialPort::new(Box::new(line.clone())).unwrap(), line)
    }

    fn read(port: &mut SerialPort, offset: u64) -> u8 {
        let mut data = [0];
        port.read(offset, &mut data);
        data[0]
    }

    fn print(port: &mut SerialPort, text: &[u8]) {
        for byte in text {
            // Linux's wait_for_xmitr()
            assert_eq!(read(port, LSR) & 0x60, 0x60);
            assert_eq!(port.write(DATA, &[*byte]), Action::None);
        }
    }

    #[test]
    fn what_the_guest_prints_can_be_taken_once() {
        let (mut port, _) = port();
        let output = port.output();
        assert!(output.ready().read().is_err());
        print(&mut port, b"Linux version");
        assert_eq!(output.ready().read().unwrap(), 1, "one event for many bytes");
        assert_eq!(output.take(), (b"Linux version".to_vec(), 0));
        assert_eq!(output.take(), (vec![], 0));
        print(&mut port, b"6");
        assert!(output.ready().read().is_ok());
        assert_eq!(output.take(), (b"6".to_vec(), 0));
    }

    #[test]
    fn output_that_nobody_takes_is_bounded_and_loses_the_oldest() {
        let (mut port, _) = port();
        print(&mut port, &[b'x'; OUTPUT_CAPACITY]);
        print(&mut port, b"panic");
        let (bytes, lost) = port.output().take();
        assert_eq!((bytes.len(), lost), (OUTPUT_CAPACITY, 5));
        assert!(bytes.ends_with(b"xpanic"));
        assert_eq!(port.output().take().1, 0);
    }

    #[test]
    fn input_interrupts_and_waits_for_room() {
        let (mut port, line) = port();
        port.write(IER, &[1]);
        let before = line.count();
        let typed = [b'y'; 100];
        assert_eq!(port.input(&typed), 64);
        assert_eq!(line.count(), before + 1);
        assert_eq!(port.input(&typed[64..]), 0);
        for _ in 0..64 {
            assert!(port.room().read().is_err());
            assert_eq!(read(&mut port, LSR) & 1, 1);
            assert_eq!(read(&mut port, DATA), b'y');
        }
        assert_eq!(read(&mut port, LSR) & 1, 0);
        assert!(port.room().read().is_ok());
        assert_eq!(port.input(&typed[64..]), 36);
        for _ in 0..40 {
            read(&mut port, DATA);
        }
        assert!(port.room().read().is_err(), "nobody waits");
        assert_eq!(port.input(&[]), 0);
    }

    #[test]
    fn the_transmitter_interrupts_a_driver_that_asks() {
        let (mut port, line) = port();
        port.write(IER, &[2]);
        let before = line.count();
        assert_eq!(read(&mut port, 2) & 0x0f, 2);
        port.write(DATA, b"x");
        assert_eq!(line.count(), before + 1);
    }

    #[test]
    fn a_port_in_loopback_takes_no_input_and_asks_for_it_later() {
        let (mut port, _) = port();
        port.write(4, &[0x10]);
        assert_eq!(port.input(b"abc"), 0);
        port.write(4, &[0]);
        read(&mut port, DATA);
        assert!(port.room().read().is_ok());
        assert_eq!(port.input(b"abc"), 3);
    }

    #[test]
    fn a_reset_keeps_the_last_words() {
        let (mut port, line) = port();
        port.write(IER, &[3]);
        print(&mut port, b"bye");
        port.input(b"stale");
        port.reset();
        assert_eq!(read(&mut port, LSR), 0x60);
        let before = line.count();
        assert_eq!(port.input(b"x"), 1);
        assert_eq!(line.count(), before);
        print(&mut port, b"!");
        assert_eq!(port.output().take().0, b"bye!");
    }

    #[test]
    fn every_register_takes_every_width_and_value() {
        let (mut port, _) = port();
        for value in 0..=0xff {
            for offset in 0..SerialPort::LEN {
                for width in [1, 2, 4, 8] {
                    port.read(offset, &mut [0; 8][..width]);
                    port.write(offset, &[value; 8][..width]);
                }
                assert!(port.input(b"z") <= 1);
            }
        }
    }
}
