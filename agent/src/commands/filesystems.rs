//! guest-get-fsinfo and guest-fstrim: the filesystems that guest-fsfreeze-freeze would freeze.
#![expect(unsafe_code, reason = "neither std nor rustix has FITRIM")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use protocol::{Args, Error, Map};
use rustix::fs::{StatVfs, fstatvfs};
use serde_json::{Value, json};

use super::disk_address::{BlockDevice, DISK_ADDRESS};
use super::errno_text;
use super::root::Root;
use crate::freeze::{Engine, Kernel, Linux, Superblock};
use crate::guest::Guest;
use crate::schema::{Command, Run, Type, optional, required};

const FILESYSTEM: Type = Type::Object(&[
    required("name", Type::Str),
    required("mountpoint", Type::Str),
    required("type", Type::Str),
    optional("used-bytes", Type::Int),
    optional("total-bytes", Type::Int),
    optional("total-bytes-privileged", Type::Int),
    required("disk", Type::Array(&DISK_ADDRESS)),
]);

const TRIMMED: Type = Type::Object(&[required(
    "paths",
    Type::Array(&Type::Object(&[
        required("path", Type::Str),
        optional("trimmed", Type::Int),
        optional("minimum", Type::Int),
        optional("error", Type::Str),
    ])),
)]);

pub(crate) const COMMANDS: &[Command] = &[
    Command::new(
        "guest-get-fsinfo",
        "The filesystems on block devices, how full they are, and the disks they are on",
        Run::Worker(get_fsinfo),
    )
    .returns(Type::Array(&FILESYSTEM)),
    Command::new(
        "guest-fstrim",
        "Discards what filesystems do not use, in pieces of at least minimum bytes",
        Run::Worker(fstrim),
    )
    .takes(&[optional("minimum", Type::Int)])
    .returns(TRIMMED),
];

/// Most devices below a filesystem that are looked at.
const DEVICES: usize = 256;

/// `_IOWR('X', 121, struct fstrim_range)` (Linux `include/uapi/linux/fs.h`).
const FITRIM: libc::Ioctl = 0xC018_5879;

/// `struct fstrim_range`.
#[repr(C)]
struct Range {
    start: u64,
    length: u64,
    minimum: u64,
}

fn get_fsinfo(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    let root = Root::guest();
    let info = |superblock: &Superblock| {
        let usage = open(superblock).and_then(|directory| Ok(fstatvfs(directory)?)).ok();
        filesystem(&root, superblock, usage.as_ref())
    };
    Ok(mounted()?.iter().map(info).collect())
}

/// The filesystems on block devices.
fn mounted() -> Result<Vec<Superblock>, Error> {
    let survey = Engine::new(Linux).survey().map_err(|error| Error::generic(error.text()))?;
    Ok(survey.superblocks)
}

