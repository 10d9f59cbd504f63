//! `blockdev-mirror` and `drive-mirror`.

use block::OnError;
use protocol::{Args, Error};
use serde_json::Value;

use super::super::fds::FdSets;
use super::super::schema::{EMPTY, Member, Object, Type, optional, required};
use super::super::vm::BlockLayer;
use super::jobs::COPY_MODE_TABLE;
use super::nodes::source;
use super::{Call, Command, nothing};
use crate::jobs::mirror::{MirrorRequest, Sync, Target};

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "blockdev-mirror",
        arguments: &BLOCKDEV_MIRROR,
        returns: Type::Object(&EMPTY),
        run: blockdev_mirror,
    },
    Command {
        name: "drive-mirror",
        arguments: &DRIVE_MIRROR,
        returns: Type::Object(&EMPTY),
        run: drive_mirror,
    },
];

pub(super) const COPY_MODES: &[&str] = &["background", "write-blocking"];
const SYNC_MODES: &[&str] = &["top", "full", "none", "incremental", "bitmap"];
const ON_ERROR: &[&str] = &["report", "ignore", "enospc", "stop", "auto"];

// More than one of the commands that copy a disk takes these.
pub(super) const JOB_ID: Member = optional("job-id", Type::Str);
pub(super) const DEVICE: Member = required("device", Type::Str);
pub(super) const TARGET: Member = required("target", Type::Str);
const REPLACES: Member = optional("replaces", Type::Str);
pub(super) const SYNC: Member = required("sync", Type::Enum(SYNC_MODES));
pub(super) const SPEED: Member = optional("speed", Type::Int);
const GRANULARITY: Member = optional("granularity", Type::Int);
const BUF_SIZE: Member = optional("buf-size", Type::Int);
pub(super) const ON_SOURCE_ERROR: Member = optional("on-source-error", Type::Enum(ON_ERROR));
pub(super) const ON_TARGET_ERROR: Member = optional("on-target-error", Type::Enum(ON_ERROR));
const COPY_MODE: Member = optional("copy-mode", Type::Enum(COPY_MODES));
pub(super) const FORMAT: Member = optional("format", Type::Str);
pub(super) const MODE: Member = optional("mode", Type::Enum(&["existing", "absolute-paths"]));
pub(super) const AUTO_FINALIZE: Member = optional("auto-finalize", Type::Bool);
pub(super) const AUTO_DISMISS: Member = optional("auto-dismiss", Type::Bool);

static BLOCKDEV_MIRROR: Object = Object::new(&[
    JOB_ID,
    DEVICE,
    TARGET,
    REPLACES,
    SYNC,
    SPEED,
    GRANULARITY,
    BUF_SIZE,
    ON_SOURCE_ERROR,
    ON_TARGET_ERROR,
    optional("filter-node-name", Type::Str),
    COPY_MODE,
    AUTO_FINALIZE,
    AUTO_DISMISS,
]);
static DRIVE_MIRROR: Object = Object::new(&[
    JOB_ID,
    DEVICE,
    TARGET,
    FORMAT,
    optional("node-name", Type::Str),
    REPLACES,
    SYNC,
    MODE,
    SPEED,
    GRANULARITY,
    BUF_SIZE,
    ON_SOURCE_ERROR,
    ON_TARGET_ERROR,
    optional("unmap", Type::Bool),
    COPY_MODE,
    AUTO_FINALIZE,
    AUTO_DISMISS,
]);

fn blockdev_mirror(call: &mut Call<'_>) -> Result<Value, Error> {
    let target = Target::Node(call.args.string("target")?);
    let mut request = request(&mut call.args, target)?;
    request.filter_node_name = call.args.optional_string("filter-node-name")?;
    let BlockLayer { jobs, disks } = call.vm.block();
    jobs.mirror(disks, &request).map(|()| nothing())
}

fn drive_mirror(call: &mut Call<'_>) -> Result<Value, Error> {
    let target = image(call.fdsets, &mut call.args)?;
    let mut request = request(&mut call.args, target)?;
    request.unmap = call.args.optional_bool("unmap")?.unwrap_or(true);
    let BlockLayer { jobs, disks } = call.vm.block();
    jobs.mirror(disks, &request).map(|()| nothing())
}

fn request(args: &mut Args, target: Target) -> Result<MirrorRequest, Error> {
    let sync = sync(args)?;
    let default = MirrorRequest::new(args.string("device")?, target, sync);
    let granularity = match args.optional_int("granularity")? {
        None => 0,
        Some(value) => {
            u32::try_from(value).map_err(|_| Error::invalid_parameter_value("granularity", "uint32"))?
        }
    };
    Ok(MirrorRequest {
        job_id: args.optional_string("job-id")?,
        replaces: args.optional_string("replaces")?,
        speed: args.optional_int("speed")?.unwrap_or(0),
        granularity,
        buf_size: args.optional_int("buf-size")?.unwrap_or(0),
        on_source_error: on_error(args, "on-source-error")?,
        on_target_error: on_error(args, "on-target-error")?,
        mode: args.optional_choice("copy-mode", COPY_MODE_TABLE)?.unwrap_or(default.mode),
        auto_finalize: args.optional_bool("auto-finalize")?.unwrap_or(true),
        auto_dismiss: args.optional_bool("auto-dismiss")?.unwrap_or(true),
        ..default
    })
}

/// The target of `drive-mirror` and `drive-backup`.
pub(super) fn image(fdsets: &FdSets, args: &mut Args) -> Result<Target, Error> {
    let filename = args.string("target")?;
    Ok(Target::Image {
        source: source(fdsets, &filename, false)?,
        format: args.optional_string("format")?,
        node_name: args.optional_string("node-name")?,
        existing: args.optional_string("mode")?.as_deref() == Some("existing"),
    })
}

pub(super) fn sync(args: &mut Args) -> Result<Sync, Error> {
    let table = [
        ("full", Sync::Full),
        ("top", Sync::Top),
        ("none", Sync::None),
        ("incremental", Sync::Incremental),
        ("bitmap", Sync::Bitmap),
    ];
    args.choice("sync", &table)
}

/// `auto` is `enospc` for a job, as in QEMU.
pub(super) fn on_error(args: &mut Args, name: &str) -> Result<OnError, Error> {
    let table = [
        ("report", OnError::Report),
        ("ignore", OnError::Ignore),
        ("stop", OnError::Stop),
        ("enospc", OnError::Enospc),
        ("auto", OnError::Enospc),
    ];
    Ok(args.optional_choice(name, &table)?.unwrap_or(OnError::Report))
}
