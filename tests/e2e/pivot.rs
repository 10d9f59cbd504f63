//! Pivots with a witness: several disks, who may interfere, and how a VM ends in the middle of one.

use std::fs::File;
use std::path::{Path, PathBuf};

use coordinator::record::witness::{Verdict, Witness};
use serde_json::{Value, json};

use crate::harness::{Lab, Monitor, Vm, eventually, sha256};

const SIZE: u64 = 16 << 20;
const ONE: &str = "11111111-1111-4111-8111-111111111111";
const TWO: &str = "22222222-2222-4222-8222-222222222222";

/// Writes numbered blocks to both disks in turn, each flushed, the count last.
const WRITER: &str = "rm -f /tmp/stop /tmp/count; setsid sh -c 'i=0; while ! test -e /tmp/stop; do \
    for d in vda vdb; do echo block $i | dd of=/dev/$d bs=4096 seek=$((i % 1024)) conv=notrunc,fsync,sync || exit 1; done; \
    i=$((i+1)); echo $i > /tmp/so-far; done; mv /tmp/so-far /tmp/count' >/dev/null 2>&1 </dev/null &";

fn disks(lab: &Lab) -> ([PathBuf; 2], [PathBuf; 2]) {
    let images = |prefix: &str| ["a", "b"].map(|disk| lab.image(&format!("{prefix}-{disk}"), SIZE));
    (images("source"), images("target"))
}

fn boot<'a>(lab: &'a Lab, name: &'static str, sources: &[PathBuf; 2], more: &[&str]) -> Vm<'a> {
    let flags =
        [("a", &sources[0]), ("b", &sources[1])].map(|(id, image)| format!("{},id={id}", image.display()));
    lab.boot(name, &[&["--disk", &flags[0], "--disk", &flags[1]], more].concat())
}

/// The node of a target: called like its file.
fn node(target: &Path) -> &str {
    target.file_name().unwrap().to_str().unwrap()
}

/// Mirrors both disks until both mirrors are ready.
fn mirror(monitor: &mut Monitor, targets: &[PathBuf; 2], mode: &str) {
    for (device, target) in ["a", "b"].into_iter().zip(targets) {
        let arguments = json!({
            "job-id": format!("m-{device}"), "device": device, "target": target, "sync": "full",
            "mode": "existing", "format": "raw", "copy-mode": mode, "node-name": node(target),
        });
        monitor.run_with("drive-mirror", &arguments);
    }
    eventually("both mirrors ready", || {
        let jobs = monitor.run("query-jobs");
        jobs.as_array().unwrap().iter().all(|job| job["status"] == "ready").then_some(())
    });
}

fn witness(lab: &Lab, name: &str) -> PathBuf {
    let path = lab.path(name);
    Witness::create(&path).unwrap();
    path
}

fn verdict(path: &Path) -> Option<Verdict> {
    Witness::open(path).unwrap().read().unwrap().map(|decision| decision.verdict)
}

fn files(monitor: &mut Monitor) -> Vec<PathBuf> {
    let disks = monitor.run("query-block");
    disks.as_array().unwrap().iter().map(|disk| disk["inserted"]["file"].as_str().unwrap().into()).collect()
}

fn query(monitor: &mut Monitor, op: &str) -> Value {
    monitor.run_with("tarn-query-pivot", &json!({"op": op}))
}

