//! Speed, a VM that stands still, and a client of another make.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use super::machine::{Machine, assert_same, holds};
use super::{KIB, MIB};
use crate::clients::prepared;
use crate::harness::{Lab, root, run, sha256};

/// Case 19.
pub fn a_limit_is_kept_and_nothing_waits_for_it(lab: &Lab, machine: &mut Machine<'_>) {
    let (source, target) = (lab.path("speed.raw"), lab.image("speed.to", 16 * MIB));
    machine.io("speed", "w:1:0:16M");
    machine.add("speed-to", &target);
    machine.mirror("speed", "speed-to", &json!({"speed": 1, "buf-size": MIB}));
    machine.set_speed(MIB);
    let start = Instant::now();
    assert_eq!(machine.job()["speed"], MIB);
    let text = machine.monitor.refusal("block-job-set-speed", &json!({"device": "m0", "speed": -1}));
    assert_eq!(text, "Parameter 'speed' expects a non-negative value");
    std::thread::sleep(Duration::from_secs(5));
    let copied = machine.job()["offset"].as_u64().unwrap();
    let most = (start.elapsed().as_secs() + 3) * MIB;
    assert!((3 * MIB..=most).contains(&copied), "{copied} bytes in {:?} at 1 MiB/s", start.elapsed());

    // Now whoever waited for a copy would wait for days.
    machine.set_speed(1);
    let soon = Duration::from_secs(5);
    let start = Instant::now();
    machine.monitor.run("stop");
    assert!(start.elapsed() < soon, "stop took {:?}", start.elapsed());
    machine.monitor.run("cont");
    let start = Instant::now();
    machine.cancel(false);
    machine.told("null");
    assert!(start.elapsed() < soon, "cancel took {:?}", start.elapsed());
    assert_eq!(machine.file("speed"), source);
    machine.delete("speed-to");
}

/// Case 20.
pub fn a_job_goes_on_while_the_vm_stands_still(lab: &Lab, machine: &mut Machine<'_>) {
    let (source, target) = (lab.path("stands.raw"), lab.image("stands.to", 16 * MIB));
    machine.add("stands-to", &target);
    let writes = machine.begin("stands", "load 1 2 /run/stands.stop");
    machine.sh("sleep 1");
    machine.monitor.forget_events();
    machine.monitor.run("stop");
    machine.monitor.run("stop");
    assert_eq!(run_states(machine), ["STOP"], "a second stop is no event");
    assert_eq!(machine.monitor.status(), "paused");
    let stopped = sha256(&source);
    machine.mirror_until_ready("stands", "stands-to", &json!({}));
    machine.pivot();
    assert_eq!((machine.file("stands"), machine.monitor.status()), (target.clone(), "paused".into()));
    assert_eq!(sha256(&source), stopped, "nothing writes to the disk of a stopped VM");
    assert_same(&source, &target);
    machine.monitor.run("cont");
    machine.monitor.run("cont");
    assert_eq!(run_states(machine), ["RESUME"]);
    machine.sh("touch /run/stands.stop");
    machine.end(writes);
}

/// STOP and RESUME, as far as they have come.
fn run_states(machine: &mut Machine<'_>) -> Vec<String> {
    let mut names = Vec::new();
    while let Some(event) = machine.monitor.0.next_event(Duration::ZERO).unwrap() {
        if ["STOP", "RESUME"].contains(&event.name.as_str()) {
            names.push(event.name);
        }
    }
    names
}

/// Python's qemu.qmp, from `blockdev-create` to `blockdev-del`, there and back.
pub fn a_client_of_another_make_mirrors_and_pivots(lab: &Lab, mut machine: Machine<'_>) {
    let Some(python) = prepared("venv/bin/python") else { return };
    let (source, target) = (lab.path("foreign.raw"), lab.path("foreign.to"));
    machine.io("foreign", "w:1:0:4M w:2:8M:1M");
    let (machine, socket) = machine.without_monitor();
    let script = root().join("tests/clients/pivot.py");
    let said = run(Command::new(python).arg(script).arg(socket).arg("foreign").arg(&target));
    let moved = |to: &Path| format!("ready 16777216 16777216\ncompleted\nfile {}\n", to.display());
    let expected = format!("created\n{}{}deleted\njobs []\n", moved(&target), moved(&source));
    assert_eq!(said, expected);
    let mut machine = machine.with_monitor();
    assert_same(&source, &target);
    machine.io("foreign", "w:3:4M:64K r:1:0:4M r:2:8M:1M");
    assert!(holds(&source, 3, 4 * MIB, 64 * KIB));
}
