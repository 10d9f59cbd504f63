//! Operations on the command line: disks move, coordinators die, and what was begun is settled.

mod crashes;
mod devices;
mod qemu;

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use rustix::process::{Pid, Signal};
use serde_json::Value;

use crate::harness::{Lab, Vm, eventually, sha256};

const SIZE: u64 = 32 << 20;

fn boot<'a>(lab: &'a Lab, name: &'static str, images: &[&Path], more: &[&str]) -> Vm<'a> {
    let mut flags: Vec<String> = Vec::new();
    for (index, image) in images.iter().enumerate() {
        flags.extend(["--disk".into(), format!("{},id=d{index}", image.display())]);
    }
    let flags: Vec<&str> = flags.iter().map(String::as_str).chain(more.iter().copied()).collect();
    lab.boot(name, &flags)
}

/// Runs `tarn … --json`, which must succeed.
fn json(lab: &Lab, args: &[&str]) -> Value {
    let output = lab.output(&[args, &["--json"]].concat());
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "tarn {args:?}: {}\n{text}{error}", output.status);
    serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}"))
}

fn fails(lab: &Lab, args: &[&str], status: i32) -> String {
    let output = lab.output(args);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "tarn {args:?}: {error}");
    error
}

fn files(vm: &mut Vm<'_>) -> Vec<PathBuf> {
    let disks = vm.monitor().run("query-block");
    disks.as_array().unwrap().iter().map(|disk| disk["inserted"]["file"].as_str().unwrap().into()).collect()
}

fn to(disk: &str, image: &Path) -> String {
    format!("{disk}={}", image.display())
}

/// A counter that the guest writes to a file, each value synced.
const WRITER: &str = "rm -f /tmp/stop; setsid sh -c 'i=0; while ! test -e /tmp/stop; do i=$((i+1)); \
    echo $i > /mnt/n.new && sync -f /mnt/n.new && mv /mnt/n.new /mnt/n && sync -f /mnt && echo $i > /tmp/acknowledged; done; \
    touch /tmp/stopped' >/dev/null 2>&1 </dev/null &";

