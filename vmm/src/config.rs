//! What a VM is, as plain data. Flags and `--config vm.json` give the same [`VmSpec`]; validation
//! here opens no file and touches no device.

mod filters;
mod flags;
mod size;
mod validate;

use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use filters::{FaultError, FaultFlag, FaultOp, FaultSpec, LIMITS, ThrottleSpec};
pub use flags::{MountFlag, guest_device};
pub use size::{format_size, parse_size};
pub use validate::{
    AGENT_PORT, ConfigError, MAX_CMDLINE, MAX_CPUS, MAX_DISK_QUEUES, MAX_SERIAL, MAX_SOCKET_PATH, check_name,
    check_socket_path,
};

/// A whole VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VmSpec {
    /// Name: `[A-Za-z0-9][A-Za-z0-9._-]{0,62}`; also the name of its run-time directory. Generated when absent.
    #[serde(default)]
    pub name: String,
    /// Shown to the guest through the monitor only. Generated when absent.
    #[serde(default)]
    pub uuid: Uuid,
    /// Kernel image: bzImage or ELF `vmlinux`. The guest image's when absent.
    #[serde(default)]
    pub kernel: PathBuf,
    /// Initial RAM disk; several are concatenated in this order (each padded to 4 bytes).
    #[serde(default)]
    pub initrd: Vec<PathBuf>,
    /// Kernel command line, complete. One that suits the console when absent; never touched when present.
    #[serde(default)]
    pub cmdline: String,
    /// How the kernel is entered.
    #[serde(default)]
    pub boot: BootProtocol,
    /// vCPUs, 1–32.
    #[serde(default = "default_cpus")]
    pub cpus: u8,
    /// Guest memory.
    #[serde(default)]
    pub memory: MemorySpec,
    /// Disks, `/dev/vda` first.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// Further virtio-serial ports, beside the console and the agent port.
    #[serde(default)]
    pub channels: Vec<ChannelSpec>,
    /// What the terminal of a foreground `tarn run` is connected to.
    #[serde(default)]
    pub console: ConsoleSpec,
    /// What becomes of the VM when its guest ends or dies.
    #[serde(default)]
    pub on_guest: GuestPolicies,
    /// Build everything, start no vCPU: state `prelaunch` until `cont`.
    #[serde(default)]
    pub start_paused: bool,
    /// Seconds between the departure of a client that froze the guest and the thaw; 0 leaves it frozen.
    #[serde(default = "default_thaw_grace")]
    pub thaw_grace: u32,
}

impl Default for VmSpec {
    fn default() -> Self {
        Self {
            name: String::new(),
            uuid: Uuid::nil(),
            kernel: PathBuf::new(),
            initrd: Vec::new(),
            cmdline: String::new(),
            boot: BootProtocol::default(),
            cpus: default_cpus(),
            memory: MemorySpec::default(),
            disks: Vec::new(),
            channels: Vec::new(),
            console: ConsoleSpec::default(),
            on_guest: GuestPolicies::default(),
            start_paused: false,
            thaw_grace: default_thaw_grace(),
        }
    }
}

fn default_cpus() -> u8 {
    1
}

/// How long a freeze outlives the client that made it, in seconds, unless `--thaw-grace` says otherwise.
pub const THAW_GRACE: u32 = 60;

fn default_thaw_grace() -> u32 {
    THAW_GRACE
}

/// How the kernel is entered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum BootProtocol {
    /// PVH where the ELF carries the note, else the 64-bit Linux boot protocol.
    #[default]
    Auto,
    /// The 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst).
    Linux,
    /// PVH, the Xen direct boot ABI.
    Pvh,
}

/// Guest memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MemorySpec {
    /// Bytes; a multiple of 4 KiB. In JSON also a text such as `"512M"`.
    #[serde(default = "default_memory", deserialize_with = "size::deserialize")]
    pub size: u64,
    /// Back it with transparent huge pages where the host can.
    #[serde(default)]
    pub huge_pages: bool,
    /// Touch every page before the guest starts, so that it never waits for host memory.
    #[serde(default)]
    pub prefault: bool,
}

