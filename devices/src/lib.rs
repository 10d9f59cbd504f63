//! Emulated devices: what a guest of Tarn sees, without KVM.
//!
//! # The contract of a device
//!
//! ```text
//!   vCPU thread ──MMIO/PIO──▶ Bus ──▶ device (behind its lock) ──▶ Action
//!                                        │            ▲
//!                      doorbell eventfd  ▼            │ Interrupt (shared, lock-free)
//!                          worker or control loop ────┘
//! ```
//!
//! A device **may** keep state, read and write the guest memory it was activated with, pull its
//! [`irq::InterruptLine`] and return a [`bus::Action`].
//!
//! A device **must not** know the VM, KVM or the monitor, wait for the control loop, block a vCPU on
//! I/O, or trust anything the guest wrote: guest input never panics, never loops without bound, never
//! allocates without bound, and is read once into an owned value.

pub mod bus;
pub mod irq;
pub mod legacy;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod virtio;
