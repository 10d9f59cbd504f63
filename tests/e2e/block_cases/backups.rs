//! Backups: what a copy holds is the disk at one moment, while the guest writes on.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::MIB;
use super::machine::{Disk, Machine, assert_same};
use crate::harness::{Lab, eventually, sha256};

const SIZE: u64 = 32 * MIB;
/// Blocks that the guest writes to, at the beginning of each disk.
const SLOTS: usize = 512;
const BLOCK: usize = 4096;
/// So slow that the guest has time to write.
const SLOW: u64 = MIB / 4;

/// The guest writes numbered blocks, each to one disk and then to the other, one after the other and flushed: at any
/// moment each disk has all blocks up to a number, and the first has at most one more than the second.
const WRITER: &str = "rm -f /run/stop /run/done; echo 0 > /run/so-far; setsid sh -c 'i=1; while ! test -e /run/stop; do \
    for disk in one two; do echo block $i | dd of=/dev/$disk bs=4096 seek=$((i % 512)) conv=notrunc,fsync,sync || exit 1; \
    done; echo $i > /run/so-far; i=$((i+1)); done; touch /run/done' >/dev/null 2>&1 </dev/null &";

pub fn disks(lab: &Lab) -> Vec<Disk> {
    ["one", "two"].map(|id| Disk::new(lab, id, SIZE)).into()
}

/// Nodes `copy` and `other`, and a guest that writes until [`the_writer_ends`].
pub fn prepare(lab: &Lab, machine: &mut Machine<'_>) {
    for name in ["copy", "other"] {
        machine.add(name, &lab.image(name, SIZE));
    }
    let noise = "dd if=/dev/urandom of=/dev/$disk bs=1M seek=8 count=8 conv=notrunc,fsync 2>/dev/null";
    machine.sh(&format!("for disk in one two; do {noise}; done"));
    machine.sh(WRITER);
}

fn the_writer_ends(machine: &mut Machine<'_>) {
    machine.sh("touch /run/stop");
    eventually("the writer's end", || (machine.sh("ls /run").contains("done")).then_some(()));
}

/// `JOB_STATUS_CHANGE` as `job:status`, others by their name without `BLOCK_JOB_`, up to and with `last`; an error after
/// the event that tells of it.
fn heard(machine: &mut Machine<'_>, last: &str) -> String {
    let mut heard: Vec<String> = Vec::new();
    while heard.last().is_none_or(|name| name != last) {
        let next = || machine.monitor.0.next_event(Duration::from_secs(1)).expect("the monitor is there");
        let event = eventually(last, next);
        let text = |name: &str| event.data[name].as_str().unwrap_or_default().to_owned();
        let name = match event.name.as_str() {
            "JOB_STATUS_CHANGE" => format!("{}:{}", text("id"), text("status")),
            "BLOCK_JOB_ERROR" => format!("ERROR({},{})", text("operation"), text("action")),
            name if event.data.contains_key("error") => format!("{name}({})", text("error")),
            name => name.to_owned(),
        };
        // QEMU's jobs stop for a moment and go on whenever something drains their disk.
        let again = name.ends_with(":paused") || name.ends_with(":running") && heard.contains(&name);
        if !(machine.is_reference() && again) {
            heard.push(name.trim_start_matches("BLOCK_JOB_").to_owned());
        }
    }
    heard.join(" ")
}

/// The number of the last block that the guest has written to both disks.
fn written(machine: &mut Machine<'_>) -> u64 {
    machine.sh("cat /run/so-far").parse().unwrap_or(0)
}

fn wait_for_blocks(machine: &mut Machine<'_>, more: u64) -> u64 {
    let before = written(machine);
    eventually("more blocks", || Some(written(machine)).filter(|now| *now >= before + more))
}

/// The number up to which an image has all blocks; none of a later one.
fn blocks(image: &Path) -> u64 {
    let file = File::open(image).unwrap();
    let number = |slot: usize| -> Option<u64> {
        let mut bytes = [0; 32];
        file.read_exact_at(&mut bytes, (slot * BLOCK) as u64).unwrap();
        let line = bytes.split(|byte| *byte == b'\n').next().unwrap();
        String::from_utf8_lossy(line).strip_prefix("block ").map(|number| number.parse().unwrap())
    };
    let slots: Vec<_> = (0..SLOTS).map(number).collect();
    let last = slots.iter().flatten().max().copied().unwrap_or(0);
    for (slot, found) in (0..).zip(slots) {
        let wanted = (1..=last).rev().take(SLOTS).find(|number| number % SLOTS as u64 == slot);
        assert_eq!(found, wanted, "slot {slot} of {}, which ends with {last}", image.display());
    }
    last
}

