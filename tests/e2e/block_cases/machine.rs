//! A VM with disks, of whatever make, and the verbs of the cases.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use coordinator::{Event, GuestSession};
use serde_json::{Value, json};

use super::reference::Qemu;
use crate::harness::{Lab, Monitor, Vm, eventually, limit, shell};

/// A VM whose guest has the disks by their names, as `/dev/NAME`.
pub struct Machine<'a> {
    pub monitor: Monitor,
    agent: GuestSession,
    vmm: Vmm<'a>,
}

enum Vmm<'a> {
    Tarn(Vm<'a>),
    Qemu(Qemu),
}

/// A disk of the guest.
pub struct Disk {
    pub id: &'static str,
    pub image: PathBuf,
    /// Its writes can be held up: [`Machine::hold_next_write`].
    pub holdable: bool,
    pub read_only: bool,
}

impl Disk {
    pub fn new(lab: &Lab, id: &'static str, size: u64) -> Self {
        Self::of(id, lab.image(&format!("{id}.raw"), size))
    }

    /// One that is there.
    pub fn of(id: &'static str, image: PathBuf) -> Self {
        Self { id, image, holdable: false, read_only: false }
    }
}

/// Something that a guest does in the background.
pub struct Deed(Value);

/// Whether the cases run against QEMU.
pub fn reference() -> bool {
    match std::env::var("TARN_REFERENCE").as_deref() {
        Ok("qemu") => true,
        Ok("") | Err(_) => false,
        Ok(other) => panic!("TARN_REFERENCE={other}: `qemu` is the only one"),
    }
}

impl<'a> Machine<'a> {
    pub fn boot(lab: &'a Lab, program: &Path, name: &'static str, disks: &[Disk]) -> Self {
        let vmm = if reference() {
            Vmm::Qemu(Qemu::start(lab, program, name, disks))
        } else {
            let spec = |Disk { id, image, read_only, .. }: &Disk| {
                format!("{},id={id}{}", image.display(), if *read_only { ",ro" } else { "" })
            };
            let specs: Vec<String> = disks.iter().map(spec).collect();
            let mut args = vec!["--initrd", program.to_str().unwrap()];
            specs.iter().for_each(|spec| args.extend(["--disk", spec]));
            Vmm::Tarn(lab.boot(name, &args))
        };
        let mut vmm = vmm;
        let (monitor, agent) = match &mut vmm {
            Vmm::Tarn(vm) => (vm.monitor(), vm.agent()),
            Vmm::Qemu(qemu) => (qemu.monitor(), qemu.agent()),
        };
        let mut machine = Self { monitor, agent, vmm };
        machine.sh("for disk in /sys/block/vd*; do ln -s ${disk##*/} /dev/$(cat $disk/serial); done");
        machine
    }

    /// It is QEMU.
    pub fn is_reference(&self) -> bool {
        matches!(self.vmm, Vmm::Qemu(_))
    }

    pub fn socket(&mut self) -> PathBuf {
        match &mut self.vmm {
            Vmm::Tarn(vm) => vm.socket("monitor.sock"),
            Vmm::Qemu(qemu) => qemu.socket("qmp.sock"),
        }
    }

    pub fn console(&self) -> String {
        match &self.vmm {
            Vmm::Tarn(vm) => vm.console(),
            Vmm::Qemu(qemu) => qemu.console(),
        }
    }

    /// Kills the VMM, as a crash would.
    pub fn kill(&mut self) {
        match &mut self.vmm {
            Vmm::Tarn(vm) => vm.kill(),
            Vmm::Qemu(qemu) => qemu.kill(),
        }
    }

    /// Leaves the monitor: QEMU serves one client at a time.
    pub fn without_monitor(self) -> (MachineWithoutMonitor<'a>, PathBuf) {
        let mut machine = self;
        let socket = machine.socket();
        let Machine { monitor, agent, vmm } = machine;
        drop(monitor);
        (MachineWithoutMonitor { agent, vmm }, socket)
    }

    // What the guest does.

    /// Runs a shell script in the guest that must succeed.
    pub fn sh(&mut self, script: &str) -> String {
        match shell(&mut self.agent, script) {
            Ok((0, text)) => text.trim().to_owned(),
            other => panic!("`{script}`: {other:?}\n{}", self.console()),
        }
    }

    /// I/O of the guest, one operation after the other: see tests/clients/disk-io.rs.
    pub fn io(&mut self, disk: &str, ops: &str) {
        let deed = self.begin(disk, &format!("run {ops}"));
        self.end(deed);
    }

    /// The same in the background, with the verb before it.
    pub fn begin(&mut self, disk: &str, verb_and_ops: &str) -> Deed {
        let mut args = vec![format!("/dev/{disk}")];
        args.extend(verb_and_ops.split_whitespace().map(str::to_owned));
        self.start("/usr/bin/disk-io", &args)
    }

