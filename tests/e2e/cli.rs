//! The command line as people and scripts use it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::harness::{Lab, TARN, eventually, limit, run};
use crate::payload::Then;

const POWER_OFF: Then = Then::Out { port: 0x604, value: (5 << 10) | (1 << 13) };
const PANIC: Then = Then::OutByte { port: 0x505, value: 1 };

/// `tarn VERB…` with this input.
fn fed(lab: &Lab, args: &[&str], input: &[u8]) -> Output {
    let mut command = lab.tarn(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // Whoever does not want it may have gone.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Runs `tarn VERB…`, which must succeed and say nothing on standard error; returns its output.
fn good(lab: &Lab, args: &[&str]) -> String {
    let output = lab.output(args);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""), "{args:?}");
    text(&output.stdout).to_owned()
}

/// Runs `tarn VERB…`, which must fail; returns its one sentence.
fn failure(lab: &Lab, args: &[&str]) -> String {
    let output = lab.output(args);
    let said = text(&output.stderr);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), ""), "{args:?}: {said}");
    assert!(said.starts_with("tarn: ") && said.lines().count() == 1, "{args:?}: {said}");
    said.to_owned()
}

/// The row of `tarn ps --json` for this VM.
fn row(lab: &Lab, name: &str) -> Value {
    let rows: Vec<Value> = serde_json::from_str(&good(lab, &["ps", "--json"])).unwrap();
    rows.into_iter().find(|row| row["name"] == name).unwrap_or_default()
}

/// A VM in the background; killed when dropped.
struct Detached<'a>(&'a Lab, &'static str);

impl<'a> Detached<'a> {
    fn start(lab: &'a Lab, name: &'static str, args: &[&str]) -> Self {
        let all: Vec<&str> =
            ["run", "--name", name, "--detach"].into_iter().chain(args.iter().copied()).collect();
        assert_eq!(good(lab, &all), format!("{name}\n"));
        Self(lab, name)
    }
}

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!(
                "{}",
                fs::read_to_string(self.0.path("run").join(self.1).join("log")).unwrap_or_default()
            );
        }
        let _ = self.0.tarn(&["kill", "--timeout", "0", self.1]).stderr(Stdio::null()).status();
    }
}

#[test]
fn help_version_and_mistakes_in_the_command_line() {
    let lab = Lab::without_kvm("help");
    let help = good(&lab, &["--help"]);
    for verb in [
        "run",
        "ps",
        "exec",
        "cp",
        "console",
        "pause",
        "resume",
        "stop",
        "kill",
        "qmp",
        "agent",
        "doctor",
        "completions",
    ] {
        assert!(help.contains(&format!("\n  {verb} ")), "{verb}: {help}");
        let own = good(&lab, &[verb, "--help"]);
        assert!(own.contains("Usage: tarn ") && own.contains("Example"), "{verb}: {own}");
    }
    assert!(good(&lab, &["--version"]).starts_with("tarn "));
    for (args, says) in [
        (&["fly"][..], "unrecognized subcommand 'fly'"),
        (&[], "Usage: tarn"),
        (&["run", "--cpu", "2"], "--cpus"),
        (&["run", "--detach", "--exec", "true"], "cannot be used with"),
        (&["exec", "web"], "<COMMAND>"),
        (&["exec", "web", "-e", "X", "--", "true"], "NAME=VALUE"),
        (&["kill"], "<NAME>"),
    ] {
        let output = lab.output(args);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(2), ""), "{args:?}");
        assert!(text(&output.stderr).contains(says), "{args:?}: {}", text(&output.stderr));
    }
    assert_eq!(good(&lab, &["ps"]), "NAME  PID  STATE  UPTIME  CPUS  MEMORY  DISKS\n");
    assert_eq!(good(&lab, &["ps", "--json"]), "[]\n");
}

