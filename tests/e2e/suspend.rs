//! Sleeping and waking: suspend to RAM and to disk, and what a sleeping VM does when it is told to stop or to end.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::harness::{Lab, Monitor, Vm, connect, eventually, limit, run};
use crate::payload::Then;

const NOT_SUSPENDED: &str = "Unable to wake up: guest is not in suspended state";
const CHANNEL: &str = "org.example.echo";

/// A payload's last deed: the sleep control register with SLP_EN and this SLP_TYP.
fn sleep_type(kind: u16) -> Then {
    Then::Out { port: 0x604, value: kind << 10 | 1 << 13 }
}

/// Sends a command that is not answered.
fn ask_to_sleep(vm: &mut Vm<'_>, command: &str) {
    let mut agent = vm.agent();
    agent.wait_for_agent(limit()).unwrap();
    agent.execute_without_reply(command, None, Duration::from_millis(200)).unwrap();
}

/// Asks the guest to sleep, and waits until it does.
fn suspend(vm: &mut Vm<'_>, monitor: &mut Monitor, command: &str) {
    monitor.forget_events();
    ask_to_sleep(vm, command);
    assert_eq!(monitor.await_event("SUSPEND").data.len(), 0);
    assert_eq!(monitor.run("query-status"), json!({"status": "suspended", "running": false}));
}

/// Waits until the guest is awake, and nothing else has happened to it.
fn awaken(vm: &mut Vm<'_>, monitor: &mut Monitor) {
    assert_eq!(monitor.await_event("WAKEUP").data.len(), 0);
    assert_eq!(monitor.status(), "running");
    vm.wait_for_agent();
}

/// Names of the events until the one of that name, which is the last.
fn events_until(monitor: &mut Monitor, last: &str) -> Vec<String> {
    let mut names = Vec::new();
    eventually(last, || {
        let event = monitor.0.next_event(Duration::from_millis(100)).expect("the monitor is there")?;
        names.push(event.name);
        (names.last()? == last).then_some(())
    });
    names
}

