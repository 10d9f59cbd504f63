//! The flags of `tarn run`, and the [`VmSpec`] that they and `--config` make.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::Args;
use serde::Deserialize;
use serde::de::IgnoredAny;
use uuid::Uuid;

use super::guest_image::GuestImage;
use crate::config::{
    BootProtocol, ChannelSpec, ConsoleSpec, DiskSpec, FaultFlag, GuestAction, MountFlag, VmSpec, parse_size,
};

/// Start a VM, and stay until it ends
///
/// Without --kernel it boots the guest image, which has an agent. The terminal is the guest's console; Ctrl-] then .
/// ends the VM, Ctrl-] twice sends one Ctrl-].
#[derive(Debug, Default, Args)]
#[command(after_help = AFTER_HELP)]
pub struct RunArgs {
    /// The VM's name [default: made up]
    #[arg(long)]
    name: Option<String>,
    /// Read the configuration from FILE (as --dry-run prints it); flags override it, lists are added to it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the resulting configuration and stop there
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Run in the background: print the name once the VM runs; messages go to `log` in its run-time directory. With --mount,
    /// also wait for the agent: if a filesystem could not be mounted, fail (1), and leave the VM running to be looked at
    #[arg(long, conflicts_with_all = ["exec", "dry_run"])]
    pub(super) detach: bool,
    /// Run CMD with /bin/sh in the guest, give back its outputs and exit status, and end the VM; not if a --mount fails (1).
    /// Of each output 16 MiB are kept: if there was more, and CMD has succeeded, the exit status is 74
    #[arg(long, value_name = "CMD")]
    pub(super) exec: Option<String>,
    /// With --exec: do not pass standard input on
    #[arg(long, requires = "exec")]
    pub(super) no_input: bool,
    /// With --exec, or --detach and --mount: seconds the guest may take to boot and answer
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    agent_timeout: u64,

    /// Kernel: ELF vmlinux or bzImage
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk; several are loaded one after the other
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    initrd: Vec<PathBuf>,
    /// Kernel command line, instead of the usual one
    #[arg(long, value_name = "TEXT", help_heading = "Boot")]
    cmdline: Option<String>,
    /// Add to the kernel command line
    #[arg(long, value_name = "TEXT", help_heading = "Boot")]
    append: Vec<String>,
    /// How the kernel is entered [default: auto]
    #[arg(long, value_enum, help_heading = "Boot")]
    boot: Option<BootProtocol>,
    /// A shell on the console (guest image only)
    #[arg(long, help_heading = "Boot")]
    shell: bool,
    /// Start no vCPU until `tarn resume`
    #[arg(long, help_heading = "Boot")]
    paused: bool,

    /// vCPUs, 1 to 32 [default: 1]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    cpus: Option<u8>,
    /// Guest memory, as in 512M or 2G [default: 512M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, help_heading = "Machine")]
    memory: Option<u64>,
    /// Back guest memory with transparent huge pages
    #[arg(long, help_heading = "Machine")]
    huge_pages: bool,
    /// Touch all guest memory before the start
    #[arg(long, help_heading = "Machine")]
    prefault: bool,
    /// Use a KVM without hardware virtualization
    #[arg(long, help_heading = "Machine")]
    pub(super) software_kvm: bool,