#[test]
fn a_configuration_that_was_printed_is_the_same_when_it_is_read() {
    let lab = Lab::without_kvm("dry-run");
    let flags = [
        "run",
        "--name",
        "web",
        "--kernel",
        "/k",
        "--initrd",
        "/i",
        "--append",
        "quiet",
        "--cpus",
        "3",
        "--memory",
        "768M",
        "--huge-pages",
        "--disk",
        "/d.raw,id=root,ro,queues=2,serial=S1",
        "--disk",
        "/e.raw,cache=unsafe,werror=stop",
        "--mount",
        "root:/data:ext4",
        "--channel",
        "name=a.b,socket=/s",
        "--on-guest-panic",
        "pause",
        "--paused",
        "--dry-run",
    ];
    let printed = good(&lab, &flags);
    let config: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!((&config["name"], &config["cpus"]), (&json!("web"), &json!(3)));
    let file = lab.path("vm.json");
    fs::write(&file, &printed).unwrap();
    let file = file.to_str().unwrap();
    assert_eq!(good(&lab, &["run", "--config", file, "--dry-run"]), printed);
    let changed: Value =
        serde_json::from_str(&good(&lab, &["run", "--config", file, "--cpus", "4", "--dry-run"])).unwrap();
    let mut expected = config;
    expected["cpus"] = json!(4);
    assert_eq!(changed, expected, "flags override");
    assert_eq!(lab.leavings(), <[String; 0]>::default());
}

#[test]
fn who_reads_no_further_is_no_reason_to_complain() {
    let Some(lab) = Lab::for_payloads("broken-pipe") else { return };
    for args in [&["ps"][..], &["--help"], &["completions", "bash"], &["run", "--kernel", "/k", "--dry-run"]]
    {
        let output = with_closed_pipe(&lab, args);
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""), "{args:?}");
    }
    // The guest talks to nobody, and goes its way.
    let payload = lab.payload(POWER_OFF);
    let mut args = vec!["run", "--name", "unheard"];
    args.extend(payload.iter().map(String::as_str));
    let output = with_closed_pipe(&lab, &args);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

fn with_closed_pipe(lab: &Lab, args: &[&str]) -> Output {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    lab.tarn(args)
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap()
}

