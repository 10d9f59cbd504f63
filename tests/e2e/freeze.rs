//! Freezing: the counts and answers of the reference agent, and what writers and readers see of it.
//!
//! Every guest here has two agents:
//!
//! ```text
//!   agent.sock ──── broker ──── org.qemu.guest_agent.0 ┐ one of the two: the agent under test, started,
//!   direct ──────────────────── org.tarn.direct ───────┘ killed and started again by the test
//!
//!   control ─────────────────── org.tarn.control ──────── init's agent: obeys while the other is frozen or dead
//!   strike ──────────────────── org.tarn.strike ───────── at once, for tests that have to hit a moment
//! ```

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use coordinator::{Error, GuestSession, Map, SessionError};
use serde_json::{Value, json};

use crate::harness::{Lab, Vm, connect, eventually, limit, run, shell};

/// The ports, by name.
const STANDARD: &str = "org.qemu.guest_agent.0";
pub const DIRECT: &str = "org.tarn.direct";
const CONTROL: &str = "org.tarn.control";
const STRIKE: &str = "org.tarn.strike";

/// Keeps the agent under test running, as a service manager would, and notes how each one ended; waits before the next
/// one while there is a file that says so.
const SERVE: &str = "\
#!/bin/sh
echo $$ >/run/serve.pid
while :; do
    tarn-agent -t /run/agent -l /run/agent/log \"$@\" &
    echo $! >/run/agent.pid
    wait $!
    echo $? >>/run/agent.ended
    while [ -e /run/agent.hold ]; do usleep 20000; done
done
";

/// Which way the agent under test is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// Through the broker, which has one command at a time and thaws behind clients that leave.
    Standard,
    /// As under any other VMM: bytes to bytes.
    Direct,
}

/// A guest in which the test can act whatever becomes of the agent under test.
pub struct Guest<'a> {
    pub vm: Vm<'a>,
    control: GuestSession,
    direct: PathBuf,
    strike: PathBuf,
    port: Port,
}

impl<'a> Guest<'a> {
    /// Boots it with these disks; no agent under test runs yet.
    pub fn boot(lab: &'a Lab, name: &'static str, disks: &[PathBuf], more: &[&str]) -> Self {
        let socket = |kind: &str| lab.path(&format!("{name}-{kind}.sock"));
        let (direct, control, strike) = (socket("direct"), socket("control"), socket("strike"));
        let disks: Vec<_> = disks.iter().map(|disk| disk.to_str().unwrap()).collect();
        let channels = [(DIRECT, &direct), (CONTROL, &control), (STRIKE, &strike)]
            .map(|(name, socket)| format!("name={name},socket={}", socket.display()));
        let agent = format!("tarn.agent=/usr/sbin/tarn-agent,-p,/dev/virtio-ports/{CONTROL}");
        let mut args = vec!["--append", &agent];
        channels.iter().for_each(|channel| args.extend(["--channel", channel]));
        disks.iter().for_each(|disk| args.extend(["--disk", disk]));
        args.extend(more);
        let mut vm = lab.launch(name, &args);
        assert_eq!(vm.monitor().status(), "running");
        let mut control = GuestSession::connect(&control).expect("the control agent's channel");
        if let Err(error) = control.wait_for_agent(limit()) {
            panic!("No control agent in {name}: {error}\n{}\n{}", vm.log(), vm.console());
        }
        let mut guest = Self { vm, control, direct, strike, port: Port::Standard };
        guest.sh(&format!("cat >/run/serve <<'END'\n{SERVE}END\nchmod +x /run/serve"));
        guest
    }

    /// Runs a shell script in the guest; returns its exit status and its output, errors included.
    pub fn try_sh(&mut self, script: &str) -> (u8, String) {
        shell(&mut self.control, script).unwrap_or_else(|error| panic!("`{script}`: {error}"))
    }

    /// Runs a shell script that must succeed; returns its output, trimmed.
    pub fn sh(&mut self, script: &str) -> String {
        let (status, text) = self.try_sh(script);
        assert_eq!(status, 0, "`{script}`:\n{text}");
        text.trim().to_owned()
    }