/// A client of a channel whose guest end sends everything back.
struct Echo {
    socket: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Echo {
    fn start(vm: &mut Vm<'_>, path: &Path) -> Self {
        // First the host's end: without it, the guest reads an end of file.
        let socket = connect(path);
        let lines = BufReader::new(socket.try_clone().unwrap());
        vm.sh(&format!("(exec 3<>/dev/virtio-ports/{CHANNEL}; cat <&3 >&3) >/dev/null 2>&1 &"));
        Self { socket, lines }
    }

    fn send(&mut self, line: &str) {
        writeln!(self.socket, "{line}").unwrap();
    }

    fn expect(&mut self, line: &str) {
        let mut got = String::new();
        self.lines.read_line(&mut got).unwrap();
        assert_eq!(got.trim_end(), line);
    }
}

/// A process that counts on the disk for ever.
fn count_on_disk(vm: &mut Vm<'_>) {
    vm.sh("(i=0; while :; do i=$((i + 1)); echo $i >>/data/log; sync; done) >/dev/null 2>&1 & echo $! >/tmp/pid");
}

/// It goes on, and has left nothing out.
fn it_counts_on(vm: &mut Vm<'_>) {
    let lines = "wc -l </data/log";
    let before: u64 = vm.sh(lines).parse().unwrap();
    eventually("another line on the disk", || (vm.sh(lines).parse::<u64>().unwrap() > before).then_some(()));
    vm.sh("kill -0 $(cat /tmp/pid) && awk '$1 != NR { exit 1 }' /data/log");
}

#[test]
fn a_guest_that_sleeps_wakes_up_with_its_disks_its_ports_and_all_its_vcpus() {
    let Some(lab) = Lab::new("suspend-to-ram") else { return };
    let disk = lab.ext4("data.raw", 64 << 20);
    let socket = lab.path("echo.sock");
    let channel = format!("name={CHANNEL},socket={}", socket.display());
    let args = ["--cpus", "2", "--disk", disk.to_str().unwrap(), "--mount", "/dev/vda:/data:ext4"];
    let mut vm = lab.boot("sleeper", &[&args[..], &["--channel", &channel]].concat());
    let mut monitor = vm.monitor();
    assert_eq!(monitor.run("query-current-machine"), json!({"wakeup-suspend-support": true}));
    assert_eq!(monitor.refusal("system_wakeup", &json!({})), NOT_SUSPENDED);
    count_on_disk(&mut vm);
    let mut echo = Echo::start(&mut vm, &socket);
    echo.send("before");
    echo.expect("before");
    let boot_id = vm.sh("cat /proc/sys/kernel/random/boot_id");
    let began: f64 = vm.sh("cut -d ' ' -f 1 /proc/uptime").parse().unwrap();

    let wake_up: [fn(&Lab, &mut Monitor); 3] = [
        |_, monitor| drop(monitor.run("system_wakeup")),
        |lab, _| drop(run(&mut lab.tarn(&["resume", "sleeper"]))),
        |_, monitor| drop(monitor.run("system_powerdown")),
    ];
    for (round, wake_up) in wake_up.iter().enumerate() {
        suspend(&mut vm, &mut monitor, "guest-suspend-ram");
        let image = std::fs::read(&disk).unwrap();
        echo.send(&format!("while asleep {round}"));
        assert!(run(&mut lab.tarn(&["ps"])).contains("suspended"));
        assert!(image == std::fs::read(&disk).unwrap(), "the disk changed under a sleeping guest");
        wake_up(&lab, &mut monitor);
        awaken(&mut vm, &mut monitor);
        assert_eq!(vm.sh("cat /proc/sys/kernel/random/boot_id; nproc"), format!("{boot_id}\n2"));
        echo.expect(&format!("while asleep {round}"));
        it_counts_on(&mut vm);
    }
    // Its clocks went on, and nobody was taken for stuck; the button that woke it did not switch it off.
    let now: f64 = vm.sh("cut -d ' ' -f 1 /proc/uptime").parse().unwrap();
    assert!(began < now && now < began + 3600.0, "{began} {now}");
    let (_, bad) = vm.try_sh("dmesg | grep -i -e 'soft lockup' -e 'hung task' -e 'backtrace' -e 'I/O error'");
    assert_eq!(bad, "");

    suspend(&mut vm, &mut monitor, "guest-suspend-ram");
    monitor.run("quit");
    assert!(vm.wait().success(), "{}", vm.log());
}

#[test]
fn a_guest_suspended_to_disk_goes_on_in_the_next_run_of_its_disks() {
    let Some(lab) = Lab::new("suspend-to-disk") else { return };
    let swap = lab.image("swap.raw", 512 << 20);
    run(Command::new("mkswap").arg(&swap));
    let disk = lab.ext4("data.raw", 64 << 20);
    let (swap, disk) = (swap.to_str().unwrap(), disk.to_str().unwrap());
    let disks = ["--disk", swap, "--disk", disk, "--mount", "/dev/vdb:/data:ext4"];
    let args = [&disks[..], &["--append", "tarn.resume=/dev/vda"]].concat();
    let mut vm = lab.boot("first", &args);
    let mut monitor = vm.monitor();
    vm.sh("grep -q /dev/vda /proc/swaps");
    vm.sh("echo 'only in memory' >/tmp/marker");
    count_on_disk(&mut vm);
    let boot_id = vm.sh("cat /proc/sys/kernel/random/boot_id");

    // With an image and asleep: it wakes from memory, and the image is void.
    suspend(&mut vm, &mut monitor, "guest-suspend-hybrid");
    monitor.run("system_wakeup");
    awaken(&mut vm, &mut monitor);
    it_counts_on(&mut vm);

    monitor.forget_events();
    ask_to_sleep(&mut vm, "guest-suspend-disk");
    let event = monitor.await_event("SUSPEND_DISK");
    assert_eq!(event.data.len(), 0);
    let event = monitor.await_event("SHUTDOWN");
    assert_eq!(json!(event.data), json!({"guest": true, "reason": "guest-shutdown"}));
    assert!(vm.wait().success(), "{}", vm.log());

    let mut vm = lab.boot("second", &args);
    assert_eq!(
        vm.sh("cat /proc/sys/kernel/random/boot_id /tmp/marker"),
        format!("{boot_id}\nonly in memory")
    );
    it_counts_on(&mut vm);
    vm.power_off();
    run(Command::new("fsck.ext4").args(["-f", "-n"]).arg(disk));
}

#[test]
fn a_sleeping_vm_is_stopped_resumed_reset_and_ended_like_any_other() {
    let Some(lab) = Lab::for_payloads("asleep") else { return };
    let mut args = lab.payload(sleep_type(3));
    args.push("--paused".into());
    let mut vm = lab.launch("asleep", &args.iter().map(String::as_str).collect::<Vec<_>>());
    let mut monitor = vm.monitor();
    assert_eq!(monitor.refusal("system_wakeup", &json!({})), NOT_SUSPENDED);
    monitor.run("cont");
    assert_eq!(events_until(&mut monitor, "SUSPEND"), ["RESUME", "SUSPEND"]);
    // `cont` does not wake it, and nothing wakes it while it is stopped.
    monitor.run("cont");
    assert_eq!(monitor.status(), "suspended");
    monitor.run("stop");
    monitor.run("stop");
    assert_eq!(monitor.status(), "paused");
    assert_eq!(monitor.refusal("system_wakeup", &json!({})), NOT_SUSPENDED);
    monitor.run("cont");
    assert_eq!(monitor.status(), "suspended");
    assert_eq!(events_until(&mut monitor, "RESUME"), ["STOP", "RESUME"]);
    // Where it wants to wake up it has not said: it starts again, and falls asleep again.
    monitor.run("system_wakeup");
    assert_eq!(events_until(&mut monitor, "SUSPEND"), ["WAKEUP", "RESET", "SUSPEND"]);
    monitor.run("system_reset");
    assert_eq!(events_until(&mut monitor, "SUSPEND"), ["RESET", "SUSPEND"]);
    monitor.run("stop");
    monitor.run("system_reset");
    assert_eq!(monitor.status(), "prelaunch");
    monitor.run("cont");
    assert_eq!(events_until(&mut monitor, "SUSPEND"), ["STOP", "RESET", "RESUME", "SUSPEND"]);
    assert_eq!(vm.console().matches("hello").count(), 4);
    run(Command::new("kill").arg(vm.pid().to_string()));
    assert_eq!(monitor.await_event("SHUTDOWN").data["reason"], "host-signal");
    assert_eq!(vm.wait().code(), Some(128 + 15));
}

#[test]
fn suspend_to_disk_ends_a_run_by_the_policy_for_shutdowns() {
    let Some(lab) = Lab::for_payloads("hibernated") else { return };
    let args = lab.payload(sleep_type(4));
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let mut vm = lab.launch("ends", &[&args[..], &["--on-guest-shutdown", "exit:8"]].concat());
    assert_eq!(vm.wait().code(), Some(8), "{}", vm.log());

    let mut vm = lab.launch("stays", &[&args[..], &["--paused", "--on-guest-shutdown", "pause"]].concat());
    let mut monitor = vm.monitor();
    monitor.run("cont");
    assert_eq!(events_until(&mut monitor, "STOP"), ["RESUME", "SUSPEND_DISK", "SHUTDOWN", "STOP"]);
    assert_eq!(monitor.status(), "shutdown");
    monitor.run("quit");
    assert!(vm.wait().success());
}
