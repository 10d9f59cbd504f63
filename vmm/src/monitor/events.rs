//! Asynchronous messages: what happened, for every client that has negotiated.
//!
//! A client gets an event at most once and in order; one that connects later does not get it at all and
//! asks with a `query-` command instead. Events that a guest can provoke at will are throttled: the first
//! goes out at once, then the last of each second (QEMU `monitor/monitor.c`).

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use protocol::Map;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::jobs::lifecycle::{Action, JobKind};
use crate::jobs::pivot::PivotState;
use crate::jobs::state::JobStatus;

use super::schema::{EMPTY, Member, Object, Type, optional, required};

/// Something that happened to the VM (QEMU's names and data).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The vCPUs have stopped. Disks may still be draining.
    Stop,
    /// The vCPUs run again.
    Resume,
    /// The guest was asked to power off.
    Powerdown,
    /// The guest went into suspend-to-RAM.
    Suspend,
    /// The guest woke from suspend-to-RAM.
    Wakeup,
    /// The guest has suspended to disk; the end of the VM follows.
    SuspendDisk,
    /// The VM is being reset.
    Reset(ShutdownCause),
    /// The VM is shutting down.
    Shutdown(ShutdownCause),
    /// The guest opened or closed a virtio-serial port.
    VserportChange {
        /// Identifies the port, by the label that `query-chardev` shows.
        id: String,
        /// Whether it is open now.
        open: bool,
    },
    /// The guest told that its kernel panicked.
    GuestPanicked(PanicAction),
    /// A disk operation of the guest failed on the host.
    BlockIoError {
        /// Name of the disk.
        device: String,
        /// Its block node.
        node_name: String,
        /// True for writes, flushes and discards, false for reads.
        write: bool,
        /// What the policy did about it.
        action: IoErrorAction,
        /// Whether the host is out of space.
        nospace: bool,
        /// The error in words.
        reason: String,
    },
    /// A job has changed its state.
    JobStatusChange {
        /// The job.
        id: String,
        /// What it is now.
        status: JobStatus,
    },
    /// A job has reached its goal and keeps it up.
    BlockJobReady(BlockJobFacts),
    /// A job has ended, well if there is no error.
    BlockJobCompleted {
        /// The job.
        facts: BlockJobFacts,
        /// Why it failed.
        error: Option<String>,
    },
    /// A job was ended early.
    BlockJobCancelled(BlockJobFacts),
    /// A job has met an error.
    BlockJobError {
        /// The job.
        device: String,
        /// A read, or a write.
        is_read: bool,
        /// What was done about it.
        action: Action,
    },
    /// A job waits for `job-finalize`.
    BlockJobPending {
        /// Its kind.
        kind: &'static str,
        /// The job.
        id: String,
    },
    /// A pivot has begun, or come to where it is decided, or to an end.
    Pivot {
        /// The operation.
        id: Uuid,
        /// Its generation.
        generation: u64,
        /// Where it is.
        state: PivotState,
    },
}

/// What events tell of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockJobFacts {
    /// Its kind (QEMU's `JobType`).
    pub kind: &'static str,
    /// The job.
    pub device: String,
    /// Bytes in all, as far as is known.
    pub len: u64,
    /// Bytes done.
    pub offset: u64,
    /// Bytes per second; 0 is no limit.
    pub speed: u64,
}

impl BlockJobFacts {
    fn data(&self) -> Value {
        let Self { kind, device, len, offset, speed } = self;
        json!({"type": kind, "device": device, "len": len, "offset": offset, "speed": speed})
    }
}

/// Who wanted a reset or a shutdown (QEMU `ShutdownCause`, the part that occurs here).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownCause {
    /// The VMM failed.
    HostError,
    /// `quit`.
    HostQuit,
    /// `system_reset`.
    HostReset,
    /// A signal, such as SIGTERM.
    HostSignal,
    /// The guest powered off.
    GuestShutdown,
    /// The guest rebooted.
    GuestReset,
    /// The guest panicked.
    GuestPanic,
}

