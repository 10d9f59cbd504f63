//! The measurements: each takes both sides in turn, so that what slows the machine down slows both.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use coordinator::GuestSession;

use crate::agent::Agent;
use crate::contender::{DiskImage, Guest, Host, MEMORY_MIB, Running, Vmm};
use crate::figures::Better::{Higher, Lower};
use crate::figures::{Figures, Side};
use crate::payload::{Then, pvh_elf};
use crate::{Args, fio, freeze, memory};

/// What `tarn run` says by itself to a kernel without a serial port.
pub const CMDLINE: &str = "console=hvc0 8250.nr_uarts=0 quiet loglevel=3 reboot=k panic=-1 pci=off i8042.noaux i8042.nomux \
                       i8042.nopnp i8042.dumbkbd cryptomgr.notests random.trust_cpu=on tsc=reliable no_timer_check";
const EARLY_CMDLINE: &str = "earlyprintk=serial,ttyS0,115200 console=ttyS0 panic=-1 pci=off";
const PINGS: u32 = 1000;
const FREEZES: usize = 30;
const MOUNT_DISKS: &str = "tarn.mount=serial:one:/one:ext4 tarn.mount=serial:two:/two:ext4";
/// Runs until one succeeds.
const ATTEMPTS: u32 = 3;
const DISK_SIZE: u64 = 256 << 20;

/// Everything for the measurements; its directory goes with it.
pub struct Rounds<'a> {
    pub args: &'a Args,
    pub dir: PathBuf,
}

impl<'a> Rounds<'a> {
    pub fn new(args: &'a Args) -> Self {
        let dir = std::env::temp_dir().join(format!("tarn-bench-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Self { args, dir }
    }

    pub fn host(&self) -> Host<'_> {
        Host { tarn: &self.args.tarn, native: self.args.native, dir: &self.dir }
    }

    pub fn booting(&self, initrd: PathBuf, cmdline: &str) -> Guest {
        Guest {
            kernel: self.args.image.join("vmlinux"),
            initrd: Some(initrd),
            cmdline: cmdline.into(),
            memory_mib: MEMORY_MIB,
            serial: false,
            monitor: false,
            disks: vec![],
        }
    }

    pub fn initrd(&self) -> PathBuf {
        let names = ["initramfs.cpio.zst", "initramfs.cpio.gz"];
        names.map(|name| self.args.image.join(name)).into_iter().find(|path| path.exists()).unwrap()
    }

    /// A payload of a few bytes: what the VMM itself takes, in time and memory.
    pub fn payload(&self, rounds: u32) -> Figures {
        let kernel = self.dir.join("payload.elf");
        fs::write(&kernel, pvh_elf("hello\n", Then::Halt)).unwrap();
        let guest = Guest {
            kernel,
            initrd: None,
            cmdline: String::new(),
            memory_mib: MEMORY_MIB,
            serial: true,
            monitor: false,
            disks: vec![],
        };
        each_round("payload", rounds, &[Side::Tarn, Side::Qemu], |side, figures| {
            let mut vm = self.host().start(vmm(side), &guest);
            figures.add("payload: start to first byte", ("ms", Lower), side, ms(vm.first_byte()?));
            figures.add("payload: memory beyond RAM", ("MiB", Lower), side, beyond_ram(&vm));
            Ok(())
        })
    }

    /// Debian's kernel, as far as its first word.
    pub fn kernel(&self, rounds: u32) -> Figures {
        let guest = Guest { serial: true, ..self.booting(self.initrd(), EARLY_CMDLINE) };
        each_round("kernel", rounds, &[Side::Tarn, Side::Qemu], |side, figures| {
            let mut vm = self.host().start(vmm(side), &guest);
            figures.add("kernel: start to first byte", ("ms", Lower), side, ms(vm.first_byte()?));
            Ok(())
        })
    }

    /// The whole guest, as far as its agent; the same on both sides, and QEMU with its own.
    pub fn agent(&self, rounds: u32) -> Figures {
        let ours = self.booting(self.initrd(), CMDLINE);
        let theirs = self.booting_qemu_ga(CMDLINE);
        let measure = |side: Side, guest: &Guest, figures: &mut Figures| -> Result<(), String> {
            let mut vm = self.host().start(vmm(side), guest);
            let mut agent = Agent::wait(&mut vm)?;
            figures.add("agent: start to first answer", ("ms", Lower), side, ms(agent.up));
            figures.add("agent: memory beyond RAM", ("MiB", Lower), side, beyond_ram(&vm));
            let mut pings = (0..PINGS).map(|_| agent.ping()).collect::<Result<Vec<_>, _>>()?;
            pings.sort();
            let percentile = |percent: usize| ms(pings[pings.len() * percent / 100]) * 1000.0;
            figures.add("agent: ping, median", ("µs", Lower), side, percentile(50));
            figures.add("agent: ping, 99th percentile", ("µs", Lower), side, percentile(99));
            Ok(())
        };
        let mut sides = vec![Side::Tarn, Side::Qemu];
        sides.extend(theirs.is_some().then_some(Side::QemuGa));
        each_round("agent", rounds, &sides, |side, figures| match (side, &theirs) {
            (Side::QemuGa, Some(theirs)) => measure(side, theirs, figures),
            _ => measure(side, &ours, figures),
        })
    }

    /// The same guest with Debian's agent in it.
    fn booting_qemu_ga(&self, cmdline: &str) -> Option<Guest> {
        let overlay = self.args.qemu_ga.as_ref()?;
        let both = self.initrd_with(overlay);
        Some(self.booting(both, &format!("{cmdline} tarn.agent=/usr/sbin/qemu-ga,-t,/run")))
    }

    /// The guest image's initramfs with another one behind it.
    pub fn initrd_with(&self, overlay: &Path) -> PathBuf {
        let both = self.dir.join(overlay.file_name().unwrap());
        let mut file = File::create(&both).unwrap();
        for part in [&self.initrd(), overlay] {
            io::copy(&mut File::open(part).unwrap(), &mut file).unwrap();
        }
        both
    }

    /// Two filesystems frozen and thawed by either agent, and what the agents themselves take in the guest.
    pub fn freeze(&self, rounds: u32) -> Figures {
        let disks: Vec<_> = ["one", "two"]
            .map(|serial| {
                let path = self.dir.join(format!("{serial}.ext4"));
                File::create(&path).unwrap().set_len(DISK_SIZE).unwrap();
                let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&path).status();
                assert!(made.is_ok_and(|status| status.success()), "mkfs.ext4");
                DiskImage { path, serial, direct: false, read_only: false }
            })
            .into();
        let cmdline = format!("{CMDLINE} {MOUNT_DISKS}");
        let with_disks = |guest: Guest| Guest { disks: disks.clone(), ..guest };
        let ours = with_disks(self.booting(self.initrd(), &cmdline));
        let theirs = self.booting_qemu_ga(&cmdline).map(with_disks);
        let count = if self.args.quick { 3 } else { FREEZES };
        let mut sides = vec![Side::Tarn, Side::Qemu];
        sides.extend(theirs.is_some().then_some(Side::QemuGa));
        each_round("freeze", rounds, &sides, |side, figures| {
            let guest = if side == Side::QemuGa { theirs.as_ref().unwrap_or(&ours) } else { &ours };
            let mut vm = self.host().start(vmm(side), guest);
            drop(Agent::wait(&mut vm)?);
            let mut session = GuestSession::connect(&vm.agent_socket).map_err(|error| error.to_string())?;
            freeze::rounds(&mut session, count, side, figures)
        })
    }

