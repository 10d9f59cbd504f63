//! Limits and faults of disks: a guest meets what it was told it would, and nothing else.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{Lab, Monitor, Vm, eventually};

const MIB: u64 = 1 << 20;

fn block(monitor: &mut Monitor, device: &str) -> Value {
    let all = monitor.run("query-block");
    all.as_array().unwrap().iter().find(|info| info["device"] == device).expect("the disk").clone()
}

fn add_fault(monitor: &mut Monitor, fault: &Value) -> Value {
    monitor.run_with("tarn-fault-add", fault)["id"].clone()
}

fn throttle(monitor: &mut Monitor, bps: u64) {
    monitor.run_with(
        "block_set_io_throttle",
        &json!({"device": "slow", "bps": bps, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0}),
    );
}

#[test]
fn disks_fail_and_slow_down_as_they_are_told() {
    let Some(lab) = Lab::new("filters") else { return };
    let images = ["bad", "stops", "slow"].map(|id| lab.image(&format!("{id}.raw"), 16 * MIB));
    let [bad, stops, slow] = images.each_ref().map(|image| image.to_str().unwrap());
    let disks = [
        format!("{bad},id=bad"),
        format!("{stops},id=stops,werror=stop"),
        format!("{slow},id=slow,bps=1M,engine=threads"),
    ];
    let mut args = vec!["--fault", "bad:op=read,errno=EIO,sector=2048"];
    disks.iter().for_each(|disk| args.extend(["--disk", disk]));
    let mut vm = lab.boot("filters", &args);
    let mut monitor = vm.monitor();

    one_sector_is_bad(&mut vm, &mut monitor);
    a_write_is_torn_and_a_flush_late(&mut vm, &mut monitor, &images[0]);
    a_failed_write_is_repeated_when_the_fault_is_gone(&mut vm, &mut monitor, &images[1]);
    a_limit_is_kept_and_a_stop_does_not_wait_for_it(&mut vm, &mut monitor);
    vm.power_off();
}

fn one_sector_is_bad(vm: &mut Vm<'_>, monitor: &mut Monitor) {
    // Page by page of 8 sectors, whatever this guest's dd makes of `direct`.
    let failing = |vm: &mut Vm<'_>, dd: &str| {
        vm.sh(&format!(
            "for p in $(seq 250 262); do dd {dd}=$p bs=4096 count=1 2>/dev/null || echo $p; done | tr '\\n' ' '"
        ))
    };
    let read = "if=/dev/vda of=/dev/null iflag=direct skip";
    assert_eq!(failing(vm, read).trim(), "256");
    let info = block(monitor, "bad");
    assert_eq!(info["tarn-faults"][0]["errno"], "EIO");
    assert!(info["tarn-faults"][0]["hits"].as_u64() >= Some(1), "{info}");
    monitor.run_with("tarn-fault-remove", &json!({"device": "bad"}));
    assert_eq!(failing(vm, read).trim(), "");

    let fault = json!({"device": "bad", "op": "write", "errno": "EIO", "sector": 2063, "sectors": 2});
    let id = add_fault(monitor, &fault);
    assert_eq!(failing(vm, "if=/dev/zero of=/dev/vda conv=fsync oflag=direct seek").trim(), "257 258");
    assert_eq!(monitor.status(), "running");
    monitor.run_with("tarn-fault-remove", &json!({"device": "bad", "id": id}));
    assert!(block(monitor, "bad").get("tarn-faults").is_none());
}

fn a_write_is_torn_and_a_flush_late(vm: &mut Vm<'_>, monitor: &mut Monitor, image: &Path) {
    add_fault(monitor, &json!({"device": "bad", "op": "write", "torn": 512, "count": 1}));
    vm.sh("yes | dd of=/dev/vda bs=4096 count=1 iflag=fullblock conv=fsync 2>/dev/null");
    let written = fs::read(image).unwrap();
    assert!(written[..512].iter().all(|byte| *byte != 0), "the beginning has landed");
    assert!(written[512..4096].iter().all(|byte| *byte == 0), "the rest has not");
    add_fault(monitor, &json!({"device": "bad", "op": "flush", "delay-ms": 1500, "count": 1}));
    let start = Instant::now();
    vm.sh("dd if=/dev/zero of=/dev/vda bs=4096 seek=9 count=1 conv=fsync 2>/dev/null");
    assert!(start.elapsed() >= Duration::from_millis(1500), "{:?}", start.elapsed());
    monitor.run_with("tarn-fault-remove", &json!({"device": "bad"}));
}