    /// Starts the agent under test, in place of the one before, with an empty state directory; waits until it answers.
    pub fn start_agent(&mut self, port: Port, options: &str) -> GuestSession {
        self.stop_agent();
        self.sh("rm -rf /run/agent /run/agent.ended && mkdir /run/agent");
        self.launch_agent(port, options);
        self.client()
    }

    /// Starts another agent on the state that the last one left.
    pub fn start_agent_again(&mut self, port: Port, options: &str) -> GuestSession {
        self.stop_agent();
        self.launch_agent(port, options);
        self.client()
    }

    fn launch_agent(&mut self, port: Port, options: &str) {
        self.port = port;
        let name = if port == Port::Direct { DIRECT } else { STANDARD };
        let options = format!("-p /dev/virtio-ports/{name} {options}");
        self.sh(&format!("setsid /run/serve {options} </dev/null >>/run/agent.out 2>&1 &"));
    }

    /// Kills the agent under test, and it stays dead.
    pub fn stop_agent(&mut self) {
        self.sh("[ ! -e /run/serve.pid ] || kill -9 $(cat /run/serve.pid) $(cat /run/agent.pid); rm -f /run/*.pid; true");
    }

    /// A client of the agent under test that has its attention.
    pub fn client(&mut self) -> GuestSession {
        let mut session = match self.port {
            Port::Standard => self.vm.agent(),
            Port::Direct => GuestSession::connect(&self.direct).expect("the channel accepts"),
        };
        if let Err(error) = session.wait_for_agent(limit()) {
            panic!("No agent under test: {error}\n{}", self.sh("cat /run/agent.out /run/agent/log"));
        }
        session
    }

    /// What kills the agent under test.
    pub fn assassin(&mut self) -> Assassin {
        let socket = connect(&self.strike);
        self.sh(&format!(
            "(while read -r delay <&3; do [ $delay = 0 ] || usleep $delay; read -r agent </run/agent.pid; kill -9 $agent; \
             echo >&3; done 3<>/dev/virtio-ports/{STRIKE}) >/dev/null 2>&1 </dev/null &"
        ));
        Assassin(socket)
    }

    /// A client of the direct port that speaks as it likes.
    pub fn wire(&self) -> Wire {
        Wire::connect(&self.direct)
    }

    /// Starts a process for each file that writes to it; see [`Self::writers`].
    pub fn start_writers(&mut self, files: &[&str]) {
        let mut script = String::from("rm -rf /run/writers; mkdir /run/writers; cd /run/writers\n");
        for (index, file) in files.iter().enumerate() {
            script += &format!(
                "(sh -c 'echo $$ >{index}.pid; echo x >>{file} && : >{index}.done') >/dev/null 2>&1 </dev/null &\n"
            );
        }
        self.sh(&script);
    }

    /// What each writer is about: `done`, or the state of its process: D when it waits inside the kernel.
    pub fn writers(&mut self, count: usize) -> Vec<String> {
        let script = format!(
            "cd /run/writers; i=0; while [ $i -lt {count} ]; do s=starting; \
             if [ -e $i.done ]; then s=done; elif [ -s $i.pid ]; then read -r _ _ s _ </proc/$(cat $i.pid)/stat || s=gone; fi; \
             echo $s; i=$((i + 1)); done 2>/dev/null"
        );
        self.sh(&script).lines().map(str::to_owned).collect()
    }