#[test]
fn a_vm_in_the_background_is_seen_paused_asked_and_killed() {
    let Some(lab) = Lab::for_payloads("detached") else { return };
    let payload = lab.payload(Then::Halt);
    let mut args: Vec<&str> = payload.iter().map(String::as_str).collect();
    args.extend(["--cpus", "2"]);
    let vm = Detached::start(&lab, "alice", &args);
    let seen = row(&lab, "alice");
    assert_eq!(
        (&seen["state"], &seen["cpus"], &seen["memory"]),
        (&json!("running"), &json!(2), &json!(64 << 20))
    );
    let table = good(&lab, &["ps"]);
    assert!(
        table.lines().nth(1).is_some_and(|line| line.starts_with("alice") && line.contains("running")),
        "{table}"
    );
    let log = fs::read_to_string(lab.path("run/alice/log")).unwrap();
    assert!(!log.contains("ERROR"), "{log}");

    for (verb, state) in
        [("pause", "paused"), ("pause", "paused"), ("resume", "running"), ("resume", "running")]
    {
        assert_eq!(good(&lab, &[verb, "alice"]), "");
        assert_eq!(row(&lab, "alice")["state"], state);
    }
    assert!(
        failure(&lab, &["stop", "alice", "--timeout", "1"])
            .contains("still runs after 1 s; `tarn kill alice`")
    );
    good(&lab, &["pause", "alice"]);
    assert!(failure(&lab, &["stop", "alice"]).contains("`tarn resume alice` first"));
    good(&lab, &["resume", "alice"]);

    monitor_verbs(&lab);
    completions_know_it(&lab);
    assert!(
        failure(&lab, &["exec", "alice", "--timeout", "1", "--", "true"])
            .contains("is an agent running in the guest")
    );
    assert!(failure(&lab, &["agent", "alice", "guest-ping", "--nonsense"]).contains("key=value"));

    // A reader that comes late sees what the guest says from then on; the end of the VM is the end of the console.
    let console =
        lab.tarn(&["console", "alice"]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let shown: i32 = row(&lab, "alice")["pid"].as_i64().unwrap().try_into().unwrap();
    good(&lab, &["kill", "alice"]);
    assert!(console.wait_with_output().unwrap().status.success());
    let left = fs::read_to_string(format!("/proc/{shown}/stat")).unwrap_or_default();
    assert!(left.is_empty() || left.contains(") Z "), "it waits for the end of the process: {left}");
    assert_eq!(lab.leavings(), <[String; 0]>::default());
    drop(vm);
}

fn monitor_verbs(lab: &Lab) {
    let status: Value = serde_json::from_str(&good(lab, &["qmp", "alice", "query-status"])).unwrap();
    assert_eq!(status, json!({"status": "running", "running": true}));
    let name = good(lab, &["qmp", "alice", r#"{"execute": "query-name", "id": 1}"#]);
    assert_eq!(serde_json::from_str::<Value>(&name).unwrap(), json!({"name": "alice"}));
    assert!(
        failure(lab, &["qmp", "alice", "query-nothing"])
            .contains("The command query-nothing has not been found")
    );
    assert!(failure(lab, &["qmp", "alice", "getfd", "fdname=x"]).contains("SCM_RIGHTS"));
    assert!(failure(lab, &["qmp", "alice", "{"]).contains("not a JSON request"));
    let typed = b"query-name\nstop\n\nquery-nothing\nnot a command\ncont\nquery-status\n";
    let output = fed(lab, &["qmp", "alice"], typed);
    let (said, complaints) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "the last command counts: {complaints}");
    let order = ["\"name\": \"alice\"", "{}", "{}", "\"status\": \"running\""];
    let mut rest = said;
    for part in order {
        rest = rest.split_once(part).unwrap_or_else(|| panic!("no {part} in {said}")).1;
    }
    assert!(said.contains("STOP\n") && said.contains("RESUME\n"), "{said}");
    assert!(
        complaints.contains("query-nothing has not been found") && complaints.contains("is not key=value"),
        "{complaints}"
    );
    assert_eq!(fed(lab, &["qmp", "alice"], b"query-status\nnonsense\n").status.code(), Some(1));
}

/// In a real shell.
fn completions_know_it(lab: &Lab) {
    let directory = Path::new(TARN).parent().unwrap().display();
    let ask = |words: &str, typed: &str| {
        let script = format!(
            "PATH={directory}:$PATH; eval \"$(tarn completions bash)\"; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             COMP_TYPE=9; _clap_complete_tarn tarn '{typed}' x; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        );
        run(Command::new("bash").args(["-c", &script]).env("TARN_RUN_DIR", lab.path("run")))
    };
    assert_eq!(ask("tarn st", "st"), "stop\n");
    assert_eq!(ask("tarn stop al", "al"), "alice\n");
    assert_eq!(ask("tarn cp x al", "al"), "alice:\n");
    assert!(ask("tarn run --on-guest-p", "--on-guest-p").contains("--on-guest-panic"));
    for shell in ["zsh", "fish"] {
        assert!(good(lab, &["completions", shell]).contains("tarn"));
    }
}

#[test]
fn a_vm_that_hangs_is_seen_to_and_killed_all_the_same() {
    let Some(lab) = Lab::for_payloads("hung") else { return };
    let payload = lab.payload(Then::Halt);
    let mut vm = lab.launch("stuck", &payload.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(vm.monitor().status(), "running");
    let pid = Pid::from_raw(i32::try_from(vm.pid()).unwrap()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    assert_eq!(row(&lab, "stuck")["state"], "not responding");
    let output = lab.output(&["kill", "stuck", "--timeout", "1"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(text(&output.stderr).contains("killing it"), "{}", text(&output.stderr));
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&vm.wait()), Some(9));
    assert_eq!(lab.leavings(), <[String; 0]>::default());
}

#[test]
fn how_the_vm_ended_is_the_status_and_the_last_word() {
    let Some(lab) = Lab::for_payloads("last-word") else { return };
    for (then, flags, status, says) in [
        (POWER_OFF, &[][..], 0, ""),
        (POWER_OFF, &["--on-guest-shutdown", "exit:9"], 9, "the guest powered off"),
        (PANIC, &[], 70, "the guest's kernel panicked"),
        (Then::Reset, &["--on-guest-reset", "exit:3"], 3, "the guest rebooted"),
    ] {
        let payload = lab.payload(then);
        let mut args = vec!["run", "--name", "brief"];
        args.extend(payload.iter().map(String::as_str).chain(flags.iter().copied()));
        let output = lab.output(&args);
        assert_eq!(output.status.code(), Some(status), "{}", text(&output.stderr));
        assert!(
            text(&output.stdout).contains("hello from the payload"),
            "standard output is the guest's console"
        );
        assert!(text(&output.stderr).contains(says), "{}", text(&output.stderr));
        assert_eq!(lab.leavings(), <[String; 0]>::default());
    }
    // The same with --exec: there is no agent to run anything.
    let payload = lab.payload(PANIC);
    let mut args = vec!["run", "--name", "brief", "--exec", "true"];
    args.extend(payload.iter().map(String::as_str));
    let output = lab.output(&args);
    let said = text(&output.stderr);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(70), ""), "{said}");
    assert!(said.contains("The guest ended before the command had: the guest's kernel panicked"), "{said}");
    let payload = lab.payload(Then::Jump(0xc800_0000));
    let mut args = vec!["run", "--name", "brief", "--exec", "true"];
    args.extend(payload.iter().map(String::as_str));
    let output = lab.output(&args);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("KVM") && said.contains("The guest cannot run any further"), "{said}");
    let payload = lab.payload(Then::Halt);
    let mut args = vec!["run", "--name", "brief", "--exec", "true", "--agent-timeout", "1"];
    args.extend(payload.iter().map(String::as_str));
    let output = lab.output(&args);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("did not answer"), "{said}");
    assert_eq!(lab.leavings(), <[String; 0]>::default());
}

/// A shell script on a terminal of its own.
struct Pty {
    child: Child,
    keyboard: Option<ChildStdin>,
    screen: Receiver<Vec<u8>>,
    seen: String,
}

impl Pty {
    /// Runs the script by way of script(1); `tarn` in it is the one under test.
    fn run(lab: &Lab, file: &str, script: &str) -> Self {
        let path = lab.path(file);
        fs::write(&path, script.replace("tarn ", &format!("{TARN} "))).unwrap();
        let mut command = Command::new("script");
        command.args([
            "--quiet",
            "--return",
            "--flush",
            "--command",
            &format!("sh {}", path.display()),
            "/dev/null",
        ]);
        command.env("TARN_RUN_DIR", lab.path("run")).env("TERM", "dumb");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let keyboard = child.stdin.take();
        let mut output = child.stdout.take().unwrap();
        let (sender, screen) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { child, keyboard, screen, seen: String::new() }
    }

    fn read(&mut self) -> bool {
        match self.screen.recv_timeout(limit()) {
            Ok(bytes) => self.seen += &String::from_utf8_lossy(&bytes),
            Err(_) => return false,
        }
        true
    }

    /// Waits until the screen has shown this.
    fn wait_for(&mut self, what: &str) {
        while !self.seen.contains(what) {
            assert!(self.read(), "no {what:?} on the terminal: {:?}", self.seen);
        }
    }

    fn press(&mut self, keys: &[u8]) {
        let keyboard = self.keyboard.as_mut().unwrap();
        keyboard.write_all(keys).and_then(|()| keyboard.flush()).unwrap();
    }

    /// Everything that was shown, once the script has ended.
    fn finish(mut self) -> String {
        while self.read() {}
        self.keyboard = None;
        self.child.wait().unwrap();
        std::mem::take(&mut self.seen)
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process with this command line.
fn process_with(words: &[&str]) -> Option<u32> {
    let wanted: Vec<u8> = words.iter().flat_map(|word| [word.as_bytes(), b"\0"].concat()).collect();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(|pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line == wanted))
}

fn terminal_of(pid: u32) -> String {
    run(Command::new("stty").args(["-a", "-F", &format!("/proc/{pid}/fd/0")]))
}

#[test]
fn the_terminal_is_as_it_was_however_the_vm_ends() {
    let Some(lab) = Lab::for_payloads("terminal") else { return };
    let cases = [
        ("off", POWER_OFF, 0),
        ("panic", PANIC, 70),
        ("term", Then::Halt, 143),
        ("keys", Then::Halt, 0),
        ("quit", Then::Halt, 0),
    ];
    for (name, then, status) in cases {
        let payload = lab.payload(then).join(" ");
        let script =
            format!("stty -a\necho FIRST\ntarn run --name {name} {payload}\necho status=$?\nstty -a\n");
        let mut pty = Pty::run(&lab, name, &script);
        // Messages of the host may come between the guest's, so that only a guest that goes on is waited for.
        if then == Then::Halt {
            pty.wait_for("hello from the payload\r\n");
            let pid: u32 =
                fs::read_to_string(lab.path("run").join(name).join("pid")).unwrap().trim().parse().unwrap();
            let mut monitor = lab.monitor(name);
            let raw = terminal_of(pid);
            assert!(raw.contains("-icanon") && raw.contains("-echo ") && raw.contains("-isig"), "{raw}");
            // Ctrl-C is the guest's.
            pty.press(b"\x03\x1a\x1c");
            assert_eq!(monitor.status(), "running");
            match name {
                "term" => {
                    kill_process(Pid::from_raw(pid.try_into().unwrap()).unwrap(), Signal::TERM).unwrap();
                }
                "keys" => pty.press(b"\x1d."),
                _ => drop(monitor.run("quit")),
            }
        }
        let seen = pty.finish();
        let (before, rest) = seen.split_once("FIRST\r\n").unwrap();
        let (ended, after) =
            rest.split_once(&format!("status={status}\r\n")).unwrap_or_else(|| panic!("{name}: {rest}"));
        assert_eq!(before, after, "{name}: the settings of the terminal");
        assert!(before.contains("icanon") && !before.contains("-icanon"));
        if status != 0 {
            assert!(ended.contains(&format!("tarn: VM {name} has ended: ")), "{ended}");
        }
        assert_eq!(lab.leavings(), <[String; 0]>::default());
    }
}

#[test]
fn a_console_that_is_left_gives_the_terminal_back_and_the_vm_goes_on() {
    let Some(lab) = Lab::for_payloads("console-keys") else { return };
    let payload = lab.payload(Then::Halt);
    let mut vm = lab.launch("shown", &payload.iter().map(String::as_str).collect::<Vec<_>>());
    let mut monitor = vm.monitor();
    for (how, last) in [("keys", false), ("end", true)] {
        let script = "stty -a\necho FIRST\ntarn console shown\necho status=$?\nstty -a\n";
        let mut pty = Pty::run(&lab, how, script);
        pty.wait_for("Ctrl-] then . leaves");
        // The message comes before raw mode, which drops what was typed before it.
        let client = eventually("the console's client", || process_with(&[TARN, "console", "shown"]));
        eventually("raw mode", || terminal_of(client).contains("-icanon").then_some(()));
        if last {
            monitor.run("quit");
        } else {
            pty.press(b"\x1d.");
        }
        let seen = pty.finish();
        let (before, rest) = seen.split_once("FIRST\r\n").unwrap();
        let after = rest.split_once("status=0\r\n").unwrap_or_else(|| panic!("{rest}")).1;
        assert_eq!(before, after, "the settings of the terminal");
        if !last {
            assert_eq!(monitor.status(), "running");
        }
    }
    assert!(vm.wait().success());
}

#[test]
fn run_exec_is_one_command_in_a_throw_away_vm() {
    let Some(lab) = Lab::new("run-exec") else { return };
    let disk = lab.ext4("data.raw", 64 << 20);
    let command = "cat; echo 'to stderr' >&2; head -c 300000 /dev/zero | tr '\\0' x; echo kept >/data/file; kill -TERM $$";
    let mount = ["--disk", disk.to_str().unwrap(), "--mount", "/dev/vda:/data:ext4"];
    let mut args = vec!["run", "--memory", "256M", "--exec", command];
    args.extend(mount);
    let mut input = b"binary \0\xff input\n".to_vec();
    input.extend(std::iter::repeat_n(b'y', 200_000));
    let output = fed(&lab, &args, &input);
    let mut expected = input.clone();
    expected.extend(std::iter::repeat_n(b'x', 300_000));
    assert_eq!(text(&output.stderr), "to stderr\n");
    assert!(output.stdout == expected, "{} bytes of {}", output.stdout.len(), expected.len());
    assert_eq!(output.status.code(), Some(128 + 15));
    assert_eq!(lab.leavings(), <[String; 0]>::default());
    // The guest has shut down before the VM ended: the filesystem is whole, and the file is there.
    run(Command::new("fsck.ext4").args(["-f", "-n"]).arg(&disk));
    let shown = run(Command::new("debugfs").args(["-R", "cat /file"]).arg(&disk));
    assert_eq!(shown, "kept\n");

    let crash = "echo last words >/dev/console; echo c >/proc/sysrq-trigger";
    let output = lab.output(&["run", "--memory", "256M", "--no-input", "--exec", crash]);
    let said = text(&output.stderr);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(70), ""), "{said}");
    assert!(
        said.contains("  | ") && said.contains("Kernel panic - not syncing: sysrq triggered crash"),
        "{said}"
    );
    assert!(
        said.trim_end()
            .ends_with("tarn: The guest ended before the command had: the guest's kernel panicked"),
        "{said}"
    );
}

