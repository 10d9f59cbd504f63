//! Jobs: a disk moves to another image under a guest that works on it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{Lab, Monitor, Vm, eventually, sha256};

const SIZE: u64 = 32 << 20;
/// Where a guest's mark goes, in sectors.
const MARK: u64 = 60_000;

/// The guest writes one numbered block after the other, each flushed, until told to stop.
const WRITER: &str = "rm -f /tmp/stop /tmp/count; setsid sh -c 'i=0; while ! test -e /tmp/stop; do \
    echo block $i | dd of=/dev/vda bs=4096 seek=$((i % 1024)) conv=notrunc,fsync,sync || exit 1; \
    i=$((i+1)); echo $i > /tmp/so-far; done; mv /tmp/so-far /tmp/count' >/dev/null 2>&1 </dev/null &";

#[test]
fn a_disk_moves_under_a_guest_that_writes() {
    let Some(lab) = Lab::new("jobs") else { return };
    let [first, second, third] = ["first", "second", "third"].map(|name| lab.image(name, SIZE));
    let mut vm = lab.boot("jobs", &["--disk", &format!("{},id=data", first.display())]);
    let mut monitor = vm.monitor();
    vm.sh("dd if=/dev/urandom of=/dev/vda bs=1M seek=8 count=8 conv=notrunc,fsync 2>/dev/null");

    moves_while_the_guest_writes(&mut vm, &mut monitor, &second);
    moves_in_two_phases(&mut vm, &mut monitor, [&second, &third]);
    moves_while_the_guest_stands(&mut vm, &mut monitor, &first);
    ends_with_the_vm(&mut vm, &mut monitor, [&first, &second]);
}

fn add(monitor: &mut Monitor, name: &str, image: &Path) {
    let file = json!({"driver": "file", "filename": image});
    monitor.run_with("blockdev-add", &json!({"driver": "raw", "node-name": name, "file": file}));
}

fn mirror(monitor: &mut Monitor, target: &str, more: &Value) {
    let mut arguments = json!({"job-id": "m0", "device": "data", "target": target, "sync": "full"});
    for (name, value) in more.as_object().unwrap() {
        arguments[name] = value.clone();
    }
    monitor.run_with("blockdev-mirror", &arguments);
}

fn file(monitor: &mut Monitor) -> String {
    monitor.run("query-block")[0]["inserted"]["file"].as_str().unwrap().to_owned()
}

/// `JOB_STATUS_CHANGE` by its status, others by their name, up to the event `last`.
fn told(monitor: &mut Monitor, last: &str) -> Vec<String> {
    let mut told: Vec<String> = Vec::new();
    while told.last().is_none_or(|name| name != last) {
        let event = eventually(last, || {
            monitor.0.next_event(std::time::Duration::from_secs(1)).expect("the monitor is there")
        });
        assert!(!event.data.contains_key("error"), "{event:?}");
        told.push(match event.name.as_str() {
            "JOB_STATUS_CHANGE" => event.data["status"].as_str().unwrap().to_owned(),
            name => name.to_owned(),
        });
    }
    told
}

/// Marks the disk from within.
fn mark(text: &str) -> String {
    format!("echo {text} | dd of=/dev/vda bs=512 seek={MARK} conv=notrunc,fsync 2>/dev/null")
}

fn has_mark(image: &Path, text: &str) -> bool {
    let mut bytes = vec![0; text.len()];
    File::open(image).unwrap().read_exact_at(&mut bytes, MARK * 512).unwrap();
    bytes == text.as_bytes()
}

/// What the guest reads is what the image holds.
fn is_all_of(vm: &mut Vm<'_>, image: &Path) {
    let seen = vm.sh("echo 1 > /proc/sys/vm/drop_caches; sha256sum /dev/vda | cut -d ' ' -f 1");
    assert_eq!(seen, sha256(image), "{}", image.display());
}

