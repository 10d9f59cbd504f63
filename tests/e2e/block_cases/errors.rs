//! Targets that fail, that are full, and that are slow.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::MIB;
use super::machine::{Disk, Machine, assert_same};
use crate::disks::SmallFilesystem;
use crate::harness::{Lab, eventually, limit};

const SIZE: u64 = 16 * MIB;
/// The sector of a target that is bad, somewhere in its middle.
const BAD: u64 = 10_000;

pub fn disks(lab: &Lab) -> Vec<Disk> {
    ["reports", "nospace", "ignores", "flushes", "slow", "ready", "pending"]
        .map(|id| Disk::new(lab, id, SIZE))
        .into()
}

/// A node for an image that goes wrong, once or for ever: a write to [`BAD`], or, after the first, a flush.
fn add_bad(machine: &mut Machine<'_>, name: &str, image: &Path, op: &str, once: bool) {
    if !machine.is_reference() {
        machine.add(name, image);
        let mut fault = json!({"node-name": name, "op": op, "errno": "EIO", "count": u64::from(once)});
        match op {
            "flush" => fault["after"] = 1.into(),
            _ => fault["sector"] = BAD.into(),
        }
        machine.monitor.run_with("tarn-fault-add", &fault);
        return;
    }
    let rules = match op {
        "flush" => json!({
            "set-state": [{"event": "flush_to_disk", "state": 1, "new_state": 2}],
            "inject-error": [{"event": "flush_to_disk", "state": 2, "errno": 5, "once": once}],
        }),
        _ => {
            json!({"inject-error": [{"event": "none", "iotype": "write", "sector": BAD, "errno": 5, "once": once}]})
        }
    };
    let mut file = json!({"driver": "blkdebug", "image": {"driver": "file", "filename": image}});
    file.as_object_mut().unwrap().extend(rules.as_object().unwrap().clone());
    machine.monitor.run_with("blockdev-add", &json!({"driver": "raw", "node-name": name, "file": file}));
}

