//! A VMM that is killed: what the guest was told to be written is there, in both images when jobs hold the guest, and in
//! those that the witness names when it dies in a pivot.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use coordinator::Map;
use coordinator::record::witness::{Verdict, Witness};
use serde_json::json;

use super::MIB;
use super::machine::{Disk, Machine, assert_same, reference};
use crate::harness::{Lab, eventually};

/// As many disks as one VM well takes: each kill is one of every disk's jobs.
const IDS: [&str; 10] = ["da", "db", "dc", "dd", "de", "df", "dg", "dh", "di", "dj"];
const SIZE: u64 = 2 * MIB;
/// Writers on each disk, and the blocks of each.
const THREADS: u64 = 2;
const SLOTS: u64 = 16;
const BLOCK: usize = 4096;

/// When it dies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// All jobs hold their disk.
    Pending,
    /// Somewhere before.
    Earlier(Duration),
    /// In a pivot with a witness, or before, or after.
    Pivot(Duration),
}

/// Case 7: each kill finds ten disks, in both copy modes; a soak run kills fifty jobs at each kind of moment.
pub fn every_acknowledged_write_survives(lab: &Lab, program: &Path) {
    let soak = std::env::var("TARN_SOAK").is_ok_and(|value| value == "1");
    let (mut pivoted, rounds) = (0, if soak { 5 } else { 1 });
    for round in 0..rounds {
        let millis = |step: u64, most: u64| Duration::from_millis((round * step + 100) % most);
        one_is_killed(lab, program, "pending", Moment::Pending);
        one_is_killed(lab, program, "earlier", Moment::Earlier(millis(7919, 1500)));
        if !reference() {
            pivoted += u32::from(one_is_killed(lab, program, "pivot", Moment::Pivot(millis(37, 400))));
        }
    }
    eprintln!("{pivoted} of {rounds} pivots with a witness were over when their VMM died");
}

/// Whether the targets have become the disks.
fn one_is_killed(lab: &Lab, program: &Path, name: &'static str, moment: Moment) -> bool {
    let disks: Vec<Disk> = IDS.map(|id| Disk::new(lab, id, SIZE)).into();
    let sources: Vec<PathBuf> = disks.iter().map(|disk| disk.image.clone()).collect();
    let targets: Vec<PathBuf> = IDS.map(|id| lab.image(&format!("{id}.to"), SIZE)).into();
    let mut machine = Machine::boot(lab, program, name, &disks);
    for (index, id) in IDS.into_iter().enumerate() {
        // Acknowledgements leave the guest before it dies.
        machine.sh(&format!("disk-io /dev/{id} count {THREADS} {SLOTS} >/dev/console 2>&1 </dev/null &"));
        let node = format!("{id}-to");
        machine.add(&node, &targets[index]);
        let mode = if writes_to_both(index) { "write-blocking" } else { "background" };
        let by_hand = !matches!(moment, Moment::Pivot(_));
        let mirror = json!({"job-id": id, "device": id, "target": node, "sync": "full", "copy-mode": mode,
            "auto-finalize": !by_hand});
        machine.monitor.run_with("blockdev-mirror", &mirror);
    }
    let (ready, pivoted) = dies(lab, &mut machine, moment);
    if moment == Moment::Pending {
        sources.iter().zip(&targets).for_each(|(source, target)| assert_same(source, target));
    }
    let acknowledged = acknowledged(&machine.console());
    assert!(!acknowledged.is_empty(), "{}", machine.console());
    for (index, id) in IDS.into_iter().enumerate() {
        for thread in 0..THREADS {
            let number = acknowledged.get(&(id.to_owned(), thread)).copied().unwrap_or(0);
            let image = if pivoted { &targets[index] } else { &sources[index] };
            has_all_up_to(image, thread, number);
            // Since its mirror is ready, a write is acknowledged when it is in both.
            if writes_to_both(index) && ready.iter().any(|ready| ready == id) {
                has_all_up_to(&targets[index], thread, number);
            }
        }
    }
    pivoted
}

