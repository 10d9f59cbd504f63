//! What the sentences of the end-to-end tests are made of.
//!
//! A test is `let Some(lab) = Lab::new("what it shows") else { return };`, VMs launched from it, and assertions.
//! Everything a test makes is in its own directory on the scratch disk (`TMPDIR`); when it fails, consoles, logs and
//! the directory's small files are copied to `target/e2e/NAME/`.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use coordinator::recipes::{ExecError, ExecRequest, Output, Stream, exec};
use coordinator::{Event, GuestSession, Map, MonitorSession, SessionError};
use serde_json::Value;

use crate::payload::{Then, pvh_elf};

/// The binary under test.
pub const TARN: &str = env!("CARGO_BIN_EXE_tarn");

/// How long a condition is awaited: generous for an emulated machine, and scalable (`TARN_TEST_SCALE`).
pub fn limit() -> Duration {
    let scale = std::env::var("TARN_TEST_SCALE").ok().and_then(|scale| scale.parse().ok()).unwrap_or(1);
    Duration::from_secs(120) * scale
}

/// Waits until `condition` gives something; fails with `what` after [`limit`].
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < limit(), "Not within {:?}: {what}", limit());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the vmm crate has a parent").to_owned()
}

/// A file of the guest image.
pub fn guest_image(file: &str) -> PathBuf {
    std::env::var_os("TARN_GUEST_IMAGE")
        .map_or_else(|| root().join("target/guest-image"), PathBuf::from)
        .join(file)
}

/// A place for one test, gone when it passes.
pub struct Lab {
    name: &'static str,
    dir: PathBuf,
}

impl Lab {
    /// A place for a test that boots guests; `None`, loudly, where no KVM can (an error with `REQUIRE_KVM=1`).
    pub fn new(name: &'static str) -> Option<Self> {
        let usable = vmm::host::open_kvm().is_ok() && vmm::host::hardware_virtualization().is_some();
        if !usable {
            let required = std::env::var("REQUIRE_KVM").is_ok_and(|value| value == "1");
            assert!(!required, "REQUIRE_KVM=1, and there is no KVM with svm or vmx here");
            eprintln!("SKIPPED: {name}: no KVM with svm or vmx here; scripts/with-kvm has one");
            return None;
        }
        Some(Self::without_kvm(name))
    }

    /// A place for a test whose guests are payloads: any KVM can run them, a software one too.
    pub fn for_payloads(name: &'static str) -> Option<Self> {
        if vmm::host::open_kvm().is_ok() { Some(Self::without_kvm(name)) } else { Self::new(name) }
    }

    /// A place for a test that starts no guest.
    pub fn without_kvm(name: &'static str) -> Self {
        let dir = std::env::temp_dir().join(format!("tarn-e2e-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).expect("a directory for the test");
        Self { name, dir }
    }

    /// A path in the test's directory.
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    /// A sparse file of `size` bytes.
    pub fn image(&self, file: &str, size: u64) -> PathBuf {
        let path = self.path(file);
        File::create(&path).and_then(|file| file.set_len(size)).expect("an image");
        path
    }

    /// An image with an empty ext4 filesystem.
    pub fn ext4(&self, file: &str, size: u64) -> PathBuf {
        let path = self.image(file, size);
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&path));
        path
    }

    /// `tarn ARGS…`, with this test's VMs in sight.
    pub fn tarn(&self, args: &[&str]) -> Command {
        let mut command = Command::new(TARN);
        command.args(args).env("TARN_RUN_DIR", self.path("run")).env("TARN_STATE_DIR", self.path("state"));
        command.env("TARN_GUEST_IMAGE", guest_image(""));
        command
    }

    /// Runs `tarn ARGS…` to its end.
    pub fn output(&self, args: &[&str]) -> std::process::Output {
        self.tarn(args).stdin(Stdio::null()).output().expect("tarn starts")
    }

    /// A payload kernel in a file, and the arguments of `tarn run` for it.
    pub fn payload(&self, then: Then) -> Vec<String> {
        let kernel = self.path(&format!("{then:?}.elf").replace(' ', ""));
        fs::write(&kernel, pvh_elf("hello from the payload\n", then)).expect("a payload");
        let kernel = kernel.to_str().expect("a plain path");
        ["--kernel", kernel, "--console", "serial", "--memory", "64M", "--software-kvm"]
            .map(str::to_owned)
            .to_vec()
    }

