//! The filesystems every guest has, and those the command line asks for.

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};

use super::cmdline::{DeviceName, MountSpec};
use super::uevents::Uevents;
use super::{modules, say};
use crate::freeze::mountpoints;

/// How long a device may take to appear.
const APPEARING: Duration = Duration::from_secs(10);
/// One line per mount that failed, for whoever asks later.
const FAILURES: &str = "/run/tarn/mount-failures";

const RESTRICTED: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
const NO_DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

/// Type, directory, flags, data.
const BASE: &[(&str, &str, MountFlags, &str)] = &[
    ("proc", "/proc", RESTRICTED, ""),
    ("sysfs", "/sys", RESTRICTED, ""),
    ("devtmpfs", "/dev", MountFlags::NOSUID, "mode=0755"),
    ("devpts", "/dev/pts", MountFlags::NOSUID.union(MountFlags::NOEXEC), "mode=0620,ptmxmode=0666"),
    ("tmpfs", "/dev/shm", NO_DEVICES, "mode=1777"),
    ("tmpfs", "/run", NO_DEVICES, "mode=0755"),
    ("tmpfs", "/tmp", NO_DEVICES, "mode=1777"),
];

/// Names that programs expect below /dev.
const LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// mount(8)'s words for flags. The others are for the filesystem.
const FLAGS: &[(&str, MountFlags)] = &[
    ("rw", MountFlags::empty()),
    ("defaults", MountFlags::empty()),
    ("ro", MountFlags::RDONLY),
    ("noatime", MountFlags::NOATIME),
    ("nodiratime", MountFlags::NODIRATIME),
    ("relatime", MountFlags::RELATIME),
    ("strictatime", MountFlags::STRICTATIME),
    ("lazytime", MountFlags::LAZYTIME),
    ("nosuid", MountFlags::NOSUID),
    ("nodev", MountFlags::NODEV),
    ("noexec", MountFlags::NOEXEC),
    ("sync", MountFlags::SYNCHRONOUS),
    ("dirsync", MountFlags::DIRSYNC),
];

/// Directories whose mounts carry the system to its very end.
const KEPT: &[&str] = &["/", "/proc", "/sys", "/dev", "/dev/pts"];

/// Mounts what every program expects. What is mounted already stays.
pub(super) fn mount_base() {
    for &(fstype, directory, flags, data) in BASE {
        let _ = fs::create_dir_all(directory);
        match mount_at(fstype, Path::new(directory), fstype, flags, data) {
            Err(error) if error.kind() != ErrorKind::ResourceBusy => {
                say!("cannot mount {fstype} on {directory}: {error}");
            }
            _ => {}
        }
    }
    for (target, link) in LINKS {
        let _ = symlink(target, link);
    }
}

/// Mounts what the command line asks for. A failure is printed and recorded; the guest comes up all
/// the same, so that somebody can look.
pub(super) fn mount(spec: &MountSpec, uevents: &mut Uevents) {
    modules::load_named(&spec.fstype);
    let mounted = wait_for(&spec.device, uevents).and_then(|device| {
        fs::create_dir_all(&spec.directory)?;
        let (flags, data) = flags(&spec.options);
        mount_at(&device.to_string_lossy(), &spec.directory, &spec.fstype, flags, &data).map_err(named)
    });
    if let Err(error) = mounted {
        let line = format!(
            "cannot mount {} on {} as {}: {error}",
            spec.device,
            spec.directory.display(),
            spec.fstype
        );
        say!("{line}");
        if let Err(error) = record(&line) {
            say!("cannot record that: {error}");
        }
    }
}

/// The errors of mount(2) whose usual texts say something else.
fn named(error: io::Error) -> io::Error {
    let text = match error.raw_os_error() {
        Some(libc::ENODEV) => "the kernel does not know this filesystem",
        Some(libc::EINVAL) => "no such filesystem on the device, or an option it does not take",
        _ => return error,
    };
    io::Error::new(error.kind(), text)
}

impl std::fmt::Display for DeviceName {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(formatter),
            Self::Serial(id) => write!(formatter, "serial:{id}"),
        }
    }
}

fn record(line: &str) -> io::Result<()> {
    fs::create_dir_all("/run/tarn")?;
    writeln!(OpenOptions::new().append(true).create(true).open(FAILURES)?, "{line}")
}

fn mount_at(source: &str, directory: &Path, fstype: &str, flags: MountFlags, data: &str) -> io::Result<()> {
    let data = CString::new(data)?;
    Ok(rustix::mount::mount(source, directory, fstype, flags, data.as_c_str())?)
}

/// Splits options into flags and the filesystem's own.
fn flags(options: &str) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut data = Vec::new();
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match FLAGS.iter().find(|(name, _)| *name == option) {
            Some((_, flag)) => flags |= *flag,
            None => data.push(option),
        }
    }
    (flags, data.join(","))
}

/// The device's node, once it is there.
pub(super) fn wait_for(device: &DeviceName, uevents: &mut Uevents) -> io::Result<PathBuf> {
    let deadline = Instant::now() + APPEARING;
    loop {
        let found = match device {
            DeviceName::Path(path) => path.exists().then(|| path.clone()),
            DeviceName::Serial(id) => by_serial(id),
        };
        if let Some(path) = found {
            return Ok(path);
        }
        if !uevents.wait_until(deadline) {
            let text = format!("no such device within {} s", APPEARING.as_secs());
            return Err(io::Error::new(ErrorKind::TimedOut, text));
        }
    }
}

fn by_serial(id: &str) -> Option<PathBuf> {
    let disks = fs::read_dir("/sys/block").ok()?;
    let named = |disk: fs::DirEntry| {
        let serial = fs::read_to_string(disk.path().join("serial")).ok()?;
        (serial.trim() == id).then(|| Path::new("/dev").join(disk.file_name()))
    };
    disks.filter_map(Result::ok).find_map(named).filter(|path| path.exists())
}

/// Unmounts everything that can be, last mounted first.
pub(super) fn unmount_all() {
    let mut rest = still_mounted();
    // One may be busy because of another that was mounted before it: a second try is worth it.
    for _ in 0..2 {
        rest.retain(|directory| unmount(directory, UnmountFlags::NOFOLLOW).is_err());
    }
}

/// Unmounts what is left by now, or makes it read-only.
pub(super) fn make_read_only() {
    for directory in still_mounted() {
        if unmount(&directory, UnmountFlags::NOFOLLOW).is_ok() {
            continue;
        }
        if let Err(error) = mount_remount(&directory, MountFlags::RDONLY, "") {
            say!("{} stays mounted: {error}", directory.display());
        }
    }
}

/// Mount points to be unmounted, last mounted first.
fn still_mounted() -> Vec<PathBuf> {
    let Ok(text) = fs::read("/proc/self/mountinfo") else { return Vec::new() };
    let is_kept = |directory: &PathBuf| KEPT.iter().any(|kept| directory == Path::new(kept));
    mountpoints(&text).into_iter().rev().filter(|directory| !is_kept(directory)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_or_the_filesystems_own() {
        let (set, data) = flags("ro,noatime,discard,subvol=/a,,defaults");
        assert_eq!(set, MountFlags::RDONLY | MountFlags::NOATIME);
        assert_eq!(data, "discard,subvol=/a");
        assert_eq!(flags(""), (MountFlags::empty(), String::new()));
    }
}
