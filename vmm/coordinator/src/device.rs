//! Which block device it is. Its number and the kernel's name for it are given out anew whenever the machine starts or a
//! device is attached again: `/dev/dm-4` of today is somebody else's tomorrow. What a device *is* stands in sysfs:
//!
//! | device | is |
//! |---|---|
//! | loop | the file behind it: `loop:FILE@OFFSET` |
//! | partition | its disk, and its number in it: `DISK-partN` |
//! | device mapper (LVM, crypt, multipath, …) | its UUID, else `dm-name:NAME` |
//! | NVMe, SCSI, MD | its world-wide or universal identifier |
//! | virtio-blk | its serial number, if it is the only one that has it, else where it is plugged in: `at:0000:00:04.0` |
//! | others (nbd, …) | nothing that would tell it from another one |

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

const LOOP: &str = "loop:";

/// The number of the block device that `path` leads to; `None` if it leads to something else.
///
/// # Errors
/// It leads nowhere, or cannot be looked at.
pub fn number(path: &Path) -> io::Result<Option<u64>> {
    let metadata = fs::metadata(path)?;
    Ok(metadata.file_type().is_block_device().then(|| metadata.rdev()))
}

/// What the block device of this number is, as far as this machine can tell.
pub fn identity(number: u64) -> Option<String> {
    Sysfs::HOST.identity(&Sysfs::HOST.directory(number)?)
}

/// What the block device at `path` is; `None` also if there is none.
pub(crate) fn identity_at(path: &Path) -> Option<String> {
    number(path).ok().flatten().and_then(identity)
}

/// The names under which the kernel has devices of this identity, in `/dev`.
pub(crate) fn find(identity: &str) -> Vec<PathBuf> {
    let found = Sysfs::HOST.find(identity).into_iter().map(|name| Path::new("/dev").join(name));
    found.filter(|path| identity_at(path).as_deref() == Some(identity)).collect()
}

/// The file that a loop device of this identity shows the whole of.
pub(crate) fn file_behind(identity: &str) -> Option<&Path> {
    identity.strip_prefix(LOOP)?.strip_suffix("@0").map(Path::new)
}

/// What is lost when the machine ends: the device itself, or the file behind it, which the caller has to look at.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Keeps {
    /// Nothing, or what nobody here knows of.
    All,
    /// As much as this file.
    AsFile(PathBuf),
    /// It is memory.
    Nothing,
}

/// What the block device of this number keeps.
pub(crate) fn keeps(number: u64) -> Keeps {
    let Some(directory) = Sysfs::HOST.directory(number) else { return Keeps::All };
    if let Some(file) = said(&directory, "loop/backing_file") {
        return Keeps::AsFile(file.into());
    }
    let name = directory.file_name().unwrap_or_default().to_string_lossy();
    if name.starts_with("ram") || name.starts_with("zram") { Keeps::Nothing } else { Keeps::All }
}

/// Bytes in one block of the device of this number, if it can be told.
pub(crate) fn block_size(number: u64) -> Option<u64> {
    let directory = Sysfs::HOST.directory(number)?;
    // A partition has no queue of its own.
    let queues = ["queue/logical_block_size", "../queue/logical_block_size"];
    queues.iter().find_map(|queue| said(&directory, queue)).and_then(|text| text.parse().ok())
}

/// The contents of a small file, if there are any.
fn said(directory: &Path, file: &str) -> Option<String> {
    let text = fs::read_to_string(directory.join(file)).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

struct Sysfs<'a>(&'a str);

impl Sysfs<'_> {
    const HOST: Self = Sysfs("/sys");

    /// Where a device has its attributes.
    fn directory(&self, number: u64) -> Option<PathBuf> {
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        fs::canonicalize(format!("{}/dev/block/{major}:{minor}", self.0)).ok()
    }

    fn identity(&self, directory: &Path) -> Option<String> {
        if let Some(part) = said(directory, "partition") {
            return self.identity(directory.parent()?).map(|disk| format!("{disk}-part{part}"));
        }
        if let Some(file) = said(directory, "loop/backing_file") {
            let number = |name| said(directory, name).unwrap_or_else(|| "0".to_owned());
            let (offset, limit) = (number("loop/offset"), number("loop/sizelimit"));
            let limit = if limit == "0" { String::new() } else { format!("+{limit}") };
            return Some(format!("{LOOP}{file}@{offset}{limit}"));
        }
        let files = ["dm/uuid", "wwid", "device/wwid", "md/uuid"];
        let own = files.iter().find_map(|file| said(directory, file));
        let named = || said(directory, "dm/name").map(|name| format!("dm-name:{name}"));
        // Users choose it, and need not choose well.
        let serial = || said(directory, "serial").filter(|serial| self.has_one(serial));
        let place = || plugged_in(directory).map(|place| format!("at:{place}"));
        own.or_else(named).or_else(serial).or_else(place)
    }

    fn has_one(&self, serial: &str) -> bool {
        let has_it = |directory: &PathBuf| said(directory, "serial").as_deref() == Some(serial);
        self.all().map(|entry| entry.path()).filter(has_it).count() == 1
    }

    fn all(&self) -> impl Iterator<Item = fs::DirEntry> + use<> {
        fs::read_dir(format!("{}/class/block", self.0)).into_iter().flatten().flatten()
    }

    /// The kernel's names of all devices of an identity, partitions too.
    fn find(&self, identity: &str) -> Vec<String> {
        let is_it = |directory: PathBuf| self.identity(&directory).as_deref() == Some(identity);
        let found = self.all().filter(|entry| fs::canonicalize(entry.path()).is_ok_and(is_it));
        // A slash in a name is a `!` here.
        let mut names: Vec<_> =
            found.map(|entry| entry.file_name().to_string_lossy().replace('!', "/")).collect();
        names.sort();
        names
    }
}

