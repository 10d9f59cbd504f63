//! The run state of a VM, as a pure function: no I/O, every pair decided.
//!
//! ```text
//!                 cont                 stop
//!   prelaunch ──────────▶ running ◀─────────▶ paused
//!                          │  │  ╲   cont
//!           error, policy  │  │   ╲ guest shutdown, quit
//!              stop        │  │    ╲
//!                          ▼  │     ▼
//!                   io-error  │    shutdown          guest-panicked, internal-error:
//!                             └──────────────────▶   only `quit` and a reset lead out
//! ```
//!
//! ```text
//!              guest: S3             stop
//!   running ──────────────▶ suspended ◀──▶ paused (asleep)      both: guest asleep, vCPUs stopped, disks at rest
//!           ◀──────────────           cont
//!         system_wakeup, power button
//! ```
//!
//! A sleeping guest and a client that stops the VM do not know of each other: `cont` never wakes a guest, and
//! `system_wakeup` never runs one that a client has stopped (as in QEMU since 9.0). So "paused" is two states here.
//!
//! The [`crate::controller`] asks [`RunState::on`], carries out the [`Effect`], and only then publishes
//! the new state and its event: `query-status` never lies.

use serde::Serialize;

/// QEMU's names (qapi/run-state.json), the part that Tarn can be in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Built, no vCPU has run yet (or: reset while paused).
    Prelaunch,
    /// vCPUs run.
    Running,
    /// vCPUs stopped and disks drained, at a client's wish.
    Paused,
    /// vCPUs stopped because a disk failed under policy `stop`; the request is held.
    IoError,
    /// The guest sleeps (ACPI S3): vCPUs stopped and disks drained, until something wakes it.
    Suspended,
    /// The guest sleeps, and a client has stopped the VM: paused for everybody outside, and `cont` leads back to
    /// [`Self::Suspended`].
    PausedAsleep,
    /// The guest told that it panicked.
    GuestPanicked,
    /// KVM cannot run the guest any further.
    InternalError,
    /// The guest has switched itself off, or the VM is being torn down.
    Shutdown,
}

impl RunState {
    /// All of them, for tests and for the schema.
    pub const ALL: [Self; 9] = [
        Self::Prelaunch,
        Self::Running,
        Self::Paused,
        Self::IoError,
        Self::Suspended,
        Self::PausedAsleep,
        Self::GuestPanicked,
        Self::InternalError,
        Self::Shutdown,
    ];

    /// QEMU's spelling.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prelaunch => "prelaunch",
            Self::Running => "running",
            Self::Paused | Self::PausedAsleep => "paused",
            Self::IoError => "io-error",
            Self::Suspended => "suspended",
            Self::GuestPanicked => "guest-panicked",
            Self::InternalError => "internal-error",
            Self::Shutdown => "shutdown",
        }
    }

    /// Whether vCPUs run.
    pub fn is_running(self) -> bool {
        self == Self::Running
    }

    /// Whether the guest goes on as it likes, be it asleep: nobody outside has stopped it, and nothing has failed.
    pub fn is_live(self) -> bool {
        matches!(self, Self::Running | Self::Suspended)
    }
}

/// What happens to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Input {
    /// A client lets the guest run.
    Cont,
    /// A client stops the guest.
    Stop,
    /// A client, or a signal, ends the VM.
    Quit,
    /// A client resets the VM.
    Reset,
    /// A client, or the power button, wakes the guest.
    Wake,
    /// The guest falls asleep.
    GuestSuspend,
    /// The guest asks for a reset, and policy lets it.
    GuestReset,
    /// The guest switched itself off and policy ends the VM.
    GuestShutdown,
    /// The guest switched itself off, and policy keeps the VM for inspection.
    GuestShutdownKept,
    /// The guest panicked and policy keeps the VM for inspection.
    GuestPanic,
    /// KVM cannot run a vCPU any further.
    VcpuFault,
    /// A disk failed under policy `stop`.
    IoError,
}

impl Input {
    /// Whether it tells of something that has happened: it cannot be refused by failing to follow it.
    pub fn is_fact(self) -> bool {
        match self {
            Self::Cont | Self::Stop | Self::Reset | Self::Wake => false,
            Self::Quit
            | Self::GuestSuspend
            | Self::GuestReset
            | Self::GuestShutdown
            | Self::GuestShutdownKept
            | Self::GuestPanic
            | Self::VcpuFault
            | Self::IoError => true,
        }
    }

