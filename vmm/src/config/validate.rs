//! Whether a [`VmSpec`] can be a VM at all, decided without opening anything.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use super::{FaultSpec, VmSpec, format_size};

/// vCPUs of one VM.
pub const MAX_CPUS: u8 = 32;
/// Request queues of one disk.
pub const MAX_DISK_QUEUES: u8 = 16;
/// Bytes of a kernel command line without its NUL (`COMMAND_LINE_SIZE` is 2048 on x86).
pub const MAX_CMDLINE: usize = 2047;
/// Bytes of a unix socket's path without its NUL (`sun_path`, unix(7)).
pub const MAX_SOCKET_PATH: usize = 107;
/// Bytes of a disk's serial (`VIRTIO_BLK_ID_BYTES`).
pub const MAX_SERIAL: usize = 20;
/// The agent port's name; no further channel may take it.
pub const AGENT_PORT: &str = "org.qemu.guest_agent.0";

/// Least guest memory: below this not even a bare kernel has room for its page tables and itself.
const MIN_MEMORY: u64 = 1 << 20;
/// Bytes of a virtio-serial port name that every driver takes.
const MAX_PORT_NAME: usize = 63;

/// Why a [`VmSpec`] is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not a name.
    #[error(
        "VM name {name:?} is not 1 to 63 letters, digits, dots, dashes and underscores, a letter or digit first"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// Nothing to boot.
    #[error("No kernel is given: use --kernel FILE")]
    NoKernel,
    /// vCPU count.
    #[error("{cpus} vCPUs are not 1 to {MAX_CPUS}")]
    Cpus {
        /// As given.
        cpus: u8,
    },
    /// Memory size.
    #[error(
        "Memory of {size} bytes is not a multiple of 4 KiB of at least 1 MiB; write it with its unit, as in 512M"
    )]
    Memory {
        /// As given.
        size: u64,
    },
    /// Command line too long.
    #[error("The kernel command line has {len} bytes, at most {MAX_CMDLINE} are possible")]
    CmdlineLength {
        /// Bytes.
        len: usize,
    },
    /// Command line with a byte no kernel takes.
    #[error("The kernel command line contains the control character {character:?}")]
    CmdlineCharacter {
        /// The first one.
        character: char,
    },
    /// A disk's id.
    #[error(
        "Disk id {id:?} is not 1 to 31 letters, digits, dots, dashes and underscores, a letter or digit first"
    )]
    DiskId {
        /// The id.
        id: String,
    },
    /// Two disks, one id.
    #[error("Two disks have the id {id:?}")]
    DuplicateDisk {
        /// The id.
        id: String,
    },
    /// A disk without a path.
    #[error("Disk {id} has no path")]
    DiskPath {
        /// Its id.
        id: String,
    },
    /// Request queues.
    #[error("Disk {id} asks for {queues} queues, 1 to {MAX_DISK_QUEUES} are possible")]
    DiskQueues {
        /// The disk.
        id: String,
        /// As given.
        queues: u8,
    },
    /// Serial number.
    #[error("Serial {serial:?} of disk {id} is not at most {MAX_SERIAL} printable ASCII characters")]
    DiskSerial {
        /// The disk.
        id: String,
        /// As given.
        serial: String,
    },
    /// Limits.
    #[error("Disk {id} cannot have these limits")]
    DiskLimits {
        /// The disk.
        id: String,
        /// Why.
        source: block::LimitsError,
    },
    /// A fault.
    #[error("Disk {id} cannot have this fault")]
    DiskFault {
        /// The disk.
        id: String,
        /// Why.
        source: super::FaultError,
    },
    /// A channel's name.
    #[error("Channel name {name:?} is not 1 to 63 printable ASCII characters without slash or blank")]
    ChannelName {
        /// The name.
        name: String,
    },
    /// Two channels, one name; or the agent's.
    #[error("Two channels are named {name:?} ({AGENT_PORT} is the agent's)")]
    DuplicateChannel {
        /// The name.
        name: String,
    },
    /// A socket path that bind(2) cannot take.
    #[error("Socket path {path:?} has {len} bytes, at most {MAX_SOCKET_PATH} are possible")]
    SocketPath {
        /// The path.
        path: PathBuf,
        /// Its bytes.
        len: usize,
    },
}

impl VmSpec {
    /// The same with the paths of its files as they read from any directory: for those who look at a VM from elsewhere.
    /// Sockets keep theirs, which must be short.
    ///
    /// # Errors
    /// There is no current directory.
    pub fn with_absolute_paths(&self) -> io::Result<Self> {
        let mut spec = self.clone();
        let disks = spec.disks.iter_mut().map(|disk| &mut disk.path);
        for path in disks.chain(&mut spec.initrd).chain([&mut spec.kernel]) {
            *path = std::path::absolute(&path)?;
        }
        Ok(spec)
    }

