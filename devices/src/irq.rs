//! The one tempting arrow, inverted: devices pull a line and do not know who listens.

use std::io;

/// An interrupt line into the guest. The VMM implements it with a KVM irqfd.
pub trait InterruptLine: Send + Sync {
    /// Raises one edge on the line. Must not block.
    ///
    /// # Errors
    ///
    /// Whatever the host says; the caller logs it and goes on, the guest will poll or hang alone.
    fn trigger(&self) -> io::Result<()>;
}