    /// VMs that have something in the run-time directory, dead or alive.
    pub fn leavings(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("run")).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    }

    /// A monitor client of the VM of that name, whoever started it.
    pub fn monitor(&self, name: &str) -> Monitor {
        let path = self.path("run").join(name).join("monitor.sock");
        eventually("the VM's sockets", || path.exists().then_some(()));
        Monitor(MonitorSession::connect(&path, limit()).expect("the monitor greets"))
    }

    /// Starts `tarn run --name NAME ARGS…` in the foreground, without waiting for anything.
    pub fn launch(&self, name: &'static str, args: &[&str]) -> Vm<'_> {
        let file = |kind: &str| File::create(self.path(&format!("{name}.{kind}"))).expect("a log file");
        let child = self
            .tarn(&["run", "--name", name])
            .args(args)
            .stdin(Stdio::null())
            .stdout(file("console"))
            .stderr(file("log"))
            .spawn()
            .expect("tarn starts");
        Vm { lab: self, name, child, status: None }
    }

    /// The same, and waits until the guest's agent answers.
    pub fn boot(&self, name: &'static str, args: &[&str]) -> Vm<'_> {
        let mut vm = self.launch(name, args);
        vm.wait_for_agent();
        vm
    }

    fn keep(&self) {
        let kept = root().join("target/e2e").join(self.name);
        let _ = fs::remove_dir_all(&kept);
        let _ = fs::create_dir_all(&kept);
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let small = entry.metadata().is_ok_and(|m| m.is_file() && m.len() < 64 << 20);
            if small {
                let _ = fs::copy(entry.path(), kept.join(entry.file_name()));
            }
        }
        eprintln!("{}: artefacts are in {}", self.name, kept.display());
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.keep();
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A VM under test; killed when dropped.
pub struct Vm<'a> {
    lab: &'a Lab,
    name: &'static str,
    child: Child,
    status: Option<ExitStatus>,
}

impl Vm<'_> {
    /// A socket of the VM.
    pub fn socket(&self, file: &str) -> PathBuf {
        self.lab.path("run").join(self.name).join(file)
    }

    /// The VM's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the guest printed so far.
    pub fn console(&self) -> String {
        lossy(&self.lab.path(&format!("{}.console", self.name)))
    }

    /// What the VMM logged so far.
    pub fn log(&self) -> String {
        lossy(&self.lab.path(&format!("{}.log", self.name)))
    }

    /// Waits until the socket is there, or says why it never will be.
    fn wait_for_socket(&mut self, file: &str) -> PathBuf {
        let path = self.socket(file);
        eventually("the VM's sockets", || {
            if let Ok(Some(status)) = self.child.try_wait() {
                panic!("VM {} ended ({status}): {}", self.name, self.log());
            }
            // The file is there a moment before anybody listens.
            UnixStream::connect(&path).ok()
        });
        path
    }

    /// A monitor client.
    pub fn monitor(&mut self) -> Monitor {
        let path = self.wait_for_socket("monitor.sock");
        Monitor(MonitorSession::connect(&path, limit()).expect("the monitor greets"))
    }

    /// A client of the guest's agent.
    pub fn agent(&mut self) -> GuestSession {
        let path = self.wait_for_socket("agent.sock");
        GuestSession::connect(&path).expect("agent.sock accepts")
    }

    /// Waits until the agent answers.
    pub fn wait_for_agent(&mut self) {
        let mut session = self.agent();
        if let Err(error) = session.wait_for_agent(limit()) {
            panic!("No agent in {}: {error}\n{}\n{}", self.name, self.log(), self.console());
        }
    }

    /// Runs a shell script in the guest; returns its exit status and its output, errors included.
    pub fn try_sh(&mut self, script: &str) -> (u8, String) {
        let mut session = self.agent();
        shell(&mut session, script)
            .unwrap_or_else(|error| panic!("`{script}` in {}: {error}\n{}", self.name, self.log()))
    }

    /// Runs a shell script that must succeed; returns its output, trimmed.
    pub fn sh(&mut self, script: &str) -> String {
        let (status, text) = self.try_sh(script);
        assert_eq!(status, 0, "`{script}` in {}:\n{text}", self.name);
        text.trim().to_owned()
    }

    /// Waits for the end of the process.
    pub fn wait(&mut self) -> ExitStatus {
        let status = eventually("the end of the VM", || self.child.try_wait().expect("our own child"));
        self.status = Some(status);
        status
    }

    /// Asks the guest to power off and waits for the end.
    pub fn power_off(&mut self) {
        let mut session = self.agent();
        session
            .execute_without_reply("guest-shutdown", None, Duration::from_secs(2))
            .expect("guest-shutdown");
        let status = self.wait();
        assert!(status.success(), "{status}: {}", self.log());
    }

    /// Kills the VMM, as a crash would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        self.status = self.child.wait().ok();
    }
}

