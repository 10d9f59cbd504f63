//! guest-get-disks: every disk and partition the kernel knows, mounted or not.
//!
//! What the reference tells of NVMe disks besides, their health, is not there: that takes an ioctl of the
//! controller's own, and Tarn's guests have none.

use std::path::Path;

use protocol::{Args, Error, Map};
use serde_json::{Value, json};

use super::disk_address::{BlockDevice, DISK_ADDRESS};
use super::failed;
use super::root::Root;
use crate::guest::Guest;
use crate::schema::{Command, Run, Type, optional, required};

const DISK: Type = Type::Object(&[
    required("name", Type::Str),
    required("partition", Type::Bool),
    optional("dependencies", Type::Array(&Type::Str)),
    optional("address", DISK_ADDRESS),
    optional("alias", Type::Str),
]);

pub(crate) const COMMANDS: &[Command] =
    &[Command::new("guest-get-disks", "Disks and their partitions, mounted or not", Run::Worker(get_disks))
        .returns(Type::Array(&DISK))];

const DIRECTORY: &str = "/sys/block";

fn get_disks(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    disks(&Root::guest())
}

/// Each disk, then its partitions. A device without a size, such as a loop device without a file, is none.
fn disks(root: &Root) -> Result<Value, Error> {
    let names = root
        .names(DIRECTORY)
        .map_err(|error| failed(format_args!("Can't open directory \"{DIRECTORY}\""), &error))?;
    let found = names.iter().filter_map(|name| BlockDevice::find(root, Path::new(DIRECTORY).join(name)));
    let has_size =
        |device: &BlockDevice| root.line(device.path().join("size")).is_some_and(|size| size != "0");
    Ok(found.filter(has_size).flat_map(|device| disk_and_partitions(root, &device)).collect())
}

fn disk_and_partitions(root: &Root, device: &BlockDevice) -> Vec<Value> {
    let Some(name) = device.node(root) else { return Vec::new() };
    let mut disk = Map::from_iter([("name".into(), name.clone().into()), ("partition".into(), false.into())]);
    let slaves = device.slaves(root);
    disk.insert("dependencies".into(), slaves.iter().filter_map(|slave| slave.node(root)).collect());
    if let Some(alias) = root.line(device.path().join("dm/name")) {
        disk.insert("alias".into(), alias.into());
    }
    if let Some(address) = device.address(root) {
        disk.insert("address".into(), address);
    }
    let mut disks = vec![Value::Object(disk)];
    for entry in root.names(device.path()).unwrap_or_default() {
        let path = device.path().join(entry);
        let is_partition = root.has(path.join("partition"));
        let partition = is_partition.then(|| BlockDevice::find(root, path)).flatten();
        if let Some(node) = partition.and_then(|partition| partition.node(root)) {
            disks.push(json!({"name": node, "partition": true, "dependencies": [name]}));
        }
    }
    disks
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::commands::disk_address::tests::Machine;

    #[test]
    fn disks_are_listed_with_partitions_and_what_they_are_made_of() {
        let machine = Machine::new();
        let vda = "/sys/devices/LNRO0005:00/virtio0/block/vda";
        machine.device(vda, "254:0", &[("size", "2048\n"), ("serial", "s1\n")]);
        machine.device(&format!("{vda}/vda1"), "254:1", &[("size", "1024\n"), ("partition", "1\n")]);
        machine.device("/sys/devices/virtual/block/loop0", "7:0", &[("size", "0\n")]);
        let dm = "/sys/devices/virtual/block/dm-0";
        machine.device(dm, "253:0", &[("size", "512\n"), ("dm/name", "vg-root\n")]);
        symlink(
            "../../../../LNRO0005:00/virtio0/block/vda/vda1",
            machine.root.join(format!("{dm}/slaves/vda1")),
        )
        .unwrap();
        let value = disks(&machine.root).unwrap();
        Type::Array(&DISK).check(&value).unwrap();
        let expected = json!([
            {"name": "/dev/dm-0", "partition": false, "dependencies": ["/dev/vda1"], "alias": "vg-root"},
            {"name": "/dev/vda", "partition": false, "dependencies": [],
                "address": {"bus-type": "virtio", "bus": 0, "target": 0, "unit": 0, "dev": "/dev/vda",
                    "serial": "s1", "pci-controller": {"domain": -1, "bus": -1, "slot": -1, "function": -1}}},
            {"name": "/dev/vda1", "partition": true, "dependencies": ["/dev/vda"]},
        ]);
        assert_eq!(value, expected);
    }

    #[test]
    fn devices_that_lack_what_the_kernel_documents_are_left_out() {
        let machine = Machine::new();
        machine.device(
            "/sys/devices/virtual/block/zram0",
            "252:0",
            &[("size", "8\n"), ("uevent", "MAJOR=1\n")],
        );
        machine.device("/sys/devices/virtual/block/zram1", "252:1", &[]);
        symlink("nowhere", machine.root.join("/sys/block/vdz")).unwrap();
        assert_eq!(disks(&machine.root).unwrap(), json!([]));
        let empty = tempfile::tempdir().unwrap();
        let expected = "Can't open directory \"/sys/block\": No such file or directory";
        assert_eq!(disks(&Root::at(empty.path())).unwrap_err().desc, expected);
    }
}
