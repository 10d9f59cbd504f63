//! Limits and faults of the VM's disks.

use block::{FaultStatus, Filters};
use protocol::{Args, Error, Map};
use serde_json::{Value, json};

use super::super::schema::{EMPTY, Member, Object, Type, optional, required};
use super::super::vm::DiskInfo;
use super::{Call, Command, nothing};
use crate::config::{FaultOp, FaultSpec, LIMITS, ThrottleSpec};

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "block_set_io_throttle",
        arguments: &THROTTLE,
        returns: Type::Object(&EMPTY),
        run: block_set_io_throttle,
    },
    Command {
        name: "tarn-fault-add",
        arguments: &FAULT_ADD,
        returns: Type::Object(&FAULT_ID),
        run: fault_add,
    },
    Command {
        name: "tarn-fault-remove",
        arguments: &FAULT_REMOVE,
        returns: Type::Object(&EMPTY),
        run: fault_remove,
    },
    Command {
        name: "tarn-query-faults",
        arguments: &QUERY_FAULTS,
        returns: Type::Array(&Type::Object(&FAULT_INFO)),
        run: query_faults,
    },
];

/// QEMU's BlockIOThrottle. `group` may only be what it is by default: a disk shares its limits with no other.
static THROTTLE: Object = Object::new(&[
    optional("device", Type::Str),
    optional("id", Type::Str),
    required("bps", Type::Int),
    required("bps_rd", Type::Int),
    required("bps_wr", Type::Int),
    required("iops", Type::Int),
    required("iops_rd", Type::Int),
    required("iops_wr", Type::Int),
    optional("bps_max", Type::Int),
    optional("bps_rd_max", Type::Int),
    optional("bps_wr_max", Type::Int),
    optional("iops_max", Type::Int),
    optional("iops_rd_max", Type::Int),
    optional("iops_wr_max", Type::Int),
    optional("bps_max_length", Type::Int),
    optional("bps_rd_max_length", Type::Int),
    optional("bps_wr_max_length", Type::Int),
    optional("iops_max_length", Type::Int),
    optional("iops_rd_max_length", Type::Int),
    optional("iops_wr_max_length", Type::Int),
    optional("iops_size", Type::Int),
    optional("group", Type::Str),
]);
const OPERATION: Type = Type::Enum(&["any", "read", "write", "flush", "discard", "zeroes"]);
const SECTOR: Member = optional("sector", Type::Int);
const SECTORS: Member = optional("sectors", Type::Int);
const AFTER: Member = optional("after", Type::Int);
const COUNT: Member = optional("count", Type::Int);
const ERRNO: Member = optional("errno", Type::Str);
const DELAY: Member = optional("delay-ms", Type::Int);
const TORN: Member = optional("torn", Type::Int);
static FAULT_ADD: Object = Object::new(&[
    required("device", Type::Str),
    required("op", OPERATION),
    SECTOR,
    SECTORS,
    AFTER,
    COUNT,
    ERRNO,
    DELAY,
    TORN,
]);
static FAULT_ID: Object = Object::new(&[required("id", Type::Int)]);
/// Without an id: all of the device's.
static FAULT_REMOVE: Object = Object::new(&[required("device", Type::Str), optional("id", Type::Int)]);
static QUERY_FAULTS: Object = Object::new(&[optional("device", Type::Str)]);
/// A fault, with the operations it was about and those that suffered it.
pub(super) static FAULT_INFO: Object = Object::new(&[
    required("device", Type::Str),
    required("id", Type::Int),
    required("op", OPERATION),
    SECTOR,
    SECTORS,
    AFTER,
    COUNT,
    ERRNO,
    DELAY,
    TORN,
    required("matched", Type::Int),
    required("hits", Type::Int),
]);

/// Members of BlockDeviceInfo that tell of limits: the six always, the others where they are set. Limits are a disk's, of
/// whichever node is its root.
pub(super) fn limits(disk: Option<&DiskInfo>) -> Map {
    let filters = disk.and_then(|disk| disk.filters.as_ref());
    let spec = ThrottleSpec(filters.map(Filters::limits).unwrap_or_default());
    let mut members: Map = LIMITS.iter().map(|name| ((*name).to_owned(), 0.into())).collect();
    if let Some(disk) = disk.filter(|_| spec.0.is_limited()) {
        for (name, value) in spec.entries() {
            // As QEMU: a burst is told with its length.
            if name.ends_with("_max") {
                members.entry(format!("{name}_length")).or_insert(1.into());
            }
            members.insert(name, value.into());
        }
        members.insert("group".into(), disk.device.clone().into());
    }
    members
}

/// The faults of a disk.
pub(super) fn faults(disk: &DiskInfo) -> Vec<Value> {
    let all = disk.filters.as_ref().map(Filters::faults).unwrap_or_default();
    all.iter().map(|status| fault_info(&disk.device, status)).collect()
}

