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
