//! The same operations on a VM of stock QEMU: protocol B, with our agent in its guest.

use std::fs::read;
use std::path::Path;

use super::devices::{Loop, Mount, has_loop_devices};
use super::{fails, json, to};
use crate::block_cases::{Disk, Qemu, place};
use crate::harness::{Lab, eventually, run, shell};

const SIZE: u64 = 32 << 20;

/// `tarn VERB vm …` for QEMU's sockets.
fn arguments<'a>(verb: &'a [&'a str], sockets: &'a [String; 2]) -> Vec<&'a str> {
    [verb, &["--monitor", &sockets[0], "--agent", &sockets[1]]].concat()
}

fn sh(qemu: &mut Qemu, script: &str) -> String {
    let (status, text) = shell(&mut qemu.agent(), script).unwrap();
    assert_eq!(status, 0, "{script}: {text}");
    text.trim().to_owned()
}

/// As block devices are known to this program, and not to QEMU: it would have written to one that is mounted.
fn onto_a_device(lab: &Lab, qemu: &mut Qemu, sockets: &[String; 2]) -> Option<Loop> {
    if !has_loop_devices() {
        return None;
    }
    let pivot = |device: &Loop| to("d0", &device.0);
    let mounted = Loop::of(&lab.ext4("mounted.raw", SIZE));
    let mount = Mount::of(&mounted.0, lab.path("mnt"));
    let error = fails(lab, &arguments(&["pivot", "q", &pivot(&mounted), "--protocol", "b"], sockets), 1);
    assert!(error.contains("is in use by the host or another process"), "{error}");
    drop(mount);
    let device = Loop::of(&lab.image("device.raw", SIZE));
    let report = json(lab, &arguments(&["pivot", "q", &pivot(&device), "--protocol", "b"], sockets));
    assert_eq!(report["outcome"], "pivoted", "{report}");
    assert_eq!(file(qemu), device.0.display().to_string());
    Some(device)
}

fn file(qemu: &mut Qemu) -> String {
    qemu.monitor().run("query-block")[0]["inserted"]["file"].as_str().unwrap().to_owned()
}

#[test]
fn a_disk_of_stock_qemu_moves_and_a_dead_coordinator_is_recovered_from() {
    let Some((lab, program)) = place("operations-qemu") else { return };
    let disk = Disk::of("d0", lab.ext4("d0.raw", SIZE));
    let mut qemu = Qemu::start(&lab, &program, "qemu", std::slice::from_ref(&disk));
    sh(&mut qemu, "mkdir -p /mnt && mount -t ext4 /dev/vda /mnt && echo one > /mnt/n && sync");
    let sockets = ["qmp.sock", "agent.sock"].map(|kind| qemu.socket(kind).display().to_string());

    let device = onto_a_device(&lab, &mut qemu, &sockets);
    // It cannot decide by itself, and is not begun to find that out.
    let refused = super::fails(&lab, &arguments(&["pivot", "q", &to("d0", &lab.path("x.raw"))], &sockets), 1);
    assert!(refused.contains("`--protocol b` moves its disks"), "{refused}");
    assert!(!lab.path("x.raw").exists());

    let second = lab.path("second.raw");
    let moved = to("d0", &second);
    let report =
        json(&lab, &arguments(&["pivot", "q", &moved, "--protocol", "b", "--freeze", "--pause"], &sockets));
    assert_eq!(
        (&report["outcome"], &report["consistency"]),
        (&"pivoted".into(), &"filesystem".into()),
        "{report}"
    );
    eprintln!("timeline of QEMU: {}", report["timeline"]);
    assert_eq!(file(&mut qemu), second.display().to_string());
    drop(device);
    sh(&mut qemu, "echo two > /mnt/n && sync");

    let copy = lab.path("copy.raw");
    let report = json(&lab, &arguments(&["backup", "q", &to("d0", &copy), "--freeze"], &sockets));
    assert_eq!(report["outcome"], "completed");
    run(std::process::Command::new("fsck.ext4").arg("-fn").arg(&copy));

    json(&lab, &arguments(&["mirror", "q", &to("d0", &lab.path("mirror.raw")), "--pause"], &sockets));
    assert_eq!(qemu.monitor().status(), "running");

    a_coordinator_dies_while_it_copies(&lab, &mut qemu, &sockets, &second);
    // And a client of the old definition: the durable configuration and the stamp know better.
    assert!(lab.path("d0.raw.stamp").exists());
    qemu.kill();
    let recovered = json(&lab, &["recover", "q", "--monitor", &sockets[0], "--dead"]);
    assert!(recovered["operation"].is_null());
    assert!(read(&second).unwrap().windows(4).any(|bytes| bytes == b"two\n"));
}

fn a_coordinator_dies_while_it_copies(lab: &Lab, qemu: &mut Qemu, sockets: &[String; 2], current: &Path) {
    let third = lab.path("third.raw");
    let moved = to("d0", &third);
    let pivot = ["pivot", "q", &moved, "--protocol", "b", "--copy-mode", "write-blocking"];
    let last = || json(lab, &["op", "show", "q"])["id"].take();
    let before = last();
    let mut coordinator = super::coordinate(lab, &arguments(&pivot, sockets));
    eventually("an operation that has begun", || (last() != before).then_some(()));
    coordinator.kill().unwrap();
    coordinator.wait().unwrap();
    if json(lab, &["op", "show", "q"])["outcome"] == "open" {
        // QEMU has no lock of that name.
        let refused = super::fails(lab, &["recover", "q"], 4);
        assert!(refused.contains(&format!("`tarn recover q --monitor {}", sockets[0])), "{refused}");
    }
    let recovered = json(lab, &arguments(&["recover", "q"], sockets));
    let outcome = recovered["operation"]["outcome"].as_str().unwrap_or("finished before it died").to_owned();
    let expected = if outcome == "aborted" { current } else { &third };
    assert_eq!(file(qemu), expected.display().to_string(), "{recovered}");
    assert_eq!(qemu.monitor().run("query-block-jobs"), serde_json::json!([]));
    sh(qemu, "test $(cat /mnt/n) = two");
}
