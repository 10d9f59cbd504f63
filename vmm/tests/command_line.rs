//! The binary `tarn` against a stand-in for a VM: a locked run-time directory with a scripted monitor, an agent that
//! runs commands and opens files of this host, and a console that echoes.
#![expect(clippy::tests_outside_test_module, reason = "all of this file is a test")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;

use base64::prelude::{BASE64_STANDARD, Engine};
use coordinator::StateDir;
use coordinator::journal::{DiskPlan, ImageId, Journal, OperationKind, Plan, PlanFlags, Protocol, Stage};
use coordinator::record::witness::{Verdict, Witness};
use protocol::{Decoder, Item, Limits};
use serde_json::{Map, Value, json};
use uuid::Uuid;
use vmm::config::VmSpec;
use vmm::run_dir::RunDir;

/// What a server of the stand-in does with a command.
type Answer = Result<Value, &'static str>;

struct Stand {
    base: tempfile::TempDir,
    _dir: RunDir,
}

impl Stand {
    /// A VM named `vm` in this run state, with all its sockets.
    fn start(state: &'static str) -> Self {
        let (stand, dir) = Self::without_sockets();
        serve(&dir.monitor_socket(), &["QMP"], move || {
            move |command: &str, _: &Value| match command {
                "qmp_capabilities" => Ok(json!({})),
                "cont" if state != "suspended" => Ok(json!({})),
                "query-block" => Ok(json!([{"device": "disk0", "inserted": {"file": "/images/new.raw"}}])),
                "system_wakeup" if state == "suspended" => Ok(json!({})),
                "stop" => Err("The disk does not come to rest"),
                "query-status" => Ok(json!({"status": state, "running": state == "running"})),
                "query-big" => Ok(json!("x".repeat(1 << 20))),
                _ => Err("The command has not been found"),
            }
        });
        serve(&dir.agent_socket(), &[], || {
            let mut agent = Agent::default();
            move |command: &str, arguments: &Value| agent.answer(command, arguments)
        });
        let console = UnixListener::bind(dir.console_socket()).unwrap();
        thread::spawn(move || {
            for mut client in console.incoming().flatten() {
                let mut typed = [0; 64];
                while let Ok(count @ 1..) = client.read(&mut typed) {
                    client.write_all(&typed[..count].to_ascii_uppercase()).unwrap();
                    if typed[..count].contains(&b'\n') {
                        break;
                    }
                }
            }
        });
        Self { base: stand, _dir: dir }
    }

    fn without_sockets() -> (tempfile::TempDir, RunDir) {
        let base = tempfile::tempdir().unwrap();
        let dir = RunDir::create_in(base.path(), "vm").unwrap();
        dir.write_config(&VmSpec { name: "vm".into(), cpus: 2, ..VmSpec::default() }).unwrap();
        (base, dir)
    }

    /// A VM whose monitor accepts and says nothing.
    fn hung() -> Self {
        let (base, dir) = Self::without_sockets();
        let listener = UnixListener::bind(dir.monitor_socket()).unwrap();
        thread::spawn(move || {
            let mut clients = Vec::new();
            for client in listener.incoming() {
                clients.push(client);
            }
        });
        Self { base, _dir: dir }
    }

    fn tarn(&self, line: &str) -> Command {
        tarn(self.base.path(), line)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }
}

fn tarn(base: &Path, line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tarn"));
    command.args(line.split_whitespace()).env("TARN_RUN_DIR", base).current_dir(base).stdin(Stdio::null());
    command
}

/// Serves every client of a socket in a thread of its own.
fn serve<S, F>(path: &Path, greeting: &'static [&'static str], server: S)
where
    S: Fn() -> F + Send + 'static,
    F: FnMut(&str, &Value) -> Answer + Send + 'static,
{
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let answer = server();
            thread::spawn(move || converse(client, greeting, answer));
        }
    });
}

