//! The host's side of the wire: sessions with a VM's monitor and with its guest agent, operations on its disks that
//! survive the end of whoever coordinates them, and all of it for tests in Rust.
//!
//! ```text
//!   tests       Vm ── guest() · freeze() · pivot() · recover()        launches `tarn`, or takes what runs
//!                │         │
//!   operations   │    operation: run · resume · abort · recover ───▶ journal, and what follows from it (below)
//!                │         │
//!   recipes      │    exec · copy_to_guest · copy_from_guest
//!                │         │
//!   sessions     MonitorSession            GuestSession              one connection each, blocking, every wait bounded
//!                      │                        │
//!                monitor.sock              agent.sock
//! ```
//!
//! Whoever tests a flow of their own begins with [`Vm`]; whoever moves disks in production with [`operation`], which
//! `tarn pivot` and its sisters are made of.
//!
//! Nothing but [`Vm::launch`] knows how a VM is started: the sockets are all there is. Any QMP monitor and any qemu-ga behind
//! a unix socket will do.
//!
//! What has to survive a crash lies in the VM's state directory and beside its images:
//!
//! ```text
//!   operation         the steps, in order, each written down before it has an effect
//!     │
//!   resolve           which images are the disks, when the VM is dead; carried out, once
//!     ├── journal       what was done, step by step
//!     ├── witness       what the VMM has decided             (record::witness)
//!     ├── disks         which image is which disk, and since when
//!     ├── stamp         which images are not to be booted
//!     └── device        which block device it is, whatever it is called today
//!   durable           the only place that writes such a file; failpoint lets it fail
//! ```

mod connection;
pub mod device;
pub mod disks;
mod durable;
pub mod failpoint;
mod guest;
pub mod journal;
mod monitor;
pub mod operation;
pub mod recipes;
pub mod record;
pub mod resolve;
mod run_base;
pub mod stamp;
mod state_dir;
#[cfg(test)]
mod testing;
mod vm;

pub use connection::{Peer, SessionError};
pub use durable::DurableError;
#[cfg(feature = "failpoints")]
pub use durable::lose_power;
pub use guest::GuestSession;
pub use monitor::MonitorSession;
pub use protocol::{Error, ErrorClass, Event, Map, Reply};
pub use run_base::run_base;
pub use state_dir::{StateDir, StateDirError};
pub use vm::{Executed, Frozen, Guest, Vm, VmError, VmOptions};

/// An error and its causes, as one text.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}