    /// A disk: PATH or path=PATH, then id=, format=raw, ro, direct, cache=writeback|writethrough|unsafe, discard=on|off,
    /// queues=N, serial=, engine=auto|io-uring|threads, rerror= and werror=report|ignore|stop|enospc,
    /// and limits by QEMU's names: bps=, bps-rd=, bps-wr=, iops=, iops-rd=, iops-wr=, each also with -max= and -max-length=
    #[arg(long, value_name = "PATH[,KEY=VALUE…]", help_heading = "Devices")]
    disk: Vec<DiskSpec>,
    /// Let operations of a disk go wrong, to test what becomes of it: op=any|read|write|flush|discard|zeroes, then sector=,
    /// sectors=, after=N, count=N (0: always), errno=EIO, delay-ms=N, torn=BYTES; or op=volatile-cache: what was not flushed
    /// is lost when the VM's process is killed, but with seed=N a part of it
    #[arg(long, value_name = "DISK:op=OP,KEY=VALUE…", help_heading = "Devices")]
    fault: Vec<FaultFlag>,
    /// Mount a filesystem (guest image only); DISK is /dev/vda… or a disk's id. Without --exec and --detach a failure is a
    /// line on the console
    #[arg(long, value_name = "DISK:DIR:FSTYPE[:OPTIONS]", help_heading = "Devices")]
    mount: Vec<MountFlag>,
    /// A named virtio-serial port, /dev/virtio-ports/NAME in the guest, a unix socket here
    #[arg(long, value_name = "name=NAME,socket=PATH", help_heading = "Devices")]
    channel: Vec<ChannelSpec>,
    /// What the terminal is connected to [default: hvc0]
    #[arg(long, value_enum, help_heading = "Devices")]
    console: Option<ConsoleSpec>,

    /// When the guest powers off: exit[:CODE], pause or reset [default: exit]
    #[arg(long, value_name = "ACTION", help_heading = "Policies")]
    on_guest_shutdown: Option<GuestAction>,
    /// When the guest reboots or a triple fault ends it [default: reset]
    #[arg(long, value_name = "ACTION", help_heading = "Policies")]
    on_guest_reset: Option<GuestAction>,
    /// When the guest's kernel panics [default: exit:70]
    #[arg(long, value_name = "ACTION", help_heading = "Policies")]
    on_guest_panic: Option<GuestAction>,
    /// Seconds until the guest is thawed when the client that froze it has gone; 0 is never [default: 60]
    #[arg(long, value_name = "SECONDS", help_heading = "Policies")]
    thaw_grace: Option<u32>,

    /// Boot the image that a disk is configured with, also one that another has replaced or that was never complete; of
    /// all disks, if none is named
    #[arg(
        long,
        value_name = "DISK",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "",
        help_heading = "Policies"
    )]
    pub(super) force_stale_source: Vec<String>,

    /// Set by --detach: this is the process in the background
    #[arg(long, hide = true, requires = "detach")]
    pub(super) detached: bool,
}

const AFTER_HELP: &str = "\
Examples:
  tarn run
  tarn run --disk data.img --mount /dev/vda:/data:ext4 --exec 'df -h /data'
  tarn run --name web --memory 1G --cpus 2 --disk web.img,id=root,direct --detach
  tarn run --kernel vmlinux --initrd init.cpio --append debug --dry-run > vm.json";

impl RunArgs {
    /// How long the guest may take to answer.
    pub(super) fn agent_timeout(&self) -> Duration {
        Duration::from_secs(self.agent_timeout)
    }

    /// What is to be run: `--config`, changed by the flags, completed by defaults.
    pub(super) fn to_spec(&self) -> anyhow::Result<VmSpec> {
        let (mut spec, has_cmdline) = match &self.config {
            Some(path) => load(path)?,
            None => (VmSpec::default(), false),
        };
        self.override_scalars(&mut spec);
        spec.disks.extend(self.disk.iter().cloned());
        spec.channels.extend(self.channel.iter().cloned());
        spec.name_disks();
        for FaultFlag { disk, fault } in &self.fault {
            let found = spec.disks.iter_mut().find(|known| known.id == *disk);
            let found = found.with_context(|| format!("No disk has the id {disk:?} that a fault is for"))?;
            found.faults.push(fault.clone());
        }
        if spec.kernel.as_os_str().is_empty() {
            let image = GuestImage::find()?;
            spec.kernel = image.kernel;
            spec.initrd.insert(0, image.initrd);
        }
        spec.initrd.extend(self.initrd.iter().cloned());
        if let Some(cmdline) = &self.cmdline {
            spec.cmdline.clone_from(cmdline);
        } else if !has_cmdline {
            spec.cmdline = usual_cmdline(spec.console);
        }
        self.append_to_cmdline(&mut spec)?;
        // One that was given and is empty is a script's mistake.
        if spec.name.is_empty() && self.name.is_none() {
            spec.name = format!("vm-{}", std::process::id());
        }
        if spec.uuid.is_nil() {
            spec.uuid = random_uuid()?;
        }
        Ok(spec)
    }

