//! Jobs: what may be asked of them, and where they are.

use block::CopyMode;
use protocol::Error;
use serde_json::{Value, json};

use super::super::events::{JOB_STATUSES, JOB_TYPES};
use super::super::schema::{EMPTY, Object, Type, Variants, optional, required};
use super::super::vm::BlockLayer;
use super::mirror::COPY_MODES;
use super::{Call, Command, nothing};
use crate::jobs::lifecycle::{JobKind, Request};
use crate::jobs::registry::{Estimates, Family, JobInfo};

pub(super) const COMMANDS: &[Command] = &[
    verb("block-job-pause", &DEVICE, |call| ask(call, Family::BlockJob, "device", Request::Pause)),
    verb("block-job-resume", &DEVICE, |call| ask(call, Family::BlockJob, "device", Request::Resume)),
    verb("block-job-complete", &DEVICE, |call| ask(call, Family::BlockJob, "device", Request::Complete)),
    verb("block-job-finalize", &ID, |call| ask(call, Family::BlockJob, "id", Request::Finalize)),
    verb("block-job-dismiss", &ID, |call| ask(call, Family::BlockJob, "id", Request::Dismiss)),
    verb("block-job-cancel", &CANCEL, block_job_cancel),
    verb("block-job-set-speed", &SET_SPEED, block_job_set_speed),
    verb("block-job-change", &CHANGE, block_job_change),
    verb("job-pause", &ID, |call| ask(call, Family::Job, "id", Request::Pause)),
    verb("job-resume", &ID, |call| ask(call, Family::Job, "id", Request::Resume)),
    verb("job-complete", &ID, |call| ask(call, Family::Job, "id", Request::Complete)),
    verb("job-finalize", &ID, |call| ask(call, Family::Job, "id", Request::Finalize)),
    verb("job-dismiss", &ID, |call| ask(call, Family::Job, "id", Request::Dismiss)),
    verb("job-cancel", &ID, |call| ask(call, Family::Job, "id", Request::Cancel { force: true })),
    Command {
        name: "query-jobs",
        arguments: &EMPTY,
        returns: Type::Array(&Type::Object(&JOB_INFO)),
        run: |call| Ok(list(call).iter().map(job_info).collect()),
    },
    Command {
        name: "query-block-jobs",
        arguments: &EMPTY,
        returns: Type::Array(&Type::Object(&BLOCK_JOB_INFO)),
        run: |call| {
            let jobs = list(call);
            Ok(jobs.iter().filter(|job| job.kind.is_block_job()).map(block_job_info).collect())
        },
    },
];

