//! Ports: named channels, the agent's socket, and the entropy device beside them.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::harness::{Lab, Monitor, Vm, connect, eventually, sha256};

const MIB: usize = 1 << 20;
/// The ports as the guest sees them, and the names in the monitor's events.
const TEST: &str = "org.example.test";
const OTHER: &str = "org.example.other";

/// Waits until the guest's end of a channel is open or closed.
fn await_port(monitor: &mut Monitor, id: &str, open: bool) {
    loop {
        let event = monitor.await_event("VSERPORT_CHANGE");
        if event.data["id"] == id && event.data["open"] == open {
            return;
        }
    }
}

#[test]
fn channels_carry_every_byte_through_back_pressure_hang_ups_pauses_and_resets() {
    let Some(lab) = Lab::new("channels") else { return };
    let (test, other) = (lab.path("test.sock"), lab.path("other.sock"));
    let channels = [
        format!("name={TEST},socket={}", test.display()),
        format!("name={OTHER},socket={}", other.display()),
    ];
    let mut vm = lab.boot("ports", &["--cpus", "2", "--channel", &channels[0], "--channel", &channels[1]]);
    let mut monitor = vm.monitor();
    // The driver comes up behind the agent.
    eventually("the entropy device's driver", || {
        let source = vm.sh("cat /sys/class/misc/hw_random/rng_current");
        source.starts_with("virtio_rng").then_some(())
    });
    assert_eq!(vm.sh("dd if=/dev/hwrng bs=64 count=4 2>/dev/null | wc -c"), "256");

    vm.sh("dd if=/dev/urandom of=/tmp/data bs=1M count=20 2>/dev/null");
    let sum = vm.sh("sha256sum </tmp/data | cut -d ' ' -f 1");
    let from_guest = lab.path("from-guest");
    guest_to_host(&mut vm, &mut monitor, &test, &from_guest);
    assert_eq!(sha256(&from_guest), sum);
    host_to_guest(&mut vm, &mut monitor, &test, &from_guest);
    assert_eq!(vm.sh("cat /tmp/sum"), sum);

    a_client_that_does_not_read_holds_up_its_own_port_only(&mut vm, &test, &other);
    a_client_that_leaves_and_comes_back_finds_the_stream(&mut vm, &test);
    the_guest_sees_the_end_of_what_the_host_sent(&mut vm, &test);

    // A connection outlives the guest's reset.
    let mut client = connect(&test);
    monitor.run("system_reset");
    vm.wait_for_agent();
    vm.sh(&format!("(cat /dev/virtio-ports/{TEST} >/tmp/got) >/dev/null 2>&1 &"));
    client.write_all(b"after the reset\n").unwrap();
    eventually("bytes after a reset", || {
        (vm.sh("cat /tmp/got 2>/dev/null; true") == "after the reset").then_some(())
    });
    vm.power_off();
}

fn guest_to_host(vm: &mut Vm<'_>, monitor: &mut Monitor, socket: &Path, target: &Path) {
    let client = connect(socket);
    monitor.forget_events();
    let start = Instant::now();
    vm.sh(&format!("(cat /tmp/data >/dev/virtio-ports/{TEST}) >/dev/null 2>&1 &"));
    let mut bytes = vec![0; 20 * MIB];
    (&client).read_exact(&mut bytes).unwrap();
    eprintln!("guest to host: 20 MiB in {:?}", start.elapsed());
    await_port(monitor, TEST, true);
    await_port(monitor, TEST, false);
    std::fs::write(target, bytes).unwrap();
}

/// With the VM stopped twice on the way.
fn host_to_guest(vm: &mut Vm<'_>, monitor: &mut Monitor, socket: &Path, source: &Path) {
    let bytes = std::fs::read(source).unwrap();
    let client = connect(socket);
    vm.sh(&format!("(head -c {} /dev/virtio-ports/{TEST} >/tmp/back; sha256sum </tmp/back | cut -d ' ' -f 1 >/tmp/sum) >/dev/null 2>&1 &", 20 * MIB));
    let (first, rest) = bytes.split_at(4 * MIB);
    let (second, third) = rest.split_at(8 * MIB);
    let start = Instant::now();
    (&client).write_all(first).unwrap();
    monitor.run("stop");
    monitor.run("cont");
    (&client).write_all(second).unwrap();
    std::thread::scope(|scope| {
        monitor.run("stop");
        let writer = scope.spawn(|| (&client).write_all(third).unwrap());
        assert_eq!(monitor.status(), "paused");
        monitor.run("cont");
        writer.join().unwrap();
    });
    eprintln!("host to guest: 20 MiB in {:?}", start.elapsed());
    eventually("the guest's checksum", || (vm.sh("wc -c </tmp/sum 2>/dev/null; true") == "65").then_some(()));
}

