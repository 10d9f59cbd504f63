//! Tarn, the VMM.

pub mod config;
pub mod event_loop;
pub mod guest_channel;
pub mod monitor;
pub mod run_state;
pub mod socket;