const fn verb(
    name: &'static str,
    arguments: &'static Object,
    run: fn(&mut Call<'_>) -> Result<Value, Error>,
) -> Command {
    Command { name, arguments, returns: Type::Object(&EMPTY), run }
}

static DEVICE: Object = Object::new(&[required("device", Type::Str)]);
static ID: Object = Object::new(&[required("id", Type::Str)]);
static CANCEL: Object = Object::new(&[required("device", Type::Str), optional("force", Type::Bool)]);
static SET_SPEED: Object = Object::new(&[required("device", Type::Str), required("speed", Type::Int)]);
static CHANGE: Object = Object {
    members: &[required("id", Type::Str), required("type", Type::Enum(JOB_TYPES))],
    variants: Some(Variants { tag: "type", cases: &[("mirror", &CHANGE_MIRROR)] }),
};
static CHANGE_MIRROR: Object = Object::new(&[required("copy-mode", Type::Enum(COPY_MODES))]);
static JOB_INFO: Object = Object::new(&[
    required("id", Type::Str),
    required("type", Type::Enum(JOB_TYPES)),
    required("status", Type::Enum(JOB_STATUSES)),
    required("current-progress", Type::Int),
    required("total-progress", Type::Int),
    optional("error", Type::Str),
]);
static BLOCK_JOB_INFO: Object = Object {
    members: &[
        required("type", Type::Enum(JOB_TYPES)),
        required("device", Type::Str),
        required("len", Type::Int),
        required("offset", Type::Int),
        required("busy", Type::Bool),
        required("paused", Type::Bool),
        required("speed", Type::Int),
        required("io-status", Type::Enum(&["ok", "failed", "nospace"])),
        required("ready", Type::Bool),
        required("status", Type::Enum(JOB_STATUSES)),
        required("auto-finalize", Type::Bool),
        required("auto-dismiss", Type::Bool),
        optional("error", Type::Str),
        // Ours: how long it takes until nothing remains to be copied, in milliseconds; absent when that is not known.
        optional("tarn-remaining-ms", Type::Int),
    ],
    variants: Some(Variants { tag: "type", cases: &[("mirror", &BLOCK_JOB_INFO_MIRROR)] }),
};
static BLOCK_JOB_INFO_MIRROR: Object = Object::new(&[
    required("actively-synced", Type::Bool),
    // Ours: how long the guest would be held for a pivot now, in microseconds; absent when that is not known.
    optional("tarn-expected-hold-us", Type::Int),
]);

fn ask(call: &mut Call<'_>, family: Family, member: &str, request: Request) -> Result<Value, Error> {
    let id = call.args.string(member)?;
    let BlockLayer { jobs, disks } = call.vm.block();
    jobs.ask(disks, family, &id, request).map(|()| nothing())
}

fn block_job_cancel(call: &mut Call<'_>) -> Result<Value, Error> {
    let force = call.args.optional_bool("force")?.unwrap_or(false);
    ask(call, Family::BlockJob, "device", Request::Cancel { force })
}

fn block_job_set_speed(call: &mut Call<'_>) -> Result<Value, Error> {
    let (id, speed) = (call.args.string("device")?, call.args.int("speed")?);
    let BlockLayer { jobs, disks } = call.vm.block();
    match u64::try_from(speed) {
        Ok(speed) => jobs.ask(disks, Family::BlockJob, &id, Request::SetSpeed(speed)).map(|()| nothing()),
        Err(_) => {
            jobs.check_block_job(&id)?;
            Err(Error::invalid_parameter_value("speed", "a non-negative value"))
        }
    }
}

fn block_job_change(call: &mut Call<'_>) -> Result<Value, Error> {
    let id = call.args.string("id")?;
    let mode = call.args.optional_choice("copy-mode", COPY_MODE_TABLE)?;
    let BlockLayer { jobs, disks } = call.vm.block();
    match mode {
        Some(mode) => jobs.change_mode(disks, &id, mode).map(|()| nothing()),
        None => {
            jobs.check_block_job(&id)?;
            Err(Error::generic("Job type does not support change"))
        }
    }
}

pub(super) const COPY_MODE_TABLE: &[(&str, CopyMode)] =
    &[("background", CopyMode::Background), ("write-blocking", CopyMode::WriteBlocking)];

fn list(call: &mut Call<'_>) -> Vec<JobInfo> {
    let BlockLayer { jobs, disks } = call.vm.block();
    jobs.list(disks)
}

fn job_info(job: &JobInfo) -> Value {
    let mut info = json!({
        "id": job.id,
        "type": job.kind.name(),
        "status": job.status.name(),
        "current-progress": job.offset,
        "total-progress": job.len,
    });
    if let Some(error) = &job.error {
        info["error"] = error.as_str().into();
    }
    info
}

fn block_job_info(job: &JobInfo) -> Value {
    let mut info = json!({
        "type": job.kind.name(),
        "device": job.id,
        "len": job.len,
        "offset": job.offset,
        "busy": job.busy,
        "paused": job.paused,
        "speed": job.speed,
        "io-status": job.io_status,
        "ready": job.ready,
        "status": job.status.name(),
        "auto-finalize": job.auto_finalize,
        "auto-dismiss": job.auto_dismiss,
    });
    if let Some(error) = &job.error {
        info["error"] = error.as_str().into();
    }
    if let (JobKind::Mirror, Some(synced)) = (job.kind, job.actively_synced) {
        info["actively-synced"] = synced.into();
    }
    let Estimates { remaining, hold } = job.estimates;
    let whole = |units: u128| i64::try_from(units).unwrap_or(i64::MAX);
    if let Some(remaining) = remaining {
        info["tarn-remaining-ms"] = whole(remaining.as_millis()).into();
    }
    if let Some(hold) = hold {
        info["tarn-expected-hold-us"] = whole(hold.as_micros()).into();
    }
    info
}