impl ShutdownCause {
    const ALL: [Self; 7] = [
        Self::HostError,
        Self::HostQuit,
        Self::HostReset,
        Self::HostSignal,
        Self::GuestShutdown,
        Self::GuestReset,
        Self::GuestPanic,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::HostError => "host-error",
            Self::HostQuit => "host-qmp-quit",
            Self::HostReset => "host-qmp-system-reset",
            Self::HostSignal => "host-signal",
            Self::GuestShutdown => "guest-shutdown",
            Self::GuestReset => "guest-reset",
            Self::GuestPanic => "guest-panic",
        }
    }

    fn by_guest(self) -> bool {
        matches!(self, Self::GuestShutdown | Self::GuestReset | Self::GuestPanic)
    }

    fn data(self) -> Value {
        json!({"guest": self.by_guest(), "reason": self.name()})
    }
}

/// What becomes of the VM after a guest panic (QEMU `GuestPanicAction`, the part that occurs here).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PanicAction {
    /// It stays, stopped.
    Pause,
    /// It ends.
    Poweroff,
    /// It starts again.
    Run,
}

/// What the error policy of a disk did (QEMU `BlockErrorAction`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoErrorAction {
    /// Nothing: the guest does not know.
    Ignore,
    /// The guest sees the error.
    Report,
    /// The VM stopped.
    Stop,
}

/// The name and the data of every event, for `query-qmp-schema`.
pub static EVENTS: &[(&str, &Object)] = &[
    ("STOP", &EMPTY),
    ("RESUME", &EMPTY),
    ("POWERDOWN", &EMPTY),
    ("SUSPEND", &EMPTY),
    ("WAKEUP", &EMPTY),
    ("SUSPEND_DISK", &EMPTY),
    ("RESET", &SHUTDOWN),
    ("SHUTDOWN", &SHUTDOWN),
    ("VSERPORT_CHANGE", &VSERPORT_CHANGE),
    ("GUEST_PANICKED", &GUEST_PANICKED),
    ("BLOCK_IO_ERROR", &BLOCK_IO_ERROR),
    ("JOB_STATUS_CHANGE", &JOB_STATUS_CHANGE),
    ("BLOCK_JOB_READY", &BLOCK_JOB),
    ("BLOCK_JOB_COMPLETED", &BLOCK_JOB_COMPLETED),
    ("BLOCK_JOB_CANCELLED", &BLOCK_JOB),
    ("BLOCK_JOB_ERROR", &BLOCK_JOB_ERROR),
    ("BLOCK_JOB_PENDING", &BLOCK_JOB_PENDING),
    ("TARN_PIVOT", &TARN_PIVOT),
];
/// The states of a job (QEMU's `JobStatus`).
pub(super) const JOB_STATUSES: &[&str] = &{
    let mut names = [""; JobStatus::ALL.len()];
    let mut index = 0;
    while index < names.len() {
        names[index] = JobStatus::ALL[index].name();
        index += 1;
    }
    names
};
/// The kinds of a job (QEMU's `JobType`).
pub(super) const JOB_TYPES: &[&str] =
    &[JobKind::Mirror.name(), JobKind::Backup.name(), JobKind::Create.name()];
static JOB_STATUS_CHANGE: Object =
    Object::new(&[required("id", Type::Str), required("status", Type::Enum(JOB_STATUSES))]);
static BLOCK_JOB: Object = Object::new(&[JOB_TYPE, JOB_DEVICE, JOB_LEN, JOB_OFFSET, JOB_SPEED]);
static BLOCK_JOB_COMPLETED: Object =
    Object::new(&[JOB_TYPE, JOB_DEVICE, JOB_LEN, JOB_OFFSET, JOB_SPEED, optional("error", Type::Str)]);
const JOB_TYPE: Member = required("type", Type::Enum(JOB_TYPES));
const JOB_DEVICE: Member = required("device", Type::Str);
const JOB_LEN: Member = required("len", Type::Int);
const JOB_OFFSET: Member = required("offset", Type::Int);
const JOB_SPEED: Member = required("speed", Type::Int);
static BLOCK_JOB_ERROR: Object = Object::new(&[
    required("device", Type::Str),
    required("operation", Type::Enum(&["read", "write"])),
    required("action", Type::Enum(&["ignore", "report", "stop"])),
]);
static BLOCK_JOB_PENDING: Object =
    Object::new(&[required("type", Type::Enum(JOB_TYPES)), required("id", Type::Str)]);