impl Default for MemorySpec {
    fn default() -> Self {
        Self { size: default_memory(), huge_pages: false, prefault: false }
    }
}

fn default_memory() -> u64 {
    512 << 20
}

/// A virtio-blk disk on a raw image or block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DiskSpec {
    /// Device name on the monitor, and name of its thread. `disk0`, `disk1`, … when absent.
    #[serde(default)]
    pub id: String,
    /// Raw image or block device. A device that is written may not be mounted, or be part of another one.
    pub path: PathBuf,
    /// Image format; only `raw`. Stated: the content is not looked at. Absent: an image that begins like
    /// another format is refused.
    #[serde(default)]
    pub format: Option<ImageFormat>,
    /// The guest can only read; several VMs may share the image.
    #[serde(default)]
    pub read_only: bool,
    /// Bypass the host's page cache (O_DIRECT).
    #[serde(default)]
    pub direct: bool,
    /// What a completed write means.
    #[serde(default)]
    pub cache: CacheMode,
    /// Pass the guest's DISCARD on to the image.
    #[serde(default = "yes")]
    pub discard: bool,
    /// Request queues, 1–16.
    #[serde(default = "one_queue")]
    pub queues: u8,
    /// What the guest reads with GET_ID, at most 20 bytes. The id when absent.
    #[serde(default)]
    pub serial: Option<String>,
    /// I/O engine; `auto` is io_uring where the host allows it, else threads.
    #[serde(default)]
    pub engine: IoEngine,
    /// What a failed read does.
    #[serde(default = "report")]
    pub rerror: ErrorPolicy,
    /// What a failed write, flush or discard does.
    #[serde(default = "enospc")]
    pub werror: ErrorPolicy,
    /// What it may do per second, by QEMU's names: `{"bps": 1048576}`.
    #[serde(default, skip_serializing_if = "ThrottleSpec::is_unlimited")]
    pub throttle: ThrottleSpec,
    /// What is to go wrong with it, for tests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub faults: Vec<FaultSpec>,
}

fn yes() -> bool {
    true
}
fn one_queue() -> u8 {
    1
}
fn report() -> ErrorPolicy {
    ErrorPolicy::Report
}
fn enospc() -> ErrorPolicy {
    ErrorPolicy::Enospc
}

/// Image formats. Never guessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// Bytes as they are.
    Raw,
}

/// What a completed write means.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum CacheMode {
    /// It is in the host's cache; the guest's FLUSH makes it durable.
    #[default]
    Writeback,
    /// It is durable.
    Writethrough,
    /// It may be lost with the host: FLUSH is ignored.
    Unsafe,
}

/// I/O engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum IoEngine {
    /// io_uring where the host allows it, else threads.
    #[default]
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// Plain system calls on a thread.
    Threads,
}

/// What a failed disk operation does (QEMU's `BlockdevOnError`, without `auto`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorPolicy {
    /// The guest sees the error.
    Report,
    /// The guest does not see it.
    Ignore,
    /// The VM stops in state `io-error`; `cont` retries.
    Stop,
    /// `stop` when the host is out of space, else `report`.
    Enospc,
}

/// A named virtio-serial port with a unix socket at its host end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ChannelSpec {
    /// Port name, as in `/dev/virtio-ports/NAME`.
    pub name: String,
    /// Listening unix socket.
    pub socket: PathBuf,
}

/// What the terminal of a foreground `tarn run` is connected to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ConsoleSpec {
    /// The virtio console `hvc0`.
    #[default]
    Hvc0,
    /// The 16550 at COM1 (early boot messages; slow).
    Serial,
    /// Nothing; the console stays on `console.sock`.
    None,
}

/// What becomes of the VM when its guest ends or dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct GuestPolicies {
    /// `poweroff` in the guest.
    #[serde(default = "exit_zero")]
    pub shutdown: GuestAction,
    /// `reboot` in the guest, and a triple fault.
    #[serde(default = "reset")]
    pub reset: GuestAction,
    /// A kernel panic, told through pvpanic.
    #[serde(default = "exit_panic")]
    pub panic: GuestAction,
}