    /// fio in the guest, on one image through the host's page cache and one past it.
    pub fn disk(&self, rounds: u32) -> Figures {
        let Some(tools) = &self.args.tools else { return Figures::default() };
        let image = |path: PathBuf, serial, direct, read_only| DiskImage { path, serial, direct, read_only };
        let mut disks = vec![
            image(tools.clone(), "tools", false, true),
            image(self.filled_image("cached"), "cached", false, false),
        ];
        if !self.args.quick {
            disks.push(image(self.filled_image("direct"), "direct", true, false));
        }
        let measured: Vec<_> = disks[1..].iter().map(|disk| disk.serial).collect();
        let guest = self.booting(self.initrd(), &format!("{CMDLINE} {}", fio::MOUNT));
        let guest = Guest { disks, memory_mib: 512, ..guest };
        let time = Duration::from_millis(if self.args.quick { 500 } else { 2000 });
        each_round("disk", rounds, &[Side::Tarn, Side::Qemu], |side, figures| {
            let mut vm = self.host().start(vmm(side), &guest);
            drop(Agent::wait(&mut vm)?);
            let mut session = GuestSession::connect(&vm.agent_socket).map_err(|error| error.to_string())?;
            for (disk, job, figure) in fio::run(&mut session, &measured, time)? {
                let unit = if job.sequential { "MiB/s" } else { "IOPS" };
                figures.add(&format!("disk: {disk}, {}", job.name), (unit, Higher), side, figure);
            }
            Ok(())
        })
    }

    fn filled_image(&self, name: &str) -> PathBuf {
        let path = self.dir.join(format!("{name}.raw"));
        let mut file = File::create(&path).unwrap();
        let chunk = vec![0x5a; 1 << 20];
        for _ in 0..DISK_SIZE >> 20 {
            file.write_all(&chunk).unwrap();
        }
        file.sync_all().unwrap();
        path
    }
}

impl Drop for Rounds<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

pub fn vmm(side: Side) -> Vmm {
    match side {
        Side::Tarn => Vmm::Tarn,
        Side::Qemu | Side::QemuGa => Vmm::Qemu,
        Side::Host => unreachable!("it runs no VM"),
    }
}

/// One round that does not count, then `rounds` that do; the sides take turns at being first. A run that failed is
/// told of, and tried again.
pub fn each_round(
    what: &str,
    rounds: u32,
    sides: &[Side],
    mut measure: impl FnMut(Side, &mut Figures) -> Result<(), String>,
) -> Figures {
    let mut figures = Figures::default();
    for round in 0..=rounds {
        for turn in 0..sides.len() {
            let side = sides[(turn + round as usize) % sides.len()];
            for _ in 0..ATTEMPTS {
                eprintln!("bench: {what}, round {round} of {rounds}, {side:?}");
                let mut samples = Figures::default();
                match measure(side, &mut samples) {
                    Ok(()) => {
                        eprint!("{}", samples.lines());
                        if round > 0 {
                            figures.append(samples);
                        }
                    }
                    Err(error) => {
                        eprintln!("bench: {error}");
                        figures.failed(format!("{what}, {side:?}: {error}"));
                        continue;
                    }
                }
                break;
            }
        }
    }
    figures
}

pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[expect(clippy::cast_precision_loss, reason = "KiB of one process")]
fn beyond_ram(vm: &Running) -> f64 {
    memory::beyond_ram(vm.pid(), MEMORY_MIB) as f64 / 1024.0
}