static TARN_PIVOT: Object = Object::new(&[
    required("op", Type::Str),
    required("gen", Type::Int),
    required("state", Type::Enum(PIVOT_STATES)),
]);
/// Where a pivot can be ([`PivotState`]).
pub(super) const PIVOT_STATES: &[&str] = &{
    let mut names = [""; PivotState::ALL.len()];
    let mut index = 0;
    while index < names.len() {
        names[index] = PivotState::ALL[index].name();
        index += 1;
    }
    names
};
static SHUTDOWN: Object =
    Object::new(&[required("guest", Type::Bool), required("reason", Type::Enum(SHUTDOWN_CAUSES))]);
const SHUTDOWN_CAUSES: &[&str] = &{
    let mut names = [""; ShutdownCause::ALL.len()];
    let mut index = 0;
    while index < names.len() {
        names[index] = ShutdownCause::ALL[index].name();
        index += 1;
    }
    names
};
static VSERPORT_CHANGE: Object = Object::new(&[required("id", Type::Str), required("open", Type::Bool)]);
static GUEST_PANICKED: Object = Object::new(&[required("action", Type::Enum(&["pause", "poweroff", "run"]))]);
static BLOCK_IO_ERROR: Object = Object::new(&[
    required("qom-path", Type::Str),
    required("device", Type::Str),
    optional("node-name", Type::Str),
    required("operation", Type::Enum(&["read", "write"])),
    required("action", Type::Enum(&["ignore", "report", "stop"])),
    optional("nospace", Type::Bool),
    required("reason", Type::Str),
]);

impl Event {
    /// Its name on the wire.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Stop => "STOP",
            Self::Resume => "RESUME",
            Self::Powerdown => "POWERDOWN",
            Self::Suspend => "SUSPEND",
            Self::Wakeup => "WAKEUP",
            Self::SuspendDisk => "SUSPEND_DISK",
            Self::Reset(_) => "RESET",
            Self::Shutdown(_) => "SHUTDOWN",
            Self::VserportChange { .. } => "VSERPORT_CHANGE",
            Self::GuestPanicked(_) => "GUEST_PANICKED",
            Self::BlockIoError { .. } => "BLOCK_IO_ERROR",
            Self::JobStatusChange { .. } => "JOB_STATUS_CHANGE",
            Self::BlockJobReady(_) => "BLOCK_JOB_READY",
            Self::BlockJobCompleted { .. } => "BLOCK_JOB_COMPLETED",
            Self::BlockJobCancelled(_) => "BLOCK_JOB_CANCELLED",
            Self::BlockJobError { .. } => "BLOCK_JOB_ERROR",
            Self::BlockJobPending { .. } => "BLOCK_JOB_PENDING",
            Self::Pivot { .. } => "TARN_PIVOT",
        }
    }

    /// Its data, where it has any.
    fn data(&self) -> Option<Value> {
        match self {
            Self::Stop
            | Self::Resume
            | Self::Powerdown
            | Self::Suspend
            | Self::Wakeup
            | Self::SuspendDisk => None,
            Self::Reset(cause) | Self::Shutdown(cause) => Some(cause.data()),
            Self::VserportChange { id, open } => Some(json!({"id": id, "open": open})),
            Self::GuestPanicked(action) => Some(json!({"action": match action {
                PanicAction::Pause => "pause",
                PanicAction::Poweroff => "poweroff",
                PanicAction::Run => "run",
            }})),
            Self::BlockIoError { device, node_name, write, action, nospace, reason } => Some(json!({
                "qom-path": format!("/machine/peripheral/{device}"),
                "device": device,
                "node-name": node_name,
                "operation": if *write { "write" } else { "read" },
                "action": match action {
                    IoErrorAction::Ignore => "ignore",
                    IoErrorAction::Report => "report",
                    IoErrorAction::Stop => "stop",
                },
                "nospace": nospace,
                "reason": reason,
            })),
            Self::JobStatusChange { id, status } => Some(json!({"id": id, "status": status.name()})),
            Self::BlockJobReady(facts) | Self::BlockJobCancelled(facts) => Some(facts.data()),
            Self::BlockJobCompleted { facts, error } => {
                let mut data = facts.data();
                if let Some(error) = error {
                    data["error"] = error.as_str().into();
                }
                Some(data)
            }
            Self::BlockJobError { device, is_read, action } => Some(json!({
                "device": device,
                "operation": if *is_read { "read" } else { "write" },
                "action": match action {
                    Action::Ignore => "ignore",
                    Action::Report => "report",
                    Action::Stop => "stop",
                },
            })),
            Self::BlockJobPending { kind, id } => Some(json!({"type": kind, "id": id})),
            Self::Pivot { id, generation, state } => {
                Some(json!({"op": id.to_string(), "gen": generation, "state": state.name()}))
            }
        }
    }

    /// What it is throttled by; `None` if it always goes out. A stop is never held back: it is
    /// something to act on.
    fn throttle_key(&self) -> Option<(&'static str, &str)> {
        match self {
            Self::VserportChange { id, .. } => Some((self.name(), id)),
            Self::BlockIoError { action: IoErrorAction::Stop, .. } => None,
            Self::BlockIoError { device, .. } => Some((self.name(), device)),
            _ => None,
        }
    }

    /// The message, stamped with this time.
    pub fn message(&self, time: SystemTime) -> Map {
        // Before 1970 the clock is wrong anyway; clients take negative numbers badly.
        let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut message = Map::new();
        message.insert("event".into(), self.name().into());
        if let Some(data) = self.data() {
            message.insert("data".into(), data);
        }
        let timestamp =
            json!({"seconds": since_epoch.as_secs(), "microseconds": since_epoch.subsec_micros()});
        message.insert("timestamp".into(), timestamp);
        message
    }
}