fn converse(
    mut client: UnixStream,
    greeting: &[&str],
    mut answer: impl FnMut(&str, &Value) -> Answer,
) -> Option<()> {
    for name in greeting {
        writeln!(client, "{}\r", json!({*name: {"version": {}, "capabilities": []}})).ok()?;
    }
    let mut decoder = Decoder::new(Limits::AGENT);
    let mut buffer = vec![0; 64 << 10];
    loop {
        let request = match decoder.next_item() {
            Some(Item::Value(request)) => request,
            Some(_) => continue,
            None => match client.read(&mut buffer).ok()? {
                0 => return None,
                count => {
                    decoder.feed(&buffer[..count]);
                    continue;
                }
            },
        };
        let command = request["execute"].as_str()?;
        let mut reply = match answer(command, &request["arguments"]) {
            Ok(value) => json!({"return": value}),
            Err(desc) => {
                let class = if desc.contains("disabled") { "CommandNotFound" } else { "GenericError" };
                json!({"error": {"class": class, "desc": desc}})
            }
        };
        if let Some(id) = request.get("id") {
            reply["id"] = id.clone();
        }
        if command == "guest-sync-delimited" {
            client.write_all(b"\xff").ok()?;
        }
        writeln!(client, "{reply}\r").ok()?;
    }
}

/// An agent that takes this host for its guest.
#[derive(Default)]
struct Agent {
    outputs: HashMap<u64, Output>,
    files: HashMap<u64, File>,
    next: u64,
}

impl Agent {
    fn answer(&mut self, command: &str, arguments: &Value) -> Answer {
        self.next += 1;
        let text = |name: &str| arguments[name].as_str().unwrap_or_default();
        match command {
            "guest-sync-delimited" => Ok(arguments["id"].clone()),
            "guest-ping" => Ok(json!({})),
            "guest-info" => Ok(json!({"supported_commands": [{"name": "guest-exec", "enabled": true}]})),
            "guest-exec" => {
                let output = run(arguments).ok_or("Failed to execute child process")?;
                self.outputs.insert(self.next, output);
                Ok(json!({"pid": self.next}))
            }
            "guest-fsfreeze-freeze" => Err("Command guest-fsfreeze-freeze has been disabled: frozen"),
            "guest-exec-status" => {
                let pid = arguments["pid"].as_u64().unwrap();
                let output = self.outputs.remove(&pid).ok_or("No such PID")?;
                const KEPT: usize = 16 << 20;
                let stdout = &output.stdout[..output.stdout.len().min(KEPT)];
                let end = output
                    .status
                    .code()
                    .map_or_else(|| ("signal", output.status.signal().unwrap()), |code| ("exitcode", code));
                Ok(json!({"exited": true, end.0: end.1, "out-data": BASE64_STANDARD.encode(stdout),
                    "out-truncated": output.stdout.len() > KEPT,
                    "err-data": BASE64_STANDARD.encode(&output.stderr)}))
            }
            "guest-file-open" => {
                let mut options = OpenOptions::new();
                let options = match text("mode") {
                    "w" => options.write(true).create(true).truncate(true),
                    _ => options.read(true),
                };
                self.files.insert(self.next, options.open(text("path")).map_err(|_| "No such file")?);
                Ok(json!(self.next))
            }
            "guest-file-close" => {
                self.files.remove(&arguments["handle"].as_u64().unwrap());
                Ok(json!({}))
            }
            _ => self.answer_io(command, arguments),
        }
    }

    fn answer_io(&mut self, command: &str, arguments: &Value) -> Answer {
        let file = self.files.get_mut(&arguments["handle"].as_u64().unwrap_or(0)).ok_or("No such handle")?;
        match command {
            "guest-file-write" => {
                let bytes = BASE64_STANDARD.decode(arguments["buf-b64"].as_str().unwrap()).unwrap();
                file.write_all(&bytes).map_err(|_| "No space left on device")?;
                Ok(json!({"count": bytes.len(), "eof": false}))
            }
            "guest-file-read" => {
                let mut bytes = Vec::new();
                file.take(arguments["count"].as_u64().unwrap())
                    .read_to_end(&mut bytes)
                    .map_err(|_| "Bad read")?;
                Ok(
                    json!({"count": bytes.len(), "buf-b64": BASE64_STANDARD.encode(&bytes), "eof": bytes.is_empty()}),
                )
            }
            "guest-file-seek" => {
                let to = match arguments["whence"].as_u64().unwrap() {
                    0 => SeekFrom::Start(0),
                    1 => SeekFrom::Current(0),
                    _ => SeekFrom::End(0),
                };
                Ok(json!({"position": file.seek(to).unwrap(), "eof": false}))
            }
            "guest-file-flush" => Ok(json!({})),
            _ => Err("The command has not been found"),
        }
    }
}

fn run(arguments: &Value) -> Option<Output> {
    let words = arguments["arg"].as_array()?.iter().map(|word| word.as_str().unwrap());
    let mut command = Command::new(arguments["path"].as_str()?);
    command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().ok()?;
    let input = BASE64_STANDARD.decode(arguments["input-data"].as_str().unwrap_or_default()).unwrap();
    child.stdin.take().unwrap().write_all(&input).unwrap();
    child.wait_with_output().ok()
}