#[test]
fn two_disks_pivot_at_one_instant_under_a_guest_that_writes_to_both() {
    let Some(lab) = Lab::new("pivot") else { return };
    let (sources, targets) = disks(&lab);
    let mut vm = boot(&lab, "pivot", &sources, &[]);
    let mut monitor = vm.monitor();
    vm.sh(WRITER);
    for (round, (op, mode)) in [(ONE, "background"), (TWO, "write-blocking")].into_iter().enumerate() {
        let (from, to) = if round == 0 { (&sources, &targets) } else { (&targets, &sources) };
        mirror(&mut monitor, to, mode);
        let path = witness(&lab, &format!("witness-{round}"));
        let asked = json!({"op": op, "gen": round + 1, "jobs": ["m-a", "m-b"], "witness": path});
        let info = monitor.run_with("tarn-pivot", &asked);
        assert_eq!((&info["state"], &info["witness"]), (&json!("pivoted"), &json!("durable")));
        assert!(info["held-us"].as_u64().unwrap() < 10_000_000, "{info}");
        assert_eq!(files(&mut monitor), *to);
        assert_eq!(verdict(&path), Some(Verdict::Pivoted));
        // All or none, at one instant: the sources stopped together. The writer numbers its blocks, first on a.
        let newest = from.each_ref().map(|image| newest_block(image));
        assert!(newest[0] == newest[1] || newest[0] == newest[1] + 1, "{newest:?}");
        assert_eq!(
            monitor.run_with("tarn-pivot", &asked),
            info,
            "asked again, it is answered and not done again"
        );
    }
    let before = vm.sh("cat /tmp/so-far");
    eventually("more blocks", || (vm.sh("cat /tmp/so-far") != before).then_some(()));
    vm.sh("touch /tmp/stop");
    eventually("the writer's end", || (vm.try_sh("test -e /tmp/count").0 == 0).then_some(()));
    vm.sh("n=$(cat /tmp/count); for d in vda vdb; do for i in $(seq $((n > 64 ? n - 64 : 0)) $((n - 1))); do \
           test \"$(dd if=/dev/$d bs=4096 skip=$((i % 1024)) count=1 2>/dev/null | head -n 1)\" = \"block $i\" || exit 1; \
           done; done");
    a_pause_belongs_to_an_operation(&mut monitor);
    a_disk_is_reopened_on_its_mirror(&lab, &mut vm, &mut monitor, &targets[0]);
    vm.power_off();
}

/// The highest number that the writer has left on an image.
fn newest_block(image: &Path) -> u64 {
    let bytes = std::fs::read(image).unwrap();
    let numbers = bytes.chunks(4096).take(1024).filter_map(|block| {
        let line = block.split(|byte| *byte == b'\n').next()?;
        std::str::from_utf8(line).ok()?.strip_prefix("block ")?.parse().ok()
    });
    numbers.max().unwrap_or(0)
}

fn a_pause_belongs_to_an_operation(monitor: &mut Monitor) {
    monitor.run_with("stop", &json!({"tarn-op": ONE}));
    let refused = monitor.refusal("cont", &Value::Null);
    assert!(refused.starts_with(&format!("The VM is paused by operation {ONE}")), "{refused}");
    assert_eq!(monitor.run("tarn-query-status")["paused-by"], json!([ONE]));
    monitor.run_with("cont", &json!({"tarn-op": ONE}));
    assert_eq!(monitor.status(), "running");
}

fn a_disk_is_reopened_on_its_mirror(lab: &Lab, vm: &mut Vm<'_>, monitor: &mut Monitor, target: &Path) {
    let mirror =
        json!({"device": "a", "target": target, "sync": "full", "mode": "existing", "format": "raw"});
    monitor.forget_events();
    monitor.run_with("drive-mirror", &mirror);
    monitor.await_event("BLOCK_JOB_READY");
    // As it was then: an empty file, and whoever reads it looks at its size.
    let path = lab.path("witness-2012");
    File::create(&path).unwrap();
    let info =
        monitor.run_with("drive-reopen", &json!({"device": "a", "new-image-file": target, "witness": path}));
    assert_eq!(info["state"], "pivoted");
    assert!(std::fs::metadata(&path).unwrap().len() > 0);
    let seen = vm.sh("echo 1 > /proc/sys/vm/drop_caches; sha256sum /dev/vda | cut -d ' ' -f 1");
    assert_eq!(seen, sha256(target));
}