/// A node for an image that takes a byte per second.
fn add_slow(machine: &mut Machine<'_>, name: &str, image: &Path) {
    if machine.is_reference() {
        let group = json!({"qom-type": "throttle-group", "id": "snail", "limits": {"bps-total": 1}});
        machine.monitor.run_with("object-add", &group);
        let file = json!({"driver": "file", "filename": image});
        let node = json!({"driver": "throttle", "node-name": name, "throttle-group": "snail", "file": file});
        machine.monitor.run_with("blockdev-add", &node);
    } else {
        machine.add(name, image);
        let none = json!({"bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0});
        let mut limits = json!({"node-name": name, "bps": 1});
        limits.as_object_mut().unwrap().extend(none.as_object().unwrap().clone());
        machine.monitor.run_with("block_set_io_throttle", &limits);
    }
}

fn status(machine: &mut Machine<'_>) -> Value {
    machine.job()["status"].clone()
}

/// Case 8, and the end of case 9: a policy for full disks does not cover others.
pub fn a_target_that_fails_ends_its_job_and_nothing_else(lab: &Lab, machine: &mut Machine<'_>) {
    let source = lab.path("reports.raw");
    machine.io("reports", "w:1:0:16M");
    for policy in ["report", "enospc"] {
        let target = lab.image("reports.to", SIZE);
        add_bad(machine, "reports-to", &target, "write", true);
        machine.mirror("reports", "reports-to", &json!({"on-target-error": policy}));
        let told = machine.told("null");
        assert_eq!(
            told.names(),
            ["created", "running", "BLOCK_JOB_ERROR", "aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"],
            "{policy}"
        );
        let error = told.data("BLOCK_JOB_ERROR");
        assert_eq!(error, json!({"device": "m0", "operation": "write", "action": "report"}));
        assert_eq!(told.data("BLOCK_JOB_COMPLETED")["error"], "Input/output error");
        assert_eq!((machine.file("reports"), machine.monitor.status()), (source.clone(), "running".into()));
        machine.io("reports", "w:2:1M:64K r:2:1M:64K");
        machine.delete("reports-to");
    }
}

/// Case 9.
pub fn a_full_target_waits_for_room(lab: &Lab, machine: &mut Machine<'_>) {
    let Some(small) = SmallFilesystem::mount(lab, 8) else { return };
    let (source, target) = (lab.path("nospace.raw"), small.image("nospace.to", SIZE));
    machine.io("nospace", "w:1:0:16M");
    machine.add("nospace-to", &target);
    machine.mirror("nospace", "nospace-to", &json!({"on-target-error": "enospc"}));
    let told = machine.told("paused");
    assert_eq!(told.data("BLOCK_JOB_ERROR"), json!({"device": "m0", "operation": "write", "action": "stop"}));
    assert_eq!((status(machine), &machine.job()["io-status"]), (json!("paused"), &json!("nospace")));
    assert_eq!(machine.monitor.status(), "running", "the guest has room");
    machine.io("nospace", "w:2:15M:64K r:2:15M:64K");
    small.resize(64);
    machine.monitor.forget_events();
    machine.verb("block-job-resume");
    machine.told("BLOCK_JOB_READY");
    assert_eq!(machine.job()["io-status"], "ok");
    machine.pivot();
    assert_same(&source, &target);
    assert_eq!(machine.file("nospace"), target);
    // Back, before its filesystem goes.
    machine.add("nospace-back", &source);
    machine.mirror_until_ready("nospace", "nospace-back", &json!({}));
    machine.pivot();
    machine.delete("nospace-to");
}

/// Case 10.
pub fn an_error_that_is_ignored_is_made_up_for(lab: &Lab, machine: &mut Machine<'_>) {
    let (source, target) = (lab.path("ignores.raw"), lab.image("ignores.to", SIZE));
    machine.io("ignores", "w:1:0:16M");
    add_bad(machine, "ignores-to", &target, "write", true);
    machine.mirror("ignores", "ignores-to", &json!({"on-target-error": "ignore"}));
    let told = machine.told("BLOCK_JOB_READY");
    assert_eq!(told.names(), ["created", "running", "BLOCK_JOB_ERROR", "ready", "BLOCK_JOB_READY"]);
    assert_eq!(told.data("BLOCK_JOB_ERROR")["action"], "ignore");
    machine.pivot();
    assert_same(&source, &target);
}

/// Case 11.
pub fn a_flush_that_fails_at_the_end_stops_it_until_it_is_resumed_or_given_up(
    lab: &Lab,
    machine: &mut Machine<'_>,
) {
    let source = lab.path("flushes.raw");
    for (once, name) in [(true, "flushes-once"), (false, "flushes-never")] {
        let target = lab.image(&format!("{name}.to"), SIZE);
        add_bad(machine, name, &target, "flush", once);
        machine.mirror_until_ready("flushes", name, &json!({"on-target-error": "stop"}));
        machine.io("flushes", "w:3:1M:64K");
        machine.cancel(false);
        let told = machine.told("standby");
        assert_eq!(told.data("BLOCK_JOB_ERROR")["action"], "stop", "{:?}", told.names());
        machine.monitor.forget_events();
        if once {
            machine.verb("block-job-resume");
            assert!(machine.told("null").names().contains(&"BLOCK_JOB_COMPLETED"));
            assert_same(&source, &target);
        } else {
            machine.cancel(true);
            machine.told("null");
        }
        assert_eq!(machine.file("flushes"), source);
        machine.io("flushes", "w:4:2M:64K r:4:2M:64K");
        machine.delete(name);
    }
}

/// Case 21: a VM that ends has no patience with its jobs.
pub fn a_vm_ends_whatever_its_jobs_are_at(lab: &Lab, mut machine: Machine<'_>) {
    machine.io("slow", "w:1:0:16M");
    machine.io("pending", "w:1:0:1M");
    for id in ["slow", "ready", "pending"] {
        let (node, image) = (format!("{id}-to"), lab.image(&format!("{id}.to"), SIZE));
        match id {
            "slow" => add_slow(&mut machine, &node, &image),
            _ => machine.add(&node, &image),
        }
        let mut arguments = json!({"job-id": id, "device": id, "target": node, "sync": "full"});
        arguments["auto-finalize"] = (id != "pending").into();
        machine.monitor.run_with("blockdev-mirror", &arguments);
    }
    let has = |machine: &mut Machine<'_>, id: &str, status: &str| {
        let jobs = machine.monitor.run("query-jobs");
        let found = jobs.as_array().unwrap().iter().any(|job| job["id"] == id && job["status"] == status);
        found.then_some(())
    };
    eventually("a job that is ready", || has(&mut machine, "ready", "ready"));
    eventually("another one", || has(&mut machine, "pending", "ready"));
    machine.monitor.run_with("block-job-complete", &json!({"device": "pending"}));
    eventually("a job that is pending", || has(&mut machine, "pending", "pending"));
    has(&mut machine, "slow", "running").expect("a job that is slow");

    // Neither does a stop wait for bytes per second, nor the end.
    let start = Instant::now();
    machine.monitor.run("stop");
    assert!(start.elapsed() < Duration::from_secs(5), "stop took {:?}", start.elapsed());
    machine.monitor.forget_events();
    let start = Instant::now();
    machine.monitor.run("quit");
    let mut told = Vec::new();
    while let Ok(event) = machine.monitor.0.next_event(limit()) {
        told.extend(event);
    }
    assert!(start.elapsed() < Duration::from_secs(5), "quit took {:?}", start.elapsed());
    let shutdown = told.iter().find(|event| event.name == "SHUTDOWN").expect("SHUTDOWN");
    assert_eq!((&shutdown.data["guest"], &shutdown.data["reason"]), (&json!(false), &json!("host-qmp-quit")));
    let mut ended: Vec<_> = told.iter().filter(|event| event.name == "BLOCK_JOB_CANCELLED").collect();
    ended.sort_by_key(|event| event.data["device"].to_string());
    let ended: Vec<_> = ended.iter().map(|event| event.data["device"].as_str().unwrap()).collect();
    assert_eq!(ended, ["pending", "ready", "slow"], "{told:?}");
}
