//! Block nodes and block jobs, as clients of QEMU know them.
//!
//! ```text
//!   monitor ── verbs ──▶ ┌──────────────── Jobs (control loop) ──────────────────┐
//!                        │ nodes: images by name      entries: one for each job  │
//!   monitor ◀─ events ── │              ┌───────────┐                            │
//!                        │ Request ────▶│ lifecycle │── Order ──▶ dyn Disks ─────┼──▶ the disk's thread
//!                        │ Report  ────▶│  (pure)   │── Note ───▶ events         │          │
//!                        │   ▲          └───────────┘                            │          │
//!                        └───┼───────────────────────────────────────────────────┘          │
//!                            └────────────────── VmEvent ◀──────────────────────────────────┘
//! ```
//!
//! [`state`] says what may follow what, [`lifecycle`] what has to be done for it and which events tell of it, in
//! QEMU's order; [`registry`] does it, with [`mirror`], [`backup`] and [`create`] for what is special to a kind of job.
//! [`transaction`] lets several begin at one moment and end together, and [`pivot`] lets several of them change the
//! guest's disks together, as [`pivoting`] carries out. [`nodes`] are the images that clients name, [`disks`] is all that jobs know of the rest of the
//! VM.
//!
//! Only the control loop changes any of it, so a query tells what is. What a disk's thread does is ordered, and true when
//! it has reported it; a switch and the end of the VM are waited for, for a bounded time.

mod backend;
pub mod backup;
pub mod create;
pub mod disks;
mod entry;
pub mod lifecycle;
pub mod mirror;
pub mod nodes;
pub mod pivot;
pub mod pivoting;
pub mod registry;
pub mod state;
pub mod transaction;

pub use self::disks::Disks;
pub use self::registry::Jobs;

#[cfg(test)]
pub mod testing;

/// A place where a test of crashes lets the VM die or wait: between two steps that somebody else can see.
fn passes(step: &str, point: &str) {
    // That an error be made up here has no meaning.
    let _ = coordinator::failpoint::pass(["jobs", step, point]);
}