    /// All of them, for tests.
    pub const ALL: [Self; 12] = [
        Self::Cont,
        Self::Stop,
        Self::Quit,
        Self::Reset,
        Self::Wake,
        Self::GuestSuspend,
        Self::GuestReset,
        Self::GuestShutdown,
        Self::GuestShutdownKept,
        Self::GuestPanic,
        Self::VcpuFault,
        Self::IoError,
    ];
}

/// What has to be done before the new state may be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Nothing.
    Nothing,
    /// Stop vCPUs, drain and flush disks.
    Pause,
    /// Stop vCPUs; disks hold what failed.
    Halt,
    /// Resume disks, then vCPUs.
    Resume,
    /// Build the machine anew from the same configuration; run it if the new state says so.
    Reset,
    /// Build the machine anew around the memory of the sleeping one, and run it.
    Wake,
    /// End the VM.
    Teardown,
}

/// An input that the state does not admit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[error("A VM in state {} does not take {input:?}", state.name())]
pub struct Denied {
    /// The state.
    pub state: RunState,
    /// The input.
    pub input: Input,
}

impl RunState {
    /// Where `input` leads, and what it takes.
    ///
    /// # Errors
    ///
    /// [`Denied`]: a client gets an error; a guest event that can only be a leftover is dropped.
    pub fn on(self, input: Input) -> Result<(Self, Effect), Denied> {
        use Effect::{Halt, Nothing, Pause, Reset, Resume, Teardown, Wake};
        use RunState::{
            GuestPanicked, InternalError, IoError, Paused, PausedAsleep, Prelaunch, Running, Shutdown,
            Suspended,
        };
        let next = match (self, input) {
            (_, Input::Quit) => (Shutdown, Teardown),

            (Running, Input::Cont) => (Running, Nothing),
            (Prelaunch | Paused | IoError, Input::Cont) => (Running, Resume),
            (Suspended | PausedAsleep, Input::Cont) => (Suspended, Nothing),
            (GuestPanicked | InternalError | Shutdown, Input::Cont) => return self.deny(input),

            // Repeats drain and flush again, as in QEMU: the reply always means "quiet on disk". In io-error, too: the
            // other disks are not at rest yet, and the one that failed holds its request through it.
            (Running | Paused | IoError, Input::Stop) => (Paused, Pause),
            (Suspended | PausedAsleep, Input::Stop) => (PausedAsleep, Pause),
            (Prelaunch | GuestPanicked | InternalError | Shutdown, Input::Stop) => return self.deny(input),

            (Running | Suspended, Input::Reset) => (Running, Reset),
            (
                Prelaunch | Paused | IoError | PausedAsleep | GuestPanicked | InternalError | Shutdown,
                Input::Reset,
            ) => (Prelaunch, Reset),

            (Suspended, Input::Wake) => (Running, Wake),
            (
                Prelaunch | Running | Paused | IoError | PausedAsleep | GuestPanicked | InternalError
                | Shutdown,
                Input::Wake,
            ) => return self.deny(input),

            // Events of the guest. One that arrives during a pause is applied, not dropped; before the first
            // instruction and after the last there are none. A sleeping guest's come from vCPUs that had not stopped
            // yet when another put the machine to sleep.
            (Running, Input::GuestSuspend) => (Suspended, Pause),
            (Paused, Input::GuestSuspend) => (PausedAsleep, Nothing),
            (IoError, Input::GuestSuspend) => (PausedAsleep, Pause),
            (Suspended | PausedAsleep, Input::GuestSuspend) => return self.deny(input),
            (Running | Paused | IoError | Suspended | PausedAsleep, Input::GuestShutdown) => {
                (Shutdown, Teardown)
            }
            (Running | IoError, Input::GuestShutdownKept) => (Shutdown, Pause),
            (Paused | Suspended | PausedAsleep, Input::GuestShutdownKept) => (Shutdown, Nothing),
            (Running | Suspended, Input::GuestReset) => (Running, Reset),
            (Paused | IoError | PausedAsleep, Input::GuestReset) => (Prelaunch, Reset),
            (Running | IoError, Input::GuestPanic) => (GuestPanicked, Pause),
            (Paused | Suspended | PausedAsleep, Input::GuestPanic) => (GuestPanicked, Nothing),
            (Running | IoError, Input::VcpuFault) => (InternalError, Pause),
            (Paused | Suspended | PausedAsleep, Input::VcpuFault) => (InternalError, Nothing),
            (Running, Input::IoError) => (IoError, Halt),
            (Paused | IoError, Input::IoError) => (IoError, Nothing),
            // Waking resets the disk, and with it the request that failed: there is nothing to try again.
            (Suspended | PausedAsleep, Input::IoError) => (self, Nothing),
            (
                Prelaunch | GuestPanicked | InternalError | Shutdown,
                Input::GuestSuspend
                | Input::GuestShutdown
                | Input::GuestReset
                | Input::GuestShutdownKept
                | Input::GuestPanic
                | Input::VcpuFault
                | Input::IoError,
            ) => return self.deny(input),
        };
        Ok(next)
    }

