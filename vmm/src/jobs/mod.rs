//! Block jobs, as clients of QEMU know them.
//!
//! ```text
//!   monitor ── Request ──▶ ┌───────────┐ ── Step::Order ──▶ the disk's thread
//!                          │ lifecycle │                        │
//!   monitor ◀─ Step::Note ─│   (pure)  │ ◀────── Report ────────┘
//!                          └───────────┘
//! ```
//!
//! [`state`] says what may follow what, [`lifecycle`] what has to be done for it and which events tell of it, in
//! QEMU's order; [`pivot`] lets several of them change the guest's disks together.

pub mod lifecycle;
pub mod pivot;
pub mod state;