fn moves_while_the_guest_writes(vm: &mut Vm<'_>, monitor: &mut Monitor, to: &Path) {
    vm.sh(WRITER);
    add(monitor, "second", to);
    monitor.forget_events();
    mirror(monitor, "second", &json!({}));
    assert_eq!(told(monitor, "BLOCK_JOB_READY"), ["created", "running", "ready", "BLOCK_JOB_READY"]);
    let busy = monitor.refusal("block_resize", &json!({"device": "data", "size": 2 * SIZE}));
    assert!(busy.contains("is busy: block device is in use by block job: mirror"), "{busy}");
    monitor.run_with("block-job-complete", &json!({"device": "m0"}));
    assert_eq!(told(monitor, "null"), ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]);
    assert_eq!(file(monitor), to.display().to_string());
    // The writer goes on, and nothing of its work is lost.
    let before: u64 = vm.sh("cat /tmp/so-far").parse().unwrap();
    eventually("more blocks", || {
        vm.sh("cat /tmp/so-far").parse().is_ok_and(|now: u64| now > before + 2).then_some(())
    });
    vm.sh("touch /tmp/stop");
    eventually("the writer's end", || (vm.try_sh("test -e /tmp/count").0 == 0).then_some(()));
    vm.sh("n=$(cat /tmp/count); for i in $(seq $((n > 32 ? n - 32 : 0)) $((n - 1))); do \
           test \"$(dd if=/dev/vda bs=4096 skip=$((i % 1024)) count=1 2>/dev/null | head -n 1)\" = \"block $i\" || exit 1; done");
    is_all_of(vm, to);
}

/// Every write goes to both images; at pending the guest is held; the client decides.
fn moves_in_two_phases(vm: &mut Vm<'_>, monitor: &mut Monitor, [from, to]: [&Path; 2]) {
    add(monitor, "third", to);
    let phases = json!({"copy-mode": "write-blocking", "auto-finalize": false, "auto-dismiss": false});
    monitor.forget_events();
    mirror(monitor, "third", &phases);
    told(monitor, "BLOCK_JOB_READY");
    vm.sh(&mark("active"));
    assert!(has_mark(to, "active"), "a write-blocking mirror has it when the guest's write is done");
    monitor.run_with("block-job-complete", &json!({"device": "m0"}));
    assert_eq!(told(monitor, "BLOCK_JOB_PENDING"), ["waiting", "pending", "BLOCK_JOB_PENDING"]);
    assert_eq!(sha256(from), sha256(to), "both are the same at pending");
    vm.sh(&format!(
        "rm -f /tmp/written; setsid sh -c '{} && touch /tmp/written' >/dev/null 2>&1 </dev/null &",
        mark("held")
    ));
    assert_ne!(vm.try_sh("test -e /tmp/written").0, 0, "guest I/O is held at pending");
    assert_eq!(file(monitor), from.display().to_string());
    monitor.run_with("job-finalize", &json!({"id": "m0"}));
    assert_eq!(file(monitor), to.display().to_string(), "it has happened when finalize returns");
    eventually("the held write", || (vm.try_sh("test -e /tmp/written").0 == 0).then_some(()));
    assert!(has_mark(to, "held") && has_mark(from, "active"));
    assert_eq!(monitor.run("query-jobs")[0]["status"], "concluded");
    monitor.run_with("job-dismiss", &json!({"id": "m0"}));
    // The former image is a node again, and free.
    monitor.run_with("blockdev-del", &json!({"node-name": "second"}));
    is_all_of(vm, to);
}

/// Jobs go on while the VM is stopped.
fn moves_while_the_guest_stands(vm: &mut Vm<'_>, monitor: &mut Monitor, to: &Path) {
    fs::remove_file(to).unwrap();
    monitor.run("stop");
    monitor.forget_events();
    let target = json!({"job-id": "m0", "device": "data", "target": to, "sync": "full", "format": "raw"});
    monitor.run_with("drive-mirror", &target);
    told(monitor, "BLOCK_JOB_READY");
    monitor.run_with("job-complete", &json!({"id": "m0"}));
    told(monitor, "null");
    assert_eq!((file(monitor), monitor.status()), (to.display().to_string(), "paused".into()));
    monitor.run("cont");
    vm.sh(&mark("after"));
    assert!(has_mark(to, "after"));
    is_all_of(vm, to);
}

fn ends_with_the_vm(vm: &mut Vm<'_>, monitor: &mut Monitor, [from, to]: [&Path; 2]) {
    add(monitor, "again", to);
    mirror(monitor, "again", &json!({"speed": 1}));
    assert_eq!(monitor.run("query-block-jobs")[0]["speed"], 1);
    monitor.forget_events();
    monitor.run("quit");
    let last = told(monitor, "null");
    assert_eq!(last, ["SHUTDOWN", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]);
    assert!(vm.wait().success());
    assert!(has_mark(from, "after"));
}