#[test]
fn a_mount_that_fails_is_a_failure() {
    let Some(lab) = Lab::new("mounts") else { return };
    let blank = lab.image("blank.raw", 1 << 20);
    let mount = ["--disk", blank.to_str().unwrap(), "--mount", "/dev/vda:/data:ext4", "--memory", "256M"];
    let why = "cannot mount /dev/vda on /data as ext4: no such filesystem on the device";

    // A command that would write to memory what is meant for the disk is not run.
    let exec = [&["run", "--no-input", "--exec", "echo x >/data/x; echo written"], &mount[..]].concat();
    let said = failure(&lab, &exec);
    assert!(said.starts_with(&format!("tarn: The command was not run: The guest {why}")), "{said}");

    // A VM in the background is left to whoever wants to look.
    let output = lab.output(&[&["run", "--name", "lame", "--detach"], &mount[..]].concat());
    let said = text(&output.stderr);
    let _killed = Detached(&lab, "lame");
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(1), "lame\n"), "{said}");
    assert!(said.contains("`tarn stop lame` ends it") && said.contains(why), "{said}");
    assert!(good(&lab, &["exec", "lame", "--", "cat", "/proc/partitions"]).contains("vda"));
}

#[test]
fn what_one_does_with_a_running_vm() {
    let Some(lab) = Lab::new("verbs") else { return };
    let disk = lab.ext4("data.raw", 256 << 20);
    let mount =
        ["--disk", disk.to_str().unwrap(), "--mount", "/dev/vda:/data:ext4", "--memory", "512M", "--shell"];
    let vm = Detached::start(&lab, "web", &mount);
    exec_verb(&lab);
    cp_verb(&lab);
    agent_verb(&lab);
    console_verb(&lab);
    doctor_verb(&lab);
    good(&lab, &["pause", "web"]);
    for args in [&["freeze", "web"][..], &["exec", "web", "--", "true"]] {
        assert_eq!(failure(&lab, args), "tarn: VM web is paused: `tarn resume web` first\n");
    }
    good(&lab, &["resume", "web"]);
    assert_eq!(good(&lab, &["exec", "web", "--", "echo", "again"]), "again\n");
    assert_eq!(good(&lab, &["stop", "web"]), "");
    assert_eq!(lab.leavings(), <[String; 0]>::default());
    run(Command::new("fsck.ext4").args(["-f", "-n"]).arg(&disk));
    drop(vm);
}

