//! Starting, stopping and dying in every way a guest can.

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::{Lab, Vm, eventually};
use crate::payload::{Then, pvh_elf};

/// A VM that runs a payload instead of a kernel.
fn payload<'a>(lab: &'a Lab, name: &'static str, then: Then, args: &[&str]) -> Vm<'a> {
    let kernel = lab.path(&format!("{name}.elf"));
    std::fs::write(&kernel, pvh_elf("hello from the payload\n", then)).unwrap();
    let mut all = vec!["--kernel", kernel.to_str().unwrap(), "--console", "serial"];
    all.extend(args);
    lab.launch(name, &all)
}

fn reboot() -> coordinator::Map {
    coordinator::Map::from_iter([("mode".to_owned(), json!("reboot"))])
}

#[test]
fn four_vcpus_and_five_gib_around_the_gap_are_all_there() {
    let Some(lab) = Lab::new("four-vcpus") else { return };
    let mut vm = lab.boot("big", &["--cpus", "4", "--memory", "5G"]);
    assert_eq!(vm.sh("nproc"), "4");
    let kib: u64 = vm.sh("awk '/MemTotal/ {print $2}' /proc/meminfo").parse().unwrap();
    assert!(kib > 4_800_000, "{kib} KiB");
    // Linux allocates from above 4 GiB first, as long as there is room.
    let map = vm.sh("grep 'System RAM' /proc/iomem");
    assert!(map.contains("100000000-17fffffff"), "2 GiB behind the gap: {map}");
    vm.sh("dd if=/dev/urandom of=/tmp/big bs=1M count=64 2>/dev/null && cp /tmp/big /tmp/copy && cmp /tmp/big /tmp/copy");
    let ids = vm.sh("grep -h . /sys/devices/system/cpu/cpu*/topology/core_id | sort -n | tr '\\n' ' '");
    assert_eq!(ids, "0 1 2 3", "one thread per core, one socket");
    assert_eq!(vm.sh("cat /sys/devices/system/clocksource/clocksource0/current_clocksource"), "kvm-clock");
    let mut monitor = vm.monitor();
    assert_eq!(monitor.run("query-cpus-fast").as_array().map(Vec::len), Some(4));
    vm.power_off();
}

#[test]
fn a_reboot_starts_a_fresh_guest_with_the_same_disks() {
    let Some(lab) = Lab::new("reboot") else { return };
    let disk = lab.ext4("data.raw", 64 << 20);
    let mut vm = lab.boot("again", &["--disk", disk.to_str().unwrap(), "--mount", "/dev/vda:/data:ext4"]);
    let first = vm.sh("cat /proc/sys/kernel/random/boot_id");
    vm.sh("echo kept >/data/file && touch /run/forgotten");
    let mut monitor = vm.monitor();
    vm.agent().execute_without_reply("guest-shutdown", Some(reboot()), Duration::from_secs(1)).unwrap();
    let reset = monitor.await_event("RESET");
    assert_eq!(reset.data.get("reason"), Some(&json!("guest-reset")));
    vm.wait_for_agent();
    assert_ne!(vm.sh("cat /proc/sys/kernel/random/boot_id"), first);
    assert_eq!(vm.sh("cat /data/file; ls /run/forgotten 2>/dev/null | wc -l"), "kept\n0");

    // The host's reset is as good, and leaves a paused VM in prelaunch.
    let second = vm.sh("cat /proc/sys/kernel/random/boot_id");
    monitor.run("system_reset");
    vm.wait_for_agent();
    assert_ne!(vm.sh("cat /proc/sys/kernel/random/boot_id"), second);
    monitor.run("stop");
    monitor.run("system_reset");
    assert_eq!(monitor.status(), "prelaunch");
    monitor.run("cont");
    vm.wait_for_agent();
    vm.power_off();
}

#[test]
fn the_power_button_and_poweroff_end_the_process_with_success() {
    let Some(lab) = Lab::new("power-button") else { return };
    let mut vm = lab.boot("button", &[]);
    // The button's driver comes up behind the agent.
    vm.sh("i=0; until [ -e /dev/input/event0 ] || [ $i -gt 600 ]; do sleep 0.1; i=$((i + 1)); done");
    let mut monitor = vm.monitor();
    eventually("the guest's power off", || {
        let _ = monitor.try_run("system_powerdown", &json!({}));
        (0..20).find_map(|_| match monitor.0.next_event(Duration::from_millis(100)) {
            Ok(Some(event)) if event.name == "SHUTDOWN" => Some(event.data),
            Ok(_) => None,
            // The monitor ends with the VM.
            Err(_) => Some(coordinator::Map::new()),
        })
    });
    assert!(vm.wait().success());
}

#[test]
fn a_guest_panic_ends_the_run_with_its_own_status_or_stays_to_be_looked_at() {
    let Some(lab) = Lab::new("panic") else { return };
    let panic = "sleep 0.2; echo c >/proc/sysrq-trigger";
    let mut vm = lab.boot("dies", &[]);
    vm.sh(&format!("(modprobe pvpanic-mmio; {panic}) >/dev/null 2>&1 &"));
    assert_eq!(vm.wait().code(), Some(70), "{}", vm.log());

    let mut vm = lab.boot("stays", &["--on-guest-panic", "pause"]);
    let mut monitor = vm.monitor();
    vm.sh(&format!("(modprobe pvpanic-mmio; {panic}) >/dev/null 2>&1 &"));
    monitor.await_event("GUEST_PANICKED");
    eventually("state guest-panicked", || (monitor.status() == "guest-panicked").then_some(()));
    assert_eq!(monitor.refusal("cont", &json!({})), "Resetting the Virtual Machine is required");
    monitor.run("system_reset");
    monitor.run("cont");
    vm.wait_for_agent();
    monitor.run("quit");
    assert!(vm.wait().success());
}

