//! Tarn, the VMM: one process per VM, a control loop that owns it, a thread per vCPU and per disk.
//!
//! ```text
//!             ┌────────────────────────── control loop (main thread) ─────────────────────────┐
//!             │ event-manager: monitor · console · serial ports · agent broker · VmEvent eventfd│
//!             │ owns Controller { RunState, Machine }                                          │
//!             └──┬──────────────▲────────────────┬───────────────▲────────────────────────────┘
//!    VcpuCommand │              │ VmEvent        │ Command       │ VmEvent (I/O error)
//!    + kick      ▼              │ (never waits)  ▼ + eventfd     │
//!           ┌─────────┐  ×N     │           ┌─────────┐  ×disks  │
//!           │ vcpu-i  │─────────┘           │ blk-<id>│──────────┘
//!           └────┬────┘ MMIO/PIO            └────┬────┘ io_uring
//!                └────────▶ Bus (device locks) ──┘ doorbell = ioeventfd, completion = irqfd
//! ```
//!
//! # Invariants
//!
//! 1. Only the control loop changes `RunState`.
//! 2. vCPU and block threads never wait for the control loop; they post a `VmEvent` and park.
//! 3. The control loop holds no device lock while it waits for a vCPU or a worker.
//! 4. Every wait for another thread has a timeout and its own error variant.
//! 5. Pause = vCPUs stopped (acknowledged, half-done exit retired by re-entering with `immediate_exit`), then
//!    every disk drained and flushed, then the reply. A flush that failed fails the pause, visibly.
//!    Resume is the reverse.
//! 6. Guest memory is read once per request; nothing derived from it is trusted again.
//! 7. Every thread has exactly one owner whose `Drop` asks it to stop and joins it.
//! 8. Guest input never panics, never loops without bound, never allocates without bound.
//!
//! # Where to look
//!
//! | to learn | read |
//! |---|---|
//! | what a VM is, as data | [`config`] |
//! | how one starts, runs and ends | [`vm`] |
//! | what `stop`, `cont`, a reboot, a panic mean | [`run_state`], [`controller`] |
//! | what the guest sees | [`machine`], [`boot`], and the crate `devices` |
//! | how vCPUs run and stop | [`vcpu`] |
//! | QMP | [`monitor`] |
//! | the agent port and its clients | [`guest_channel`] |
//! | the command line | [`cli`] |

pub mod boot;
pub mod cli;
pub mod config;
pub mod controller;
pub mod event_loop;
pub mod guest_channel;
pub mod host;
pub mod jobs;
pub mod machine;
pub mod monitor;
pub mod pauses;
pub mod ports;
pub mod run_dir;
pub mod run_state;
pub mod signals;
pub mod socket;
pub mod terminal;
pub mod vcpu;
pub mod vm;
