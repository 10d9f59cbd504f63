//! The sample of the crash matrix on KVM: real guests, the real command line, deaths at random moments.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Instant;

use serde_json::Value;

use super::{coordinate, files, json, to};
use crate::block_cases::{acknowledged, has_all_up_to, place};
use crate::harness::Lab;

const SIZE: u64 = 2 << 20;
/// Writers on each disk.
const THREADS: u64 = 2;
/// Deaths of coordinators in the life of one VM, before its own.
const COORDINATORS: u64 = 2;
/// Pivots before that.
const QUIET: u64 = 2;

/// splitmix64: the same moments for the same seed.
fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *seed;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Two VMs and six deaths; fifty deaths in a soak run. `TARN_LIVES` names others by their numbers, with `TARN_SEED` the
/// moments of their deaths.
#[test]
fn whoever_dies_in_a_pivot_every_acknowledged_write_is_on_the_image_that_recovery_names() {
    let Some((lab, program)) = place("operations-crashes") else { return };
    let soak = std::env::var("TARN_SOAK").is_ok_and(|value| value == "1");
    let seed: u64 = std::env::var("TARN_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let lives: Vec<u64> = match std::env::var("TARN_LIVES") {
        Ok(lives) => lives.split(' ').map(|life| life.parse().unwrap()).collect(),
        Err(_) => (1..=if soak { 17 } else { 2 }).collect(),
    };
    for life in lives {
        // The same life, whichever others there were before it. scripts/end-to-end.sh reads what it says.
        let pivots = one_life(&lab, &program, life, &mut (seed << 32 | life));
        eprintln!("life {life} of seed {seed} is over: {} deaths, {pivots} pivots", COORDINATORS + 1);
    }
}

/// A VM whose coordinators die one after the other, until it dies itself, alone or with the last of them; how many of
/// their pivots went through all the same.
fn one_life(lab: &Lab, program: &Path, life: u64, seed: &mut u64) -> u64 {
    let image = |kind: &str, disk: usize| lab.path(&format!("{life}-{kind}-{disk}.raw"));
    let first = [0, 1].map(|disk| lab.image(&format!("{life}-first-{disk}.raw"), SIZE));
    let name: &'static str = Box::leak(format!("crash-{life}").into_boxed_str());
    let specs = [0, 1].map(|disk| format!("{},id=d{disk}", first[disk].display()));
    let initrd = program.to_str().unwrap();
    let mut vm = lab.boot(name, &["--initrd", initrd, "--disk", &specs[0], "--disk", &specs[1]]);
    for disk in ["vda", "vdb"] {
        vm.sh(&format!("disk-io /dev/{disk} count {THREADS} 16 >/dev/console 2>&1 </dev/null &"));
    }
    eprintln!("life {life} begins");
    let targets = |attempt: u64| [0, 1].map(|disk| image(&format!("to{attempt}"), disk));
    // Those in which nobody dies tell how long it takes here; the first one finds nothing in memory.
    let quiet = (1..=QUIET).map(|attempt| {
        let start = Instant::now();
        assert!(begin(lab, name, &targets(attempt), seed).wait().unwrap().success());
        start.elapsed()
    });
    let whole = quiet.min().unwrap_or_default();
    for attempt in 1..=COORDINATORS + 1 {
        let mut coordinator = begin(lab, name, &targets(QUIET + attempt), seed);
        // At any moment of it, or behind it; more often where it is decided, which is late.
        let percent = (random(seed) % 125).max(random(seed) % 125);
        std::thread::sleep(whole * u32::try_from(percent).unwrap() / 100);
        let is_last = attempt > COORDINATORS;
        if is_last {
            vm.kill();
        }
        // With it, or after it: one that finds its VM gone says so and leaves the operation open.
        if !is_last || random(seed).is_multiple_of(2) {
            let _ = coordinator.kill();
        }
        coordinator.wait().unwrap();
        let recovered = json(lab, &["recover", name]);
        assert!(json(lab, &["recover", name])["operation"].is_null(), "the second time it does nothing");
        eprintln!("at {percent} %: {} is {}", recovered["found"], recovered["operation"]["outcome"]);
        if !is_last {
            assert_eq!(vm.monitor().run("query-jobs"), serde_json::json!([]));
            assert_eq!(vm.monitor().status(), "running");
            assert_eq!(files(&mut vm), current(lab, name, &first));
        }
    }
    let written = acknowledged(&vm.console());
    assert!(!written.is_empty(), "{}", vm.console());
    for (disk, image) in ["vda", "vdb"].into_iter().zip(current(lab, name, &first)) {
        for thread in 0..THREADS {
            let number = written.get(&(disk.to_owned(), thread)).copied().unwrap_or(0);
            has_all_up_to(&image, thread, number);
        }
    }
    pivots(lab, name).len() as u64 - QUIET
}

fn begin(lab: &Lab, name: &str, targets: &[PathBuf; 2], seed: &mut u64) -> Child {
    let disks = [to("d0", &targets[0]), to("d1", &targets[1])];
    let mut args = vec!["pivot", name, &disks[0], &disks[1]];
    let bits = random(seed);
    for (bit, flags) in
        [&["--pause"][..], &["--protocol", "b"], &["--copy-mode", "write-blocking"]].iter().enumerate()
    {
        if bits >> bit & 1 == 1 {
            args.extend_from_slice(flags);
        }
    }
    coordinate(lab, &args)
}

/// By the journal: the operations that went through.
fn pivots(lab: &Lab, name: &str) -> Vec<Value> {
    let operations = json(lab, &["op", "list", name]);
    let operations = operations.as_array().unwrap().iter();
    operations.filter(|operation| operation["outcome"] == "pivoted").cloned().collect()
}

/// The images that the disks are now.
fn current(lab: &Lab, name: &str, first: &[PathBuf; 2]) -> Vec<PathBuf> {
    pivots(lab, name).last().map_or(first.to_vec(), |operation| {
        let disks = operation["disks"].as_array().unwrap().iter();
        disks.map(|disk| disk["target"]["path"].as_str().unwrap().into()).collect()
    })
}
