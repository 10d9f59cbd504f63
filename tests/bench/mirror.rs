//! Live mirrors: how fast, beside cp on the same machine, and what they cost a guest that writes.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use coordinator::GuestSession;
use rustix::fs::{Advice, fadvise};

use crate::agent::Agent;
use crate::contender::{DiskImage, Guest, Running};
use crate::figures::Better::{Higher, Lower};
use crate::figures::{Figures, Side};
use crate::monitor::{Mirror, Monitor};
use crate::probe;
use crate::rounds::{CMDLINE, Rounds, each_round, vmm};

/// The guest's disk, by its id.
pub const DISK: &str = "data";
const MIB: u64 = 1 << 20;
/// Data and holes take turns.
const STRETCH: usize = 16 << 20;
/// MiB per second: a mirror that is still at work when all has been measured.
const SLOWLY: u64 = 24;

impl Rounds<'_> {
    /// An idle disk of 1 GiB, half of it data, none of that in the host's page cache, copied to a new file: until the
    /// mirror is ready (both VMMs sync the target before they say so), or cp has ended; then until the host has it synced.
    pub fn mirror(&self, rounds: u32) -> Figures {
        let size = if self.args.quick { 128 * MIB } else { 1024 * MIB };
        let Some((guest, source)) = self.with_data_disk(size) else { return Figures::default() };
        let target = self.dir.join("copy.raw");
        each_round("mirror", rounds, &[Side::Tarn, Side::Qemu, Side::Host], |side, figures| {
            let mut vm = match side {
                Side::Host => None,
                _ => Some(Subject::start(self, side, &guest)?),
            };
            let _ = fs::remove_file(&target);
            not_cached(&source);
            let begin = Instant::now();
            match &mut vm {
                Some(vm) => {
                    vm.monitor.mirror(&background(&target))?;
                    vm.monitor.ready()?;
                }
                None => copy(&source, &target)?,
            }
            let copied = begin.elapsed();
            File::open(&target).unwrap().sync_all().unwrap();
            let synced = begin.elapsed();
            let name = format!("mirror: idle {} GiB, half data", if self.args.quick { "1/8" } else { "1" });
            let rate = |time: Duration| mib(size / 2) / time.as_secs_f64();
            figures.add(&format!("{name}, ready"), ("MiB/s", Higher), side, rate(copied));
            figures.add(&format!("{name}, ready and synced"), ("MiB/s", Higher), side, rate(synced));
            if let Some(vm) = &mut vm {
                vm.monitor.cancel()?;
            }
            Ok(())
        })
    }

    /// 4 KiB direct writes, one after the other, at random: without a mirror, and during one of either
    /// kind that copies all the while, at the same speed on both sides.
    pub fn latency(&self, rounds: u32) -> Figures {
        let time = Duration::from_millis(if self.args.quick { 500 } else { 2000 });
        let size = if self.args.quick { 128 * MIB } else { 512 * MIB };
        let Some((guest, _)) = self.with_data_disk(size) else { return Figures::default() };
        let target = self.dir.join("copy.raw");
        each_round("latency", rounds, &[Side::Tarn, Side::Qemu], |side, figures| {
            let mut vm = Subject::start(self, side, &guest)?;
            for mode in [None, Some("background"), Some("write-blocking")] {
                let _ = fs::remove_file(&target);
                if let Some(copy_mode) = mode {
                    vm.monitor.mirror(&Mirror {
                        target: &target,
                        copy_mode,
                        speed: SLOWLY * MIB,
                        ..background(&target)
                    })?;
                }
                let latency = probe::start(&mut vm.session, true, size, time)?.end()?;
                if mode.is_some() {
                    if !vm.monitor.is_copying()? {
                        return Err("the mirror was ready too early".into());
                    }
                    vm.monitor.cancel()?;
                }
                let name = format!("mirror: 4k write, {}", mode.unwrap_or("no mirror"));
                figures.add(&format!("{name}, median"), ("µs", Lower), side, latency.median);
                figures.add(&format!("{name}, 99th percentile"), ("µs", Lower), side, latency.tail);
            }
            Ok(())
        })
    }

    /// A guest with disk-io, and one disk with that many bytes.
    pub fn with_data_disk(&self, size: u64) -> Option<(Guest, PathBuf)> {
        let initrd = self.initrd_with(self.args.disk_io.as_ref()?);
        let path = self.dir.join("data.raw");
        half_filled(&path, size);
        let disk = DiskImage { path: path.clone(), serial: DISK, direct: false, read_only: false };
        let guest = Guest { monitor: true, disks: vec![disk], ..self.booting(initrd, CMDLINE) };
        Some((guest, path))
    }
}

/// A mirror of the guest's disk to `target`, as fast as it can.
pub fn background(target: &Path) -> Mirror<'_> {
    Mirror { disk: DISK, target, copy_mode: "background", speed: 0 }
}

/// A VM with clients.
pub struct Subject {
    pub session: GuestSession,
    pub monitor: Monitor,
    _vm: Running,
}

impl Subject {
    /// With its guest up and idle.
    pub fn start(rounds: &Rounds<'_>, side: Side, guest: &Guest) -> Result<Self, String> {
        let mut vm = rounds.host().start(vmm(side), guest);
        drop(Agent::wait(&mut vm)?);
        let session = GuestSession::connect(&vm.agent_socket).map_err(|error| error.to_string())?;
        Ok(Self { session, monitor: Monitor::connect(&vm)?, _vm: vm })
    }
}

fn half_filled(path: &Path, size: u64) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    let data: Vec<u8> = (0..MIB).map(|index| (index % 251) as u8 | 1).collect();
    for stretch in (0..size).step_by(2 * STRETCH) {
        for offset in (0..STRETCH).step_by(data.len()) {
            file.write_all_at(&data, stretch + offset as u64).unwrap();
        }
    }
    file.sync_all().unwrap();
}

/// Whoever reads it next reads it from its disk.
fn not_cached(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    fadvise(&file, 0, None, Advice::DontNeed).unwrap();
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    match Command::new("cp").arg("--sparse=always").args([from, to]).status() {
        Ok(status) if status.success() => Ok(()),
        other => Err(format!("cp: {other:?}")),
    }
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}
