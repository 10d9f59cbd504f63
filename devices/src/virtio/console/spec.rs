//! What ports a console device is to have.

/// The most ports a device can have.
pub const MAX_PORTS: usize = 31;
/// The longest name of a port, in bytes: it becomes a file name in the guest.
pub const MAX_NAME: usize = 255;

/// What a port is to be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PortSpec {
    /// The guest finds the port as `/dev/virtio-ports/NAME`. 1 to [`MAX_NAME`] bytes, no `/`, no control
    /// characters.
    pub name: Option<String>,
    /// The port becomes a terminal in the guest (`/dev/hvc0` and up) instead of `/dev/vportNpM`.
    pub console: bool,
}

/// Why a console device cannot be built.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// There must be 1 to [`MAX_PORTS`] ports.
    #[error("A console device has 1 to {MAX_PORTS} ports, not {count}")]
    Count {
        /// How many were asked for.
        count: usize,
    },
    /// The name is empty, too long, or not fit for a file name.
    #[error("Port name {name:?} is not 1 to {MAX_NAME} bytes without slashes and control characters")]
    Name {
        /// The name.
        name: String,
    },
    /// Two ports have the same name.
    #[error("Port name {name:?} is used twice")]
    Duplicate {
        /// The name.
        name: String,
    },
}