fn exec_verb(lab: &Lab) {
    fn web<'a>(args: &[&'a str]) -> Vec<&'a str> {
        [&["exec", "web", "--"], args].concat()
    }
    assert!(good(lab, &web(&["uname", "-r"])).contains("cloud-amd64"));
    assert_eq!(
        good(lab, &["exec", "web", "-e", "A=b c", "--", "sh", "-c", "echo $A $0", "x y"]),
        "b c x y\n"
    );
    let output = fed(lab, &web(&["sh", "-c", "wc -c; echo err >&2; exit 7"]), &vec![0; 1 << 20]);
    assert_eq!(
        (output.status.code(), text(&output.stdout), text(&output.stderr)),
        (Some(7), "1048576\n", "err\n")
    );
    for (signal, status) in [("TERM", 143), ("KILL", 137), ("SEGV", 139)] {
        let output = lab.output(&web(&["sh", "-c", &format!("kill -{signal} $$")]));
        assert_eq!(output.status.code(), Some(status), "{signal}: {}", text(&output.stderr));
    }
    assert!(failure(lab, &web(&["no-such-command"])).contains("no-such-command"));
    let output = with_closed_pipe(lab, &web(&["echo", "unread"]));
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
    let output = fed(lab, &["exec", "web", "--timeout", "1", "--no-input", "--", "sleep", "600"], b"");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("sleep"), "{}", text(&output.stderr));
}

