//! Pivots back and forth under a guest that writes all the time, and checks every byte it reads against what it wrote.

use std::path::{Path, PathBuf};
use std::time::Instant;

use coordinator::record::witness::Witness;
use serde_json::json;

use super::MIB;
use super::machine::{Disk, Machine, assert_same};
use crate::harness::{Lab, eventually};

/// Pivots of each load; a soak run makes ten times as many.
const ROUNDS: usize = 50;

fn rounds() -> usize {
    if std::env::var("TARN_SOAK").is_ok_and(|value| value == "1") { 10 * ROUNDS } else { ROUNDS }
}

/// Case 15 on the way: each mirror begins while writes are in flight, with both images compared when it is pending.
///
/// This load zeroes, discards and flushes, too.
pub fn a_guest_that_checks_its_data_pivots_back_and_forth(lab: &Lab, machine: &mut Machine<'_>) {
    let start = Instant::now();
    let images = [lab.path("load.raw"), lab.image("load.other", 8 * MIB)];
    let load = machine.begin("load", "load 1 4 /run/load.stop");
    if !machine.is_reference() {
        // Some take longer than others, so that more is in flight, and ends in another order.
        let slow = json!({"device": "load", "op": "write", "sector": 8192, "sectors": 4096, "delay-ms": 3});
        machine.monitor.run_with("tarn-fault-add", &slow);
    }
    let rounds = rounds();
    for round in 0..rounds {
        moves(lab, machine, "load", &images, round);
        assert!(!machine.is_over(&load), "the load goes on");
    }
    machine.sh("touch /run/load.stop");
    let steps: u64 = machine.end(load).trim().parse().unwrap();
    eprintln!("{steps} operations of the guest in {rounds} pivots, {:?}", start.elapsed());
    assert!(steps > 0);
}

/// One mirror and pivot of a disk from one of the images to the other one, of each kind in turn.
fn moves(lab: &Lab, machine: &mut Machine<'_>, disk: &str, images: &[PathBuf; 2], round: usize) {
    let [from, to] = [&images[round % 2], &images[(round + 1) % 2]];
    let node = |round: usize| format!("{disk}-{round}");
    machine.add(&node(round), to);
    let mode = if round % 4 < 2 { "background" } else { "write-blocking" };
    let with_witness = round % 5 == 4 && !machine.is_reference();
    let by_hand = !with_witness;
    let options = json!({"copy-mode": mode, "auto-finalize": !by_hand, "auto-dismiss": !by_hand});
    machine.mirror(disk, &node(round), &options);
    machine.told("BLOCK_JOB_READY");
    if with_witness {
        pivots_with_a_witness(machine, &lab.path("load.witness"), round);
    } else {
        machine.complete_until_pending();
        assert_same(from, to);
        machine.finalize();
    }
    assert_eq!(&machine.file(disk), to, "round {round}");
    if let Some(former) = round.checked_sub(1) {
        machine.delete(&node(former));
    }
}

/// Tarn's own way.
fn pivots_with_a_witness(machine: &mut Machine<'_>, witness: &Path, round: usize) {
    Witness::create(witness).unwrap();
    let op = format!("22222222-2222-4222-8222-{round:012}");
    let pivot = json!({"op": op, "gen": round, "jobs": ["m0"], "witness": witness});
    let info = machine.monitor.run_with("tarn-pivot", &pivot);
    assert_eq!((&info["state"], &info["witness"]), (&json!("pivoted"), &json!("durable")));
    machine.told("null");
    Witness::remove(witness).unwrap();
}

const FIO_DISK: u64 = 8 * MIB;