fn writes_to_both(index: usize) -> bool {
    index % 2 == 1
}

/// Brings the VMM to that moment, and kills it; the jobs that were ready then, and whether the witness says `pivoted`.
fn dies(lab: &Lab, machine: &mut Machine<'_>, moment: Moment) -> (Vec<String>, bool) {
    let count = |machine: &mut Machine<'_>, status: &str| with_status(machine, status).len();
    if !matches!(moment, Moment::Earlier(_)) {
        eventually("all to be ready", || (count(machine, "ready") == IDS.len()).then_some(()));
        let so_far = |machine: &Machine<'_>| acknowledged(&machine.console()).values().sum::<u64>();
        let before = so_far(machine);
        eventually("acknowledged writes", || (so_far(machine) > before + 100).then_some(()));
    }
    let complete = |machine: &mut Machine<'_>, id: &str| {
        let _ = machine.monitor.try_run("block-job-complete", &json!({"device": id}));
    };
    match moment {
        Moment::Pending => {
            IDS.iter().for_each(|id| complete(machine, id));
            eventually("all to be pending", || (count(machine, "pending") == IDS.len()).then_some(()));
            machine.kill();
            (Vec::new(), false)
        }
        Moment::Earlier(moment) => {
            std::thread::sleep(moment);
            let ready = with_status(machine, "ready");
            IDS[..5].iter().for_each(|id| complete(machine, id));
            machine.kill();
            (ready, false)
        }
        Moment::Pivot(moment) => {
            let path = lab.path("witness");
            Witness::remove(&path).unwrap();
            Witness::create(&path).unwrap();
            let op = "11111111-1111-4111-8111-111111111111";
            let pivot = json!({"op": op, "gen": 1, "jobs": IDS, "witness": path});
            let pivot: Map = pivot.as_object().unwrap().clone().into_iter().collect();
            // Whether it answers in this time or not.
            let answer = machine.monitor.0.execute("tarn-pivot", Some(pivot), moment);
            machine.kill();
            let decision = Witness::open(&path).unwrap().read().unwrap();
            let pivoted = decision.is_some_and(|decision| decision.verdict == Verdict::Pivoted);
            assert!(pivoted || answer.is_err(), "told {answer:?}, and the witness does not know");
            (Vec::new(), pivoted)
        }
    }
}

/// The jobs in this state.
fn with_status(machine: &mut Machine<'_>, status: &str) -> Vec<String> {
    let jobs = machine.monitor.run("query-jobs");
    let found = jobs.as_array().unwrap().iter().filter(|job| job["status"] == status);
    found.map(|job| job["id"].as_str().unwrap().to_owned()).collect()
}

/// The last number that each writer of each disk was told to be written, by the guest's console.
pub fn acknowledged(console: &str) -> HashMap<(String, u64), u64> {
    let whole = console.rfind('\n').map_or("", |end| &console[..end]);
    let parse = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["ack", disk, thread, number] = words[..] else { return None };
        Some(((disk.to_owned(), thread.parse().ok()?), number.parse().ok()?))
    };
    whole.lines().filter_map(parse).collect()
}

/// Each block has the last number that was acknowledged for it, or a later one: the console may lag behind.
pub fn has_all_up_to(image: &Path, thread: u64, last: u64) {
    let file = File::open(image).unwrap();
    let mut block = [0; BLOCK];
    for slot in 0..SLOTS {
        file.read_exact_at(&mut block, (thread * SLOTS + slot) * BLOCK as u64).unwrap();
        let found = u64::from_le_bytes(block[..8].try_into().unwrap());
        let expected = last.saturating_sub((last + SLOTS - slot) % SLOTS);
        let what = format!("{} thread {thread} slot {slot}: {found}, {last} acknowledged", image.display());
        assert!(found >= expected && (found % SLOTS == slot || found == 0), "{what}");
        let whole = block.chunks_exact(8).all(|bytes| bytes == found.to_le_bytes());
        assert!(whole || found > last, "{what}: torn");
    }
}