    /// Checks everything that can be checked without opening a file.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_name(&self.name)?;
        if self.kernel.as_os_str().is_empty() {
            return Err(ConfigError::NoKernel);
        }
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(ConfigError::Cpus { cpus: self.cpus });
        }
        let size = self.memory.size;
        if size < MIN_MEMORY || !size.is_multiple_of(4096) {
            return Err(ConfigError::Memory { size });
        }
        self.validate_cmdline()?;
        self.validate_disks()?;
        self.validate_channels()
    }

    fn validate_cmdline(&self) -> Result<(), ConfigError> {
        if self.cmdline.len() > MAX_CMDLINE {
            return Err(ConfigError::CmdlineLength { len: self.cmdline.len() });
        }
        match self.cmdline.chars().find(|c| c.is_control()) {
            Some(character) => Err(ConfigError::CmdlineCharacter { character }),
            None => Ok(()),
        }
    }

    fn validate_disks(&self) -> Result<(), ConfigError> {
        let mut seen = HashSet::new();
        for disk in &self.disks {
            let id = disk.id.clone();
            if !is_plain_name(&id, 31) {
                return Err(ConfigError::DiskId { id });
            }
            if !seen.insert(&disk.id) {
                return Err(ConfigError::DuplicateDisk { id });
            }
            if disk.path.as_os_str().is_empty() {
                return Err(ConfigError::DiskPath { id });
            }
            if !(1..=MAX_DISK_QUEUES).contains(&disk.queues) {
                return Err(ConfigError::DiskQueues { id, queues: disk.queues });
            }
            if let Err(source) = disk.throttle.0.validate() {
                return Err(ConfigError::DiskLimits { id, source });
            }
            if let Err(source) = FaultSpec::check_all(&disk.faults) {
                return Err(ConfigError::DiskFault { id, source });
            }
            if let Some(serial) = &disk.serial {
                let printable = serial.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
                if serial.len() > MAX_SERIAL || !printable {
                    return Err(ConfigError::DiskSerial { id, serial: serial.clone() });
                }
            }
        }
        Ok(())
    }

    fn validate_channels(&self) -> Result<(), ConfigError> {
        let mut seen = HashSet::from([AGENT_PORT]);
        for channel in &self.channels {
            let name = channel.name.clone();
            let plain = name.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
            if name.is_empty() || name.len() > MAX_PORT_NAME || !plain {
                return Err(ConfigError::ChannelName { name });
            }
            if !seen.insert(&channel.name) {
                return Err(ConfigError::DuplicateChannel { name });
            }
            check_socket_path(&channel.socket)?;
        }
        Ok(())
    }

    /// Gives every disk without an id the id `disk0`, `disk1`, … by its place, as long as no other disk has it.
    pub fn name_disks(&mut self) {
        let mut taken: HashSet<_> = self.disks.iter().map(|disk| disk.id.clone()).collect();
        for (index, disk) in self.disks.iter_mut().enumerate().filter(|(_, disk)| disk.id.is_empty()) {
            // An explicit `disk1` may sit in another place: then the next free number.
            disk.id =
                (index..).map(|n| format!("disk{n}")).find(|id| !taken.contains(id)).unwrap_or_default();
            taken.insert(disk.id.clone());
        }
    }

    /// What `tarn ps` and logs say of the VM's size.
    pub fn summary(&self) -> String {
        format!("{} vCPU, {} memory, {} disks", self.cpus, format_size(self.memory.size), self.disks.len())
    }
}

/// Checks a VM's name: `[A-Za-z0-9][A-Za-z0-9._-]{0,62}`.
///
/// # Errors
/// [`ConfigError::Name`].
pub fn check_name(name: &str) -> Result<(), ConfigError> {
    if is_plain_name(name, 63) { Ok(()) } else { Err(ConfigError::Name { name: name.to_owned() }) }
}

/// Checks that a unix socket can be bound at `path`, as far as its length goes.
///
/// # Errors
/// [`ConfigError::SocketPath`].
pub fn check_socket_path(path: &Path) -> Result<(), ConfigError> {
    let len = path.as_os_str().len();
    if (1..=MAX_SOCKET_PATH).contains(&len) {
        Ok(())
    } else {
        Err(ConfigError::SocketPath { path: path.to_owned(), len })
    }
}

