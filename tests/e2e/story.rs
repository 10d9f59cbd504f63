//! The main job: freeze, pause, look at the disk, resume, thaw, power off.

use std::fs;

use serde_json::json;

use crate::harness::{Lab, guest_image, limit};

#[test]
fn a_frozen_and_paused_guest_leaves_its_disk_alone_and_loses_nothing() {
    let Some(lab) = Lab::new("frozen-and-paused") else { return };
    let disk = lab.ext4("data.raw", 256 << 20);
    let disk = disk.to_str().unwrap();
    let mut vm = lab.boot("story", &["--disk", disk, "--mount", "/dev/vda:/data:ext4"]);
    vm.sh("echo precious >/data/file && sync");
    // A writer that never stops: only freeze and pause make the disk quiet.
    vm.sh("(while :; do date >>/data/log; sync; done) >/dev/null 2>&1 &");

    let mut agent = vm.agent();
    let frozen = agent.execute("guest-fsfreeze-freeze", None, limit()).unwrap();
    assert_eq!(frozen, json!(1), "one filesystem is mounted");
    let mut monitor = vm.monitor();
    monitor.run("stop");
    assert_eq!(monitor.status(), "paused");
    let before = fs::read(disk).unwrap();
    assert_eq!(monitor.run("query-block")[0]["device"], "disk0");
    let after = fs::read(disk).unwrap();
    assert!(before == after, "the disk changed under a frozen and paused guest");
    // What is on the disk is a whole filesystem: no journal to replay, nothing to repair.
    let copy = lab.path("copy.raw");
    fs::write(&copy, &before).unwrap();
    crate::harness::run(std::process::Command::new("fsck.ext4").args(["-f", "-n"]).arg(&copy));

    monitor.run("cont");
    let thawed = agent.execute("guest-fsfreeze-thaw", None, limit()).unwrap();
    assert_eq!(thawed, json!(1));
    assert_eq!(vm.sh("cat /data/file"), "precious");
    vm.power_off();
}

#[test]
fn a_freeze_whose_client_leaves_is_thawed_after_the_grace() {
    let Some(lab) = Lab::new("thaw-grace") else { return };
    let disk = lab.ext4("data.raw", 64 << 20);
    let args = ["--disk", disk.to_str().unwrap(), "--mount", "/dev/vda:/data:ext4", "--thaw-grace", "2"];
    let mut vm = lab.boot("grace", &args);
    let mut agent = vm.agent();
    agent.execute("guest-fsfreeze-freeze", None, limit()).unwrap();
    drop(agent);
    let mut monitor = vm.monitor();
    crate::harness::eventually("the automatic thaw", || {
        let status = monitor.run("tarn-query-agent");
        (status["automatic-thaws"] == 1).then_some(())
    });
    vm.sh("echo writable >/data/file && sync");
}

#[test]
fn vmlinux_and_bzimage_boot_by_every_protocol_they_have() {
    let Some(lab) = Lab::new("boot-protocols") else { return };
    let vmlinux = guest_image("vmlinux");
    let bzimage = guest_image("vmlinuz");
    let cases = [("pvh", vmlinux.clone(), "pvh"), ("elf64", vmlinux, "linux"), ("bzimage", bzimage, "auto")];
    let initrd = guest_image("initramfs.cpio.zst");
    for (name, kernel, boot) in cases {
        let (kernel, initrd) = (kernel.to_str().unwrap(), initrd.to_str().unwrap());
        let mut vm = lab.boot(name, &["--kernel", kernel, "--initrd", initrd, "--boot", boot]);
        assert!(vm.sh("uname -r").contains("cloud-amd64"));
        vm.power_off();
    }
}
