//! Other people's programs: clients of the monitor and of the guest agent, and an agent of another make in the guest.
//!
//! `tests/clients/prepare` fetches them beforehand; where it has not run, these tests say SKIPPED (an error with
//! `REQUIRE_KVM=1`, as for every test that is left out).

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{Lab, Vm, eventually, limit, root, run};
use crate::payload::Then;

/// A file that `tests/clients/prepare` makes; `None`, loudly, where it has not run.
pub fn prepared(file: &str) -> Option<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let path = target.join("clients").join(file);
    if path.exists() {
        return Some(path);
    }
    let required = std::env::var("REQUIRE_KVM").is_ok_and(|value| value == "1");
    assert!(!required, "{} is not there: run tests/clients/prepare", path.display());
    eprintln!("SKIPPED: {} is not there: tests/clients/prepare makes it", path.display());
    None
}

/// Runs a program with this input; returns its output when it has ended well.
fn fed(command: &mut Command, input: &[u8]) -> String {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

#[test]
fn qmp_shell_and_the_python_library_find_a_monitor_they_know() {
    let (Some(shell), Some(python)) = (prepared("venv/bin/qmp-shell"), prepared("venv/bin/python")) else {
        return;
    };
    let Some(lab) = Lab::for_payloads("python-clients") else { return };
    let payload = lab.payload(Then::Halt);
    let mut vm = lab.launch("python", &payload.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(vm.monitor().status(), "running");
    let socket = vm.socket("monitor.sock");

    let typed = b"query-status\nstop\nquery-status\ncont\nquery-commands\ngetfd fdname=x\n\
        query-name\nno-such-command\n\n";
    // It keeps a history of what was typed in the home directory.
    let said = fed(Command::new(&shell).arg(&socket).env("HOME", lab.path("")), typed);
    let mut lines = said.lines();
    let mut expect =
        |part: &str| assert!(lines.any(|line| line.contains(part)), "no {part} (in this order) in:\n{said}");
    expect("Connected to QEMU");
    expect("\"status\": \"running\"");
    expect("{\"return\": {}}");
    expect("\"status\": \"paused\"");
    expect("query-qmp-schema");
    expect("No file descriptor supplied");
    expect("\"name\": \"python\"");
    expect("The command no-such-command has not been found");
    // It shows what has happened meanwhile when the line is empty.
    expect("STOP");
    expect("RESUME");

    let script = root().join("tests/clients/session.py");
    let said = run(Command::new(&python).arg(&script).arg(&socket));
    let expected = "greeting True\nstatus running\nevent STOP\nstatus paused\nevent RESUME\n\
        error CommandNotFound The command no-such-command has not been found\nnames {'python'}\nfd ok\nend\n";
    assert_eq!(said, expected);

    vm.monitor().run("quit");
    assert!(vm.wait().success());
}

/// One connection to `agent.sock` by socat: sends `requests`, each when the one before has its answer.
fn through_socat(socket: &Path, requests: &[Value]) -> Vec<Value> {
    let mut child = Command::new("socat")
        .args(["-", &format!("UNIX-CONNECT:{}", socket.display())])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let answers = requests.iter().map(|request| {
        writeln!(input, "{request}").unwrap();
        let mut line = Vec::new();
        let mut byte = [0];
        while !line.ends_with(b"\n") && output.read(&mut byte).unwrap() == 1 {
            line.push(byte[0]);
        }
        // The answer to guest-sync-delimited begins with the byte that tells old answers from new ones.
        let json = line.strip_prefix(b"\xff").unwrap_or(&line);
        assert_eq!(line[0] == 0xff, request["execute"] == "guest-sync-delimited");
        serde_json::from_slice(json)
            .unwrap_or_else(|_| panic!("{request}: {}", String::from_utf8_lossy(&line)))
    });
    let answers = answers.collect();
    drop(input);
    child.wait().unwrap();
    answers
}

/// What anybody may do with the agent of a VM, whoever made it; returns its version.
fn an_agent_serves_every_client(lab: &Lab, vm: &mut Vm<'_>, name: &str) -> String {
    let socket = vm.socket("agent.sock");
    let sync = json!({"execute": "guest-sync-delimited", "arguments": {"id": 4711}});
    let info = json!({"execute": "guest-info"});
    let answers = through_socat(
        &socket,
        &[sync.clone(), info, json!({"execute": "guest-ping"}), json!({"execute": "guest-no-such"}), sync],
    );
    assert_eq!(answers[0], json!({"return": 4711}));
    let version = answers[1]["return"]["version"].as_str().unwrap().to_owned();
    assert_eq!(answers[2], json!({"return": {}}));
    assert_eq!(answers[3]["error"]["class"], "CommandNotFound", "{}", answers[3]);
    assert_eq!(answers[4], json!({"return": 4711}));

    // The same through the monitor and through the command line.
    let mut monitor = vm.monitor();
    assert_eq!(monitor.run("guest-info")["version"], version.as_str());
    assert!(monitor.refusal("guest-no-such", &json!({})).contains("guest-no-such"));
    let output = lab.output(&["agent", name, "guest-info"]);
    let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(shown["version"], version.as_str());
    let output = lab.output(&["exec", name, "--", "sh", "-c", "echo out; echo err >&2; exit 5"]);
    assert_eq!(
        (output.status.code(), &output.stdout[..], &output.stderr[..]),
        (Some(5), &b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!(vm.sh("echo $((6 * 7))"), "42");

    // A client that stops in the middle of a request, and one that leaves before its answer, trouble nobody.
    let mut half = UnixStream::connect(&socket).unwrap();
    half.write_all(br#"{"execute": "guest-exec", "arguments": {"path": "#).unwrap();
    let mut hasty = UnixStream::connect(&socket).unwrap();
    let sleep = json!({"execute": "guest-exec", "arguments": {"path": "sleep", "arg": ["1"], "capture-output": true}});
    hasty.write_all(sleep.to_string().as_bytes()).unwrap();
    drop(hasty);
    assert_eq!(through_socat(&socket, &[json!({"execute": "guest-ping"})]), [json!({"return": {}})]);
    half.write_all(b"\"true\"}}\n").unwrap();
    let mut answer = [0; 64];
    half.set_read_timeout(Some(limit())).unwrap();
    let count = half.read(&mut answer).unwrap();
    assert!(
        answer[..count].starts_with(b"{\"return\": {\"pid\": "),
        "{:?}",
        String::from_utf8_lossy(&answer[..count])
    );

    // While the VM is paused its agent cannot answer: whoever waited gets a late answer or none, and the next one his own.
    monitor.run("stop");
    let mut waiting = vm.agent();
    waiting.execute("guest-ping", None, Duration::from_millis(300)).unwrap_err();
    let output = lab.output(&["exec", "--timeout", "1", name, "--", "true"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("is paused: `tarn resume "), "{output:?}");
    monitor.run("cont");
    assert_eq!(waiting.execute("guest-ping", None, limit()).unwrap(), json!({}));
    version
}

/// Freezes, looks from elsewhere, thaws.
fn its_filesystems_freeze_and_thaw(vm: &mut Vm<'_>) {
    let mut monitor = vm.monitor();
    let mut freezer = vm.agent();
    let frozen = freezer.execute("guest-fsfreeze-freeze", None, limit()).unwrap();
    assert_eq!(frozen, json!(1), "/data is the only one that can be");
    assert_eq!(monitor.run("guest-fsfreeze-status"), "frozen");
    assert_eq!(freezer.execute("guest-fsfreeze-thaw", None, limit()).unwrap(), json!(1));
    assert_eq!(monitor.run("guest-fsfreeze-status"), "thawed");
    // A client that freezes and leaves: the broker thaws after a grace.
    freezer.execute("guest-fsfreeze-freeze", None, limit()).unwrap();
    drop(freezer);
    eventually("the automatic thaw", || (monitor.run("guest-fsfreeze-status") == "thawed").then_some(()));
    assert_eq!(vm.sh("echo written >/data/file && sync && cat /data/file"), "written");
}

#[test]
fn our_agent_serves_socat_and_survives_clients_without_manners() {
    let Some(lab) = Lab::new("socat") else { return };
    let disk = lab.ext4("data.raw", 64 << 20);
    let args = ["--disk", disk.to_str().unwrap(), "--mount", "/dev/vda:/data:ext4", "--thaw-grace", "1"];
    let mut vm = lab.boot("ours", &args);
    an_agent_serves_every_client(&lab, &mut vm, "ours");
    its_filesystems_freeze_and_thaw(&mut vm);
    vm.power_off();
}

#[test]
fn debians_own_agent_answers_through_the_broker() {
    let Some(overlay) = prepared("qemu-ga.cpio") else { return };
    let Some(lab) = Lab::new("qemu-ga") else { return };
    let disk = lab.ext4("data.raw", 64 << 20);
    let agent = "tarn.agent=/usr/sbin/qemu-ga,--method=virtio-serial,--path=/dev/virtio-ports/org.qemu.guest_agent.0,\
        --statedir=/run";
    let args = [
        "--disk",
        disk.to_str().unwrap(),
        "--mount",
        "/dev/vda:/data:ext4",
        "--thaw-grace",
        "1",
        "--initrd",
        overlay.to_str().unwrap(),
        "--append",
        agent,
    ];
    let mut vm = lab.boot("debian", &args);
    let package = fs::read_to_string(prepared("qemu-ga/qemu-guest-agent.package").unwrap()).unwrap();
    let version = an_agent_serves_every_client(&lab, &mut vm, "debian");
    // "qemu-guest-agent 1:7.2+dfsg-7" and "7.2.22"
    let packaged = package.split_once(':').unwrap().1.split('+').next().unwrap();
    assert!(version.starts_with(packaged), "{version} of {package}");
    assert!(vm.sh("ps").contains("qemu-ga"), "it is the one that runs");
    its_filesystems_freeze_and_thaw(&mut vm);
    // It asks for what a whole distribution has, /sbin/shutdown; without it the power button is pressed.
    let output = lab.output(&["stop", "debian"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(vm.wait().success());
}
