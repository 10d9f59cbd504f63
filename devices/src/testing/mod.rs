//! The other side of a device, for tests: a guest driver that does by the book what Linux does, and on request
//! what only an attacker would.
//!
//! ```no_run
//! # use devices::testing::{Buffer, FakeDriver};
//! # fn example(device: Box<dyn devices::virtio::device::VirtioDevice>) {
//! let mut driver = FakeDriver::new(device);
//! driver.start(u64::MAX); // everything that is offered
//! driver.send(0, &[Buffer::Readable(b"ping"), Buffer::Writable(16)]);
//! // … the device serves the queue, here or on its own thread …
//! let used = driver.wait_used(0);
//! assert_eq!(used.written(), b"pong");
//! # }
//! ```
//!
//! Everything panics when the device does what a driver need not put up with.

mod driver;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

pub use self::driver::FakeDriver;

use crate::irq::InterruptLine;

/// Size of the fake guest's memory, in bytes from address 0. It costs what is touched.
pub const MEMORY_SIZE: u64 = 64 << 20;
/// An address that is not in the fake guest's memory, nor near it.
pub const WILD_ADDRESS: u64 = 0xdead_0000_0000;
/// Descriptor flag: the chain goes on.
pub const NEXT: u16 = 1;
/// Descriptor flag: the device writes.
pub const WRITE: u16 = 2;
/// Descriptor flag: the buffer is an indirect table.
pub const INDIRECT: u16 = 4;
/// How long a test waits for a device on another thread before it fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// An interrupt line that counts. Clones share the count.
#[derive(Clone, Default)]
pub struct FakeLine {
    shared: Arc<(Mutex<u64>, Condvar)>,
}

impl FakeLine {
    /// How often the line was triggered.
    pub fn count(&self) -> u64 {
        *self.shared.0.lock()
    }

    /// Waits until the line was triggered at least `count` times in all.
    ///
    /// # Panics
    ///
    /// When that takes longer than [`PATIENCE`].
    pub fn wait_for(&self, count: u64) {
        let (triggered, changed) = &*self.shared;
        let mut triggered = triggered.lock();
        let timeout = changed.wait_while_for(&mut triggered, |triggered| *triggered < count, PATIENCE);
        assert!(!timeout.timed_out(), "interrupt {count} did not come; there were {triggered}");
    }
}

impl InterruptLine for FakeLine {
    fn trigger(&self) -> io::Result<()> {
        *self.shared.0.lock() += 1;
        self.shared.1.notify_all();
        Ok(())
    }
}

/// Reproducible noise for hostile tests (xorshift64*).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Noise from `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u16) -> u16 {
        let index = (self.bits() >> 16) % u64::from(limit);
        u16::try_from(index).expect("less than a u16")
    }

    /// One of a few.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.below(u16::try_from(choices.len()).expect("few choices")))]
    }
}

/// A buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub enum Buffer<'a> {
    /// The device reads these bytes.
    Readable(&'a [u8]),
    /// The device writes up to so many bytes.
    Writable(u32),
}

/// A chain that came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Used {
    /// Index of its first descriptor.
    pub head: u16,
    /// How many bytes the device claims to have written.
    pub len: u32,
    /// All writable buffers of the chain in one, whatever `len` says; `0xaa` where nothing was written.
    pub data: Vec<u8>,
}

impl Used {
    /// The bytes that the device claims to have written.
    ///
    /// # Panics
    ///
    /// When it claims more than there was room for.
    pub fn written(&self) -> &[u8] {
        &self.data[..self.len as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_counts_and_can_be_awaited() {
        let line = FakeLine::default();
        let other = line.clone();
        let waiter = std::thread::spawn(move || other.wait_for(2));
        line.trigger().unwrap();
        line.trigger().unwrap();
        waiter.join().unwrap();
        assert_eq!(line.count(), 2);
    }
}
