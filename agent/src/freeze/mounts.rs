//! What is mounted, as far as it can be frozen: a pure function of `/proc/self/mountinfo`.
//!
//! A line reads (Linux `Documentation/filesystems/proc.rst`, section 3.5):
//!
//! ```text
//! 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
//! id parent dev root point options  optional…  type source  superblock options
//! ```

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::label::Label;

/// A device number: major, minor.
pub(crate) type Device = (u32, u32);

/// One place where a filesystem can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    /// The mount's id, as statx(2) gives it.
    pub(crate) id: u64,
    /// The id of the mount it is mounted on.
    pub(crate) parent: u64,
    pub(crate) mountpoint: PathBuf,
}

/// One filesystem on a block device, with all its mounts in the order of mounting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    identity: Device,
    device: Device,
    fstype: String,
    writable: bool,
    first: Mount,
    others: Vec<Mount>,
}

impl Superblock {
    /// What the kernel calls it (`s_dev`): two mounts with the same one are the same filesystem.
    pub(crate) fn identity(&self) -> Device {
        self.identity
    }

    /// The block device it is on, or the one of them it is mounted by.
    pub(crate) fn device(&self) -> Device {
        self.device
    }

    pub(crate) fn fstype(&self) -> &str {
        &self.fstype
    }

    /// Whether it can be written to through any of its mounts.
    pub(crate) fn is_writable(&self) -> bool {
        self.writable
    }

    /// Where it was mounted first; its name in messages.
    pub(crate) fn mountpoint(&self) -> &Path {
        &self.first.mountpoint
    }

    pub(super) fn label(&self) -> Label {
        Label {
            mountpoint: self.mountpoint().to_owned(),
            identity: self.identity,
            device: self.device,
            fstype: self.fstype.clone(),
        }
    }

    pub(crate) fn mounts(&self) -> impl Iterator<Item = &Mount> {
        std::iter::once(&self.first).chain(&self.others)
    }
}

/// As far as a label tells: mounted once, somewhere.
impl From<Label> for Superblock {
    fn from(Label { mountpoint, identity, device, fstype }: Label) -> Self {
        let first = Mount { id: 0, parent: 0, mountpoint };
        Self { identity, device, fstype, writable: true, first, others: Vec::new() }
    }
}

/// A filesystem that holds files and has no block device to freeze it by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Other {
    pub(crate) mountpoint: PathBuf,
    pub(crate) fstype: String,
}

/// What is mounted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Survey {
    /// The filesystems on block devices, each once, in the order of their first mounts.
    pub(crate) superblocks: Vec<Superblock>,
    /// The writable ones on something else, network filesystems for example.
    pub(crate) others: Vec<Other>,
}

/// Filesystems that hold nothing that outlives the machine.
const VOLATILE: &[&str] = &[
    "autofs",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "hugetlbfs",
    "mqueue",
    "nsfs",
    "proc",
    "pstore",
    "ramfs",
    "rootfs",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "sysfs",
    "tmpfs",
    "tracefs",
];

/// Sorts the mounts of `mountinfo` by filesystem.
///
/// Filesystems without a device of their own (major number 0: tmpfs, proc, overlay, network
/// filesystems) cannot be frozen, but for btrfs: it numbers its superblocks so too, and is on the
/// device it is mounted from, for which `block_device` is asked.
pub(crate) fn survey(mountinfo: &[u8], block_device: impl Fn(&Path) -> Option<Device>) -> Survey {
    let mut survey = Survey::default();
    for line in mountinfo.split(|&byte| byte == b'\n').filter_map(Line::parse) {
        let device = match line.device {
            (0, _) if line.fstype == "btrfs" => block_device(&line.source),
            (0, _) => None,
            device => Some(device),
        };
        let known = |superblock: &&mut Superblock| superblock.identity == line.device;
        let Some(device) = device else {
            if line.writable && !VOLATILE.contains(&line.fstype.as_str()) {
                survey.others.push(Other { mountpoint: line.mount.mountpoint, fstype: line.fstype });
            }
            continue;
        };
        match survey.superblocks.iter_mut().find(known) {
            Some(superblock) => {
                superblock.writable |= line.writable;
                superblock.others.push(line.mount);
            }
            None => survey.superblocks.push(Superblock {
                identity: line.device,
                device,
                fstype: line.fstype,
                writable: line.writable,
                first: line.mount,
                others: Vec::new(),
            }),
        }
    }
    survey
}

/// Every mount point, in the order of mounting.
pub(crate) fn mountpoints(mountinfo: &[u8]) -> Vec<PathBuf> {
    let lines = mountinfo.split(|&byte| byte == b'\n').filter_map(Line::parse);
    lines.map(|line| line.mount.mountpoint).collect()
}

/// A line of the file.
pub(super) struct Line {
    pub(super) device: Device,
    fstype: String,
    source: PathBuf,
    writable: bool,
    pub(super) mount: Mount,
}

impl Line {
    /// `None` for a line that is not as documented; the kernel writes none.
    pub(super) fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|&byte| byte == b' ');
        let id = number(fields.next()?)?;
        let parent = number(fields.next()?)?;
        let device = fields.next()?;
        let colon = device.iter().position(|&byte| byte == b':')?;
        let device = (number(&device[..colon])?, number(&device[colon + 1..])?);
        let _root = fields.next()?;
        let mountpoint = unescape(fields.next()?);
        let options = fields.next()?;
        let mut fields = fields.skip_while(|&field| field != b"-").skip(1);
        let fstype = String::from_utf8_lossy(fields.next()?).into_owned();
        let source = unescape(fields.next()?);
        let is_writable = |options: &[u8]| options.split(|&byte| byte == b',').any(|option| option == b"rw");
        let writable = is_writable(options) && fields.next().is_none_or(is_writable);
        Some(Self { device, fstype, source, writable, mount: Mount { id, parent, mountpoint } })
    }
}

