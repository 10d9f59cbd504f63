//! Limits and faults of the VM's disks.

use block::{FaultOperation, FaultStatus, Filters};
use protocol::{Args, Error, Map};
use serde_json::{Value, json};

use super::super::schema::{EMPTY, Member, Object, Type, optional, required};
use super::super::vm::DiskInfo;
use super::{Call, Command, nothing};
use crate::config::{FaultOp, FaultSpec, LIMITS, ThrottleSpec};
use crate::jobs::nodes::NodeInfo;

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
/// `node-name` is ours: limits of an image, whoever works on it.
static THROTTLE: Object = Object::new(&[
    optional("device", Type::Str),
    optional("id", Type::Str),
    optional("node-name", Type::Str),
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
const OPERATION: Type = Type::Enum(&["any", "read", "write", "flush", "discard", "zeroes", "volatile-cache"]);
const DEVICE: Member = optional("device", Type::Str);
const NODE_NAME: Member = optional("node-name", Type::Str);
const SECTOR: Member = optional("sector", Type::Int);
const SECTORS: Member = optional("sectors", Type::Int);
const AFTER: Member = optional("after", Type::Int);
const COUNT: Member = optional("count", Type::Int);
const ERRNO: Member = optional("errno", Type::Str);
const DELAY: Member = optional("delay-ms", Type::Int);
const TORN: Member = optional("torn", Type::Int);
const SEED: Member = optional("seed", Type::Int);
/// A device stands for the node that it works on now.
static FAULT_ADD: Object = Object::new(&[
    DEVICE,
    NODE_NAME,
    required("op", OPERATION),
    SECTOR,
    SECTORS,
    AFTER,
    COUNT,
    ERRNO,
    DELAY,
    TORN,
    SEED,
]);
static FAULT_ID: Object = Object::new(&[required("id", Type::Int)]);
/// Without an id: all of the node's.
static FAULT_REMOVE: Object = Object::new(&[DEVICE, NODE_NAME, optional("id", Type::Int)]);
static QUERY_FAULTS: Object = Object::new(&[DEVICE, NODE_NAME]);
/// A fault, with the operations it was about and those that suffered it; of a volatile cache, the bytes that a power cut
/// would cost. The device, if one works on the node.
pub(super) static FAULT_INFO: Object = Object::new(&[
    DEVICE,
    required("node-name", Type::Str),
    required("id", Type::Int),
    required("op", OPERATION),
    SECTOR,
    SECTORS,
    AFTER,
    COUNT,
    ERRNO,
    DELAY,
    TORN,
    SEED,
    optional("unflushed", Type::Int),
    required("matched", Type::Int),
    required("hits", Type::Int),
]);

/// Members of BlockDeviceInfo that tell of limits: the six always, the others where they are set. They are those of the
/// disk that works on the node, or the node's own where that has none.
pub(super) fn limits(node: &NodeInfo, disk: Option<&DiskInfo>) -> Map {
    let spec =
        |filters: &Option<Filters>| ThrottleSpec(filters.as_ref().map(Filters::limits).unwrap_or_default());
    let of_disk =
        disk.map(|disk| (spec(&disk.filters), &disk.device)).filter(|(spec, _)| spec.0.is_limited());
    let (spec, group) = of_disk.unwrap_or_else(|| (spec(&node.filters), &node.name));
    let mut members: Map = LIMITS.iter().map(|name| ((*name).to_owned(), 0.into())).collect();
    if spec.0.is_limited() {
        for (name, value) in spec.entries() {
            // As QEMU: a burst is told with its length.
            if name.ends_with("_max") {
                members.entry(format!("{name}_length")).or_insert(1.into());
            }
            members.insert(name, value.into());
        }
        members.insert("group".into(), group.clone().into());
    }
    members
}

/// The faults of a node, and of the disk that works on it.
pub(super) fn faults(node: &NodeInfo, disk: Option<&DiskInfo>) -> Vec<Value> {
    let Some(filters) = &node.filters else { return Vec::new() };
    let info = |status: &FaultStatus| {
        // A plain struct of numbers and texts.
        let mut info = serde_json::to_value(FaultSpec::from(&status.rule)).unwrap_or_default();
        info["node-name"] = node.name.clone().into();
        if let Some(disk) = disk {
            info["device"] = disk.device.clone().into();
        }
        info["id"] = status.id.into();
        info["matched"] = status.matched.into();
        info["hits"] = status.hits.into();
        if status.rule.operation == FaultOperation::VolatileCache {
            info["unflushed"] = filters.unflushed().into();
        }
        info
    };
    filters.faults().iter().map(info).collect()
}

/// What a command is about, by one of its names: a disk by its device's or by the path of its device, and the node it
/// works on; or a node.
fn named(call: &mut Call<'_>, names: &[&str]) -> Result<Option<(Option<DiskInfo>, NodeInfo)>, Error> {
    let mut given = Vec::new();
    for name in names {
        given.extend(call.args.optional_string(name)?.map(|value| (*name, value)));
    }
    let (kind, name) = match &given[..] {
        [] => return Ok(None),
        [one] => one,
        _ => return Err(not_one(&names[..2])),
    };
    let disks = call.vm.disks();
    let nodes = &call.vm.block().jobs.nodes;
    if *kind == "node-name" {
        let missing = || Error::generic(format!("Cannot find device='' nor node-name='{name}'"));
        let node = nodes.find(name).ok_or_else(missing)?;
        return Ok(Some((None, node)));
    }
    let index = disks.iter().position(|disk| disk.device == *name || disk.qdev() == *name);
    let node = index.and_then(|index| nodes.root(index));
    let found = index.zip(node).ok_or_else(|| Error::device_not_found(name))?;
    Ok(Some((disks.into_iter().nth(found.0), found.1)))
}

fn not_one(names: &[&str]) -> Error {
    let quoted: Vec<_> = names.iter().map(|name| format!("'{name}'")).collect();
    Error::generic(format!("Need exactly one of {}", quoted.join(" and ")))
}

fn block_set_io_throttle(call: &mut Call<'_>) -> Result<Value, Error> {
    const NAMES: [&str; 3] = ["device", "id", "node-name"];
    // QEMU's words, which know two of them.
    let (disk, node) = named(call, &NAMES)?.ok_or_else(|| not_one(&NAMES[..2]))?;
    let (group, filters) = match disk {
        Some(disk) => (disk.device, disk.filters),
        None => (node.name, node.filters),
    };
    let filters = filters.ok_or_else(|| Error::device_not_found(&group))?;
    let mut spec = ThrottleSpec::default();
    for base in LIMITS {
        for end in ["", "_max", "_max_length"] {
            set(&mut call.args, &mut spec, &format!("{base}{end}"))?;
        }
    }
    set(&mut call.args, &mut spec, "iops_size")?;
    if call.args.optional_string("group")?.is_some_and(|given| given != group) {
        return Err(Error::generic(format!(
            "Parameter 'group' expects '{group}': disks do not share limits"
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

/// Ways to say which node.
const NODE_NAMES: [&str; 2] = ["device", "node-name"];
const OPERATIONS: [(&str, FaultOp); 7] = [
    ("any", FaultOp::Any),
    ("read", FaultOp::Read),
    ("write", FaultOp::Write),
    ("flush", FaultOp::Flush),
    ("discard", FaultOp::Discard),
    ("zeroes", FaultOp::Zeroes),
    ("volatile-cache", FaultOp::VolatileCache),
];

/// The node that a command is about, and its filters.
fn node_filters(call: &mut Call<'_>) -> Result<(String, Filters), Error> {
    let (disk, node) = named(call, &NODE_NAMES)?.ok_or_else(|| not_one(&NODE_NAMES))?;
    let name = disk.map_or(node.name, |disk| disk.device);
    let filters = node.filters.ok_or_else(|| Error::device_not_found(&name))?;
    Ok((name, filters))
}

fn fault_add(call: &mut Call<'_>) -> Result<Value, Error> {
    let (name, filters) = node_filters(call)?;
    let args = &mut call.args;
    let fault = FaultSpec {
        op: args.choice("op", &OPERATIONS)?,
        sector: number(args, "sector")?,
        sectors: number(args, "sectors")?,
        after: number(args, "after")?.unwrap_or(0),
        count: number(args, "count")?.unwrap_or(0),
        errno: args.optional_string("errno")?,
        delay_ms: number(args, "delay-ms")?.unwrap_or(0),
        torn: number(args, "torn")?,
        seed: number(args, "seed")?,
    };
    let rule = fault.rule().map_err(|error| Error::generic(error.to_string()))?;
    let id = filters.add_fault(rule).map_err(|error| Error::generic(error.to_string()))?;
    tracing::warn!(name, id, ?fault, "A fault is injected");
    Ok(json!({"id": id}))
}

fn number(args: &mut Args, name: &str) -> Result<Option<u64>, Error> {
    let Some(value) = args.optional_int(name)? else { return Ok(None) };
    let value = u64::try_from(value);
    value.map(Some).map_err(|_| Error::invalid_parameter_value(name, "a non-negative value"))
}

fn fault_remove(call: &mut Call<'_>) -> Result<Value, Error> {
    let (name, filters) = node_filters(call)?;
    match number(&mut call.args, "id")? {
        Some(id) if !filters.remove_fault(id) => {
            return Err(Error::generic(format!("Device '{name}' has no fault {id}")));
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

/// Those of the disks first, in their order, then those of other nodes as these were added.
fn query_faults(call: &mut Call<'_>) -> Result<Value, Error> {
    let only = named(call, &NODE_NAMES)?.map(|(_, node)| node.name);
    let disks = call.vm.disks();
    let mut nodes = call.vm.block().jobs.nodes.list();
    nodes.retain(|node| only.as_ref().is_none_or(|name| *name == node.name));
    nodes.reverse();
    nodes.sort_by_key(|node| node.disk.unwrap_or(usize::MAX));
    Ok(nodes.iter().flat_map(|node| faults(node, node.disk.and_then(|index| disks.get(index)))).collect())
}