/// What a command wrote to standard output; it must have succeeded.
fn out(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Exit status and what was written to standard error.
fn failure(command: &mut Command) -> (Option<i32>, String) {
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

/// Runs with this standard input.
fn with_input(command: &mut Command, input: &[u8]) -> Output {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn ps_shows_what_runs_and_what_hangs() {
    let stand = Stand::start("running");
    let lines = out(&mut stand.tarn("ps"));
    let row: Vec<_> = lines.lines().nth(1).unwrap().split_whitespace().collect();
    // What the VM tells, and not what it was started with.
    assert_eq!((row[0], row[2], row[4], row[5], row[6]), ("vm", "running", "2", "512M", "/images/new.raw"));
    let rows: Value = serde_json::from_str(&out(&mut stand.tarn("ps --json"))).unwrap();
    assert_eq!(rows[0]["state"], "running");
    assert_eq!(rows[0]["pid"], std::process::id());

    let hung = Stand::hung();
    assert!(out(&mut hung.tarn("ps")).contains("not responding"));
}

#[test]
fn a_vm_that_does_not_run_is_said_not_to() {
    let base = tempfile::tempdir().unwrap();
    let commands =
        ["stop web", "kill web", "pause web", "exec web -- true", "console web", "qmp web x", "cp web:/a b"];
    for line in commands {
        let expected = "tarn: No VM named web is running (`tarn ps` lists them)\n";
        assert_eq!(failure(&mut tarn(base.path(), line)), (Some(1), expected.into()), "{line}");
    }
    assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
}

#[test]
fn a_refusal_is_one_chain_of_reasons() {
    let stand = Stand::start("running");
    let expected = "tarn: The monitor refused stop: The disk does not come to rest\n";
    assert_eq!(failure(&mut stand.tarn("pause vm")), (Some(1), expected.into()));
    assert_eq!(out(&mut stand.tarn("resume vm")), "");
}

#[test]
fn a_name_that_runs_is_not_run_again() {
    let stand = Stand::start("running");
    let (status, error) = failure(&mut stand.tarn("run --software-kvm --kernel /k --name vm"));
    assert_eq!(status, Some(1));
    assert!(error.starts_with("tarn: A VM named vm is already running (process "), "{error}");
}

#[test]
fn what_cannot_run_leaves_nothing_behind() {
    let base = tempfile::tempdir().unwrap();
    for (line, status, part) in [
        ("run --kernel /nonexistent --software-kvm", 1, "tarn: Cannot run VM vm-"),
        ("run --kernel /nonexistent --software-kvm --detach", 1, "tarn: Cannot run VM vm-"),
        ("run --kernel /k --name a/b", 1, "VM name \"a/b\""),
        ("run --kernel /k --memory 0", 1, "Memory of 0 bytes"),
        ("run --kernel /k --memory 100000T", 1, "this host has"),
        ("run --kernel /k --config /nonexistent", 1, "Cannot read configuration"),
        ("run --kernel /k --cpus x", 2, "'x'"),
        ("frobnicate", 2, "frobnicate"),
    ] {
        let (code, error) = failure(&mut tarn(base.path(), line));
        assert!(code == Some(status) && error.contains(part), "{line}: {code:?} {error}");
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0, "{line}");
    }
    let deep = base.path().join("d".repeat(100));
    let (code, error) =
        failure(tarn(base.path(), "run --kernel /k --software-kvm").env("TARN_RUN_DIR", &deep));
    assert!(code == Some(1) && error.contains("too deep"), "{error}");
}

/// A pivot of the VM `web` from `old.raw` to `new.raw`, whose coordinator and VMM have died; the VMM had decided.
fn pivot_without_an_end(state: &StateDir, base: &Path) -> Uuid {
    for image in ["old.raw", "new.raw"] {
        fs::write(base.join(image), [0; 512]).unwrap();
    }
    let id = Uuid::from_u128(7);
    let image = |name: &str| ImageId::of(&base.join(name)).unwrap();
    let disk = DiskPlan { disk: "root".into(), source: image("old.raw"), target: image("new.raw") };
    let plan = Plan {
        kind: OperationKind::Pivot,
        protocol: Protocol::A,
        disks: vec![disk],
        witness: Some(state.witness(id)),
        flags: PlanFlags::default(),
    };
    let mut journal = Journal::open(state).unwrap();
    let operation = journal.begin(id, &plan, Map::new()).unwrap();
    for stage in [Stage::Prepared, Stage::Mirroring, Stage::Ready, Stage::PivotIntent] {
        journal.append(id, stage, Map::new()).unwrap();
    }
    let mut witness = Witness::create(&state.witness(id)).unwrap();
    witness.decide(Verdict::Pivoted, operation, Value::Null).unwrap();
    id
}

#[test]
fn a_disk_that_was_moved_is_run_from_where_it_is() {
    let base = tempfile::tempdir().unwrap();
    let base = fs::canonicalize(base.path()).unwrap();
    let state = StateDir::below(&base.join("state"), "web").unwrap();
    let id = pivot_without_an_end(&state, &base);
    let run = |more: &str| {
        let line =
            format!("run --software-kvm --kernel /nonexistent --name web --disk old.raw,id=root {more}");
        failure(tarn(&base, &line).env("TARN_STATE_DIR", base.join("state"))).1
    };
    // Somebody has it in hand.
    let coordinator = Journal::open_existing(&state).unwrap();
    let refused = run("");
    assert!(refused.starts_with("tarn: Cannot start VM web: ") && refused.contains("Process "), "{refused}");
    drop(coordinator);
    // Nobody can tell.
    let witness = fs::read(state.witness(id)).unwrap();
    fs::remove_file(state.witness(id)).unwrap();
    let refused = run("--force-stale-source");
    assert!(refused.contains("`tarn recover web --use target`"), "{refused}");
    fs::write(state.witness(id), witness).unwrap();
    // It is in the witness.
    let (old, new) = (base.join("old.raw"), base.join("new.raw"));
    let moved =
        format!("tarn: disk 'root': {}, which replaced {} by operation {id}\n", new.display(), old.display());
    let said = run("");
    assert!(said.contains("disks root have moved (witness: pivoted)"), "{said}");
    assert!(said.contains(&moved) && said.contains("tarn: Cannot run VM web"), "{said}");
    assert!(run("").starts_with(&moved));
    let stale =
        format!("tarn: disk 'root': boots {}, although {} took its place", old.display(), new.display());
    for force in ["--force-stale-source", "--force-stale-source=root"] {
        assert!(run(force).starts_with(&stale));
    }
    // Also when it has gone.
    fs::remove_file(old).unwrap();
    assert!(run("").starts_with(&moved));
}

#[test]
fn exec_gives_back_outputs_and_status() {
    let stand = Stand::start("running");
    let mut command = stand.tarn("exec vm -e GREETING=hello --");
    let output =
        with_input(command.args(["sh", "-c", "echo $GREETING; cat; echo oops >&2; exit 3"]), b"in\0put");
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(output.stdout, b"hello\nin\0put");
    assert_eq!(output.stderr, b"oops\n");
    assert_eq!(failure(stand.tarn("exec vm -- sh -c").arg("kill -9 $$")).0, Some(137));
    let (status, error) = failure(&mut stand.tarn("exec vm -- /nonexistent"));
    assert_eq!(status, Some(1));
    assert_eq!(error, "tarn: The guest agent refused guest-exec: Failed to execute child process\n");
}

#[test]
fn files_go_both_ways() {
    let stand = Stand::start("running");
    let (here, there, back) = (stand.path("here"), stand.path("there"), stand.path("back"));
    let content: Vec<u8> = (0..1_300_000_u32).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1]).collect();
    fs::write(&here, &content).unwrap();
    out(&mut stand.tarn(&format!("cp here vm:{}", there.display())));
    assert!(fs::read(&there).unwrap() == content);
    out(&mut stand.tarn(&format!("cp vm:{} back", there.display())));
    assert!(fs::read(&back).unwrap() == content);

    let output = with_input(&mut stand.tarn(&format!("cp - vm:{}", there.display())), b"piped");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(out(&mut stand.tarn(&format!("cp vm:{} -", there.display()))), "piped");

    let (status, error) = failure(&mut stand.tarn("cp vm:/nonexistent/file back"));
    assert_eq!(status, Some(1));
    let expected = "tarn: Cannot copy /nonexistent/file from VM vm: The guest agent refused guest-file-open: No such file\n";
    assert_eq!(error, expected);
    assert!(fs::read(&back).unwrap() == content);
    let mut names: Vec<_> =
        fs::read_dir(stand.base.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["back", "here", "there", "vm"]);
}

