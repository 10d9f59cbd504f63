//! The two VMMs, started with the same guest.

use std::fs::{self, File};
use std::io::{PipeReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

/// Longest wait for anything: generous, for an emulated machine.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Debian's usual guest memory would do as well; this is what others publish figures for.
pub const MEMORY_MIB: u64 = 128;

/// The VM's, where VMs have names.
pub const NAME: &str = "bench";

/// A VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vmm {
    Tarn,
    Qemu,
}

/// A disk of the guest.
#[derive(Debug, Clone)]
pub struct DiskImage {
    pub path: PathBuf,
    /// What the guest knows it by; the VMM, too.
    pub serial: &'static str,
    /// Past the host's page cache.
    pub direct: bool,
    pub read_only: bool,
}

/// What is to run.
#[derive(Debug, Clone)]
pub struct Guest {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    pub cmdline: String,
    pub memory_mib: u64,
    /// The VMM's standard output is COM1; else it is the virtio console.
    pub serial: bool,
    /// QEMU has a monitor; Tarn always has.
    pub monitor: bool,
    pub disks: Vec<DiskImage>,
}

/// How VMMs are started here.
#[derive(Debug)]
pub struct Host<'a> {
    pub tarn: &'a Path,
    /// A KVM without hardware virtualization is as good.
    pub native: bool,
    /// Sockets and logs.
    pub dir: &'a Path,
}

/// A VMM that runs; killed when dropped.
#[derive(Debug)]
pub struct Running {
    pub started: Instant,
    pub agent_socket: PathBuf,
    pub monitor_socket: PathBuf,
    child: Child,
    output: PipeReader,
    log: PathBuf,
}

impl Host<'_> {
    /// Starts `guest` on `vmm`.
    pub fn start(&self, vmm: Vmm, guest: &Guest) -> Running {
        for dir in ["run", "state"] {
            let _ = fs::remove_dir_all(self.dir.join(dir));
        }
        let (mut command, agent_socket, monitor_socket) = match vmm {
            Vmm::Tarn => self.tarn(guest),
            Vmm::Qemu => self.qemu(guest),
        };
        for socket in [&agent_socket, &monitor_socket] {
            let _ = fs::remove_file(socket);
        }
        let log = self.dir.join("log");
        let (output, stdout) = std::io::pipe().unwrap();
        command.stdin(Stdio::null()).stdout(stdout).stderr(File::create(&log).unwrap());
        let started = Instant::now();
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        // Closes our copy of the pipe's other end.
        drop(command);
        Running { started, agent_socket, monitor_socket, child, output, log }
    }

    /// The program that is measured, with directories of its own.
    pub fn command(&self) -> Command {
        let mut command = Command::new(self.tarn);
        command.env("TARN_RUN_DIR", self.dir.join("run")).env("TARN_STATE_DIR", self.dir.join("state"));
        command
    }

    fn tarn(&self, guest: &Guest) -> (Command, PathBuf, PathBuf) {
        let mut command = self.command();
        command.args(["run", "--name", NAME, "--cpus", "1", "--memory"]);
        command.arg(format!("{}M", guest.memory_mib)).arg("--kernel").arg(&guest.kernel);
        if let Some(initrd) = &guest.initrd {
            command.arg("--initrd").arg(initrd);
        }
        command.args([
            "--cmdline",
            &guest.cmdline,
            "--console",
            if guest.serial { "serial" } else { "hvc0" },
        ]);
        for disk in &guest.disks {
            let mut text =
                format!("{},format=raw,id={},serial={}", disk.path.display(), disk.serial, disk.serial);
            if disk.direct {
                text.push_str(",direct");
            }
            if disk.read_only {
                text.push_str(",ro");
            }
            command.args(["--disk", &text]);
        }
        if self.native {
            command.arg("--software-kvm");
        }
        let run = self.dir.join("run").join(NAME);
        (command, run.join("agent.sock"), run.join("monitor.sock"))
    }

    /// The machine that Tarn's is most like: virtio-mmio, one serial port, no firmware but qboot, no PIT, PIC or RTC;
    /// console, agent port and entropy as virtio devices; disks with io_uring in a thread of their own.
    fn qemu(&self, guest: &Guest) -> (Command, PathBuf, PathBuf) {
        let agent_socket = self.dir.join("qemu-agent.sock");
        let monitor_socket = self.dir.join("qemu-monitor.sock");
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm", "-smp", "1"]);
        command.args(["-M", "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on,acpi=on"]);
        if !self.native {
            command.args(["-cpu", "host"]);
        }
        command.arg("-m").arg(format!("{}M", guest.memory_mib)).arg("-kernel").arg(&guest.kernel);
        if let Some(initrd) = &guest.initrd {
            command.arg("-initrd").arg(initrd);
        }
        command.args(["-append", &guest.cmdline, "-chardev", "stdio,id=terminal,signal=off"]);
        command.args(["-device", "virtio-serial-device"]);
        if guest.serial {
            command.args(["-serial", "chardev:terminal"]);
            command.args(["-chardev", "null,id=nothing", "-device", "virtconsole,chardev=nothing"]);
        } else {
            command.args(["-serial", "null", "-device", "virtconsole,chardev=terminal"]);
        }
        command.arg("-chardev");
        command.arg(format!("socket,id=agent,server=on,wait=off,path={}", agent_socket.display()));
        command.args(["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]);
        command.args(["-device", "virtio-rng-device"]);
        for disk in &guest.disks {
            let id = disk.serial;
            let (direct, read_only) = (switch(disk.direct), switch(disk.read_only));
            command.args(["-object", &format!("iothread,id=thread-{id}"), "-blockdev"]);
            command.arg(format!(
                "driver=raw,node-name={id},read-only={read_only},discard=unmap,cache.direct={direct},file.driver=file,\
                 file.filename={},file.aio=io_uring,file.cache.direct={direct}",
                disk.path.display()
            ));
            command.arg("-device");
            command.arg(format!("virtio-blk-device,id={id},drive={id},serial={id},iothread=thread-{id}"));
        }
        if guest.monitor {
            command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", monitor_socket.display()));
        }
        (command, agent_socket, monitor_socket)
    }
}

fn switch(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

impl Running {
    /// Process id of the VMM.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the first byte of the guest's output; the time since the process was started.
    pub fn first_byte(&mut self) -> Result<Duration, String> {
        let limit = LIMIT.try_into().unwrap();
        let ready = poll(&mut [PollFd::new(&self.output, PollFlags::IN)], Some(&limit));
        let mut byte = [0];
        if ready != Ok(1) || !matches!(self.output.read(&mut byte), Ok(1)) {
            return Err(self.autopsy("no output"));
        }
        Ok(self.started.elapsed())
    }

    /// Ends it; `what` went wrong, and what the VMM and its guest had to say.
    pub fn autopsy(&mut self, what: &str) -> String {
        let _ = self.child.kill();
        let status = self.child.wait().map_or(-1, ExitStatusExt::into_raw);
        let mut console = Vec::new();
        let _ = self.output.read_to_end(&mut console);
        let log = fs::read(&self.log).unwrap_or_default();
        let (log, console) = (String::from_utf8_lossy(&log), String::from_utf8_lossy(&console));
        format!("{what} (wait status {status})\n{log}\n--- console\n{console}")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
