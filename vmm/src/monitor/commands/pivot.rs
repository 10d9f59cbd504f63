//! `tarn-pivot` and what belongs to it, and `drive-reopen` of 2012.
//!
//! A client names the operation; whatever becomes of the client, of the VM or of the machine, the witness and
//! `tarn-query-pivot` say of that operation whether the targets or the sources are the disks.

use coordinator::DurableError;
use coordinator::record::Operation;
use coordinator::record::witness::{Witness, WitnessError};
use protocol::{Args, Error};
use serde_json::{Value, json};
use uuid::Uuid;

use super::super::events::PIVOT_STATES;
use super::super::schema::{Object, Type, optional, required};
use super::super::vm::BlockLayer;
use super::nodes::source;
use super::{Call, Command};
use crate::jobs::nodes::NodeSource;
use crate::jobs::pivot::PivotState;
use crate::jobs::pivoting::{PivotDisk, PivotInfo, PivotRequest, WitnessState};

pub(super) const COMMANDS: &[Command] = &[
    Command { name: "tarn-pivot", arguments: &PIVOT, returns: Type::Object(&PIVOT_INFO), run: pivot },
    Command { name: "tarn-pivot-abort", arguments: &ABORT, returns: Type::Object(&PIVOT_INFO), run: abort },
    Command { name: "tarn-query-pivot", arguments: &QUERY, returns: Type::Object(&PIVOT_INFO), run: query },
    Command { name: "drive-reopen", arguments: &REOPEN, returns: Type::Object(&PIVOT_INFO), run: reopen },
];

/// `job` is one, `jobs` are several. `witness` is an absolute path, `/dev/fdset/N`, or a name given with `getfd`.
static PIVOT: Object = Object::new(&[
    required("op", Type::Str),
    required("gen", Type::Int),
    optional("epoch", Type::Int),
    optional("job", Type::Str),
    optional("jobs", Type::Array(&Type::Str)),
    optional("witness", Type::Str),
]);
static ABORT: Object =
    Object::new(&[required("op", Type::Str), required("gen", Type::Int), optional("epoch", Type::Int)]);
static QUERY: Object = Object::new(&[optional("op", Type::Str)]);
static REOPEN: Object = Object::new(&[
    required("device", Type::Str),
    required("new-image-file", Type::Str),
    optional("format", Type::Enum(&["raw"])),
    optional("witness", Type::Str),
]);
static PIVOT_INFO: Object = Object::new(&[
    required("op", Type::Str),
    required("gen", Type::Int),
    required("epoch", Type::Int),
    required("state", Type::Enum(PIVOT_STATES)),
    required("witness", Type::Enum(WITNESS_STATES)),
    required("disks", Type::Array(&Type::Object(&PIVOT_DISK))),
    optional("held-us", Type::Int),
    optional("error", Type::Str),
]);
static PIVOT_DISK: Object = Object::new(&[
    required("device", Type::Str),
    required("job", Type::Str),
    required("source", Type::Str),
    required("target", Type::Str),
]);
const WITNESS_STATES: &[&str] = &[
    WitnessState::None.name(),
    WitnessState::Pending.name(),
    WitnessState::Durable.name(),
    WitnessState::Revoked.name(),
    WitnessState::Failed.name(),
];

fn pivot(call: &mut Call<'_>) -> Result<Value, Error> {
    let operation = operation(&mut call.args)?;
    let mut jobs = call.args.optional_strings("jobs")?.unwrap_or_default();
    jobs.extend(call.args.optional_string("job")?);
    // Asked again, it is answered; its witness may be gone by now.
    let is_known = call.vm.block().jobs.query_pivot(Some(operation.id))?.state != PivotState::None;
    let witness = if is_known { None } else { witness(call)? };
    begin(call, PivotRequest { operation, jobs, witness })
}

fn abort(call: &mut Call<'_>) -> Result<Value, Error> {
    let operation = operation(&mut call.args)?;
    let asker = call.session.0;
    let BlockLayer { jobs, disks } = call.vm.block();
    let answer = jobs.abort_pivot(disks, operation, asker)?;
    Ok(call.answer(answer.map(|info| pivot_info(&info))))
}