#[test]
fn commands_are_typed_as_words_as_json_and_line_by_line() {
    let stand = Stand::start("running");
    let status: Value = serde_json::from_str(&out(&mut stand.tarn("qmp vm query-status"))).unwrap();
    assert_eq!(status["status"], "running");
    assert_eq!(out(stand.tarn("agent vm").arg(r#"{"execute": "guest-ping"}"#)), "{}\n");
    assert_eq!(out(&mut stand.tarn("agent vm guest-sync-delimited id=7")), "7\n");
    let (status, error) = failure(&mut stand.tarn("agent vm guest-nope"));
    assert_eq!(status, Some(1));
    assert!(error.contains("refused guest-nope"), "{error}");

    let output = with_input(&mut stand.tarn("qmp vm"), b"nope\nquery-status");
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8(output.stdout).unwrap().contains("running"));
    assert_eq!(output.stderr, b"tarn: The monitor refused nope: The command has not been found\n");
}

#[test]
fn a_sleeping_guest_is_woken_by_resume_and_not_asked_to_stop() {
    let stand = Stand::start("suspended");
    assert_eq!(out(&mut stand.tarn("resume vm")), "");
    let (_, error) = failure(&mut stand.tarn("stop vm"));
    assert!(error.contains("(suspended)") && error.contains("`tarn resume vm` first"), "{error}");
}

#[test]
fn a_paused_guest_is_not_asked_to_stop() {
    let stand = Stand::start("paused");
    let (status, error) = failure(&mut stand.tarn("stop vm"));
    assert_eq!(status, Some(1));
    assert!(error.contains("`tarn resume vm` first, or `tarn kill vm`"), "{error}");
}

#[test]
fn a_guest_that_does_not_run_is_not_asked() {
    for (state, why) in
        [("paused", "VM vm is paused"), ("suspended", "The guest of VM vm sleeps (suspended)")]
    {
        let stand = Stand::start(state);
        for line in ["freeze vm", "thaw vm", "exec vm -- true", "agent vm guest-ping"] {
            let expected = format!("tarn: {why}: `tarn resume vm` first\n");
            assert_eq!(failure(&mut stand.tarn(line)), (Some(1), expected), "{line}");
        }
    }
}

#[test]
fn a_guest_that_is_frozen_already_is_said_to_be() {
    let stand = Stand::start("running");
    let (status, error) = failure(&mut stand.tarn("freeze vm"));
    assert_eq!(status, Some(1));
    assert!(error.contains("the guest's filesystems are frozen; `tarn thaw` ends that"), "{error}");
}

#[test]
fn an_output_that_is_cut_is_a_failure() {
    let stand = Stand::start("running");
    let output = stand.tarn("exec vm -- sh -c").arg("printf %017000000d 7").output().unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(74), 16 << 20));
    assert_eq!(output.stderr.iter().filter(|byte| **byte == b'\n').count(), 1);
    assert!(String::from_utf8(output.stderr).unwrap().contains("first 16 MiB"));
    let failed = stand.tarn("exec vm -- sh -c").arg("printf %017000000d 7; exit 3").output().unwrap();
    assert_eq!(failed.status.code(), Some(3));
}

