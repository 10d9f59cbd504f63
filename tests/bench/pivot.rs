//! Pivots: how long a guest's I/O is held, as the guest sees it and as the VMM says; and whole operations of `tarn pivot`.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use coordinator::record::witness::Witness;
use serde_json::Value;

use crate::agent::{Agent, guest_output};
use crate::contender::{DiskImage, Guest, NAME, Vmm};
use crate::figures::Better::Lower;
use crate::figures::{Figures, Side};
use crate::mirror::{DISK, Subject, background};
use crate::probe;
use crate::rounds::{CMDLINE, Rounds, each_round, ms, vmm};

const MIB: u64 = 1 << 20;
/// What the guest is at, before and behind the pivot.
const AROUND: Duration = Duration::from_millis(400);
/// Pivots of one VM, of each kind.
const PIVOTS: usize = 3;
/// Data in the page cache of a guest that is frozen for a pivot.
const DIRTY: &str = "dd if=/dev/zero of=/data/dirty bs=1M count=8 conv=notrunc 2>/dev/null";

const AT_COMPLETE: &str = "gap at job-complete";
const AT_PIVOT: &str = "gap at tarn-pivot (QEMU: job-complete)";

/// How a mirror ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// It does not: what the machine itself does to a guest.
    None,
    Complete,
    /// `tarn-pivot`, with a witness.
    Pivot,
}

impl Rounds<'_> {
    /// The longest time between two completions of a guest that reads or writes 4 KiB at random, one after the other, while
    /// the target of a mirror becomes its disk.
    pub fn pivot(&self, rounds: u32) -> Figures {
        let size = 32 * MIB;
        let Some((guest, _)) = self.with_data_disk(size) else { return Figures::default() };
        each_round("pivot", rounds, &[Side::Tarn, Side::Qemu], |side, figures| {
            // Each time the same disk.
            let _ = self.with_data_disk(size);
            let mut trial =
                Trial { rounds: self, vm: Subject::start(self, side, &guest)?, side, size, count: 0 };
            for _ in 0..if self.args.quick { 1 } else { PIVOTS } {
                figures.add("pivot: fsync of 4 KiB on the host", ("ms", Lower), Side::Host, self.fsync());
                for write in [false, true] {
                    for end in [End::None, End::Complete, End::Pivot] {
                        // QEMU has no other end than job-complete.
                        if side == Side::Tarn || end != End::Pivot {
                            trial.measure(write, end, figures)?;
                        }
                    }
                }
            }
            Ok(())
        })
    }

    /// Milliseconds.
    fn fsync(&self) -> f64 {
        let file =
            File::options().create(true).write(true).truncate(false).open(self.dir.join("fsync")).unwrap();
        file.write_all_at(&[0x5a; 4096], 0).unwrap();
        let begin = Instant::now();
        file.sync_all().unwrap();
        ms(begin.elapsed())
    }
}

/// Pivots of one VM.
struct Trial<'a> {
    rounds: &'a Rounds<'a>,
    vm: Subject,
    side: Side,
    size: u64,
    count: u32,
}

