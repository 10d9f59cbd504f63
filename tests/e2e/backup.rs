//! Backups: what a copy holds is the disk at one moment, while the guest writes on.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{Lab, Monitor, Vm, eventually, sha256};
use crate::jobs::add;

const SIZE: u64 = 32 << 20;
/// Blocks that the guest writes to, at the beginning of each disk.
const SLOTS: usize = 512;
const BLOCK: usize = 4096;

/// The guest writes numbered blocks, each to one disk and then to the other, one after the other and flushed: at any
/// moment each disk has all blocks up to a number, and the first has at most one more than the second.
const WRITER: &str = "rm -f /tmp/stop /tmp/done; echo 0 > /tmp/so-far; setsid sh -c 'i=1; while ! test -e /tmp/stop; do \
    for disk in vda vdb; do echo block $i | dd of=/dev/$disk bs=4096 seek=$((i % 512)) conv=notrunc,fsync,sync || exit 1; \
    done; echo $i > /tmp/so-far; i=$((i+1)); done; touch /tmp/done' >/dev/null 2>&1 </dev/null &";

#[test]
fn a_copy_is_the_disk_at_one_moment_while_the_guest_writes() {
    let Some(lab) = Lab::new("backup") else { return };
    let disks = ["one", "two"].map(|name| lab.image(name, SIZE));
    let copies = ["copy", "other", "third"].map(|name| lab.image(name, SIZE));
    let [one, two] = disks.each_ref().map(|disk| disk.display().to_string());
    let mut vm =
        lab.boot("backup", &["--disk", &format!("{one},id=one"), "--disk", &format!("{two},id=two")]);
    let mut monitor = vm.monitor();
    vm.sh("for disk in vda vdb; do dd if=/dev/urandom of=/dev/$disk bs=1M seek=8 count=8 conv=notrunc,fsync; done 2>/dev/null");
    add(&mut monitor, "copy", &copies[0]);
    vm.sh(WRITER);

    one_disk_as_of_its_start(&mut vm, &mut monitor, [&disks[0], &copies[0]]);
    nothing_of_what_is_refused(&mut vm, &mut monitor);
    two_disks_at_one_moment(&mut vm, &mut monitor, [&copies[0], &copies[1]]);
    vm.sh("touch /tmp/stop");
    eventually("the writer's end", || (vm.try_sh("test -e /tmp/done").0 == 0).then_some(()));
    pending_holds_nobody(&mut vm, &mut monitor, [&disks[0], &copies[0]]);
    a_disk_that_stands(&mut monitor, [&disks[1], &copies[2]]);
    vm.power_off();
}

/// `JOB_STATUS_CHANGE` as `job:status`, others by their name without `BLOCK_JOB_`, up to and with `last`.
fn heard(monitor: &mut Monitor, last: &str) -> String {
    let mut heard: Vec<String> = Vec::new();
    while heard.last().is_none_or(|name| name != last) {
        let event = eventually(last, || monitor.0.next_event(Duration::from_secs(1)).expect("the monitor"));
        let text = |name: &str| event.data[name].as_str().unwrap_or_default().to_owned();
        assert!(!event.data.contains_key("error"), "{event:?}");
        heard.push(match event.name.as_str() {
            "JOB_STATUS_CHANGE" => format!("{}:{}", text("id"), text("status")),
            name => name.trim_start_matches("BLOCK_JOB_").to_owned(),
        });
    }
    heard.join(" ")
}

/// The number of the last block that the guest has written to both disks.
fn written(vm: &mut Vm<'_>) -> u64 {
    vm.sh("cat /tmp/so-far").parse().expect("a number")
}

fn wait_for_blocks(vm: &mut Vm<'_>, more: u64) -> u64 {
    let before = written(vm);
    eventually("more blocks", || Some(written(vm)).filter(|now| *now >= before + more))
}

/// The number up to which an image has all blocks; none of a later one.
fn blocks(image: &Path) -> u64 {
    let file = File::open(image).unwrap();
    let slots: Vec<Option<u64>> = (0..SLOTS as u64)
        .map(|slot| {
            let mut bytes = [0; 32];
            file.read_exact_at(&mut bytes, slot * BLOCK as u64).unwrap();
            let text = bytes.split(|byte| *byte == b'\n').next().unwrap();
            String::from_utf8_lossy(text).strip_prefix("block ").map(|number| number.parse().unwrap())
        })
        .collect();
    let last = slots.iter().flatten().max().copied().unwrap_or(0);
    for (slot, found) in (0..).zip(slots) {
        let wanted = (1..=last).rev().take(SLOTS).find(|number| number % SLOTS as u64 == slot);
        assert_eq!(found, wanted, "slot {slot} of {}, which ends with {last}", image.display());
    }
    last
}

/// What the guest has not written is the same.
fn rest(image: &Path) -> Vec<u8> {
    fs::read(image).unwrap().split_off(SLOTS * BLOCK)
}

fn backup(monitor: &mut Monitor, more: &Value) {
    let mut arguments = json!({"job-id": "b0", "device": "one", "target": "copy", "sync": "full"});
    arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    monitor.run_with("blockdev-backup", &arguments);
}