    /// Writes to these files from processes of their own, and waits until those that must wait do, and the others are done.
    pub fn expect_blocked(&mut self, blocked: &[&str], free: &[&str]) {
        let files = [blocked, free].concat();
        self.start_writers(&files);
        let mut expected = vec!["D"; blocked.len()];
        expected.resize(files.len(), "done");
        let mut last = Vec::new();
        for round in 0.. {
            last = self.writers(files.len());
            if last == expected {
                break;
            }
            assert!(round < 200, "writers to {files:?} are {last:?}, not {expected:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(last, expected);
    }

    /// Waits until everybody who waited has written.
    pub fn expect_released(&mut self, count: usize) {
        eventually("writers to be released", || {
            self.writers(count).iter().all(|state| state == "done").then_some(())
        });
    }

    /// Processor time that the agent under test and its children have taken so far, in hundredths of a second.
    pub fn cpu_ticks(&mut self) -> u64 {
        let ticks = self.sh(
            "agent=$(cat /run/agent.pid); for p in /proc/[0-9]*; do read -r pid _ _ parent _ _ _ _ _ _ _ _ _ user system _ <$p/stat && \
             { [ $pid = $agent ] || [ $parent = $agent ]; } && echo $((user + system)); done 2>/dev/null; true",
        );
        ticks.lines().map(|ticks| ticks.parse::<u64>().unwrap()).sum()
    }

    /// Whether a file is there.
    pub fn has(&mut self, path: &str) -> bool {
        self.try_sh(&format!("[ -e {path} ]")).0 == 0
    }

    /// Ends the guest; its disks are whole.
    pub fn power_off(mut self) {
        self.control
            .execute_without_reply("guest-shutdown", None, Duration::from_secs(2))
            .expect("guest-shutdown");
        assert!(self.vm.wait().success());
    }
}

/// Waits in the guest, on a port of its own.
pub struct Assassin(UnixStream);

impl Assassin {
    /// Kills the agent so much later.
    pub fn strike(&mut self, delay: Duration) {
        writeln!(self.0, "{}", delay.as_micros()).unwrap();
    }

    /// Waits until it is done.
    pub fn await_death(&mut self) {
        self.0.read_exact(&mut [0]).unwrap();
    }
}

/// The direct port, byte for byte.
pub struct Wire {
    socket: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Wire {
    pub fn connect(path: &Path) -> Self {
        let socket = connect(path);
        let lines = BufReader::new(socket.try_clone().unwrap());
        Self { socket, lines }
    }

    pub fn send(&mut self, request: &Value) {
        self.socket.write_all(format!("{request}\n").as_bytes()).unwrap();
    }

    /// The next line, as it came.
    pub fn line(&mut self) -> String {
        let mut line = Vec::new();
        self.lines.read_until(b'\n', &mut line).unwrap();
        assert_eq!(line.last(), Some(&b'\n'), "the connection ended");
        String::from_utf8_lossy(&line).into_owned()
    }

    pub fn reply(&mut self) -> Value {
        serde_json::from_str(&self.line()).unwrap()
    }
}

/// Asks for something that must be granted.
pub fn ask(session: &mut GuestSession, command: &str, arguments: &Value) -> Value {
    let answer = try_ask(session, command, arguments);
    answer.unwrap_or_else(|error| panic!("{command} {arguments}: {error}: {:?}", error.refusal()))
}

/// Asks for something that must be refused; returns the error's class and text.
pub fn refusal(session: &mut GuestSession, command: &str, arguments: &Value) -> (String, String) {
    let error = try_ask(session, command, arguments).expect_err(command);
    let Error { class, desc, .. } = error.refusal().unwrap_or_else(|| panic!("{command}: {error}")).clone();
    (format!("{class:?}"), desc)
}

pub fn try_ask(session: &mut GuestSession, command: &str, arguments: &Value) -> Result<Value, SessionError> {
    session.execute(command, arguments.as_object().cloned().map(Map::from_iter), limit())
}

pub fn freeze(session: &mut GuestSession) -> Value {
    ask(session, "guest-fsfreeze-freeze", &Value::Null)
}

pub fn freeze_list(session: &mut GuestSession, mountpoints: &[&str]) -> Value {
    ask(session, "guest-fsfreeze-freeze-list", &json!({"mountpoints": mountpoints}))
}

pub fn thaw(session: &mut GuestSession) -> Value {
    ask(session, "guest-fsfreeze-thaw", &Value::Null)
}

pub fn status(session: &mut GuestSession) -> Value {
    ask(session, "guest-fsfreeze-status", &Value::Null)
}

pub fn report(session: &mut GuestSession) -> Value {
    ask(session, "tarn-fsfreeze-report", &Value::Null)
}

/// The disks of the recorded dialogues, vda to vdf: ext4 (with an image of another ext4, and places for an overlay), xfs,
/// a second ext4, btrfs, vfat, squashfs.
pub fn every_filesystem(lab: &Lab) -> Vec<PathBuf> {
    let tree = lab.path("tree");
    for dir in ["l", "u", "w", "lm"] {
        fs::create_dir_all(tree.join(dir)).unwrap();
    }
    fs::write(tree.join("l/lower"), "lower\n").unwrap();
    fs::copy(lab.ext4("inner.raw", 24 << 20), tree.join("img")).unwrap();
    let ext4 = lab.image("a.raw", 96 << 20);
    run(Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).args([&tree, &ext4]));
    let xfs = lab.image("x.raw", 320 << 20);
    run(Command::new("mkfs.xfs").arg("-q").arg(&xfs));
    let read_only = lab.ext4("ro.raw", 16 << 20);
    let btrfs = lab.image("b.raw", 160 << 20);
    run(Command::new("mkfs.btrfs").arg("-q").arg(&btrfs));
    let vfat = lab.image("v.raw", 16 << 20);
    run(Command::new("mkfs.vfat").arg(&vfat));
    let squashfs = lab.path("sq.raw");
    run(Command::new("mksquashfs").args([&tree.join("l"), &squashfs]).args(["-quiet", "-no-progress"]));
    vec![ext4, xfs, read_only, btrfs, vfat, squashfs]
}

/// Mounts them as they were there.
pub const MOUNT_ALL: &str = "set -e
mkdir /a /x /bx /ro /b /b2 /v /ov /sq
mount -t ext4 /dev/vda /a
modprobe loop
losetup /dev/loop0 /a/img
mount -t ext4 /dev/loop0 /a/lm
mount -t xfs /dev/vdb /x
mount -o bind /x /bx
mount -t ext4 -o ro /dev/vdc /ro
mount -t btrfs /dev/vdd /b
mount -t btrfs /dev/vdd /b2
mount -t vfat /dev/vde /v
modprobe overlay
mount -t overlay -o lowerdir=/a/l,upperdir=/a/u,workdir=/a/w ov /ov
mount -t squashfs /dev/vdf /sq
for dir in /a /a/lm /x /b /v; do echo readable >$dir/r; done";

/// Logs each call, and fails when it is told to.
pub const HOOK: &str = "#!/bin/sh
echo $1 >>/run/hook.log
[ ! -e /run/hook.fails ] || { echo hook says no; exit 1; }
";

/// What is frozen, and what is not.
const FROZEN: &[&str] = &["/a/t", "/a/lm/t", "/x/t", "/bx/u", "/b/t", "/b2/u", "/ov/t"];
const WRITABLE: &[&str] = &["/v/t", "/run/t"];

/// Writes a program for the guest.
pub fn install(guest: &mut Guest<'_>, path: &str, text: &str) {
    guest.sh(&format!("cat >{path} <<'END'\n{text}END\nchmod +x {path}"));
}

#[test]
fn every_filesystem_freezes_and_thaws_with_the_reference_agents_counts() {
    let Some(lab) = Lab::new("freeze-matrix") else { return };
    let mut guest = Guest::boot(&lab, "matrix", &every_filesystem(&lab), &[]);
    guest.sh(MOUNT_ALL);
    install(&mut guest, "/run/hook", HOOK);
    let mut agent = guest.start_agent(Port::Standard, "-F/run/hook");

    the_recorded_dialogue_is_spoken(&mut guest, &mut agent);
    writers_wait_and_readers_do_not(&mut guest, &mut agent);
    lists_are_lists_of_filesystems(&mut guest, &mut agent);
    what_others_froze_is_not_counted_but_thawed(&mut guest, &mut agent);
    guest.power_off();
}

fn the_recorded_dialogue_is_spoken(guest: &mut Guest<'_>, agent: &mut GuestSession) {
    assert_eq!(status(agent), "thawed");
    assert_eq!(thaw(agent), 0, "nothing was frozen");
    assert_eq!(guest.sh("cat /run/hook.log"), "thaw");
    assert_eq!(freeze(agent), 5);
    assert_eq!(status(agent), "frozen");
    assert!(guest.has("/run/agent/qga.state.isfrozen"));
    for command in [
        "guest-fsfreeze-freeze",
        "guest-fsfreeze-freeze-list",
        "guest-get-fsinfo",
        "guest-exec",
        "guest-get-time",
    ] {
        let text = format!("Command {command} has been disabled: the command is not allowed");
        assert_eq!(refusal(agent, command, &json!({})), ("CommandNotFound".into(), text));
    }
    let unknown = ("CommandNotFound".to_owned(), "The command nope has not been found".to_owned());
    assert_eq!(refusal(agent, "nope", &json!({})), unknown);
    assert_eq!(ask(agent, "guest-ping", &json!({})), json!({}));
    assert_eq!(thaw(agent), 5);
    assert_eq!(thaw(agent), 0);
    assert_eq!(status(agent), "thawed");
    assert!(!guest.has("/run/agent/qga.state.isfrozen"));
    assert_eq!(guest.sh("cat /run/hook.log"), "thaw\nfreeze\nthaw\nthaw");
}

fn writers_wait_and_readers_do_not(guest: &mut Guest<'_>, agent: &mut GuestSession) {
    assert_eq!(freeze(agent), 5);
    // From the disk, not from memory. Before there are writers: one in a new file of an overlay holds up those who look for
    // another one in the same directory (Linux fs/overlayfs: it waits for the upper filesystem with the directory locked).
    guest.sh("echo 3 >/proc/sys/vm/drop_caches");
    for file in ["/a/r", "/a/lm/r", "/x/r", "/bx/r", "/b/r", "/b2/r", "/ov/lower", "/sq/lower", "/v/r"] {
        guest.sh(&format!("cat {file} && ls -l $(dirname {file})"));
    }
    guest.expect_blocked(FROZEN, WRITABLE);
    guest.sh("cat /a/r /a/lm/r /x/r /bx/r /b/r /b2/r && ls -l /a /a/lm /x /b /ro");
    // Reading has changed nothing for those who wait.
    assert_eq!(guest.writers(FROZEN.len()), vec!["D"; FROZEN.len()]);
    assert_eq!(thaw(agent), 5);
    guest.expect_released(FROZEN.len() + WRITABLE.len());
    assert_eq!(guest.sh("cat /a/t /a/lm/t /x/t /x/u /b/t /b/u /a/u/t | sort | uniq -c | tr -s ' '"), "7 x");
}

fn lists_are_lists_of_filesystems(guest: &mut Guest<'_>, agent: &mut GuestSession) {
    assert_eq!(freeze_list(agent, &["/x", "/nope"]), 1);
    guest.expect_blocked(&["/x/v", "/bx/v"], &["/a/v", "/a/lm/v", "/b/v", "/ov/v", "/v/v"]);
    assert_eq!(thaw(agent), 1);
    guest.expect_released(7);
    for nothing in [&["/nope"][..], &["/v"], &["/sq"], &["/ov"], &[]] {
        assert_eq!(freeze_list(agent, nothing), 0, "{nothing:?}");
        assert_eq!(status(agent), "thawed");
    }
    assert_eq!(ask(agent, "guest-fsfreeze-freeze-list", &json!({})), 5);
    assert_eq!(thaw(agent), 5);
    let wrong = refusal(agent, "guest-fsfreeze-freeze-list", &json!({"mountpoints": "/x"}));
    assert_eq!(wrong.1, "Invalid parameter type for 'mountpoints', expected: array");
    let wrong = refusal(agent, "guest-fsfreeze-freeze", &json!({"mountpoints": ["/x"]}));
    assert_eq!(wrong.1, "Parameter 'mountpoints' is unexpected");
    assert_eq!(status(agent), "thawed");
}

/// EBUSY is no failure: somebody else holds that filesystem still. The thaw is for everybody.
fn what_others_froze_is_not_counted_but_thawed(guest: &mut Guest<'_>, agent: &mut GuestSession) {
    guest.sh("fsfreeze --freeze /x");
    assert_eq!(freeze(agent), 4);
    assert_eq!(thaw(agent), 5);
    guest.sh("echo y >/x/after");
    // And the other way round; the filesystem inside another one can only write again after that one.
    assert_eq!(freeze(agent), 5);
    guest.sh("for dir in /a /a/lm /x /b /ro; do fsfreeze --unfreeze $dir; done; echo w >/x/w");
    assert_eq!(status(agent), "frozen", "as far as the agent knows");
    assert_eq!(thaw(agent), 0, "the kernel says that nothing is");
    assert_eq!(status(agent), "thawed");
}
