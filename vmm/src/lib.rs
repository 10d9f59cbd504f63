//! Tarn, the VMM.

pub mod config;
pub mod event_loop;
pub mod run_state;