fn query(call: &mut Call<'_>) -> Result<Value, Error> {
    let id = call.args.optional_string("op")?.map(|op| uuid("op", &op)).transpose()?;
    call.vm.block().jobs.query_pivot(id).map(|info| pivot_info(&info))
}

/// The proposal of 2012: the mirror of a disk is completed by the name of its target.
fn reopen(call: &mut Call<'_>) -> Result<Value, Error> {
    let device = call.args.string("device")?;
    let filename = call.args.string("new-image-file")?;
    let witness = witness(call)?;
    let BlockLayer { jobs, disks } = call.vm.block();
    let found = (0..disks.count()).find(|disk| disks.facts(*disk).device == device);
    let disk = found.ok_or_else(|| Error::device_not_found(&device))?;
    let target = jobs.nodes.target(disk).filter(|target| target.filename == filename);
    let job = jobs.on_disk(disk).filter(|_| target.is_some()).map(|job| job.id().to_owned());
    let Some(job) = job else {
        return Err(Error::generic(format!(
            "Disk '{device}' is not mirrored to '{filename}': only an image that holds what the disk holds can replace it"
        )));
    };
    let operation = jobs.next_operation()?;
    begin(call, PivotRequest { operation, jobs: vec![job], witness })
}

fn begin(call: &mut Call<'_>, request: PivotRequest) -> Result<Value, Error> {
    let asker = call.session.0;
    let BlockLayer { jobs, disks } = call.vm.block();
    let answer = jobs.pivot(disks, request, asker)?;
    Ok(call.answer(answer.map(|info| pivot_info(&info))))
}

fn operation(args: &mut Args) -> Result<Operation, Error> {
    let id = uuid("op", &args.string("op")?)?;
    let generation = args.int("gen")?;
    let generation = u64::try_from(generation).ok().filter(|generation| *generation > 0);
    let generation = generation.ok_or_else(|| Error::invalid_parameter_value("gen", "a positive value"))?;
    let epoch = u64::try_from(args.optional_int("epoch")?.unwrap_or(0))
        .map_err(|_| Error::invalid_parameter_value("epoch", "a non-negative value"))?;
    Ok(Operation { id, generation, epoch })
}

pub(super) fn uuid(name: &str, text: &str) -> Result<Uuid, Error> {
    Uuid::try_parse(text).map_err(|_| Error::invalid_parameter_value(name, "a UUID"))
}

fn witness(call: &mut Call<'_>) -> Result<Option<Witness>, Error> {
    let Some(name) = call.args.optional_string("witness")? else { return Ok(None) };
    let opened = if name.starts_with('/') {
        match source(call.fdsets, &name, false)? {
            NodeSource::Path(path) => Witness::open(&path),
            NodeSource::Descriptor { fd, name } => Witness::adopt(fd, &name),
        }
    } else {
        Witness::adopt(call.fds.take(&name)?, &name)
    };
    opened.map(Some).map_err(|error| match &error {
        WitnessError::File(DurableError::Io { source, .. }) => Error::generic(format!("{error}: {source}")),
        _ => Error::generic(error.to_string()),
    })
}

/// What clients get to see of an operation.
pub fn pivot_info(info: &PivotInfo) -> Value {
    let PivotInfo { operation, state, witness, disks, held, error } = info;
    let Operation { id, generation, epoch } = operation;
    let disk = |disk: &PivotDisk| {
        let PivotDisk { device, job, source, target } = disk;
        json!({"device": device, "job": job, "source": source, "target": target})
    };
    let mut value = json!({
        "op": id.to_string(),
        "gen": generation,
        "epoch": epoch,
        "state": state.name(),
        "witness": witness.name(),
        "disks": disks.iter().map(disk).collect::<Vec<_>>(),
    });
    if let Some(held) = held {
        value["held-us"] = u64::try_from(held.as_micros()).unwrap_or(u64::MAX).into();
    }
    if let Some(error) = error {
        value["error"] = error.as_str().into();
    }
    value
}
