//! A VMM that is killed: what the guest was told to be written is there, in both images when a job holds the guest.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use super::MIB;
use super::machine::{Disk, Machine, assert_same};
use crate::harness::{Lab, eventually};

const IDS: [&str; 6] = ["crash0", "crash1", "crash2", "crash3", "crash4", "crash5"];
/// Writers on each disk, and the blocks of each.
const THREADS: u64 = 2;
const SLOTS: u64 = 16;
const BLOCK: usize = 4096;

/// Case 7: each kill finds several disks at pending, in both copy modes. Every second VM dies at some other moment.
pub fn every_acknowledged_write_survives(lab: &Lab, program: &Path) {
    let soak = std::env::var("TARN_SOAK").is_ok_and(|value| value == "1");
    for round in 0..if soak { 100 } else { 2 } {
        one_is_killed(lab, program, round);
    }
}

fn one_is_killed(lab: &Lab, program: &Path, round: u64) {
    let disks: Vec<Disk> = IDS.map(|id| Disk::new(lab, id, 8 * MIB)).into();
    let targets: Vec<PathBuf> = IDS.map(|id| lab.image(&format!("{id}.to"), 8 * MIB)).into();
    let name = if round.is_multiple_of(2) { "pending" } else { "anywhere" };
    let mut machine = Machine::boot(lab, program, name, &disks);
    // Acknowledgements leave the guest before it dies.
    for id in IDS {
        machine.sh(&format!("disk-io /dev/{id} count {THREADS} {SLOTS} >/dev/console 2>&1 </dev/null &"));
    }
    for (index, id) in IDS.into_iter().enumerate() {
        let node = format!("{id}-to");
        machine.add(&node, &targets[index]);
        let mode = if index % 2 == 0 { "background" } else { "write-blocking" };
        machine.monitor.run_with(
            "blockdev-mirror",
            &json!({"job-id": id, "device": id, "target": node, "sync": "full", "copy-mode": mode, "auto-finalize": false}),
        );
    }
    let mut ready = Vec::new();
    if round.is_multiple_of(2) {
        bring_all_to_pending(&mut machine);
        machine.kill();
        for (disk, target) in disks.iter().zip(&targets) {
            assert_same(&disk.image, target);
        }
    } else {
        // Some moment between the beginning and pending, another one in each round.
        std::thread::sleep(Duration::from_millis(round * 7919 % 1500));
        ready = with_status(&mut machine, "ready");
        for id in &IDS[..3] {
            let _ = machine.monitor.try_run("block-job-complete", &json!({"device": id}));
        }
        machine.kill();
    }
    let acknowledged = acknowledged(&machine.console());
    assert!(!acknowledged.is_empty(), "{}", machine.console());
    for (index, disk) in disks.iter().enumerate() {
        for thread in 0..THREADS {
            let number = acknowledged.get(&(disk.id.to_owned(), thread)).copied().unwrap_or(0);
            has_all_up_to(&disk.image, thread, number);
            // Since its mirror is ready, a write is acknowledged when it is in both.
            if index % 2 == 1 && ready.iter().any(|id| id == disk.id) {
                has_all_up_to(&targets[index], thread, number);
            }
        }
    }
}

/// The jobs in this state.
fn with_status(machine: &mut Machine<'_>, status: &str) -> Vec<String> {
    let jobs = machine.monitor.run("query-jobs");
    let found = jobs.as_array().unwrap().iter().filter(|job| job["status"] == status);
    found.map(|job| job["id"].as_str().unwrap().to_owned()).collect()
}

fn bring_all_to_pending(machine: &mut Machine<'_>) {
    eventually("all to be ready", || (with_status(machine, "ready").len() == IDS.len()).then_some(()));
    let so_far = |machine: &Machine<'_>| acknowledged(&machine.console()).values().sum::<u64>();
    let before = so_far(machine);
    eventually("acknowledged writes", || (so_far(machine) > before + 100).then_some(()));
    for id in IDS {
        machine.monitor.run_with("block-job-complete", &json!({"device": id}));
    }
    eventually("all to be pending", || (with_status(machine, "pending").len() == IDS.len()).then_some(()));
}

/// The last number that each writer of each disk was told to be written, by the guest's console.
fn acknowledged(console: &str) -> HashMap<(String, u64), u64> {
    let whole = console.rfind('\n').map_or("", |end| &console[..end]);
    let parse = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["ack", disk, thread, number] = words[..] else { return None };
        Some(((disk.to_owned(), thread.parse().ok()?), number.parse().ok()?))
    };
    whole.lines().filter_map(parse).collect()
}

/// Each block has the last number that was acknowledged for it, or the one that was being written.
fn has_all_up_to(image: &Path, thread: u64, last: u64) {
    let file = File::open(image).unwrap();
    let mut block = [0; BLOCK];
    for slot in 0..SLOTS {
        file.read_exact_at(&mut block, (thread * SLOTS + slot) * BLOCK as u64).unwrap();
        let found = u64::from_le_bytes(block[..8].try_into().unwrap());
        let expected = last.saturating_sub((last + SLOTS - slot) % SLOTS);
        let what = format!("{} thread {thread} slot {slot}: {found}, {last} acknowledged", image.display());
        // The console may lag behind: what is on it was acknowledged, and more may be.
        assert!(found >= expected && (found % SLOTS == slot || found == 0), "{what}");
        let whole = block.chunks_exact(8).all(|bytes| bytes == found.to_le_bytes());
        assert!(whole || found > last, "{what}: torn");
    }
}