/// What the guest does not write to.
fn rest(image: &Path) -> Vec<u8> {
    fs::read(image).unwrap().split_off(SLOTS * BLOCK)
}

fn arguments(more: &Value) -> Value {
    let mut arguments = json!({"job-id": "b0", "device": "one", "target": "copy", "sync": "full"});
    arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    arguments
}

fn backup(machine: &mut Machine<'_>, more: &Value) {
    machine.monitor.forget_events();
    machine.monitor.run_with("blockdev-backup", &arguments(more));
}

fn action(kind: &str, data: &Value) -> Value {
    json!({"type": kind, "data": data})
}

fn set_speed(machine: &mut Machine<'_>, job: &str, speed: u64) {
    machine.monitor.run_with("block-job-set-speed", &json!({"device": job, "speed": speed}));
}

pub fn a_copy_is_the_disk_as_of_its_start(lab: &Lab, machine: &mut Machine<'_>) {
    let before = wait_for_blocks(machine, 2);
    backup(machine, &json!({"speed": SLOW}));
    let after = wait_for_blocks(machine, 6);
    let job = machine.monitor.run("query-block-jobs")[0].take();
    assert_eq!(
        (&job["type"], &job["status"], &job["len"]),
        (&json!("backup"), &json!("running"), &json!(SIZE))
    );
    set_speed(machine, "b0", 0);
    let life = "b0:created b0:running b0:waiting b0:pending COMPLETED b0:concluded b0:null";
    assert_eq!(heard(machine, "b0:null"), life);
    let saved = blocks(&lab.path("copy"));
    assert!((before..after - 3).contains(&saved), "{saved} of {before} to {after}");
    assert!(rest(&lab.path("one.raw")) == rest(&lab.path("copy")), "what the guest has not written differs");
}

pub fn two_copies_of_a_transaction_are_of_one_moment(lab: &Lab, machine: &mut Machine<'_>) {
    let first = arguments(&json!({"speed": SLOW}));
    let second = json!({"job-id": "b1", "device": "two", "target": "other", "speed": SLOW});
    let actions = [&first, &arguments(&second)].map(|data| action("blockdev-backup", data));
    let before = written(machine);
    machine.monitor.forget_events();
    let grouped = json!({"actions": actions, "properties": {"completion-mode": "grouped"}});
    machine.monitor.run_with("transaction", &grouped);
    assert_eq!(heard(machine, "b1:running"), "b0:created b1:created b0:running b1:running");
    let after = wait_for_blocks(machine, 6);
    set_speed(machine, "b0", 0);
    heard(machine, "b0:waiting");
    // It waits for the other, and not the guest for it.
    wait_for_blocks(machine, 1);
    set_speed(machine, "b1", 0);
    let end =
        "b1:waiting b1:pending b0:pending COMPLETED b1:concluded b1:null COMPLETED b0:concluded b0:null";
    assert_eq!(heard(machine, "b0:null"), end);
    let (one, two) = (blocks(&lab.path("copy")), blocks(&lab.path("other")));
    assert!(one == two || one == two + 1, "{one} and {two} are not of one moment");
    assert!((before..after - 3).contains(&two), "{two} of {before} to {after}");
}

pub fn a_transaction_fails_as_a_whole(lab: &Lab, machine: &mut Machine<'_>) {
    let (first, abort) = (arguments(&json!({})), action("abort", &json!({})));
    let target = "Node 'copy' is busy: block device is in use by block job: backup";
    let drive = json!({"device": "two", "target": lab.path("none/x"), "sync": "full"});
    let missing = format!("Could not create '{}': No such file or directory", lab.path("none/x").display());
    for (second, why) in [
        (abort, "Transaction aborted using Abort action"),
        (action("blockdev-backup", &arguments(&json!({"job-id": "b1", "device": "two"}))), target),
        (
            action("blockdev-backup", &arguments(&json!({"device": "two", "target": "other"}))),
            "Job ID 'b0' already in use",
        ),
        (action("drive-backup", &drive), &missing),
    ] {
        machine.monitor.forget_events();
        let actions = json!({"actions": [action("blockdev-backup", &first), second]});
        assert_eq!(machine.monitor.refusal("transaction", &actions), why);
        assert_eq!(heard(machine, "b0:null"), "b0:created b0:aborting b0:concluded b0:null");
    }
    assert_eq!(machine.monitor.run("query-jobs"), json!([]));
    // One of two that have begun: the other goes with it.
    let second = arguments(&json!({"job-id": "b1", "device": "two", "target": "other", "speed": SLOW}));
    let actions = [&arguments(&json!({"speed": SLOW})), &second].map(|data| action("blockdev-backup", data));
    let grouped = json!({"actions": actions, "properties": {"completion-mode": "grouped"}});
    machine.monitor.run_with("transaction", &grouped);
    machine.monitor.forget_events();
    machine.monitor.run_with("job-cancel", &json!({"id": "b1"}));
    eventually("the end of both", || (machine.monitor.run("query-jobs") == json!([])).then_some(()));
    machine.monitor.forget_events();
    wait_for_blocks(machine, 1);
}