impl Default for GuestPolicies {
    fn default() -> Self {
        Self { shutdown: exit_zero(), reset: reset(), panic: exit_panic() }
    }
}

fn exit_zero() -> GuestAction {
    GuestAction::Exit(0)
}
fn reset() -> GuestAction {
    GuestAction::Reset
}
fn exit_panic() -> GuestAction {
    GuestAction::Exit(EXIT_GUEST_PANIC)
}

/// Exit status of `tarn run` after a guest panic, unless `--on-guest-panic` says otherwise.
pub const EXIT_GUEST_PANIC: u8 = 70;

/// One such policy; on the command line `exit[:CODE]`, `pause` or `reset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum GuestAction {
    /// End the process with this exit status.
    Exit(u8),
    /// Keep the process and the VM's memory for inspection.
    Pause,
    /// Start the guest again.
    Reset,
}

impl From<GuestAction> for String {
    fn from(action: GuestAction) -> Self {
        match action {
            GuestAction::Exit(0) => "exit".into(),
            GuestAction::Exit(code) => format!("exit:{code}"),
            GuestAction::Pause => "pause".into(),
            GuestAction::Reset => "reset".into(),
        }
    }
}

impl TryFrom<String> for GuestAction {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl std::str::FromStr for GuestAction {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (word, code) = text.split_once(':').map_or((text, None), |(w, c)| (w, Some(c)));
        match (word, code) {
            ("exit", None) => Ok(Self::Exit(0)),
            ("exit", Some(code)) => {
                code.parse().map(Self::Exit).map_err(|_| format!("Exit status {code:?} is not 0 to 255"))
            }
            ("pause", None) => Ok(Self::Pause),
            ("reset", None) => Ok(Self::Reset),
            _ => Err(format!("Policy {text:?} is none of exit[:CODE], pause, reset")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_object_is_the_default_vm() {
        assert_eq!(serde_json::from_str::<VmSpec>("{}").unwrap(), VmSpec::default());
    }

    #[test]
    fn what_is_written_as_json_is_read_back() {
        let spec = VmSpec {
            name: "web".into(),
            uuid: Uuid::from_u128(7),
            kernel: "/k".into(),
            initrd: vec!["/i".into(), "/j".into()],
            cmdline: "quiet".into(),
            boot: BootProtocol::Pvh,
            cpus: 4,
            memory: MemorySpec { size: 2 << 30, huge_pages: true, prefault: true },
            disks: vec!["a.img,id=a,ro,queues=2".parse().unwrap(), DiskSpec::new("b.img")],
            channels: vec!["name=org.x.0,socket=/s".parse().unwrap()],
            console: ConsoleSpec::Serial,
            on_guest: GuestPolicies { shutdown: GuestAction::Exit(3), ..GuestPolicies::default() },
            start_paused: true,
            thaw_grace: 5,
        };
        let text = serde_json::to_string_pretty(&spec).unwrap();
        assert_eq!(serde_json::from_str::<VmSpec>(&text).unwrap(), spec);
    }

    #[test]
    fn memory_may_be_a_text_and_unknown_members_are_refused() {
        let spec: VmSpec = serde_json::from_str(r#"{"memory": {"size": "2G"}}"#).unwrap();
        assert_eq!(spec.memory.size, 2 << 30);
        assert!(serde_json::from_str::<VmSpec>(r#"{"cpu": 2}"#).unwrap_err().to_string().contains("`cpu`"));
        assert!(serde_json::from_str::<VmSpec>(r#"{"memory": {"size": "2Q"}}"#).is_err());
    }

    #[test]
    fn guest_policies_read_as_on_the_command_line() {
        for (text, action) in [
            ("exit", GuestAction::Exit(0)),
            ("exit:70", GuestAction::Exit(70)),
            ("pause", GuestAction::Pause),
            ("reset", GuestAction::Reset),
        ] {
            assert_eq!(text.parse(), Ok(action));
            assert_eq!(String::from(action), text);
        }
        for text in ["", "exit:256", "exit:", "pause:1", "reboot"] {
            assert!(text.parse::<GuestAction>().is_err(), "{text}");
        }
    }
}