fn number<T: std::str::FromStr>(digits: &[u8]) -> Option<T> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Space, tab, newline and backslash come as three octal digits after a backslash.
fn unescape(field: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [byte, tail @ ..] = rest {
        rest = match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] => {
                path.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                tail
            }
            _ => {
                path.push(*byte);
                tail
            }
        };
    }
    OsString::from_vec(path).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The machine of the recorded freeze dialogues: ext4 with a loop-mounted ext4 inside, xfs with a
    /// bind mount, a read-only ext4, btrfs mounted twice, vfat, overlay, squashfs.
    pub(crate) const RECORDED: &str = "\
22 1 0:2 / / rw - rootfs rootfs rw
23 22 0:21 / /proc rw,relatime - proc proc rw
27 22 254:0 / /a rw,relatime - ext4 /dev/vda rw
28 27 7:0 / /a/lm rw,relatime - ext4 /dev/loop0 rw
29 22 254:16 / /x rw,relatime shared:1 - xfs /dev/vdb rw,attr2
30 22 254:16 /sub /bx rw,relatime shared:1 master:2 - xfs /dev/vdb rw,attr2
31 22 254:32 / /ro ro,relatime - ext4 /dev/vdc ro
33 22 254:64 / /v rw,relatime - vfat /dev/vde rw,errors=remount-ro
34 22 0:25 / /b rw,relatime - btrfs /dev/vdd rw,subvolid=5,subvol=/
35 22 0:25 / /b2 rw,relatime - btrfs /dev/vdd rw,subvolid=5,subvol=/
38 22 0:27 / /ov rw,relatime - overlay ov rw,lowerdir=/a/l
39 22 254:80 / /sq rw,relatime - squashfs /dev/vdf ro,errors=continue
";

    fn found(text: &str) -> Vec<(Device, Vec<String>)> {
        let vdd = |path: &Path| (path == Path::new("/dev/vdd")).then_some((254, 48));
        let found = survey(text.as_bytes(), vdd).superblocks;
        let shown = |superblock: &Superblock| {
            let mounts = superblock.mounts().map(|mount| mount.mountpoint.display().to_string());
            (superblock.device(), mounts.collect())
        };
        found.iter().map(shown).collect()
    }

    #[test]
    fn each_superblock_is_found_once_with_all_its_mounts() {
        let expected = [
            ((254, 0), vec!["/a"]),
            ((7, 0), vec!["/a/lm"]),
            ((254, 16), vec!["/x", "/bx"]),
            ((254, 32), vec!["/ro"]),
            ((254, 64), vec!["/v"]),
            ((254, 48), vec!["/b", "/b2"]),
            ((254, 80), vec!["/sq"]),
        ];
        assert_eq!(
            found(RECORDED),
            expected.map(|(device, mounts)| { (device, mounts.into_iter().map(str::to_owned).collect()) })
        );
    }

    #[test]
    fn btrfs_is_left_out_if_its_source_is_no_block_device() {
        assert_eq!(found("34 22 0:25 / /b rw - btrfs /dev/root rw"), []);
    }

    #[test]
    fn what_can_be_written_and_not_frozen_is_named() {
        let text =
            format!("{RECORDED}40 22 0:40 / /nfs rw - nfs4 host:/x rw\n41 22 0:41 / /p ro - 9p p rw\n");
        let survey = survey(text.as_bytes(), |_| Some((254, 48)));
        let others: Vec<_> = survey
            .others
            .iter()
            .map(|other| (other.mountpoint.to_str().unwrap(), other.fstype.as_str()))
            .collect();
        assert_eq!(others, [("/ov", "overlay"), ("/nfs", "nfs4")]);
        let writable = survey.superblocks.iter().filter(|superblock| superblock.is_writable());
        let writable: Vec<_> = writable.map(|superblock| superblock.mountpoint().to_str().unwrap()).collect();
        assert_eq!(writable, ["/a", "/a/lm", "/x", "/v", "/b"]);
    }

    #[test]
    fn btrfs_on_several_devices_is_one_filesystem() {
        let text = "34 22 0:25 / /b rw - btrfs /dev/vdd rw\n35 22 0:25 /s /b2 rw - btrfs /dev/vde rw\n";
        let survey = survey(text.as_bytes(), |path| Some((254, u32::from(path == Path::new("/dev/vde")))));
        assert_eq!(survey.superblocks.len(), 1);
        assert_eq!(survey.superblocks[0].mounts().count(), 2);
    }

    #[test]
    fn escaped_characters_in_paths_are_restored() {
        let text = r"29 22 254:16 / /a\040b\011c\134d\012e rw - xfs /dev/vdb rw";
        assert_eq!(found(text), [((254, 16), vec!["/a b\tc\\d\ne".into()])]);
        assert_eq!(unescape(br"\04x\999\"), Path::new(r"\04x\999\"));
    }

    #[test]
    fn lines_that_are_not_as_documented_are_skipped() {
        for text in ["", "\n\n", "1 2 3", "29 22 254 / /x rw - xfs /dev/vdb rw", "29 22 254:16 / /x rw xfs"] {
            assert_eq!(found(text), [], "{text}");
        }
    }
}