/// By whichever of its mounts can be reached; the error is the first one's. One that is hidden is left
/// alone: what is asked here is worth no more.
fn open(superblock: &Superblock) -> io::Result<OwnedFd> {
    let mut failure = None;
    for mount in superblock.mounts() {
        match Linux.open(&mount.mountpoint, mount.id) {
            Ok(directory) => return Ok(directory),
            Err(error) => {
                failure.get_or_insert(error);
            }
        }
    }
    Err(failure.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
}

fn filesystem(root: &Root, superblock: &Superblock, usage: Option<&StatVfs>) -> Value {
    let (major, minor) = superblock.device();
    let number = format!("{major}:{minor}");
    let device = BlockDevice::find(root, format!("/sys/dev/block/{number}"));
    let name = device.as_ref().and_then(BlockDevice::name).unwrap_or(&number);
    let disks = device.as_ref().map(|device| disks_below(root, device)).unwrap_or_default();
    let mut info = Map::from_iter([
        ("name".into(), name.into()),
        ("mountpoint".into(), superblock.mountpoint().to_string_lossy().into()),
        ("type".into(), superblock.fstype().into()),
        ("disk".into(), disks.into()),
    ]);
    if let Some(usage) = usage {
        info.extend(bytes(usage).map(|(member, bytes)| (member.to_owned(), bytes.into())));
    }
    Value::Object(info)
}

/// Without privileges a part of the free space cannot be had, and does not count.
fn bytes(usage: &StatVfs) -> [(&'static str, u64); 3] {
    let bytes = |blocks: u64| blocks.saturating_mul(usage.f_frsize);
    let used = usage.f_blocks.saturating_sub(usage.f_bfree);
    [
        ("used-bytes", bytes(used)),
        ("total-bytes", bytes(used.saturating_add(usage.f_bavail))),
        ("total-bytes-privileged", bytes(usage.f_blocks)),
    ]
}

/// The disks at the bottom of a stack of devices, each once.
fn disks_below(root: &Root, device: &BlockDevice) -> Vec<Value> {
    let mut seen = vec![device.clone()];
    let mut disks = Vec::new();
    let mut next = 0;
    while let Some(device) = seen.get(next) {
        next += 1;
        match device.address(root) {
            Some(address) => disks.push(address),
            None => {
                for slave in device.slaves(root) {
                    if seen.len() < DEVICES && !seen.contains(&slave) {
                        seen.push(slave);
                    }
                }
            }
        }
    }
    disks
}

fn fstrim(_: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let minimum = args.optional_int("minimum")?.unwrap_or(0);
    args.finish()?;
    let superblocks = mounted()?;
    let path = |superblock: &Superblock| {
        let path = superblock.mountpoint().to_string_lossy();
        let mut result = trimmed(open(superblock), |directory| trim(directory, minimum.cast_unsigned()));
        result["path"] = path.into();
        result
    };
    Ok(json!({"paths": superblocks.iter().map(path).collect::<Vec<_>>()}))
}

/// What became of one filesystem.
fn trimmed<H>(opened: io::Result<H>, trim: impl FnOnce(&H) -> io::Result<(u64, u64)>) -> Value {
    let directory = match opened {
        Ok(directory) => directory,
        Err(error) => return json!({"error": format!("failed to open: {}", errno_text(&error))}),
    };
    match trim(&directory) {
        Ok((trimmed, minimum)) => json!({"trimmed": trimmed, "minimum": minimum}),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EOPNOTSUPP)) => {
            json!({"error": "trim not supported"})
        }
        Err(error) => json!({"error": format!("failed to trim: {}", errno_text(&error))}),
    }
}