impl Trial<'_> {
    fn measure(&mut self, write: bool, end: End, figures: &mut Figures) -> Result<(), String> {
        self.count += 1;
        let target = self.rounds.dir.join(format!("pivot-{}.raw", self.count));
        let witness = self.rounds.dir.join(format!("witness-{}", self.count));
        let _ = (fs::remove_file(&target), fs::remove_file(&witness));
        Witness::create(&witness).map_err(|error| error.to_string())?;
        self.vm.monitor.mirror(&background(&target))?;
        self.vm.monitor.ready()?;

        let probe = probe::start(&mut self.vm.session, write, self.size, 2 * AROUND)?;
        std::thread::sleep(AROUND);
        let (mut took, mut held) = (None, None);
        match end {
            End::None => {}
            End::Complete => took = Some(self.vm.monitor.complete()?),
            End::Pivot => held = Some(self.vm.monitor.pivot(self.count, &witness)?),
        }
        let gap = probe.end()?.gap / 1000.0;
        if took.is_some_and(|took| took > AROUND) {
            eprintln!("bench: job-complete took {took:?}: the guest had stopped by then");
        }
        if end == End::None {
            self.vm.monitor.cancel()?;
        }

        let load = if write { "4k writes" } else { "idle, 4k reads" };
        let names = match (end, self.side) {
            (End::None, _) => &["gap without one"][..],
            (End::Complete, Side::Qemu) => &[AT_COMPLETE, AT_PIVOT],
            (End::Complete, _) => &[AT_COMPLETE],
            (End::Pivot, _) => &[AT_PIVOT],
        };
        for name in names {
            figures.add(&format!("pivot: {load}, {name}"), ("ms", Lower), self.side, gap);
        }
        if let Some(took) = took {
            figures.add(
                &format!("pivot: {load}, job-complete until the job has gone"),
                ("ms", Lower),
                self.side,
                ms(took),
            );
        }
        if let Some(held) = held {
            figures.add(
                &format!("pivot: {load}, held by tarn-pivot, as it says"),
                ("ms", Lower),
                self.side,
                held / 1000.0,
            );
        }
        Ok(())
    }
}

impl Rounds<'_> {
    /// One command that moves a mounted disk, guest frozen and VM paused, and what it says of itself. QEMU's VM is moved
    /// by the same command, by the protocol that QEMU can do.
    pub fn operation(&self, rounds: u32) -> Figures {
        let dir = self.dir.join("operation");
        let (path, target) = (dir.join("mounted.ext4"), dir.join("moved.raw"));
        let disk = DiskImage { path: path.clone(), serial: DISK, direct: false, read_only: false };
        let guest = self.booting(self.initrd(), &format!("{CMDLINE} tarn.mount=serial:{DISK}:/data:ext4"));
        let guest = Guest { monitor: true, disks: vec![disk], ..guest };
        each_round("operation", rounds, &[Side::Tarn, Side::Qemu], |side, figures| {
            // With the stamps of the last one.
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir(&dir).unwrap();
            make_filesystem(&path)?;
            let mut vm = self.host().start(vmm(side), &guest);
            drop(Agent::wait(&mut vm)?);
            let mut session =
                coordinator::GuestSession::connect(&vm.agent_socket).map_err(|error| error.to_string())?;
            guest_output(&mut session, DIRTY, Duration::ZERO)?;
            drop(session);
            let mut command = self.host().command();
            command.args(["pivot", "--json", "--freeze", "--pause"]);
            match vmm(side) {
                Vmm::Tarn => command.arg(NAME),
                Vmm::Qemu => command
                    .args(["other", "--protocol", "b", "--monitor"])
                    .arg(&vm.monitor_socket)
                    .arg("--agent")
                    .arg(&vm.agent_socket),
            };
            command.arg(format!("{DISK}={}", target.display()));
            let report = report(&mut command)?;
            for (time, name) in [
                ("copied-ms", "64 MiB copied"),
                ("frozen-ms", "guest frozen"),
                ("paused-ms", "VM paused"),
                ("held-ms", "guest I/O held"),
                ("whole-ms", "from begin to end"),
            ] {
                let sample = report["timeline"][time].as_f64().ok_or(format!("{time}: {report}"))?;
                figures.add(&format!("tarn pivot --freeze --pause: {name}"), ("ms", Lower), side, sample);
            }
            Ok(())
        })
    }
}

fn make_filesystem(path: &Path) -> Result<(), String> {
    File::create(path).and_then(|file| file.set_len(64 * MIB)).map_err(|error| error.to_string())?;
    match Command::new("mkfs.ext4").args(["-q", "-F"]).arg(path).status() {
        Ok(status) if status.success() => Ok(()),
        other => Err(format!("mkfs.ext4: {other:?}")),
    }
}

fn report(command: &mut Command) -> Result<Value, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let (text, complaint) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        return Err(format!("{command:?}: {}: {complaint}", output.status));
    }
    serde_json::from_str(&text).map_err(|error| format!("{command:?}: {error}: {text}"))
}