/// Shortest time between two throttled events of one kind about one thing.
const INTERVAL: Duration = Duration::from_secs(1);

/// A line of output, and whether a client that does not keep up can do without it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventLine {
    /// The encoded message, line end included.
    pub bytes: Vec<u8>,
    /// A later event of the kind will tell as much.
    pub expendable: bool,
}

/// Holds back what comes too fast.
#[derive(Debug, Default)]
pub struct Throttle {
    held: BTreeMap<(&'static str, String), Held>,
}

#[derive(Debug)]
struct Held {
    /// Nothing of the kind before this moment.
    until: Instant,
    /// The last one that came meanwhile.
    last: Option<EventLine>,
}

impl Throttle {
    /// Gives back what is to be sent now.
    pub fn admit(&mut self, event: &Event, now: Instant) -> Option<EventLine> {
        let message = event.message(SystemTime::now());
        let key = event.throttle_key();
        let bytes = (protocol::encode(&message) + "\r\n").into_bytes();
        let line = EventLine { bytes, expendable: key.is_some() };
        let Some((name, subject)) = key else { return Some(line) };
        match self.held.get_mut(&(name, subject.to_owned())) {
            Some(held) if now < held.until => {
                held.last = Some(line);
                None
            }
            _ => {
                self.held.insert((name, subject.to_owned()), Held { until: now + INTERVAL, last: None });
                Some(line)
            }
        }
    }

    /// What has been held back long enough.
    pub fn due(&mut self, now: Instant) -> Vec<EventLine> {
        let mut due = Vec::new();
        self.held.retain(|_, held| {
            if now < held.until {
                return true;
            }
            held.until = now + INTERVAL;
            let last = held.last.take();
            let keep = last.is_some();
            due.extend(last);
            keep
        });
        due
    }

    /// When something held back is due.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.held.values().filter(|held| held.last.is_some()).map(|held| held.until).min()
    }
}

#[cfg(test)]
mod tests {
    use super::super::schema::conforms;
    use super::*;

    fn one_of_each() -> Vec<Event> {
        let mut events = vec![Event::Stop, Event::Resume, Event::Powerdown];
        events.extend([Event::Suspend, Event::Wakeup, Event::SuspendDisk]);
        for cause in ShutdownCause::ALL {
            events.extend([Event::Reset(cause), Event::Shutdown(cause)]);
        }
        events.push(Event::VserportChange { id: "agent".into(), open: true });
        for action in [PanicAction::Pause, PanicAction::Poweroff, PanicAction::Run] {
            events.push(Event::GuestPanicked(action));
        }
        for action in [IoErrorAction::Ignore, IoErrorAction::Report, IoErrorAction::Stop] {
            events.push(io_error("disk0", action));
        }
        events.extend(JobStatus::ALL.map(|status| Event::JobStatusChange { id: "m0".into(), status }));
        let facts = || BlockJobFacts { kind: "mirror", device: "m0".into(), len: 2, offset: 1, speed: 0 };
        events.extend([Event::BlockJobReady(facts()), Event::BlockJobCancelled(facts())]);
        for error in [None, Some("Input/output error".to_owned())] {
            events.push(Event::BlockJobCompleted { facts: facts(), error });
        }
        for action in [Action::Ignore, Action::Report, Action::Stop] {
            events.push(Event::BlockJobError { device: "m0".into(), is_read: false, action });
        }
        events.push(Event::BlockJobPending { kind: "mirror", id: "m0".into() });
        events.extend(PivotState::ALL.map(|state| Event::Pivot { id: Uuid::nil(), generation: 3, state }));
        events
    }