fn one_disk_as_of_its_start(vm: &mut Vm<'_>, monitor: &mut Monitor, [disk, copy]: [&Path; 2]) {
    let before = wait_for_blocks(vm, 2);
    monitor.forget_events();
    backup(monitor, &json!({"speed": 1 << 18}));
    assert_eq!(heard(monitor, "b0:running"), "b0:created b0:running");
    let after = wait_for_blocks(vm, 6);
    let job = monitor.run("query-block-jobs")[0].take();
    assert_eq!(
        (&job["type"], &job["status"], &job["len"]),
        (&json!("backup"), &json!("running"), &json!(SIZE))
    );
    let busy = monitor.refusal("block_resize", &json!({"device": "one", "size": 2 * SIZE}));
    assert!(busy.contains("in use by block job: backup"), "{busy}");
    monitor.run_with("block-job-set-speed", &json!({"device": "b0", "speed": 0}));
    assert_eq!(heard(monitor, "b0:null"), "b0:waiting b0:pending COMPLETED b0:concluded b0:null");
    let saved = blocks(copy);
    assert!((before..after - 3).contains(&saved), "{saved} of {before} to {after}");
    assert_eq!(rest(disk), rest(copy));
}

fn nothing_of_what_is_refused(vm: &mut Vm<'_>, monitor: &mut Monitor) {
    let first = json!({"job-id": "b0", "device": "one", "target": "copy", "sync": "full"});
    let second = json!({"job-id": "b1", "device": "two", "target": "copy", "sync": "full"});
    for (action, why) in [
        (json!({"type": "abort", "data": {}}), "Transaction aborted using Abort action"),
        (
            json!({"type": "blockdev-backup", "data": second}),
            "Node 'copy' is busy: block device is in use by block job: backup",
        ),
    ] {
        let actions = json!([{"type": "blockdev-backup", "data": first}, action]);
        assert_eq!(monitor.refusal("transaction", &json!({"actions": actions})), why);
    }
    assert_eq!(monitor.run("query-jobs"), json!([]));
    wait_for_blocks(vm, 1);
}

fn two_disks_at_one_moment(vm: &mut Vm<'_>, monitor: &mut Monitor, [copy, other]: [&Path; 2]) {
    let first = json!({"job-id": "b0", "device": "one", "target": "copy", "sync": "full", "speed": 1 << 18});
    let second = json!({"job-id": "b1", "device": "two", "target": other, "sync": "full", "mode": "existing",
        "format": "raw", "speed": 1 << 18});
    let actions = json!([
        {"type": "blockdev-backup", "data": first},
        {"type": "drive-backup", "data": second},
    ]);
    let grouped = json!({"actions": actions, "properties": {"completion-mode": "grouped"}});
    let before = written(vm);
    monitor.forget_events();
    monitor.run_with("transaction", &grouped);
    assert_eq!(heard(monitor, "b1:running"), "b0:created b1:created b0:running b1:running");
    let after = wait_for_blocks(vm, 6);
    monitor.run_with("block-job-set-speed", &json!({"device": "b0", "speed": 0}));
    assert_eq!(heard(monitor, "b0:waiting"), "b0:waiting");
    wait_for_blocks(vm, 1);
    monitor.run_with("block-job-set-speed", &json!({"device": "b1", "speed": 0}));
    let end = "b1:waiting b1:pending b0:pending \
               COMPLETED b1:concluded b1:null COMPLETED b0:concluded b0:null";
    assert_eq!(heard(monitor, "b0:null"), end);
    let (one, two) = (blocks(copy), blocks(other));
    assert!(one == two || one == two + 1, "{one} and {two} are not of one moment");
    assert!((before..after - 3).contains(&two), "{two} of {before} to {after}");
}

/// The copy is complete, and the guest works on.
fn pending_holds_nobody(vm: &mut Vm<'_>, monitor: &mut Monitor, [disk, copy]: [&Path; 2]) {
    let before = sha256(disk);
    monitor.forget_events();
    backup(monitor, &json!({"auto-finalize": false, "auto-dismiss": false}));
    let pending = "b0:created b0:running b0:waiting b0:pending PENDING";
    assert_eq!(heard(monitor, "PENDING"), pending);
    vm.sh("echo later | dd of=/dev/vda bs=4096 seek=4 conv=notrunc,fsync,sync 2>/dev/null");
    monitor.run_with("job-finalize", &json!({"id": "b0"}));
    assert_eq!(monitor.run("query-jobs")[0]["status"], "concluded");
    monitor.run_with("job-dismiss", &json!({"id": "b0"}));
    assert_eq!(sha256(copy), before);
    assert_ne!(sha256(disk), before);
    // Of changes alone it has no end but a cancel.
    monitor.forget_events();
    backup(monitor, &json!({"sync": "none"}));
    vm.sh("echo last | dd of=/dev/vda bs=4096 seek=4 conv=notrunc,fsync,sync 2>/dev/null");
    assert_eq!(monitor.run("query-block-jobs")[0]["status"], "running");
    monitor.run_with("block-job-cancel", &json!({"device": "b0"}));
    let cancelled = "b0:created b0:running b0:aborting CANCELLED b0:concluded b0:null";
    assert_eq!(heard(monitor, "b0:null"), cancelled);
    let mut saved = [0; 5];
    File::open(copy).unwrap().read_exact_at(&mut saved, 4 * BLOCK as u64).unwrap();
    assert_eq!(&saved, b"later");
}

fn a_disk_that_stands(monitor: &mut Monitor, [disk, copy]: [&Path; 2]) {
    fs::remove_file(copy).unwrap();
    monitor.run("stop");
    monitor.forget_events();
    let drive = json!({"device": "two", "target": copy, "sync": "full", "format": "raw"});
    monitor.run_with("drive-backup", &drive);
    let end = "two:created two:running two:waiting two:pending COMPLETED two:concluded two:null";
    assert_eq!(heard(monitor, "two:null"), end);
    assert_eq!(sha256(disk), sha256(copy));
    monitor.run("cont");
}
