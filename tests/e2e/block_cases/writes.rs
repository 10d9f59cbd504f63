//! What the guest writes, zeroes and discards while a job runs is in the copy.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::json;

use super::machine::{Disk, Machine, assert_same, holds};
use super::{KIB, MIB};
use crate::harness::Lab;

pub fn disks(lab: &Lab) -> Vec<Disk> {
    let sizes = [
        ("active", 32 * MIB),
        ("small", 16 * MIB),
        ("held", 16 * MIB),
        ("zeroes", 16 * MIB),
        ("sector", 512),
        ("ragged", MIB + 512),
        ("empty", 0),
        ("load", 8 * MIB),
    ];
    let disk = |(id, size)| Disk { holdable: id == "held", ..Disk::new(lab, id, size) };
    sizes.map(disk).into()
}

/// Sixteen writes of 256 KiB from `first` MiB on, and zeroes between and over them, as operations of `disk-io`.
fn many(byte: u8, first: u64) -> String {
    let writes = (0..16).map(|i| format!("w:{byte}:{}K:256K", first * 1024 + 516 * i));
    let zeroes = (0..4).map(|i| format!("z:{}K:300K", first * 1024 + 2048 * i + 360));
    writes.chain(zeroes).collect::<Vec<_>>().join(" ")
}

/// Case 12.
pub fn a_write_blocking_mirror_takes_all_there_is(lab: &Lab, machine: &mut Machine<'_>) {
    let (source, target) = (lab.path("active.raw"), lab.image("active.to", 32 * MIB));
    machine.io("active", "w:1:0:32M");
    machine.add("active-to", &target);
    let before = machine.begin("active", &format!("all {}", many(2, 0)));
    machine.mirror("active", "active-to", &json!({"copy-mode": "write-blocking"}));
    let during = machine.begin("active", &format!("all {}", many(3, 10)));
    machine.told("BLOCK_JOB_READY");
    let after = machine.begin("active", &format!("all {} f", many(4, 20)));
    for deed in [before, during, after] {
        machine.end(deed);
    }
    machine.io("active", "f");
    let synced = machine.job()["actively-synced"].clone();
    // QEMU tells since 8.2.
    assert!(synced == true || machine.is_reference() && synced.is_null(), "{synced}");
    assert_same(&source, &target);
    machine.pivot();
    assert_same(&source, &target);
    assert_eq!(machine.file("active"), target);
    machine.io("active", "r:4:20M:256K r:3:10M:256K r:2:0:256K r:1:29M:3M");
}

/// Case 13: one sector of a chunk is written through; the chunk is not clean by that.
pub fn a_write_smaller_than_a_chunk_does_not_hide_the_rest_of_it(lab: &Lab, machine: &mut Machine<'_>) {
    let (source, target) = (lab.path("small.raw"), lab.image("small.to", 16 * MIB));
    machine.io("small", "w:1:0:4M");
    machine.add("small-to", &target);
    let slow = json!({"granularity": 64 * KIB, "copy-mode": "write-blocking", "speed": 1});
    machine.mirror("small", "small-to", &slow);
    machine.io("small", "w:2:1049088:512 w:2:3M:512 z:2049K:1K");
    machine.set_speed(0);
    machine.told("BLOCK_JOB_READY");
    machine.pivot();
    assert_same(&source, &target);
    assert!(holds(&target, 2, MIB + 512, 512) && holds(&target, 1, MIB + 1024, 63 * KIB));
    machine.io("small", "r:2:3M:512 r:1:3146240:1K r:0:2049K:1K");
}

/// Case 14: a write that does not end, one across it, and one beside it; nobody waits for ever.
pub fn writes_across_one_that_does_not_end_wait_and_then_end(lab: &Lab, machine: &mut Machine<'_>) {
    let (source, target) = (lab.path("held.raw"), lab.image("held.to", 16 * MIB));
    machine.io("held", "w:1:0:2M");
    machine.add("held-to", &target);
    let slow = json!({"granularity": 64 * KIB, "copy-mode": "write-blocking", "speed": 1});
    machine.mirror("held", "held-to", &slow);
    machine.hold_next_write("held");
    let first = machine.begin("held", "run w:2:0:64K");
    std::thread::sleep(Duration::from_millis(500));
    assert!(!machine.is_over(&first), "it is held");
    let across = machine.begin("held", "run w:3:32K:64K");
    let two = machine.begin("held", "run w:4:112K:64K");
    machine.release_write("held");
    let start = Instant::now();
    for deed in [first, across, two] {
        machine.end(deed);
    }
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    machine.set_speed(0);
    machine.told("BLOCK_JOB_READY");
    machine.pivot();
    assert_same(&source, &target);
    machine.io("held", "r:4:112K:64K r:1:176K:1M");
}

/// Case 16: whatever the target held before.
pub fn discards_and_zeroes_are_zeroes_in_the_copy(lab: &Lab, machine: &mut Machine<'_>) {
    for (mode, name) in [("background", "zeroes.one"), ("write-blocking", "zeroes.two")] {
        let target = lab.path(name);
        fs::write(&target, vec![0xaa; 16 << 20]).unwrap();
        let source = machine.file("zeroes");
        machine.io("zeroes", "w:1:0:2M w:1:4M:1M");
        machine.add(name, &target);
        machine.mirror("zeroes", name, &json!({"copy-mode": mode, "speed": MIB, "buf-size": MIB}));
        machine.io("zeroes", "d:1M:1M z:4M:512K");
        machine.set_speed(0);
        machine.told("BLOCK_JOB_READY");
        machine.io("zeroes", "d:0:64K z:4864K:4K w:5:8M:4K");
        machine.pivot();
        assert_same(&source, &target);
        assert!(holds(&target, 0, 4 * MIB, 512 * KIB), "{mode}");
        assert!(holds(&target, 0, 10 * MIB, 6 * MIB), "{mode}: what nobody ever wrote");
        machine.io("zeroes", "r:0:4M:512K r:5:8M:4K r:0:10M:6M");
        // QEMU (7.2) takes a discard during a mirror for the hint that it is, and does nothing.
        if !machine.is_reference() {
            assert!(holds(&target, 0, MIB, MIB), "{mode}: what was discarded");
            machine.io("zeroes", "r:0:1M:1M r:0:0:64K");
        }
    }
}

/// Case 17.
pub fn disks_of_odd_sizes_are_mirrored_to_their_last_sector(lab: &Lab, machine: &mut Machine<'_>) {
    for (device, size) in [("sector", 512), ("ragged", MIB + 512), ("empty", 0)] {
        let (source, target) = (lab.path(&format!("{device}.raw")), lab.image(&format!("{device}.to"), size));
        let node = format!("{device}-to");
        if size > 0 {
            machine.io(device, &format!("w:1:{}:512", size - 512));
        }
        machine.add(&node, &target);
        machine.mirror(device, &node, &json!({"granularity": 64 * KIB}));
        machine.told("BLOCK_JOB_READY");
        if size > 512 {
            machine.io(device, &format!("w:2:{}:1024", size - 1024));
        }
        machine.pivot();
        assert_eq!(machine.file(device), target);
        assert_same(&source, &target);
        if size > 0 {
            let byte = if size > 512 { 2 } else { 1 };
            machine.io(device, &format!("r:{byte}:{}:512", size - 512));
        }
    }
}