fn a_client_that_does_not_read_holds_up_its_own_port_only(vm: &mut Vm<'_>, test: &Path, other: &Path) {
    let client = connect(test);
    vm.sh(&format!("(dd if=/tmp/data of=/dev/virtio-ports/{TEST} bs=64k 2>/dev/null; echo $? >/tmp/written) >/dev/null 2>&1 &"));
    // Another port goes on, and the agent, which is a third.
    let mut echo = connect(other);
    vm.sh(&format!("(exec 3<>/dev/virtio-ports/{OTHER}; cat <&3 >&3) >/dev/null 2>&1 &"));
    let mut lines = BufReader::new(echo.try_clone().unwrap());
    for round in 0..50 {
        let sent = format!("round {round}\n");
        echo.write_all(sent.as_bytes()).unwrap();
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        assert_eq!(line, sent);
    }
    assert_eq!(vm.sh("ls /tmp/written 2>/dev/null | wc -l"), "0", "the writer waits for its reader");
    let mut bytes = vec![0; 20 * MIB];
    (&client).read_exact(&mut bytes).unwrap();
    eventually("the writer's end", || (vm.sh("cat /tmp/written 2>/dev/null; true") == "0").then_some(()));
}

fn a_client_that_leaves_and_comes_back_finds_the_stream(vm: &mut Vm<'_>, socket: &Path) {
    vm.sh(&format!(
        "(i=0; while [ ! -e /tmp/enough ]; do echo \"line $i\"; i=$((i + 1)); done \
          >/dev/virtio-ports/{TEST}; echo $i >/tmp/lines) >/dev/null 2>&1 &"
    ));
    let number = |line: &str| line.trim_end().strip_prefix("line ").and_then(|n| n.parse::<u64>().ok());
    let mut last = 0;
    for visit in 0..4 {
        let mut lines = BufReader::new(connect(socket)).lines();
        let mut next = || lines.next().unwrap().unwrap();
        if visit > 0 {
            // The end of a line that the last client had the beginning of.
            next();
        }
        let begin = number(&next()).unwrap();
        assert!(if visit == 0 { begin == 0 } else { begin > last }, "visit {visit} begins with line {begin}");
        for expected in begin + 1..begin + 200 {
            assert_eq!(number(&lines.next().unwrap().unwrap()), Some(expected), "visit {visit}");
            last = expected;
        }
        drop(lines);
        // Nobody is there: the writer waits, and the guest is well.
        vm.sh("true");
    }
    vm.sh("touch /tmp/enough");
    let mut rest = connect(socket);
    let mut buffer = vec![0; 64 << 10];
    eventually("the writer's end", || {
        rest.set_nonblocking(true).unwrap();
        while rest.read(&mut buffer).is_ok_and(|len| len > 0) {}
        vm.sh("cat /tmp/lines 2>/dev/null; true").parse::<u64>().ok()
    });
}

fn the_guest_sees_the_end_of_what_the_host_sent(vm: &mut Vm<'_>, socket: &Path) {
    let mut client = connect(socket);
    vm.sh(&format!("(cat /dev/virtio-ports/{TEST} >/tmp/all; touch /tmp/end) >/dev/null 2>&1 &"));
    client.write_all(&b"0123456789abcdef".repeat(1 << 16)).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    // Half closed is open: the reader waits for more until the client has gone.
    eventually("all bytes", || (vm.sh("wc -c </tmp/all 2>/dev/null; true") == "1048576").then_some(()));
    assert_eq!(vm.sh("ls /tmp/end 2>/dev/null | wc -l"), "0");
    drop(client);
    eventually("the end", || (vm.sh("ls /tmp/end 2>/dev/null | wc -l") == "1").then_some(()));
    let (status, text) = vm.try_sh(&format!("timeout 5 cat /dev/virtio-ports/{TEST} | wc -c"));
    assert_eq!((status, text.trim()), (0, "0"), "a port without a host end has ended");
}