    fn io_error(device: &str, action: IoErrorAction) -> Event {
        Event::BlockIoError {
            device: device.into(),
            node_name: device.into(),
            write: true,
            action,
            nospace: false,
            reason: "Input/output error".into(),
        }
    }

    #[test]
    fn every_event_is_what_the_schema_says_it_is() {
        for event in one_of_each() {
            let (_, object) = EVENTS.iter().find(|(name, _)| *name == event.name()).unwrap();
            match event.data() {
                None => assert!(object.members.is_empty()),
                Some(data) => conforms(&data, &Type::Object(object)).unwrap(),
            }
        }
        for (name, _) in EVENTS {
            assert!(one_of_each().iter().any(|event| event.name() == *name), "{name}");
        }
    }

    #[test]
    fn a_message_carries_the_time_and_data_only_where_there_is_some() {
        let time = UNIX_EPOCH + Duration::from_micros(1_795_156_567_212_191);
        let timestamp = json!({"seconds": 1_795_156_567, "microseconds": 212_191});
        let message = Value::Object(Event::Stop.message(time));
        assert_eq!(message, json!({"event": "STOP", "timestamp": timestamp}));
        let message = Value::Object(Event::Shutdown(ShutdownCause::HostQuit).message(time));
        assert_eq!(message["data"], json!({"guest": false, "reason": "host-qmp-quit"}));
    }

    #[test]
    fn a_clock_before_the_epoch_never_gives_negative_numbers() {
        let message = Value::Object(Event::Stop.message(UNIX_EPOCH - Duration::from_secs(9)));
        assert_eq!(message["timestamp"], json!({"seconds": 0, "microseconds": 0}));
    }

    #[test]
    fn a_flood_becomes_the_first_and_then_the_last_of_each_second() {
        let mut throttle = Throttle::default();
        let start = Instant::now();
        let port = |open| Event::VserportChange { id: "agent".into(), open };
        assert!(throttle.admit(&port(true), start).is_some());
        for _ in 0..1000 {
            assert_eq!(throttle.admit(&port(true), start), None);
            assert_eq!(throttle.admit(&port(false), start), None);
        }
        assert_eq!(throttle.next_deadline(), Some(start + INTERVAL));
        assert_eq!(throttle.due(start), []);
        let late = throttle.due(start + INTERVAL);
        assert_eq!(late.len(), 1);
        assert!(String::from_utf8_lossy(&late[0].bytes).contains(r#""open": false"#));
        assert_eq!(throttle.admit(&port(true), start + INTERVAL), None);
        assert_eq!(throttle.due(start + 2 * INTERVAL).len(), 1);
        assert_eq!(throttle.due(start + 3 * INTERVAL).len(), 0);
        assert_eq!(throttle.next_deadline(), None);
        assert!(throttle.held.is_empty());
    }

    #[test]
    fn things_are_throttled_each_by_itself_and_stops_never() {
        let mut throttle = Throttle::default();
        let now = Instant::now();
        assert!(throttle.admit(&io_error("disk0", IoErrorAction::Report), now).is_some());
        assert!(throttle.admit(&io_error("disk1", IoErrorAction::Report), now).is_some());
        assert!(throttle.admit(&io_error("disk0", IoErrorAction::Report), now).is_none());
        assert!(throttle.admit(&io_error("disk0", IoErrorAction::Stop), now).is_some());
        assert!(throttle.admit(&Event::Stop, now).is_some());
        assert!(throttle.admit(&Event::Stop, now).is_some());
    }
}
