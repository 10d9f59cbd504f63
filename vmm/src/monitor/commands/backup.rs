//! `blockdev-backup` and `drive-backup`.

use protocol::{Args, Error};
use serde_json::Value;

use super::super::fds::FdSets;
use super::super::schema::{EMPTY, Member, Object, Type, optional};
use super::super::vm::BlockLayer;
use super::mirror::{
    AUTO_DISMISS, AUTO_FINALIZE, DEVICE, FORMAT, JOB_ID, MODE, ON_SOURCE_ERROR, ON_TARGET_ERROR, SPEED, SYNC,
    TARGET, image, on_error, sync,
};
use super::{Call, Command, nothing};
use crate::jobs::backup::{BackupRequest, BitmapMode};
use crate::jobs::mirror::Target;

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "blockdev-backup",
        arguments: &BLOCKDEV_BACKUP,
        returns: Type::Object(&EMPTY),
        run: |call| {
            let request = blockdev_backup(&mut call.args)?;
            run(call, request)
        },
    },
    Command {
        name: "drive-backup",
        arguments: &DRIVE_BACKUP,
        returns: Type::Object(&EMPTY),
        run: |call| {
            let request = drive_backup(call.fdsets, &mut call.args)?;
            run(call, request)
        },
    },
];

const BITMAP: Member = optional("bitmap", Type::Str);
const BITMAP_MODE: Member = optional("bitmap-mode", Type::Enum(&["on-success", "never", "always"]));
const COMPRESS: Member = optional("compress", Type::Bool);
const FILTER_NODE_NAME: Member = optional("filter-node-name", Type::Str);

pub(super) static BLOCKDEV_BACKUP: Object = Object::new(&[
    JOB_ID,
    DEVICE,
    SYNC,
    SPEED,
    BITMAP,
    BITMAP_MODE,
    COMPRESS,
    ON_SOURCE_ERROR,
    ON_TARGET_ERROR,
    AUTO_FINALIZE,
    AUTO_DISMISS,
    FILTER_NODE_NAME,
    TARGET,
]);
pub(super) static DRIVE_BACKUP: Object = Object::new(&[
    JOB_ID,
    DEVICE,
    SYNC,
    SPEED,
    BITMAP,
    BITMAP_MODE,
    COMPRESS,
    ON_SOURCE_ERROR,
    ON_TARGET_ERROR,
    AUTO_FINALIZE,
    AUTO_DISMISS,
    FILTER_NODE_NAME,
    TARGET,
    FORMAT,
    MODE,
]);

fn run(call: &mut Call<'_>, request: BackupRequest) -> Result<Value, Error> {
    let BlockLayer { jobs, disks } = call.vm.block();
    jobs.backup(disks, request).map(|()| nothing())
}

/// What `blockdev-backup` asks for with these arguments.
pub(super) fn blockdev_backup(args: &mut Args) -> Result<BackupRequest, Error> {
    let target = Target::Node(args.string("target")?);
    request(args, target)
}

/// What `drive-backup` asks for with these arguments.
pub(super) fn drive_backup(fdsets: &FdSets, args: &mut Args) -> Result<BackupRequest, Error> {
    let target = image(fdsets, args)?;
    request(args, target)
}

fn request(args: &mut Args, target: Target) -> Result<BackupRequest, Error> {
    let sync = sync(args)?;
    let default = BackupRequest::new(args.string("device")?, target, sync);
    let bitmap_modes =
        [("on-success", BitmapMode::OnSuccess), ("never", BitmapMode::Never), ("always", BitmapMode::Always)];
    Ok(BackupRequest {
        job_id: args.optional_string("job-id")?,
        speed: args.optional_int("speed")?.unwrap_or(0),
        bitmap: args.optional_string("bitmap")?,
        bitmap_mode: args.optional_choice("bitmap-mode", &bitmap_modes)?,
        compress: args.optional_bool("compress")?.unwrap_or(false),
        on_source_error: on_error(args, "on-source-error")?,
        on_target_error: on_error(args, "on-target-error")?,
        filter_node_name: args.optional_string("filter-node-name")?,
        auto_finalize: args.optional_bool("auto-finalize")?.unwrap_or(true),
        auto_dismiss: args.optional_bool("auto-dismiss")?.unwrap_or(true),
        ..default
    })
}