fn cp_verb(lab: &Lab) {
    let big = lab.path("big");
    let random = File::open("/dev/urandom").unwrap().take(30_000_000);
    std::io::copy(&mut { random }, &mut File::create(&big).unwrap()).unwrap();
    let back = lab.path("back");
    good(lab, &["cp", big.to_str().unwrap(), "web:/data/"]);
    good(lab, &["cp", "web:/data/big", back.to_str().unwrap()]);
    assert!(fs::read(&big).unwrap() == fs::read(&back).unwrap());
    let output = fed(lab, &["cp", "-", "web:/tmp/piped"], b"one\0two\n");
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
    assert_eq!(good(lab, &["cp", "web:/tmp/piped", "-"]), "one\0two\n");
    let dir = lab.path("");
    good(lab, &["cp", "web:/tmp/piped", dir.to_str().unwrap()]);
    assert_eq!(fs::read(lab.path("piped")).unwrap(), b"one\0two\n");
    for (from, to, says) in [
        (dir.to_str().unwrap(), "web:/tmp/", "is a directory; pack it"),
        ("web:/tmp", dir.to_str().unwrap(), "Is a directory"),
        ("web:/missing", dir.to_str().unwrap(), "No such file or directory"),
        (big.to_str().unwrap(), "web:/missing/x", "No such file or directory"),
        ("/missing", "web:/tmp/", "Cannot open \"/missing\""),
        ("web:/tmp/piped", "/missing/x", "Cannot create \"/missing/x\""),
        ("web:/tmp/piped", "web:/tmp/y", "guest to guest"),
    ] {
        let said = failure(lab, &["cp", from, to]);
        assert!(said.contains(says), "{from} {to}: {said}");
    }
    assert_eq!(
        fs::read_dir(&dir)
            .unwrap()
            .filter(|f| f.as_ref().unwrap().file_name().to_string_lossy().starts_with('.'))
            .count(),
        0
    );
    assert_eq!(good(lab, &["exec", "web", "--", "ls", "-A", "/data"]), "big\nlost+found\n");
}