    fn deny(self, input: Input) -> Result<(Self, Effect), Denied> {
        Err(Denied { state: self, input })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The whole table, a row per state, in the order of [`Input::ALL`]; `-` is denied.
    #[rustfmt::skip]
    const TABLE: [(RunState, [&str; 12]); 9] = [
        (
            RunState::Prelaunch,
            [
                "running Resume", "-", "shutdown Teardown", "prelaunch Reset", "-", "-",
                "-", "-", "-", "-", "-", "-",
            ],
        ),
        (
            RunState::Running,
            [
                "running Nothing", "paused Pause", "shutdown Teardown", "running Reset", "-", "suspended Pause",
                "running Reset", "shutdown Teardown", "shutdown Pause",
                "guest-panicked Pause", "internal-error Pause", "io-error Halt",
            ],
        ),
        (
            RunState::Paused,
            [
                "running Resume", "paused Pause", "shutdown Teardown", "prelaunch Reset", "-", "paused, asleep Nothing",
                "prelaunch Reset", "shutdown Teardown", "shutdown Nothing",
                "guest-panicked Nothing", "internal-error Nothing", "io-error Nothing",
            ],
        ),
        (
            RunState::IoError,
            [
                "running Resume", "paused Pause", "shutdown Teardown", "prelaunch Reset", "-", "paused, asleep Pause",
                "prelaunch Reset", "shutdown Teardown", "shutdown Pause",
                "guest-panicked Pause", "internal-error Pause", "io-error Nothing",
            ],
        ),
        (
            RunState::Suspended,
            [
                "suspended Nothing", "paused, asleep Pause", "shutdown Teardown", "running Reset", "running Wake", "-",
                "running Reset", "shutdown Teardown", "shutdown Nothing",
                "guest-panicked Nothing", "internal-error Nothing", "suspended Nothing",
            ],
        ),
        (
            RunState::PausedAsleep,
            [
                "suspended Nothing", "paused, asleep Pause", "shutdown Teardown", "prelaunch Reset", "-", "-",
                "prelaunch Reset", "shutdown Teardown", "shutdown Nothing",
                "guest-panicked Nothing", "internal-error Nothing", "paused, asleep Nothing",
            ],
        ),
        (
            RunState::GuestPanicked,
            ["-", "-", "shutdown Teardown", "prelaunch Reset", "-", "-", "-", "-", "-", "-", "-", "-"],
        ),
        (
            RunState::InternalError,
            ["-", "-", "shutdown Teardown", "prelaunch Reset", "-", "-", "-", "-", "-", "-", "-", "-"],
        ),
        (
            RunState::Shutdown,
            ["-", "-", "shutdown Teardown", "prelaunch Reset", "-", "-", "-", "-", "-", "-", "-", "-"],
        ),
    ];

    #[test]
    fn every_pair_of_state_and_input_is_decided_as_the_table_says() {
        assert_eq!(TABLE.map(|(state, _)| state), RunState::ALL);
        for (state, row) in TABLE {
            for (input, expected) in Input::ALL.into_iter().zip(row) {
                let got = match state.on(input) {
                    Ok((RunState::PausedAsleep, effect)) => format!("paused, asleep {effect:?}"),
                    Ok((next, effect)) => format!("{} {effect:?}", next.name()),
                    Err(denied) => {
                        assert_eq!(denied, Denied { state, input });
                        "-".to_owned()
                    }
                };
                assert_eq!(got, expected, "{state:?} on {input:?}");
            }
        }
    }

    #[test]
    fn a_running_vm_always_has_a_way_to_stop_and_every_state_can_be_left_by_quit() {
        for state in RunState::ALL {
            assert_eq!(state.on(Input::Quit), Ok((RunState::Shutdown, Effect::Teardown)));
        }
    }
}