/// A witness that somebody writes over: nobody can make a decision durable.
fn pivot_without_end(monitor: &mut Monitor, vm: &Vm<'_>, lab: &Lab) -> String {
    let path = witness(lab, "witness");
    // The last sync of a target takes its time, and the drain with it.
    monitor.run_with("tarn-fault-add", &json!({"node-name": "target-a", "op": "flush", "delay-ms": 3000}));
    let socket = vm.socket("monitor.sock");
    let arguments = json!({"op": ONE, "gen": 1, "jobs": ["m-a", "m-b"], "witness": path});
    let asking = std::thread::spawn(move || {
        let session = coordinator::MonitorSession::connect(&socket, crate::harness::limit()).unwrap();
        Monitor(session).refusal("tarn-pivot", &arguments)
    });
    eventually("the pivot to begin", || (query(monitor, ONE)["state"] == "draining").then_some(()));
    std::fs::write(&path, "my only copy").unwrap();
    let error = asking.join().unwrap();
    monitor.run_with("tarn-fault-remove", &json!({"node-name": "target-a"}));
    error
}

#[test]
fn a_guest_that_ends_waits_until_its_disks_are_decided() {
    let Some(lab) = Lab::new("pivot-undetermined") else { return };
    let (sources, targets) = disks(&lab);
    let mut vm = boot(&lab, "undetermined", &sources, &["--on-guest-reset", "exit"]);
    let mut monitor = vm.monitor();
    mirror(&mut monitor, &targets, "background");
    let error = pivot_without_end(&mut monitor, &vm, &lab);
    assert!(error.starts_with(&format!("Operation {ONE} is undetermined")), "{error}");
    assert_eq!(query(&mut monitor, ONE)["state"], "undetermined");
    assert_eq!(files(&mut monitor), sources);
    // Guest I/O is held.
    vm.sh("rm -f /tmp/written; setsid sh -c 'echo x | dd of=/dev/vda oflag=direct bs=512 conv=sync && touch /tmp/written' \
           >/dev/null 2>&1 </dev/null &");
    assert_ne!(vm.try_sh("test -e /tmp/written").0, 0);
    let refused = monitor.refusal("block-job-cancel", &json!({"device": "m-a", "force": true}));
    assert!(refused.contains(&format!("is part of operation {ONE}")), "{refused}");
    // At once, and without a sync, which would wait for the write that is held.
    vm.sh("(sleep 1; echo b > /proc/sysrq-trigger) >/dev/null 2>&1 </dev/null &");
    eventually("the guest's end, held back", || vm.log().contains("held back").then_some(()));
    assert_eq!(monitor.status(), "running");
    let aborted = monitor.run_with("tarn-pivot-abort", &json!({"op": ONE, "gen": 1}));
    assert_eq!(aborted["state"], "aborted");
    monitor.await_event("SHUTDOWN");
    assert!(vm.wait().success(), "{}", vm.log());
    assert_eq!(sha256(&sources[1]), sha256(&targets[1]));
}

#[test]
fn a_vm_that_ends_in_the_middle_of_a_pivot_leaves_both_images_the_same() {
    let Some(lab) = Lab::new("pivot-quit") else { return };
    let (sources, targets) = disks(&lab);
    let mut vm = boot(&lab, "quit", &sources, &[]);
    let mut monitor = vm.monitor();
    vm.sh(WRITER);
    eventually("some blocks", || (vm.try_sh("test $(cat /tmp/so-far) -gt 5").0 == 0).then_some(()));
    mirror(&mut monitor, &targets, "background");
    pivot_without_end(&mut monitor, &vm, &lab);
    monitor.run("quit");
    assert!(vm.wait().success(), "{}", vm.log());
    for (source, target) in sources.iter().zip(&targets) {
        assert!(newest_block(target) > 0);
        let [source, target] = [newest_block(source), newest_block(target)];
        // A write that was held may have been carried out; nobody was told.
        assert!(source == target || source == target + 1, "{source} {target}");
    }
}
