//! What a freeze did, for `tarn-fsfreeze-report`.

use std::path::PathBuf;
use std::time::Duration;

use protocol::Map;
use serde_json::{Value, json};

use super::mounts::{Device, Other};
use crate::schema::{Field, Type, optional, required};

/// What FIFREEZE said of one filesystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Not tried (yet).
    Pending,
    /// The call has not come back.
    Freezing,
    Frozen,
    /// The filesystem has no freeze.
    Unsupported,
    /// It was frozen before, by somebody else.
    Busy,
    Failed(String),
}

/// What FITHAW said of one that was frozen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Thaw {
    Thawed,
    /// Somebody else had thawed it.
    NotFrozen,
    Failed(String),
}

/// Why everything was thawed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// guest-fsfreeze-thaw.
    Command,
    /// The freeze failed.
    Failure,
    /// The lease ran out.
    Lease,
    /// The agent died and did not return.
    AgentLost,
    /// The agent was asked to end.
    AgentEnds,
    /// The device to the host is gone.
    ChannelLost,
    /// The client left, or gave up, before it could hear of its freeze.
    Unheard,
}

impl Cause {
    const ALL: [Self; 7] = [
        Self::Command,
        Self::Failure,
        Self::Lease,
        Self::AgentLost,
        Self::AgentEnds,
        Self::ChannelLost,
        Self::Unheard,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Command => "command",
            Self::Failure => "failure",
            Self::Lease => "lease",
            Self::AgentLost => "agent-lost",
            Self::AgentEnds => "agent-ends",
            Self::ChannelLost => "channel-lost",
            Self::Unheard => "unheard",
        }
    }

    pub(crate) fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|cause| cause.name() == name)
    }

    /// Whether the host did not ask for it, and may believe that the guest is still frozen.
    pub(crate) fn is_behind_the_hosts_back(self) -> bool {
        !matches!(self, Self::Command | Self::Failure)
    }
}

/// One filesystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Filesystem {
    pub(crate) mountpoint: PathBuf,
    /// Its `s_dev`.
    pub(crate) identity: Device,
    pub(crate) device: Device,
    pub(crate) fstype: String,
    pub(crate) writable: bool,
    pub(crate) outcome: Outcome,
    /// How long FIFREEZE took.
    pub(crate) took: Duration,
    pub(crate) thaw: Option<Thaw>,
}

/// One run of a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HookRun {
    pub(crate) program: PathBuf,
    pub(crate) phase: &'static str,
    /// It ran at all.
    pub(crate) started: bool,
    pub(crate) error: Option<String>,
    pub(crate) took: Duration,
}

/// The last freeze, from its beginning to the thaw.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// Freezes since the agent started; 0 if there was none.
    pub(crate) number: u64,
    pub(crate) lease: Option<Duration>,
    pub(crate) filesystems: Vec<Filesystem>,
    pub(crate) others: Vec<Other>,
    /// By an agent that is gone, and nobody watched over it since.
    pub(crate) unwatched: bool,
    pub(crate) hooks: Vec<HookRun>,
    /// Present once everything is thawed.
    pub(crate) thawed_by: Option<Cause>,
    /// From the first FIFREEZE to the last FITHAW.
    pub(crate) frozen_for: Option<Duration>,
    pub(crate) error: Option<String>,
}

impl Report {
    /// Whether a filesystem was thawed while the host may have believed it frozen: then what was copied
    /// meanwhile is not consistent.
    pub(crate) fn is_void(&self) -> bool {
        let found_thawed = |filesystem: &Filesystem| filesystem.thaw == Some(Thaw::NotFrozen);
        // Of a freeze that failed nobody believes anything.
        let failed = self.thawed_by == Some(Cause::Failure);
        self.unwatched
            || (!failed && self.filesystems.iter().any(found_thawed))
            || self.thawed_by.is_some_and(Cause::is_behind_the_hosts_back)
    }

    /// The reply's members that this knows of.
    pub(crate) fn members(&self) -> Map {
        let mut members = Map::new();
        members.insert("freeze".into(), self.number.into());
        members.insert("void".into(), self.is_void().into());
        members.insert("lease-ms".into(), self.lease.map_or(0, milliseconds).into());
        if let Some(cause) = self.thawed_by {
            members.insert("thawed-by".into(), cause.name().into());
        }
        if let Some(error) = &self.error {
            members.insert("error".into(), error.as_str().into());
        }
        let filesystems: Vec<Value> = self.filesystems.iter().map(filesystem).collect();
        members.insert("filesystems".into(), filesystems.into());
        members.insert("not-frozen".into(), self.not_frozen().into());
        members.insert("hooks".into(), self.hooks.iter().map(hook).collect::<Vec<_>>().into());
        members
    }