fn agent_verb(lab: &Lab) {
    assert_eq!(good(lab, &["agent", "web", "guest-ping"]).trim(), "{}");
    let name = good(lab, &["agent", "web", r#"{"execute": "guest-get-host-name"}"#]);
    assert_eq!(serde_json::from_str::<Value>(&name).unwrap(), json!({"host-name": "tarn"}));
    assert!(failure(lab, &["agent", "web", "guest-nothing"]).contains("guest-nothing"));
    let output = fed(lab, &["agent", "web"], b"guest-ping\nguest-nothing\nguest-file-open path=/data/big\n");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with("{}\n") && text(&output.stderr).contains("guest-nothing"));
}

/// The guest has a shell there.
fn console_verb(lab: &Lab) {
    let mut command = lab.tarn(&["console", "web"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut output = child.stdout.take().unwrap();
    child.stdin.as_mut().unwrap().write_all(b"echo $((6 * 7)) of $(nproc)\n").unwrap();
    let mut seen = Vec::new();
    let mut buffer = [0; 1024];
    while !String::from_utf8_lossy(&seen).contains("42 of 1") {
        let count = output.read(&mut buffer).unwrap();
        assert!(count > 0, "{}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&buffer[..count]);
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

fn doctor_verb(lab: &Lab) {
    let said = good(lab, &["doctor"]);
    assert!(
        said.contains("ok       KVM")
            && said.contains("ok       hardware virtualization: ")
            && !said.contains("FAILED"),
        "{said}"
    );
    let checks: Vec<Value> = serde_json::from_str(&good(lab, &["doctor", "--json"])).unwrap();
    assert!(checks.len() >= 6 && checks.iter().all(|check| check["status"] == "ok"), "{checks:?}");
    assert_eq!(lab.leavings(), ["web"]);
}
