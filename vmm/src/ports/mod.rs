//! Host ends of the guest's ports that are neither the agent's nor the monitor's: the console with any number of
//! listeners, and channels with one client each.
//!
//! ```text
//!   guest ──hvc0 / COM1──▶ ConsoleHost ──▶ terminal (foreground), console.sock clients, scrollback
//!         ◀───────────────             ◀── typed bytes of all of them
//!   guest ──/dev/virtio-ports/NAME──▶ ChannelHost ──▶ its one client (read only when the client keeps up)
//!         ◀──────────────────────────             ◀──
//! ```
//!
//! A console never holds the guest up: Linux' hvc driver spins until its output is taken, so whoever reads slowly
//! loses the middle and is told so. A channel never loses a byte: a client that does not read leaves the buffers with
//! the guest.

pub mod channel;
pub mod console;
pub mod terminal_io;

pub use channel::ChannelHost;
pub use console::ConsoleHost;
pub use terminal_io::TerminalIo;

/// Bytes moved between a port and its host end at a time.
pub const CHUNK: usize = 64 << 10;