fn a_failed_write_is_repeated_when_the_fault_is_gone(vm: &mut Vm<'_>, monitor: &mut Monitor, image: &Path) {
    add_fault(monitor, &json!({"device": "stops", "op": "write", "errno": "EIO", "sector": 1000}));
    monitor.forget_events();
    vm.sh("(yes | dd of=/dev/vdb bs=64k count=16 iflag=fullblock conv=fsync; echo $? >/tmp/stops) >/dev/null 2>&1 &");
    for _ in 0..3 {
        let error = monitor.await_event("BLOCK_IO_ERROR");
        assert_eq!((&error.data["device"], &error.data["action"]), (&json!("stops"), &json!("stop")));
        monitor.await_event("STOP");
        assert_eq!(monitor.status(), "io-error");
        assert_eq!(block(monitor, "stops")["io-status"], "failed");
        monitor.forget_events();
        // In vain, as long as there is the fault.
        monitor.run("cont");
    }
    monitor.await_event("STOP");
    monitor.run_with("tarn-fault-remove", &json!({"device": "stops"}));
    monitor.run("cont");
    let ended = |vm: &mut Vm<'_>| vm.sh("cat /tmp/stops 2>/dev/null; true").parse::<u8>().ok();
    assert_eq!(eventually("the write's end", || ended(vm)), 0);
    let written = fs::read(image).unwrap();
    assert!(written[..1 << 20].chunks(2).all(|pair| pair == b"y\n"), "every byte is there");
}

fn a_limit_is_kept_and_a_stop_does_not_wait_for_it(vm: &mut Vm<'_>, monitor: &mut Monitor) {
    assert_eq!(block(monitor, "slow")["inserted"]["bps"], MIB);
    let start = Instant::now();
    vm.sh("dd if=/dev/zero of=/dev/vdc bs=256k count=16 conv=fsync 2>/dev/null");
    let elapsed = start.elapsed();
    assert!(elapsed > Duration::from_secs(3), "4 MiB at 1 MiB/s in {elapsed:?}");
    assert!(elapsed < Duration::from_secs(20), "4 MiB at 1 MiB/s in {elapsed:?}");

    // A byte per second: what is under way would take days.
    throttle(monitor, 1);
    vm.sh("(dd if=/dev/zero of=/dev/vdc bs=1M count=4 conv=fsync; echo $? >/tmp/slow) >/dev/null 2>&1 &");
    let waits = |vm: &mut Vm<'_>| vm.sh("awk '{print $1 + $2}' /sys/block/vdc/inflight") != "0";
    eventually("requests that wait", || waits(vm).then_some(()));
    let start = Instant::now();
    monitor.run("stop");
    assert!(start.elapsed() < Duration::from_secs(10), "a stop took {:?}", start.elapsed());
    monitor.run("cont");
    assert_eq!(block(monitor, "slow")["inserted"]["bps"], 1);
    throttle(monitor, 0);
    let ended = |vm: &mut Vm<'_>| vm.sh("cat /tmp/slow 2>/dev/null; true").parse::<u8>().ok();
    assert_eq!(eventually("the write's end", || ended(vm)), 0);
}

/// `count` blocks of 4 KiB from block `first` on, of lines of one letter; nothing is flushed.
fn write(vm: &mut Vm<'_>, device: &str, letter: char, first: u64, count: u64) {
    vm.sh(&format!(
        "yes {letter} | dd of=/dev/{device} bs=4096 seek={first} count={count} iflag=fullblock oflag=direct 2>/dev/null"
    ));
}

fn flush(vm: &mut Vm<'_>, device: &str) {
    vm.sh(&format!("dd if=/dev/null of=/dev/{device} conv=fsync,notrunc 2>/dev/null"));
}