/// Bytes that were discarded, and the least length that the device allowed.
fn trim(directory: &OwnedFd, minimum: u64) -> io::Result<(u64, u64)> {
    let mut range = Range { start: 0, length: u64::MAX, minimum };
    // SAFETY: the structure is the request's, and lives until the call returns; so does the descriptor.
    let result = unsafe { libc::ioctl(directory.as_raw_fd(), FITRIM, &raw mut range) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok((range.length, range.minimum)) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::commands::disk_address::tests::Machine;
    use crate::freeze::survey;

    const MOUNTINFO: &[u8] = b"\
27 22 254:0 / /a rw,relatime - ext4 /dev/vda rw
28 27 253:0 / /a/b\\040- rw,relatime shared:1 master:2 - xfs /dev/dm-0 rw
29 22 7:0 / /loop rw - ext4 /dev/loop0 rw
30 22 9:9 / /gone rw - ext4 /dev/gone rw
";

    fn all(machine: &Machine, usage: Option<&StatVfs>) -> Vec<Value> {
        let superblocks = survey(MOUNTINFO, |_| None).superblocks;
        let values = superblocks.iter().map(|superblock| filesystem(&machine.root, superblock, usage));
        let values: Vec<Value> = values.collect();
        Type::Array(&FILESYSTEM).check(&values.clone().into()).unwrap();
        values
    }

    #[test]
    fn filesystems_are_told_with_the_disks_below_them() {
        let machine = Machine::new();
        machine.device("/sys/devices/LNRO0005:00/virtio0/block/vda", "254:0", &[("serial", "s1")]);
        machine.device("/sys/devices/LNRO0005:01/virtio1/block/vdb", "254:16", &[]);
        machine.device("/sys/devices/virtual/block/dm-0", "253:0", &[]);
        machine.device("/sys/devices/virtual/block/dm-1", "253:1", &[]);
        machine.device("/sys/devices/virtual/block/loop0", "7:0", &[]);
        for (upper, lower) in [
            ("dm-0", "../../dm-1"),
            ("dm-0", "../../../../LNRO0005:00/virtio0/block/vda"),
            ("dm-1", "../../../../LNRO0005:01/virtio1/block/vdb"),
            ("dm-1", "../../../../LNRO0005:00/virtio0/block/vda"),
            // A kernel that knew itself would not say so.
            ("dm-1", "../../dm-1"),
        ] {
            let name = lower.rsplit('/').next().unwrap();
            let link = format!("/sys/devices/virtual/block/{upper}/slaves/{name}");
            symlink(lower, machine.root.join(link)).unwrap();
        }
        let values = all(&machine, None);
        let told = |value: &Value| {
            let disks = value["disk"].as_array().unwrap().iter();
            let disks: Vec<String> = disks.map(|disk| disk["dev"].as_str().unwrap().to_owned()).collect();
            let text = |member: &str| value[member].as_str().unwrap().to_owned();
            (text("name"), text("mountpoint"), text("type"), disks.join(" "))
        };
        let expected = [
            ("vda", "/a", "ext4", "/dev/vda"),
            ("dm-0", "/a/b -", "xfs", "/dev/vda /dev/vdb"),
            ("loop0", "/loop", "ext4", ""),
            ("9:9", "/gone", "ext4", ""),
        ];
        for (value, expected) in values.iter().zip(expected) {
            let (name, mountpoint, kind, disks) = told(value);
            assert_eq!((&*name, &*mountpoint, &*kind, &*disks), expected);
        }
        assert_eq!(values[0]["disk"][0]["serial"], "s1");
        assert_eq!(values[0].get("used-bytes"), None);
    }

    #[test]
    fn what_is_reserved_for_root_is_not_in_the_total() {
        let machine = Machine::new();
        let usage = fstatvfs(std::fs::File::open("/").unwrap()).unwrap();
        let value = &all(&machine, Some(&usage))[0];
        let bytes = |member: &str| value[member].as_u64().unwrap();
        assert!(bytes("used-bytes") <= bytes("total-bytes"));
        assert!(bytes("total-bytes") <= bytes("total-bytes-privileged"));
    }

    #[test]
    fn each_path_says_what_became_of_it() {
        let error = |number| io::Error::from_raw_os_error(number);
        let trim = |result| trimmed(Ok(()), |()| result);
        let mut cases = [
            (trim(Ok((4096, 512))), json!({"trimmed": 4096, "minimum": 512})),
            (trim(Err(error(libc::ENOTTY))), json!({"error": "trim not supported"})),
            (trim(Err(error(libc::EOPNOTSUPP))), json!({"error": "trim not supported"})),
            (trim(Err(error(libc::EROFS))), json!({"error": "failed to trim: Read-only file system"})),
            (
                trimmed(Err::<(), _>(error(libc::EACCES)), |()| Ok((0, 0))),
                json!({"error": "failed to open: Permission denied"}),
            ),
        ];
        for (value, expected) in &mut cases {
            assert_eq!(value, expected);
            value["path"] = "/a".into();
            TRIMMED.check(&json!({"paths": [value]})).unwrap();
        }
    }

    #[test]
    fn what_is_no_filesystem_cannot_be_trimmed() {
        let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        assert_eq!(trimmed(Ok(null), |null| trim(null, 0)), json!({"error": "trim not supported"}));
    }
}
