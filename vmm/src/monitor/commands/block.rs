//! The VM's disks.

use block::Cache;
use protocol::Error;
use serde_json::{Value, json};

use super::super::schema::{EMPTY, Object, Type, optional, required};
use super::super::vm::{DiskInfo, IoStatus};
use super::{Call, Command, filters, nothing};
use crate::jobs::nodes::NodeInfo;

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "query-block",
        arguments: &EMPTY,
        returns: Type::Array(&Type::Object(&BLOCK_INFO)),
        run: query_block,
    },
    Command {
        name: "query-named-block-nodes",
        arguments: &QUERY_NODES,
        returns: Type::Array(&Type::Object(&BLOCK_DEVICE_INFO)),
        run: query_named_block_nodes,
    },
    Command { name: "block_resize", arguments: &RESIZE, returns: Type::Object(&EMPTY), run: block_resize },
];

static RESIZE: Object = Object::new(&[
    optional("device", Type::Str),
    optional("node-name", Type::Str),
    required("size", Type::Int),
]);

/// `flat` leaves out backing chains, of which there are none.
static QUERY_NODES: Object = Object::new(&[optional("flat", Type::Bool)]);
static BLOCK_INFO: Object = Object::new(&[
    required("device", Type::Str),
    optional("qdev", Type::Str),
    required("type", Type::Str),
    required("removable", Type::Bool),
    required("locked", Type::Bool),
    optional("inserted", Type::Object(&BLOCK_DEVICE_INFO)),
    optional("io-status", Type::Enum(&["ok", "failed", "nospace"])),
    // Ours: bytes in a block of the guest's device, whatever image it works on; and what is made to go wrong.
    required("tarn-block-size", Type::Int),
    optional("tarn-faults", Type::Array(&Type::Object(&filters::FAULT_INFO))),
]);
static BLOCK_DEVICE_INFO: Object = Object::new(&[
    required("file", Type::Str),
    optional("node-name", Type::Str),
    required("ro", Type::Bool),
    required("drv", Type::Str),
    required("backing_file_depth", Type::Int),
    required("active", Type::Bool),
    required("encrypted", Type::Bool),
    required("detect_zeroes", Type::Enum(&["off", "on", "unmap"])),
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
    required("image", Type::Object(&IMAGE_INFO)),
    required("cache", Type::Object(&CACHE_INFO)),
    required("write_threshold", Type::Int),
]);
static IMAGE_INFO: Object = Object::new(&[
    required("filename", Type::Str),
    required("format", Type::Str),
    required("virtual-size", Type::Int),
    optional("actual-size", Type::Int),
]);
static CACHE_INFO: Object = Object::new(&[
    required("writeback", Type::Bool),
    required("direct", Type::Bool),
    required("no-flush", Type::Bool),
]);

fn query_block(call: &mut Call<'_>) -> Result<Value, Error> {
    let disks = call.vm.disks();
    let nodes = &call.vm.block().jobs.nodes;
    let info = |(index, disk): (usize, &DiskInfo)| block_info(disk, nodes.root(index));
    Ok(disks.iter().enumerate().map(info).collect())
}

fn query_named_block_nodes(call: &mut Call<'_>) -> Result<Value, Error> {
    let disks = call.vm.disks();
    let nodes = call.vm.block().jobs.nodes.list();
    let info = |node: &NodeInfo| {
        let of_disk = node.disk.and_then(|index| disks.get(index));
        block_device_info(node, of_disk)
    };
    Ok(nodes.iter().map(info).collect())
}

/// Changes the size of an image, and tells the guest. A smaller size cuts off what is beyond it.
fn block_resize(call: &mut Call<'_>) -> Result<Value, Error> {
    let device = call.args.optional_string("device")?;
    let node = call.args.optional_string("node-name")?;
    let size = call.args.int("size")?;
    let size = u64::try_from(size).ok().filter(|size| *size > 0);
    let size = size.ok_or_else(|| Error::invalid_parameter_value("size", "a >0 size"))?;
    let disks = call.vm.disks();
    let jobs = call.vm.block().jobs;
    let roots: Vec<_> = (0..disks.len()).map(|index| jobs.nodes.root(index)).collect();
    let found = disks.iter().zip(&roots).position(|(disk, root)| {
        let root = root.as_ref().map(|root| &root.name);
        device.as_ref().is_some_and(|name| *name == disk.device) || (node.is_some() && node.as_ref() == root)
    });
    let Some(index) = found else {
        let (device, node) = (device.unwrap_or_default(), node.unwrap_or_default());
        return Err(Error::generic(format!("Cannot find device='{device}' nor node-name='{node}'")));
    };
    if let Some(job) = jobs.on_disk(index) {
        let node = roots[index].as_ref().map_or("", |root| &root.name);
        let text =
            format!("Node '{node}' is busy: block device is in use by block job: {}", job.kind().name());
        return Err(Error::generic(text));
    }
    call.vm.resize_disk(index, size)?;
    Ok(nothing())
}

fn block_info(disk: &DiskInfo, node: Option<NodeInfo>) -> Value {
    let mut info = json!({
        "device": disk.device,
        "qdev": disk.qdev(),
        "type": "unknown",
        "removable": false,
        "locked": false,
        "io-status": match disk.io_status {
            IoStatus::Ok => "ok",
            IoStatus::Failed => "failed",
            IoStatus::Nospace => "nospace",
        },
        "tarn-block-size": disk.block_size,
    });
    if let Some(node) = node {
        info["inserted"] = block_device_info(&node, Some(disk));
        let faults = filters::faults(&node, Some(disk));
        if !faults.is_empty() {
            info["tarn-faults"] = faults.into();
        }
    }
    info
}

fn block_device_info(node: &NodeInfo, disk: Option<&DiskInfo>) -> Value {
    let size = disk.map_or(node.size, |disk| disk.virtual_size);
    let mut image = json!({"filename": node.filename, "format": node.driver, "virtual-size": size});
    if let Some(size) = node.actual_size {
        image["actual-size"] = size.into();
    }
    let mut info = json!({
        "file": node.filename,
        "node-name": node.name,
        "ro": node.read_only,
        "drv": node.driver,
        "backing_file_depth": 0,
        "active": true,
        "encrypted": false,
        "detect_zeroes": "off",
        "image": image,
        "cache": {
            "writeback": node.cache != Cache::Writethrough,
            "direct": node.direct,
            "no-flush": node.cache == Cache::Unsafe,
        },
        "write_threshold": 0,
    });
    for (name, value) in filters::limits(node, disk) {
        info[name] = value;
    }
    info
}