/// The letter of each of the first blocks of an image, `.` where there is none, `?` where there is more than one thing.
fn letters(image: &Path, blocks: usize) -> String {
    let bytes = fs::read(image).unwrap();
    let letter = |block: &[u8]| match block[0] {
        0 if block.iter().all(|byte| *byte == 0) => '.',
        letter if block.chunks(2).all(|pair| pair == [letter, b'\n']) => letter.into(),
        _ => '?',
    };
    bytes.chunks(4096).take(blocks).map(letter).collect()
}

#[test]
fn what_was_not_flushed_is_lost_with_the_process_and_nothing_else() {
    let Some(lab) = Lab::new("power") else { return };
    let [plain, early, target] = ["plain", "early", "target"].map(|name| lab.image(name, 16 * MIB));
    let disks = [&plain, &early]
        .map(|image| format!("{},id={}", image.display(), image.file_name().unwrap().display()));
    let faults = ["plain:op=volatile-cache", "early:op=volatile-cache,seed=1"];
    let args = ["--disk", &disks[0], "--disk", &disks[1], "--fault", faults[0], "--fault", faults[1]];
    let mut vm = lab.boot("power", &args);
    let mut monitor = vm.monitor();

    write(&mut vm, "vda", 'a', 0, 6);
    assert_eq!(letters(&plain, 8), "........");
    let seen = vm.sh("dd if=/dev/vda bs=4096 count=6 iflag=direct 2>/dev/null | tr -d '\\n' | tr -s a");
    assert_eq!(seen, "a", "the guest sees what it has written");
    let fault = block(&mut monitor, "plain")["tarn-faults"][0].clone();
    assert_eq!((&fault["op"], fault.get("seed")), (&json!("volatile-cache"), None));
    assert!(fault["unflushed"].as_u64() >= Some(6 * 4096), "{fault}");
    flush(&mut vm, "vda");
    assert_eq!(letters(&plain, 8), "aaaaaa..");

    // Who stops a VM finds everything, and so does who does not want the fault any more.
    write(&mut vm, "vda", 'b', 1, 1);
    monitor.run("stop");
    assert_eq!(letters(&plain, 8), "abaaaa..");
    monitor.run("cont");
    write(&mut vm, "vda", 'c', 2, 1);
    monitor.run_with("tarn-fault-remove", &json!({"device": "plain"}));
    eventually("what was kept", || (letters(&plain, 8) == "abcaaa..").then_some(()));
    write(&mut vm, "vda", 'd', 3, 1);
    assert_eq!(letters(&plain, 8), "abcdaa..");
    add_fault(&mut monitor, &json!({"device": "plain", "op": "volatile-cache"}));
    write(&mut vm, "vda", 'e', 4, 1);

    // A mirror copies what is kept; its target has a cache of its own, which it brings along.
    monitor.run_with("blockdev-add", &json!({"driver": "file", "node-name": "t", "filename": target}));
    add_fault(&mut monitor, &json!({"node-name": "t", "op": "volatile-cache"}));
    monitor.run_with(
        "blockdev-mirror",
        &json!({"job-id": "m", "device": "plain", "target": "t", "sync": "full"}),
    );
    monitor.await_event("BLOCK_JOB_READY");
    assert_eq!(letters(&plain, 8), "abcdaa..");
    monitor.run_with("block-job-complete", &json!({"device": "m"}));
    monitor.await_event("BLOCK_JOB_COMPLETED");
    assert_eq!(letters(&target, 8), "abcdea..");
    assert_eq!(block(&mut monitor, "plain")["tarn-faults"][0]["node-name"], "t");
    write(&mut vm, "vda", 'f', 5, 1);

    write(&mut vm, "vdb", 'a', 0, 64);
    flush(&mut vm, "vdb");
    (32..96).for_each(|at| write(&mut vm, "vdb", 'b', at, 1));
    vm.kill();
    assert_eq!(letters(&target, 8), "abcdea..", "the last write was not flushed");
    let left = letters(&early, 97);
    assert_eq!((&left[..32], &left[96..]), (&*"a".repeat(32), "."));
    let early: String = left[32..96].chars().map(|letter| if letter == 'b' { 'b' } else { '-' }).collect();
    assert!(early.contains('b') && early.contains('-'), "some of it was early: {left}");
}