    /// What can be written while everything is frozen.
    fn not_frozen(&self) -> Vec<Value> {
        let unsupported =
            |filesystem: &&Filesystem| filesystem.outcome == Outcome::Unsupported && filesystem.writable;
        let without_freeze = self.filesystems.iter().filter(unsupported).map(|filesystem| {
            json!({"mountpoint": filesystem.mountpoint.to_string_lossy(), "type": filesystem.fstype})
        });
        let others = self
            .others
            .iter()
            .map(|other| json!({"mountpoint": other.mountpoint.to_string_lossy(), "type": other.fstype}));
        without_freeze.chain(others).collect()
    }
}

pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn filesystem(filesystem: &Filesystem) -> Value {
    let (outcome, error) = match &filesystem.outcome {
        Outcome::Pending => ("pending", None),
        Outcome::Freezing => ("freezing", None),
        Outcome::Frozen => ("frozen", None),
        Outcome::Unsupported => ("unsupported", None),
        Outcome::Busy => ("busy", None),
        Outcome::Failed(error) => ("failed", Some(error)),
    };
    let (thaw, thaw_error) = match &filesystem.thaw {
        None => (None, None),
        Some(Thaw::Thawed) => (Some("thawed"), None),
        Some(Thaw::NotFrozen) => (Some("was-not-frozen"), None),
        Some(Thaw::Failed(error)) => (Some("failed"), Some(error)),
    };
    let (major, minor) = filesystem.device;
    let mut members = Map::new();
    members.insert("mountpoint".into(), filesystem.mountpoint.to_string_lossy().into());
    members.insert("device".into(), format!("{major}:{minor}").into());
    members.insert("type".into(), filesystem.fstype.as_str().into());
    members.insert("outcome".into(), outcome.into());
    members.insert("freeze-ms".into(), milliseconds(filesystem.took).into());
    if let Some(thaw) = thaw {
        members.insert("thaw".into(), thaw.into());
    }
    if let Some(error) = error.or(thaw_error) {
        members.insert("error".into(), error.as_str().into());
    }
    Value::Object(members)
}

fn hook(run: &HookRun) -> Value {
    let mut members = Map::new();
    members.insert("program".into(), run.program.to_string_lossy().into());
    members.insert("phase".into(), run.phase.into());
    members.insert("success".into(), run.error.is_none().into());
    members.insert("ms".into(), milliseconds(run.took).into());
    if let Some(error) = &run.error {
        members.insert("error".into(), error.as_str().into());
    }
    Value::Object(members)
}

/// The reply's type.
pub(crate) const REPORT: Type = Type::Object(FIELDS);

const FIELDS: &[Field] = &[
    required("state", Type::Enum(&["thawed", "freezing", "frozen", "thawing"])),
    required("freeze", Type::Int),
    required("void", Type::Bool),
    required("lease-ms", Type::Int),
    optional("lease-left-ms", Type::Int),
    optional("frozen-ms", Type::Int),
    optional(
        "thawed-by",
        Type::Enum(&["command", "failure", "lease", "agent-lost", "agent-ends", "channel-lost", "unheard"]),
    ),
    optional("error", Type::Str),
    required(
        "filesystems",
        Type::Array(&Type::Object(&[
            required("mountpoint", Type::Str),
            required("device", Type::Str),
            required("type", Type::Str),
            required(
                "outcome",
                Type::Enum(&["pending", "freezing", "frozen", "unsupported", "busy", "failed"]),
            ),
            required("freeze-ms", Type::Int),
            optional("thaw", Type::Enum(&["thawed", "was-not-frozen", "failed"])),
            optional("error", Type::Str),
        ])),
    ),
    required(
        "not-frozen",
        Type::Array(&Type::Object(&[required("mountpoint", Type::Str), required("type", Type::Str)])),
    ),
    required(
        "hooks",
        Type::Array(&Type::Object(&[
            required("program", Type::Str),
            required("phase", Type::Enum(&["freeze", "thaw"])),
            required("success", Type::Bool),
            required("ms", Type::Int),
            optional("error", Type::Str),
        ])),
    ),
];