#[test]
fn disks_move_by_one_command_and_the_guest_is_frozen_for_a_moment() {
    let Some(lab) = Lab::new("operations") else { return };
    let (a, b) = (lab.ext4("a.raw", SIZE), lab.image("b.raw", SIZE));
    let targets = ["a2.raw", "b2.raw"].map(|name| lab.path(name));
    let mut vm = boot(&lab, "ops", &[&a, &b], &["--mount", "/dev/vda:/mnt:ext4"]);
    vm.sh(WRITER);
    let report = json(
        &lab,
        &[
            "pivot",
            "ops",
            &to("d0", &targets[0]),
            &to("d1", &targets[1]),
            "--freeze",
            "--pause",
            "--max-hold",
            "2s",
        ],
    );
    assert_eq!(
        (&report["outcome"], &report["consistency"]),
        (&"pivoted".into(), &"filesystem".into()),
        "{report}"
    );
    for time in ["copied-ms", "frozen-ms", "paused-ms", "held-ms", "whole-ms"] {
        assert!(report["timeline"][time].as_f64().is_some_and(|ms| ms > 0.0), "{time}: {report}");
    }
    eprintln!("timeline: {}", report["timeline"]);
    assert_eq!(files(&mut vm), targets);
    // The former images are told from disks, and the new ones are disks.
    for (image, stamped) in [(&a, true), (&b, true), (&targets[0], false), (&targets[1], false)] {
        assert_eq!(
            image.with_file_name(format!("{}.stamp", name(image))).exists(),
            stamped,
            "{}",
            image.display()
        );
    }
    vm.sh("test $(cat /sys/class/block/vda/size) -gt 0; n=$(cat /tmp/acknowledged); while test $n -ge $(cat /tmp/acknowledged); do :; done");
    assert_eq!(vm.monitor().run("query-jobs"), Value::Array(vec![]));
    let shown = lab.output(&["op", "show", "ops"]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    for step in [
        "planned",
        "frozen",
        "stopped",
        "pivot-intent",
        "pivoted",
        "config-committed",
        "resumed",
        "thawed",
        "done",
    ] {
        assert!(shown.contains(&format!(" {step} ")), "{step}: {shown}");
    }
    assert!(String::from_utf8_lossy(&lab.output(&["recover", "ops"]).stdout).contains("nothing to recover"));
    what_cannot_be_done_is_refused(&lab, &targets);
    copies_of_a_running_vm(&lab, &mut vm);
    vm.kill();
    // The old command line: the machine is started as always, and boots what is the disk now.
    let mut again = boot(&lab, "ops", &[&a, &b], &["--mount", "/dev/vda:/mnt:ext4"]);
    assert_eq!(files(&mut again), targets);
    assert!(again.log().contains("which replaced"), "{}", again.log());
    again.power_off();
}

fn name(image: &Path) -> String {
    image.file_name().unwrap().to_string_lossy().into_owned()
}

fn what_cannot_be_done_is_refused(lab: &Lab, current: &[PathBuf; 2]) {
    let short = lab.image("short.raw", SIZE / 2);
    let cases = [
        (to("nope", &lab.path("x.raw")), "The VM has no disk 'nope'; it has d0, d1"),
        (to("d0", &current[1]), "is there already"),
        (to("d0", &short), "is there already"),
        (to("d0", Path::new("/nowhere/x.raw")), "No such file or directory"),
        (to("d0", Path::new("/dev/shm/x.raw")), "in memory"),
    ];
    for (disk, why) in cases {
        let error = fails(lab, &["pivot", "ops", &disk], 1);
        assert!(error.contains(why), "{disk}: {error}");
    }
    for (image, disk) in current.iter().zip(["d0", "d1"]) {
        let error = fails(lab, &["pivot", "ops", &to("d0", image), "--reuse"], 1);
        assert!(error.contains(&format!("is the image of disk '{disk}'")), "{error}");
    }
    let error = fails(lab, &["pivot", "ops", &to("d0", &short), "--reuse"], 1);
    assert!(error.contains("has 16777216 bytes, and the disk has 33554432"), "{error}");
    // The disk of somebody else: it is not stamped.
    let other = lab.image("other.raw", SIZE);
    let mut owner = boot(lab, "owner", &[&other], &[]);
    let error = fails(lab, &["pivot", "ops", &to("d0", &other), "--reuse"], 1);
    assert!(error.contains("is in use by process "), "{error}");
    assert!(!lab.path("other.raw.stamp").exists());
    owner.power_off();
}

fn copies_of_a_running_vm(lab: &Lab, vm: &mut Vm<'_>) {
    let frozen = json(lab, &["freeze", "ops", "--lease", "20s"]);
    assert_eq!(frozen["filesystems"], 1);
    let thawed = json(lab, &["thaw", "ops"]);
    assert_eq!((&thawed["was-frozen"], &thawed["report"]["void"]), (&true.into(), &false.into()), "{thawed}");
    let report = json(lab, &["backup", "ops", &to("d0", &lab.path("backup.raw")), "--freeze"]);
    assert_eq!(
        (&report["outcome"], &report["consistency"]),
        (&"completed".into(), &"filesystem".into()),
        "{report}"
    );
    // Frozen means clean: nothing to replay.
    let checked = crate::harness::run(
        std::process::Command::new("fsck.ext4").args(["-fn"]).arg(lab.path("backup.raw")),
    );
    assert!(!checked.contains("recovering journal"), "{checked}");
    vm.sh("touch /tmp/stop; while ! test -e /tmp/stopped; do :; done; sync");
    let report = json(lab, &["mirror", "ops", &to("d0", &lab.path("mirror.raw"))]);
    assert_eq!(report["consistency"], "crash");
    assert_eq!(sha256(&lab.path("mirror.raw")), sha256(&lab.path("a2.raw")));
    assert!(!lab.path("mirror.raw.stamp").exists());
}

/// The image that d0 works on becomes slow for everybody: a copy takes seconds.
fn slow_down(vm: &mut Vm<'_>) {
    let mut monitor = vm.monitor();
    let node = monitor.run("query-block")[0]["inserted"]["node-name"].take();
    let limits = serde_json::json!({
        "node-name": node, "bps": 2 << 20, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
    });
    monitor.run_with("block_set_io_throttle", &limits);
}

/// A coordinator in the background.
fn coordinate(lab: &Lab, args: &[&str]) -> Child {
    lab.tarn(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("tarn starts")
}

fn stage(lab: &Lab, vm: &str) -> String {
    let shown = lab.output(&["op", "show", vm, "--json"]);
    let shown: Value = serde_json::from_slice(&shown.stdout).unwrap_or_default();
    shown["state"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn a_coordinator_that_dies_leaves_an_operation_that_is_undone_or_gone_on_with() {
    let Some(lab) = Lab::new("operations-crash") else { return };
    let (a, target) = (lab.ext4("a.raw", SIZE), lab.path("b.raw"));
    let mut vm = boot(&lab, "crash", &[&a], &["--mount", "/dev/vda:/mnt:ext4"]);
    vm.sh("dd if=/dev/urandom of=/mnt/x bs=1M count=8 2>/dev/null; sync");
    slow_down(&mut vm);
    let arguments = ["pivot", "crash", &to("d0", &target), "--freeze"];
    let killed = |until: &str| {
        let mut coordinator = coordinate(&lab, &arguments);
        eventually(until, || (stage(&lab, "crash") == until).then_some(()));
        coordinator.kill().unwrap();
        coordinator.wait().unwrap();
    };
    killed("mirroring");
    // Another one does not begin while this one is open.
    let error = fails(&lab, &arguments, 1);
    assert!(
        error.contains("`tarn op resume crash` goes on with it, `tarn recover crash` undoes it"),
        "{error}"
    );
    let recovered = json(&lab, &["recover", "crash"]);
    assert_eq!(
        (&recovered["found"], &recovered["operation"]["outcome"]),
        (&"mirroring".into(), &"aborted".into())
    );
    assert!(!target.exists() && !lab.path("b.raw.stamp").exists());
    assert_eq!(vm.monitor().run("query-jobs"), Value::Array(vec![]));
    assert_eq!(files(&mut vm), std::slice::from_ref(&a));

    // One that is only asked to end does all that by itself.
    let mut coordinator = coordinate(&lab, &arguments);
    eventually("mirroring", || (stage(&lab, "crash") == "mirroring").then_some(()));
    rustix::process::kill_process(Pid::from_child(&coordinator), Signal::INT).unwrap();
    assert_eq!(coordinator.wait().unwrap().code(), Some(3));
    assert!(!target.exists() && !lab.path("b.raw.stamp").exists());
    assert_eq!(json(&lab, &["recover", "crash"])["operation"], Value::Null);
    assert_eq!(vm.monitor().run("query-jobs"), Value::Array(vec![]));

    killed("mirroring");
    let report = json(&lab, &["op", "resume", "crash"]);
    assert_eq!(report["outcome"], "pivoted");
    assert_eq!(files(&mut vm), std::slice::from_ref(&target));

    // And the VM with it: the next start knows which image is the disk.
    let back = lab.path("c.raw");
    slow_down(&mut vm);
    let mut coordinator = coordinate(&lab, &["pivot", "crash", &to("d0", &back)]);
    eventually("mirroring", || (stage(&lab, "crash") == "mirroring").then_some(()));
    vm.sh("echo kept > /mnt/kept; sync");
    vm.kill();
    let status = coordinator.wait().unwrap();
    assert_eq!(status.code(), Some(4), "nobody may assume anything");
    let recovered = json(&lab, &["recover", "crash"]);
    assert_eq!(recovered["operation"]["outcome"], "aborted", "{recovered}");
    assert_eq!(
        json(&lab, &["recover", "crash"])["operation"],
        Value::Null,
        "the second time it does nothing"
    );
    let mut again = boot(&lab, "crash", &[&a], &["--mount", "/dev/vda:/mnt:ext4"]);
    assert_eq!(files(&mut again), [target]);
    assert_eq!(again.sh("cat /mnt/kept"), "kept");
    again.power_off();
}