#[test]
fn a_console_without_a_terminal_passes_bytes_as_they_are() {
    let stand = Stand::start("running");
    let output = with_input(&mut stand.tarn("console vm"), b"a\x1d.b\n");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.stdout, b"A\x1d.B\n");
}

#[test]
fn shells_complete_the_names_of_running_vms() {
    let stand = Stand::start("running");
    for (line, index, expected) in [("stop v", 2, "vm"), ("cp vm", 2, "vm:\nvm/"), ("st", 1, "stop")] {
        let mut command = stand.tarn(&format!("-- tarn {line}"));
        command.env("COMPLETE", "bash").env("_CLAP_COMPLETE_INDEX", index.to_string()).env("_CLAP_IFS", "\n");
        assert_eq!(out(&mut command).trim(), expected, "{line}");
    }
}

#[test]
fn a_copy_that_is_interrupted_leaves_nothing() {
    let stand = Stand::start("running");
    let there = stand.path("there");
    let mut child =
        stand.tarn(&format!("cp - vm:{}", there.display())).stdin(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    // More than the pipe holds: when this returns, the copy is under way.
    input.write_all(&vec![7; 1 << 20]).unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::INT)
        .unwrap();
    // What it reads next is not taken any more.
    let _ = input.write_all(&[7]);
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let names: Vec<_> = fs::read_dir(stand.base.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["vm"]);
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let stand = Stand::start("running");
    let mut child =
        stand.tarn("qmp vm query-big").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}