impl Drop for Vm<'_> {
    fn drop(&mut self) {
        if self.status.is_none() {
            self.kill();
        }
        if std::thread::panicking() {
            eprintln!(
                "--- log of {}\n{}--- console of {}\n{}",
                self.name,
                self.log(),
                self.name,
                self.console()
            );
        }
    }
}

/// A monitor client that fails the test where a reply is not what it should be.
pub struct Monitor(pub MonitorSession);

impl Monitor {
    /// Runs a command that must succeed.
    pub fn run(&mut self, command: &str) -> Value {
        self.run_with(command, &Value::Null)
    }

    /// Runs a command with arguments that must succeed.
    pub fn run_with(&mut self, command: &str, arguments: &Value) -> Value {
        self.try_run(command, arguments).unwrap_or_else(|error| {
            let why = error.refusal().map(|refusal| refusal.desc.clone()).unwrap_or_default();
            panic!("{command} {arguments}: {error}: {why}")
        })
    }

    /// Runs a command.
    pub fn try_run(&mut self, command: &str, arguments: &Value) -> Result<Value, SessionError> {
        self.0.execute(command, arguments.as_object().cloned().map(Map::from_iter), limit())
    }

    /// The text of the error that a command must give.
    pub fn refusal(&mut self, command: &str, arguments: &Value) -> String {
        let error = self.try_run(command, arguments).expect_err("an error");
        error.refusal().unwrap_or_else(|| panic!("{command}: {error}")).desc.clone()
    }

    /// `query-status`.
    pub fn status(&mut self) -> String {
        self.run("query-status")["status"].as_str().expect("a status").to_owned()
    }

    /// Drops the events that have come so far.
    pub fn forget_events(&mut self) {
        while let Some(event) = self.0.next_event(Duration::ZERO).expect("the monitor is there") {
            drop(event);
        }
    }

    /// Waits for an event of this name; drops those before it.
    pub fn await_event(&mut self, name: &str) -> Event {
        let start = Instant::now();
        while start.elapsed() < limit() {
            match self.0.next_event(Duration::from_secs(1)) {
                Ok(Some(event)) if event.name == name => return event,
                Ok(_) => {}
                Err(error) => panic!("waiting for {name}: {error}"),
            }
        }
        panic!("no {name} within {:?}", limit());
    }
}

/// Runs a host command that must succeed; returns what it printed.
pub fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, text(&output.stderr));
    text(&output.stdout)
}

/// Runs a shell script by way of an agent; returns its exit status and its output, errors included.
pub fn shell(session: &mut GuestSession, script: &str) -> Result<(u8, String), ExecError> {
    let mut text = Vec::new();
    let request = ExecRequest { timeout: Some(limit()), ..ExecRequest::shell(script) };
    let status = exec(session, &request, &mut |output| {
        if let Output::Bytes(Stream::Stdout | Stream::Stderr, bytes) = output {
            text.extend_from_slice(bytes);
        }
        Ok(())
    })?;
    Ok((status.code(), String::from_utf8_lossy(&text).into_owned()))
}

/// A client of a unix socket whose reads end in a failure instead of never.
pub fn connect(path: &Path) -> UnixStream {
    let socket = UnixStream::connect(path).expect("a socket");
    socket.set_read_timeout(Some(limit())).expect("a socket");
    socket.set_write_timeout(Some(limit())).expect("a socket");
    socket
}

/// The SHA-256 of a file, as sha256sum prints it.
pub fn sha256(path: &Path) -> String {
    let text = run(Command::new("sha256sum").arg(path));
    text.split_whitespace().next().expect("a checksum").to_owned()
}

fn lossy(path: &Path) -> String {
    let mut bytes = Vec::new();
    let _ = File::open(path).and_then(|mut file| file.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}