pub(super) fn is_plain_name(name: &str, longest: usize) -> bool {
    name.len() <= longest
        && name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ChannelSpec, DiskSpec};

    fn good() -> VmSpec {
        VmSpec { name: "vm".into(), kernel: "/k".into(), ..VmSpec::default() }
    }

    fn refusal(change: impl FnOnce(&mut VmSpec)) -> String {
        let mut spec = good();
        change(&mut spec);
        spec.name_disks();
        spec.validate().unwrap_err().to_string()
    }

    #[test]
    fn the_default_with_a_name_and_a_kernel_is_valid() {
        good().validate().unwrap();
    }

    #[test]
    fn files_are_found_from_elsewhere_too() {
        let mut spec = good();
        spec.disks = vec![DiskSpec::new("d.raw"), DiskSpec::new("/e")];
        let spec = spec.with_absolute_paths().unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!(
            [&spec.kernel, &spec.disks[0].path, &spec.disks[1].path],
            [Path::new("/k"), &here.join("d.raw"), Path::new("/e")]
        );
    }

    #[test]
    fn names_are_file_names_that_need_no_quoting() {
        for name in ["a", "A1", "ci-42.web_1", &"x".repeat(63)] {
            check_name(name).unwrap();
        }
        for name in ["", ".", "..", "-x", "a/b", "a b", "ä", "a\n", &"x".repeat(64)] {
            assert!(check_name(name).unwrap_err().to_string().contains("is not 1 to 63"), "{name:?}");
        }
    }

    #[test]
    fn sizes_and_counts_have_limits() {
        assert!(refusal(|s| s.cpus = 0).contains("0 vCPUs"));
        assert!(refusal(|s| s.cpus = 33).contains("33 vCPUs"));
        assert!(refusal(|s| s.memory.size = 0).contains("0 bytes"));
        assert!(refusal(|s| s.memory.size = 512).contains("as in 512M"));
        assert!(refusal(|s| s.memory.size = (1 << 30) + 1).contains("multiple of 4 KiB"));
        assert!(refusal(|s| s.kernel = "".into()).contains("--kernel"));
    }

    #[test]
    fn a_command_line_is_bounded_and_printable() {
        assert!(refusal(|s| s.cmdline = "x".repeat(2048)).contains("2048 bytes"));
        assert!(refusal(|s| s.cmdline = "a\nb".into()).contains("'\\n'"));
        let mut spec = good();
        spec.cmdline = "x".repeat(2047);
        spec.validate().unwrap();
    }

    #[test]
    fn disks_are_told_apart() {
        let disk = |id: &str| DiskSpec { id: id.into(), ..DiskSpec::new("/d") };
        assert!(refusal(|s| s.disks = vec![disk("a"), disk("a")]).contains("Two disks"));
        assert!(refusal(|s| s.disks = vec![disk("a/b")]).contains("a/b"));
        assert!(refusal(|s| s.disks = vec![DiskSpec::new("")]).contains("Disk disk0 has no path"));
        assert!(
            refusal(|s| s.disks = vec![DiskSpec { queues: 17, ..disk("q") }])
                .contains("Disk q asks for 17 queues")
        );
        let serial = Some("x".repeat(21));
        assert!(refusal(|s| s.disks = vec![DiskSpec { serial, ..disk("q") }]).contains("Serial"));
    }

    #[test]
    fn disks_without_an_id_get_one_that_nobody_has() {
        let mut spec = good();
        let disk = |id: &str| DiskSpec { id: id.into(), ..DiskSpec::new("/d") };
        spec.disks = vec![disk(""), disk(""), disk("disk0"), disk("")];
        spec.name_disks();
        let ids: Vec<_> = spec.disks.iter().map(|disk| disk.id.as_str()).collect();
        assert_eq!(ids, ["disk1", "disk2", "disk0", "disk3"]);
        spec.validate().unwrap();
    }

    #[test]
    fn channels_have_own_names_and_short_paths() {
        let channel = |name: &str, socket: &str| ChannelSpec { name: name.into(), socket: socket.into() };
        assert!(refusal(|s| s.channels = vec![channel(AGENT_PORT, "/s")]).contains("the agent's"));
        assert!(
            refusal(|s| s.channels = vec![channel("a", "/s"), channel("a", "/t")]).contains("Two channels")
        );
        assert!(refusal(|s| s.channels = vec![channel("a b", "/s")]).contains("\"a b\""));
        let long = format!("/{}", "x".repeat(107));
        assert!(refusal(|s| s.channels = vec![channel("a", &long)]).contains("108 bytes"));
    }
}
