//! The sample of the crash matrix on KVM: real guests, the real command line, deaths at random moments.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use super::{coordinate, files, json, to};
use crate::block_cases::{acknowledged, has_all_up_to, place};
use crate::harness::Lab;

const SIZE: u64 = 2 << 20;
/// Writers on each disk.
const THREADS: u64 = 2;
/// Deaths of coordinators in the life of one VM, before its own.
const COORDINATORS: u64 = 2;

/// splitmix64: the same moments for the same seed.
fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *seed;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Two VMs and six deaths; fifty deaths in a soak run.
#[test]
fn whoever_dies_in_a_pivot_every_acknowledged_write_is_on_the_image_that_recovery_names() {
    let Some((lab, program)) = place("operations-crashes") else { return };
    let soak = std::env::var("TARN_SOAK").is_ok_and(|value| value == "1");
    let seed = std::env::var("TARN_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let (mut state, mut pivoted, mut deaths) = (seed, 0, 0);
    for life in 0..if soak { 17 } else { 2 } {
        eprintln!("seed {seed}, life {life}");
        pivoted += one_life(&lab, &program, life, &mut state);
        deaths += COORDINATORS + 1;
    }
    eprintln!("{deaths} deaths, {pivoted} pivots went through");
}

/// A VM whose coordinators die one after the other, until it dies itself, alone or with the last of them.
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
    let mut pivoted = 0;
    for attempt in 0..=COORDINATORS {
        let targets = [0, 1].map(|disk| image(&format!("to{attempt}"), disk));
        let mut coordinator = begin(lab, name, &targets, seed);
        std::thread::sleep(Duration::from_millis(random(seed) % 3000));
        if attempt == COORDINATORS {
            vm.kill();
        }
        // With it, or after it: one that finds its VM gone says so and leaves the operation open.
        if attempt < COORDINATORS || random(seed).is_multiple_of(2) {
            let _ = coordinator.kill();
        }
        coordinator.wait().unwrap();
        let recovered = json(lab, &["recover", name]);
        assert!(json(lab, &["recover", name])["operation"].is_null(), "the second time it does nothing");
        pivoted += u64::from(recovered["operation"]["outcome"] == "pivoted");
        if attempt < COORDINATORS {
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
    pivoted
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

/// By the journal: the targets of the last operation that went through.
fn current(lab: &Lab, name: &str, first: &[PathBuf; 2]) -> Vec<PathBuf> {
    let operations = json(lab, &["op", "list", name]);
    let moved =
        operations.as_array().unwrap().iter().rev().find(|operation| operation["outcome"] == "pivoted");
    moved.map_or(first.to_vec(), |operation| {
        let disks = operation["disks"].as_array().unwrap().iter();
        disks.map(|disk| disk["target"]["path"].as_str().unwrap().into()).collect()
    })
}
