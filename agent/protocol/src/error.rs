//! Errors as the wire carries them.

use serde::ser::SerializeStruct;
use serde::{Deserialize, Serialize, Serializer};

use crate::ParseError;

/// The closed set of error classes (QEMU `qapi/error.json`, `QapiErrorClass`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorClass {
    /// Everything that needs no class of its own.
    GenericError,
    /// The command does not exist, or is disabled.
    CommandNotFound,
    /// The device does not do what the command is about.
    DeviceNotActive,
    /// There is no such device, or job.
    DeviceNotFound,
    /// KVM lacks a needed capability.
    KVMMissingCap,
}

/// An error reply: a class for programs, a description for people.
///
/// Built by the constructors below so that the texts, which clients do match, exist once.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct Error {
    /// What clients branch on.
    pub class: ErrorClass,
    /// What people read.
    pub desc: String,
}

impl Error {
    /// A [`ErrorClass::GenericError`] with this description.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::GenericError, desc: desc.into() }
    }

    /// No such command.
    pub fn command_not_found(name: &str) -> Self {
        Self::absent(format!("The command {name} has not been found"))
    }

    /// The command exists and is switched off. The agent says why, the monitor does not.
    pub fn command_disabled(name: &str, reason: Option<&str>) -> Self {
        Self::absent(match reason {
            None => format!("Command {name} has been disabled"),
            Some(reason) => format!("Command {name} has been disabled: {reason}"),
        })
    }

    /// Any command but `qmp_capabilities` before the negotiation.
    pub fn expecting_negotiation() -> Self {
        Self::absent("Expecting capabilities negotiation with 'qmp_capabilities'".into())
    }

    /// A second `qmp_capabilities`.
    pub fn already_negotiated() -> Self {
        Self::absent("Capabilities negotiation is already complete, command ignored".into())
    }

    /// `exec-oob` of a command that does not allow it.
    pub fn no_oob(name: &str) -> Self {
        Self::generic(format!("The command {name} does not support OOB"))
    }

    /// A required argument is absent.
    pub fn missing_parameter(name: &str) -> Self {
        Self::generic(format!("Parameter '{name}' is missing"))
    }

    /// An argument nobody asked for.
    pub fn unexpected_parameter(name: &str) -> Self {
        Self::generic(format!("Parameter '{name}' is unexpected"))
    }

    /// `expected` is `integer`, `string`, `boolean`, `array`, `object`, `number` or the name of an
    /// alternate type.
    pub fn invalid_parameter_type(name: &str, expected: &str) -> Self {
        Self::generic(format!("Invalid parameter type for '{name}', expected: {expected}"))
    }

    /// A string that is none of an enumeration's values.
    pub fn invalid_enum_value(name: &str, value: &str) -> Self {
        Self::generic(format!("Parameter '{name}' does not accept value '{value}'"))
    }

    /// A value outside the range that `expects` describes, as in "a non-negative value".
    pub fn invalid_parameter_value(name: &str, expects: &str) -> Self {
        Self::generic(format!("Parameter '{name}' expects {expects}"))
    }

    /// No device or block node of that name.
    pub fn device_not_found(name: &str) -> Self {
        Self { class: ErrorClass::DeviceNotFound, desc: format!("Device '{name}' not found") }
    }

    /// The device exists and is not in the needed state.
    pub fn device_not_active(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::DeviceNotActive, desc: desc.into() }
    }

    /// The operation needs something that this machine does not have.
    pub fn unsupported() -> Self {
        Self::generic("this feature or command is not currently supported")
    }

    fn absent(desc: String) -> Self {
        Self { class: ErrorClass::CommandNotFound, desc }
    }
}

impl From<ParseError> for Error {
    fn from(error: ParseError) -> Self {
        Self::generic(error.to_string())
    }
}

impl Serialize for Error {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_struct("Error", 2)?;
        object.serialize_field("class", &self.class)?;
        object.serialize_field("desc", &self.desc)?;
        object.end()
    }
}