    fn override_scalars(&self, spec: &mut VmSpec) {
        fn set<T: Clone>(target: &mut T, flag: Option<&T>) {
            if let Some(value) = flag {
                target.clone_from(value);
            }
        }
        set(&mut spec.name, self.name.as_ref());
        if let Some(kernel) = &self.kernel {
            spec.kernel.clone_from(kernel);
        }
        set(&mut spec.boot, self.boot.as_ref());
        set(&mut spec.cpus, self.cpus.as_ref());
        set(&mut spec.memory.size, self.memory.as_ref());
        spec.memory.huge_pages |= self.huge_pages;
        spec.memory.prefault |= self.prefault;
        set(&mut spec.console, self.console.as_ref());
        if self.exec.is_some() {
            // A guest that starts again would never answer.
            spec.on_guest.shutdown = GuestAction::Exit(0);
            spec.on_guest.reset = GuestAction::Exit(0);
        }
        set(&mut spec.on_guest.shutdown, self.on_guest_shutdown.as_ref());
        set(&mut spec.on_guest.reset, self.on_guest_reset.as_ref());
        set(&mut spec.on_guest.panic, self.on_guest_panic.as_ref());
        spec.start_paused |= self.paused;
        set(&mut spec.thaw_grace, self.thaw_grace.as_ref());
    }

    fn append_to_cmdline(&self, spec: &mut VmSpec) -> anyhow::Result<()> {
        let mut words = self.mount.iter().map(|mount| mount.command_line_word(&spec.disks));
        let mut words = words.by_ref().collect::<Result<Vec<_>, _>>().map_err(|text| anyhow!(text))?;
        if self.shell {
            words.push("tarn.shell".into());
        }
        words.extend(self.append.iter().cloned());
        for word in words {
            if !spec.cmdline.is_empty() {
                spec.cmdline.push(' ');
            }
            spec.cmdline.push_str(&word);
        }
        Ok(())
    }
}

/// Reads a configuration; also tells whether it has a command line.
fn load(path: &Path) -> anyhow::Result<(VmSpec, bool)> {
    #[derive(Deserialize)]
    struct Given {
        cmdline: Option<IgnoredAny>,
    }
    let text = fs::read_to_string(path).with_context(|| format!("Cannot read configuration {path:?}"))?;
    let wrong = || format!("Configuration {path:?} is wrong");
    let spec = serde_json::from_str(&text).with_context(wrong)?;
    let given: Given = serde_json::from_str(&text).with_context(wrong)?;
    Ok((spec, given.cmdline.is_some()))
}

/// A command line for a quick and quiet start: no probing for what is not there, no waiting, no tests.
///
/// `reboot=k` resets by the keyboard controller, the quickest way that this machine has; `panic=-1` does so at once,
/// after pvpanic has told the VMM. See Documentation/admin-guide/kernel-parameters.txt.
fn usual_cmdline(console: ConsoleSpec) -> String {
    let console = match console {
        // The 16550 is there, but looking for it takes a while and nobody reads it.
        ConsoleSpec::Hvc0 | ConsoleSpec::None => "console=hvc0 8250.nr_uarts=0",
        ConsoleSpec::Serial => "console=ttyS0",
    };
    format!(
        "{console} quiet loglevel=3 reboot=k panic=-1 pci=off i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd \
         cryptomgr.notests random.trust_cpu=on tsc=reliable no_timer_check"
    )
}

/// A random (version 4) UUID.
fn random_uuid() -> anyhow::Result<Uuid> {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .context("No random numbers")?;
    Ok(uuid::Builder::from_random_bytes(bytes).into_uuid())
}

#[cfg(test)]
mod tests;