    /// A shell script in the background.
    pub fn begin_script(&mut self, script: &str) -> Deed {
        self.start("/bin/sh", &["-c".into(), script.into()])
    }

    fn start(&mut self, program: &str, args: &[String]) -> Deed {
        let request = json!({"path": program, "arg": args, "capture-output": true});
        Deed(self.ask_agent("guest-exec", &request))
    }

    /// Whether it is over; that it went well, then.
    pub fn is_over(&mut self, deed: &Deed) -> bool {
        let status = self.ask_agent("guest-exec-status", &deed.0);
        if status["exited"] == false {
            return false;
        }
        assert_eq!(status["exitcode"], 0, "{}", text(&status["err-data"]));
        true
    }

    /// Waits for its end; returns what it said.
    pub fn end(&mut self, deed: Deed) -> String {
        let Deed(process) = deed;
        let status = eventually("the end of the guest's I/O", || {
            let status = self.ask_agent("guest-exec-status", &process);
            (status["exited"] == true).then_some(status)
        });
        assert_eq!(status["exitcode"], 0, "{}", text(&status["err-data"]));
        text(&status["out-data"])
    }

    fn ask_agent(&mut self, command: &str, arguments: &Value) -> Value {
        let arguments = arguments.as_object().unwrap().clone();
        let answer = self.agent.execute(command, Some(arguments.into_iter().collect()), limit());
        answer.unwrap_or_else(|error| panic!("{command}: {error}\n{}", self.console()))
    }

    // What the client does.

    /// A node for an image.
    pub fn add(&mut self, name: &str, image: &Path) {
        let file = json!({"driver": "file", "filename": image});
        let node = json!({"driver": "raw", "node-name": name, "discard": "unmap", "file": file});
        self.monitor.run_with("blockdev-add", &node);
    }

    pub fn delete(&mut self, name: &str) {
        self.monitor.run_with("blockdev-del", &json!({"node-name": name}));
    }

    /// Starts the job `m0`, with `more` arguments; events before it are forgotten.
    pub fn mirror(&mut self, device: &str, target: &str, more: &Value) {
        self.monitor.forget_events();
        self.monitor.run_with("blockdev-mirror", &mirror_arguments(device, target, more));
    }

    /// The same, until it is ready.
    pub fn mirror_until_ready(&mut self, device: &str, target: &str, more: &Value) {
        self.mirror(device, target, more);
        let told = self.told("BLOCK_JOB_READY");
        assert_eq!(told.names(), ["created", "running", "ready", "BLOCK_JOB_READY"]);
        let ready = told.data("BLOCK_JOB_READY");
        assert_eq!(ready["len"], ready["offset"], "{ready}");
    }

    /// Completes it: the target is the disk.
    pub fn pivot(&mut self) {
        self.monitor.forget_events();
        self.verb("block-job-complete");
        let told = self.told("null");
        assert_eq!(told.names(), ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]);
        assert_eq!(told.data("BLOCK_JOB_COMPLETED").get("error"), None);
    }

    /// Until the job, which finalizes when it is told to, is pending.
    pub fn complete_until_pending(&mut self) {
        self.monitor.forget_events();
        self.verb("block-job-complete");
        assert_eq!(self.told("BLOCK_JOB_PENDING").names(), ["waiting", "pending", "BLOCK_JOB_PENDING"]);
    }

    /// Finalizes and dismisses it.
    pub fn finalize(&mut self) {
        self.monitor.run_with("job-finalize", &json!({"id": "m0"}));
        assert_eq!(self.told("concluded").names(), ["BLOCK_JOB_COMPLETED", "concluded"]);
        self.monitor.run_with("job-dismiss", &json!({"id": "m0"}));
        assert_eq!(self.told("null").names(), ["null"]);
    }

    /// A command about the job with no other argument.
    pub fn verb(&mut self, command: &str) {
        self.monitor.run_with(command, &json!({"device": "m0"}));
    }

    pub fn cancel(&mut self, force: bool) {
        self.monitor.forget_events();
        self.monitor.run_with("block-job-cancel", &json!({"device": "m0", "force": force}));
    }

    pub fn set_speed(&mut self, speed: u64) {
        self.monitor.run_with("block-job-set-speed", &json!({"device": "m0", "speed": speed}));
    }

    /// The job as `query-block-jobs` shows it.
    pub fn job(&mut self) -> Value {
        let jobs = self.monitor.run("query-block-jobs");
        let job = jobs.as_array().unwrap().iter().find(|job| job["device"] == "m0");
        job.unwrap_or_else(|| panic!("no job: {jobs}")).clone()
    }

    pub fn has_no_jobs(&mut self) {
        assert_eq!(self.monitor.run("query-block-jobs"), json!([]));
    }

    /// The image that the guest's disk is.
    pub fn file(&mut self, device: &str) -> PathBuf {
        let all = self.monitor.run("query-block");
        let info = all.as_array().unwrap().iter().find(|info| info["device"] == device);
        info.unwrap_or_else(|| panic!("no {device}: {all}"))["inserted"]["file"].as_str().unwrap().into()
    }

    /// What jobs tell up to the event or status `last`.
    pub fn told(&mut self, last: &str) -> Told {
        let mut told = Told(Vec::new());
        let start = Instant::now();
        while told.0.last().is_none_or(|event| name(event) != last) {
            assert!(start.elapsed() < limit(), "no {last} after {:?}", told.names());
            let event = self.monitor.0.next_event(Duration::from_secs(1)).expect("the monitor is there");
            told.0.extend(event.filter(|event| event.name.contains("JOB")));
        }
        if self.is_reference() {
            told.without_pairs();
        }
        told
    }

    /// The next write into the first 64 KiB of a holdable disk does not end before [`Self::release_write`], or soon.
    pub fn hold_next_write(&mut self, device: &str) {
        if self.is_reference() {
            self.qemu_io(device, "break write_aio A");
        } else {
            let mut fault = json!({"device": device, "op": "write", "sector": 0, "sectors": 128});
            fault["delay-ms"] = 3000.into();
            fault["count"] = 1.into();
            self.monitor.run_with("tarn-fault-add", &fault);
        }
    }

    pub fn release_write(&mut self, device: &str) {
        if self.is_reference() {
            self.qemu_io(device, "resume A");
        }
    }

    fn qemu_io(&mut self, device: &str, command: &str) {
        let line = json!({"command-line": format!("qemu-io {device} \"{command}\"")});
        let said = self.monitor.run_with("human-monitor-command", &line);
        assert_eq!(said, "", "{command}");
    }
}