/// Passes of fio, some to a process, until they are told to stop; each writes every block once, in an order of its own, and
/// then reads all of them. It tells of each: error, KiB read, KiB written.
///
/// Every write has the number of its pass all over, and its place ([`is_from_one_pass`]). With checksums in place of them a
/// block that an earlier pass has left would be as good as one that got lost: fio does not compare the seeds in its headers.
const FIO: &str = r#"mount -t ext4 -o ro /dev/tools /mnt || exit 1
    pass=0
    while ! test -e /run/fio.stop; do
        passes=
        for i in 1 2 3 4 5 6 7 8; do
            pass=$((pass + 1))
            number=$(printf %08x $pass)
            passes="$passes --name=$number --stonewall --randseed=$pass --verify_pattern=0x$number%o"
        done
        /mnt/ld.so --library-path /mnt/lib /mnt/fio --filename=/dev/data --thread --minimal --output=/run/fio.log \
            --ioengine=libaio --direct=1 --iodepth=8 --rw=randwrite --bsrange=4k-64k --fdatasync=64 \
            --verify=pattern --verify_fatal=1 $passes || exit 1
        cut -d ';' -f 5,6,47 /run/fio.log
    done"#;

pub fn disks_for_fio(lab: &Lab, tools: PathBuf) -> Vec<Disk> {
    vec![Disk::new(lab, "data", FIO_DISK), Disk { read_only: true, ..Disk::of("tools", tools) }]
}

/// The same with a checker of another make; the last image is checked here, too, when the VM is gone.
pub fn fio_verifies_a_disk_that_pivots_back_and_forth(lab: &Lab, machine: &mut Machine<'_>) {
    let start = Instant::now();
    let images = [lab.path("data.raw"), lab.image("data.other", FIO_DISK)];
    let load = machine.begin_script(FIO);
    eventually("fio to write", || (requests(machine, "data") > 100).then_some(()));
    let (rounds, mut under_load, mut before) = (rounds(), 0, 0);
    for round in 0..rounds {
        moves(lab, machine, "data", &images, round);
        assert!(!machine.is_over(&load), "the load goes on");
        let now = requests(machine, "data");
        under_load += usize::from(now > before);
        before = now;
    }
    machine.sh("touch /run/fio.stop");
    let said = machine.end(load);
    let passes: Vec<[u64; 3]> = said.lines().map(pass).collect();
    let count = passes.len();
    let took = start.elapsed();
    eprintln!("fio verified its disk {count} times in {rounds} pivots, {under_load} under load, {took:?}");
    // It is started again and again.
    assert!(under_load * 2 > rounds, "{said}");
    let whole = FIO_DISK >> 10;
    assert!(count > 0 && passes.iter().all(|pass| *pass == [0, whole, whole]), "{said}");
    machine.kill();
    is_from_one_pass(&images[rounds % 2], u32::try_from(count).unwrap());
}

/// Requests of the guest to a disk that are over.
fn requests(machine: &mut Machine<'_>, disk: &str) -> u64 {
    let stat = machine.sh(&format!("cat /sys/block/$(readlink /dev/{disk})/stat"));
    let fields: Vec<&str> = stat.split_whitespace().collect();
    [fields[0], fields[4]].iter().map(|field| field.parse::<u64>().unwrap()).sum()
}

fn pass(line: &str) -> [u64; 3] {
    let numbers: Vec<u64> = line.split(';').filter_map(|number| number.parse().ok()).collect();
    numbers.try_into().unwrap_or_else(|_| panic!("{line}"))
}

/// Writes of one pass of fio, one behind the other: each is its pass and its place in twelve bytes, over and over.
fn is_from_one_pass(image: &Path, pass: u32) {
    const BLOCK: usize = 4096;
    let image = std::fs::read(image).unwrap();
    let mut write = 0;
    for (at, block) in (0..).step_by(BLOCK).zip(image.chunks(BLOCK)) {
        let is_of = |write: usize| {
            let pattern = [&pass.to_be_bytes()[..], &(write as u64).to_le_bytes()].concat();
            block.iter().enumerate().all(|(i, byte)| *byte == pattern[(at - write + i) % pattern.len()])
        };
        if !is_of(write) {
            assert!(is_of(at), "at {at}, pass {pass}: {:?}", &block[..12]);
            write = at;
        }
    }
}
