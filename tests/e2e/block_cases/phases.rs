//! How a job begins, becomes ready, pivots, is held at pending, is cancelled and pauses.

use std::time::Duration;

use serde_json::{Value, json};

use super::machine::{Disk, Machine, assert_same, difference, holds};
use super::{KIB, MIB};
use crate::harness::{Lab, eventually};

pub fn disks(lab: &Lab) -> Vec<Disk> {
    let sizes = [
        ("basic", 32),
        ("early", 16),
        ("soft", 16),
        ("forced", 16),
        ("paused", 16),
        ("wrong", 16),
        ("phases", 32),
        ("refused", 16),
        ("speed", 16),
        ("stands", 16),
        ("foreign", 16),
    ];
    sizes.map(|(id, mib)| Disk::new(lab, id, mib * MIB)).into()
}

/// QEMU's first step is as large as its buffers, whatever the limit.
fn slow(speed: u64) -> Value {
    json!({"speed": speed, "buf-size": MIB})
}

/// Case 1.
pub fn a_mirror_pivots_when_it_is_told_to(lab: &Lab, machine: &mut Machine<'_>) {
    let (source, target) = (lab.path("basic.raw"), lab.image("basic.to", 32 * MIB));
    machine.io("basic", "w:1:0:8M");
    machine.add("basic-to", &target);
    machine.mirror_until_ready("basic", "basic-to", &json!({}));
    machine.io("basic", "w:2:1M:64K");
    machine.pivot();
    assert_eq!(machine.file("basic"), target);
    assert_same(&source, &target);
    machine.io("basic", "w:3:2M:64K r:2:1M:64K r:1:0:1M r:0:8M:24M");
    assert!(holds(&target, 3, 2 * MIB, 64 * KIB), "it is written to the target");
    assert!(holds(&source, 1, 2 * MIB, 64 * KIB), "and no more to the source");
    machine.has_no_jobs();
}

/// Case 2.
pub fn a_cancel_before_ready_leaves_the_source(lab: &Lab, machine: &mut Machine<'_>) {
    let (source, target) = (lab.path("early.raw"), lab.image("early.to", 16 * MIB));
    machine.io("early", "w:1:0:16M");
    machine.add("early-to", &target);
    machine.mirror("early", "early-to", &slow(64 * KIB));
    assert_eq!(machine.told("running").names(), ["created", "running"]);
    // QEMU's has none in its first moments.
    eventually("the job's length", || (machine.job()["len"].as_u64() > Some(0)).then_some(()));
    machine.cancel(false);
    let told = machine.told("null");
    assert_eq!(told.names(), ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]);
    let cancelled = told.data("BLOCK_JOB_CANCELLED");
    assert!(cancelled["offset"].as_u64() < cancelled["len"].as_u64(), "{cancelled}");
    assert_eq!(machine.file("early"), source);
    machine.has_no_jobs();
    machine.io("early", "w:2:0:64K r:1:64K:1M");
    assert!(holds(&source, 2, 0, 64 * KIB));
    machine.delete("early-to");
}

/// Case 3: it is all there, whatever the limit, and the guest has it no more than before.
pub fn a_soft_cancel_when_ready_leaves_a_copy(lab: &Lab, machine: &mut Machine<'_>) {
    let (source, target) = (lab.path("soft.raw"), lab.image("soft.to", 16 * MIB));
    machine.io("soft", "w:1:0:4M");
    machine.add("soft-to", &target);
    machine.mirror_until_ready("soft", "soft-to", &json!({}));
    machine.set_speed(4 * MIB);
    machine.io("soft", "w:2:4M:8M");
    machine.cancel(false);
    let told = machine.told("null");
    assert_eq!(told.names(), ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]);
    assert_eq!(told.data("BLOCK_JOB_COMPLETED").get("error"), None);
    assert_eq!(machine.file("soft"), source, "no pivot");
    assert_same(&source, &target);
    machine.io("soft", "w:3:0:64K");
    assert!(holds(&source, 3, 0, 64 * KIB) && holds(&target, 1, 0, 64 * KIB));
    machine.delete("soft-to");
}

/// Case 3: what is left to copy is left.
pub fn a_forced_cancel_when_ready_leaves_what_was_copied(lab: &Lab, machine: &mut Machine<'_>) {
    let (source, target) = (lab.path("forced.raw"), lab.image("forced.to", 16 * MIB));
    machine.io("forced", "w:1:0:4M");
    machine.add("forced-to", &target);
    machine.mirror_until_ready("forced", "forced-to", &slow(0));
    machine.set_speed(64 * KIB);
    machine.io("forced", "w:2:0:12M");
    machine.cancel(true);
    let told = machine.told("null");
    assert_eq!(told.names(), ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]);
    assert_eq!(machine.file("forced"), source);
    // QEMU (7.2) keeps no limit once a job is ready: it may have been quicker than the cancel.
    let waited = difference(&source, &target).is_none();
    assert!(!waited || machine.is_reference(), "it did not wait for the copy");
    machine.io("forced", "r:2:0:12M");
    machine.delete("forced-to");
}