#[test]
fn a_triple_fault_follows_the_reset_policy() {
    let Some(lab) = Lab::new("triple-fault") else { return };
    let mut vm = payload(&lab, "ends", Then::TripleFault, &["--on-guest-reset", "exit:9"]);
    assert_eq!(vm.wait().code(), Some(9), "{}", vm.log());
    assert!(vm.console().contains("hello from the payload"));

    let mut vm = payload(&lab, "stays", Then::TripleFault, &["--on-guest-reset", "pause"]);
    let mut monitor = vm.monitor();
    eventually("the guest's end", || (monitor.status() == "shutdown").then_some(()));
    monitor.run("quit");
    assert!(vm.wait().success());
}

#[test]
fn acpi_s5_and_pvpanic_end_the_run_by_policy_without_any_kernel() {
    let Some(lab) = Lab::new("payload-ends") else { return };
    let s5 = Then::Out { port: 0x604, value: (5 << 10) | (1 << 13) };
    assert_eq!(payload(&lab, "sleeps", s5, &[]).wait().code(), Some(0));
    assert_eq!(payload(&lab, "eight", s5, &["--on-guest-shutdown", "exit:8"]).wait().code(), Some(8));
    let panic = Then::OutByte { port: 0x505, value: 1 };
    assert_eq!(payload(&lab, "panics", panic, &[]).wait().code(), Some(70));
}

#[test]
fn code_that_kvm_cannot_run_is_an_internal_error_with_a_reason() {
    let Some(lab) = Lab::new("internal-error") else { return };
    // Nothing is mapped there: KVM can neither run nor emulate what it cannot read.
    let mut vm = payload(&lab, "lost", Then::Jump(0xc800_0000), &[]);
    let mut monitor = vm.monitor();
    eventually("state internal-error", || (monitor.status() == "internal-error").then_some(()));
    assert!(vm.log().contains("KVM gave up at guest RIP 0xc8000000"), "{}", vm.log());
    assert_eq!(monitor.refusal("cont", &json!({})), "Resetting the Virtual Machine is required");
    monitor.run("quit");
    assert!(vm.wait().success());
}

#[test]
fn a_keyboard_reset_starts_the_payload_again_and_again() {
    let Some(lab) = Lab::new("payload-reset") else { return };
    let mut vm = payload(&lab, "loops", Then::Reset, &[]);
    eventually("five starts", || (vm.console().matches("hello").count() >= 5).then_some(()));
    let mut monitor = vm.monitor();
    monitor.run("quit");
    assert!(vm.wait().success());
}

#[test]
fn pause_is_acknowledged_by_a_guest_that_never_leaves_and_by_one_that_halts() {
    let Some(lab) = Lab::new("pause-ack") else { return };
    for (name, then) in [("spins", Then::Spin), ("halts", Then::Halt)] {
        let mut vm = payload(&lab, name, then, &[]);
        let mut monitor = vm.monitor();
        for _ in 0..50 {
            monitor.run("stop");
            assert_eq!(monitor.status(), "paused");
            monitor.run("cont");
            assert_eq!(monitor.status(), "running");
        }
        monitor.run("quit");
        assert!(vm.wait().success());
    }
}

#[test]
fn a_long_pause_leaves_no_soft_lockup_behind() {
    let Some(lab) = Lab::new("soft-lockup") else { return };
    let mut vm = lab.boot("sleeps", &["--cpus", "2"]);
    vm.sh("echo 5 >/proc/sys/kernel/watchdog_thresh");
    let mut monitor = vm.monitor();
    let uptime =
        |vm: &mut Vm<'_>| -> f64 { vm.sh("cut -d' ' -f1 /proc/uptime").trim().parse().expect("seconds") };
    let (before, since) = (uptime(&mut vm), Instant::now());
    monitor.run("stop");
    // Longer than twice the threshold: what the watchdog would call a lockup.
    std::thread::sleep(Duration::from_secs(12));
    monitor.run("cont");
    vm.wait_for_agent();
    let (guest, host) = (uptime(&mut vm) - before, since.elapsed().as_secs_f64());
    assert!(guest < host - 10.0, "the guest's clock stands still while it is paused: {guest} s of {host} s");
    vm.sh("sleep 2");
    let (_, log) = vm.try_sh("dmesg | grep -i 'soft lockup'");
    assert_eq!(log, "", "KVM_KVMCLOCK_CTRL tells the guest of the pause");
    vm.power_off();
}

#[test]
fn a_paused_start_runs_nothing_until_cont() {
    let Some(lab) = Lab::new("paused-start") else { return };
    let mut vm = payload(&lab, "waits", Then::Halt, &["--paused"]);
    let mut monitor = vm.monitor();
    assert_eq!(monitor.status(), "prelaunch");
    assert!(!vm.console().contains("hello"));
    monitor.run("cont");
    eventually("the payload's line", || vm.console().contains("hello").then_some(()));
    monitor.run("quit");
    assert!(vm.wait().success());
}

#[test]
fn sigterm_ends_the_vm_and_leaves_nothing_behind() {
    let Some(lab) = Lab::new("sigterm") else { return };
    let mut vm = payload(&lab, "asked", Then::Halt, &[]);
    let mut monitor = vm.monitor();
    crate::harness::run(Command::new("kill").arg(vm.pid().to_string()));
    let event = monitor.await_event("SHUTDOWN");
    assert_eq!(event.data.get("reason"), Some(&json!("host-signal")));
    assert_eq!(vm.wait().code(), Some(128 + 15));
    assert!(!vm.socket("").exists(), "the run-time directory is gone");
}
