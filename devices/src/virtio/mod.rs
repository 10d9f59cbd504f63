//! Virtio: one transport (virtio-mmio version 2), and the devices behind it.
//!
//! ```text
//!   guest driver ──registers──▶ mmio::MmioTransport ──activate/reset──▶ dyn VirtioDevice
//!        │                          (status, features, queue set-up)          │ queues
//!        └──doorbell (ioeventfd)──────────────────────────────────▶ worker / control loop
//!   guest interrupt ◀──irqfd── device::Interrupt ◀── used buffers, config change, NEEDS_RESET
//! ```

pub mod blk;
pub mod console;
pub mod device;
pub mod mmio;
pub mod queue;
pub mod rng;