fn fault_info(device: &str, status: &FaultStatus) -> Value {
    // A plain struct of numbers and texts.
    let mut info = serde_json::to_value(FaultSpec::from(&status.rule)).unwrap_or_default();
    info["device"] = device.into();
    info["id"] = status.id.into();
    info["matched"] = status.matched.into();
    info["hits"] = status.hits.into();
    info
}

/// The filters of the disk that is called so, by its device's name or by the path of its device.
fn filters(call: &Call<'_>, name: &str) -> Result<(String, Filters), Error> {
    let disks = call.vm.disks();
    let found = disks.into_iter().find(|disk| disk.device == name || disk.qdev() == name);
    let found = found.and_then(|disk| Some((disk.device, disk.filters?)));
    found.ok_or_else(|| Error::device_not_found(name))
}

fn block_set_io_throttle(call: &mut Call<'_>) -> Result<Value, Error> {
    let (device, id) = (call.args.optional_string("device")?, call.args.optional_string("id")?);
    let name = match (device, id) {
        (Some(name), None) | (None, Some(name)) => name,
        _ => return Err(Error::generic("Need exactly one of 'device' and 'id'")),
    };
    let (device, filters) = filters(call, &name)?;
    let mut spec = ThrottleSpec::default();
    for base in LIMITS {
        for end in ["", "_max", "_max_length"] {
            set(&mut call.args, &mut spec, &format!("{base}{end}"))?;
        }
    }
    set(&mut call.args, &mut spec, "iops_size")?;
    if call.args.optional_string("group")?.is_some_and(|group| group != device) {
        return Err(Error::generic(format!(
            "Parameter 'group' expects '{device}': disks do not share limits"
        )));
    }
    filters.set_limits(spec.0).map_err(|error| Error::generic(error.to_string()))?;
    Ok(nothing())
}

fn set(args: &mut Args, spec: &mut ThrottleSpec, name: &str) -> Result<(), Error> {
    if let (Some(given), Some(value)) = (args.optional_int(name)?, spec.value(name)) {
        // Negative ones are out of range then, as in QEMU.
        *value = given.cast_unsigned();
    }
    Ok(())
}

fn fault_add(call: &mut Call<'_>) -> Result<Value, Error> {
    let device = call.args.string("device")?;
    let (_, filters) = filters(call, &device)?;
    let args = &mut call.args;
    const OPS: [(&str, FaultOp); 6] = [
        ("any", FaultOp::Any),
        ("read", FaultOp::Read),
        ("write", FaultOp::Write),
        ("flush", FaultOp::Flush),
        ("discard", FaultOp::Discard),
        ("zeroes", FaultOp::Zeroes),
    ];
    let fault = FaultSpec {
        op: args.choice("op", &OPS)?,
        sector: number(args, "sector")?,
        sectors: number(args, "sectors")?,
        after: number(args, "after")?.unwrap_or(0),
        count: number(args, "count")?.unwrap_or(0),
        errno: args.optional_string("errno")?,
        delay_ms: number(args, "delay-ms")?.unwrap_or(0),
        torn: number(args, "torn")?,
    };
    let rule = fault.rule().map_err(|error| Error::generic(error.to_string()))?;
    let id = filters.add_fault(rule).map_err(|error| Error::generic(error.to_string()))?;
    tracing::warn!(disk = device, id, ?fault, "A fault is injected");
    Ok(json!({"id": id}))
}

fn number(args: &mut Args, name: &str) -> Result<Option<u64>, Error> {
    let Some(value) = args.optional_int(name)? else { return Ok(None) };
    let value = u64::try_from(value);
    value.map(Some).map_err(|_| Error::invalid_parameter_value(name, "a non-negative value"))
}

fn fault_remove(call: &mut Call<'_>) -> Result<Value, Error> {
    let device = call.args.string("device")?;
    let (device, filters) = filters(call, &device)?;
    match number(&mut call.args, "id")? {
        Some(id) if !filters.remove_fault(id) => {
            return Err(Error::generic(format!("Device '{device}' has no fault {id}")));
        }
        Some(_) => {}
        None => {
            for status in filters.faults() {
                filters.remove_fault(status.id);
            }
        }
    }
    Ok(nothing())
}

fn query_faults(call: &mut Call<'_>) -> Result<Value, Error> {
    let wanted = match call.args.optional_string("device")? {
        Some(device) => Some(filters(call, &device)?.0),
        None => None,
    };
    let disks = call.vm.disks();
    let disks = disks.iter().filter(|disk| wanted.as_ref().is_none_or(|device| *device == disk.device));
    Ok(disks.flat_map(faults).collect())
}