/// Nor does a guest fail for a copy that does. What it changes before it is saved ends the backup.
pub fn a_guest_does_not_wait_for_a_copy_that_cannot_be_made(lab: &Lab, machine: &mut Machine<'_>) {
    the_writer_ends(machine);
    if machine.is_reference() {
        return;
    }
    let fault = json!({"node-name": "copy", "op": "write", "errno": "ENOSPC"});
    let fault = machine.monitor.run_with("tarn-fault-add", &fault)["id"].take();
    backup(machine, &json!({"on-target-error": "enospc"}));
    assert_eq!(heard(machine, "b0:paused"), "b0:created b0:running ERROR(write,stop) b0:paused");
    assert_eq!(machine.monitor.run("query-block-jobs")[0]["io-status"], "nospace");
    machine.sh("echo unsaved | dd of=/dev/one bs=4096 seek=2100 conv=notrunc,fsync,sync 2>/dev/null");
    let end =
        "ERROR(write,report) b0:running b0:aborting COMPLETED(No space left on device) b0:concluded b0:null";
    assert_eq!(heard(machine, "b0:null"), end);
    machine.monitor.run_with("tarn-fault-remove", &json!({"node-name": "copy", "id": fault}));
    let mut bytes = [0; 7];
    File::open(lab.path("one.raw")).unwrap().read_exact_at(&mut bytes, 2100 * BLOCK as u64).unwrap();
    assert_eq!(&bytes, b"unsaved");
}

pub fn a_copy_that_is_pending_holds_nobody(lab: &Lab, machine: &mut Machine<'_>) {
    let before = sha256(&lab.path("one.raw"));
    backup(machine, &json!({"auto-finalize": false, "auto-dismiss": false}));
    let pending = "b0:created b0:running b0:waiting b0:pending PENDING";
    assert_eq!(heard(machine, "PENDING"), pending);
    machine.sh("echo later | dd of=/dev/one bs=4096 seek=4 conv=notrunc,fsync,sync 2>/dev/null");
    machine.monitor.run_with("job-finalize", &json!({"id": "b0"}));
    assert_eq!(machine.monitor.run("query-jobs")[0]["status"], "concluded");
    machine.monitor.run_with("job-dismiss", &json!({"id": "b0"}));
    assert_eq!(sha256(&lab.path("copy")), before);
    assert_ne!(sha256(&lab.path("one.raw")), before);
}

pub fn a_copy_of_changes_alone_ends_when_it_is_cancelled(lab: &Lab, machine: &mut Machine<'_>) {
    backup(machine, &json!({"sync": "none"}));
    machine.sh("echo last | dd of=/dev/one bs=4096 seek=4 conv=notrunc,fsync,sync 2>/dev/null");
    assert_eq!(machine.monitor.run("query-block-jobs")[0]["status"], "running");
    machine.monitor.run_with("block-job-cancel", &json!({"device": "b0"}));
    let cancelled = "b0:created b0:running b0:aborting CANCELLED b0:concluded b0:null";
    assert_eq!(heard(machine, "b0:null"), cancelled);
    let mut saved = [0; 5];
    File::open(lab.path("copy")).unwrap().read_exact_at(&mut saved, 4 * BLOCK as u64).unwrap();
    assert_eq!(&saved, b"later");
}

pub fn a_backup_goes_on_while_the_vm_stands_still(lab: &Lab, machine: &mut Machine<'_>) {
    let copy = lab.path("standing");
    machine.monitor.run("stop");
    machine.monitor.forget_events();
    let drive = json!({"device": "two", "target": copy, "sync": "full", "format": "raw"});
    machine.monitor.run_with("drive-backup", &drive);
    let life = "two:created two:running two:waiting two:pending COMPLETED two:concluded two:null";
    assert_eq!(heard(machine, "two:null"), life);
    assert_same(&lab.path("two.raw"), &copy);
    machine.monitor.run("cont");
}