/// Case 4.
pub fn a_pause_is_one_and_ends(lab: &Lab, machine: &mut Machine<'_>) {
    let (source, target) = (lab.path("paused.raw"), lab.image("paused.to", 16 * MIB));
    machine.io("paused", "w:1:0:16M");
    machine.add("paused-to", &target);
    machine.mirror("paused", "paused-to", &slow(MIB));
    machine.told("running");
    machine.verb("block-job-pause");
    eventually("the pause", || {
        let job = machine.job();
        (job["status"] == "paused" && job["busy"] == false).then_some(())
    });
    let job = machine.job();
    assert_eq!(job["paused"], true);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(machine.job()["offset"], job["offset"], "it stands still");
    let device = json!({"device": "m0"});
    assert_eq!(machine.monitor.refusal("block-job-pause", &device), "Job is already paused");
    machine.set_speed(0);
    machine.verb("block-job-resume");
    let again = machine.monitor.refusal("block-job-resume", &device);
    assert_eq!(again, "Can't resume a job that was not paused");
    machine.told("BLOCK_JOB_READY");
    machine.pivot();
    assert_same(&source, &target);
}

/// Case 5.
pub fn a_job_that_is_not_ready_cannot_complete(lab: &Lab, machine: &mut Machine<'_>) {
    let (source, target) = (lab.path("wrong.raw"), lab.image("wrong.to", 16 * MIB));
    machine.io("wrong", "w:1:0:16M");
    machine.add("wrong-to", &target);
    machine.mirror("wrong", "wrong-to", &slow(MIB));
    let device = json!({"device": "m0"});
    let text = machine.monitor.refusal("block-job-complete", &device);
    assert_eq!(text, "Job 'm0' in state 'running' cannot accept command verb 'complete'");
    let text = machine.monitor.refusal("job-finalize", &json!({"id": "m0"}));
    assert_eq!(text, "Job 'm0' in state 'running' cannot accept command verb 'finalize'");
    machine.set_speed(0);
    machine.told("BLOCK_JOB_READY");
    machine.verb("block-job-complete");
    // It may be over already.
    if let Err(error) = machine.monitor.try_run("block-job-complete", &device) {
        let text = error.refusal().unwrap().desc.clone();
        let known = [
            "The active block job 'm0' cannot be completed",
            "Block job 'm0' not found",
            "Job 'm0' in state 'waiting' cannot accept command verb 'complete'",
            "Job 'm0' in state 'pending' cannot accept command verb 'complete'",
        ];
        assert!(known.contains(&text.as_str()), "{text}");
    }
    machine.told("null");
    assert_eq!(machine.file("wrong"), target);
    assert_same(&source, &target);
}

/// Case 6: with `job-cancel` first, then with `job-finalize`.
pub fn at_pending_the_guest_waits_and_the_client_decides(lab: &Lab, machine: &mut Machine<'_>) {
    let (source, target) = (lab.path("phases.raw"), lab.image("phases.to", 32 * MIB));
    let by_hand = json!({"auto-finalize": false, "auto-dismiss": false});
    machine.io("phases", "w:1:0:8M");
    machine.add("phases-to", &target);
    for pivots in [false, true] {
        machine.mirror_until_ready("phases", "phases-to", &by_hand);
        machine.complete_until_pending();
        assert_same(&source, &target);
        let byte = if pivots { 3 } else { 2 };
        let write = machine.begin("phases", &format!("run w:{byte}:1M:64K"));
        std::thread::sleep(Duration::from_millis(500));
        assert!(!machine.is_over(&write), "the guest's write is held");
        assert_eq!(machine.file("phases"), source);
        assert_same(&source, &target);
        if pivots {
            machine.finalize();
            assert_eq!(machine.file("phases"), target);
        } else {
            machine.monitor.run_with("job-cancel", &json!({"id": "m0"}));
            assert_eq!(machine.told("concluded").names(), ["aborting", "BLOCK_JOB_CANCELLED", "concluded"]);
            assert_eq!(machine.monitor.run("query-jobs")[0]["error"], "Operation canceled");
            machine.monitor.run_with("job-dismiss", &json!({"id": "m0"}));
            machine.told("null");
            assert_eq!(machine.file("phases"), source);
        }
        machine.end(write);
        let (landed, other) = if pivots { (&target, &source) } else { (&source, &target) };
        assert!(holds(landed, byte, MIB, 64 * KIB), "it lands where the client has decided");
        assert!(!holds(other, byte, MIB, 64 * KIB), "and only there");
    }
}
