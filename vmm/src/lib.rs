//! Tarn, the VMM.

pub mod cli;
pub mod config;
pub mod event_loop;
pub mod guest_channel;
pub mod monitor;
pub mod run_dir;
pub mod run_state;
pub mod socket;
pub mod terminal;
