//! End to end: the real binary, real KVM, Debian's stock kernel, real disks, real clients.
//!
//! Guests need hardware virtualization: on a machine without, `scripts/with-kvm` brings an emulated one, and
//! `scripts/test` runs this target there. Without either, tests say SKIPPED; with `REQUIRE_KVM=1` they fail.

#![expect(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "the whole target is tests; what fails here is the test"
)]

#[path = "../payload/mod.rs"]
mod payload;

mod bad_input;
mod beside;
mod block_cases;
mod boot;
mod cli;
mod clients;
mod console;
mod disks;
mod filters;
mod freeze;
mod freeze_crash;
mod freeze_endurance;
mod freeze_faults;
mod guest_commands;
mod harness;
mod jobs;
mod library;
mod monitor;
mod operations;
mod pivot;
mod ports;
mod stock_qemu;
mod story;
mod suspend;