/// The bus address of a virtio device: `…/0000:00:04.0/virtio1/block/vda`.
fn plugged_in(directory: &Path) -> Option<String> {
    let names: Vec<_> = directory.iter().map(|name| name.to_string_lossy()).collect();
    let is_virtio = |name: &str| {
        let number = name.strip_prefix("virtio");
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let at = names.iter().position(|name| is_virtio(name))?;
    names.get(at.checked_sub(1)?).map(|name| name.clone().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sysfs of files.
    struct Machine(tempfile::TempDir);

    impl Machine {
        fn new() -> Self {
            let base = tempfile::tempdir().unwrap();
            fs::create_dir_all(base.path().join("class/block")).unwrap();
            fs::create_dir_all(base.path().join("dev/block")).unwrap();
            Self(base)
        }

        fn add(&self, number: &str, directory: &str, files: &[(&str, &str)]) {
            let directory = self.0.path().join("devices").join(directory);
            fs::create_dir_all(&directory).unwrap();
            for (file, text) in files {
                fs::create_dir_all(directory.join(file).parent().unwrap()).unwrap();
                fs::write(directory.join(file), format!("{text}\n")).unwrap();
            }
            let name = directory.file_name().unwrap();
            for link in
                [self.0.path().join("class/block").join(name), self.0.path().join("dev/block").join(number)]
            {
                std::os::unix::fs::symlink(&directory, link).unwrap();
            }
        }

        fn identity(&self, minor: u32) -> Option<String> {
            let sysfs = Sysfs(self.0.path().to_str().unwrap());
            sysfs.identity(&sysfs.directory(rustix::fs::makedev(8, minor))?)
        }
    }

    #[test]
    fn a_device_is_known_by_what_it_keeps_when_the_machine_starts_again() {
        let machine = Machine::new();
        let virtual_ = |name: &str| format!("virtual/block/{name}");
        let uuid = "LVM-A1b2";
        machine.add("8:0", &virtual_("dm-4"), &[("dm/uuid", uuid), ("dm/name", "vg-web")]);
        machine.add("8:1", &virtual_("dm-5"), &[("dm/uuid", ""), ("dm/name", "plain")]);
        let sda = "pci0000:00/0000:00:1f.2/ata1/host0/target0:0:0/0:0:0:0/block/sda";
        machine.add("8:2", sda, &[("device/wwid", "naa.5001"), ("size", "1")]);
        machine.add("8:3", &format!("{sda}/sda2"), &[("partition", "2")]);
        machine.add("8:4", "pci0000:00/0000:00:04.0/virtio1/block/vda", &[("serial", "")]);
        machine.add("8:5", "pci0000:00/0000:00:05.0/virtio2/block/vdb", &[("serial", "db-1")]);
        let file = [("loop/backing_file", "/img/a b.raw"), ("loop/offset", "0"), ("loop/sizelimit", "0")];
        machine.add("8:6", &virtual_("loop0"), &file);
        let part = [("loop/backing_file", "/img/a"), ("loop/offset", "512"), ("loop/sizelimit", "1024")];
        machine.add("8:7", &virtual_("loop1"), &part);
        machine.add("8:8", &virtual_("nbd0"), &[]);
        for (number, place) in [("8:9", "6"), ("8:10", "7")] {
            let directory = format!("pci0000:00/0000:00:0{place}.0/virtio{place}/block/vd{place}");
            machine.add(number, &directory, &[("serial", "twin")]);
        }
        let known = [
            Some(uuid),
            Some("dm-name:plain"),
            Some("naa.5001"),
            Some("naa.5001-part2"),
            Some("at:0000:00:04.0"),
            Some("db-1"),
            Some("loop:/img/a b.raw@0"),
            Some("loop:/img/a@512+1024"),
            None,
            Some("at:0000:00:06.0"),
            Some("at:0000:00:07.0"),
            None,
        ];
        for (minor, expected) in known.iter().enumerate() {
            assert_eq!(machine.identity(u32::try_from(minor).unwrap()).as_deref(), *expected, "8:{minor}");
        }
        let found = Sysfs(machine.0.path().to_str().unwrap());
        assert_eq!(found.find("naa.5001-part2"), ["sda2"]);
        assert_eq!(found.find("naa.5002"), Vec::<String>::new());
        assert_eq!(file_behind("loop:/img/a b.raw@0"), Some(Path::new("/img/a b.raw")));
        for other in ["loop:/img/a@512+1024", "loop:/img/a@0-part1", uuid] {
            assert_eq!(file_behind(other), None);
        }
    }

    #[test]
    fn what_is_no_block_device_has_no_number() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(number(file.path()).unwrap(), None);
        assert_eq!(number(Path::new("/dev/null")).unwrap(), None);
        assert!(number(Path::new("/dev/none")).is_err());
        assert_eq!(identity_at(file.path()), None);
    }
}