/// One whose monitor is somebody else's.
pub struct MachineWithoutMonitor<'a> {
    agent: GuestSession,
    vmm: Vmm<'a>,
}

impl<'a> MachineWithoutMonitor<'a> {
    pub fn with_monitor(mut self) -> Machine<'a> {
        let monitor = match &mut self.vmm {
            Vmm::Tarn(vm) => vm.monitor(),
            Vmm::Qemu(qemu) => qemu.monitor(),
        };
        Machine { monitor, agent: self.agent, vmm: self.vmm }
    }
}

/// Arguments of `blockdev-mirror` for the job `m0`.
pub fn mirror_arguments(device: &str, target: &str, more: &Value) -> Value {
    let mut arguments = json!({"job-id": "m0", "device": device, "target": target, "sync": "full"});
    for (name, value) in more.as_object().unwrap() {
        arguments[name] = value.clone();
    }
    arguments
}

/// Events of jobs.
#[derive(Debug)]
pub struct Told(Vec<Event>);

/// `JOB_STATUS_CHANGE` by its status, others by their name.
fn name(event: &Event) -> &str {
    match event.name.as_str() {
        "JOB_STATUS_CHANGE" => event.data["status"].as_str().unwrap(),
        name => name,
    }
}

impl Told {
    pub fn names(&self) -> Vec<&str> {
        self.0.iter().map(name).collect()
    }

    pub fn data(&self, wanted: &str) -> Value {
        let event = self.0.iter().find(|event| name(event) == wanted);
        let event = event.unwrap_or_else(|| panic!("no {wanted} in {:?}", self.names()));
        json!(event.data)
    }

    /// QEMU's jobs stop for a moment and go on whenever something else drains their disk.
    fn without_pairs(&mut self) {
        let pair = |events: &[Event]| {
            matches!((name(&events[0]), name(&events[1])), ("standby", "ready") | ("paused", "running"))
        };
        while let Some(at) = self.0.windows(2).position(pair) {
            self.0.drain(at..at + 2);
        }
    }
}

fn text(base64: &Value) -> String {
    use base64::Engine as _;
    let bytes = base64::engine::general_purpose::STANDARD.decode(base64.as_str().unwrap_or_default());
    String::from_utf8_lossy(&bytes.unwrap()).into_owned()
}

/// Whether a range of the image has this byte all over.
pub fn holds(image: &Path, byte: u8, offset: u64, len: u64) -> bool {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; usize::try_from(len).unwrap()];
    fs::File::open(image).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    bytes.iter().all(|found| *found == byte)
}

/// Where two images first differ.
pub fn difference(one: &Path, other: &Path) -> Option<usize> {
    let (one, other) = (fs::read(one).unwrap(), fs::read(other).unwrap());
    assert_eq!(one.len(), other.len());
    if one == other { None } else { one.iter().zip(&other).position(|(one, other)| one != other) }
}

#[track_caller]
pub fn assert_same(one: &Path, other: &Path) {
    let difference = difference(one, other);
    assert_eq!(difference, None, "{} and {} differ from there on", one.display(), other.display());
}