/// A client of agent.sock that speaks as it likes.
struct Raw {
    socket: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Raw {
    fn connect(vm: &Vm<'_>) -> Self {
        let socket = connect(&vm.socket("agent.sock"));
        let lines = BufReader::new(socket.try_clone().unwrap());
        Self { socket, lines }
    }

    fn send(&mut self, text: &str) {
        self.socket.write_all(text.as_bytes()).unwrap();
    }

    /// A whole line, as it came.
    fn line(&mut self) -> Vec<u8> {
        let mut line = Vec::new();
        self.lines.read_until(b'\n', &mut line).unwrap();
        assert_eq!(line.last(), Some(&b'\n'), "the connection ended");
        line
    }

    fn reply(&mut self) -> Value {
        serde_json::from_slice(&self.line()).unwrap()
    }
}

#[test]
fn the_agents_socket_keeps_clients_apart_and_survives_the_agent() {
    let Some(lab) = Lab::new("agent-clients") else { return };
    let mut vm = lab.boot("agents", &[]);
    let mut monitor = vm.monitor();

    // Half a message stays with its sender; so does what is wrong with a message.
    let (mut slow, mut wrong) = (Raw::connect(&vm), Raw::connect(&vm));
    slow.send("{\"execute\":\"guest-pi");
    wrong.send("{\"execute\": garbage}\n");
    assert_eq!(wrong.reply()["error"]["class"], "GenericError");
    let mut client = Raw::connect(&vm);
    client.send("{\"execute\":\"guest-ping\",\"id\":\"mine\"}\n");
    assert_eq!(client.reply(), json!({"return": {}, "id": "mine"}));
    slow.send("ng\"}\n");
    assert_eq!(slow.reply(), json!({"return": {}}));

    // Many at once, each with its own ids, and some that do not wait for their answers.
    std::thread::scope(|scope| {
        for number in 0..6 {
            let mut client = Raw::connect(&vm);
            scope.spawn(move || {
                for round in 0..10 {
                    let id = number * 100 + round;
                    client.send(&format!(
                        "{{\"execute\":\"guest-sync\",\"arguments\":{{\"id\":{id}}},\"id\":{id}}}\n"
                    ));
                    if number >= 4 {
                        continue;
                    }
                    assert_eq!(client.reply(), json!({"return": id, "id": id}));
                }
            });
        }
    });

    // As Proxmox VE asks: both in one write, and both lines right behind each other, whatever was before them.
    let mut proxmox = Raw::connect(&vm);
    proxmox.send("{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":4711}}\n{\"execute\":\"guest-info\",\"arguments\":{}}\n");
    let sync = proxmox.line();
    let sync = sync
        .iter()
        .rposition(|byte| *byte == 0xff)
        .map(|at| &sync[at + 1..])
        .expect("0xFF before the answer");
    assert_eq!(serde_json::from_slice::<Value>(sync).unwrap(), json!({"return": 4711}));
    assert!(proxmox.reply()["return"]["version"].is_string());
    // As libvirt asks: guest-sync with the time, then one command at a time.
    let mut libvirt = Raw::connect(&vm);
    for id in [1_700_000_000_000_u64, 1_700_000_000_001] {
        libvirt.send(&format!("{{\"execute\":\"guest-sync\", \"arguments\":{{\"id\":{id}}}}}\n"));
        assert_eq!(libvirt.reply(), json!({"return": id}));
        libvirt.send("{\"execute\":\"guest-ping\"}\n");
        assert_eq!(libvirt.reply(), json!({"return": {}}));
    }

    // The agent dies with a request in its hands.
    monitor.forget_events();
    vm.sh("a=$(for p in /proc/[0-9]*; do read -r c <$p/comm 2>/dev/null; [ \"$c\" = tarn-agent ] && echo ${p##*/}; done | grep -vx 1); \
           kill -0 $a && (sleep 0.5; kill -STOP $a; until [ -e /tmp/die ]; do sleep 0.1; [ $((i += 1)) -gt 30 ] && break; done; kill -KILL $a) >/dev/null 2>&1 &");
    let refused = eventually("a request that is lost", || {
        let mut client = Raw::connect(&vm);
        // Not a simple question: that would be asked again of the next agent.
        client.send("{\"execute\":\"guest-get-host-name\"}\n");
        let reply = client.reply();
        reply["error"]["desc"].as_str().map(str::to_owned)
    });
    assert!(!refused.is_empty());
    eprintln!("what the client of a killed agent is told: {refused}");
    await_port(&mut monitor, "agent", false);
    await_port(&mut monitor, "agent", true);
    vm.wait_for_agent();
    assert_eq!(vm.sh("echo well"), "well");
    let status = monitor.run("tarn-query-agent");
    assert_eq!(status["malformed-replies"], 0);
    vm.power_off();
}
