//! Nodes and jobs through the monitor, over disks that do what they are told on paper.

#![expect(clippy::needless_pass_by_value, reason = "arguments are written where they are used")]

use std::os::fd::AsFd;
use std::path::PathBuf;

use super::*;
use crate::jobs::disks::NotDone;
use crate::jobs::lifecycle::{Action, Report};
use crate::jobs::testing::SIZE;

/// A client, and what it hears: replies and events in a line, as `m0:created` for JOB_STATUS_CHANGE, names of other
/// events with what matters of their data, `{}` for a return, and the text of an error.
pub(super) struct Play {
    pub(super) lab: Lab,
    pub(super) client: Client,
}

impl Play {
    pub(super) fn new() -> Self {
        let mut lab = Lab::new();
        let client = lab.client();
        Self { lab, client }
    }

    /// With a node `t` that a disk can be mirrored to.
    pub(super) fn with_target() -> Self {
        let mut play = Self::new();
        play.image("t", SIZE);
        assert_eq!(play.add("t"), "{}");
        play
    }

    /// With a mirror `m0` of disk0 to node `t`.
    pub(super) fn with_mirror(more: Value) -> Self {
        let mut play = Self::with_target();
        assert_eq!(play.mirror(more), "m0:created m0:running {}");
        play
    }

    /// The same, and ready.
    pub(super) fn ready(more: Value) -> Self {
        let mut play = Self::with_mirror(more);
        play.lab.vm.disks.progress(10, 10);
        assert_eq!(play.hear(Report::Ready), "m0:ready READY(10/10)");
        play
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.lab.directory.path().join(name)
    }

    pub(super) fn image(&self, name: &str, size: u64) {
        std::fs::File::create(self.path(name)).unwrap().set_len(size).unwrap();
    }

    pub(super) fn add(&mut self, name: &str) -> String {
        let file = json!({"driver": "file", "filename": self.path(name)});
        self.ask("blockdev-add", json!({"driver": "raw", "node-name": name, "file": file}))
    }

    pub(super) fn mirror(&mut self, more: Value) -> String {
        let mut arguments = json!({"job-id": "m0", "device": "disk0", "target": "t", "sync": "full"});
        for (name, value) in more.as_object().unwrap() {
            arguments[name] = value.clone();
        }
        self.ask("blockdev-mirror", arguments)
    }

    pub(super) fn raw(&mut self, command: &str, arguments: Value) -> Vec<Value> {
        self.client.send(&json!({"execute": command, "arguments": arguments}).to_string());
        self.lab.turn();
        self.client.messages()
    }

    pub(super) fn ask(&mut self, command: &str, arguments: Value) -> String {
        shown(&self.raw(command, arguments))
    }

    pub(super) fn device(&mut self, command: &str) -> String {
        self.ask(command, json!({"device": "m0"}))
    }

    pub(super) fn id(&mut self, command: &str) -> String {
        self.ask(command, json!({"id": "m0"}))
    }

    pub(super) fn query(&mut self, command: &str) -> Value {
        self.raw(command, json!({})).remove(0)["return"].take()
    }

    /// What clients are told when the disk reports this.
    pub(super) fn hear(&mut self, report: Report) -> String {
        self.hear_of(0, report)
    }

    /// What clients are told when this disk reports this.
    pub(super) fn hear_of(&mut self, disk: usize, report: Report) -> String {
        let vm = &mut self.lab.vm;
        vm.jobs.hear(&vm.disks, disk, report);
        self.told()
    }

    /// What clients are told once the command is answered.
    pub(super) fn settle(&mut self) -> String {
        let vm = &mut self.lab.vm;
        vm.jobs.settle(&vm.disks);
        self.told()
    }

    /// What clients are told when the next thread of a job ends.
    pub(super) fn done(&mut self) -> String {
        let vm = &mut self.lab.vm;
        let done = vm.done.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
        vm.jobs.done(&vm.disks, done);
        self.told()
    }

    pub(super) fn told(&mut self) -> String {
        for event in self.lab.vm.take_events() {
            self.lab.emit(&event);
        }
        shown(&self.client.messages())
    }

    pub(super) fn orders(&self) -> Vec<String> {
        self.lab.vm.disks.orders()
    }

    /// Node and image of disk0.
    pub(super) fn inserted(&mut self) -> (String, String) {
        let disk = self.query("query-block")[0].take();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        (text(&disk["inserted"]["node-name"]), text(&disk["inserted"]["file"]))
    }

    pub(super) fn is_source(&mut self) -> bool {
        self.inserted() == ("#block001".into(), "/images/a.raw".into())
    }

    pub(super) fn is_target(&mut self) -> bool {
        self.inserted() == ("t".into(), self.path("t").display().to_string())
    }
}

pub(super) fn shown(messages: &[Value]) -> String {
    let show = |message: &Value| {
        if let Some(error) = message.get("error") {
            return error["desc"].as_str().unwrap().to_owned();
        }
        let Some(event) = message.get("event").and_then(Value::as_str) else {
            let state = &message["return"]["state"];
            assert!(state.is_string() || message["return"] == json!({}));
            return state.as_str().unwrap_or("{}").to_owned();
        };
        let data = &message["data"];
        let text = |name: &str| data[name].as_str().unwrap_or_default();
        let progress = || format!("{}/{}", data["offset"], data["len"]);
        match event.strip_prefix("BLOCK_JOB_") {
            None if event == "JOB_STATUS_CHANGE" => format!("{}:{}", text("id"), text("status")),
            None if event == "TARN_PIVOT" => format!("PIVOT:{}", text("state")),
            None => event.to_owned(),
            Some("ERROR") => format!("ERROR({},{})", text("operation"), text("action")),
            Some("PENDING") => format!("PENDING({})", text("id")),
            Some(name) if data.get("error").is_some() => format!("{name}({}, {})", progress(), text("error")),
            Some(name) => format!("{name}({})", progress()),
        }
    };
    messages.iter().map(show).collect::<Vec<_>>().join(" ")
}

fn none() -> Value {
    json!({})
}

#[test]
fn a_mirror_is_ready_completes_and_the_disk_is_the_target() {
    let mut play = Play::ready(none());
    assert!(play.is_source());
    assert_eq!(play.device("block-job-complete"), "{}");
    assert_eq!(play.orders(), ["0 Quiesce"]);
    assert_eq!(play.hear(Report::Quiesced), "m0:waiting m0:pending COMPLETED(10/10) m0:concluded m0:null");
    assert_eq!(play.orders(), ["0 Switch"]);
    assert!(play.is_target());
    assert_eq!(play.query("query-block-jobs"), json!([]));
    // What was waited for is reported as well.
    assert_eq!(play.hear(Report::Switched), "");
    assert_eq!(play.ask("blockdev-del", json!({"node-name": "t"})), "Node t is in use");
    // And back again, to a node that is not known by its path alone.
    play.image("back", SIZE);
    play.add("back");
    assert_eq!(play.mirror(json!({"device": "t", "target": "back"})), "m0:created m0:running {}");
    play.hear(Report::Ready);
    play.device("block-job-complete");
    play.hear(Report::Quiesced);
    assert_eq!(play.inserted().0, "back");
    assert_eq!(play.ask("blockdev-del", json!({"node-name": "t"})), "{}");
}

#[test]
fn a_cancel_before_ready_leaves_the_disk_as_it_was_and_the_target_a_node() {
    let mut play = Play::with_mirror(json!({"speed": 65536}));
    assert_eq!(play.lab.vm.disks.options().speed, 65536);
    play.lab.vm.disks.progress(1, 10);
    assert_eq!(play.ask("blockdev-del", json!({"node-name": "t"})), "Node t is in use");
    assert_eq!(play.ask("block-job-cancel", json!({"device": "m0", "force": false})), "m0:aborting {}");
    assert_eq!(play.orders(), ["0 Detach"]);
    assert_eq!(play.hear(Report::Detached), "CANCELLED(1/10) m0:concluded m0:null");
    assert!(play.is_source());
    assert_eq!(play.query("query-block-jobs"), json!([]));
    assert_eq!(play.mirror(none()), "m0:created m0:running {}");
}

#[test]
fn a_cancel_when_ready_finishes_the_copy_unless_it_is_forced() {
    let mut play = Play::ready(none());
    assert_eq!(play.device("block-job-cancel"), "{}");
    assert_eq!(play.orders(), ["0 Quiesce"]);
    assert_eq!(play.hear(Report::Quiesced), "m0:waiting m0:pending");
    assert_eq!(play.hear(Report::Detached), "COMPLETED(10/10) m0:concluded m0:null");
    assert_eq!(play.orders(), ["0 Detach"]);
    assert!(play.is_source());
    for command in ["job-cancel", "block-job-cancel"] {
        let mut play = Play::ready(none());
        let reply = match command {
            "job-cancel" => play.id(command),
            _ => play.ask(command, json!({"device": "m0", "force": true})),
        };
        assert_eq!(reply, "m0:aborting {}");
        assert_eq!(play.hear(Report::Detached), "CANCELLED(10/10) m0:concluded m0:null");
        assert!(play.is_source());
    }
}

#[test]
fn a_job_is_paused_and_resumed_once() {
    let mut play = Play::with_mirror(none());
    assert_eq!(play.device("block-job-pause"), "m0:paused {}");
    let job = play.query("query-block-jobs")[0].take();
    assert_eq!(
        (&job["paused"], &job["busy"], &job["status"]),
        (&json!(true), &json!(false), &json!("paused"))
    );
    assert_eq!(play.id("job-pause"), "Job is already paused");
    assert_eq!(play.device("block-job-cancel"), "The block job for device 'm0' is currently paused");
    assert_eq!(play.id("job-resume"), "m0:running {}");
    assert_eq!(play.device("block-job-resume"), "Can't resume a job that was not paused");
    assert_eq!(play.orders(), ["0 Pause", "0 Resume"]);
    assert_eq!(play.hear(Report::Ready), "m0:ready READY(0/0)");
    assert_eq!(play.id("job-pause"), "m0:standby {}");
    assert_eq!(play.id("job-complete"), "{}");
    assert_eq!(play.id("job-resume"), "m0:ready {}");
    assert_eq!(play.orders(), ["0 Pause", "0 Resume", "0 Quiesce"]);
}

#[test]
fn a_completion_at_the_wrong_time_is_refused() {
    let mut play = Play::with_mirror(none());
    let refusal = "Job 'm0' in state 'running' cannot accept command verb 'complete'";
    assert_eq!(play.device("block-job-complete"), refusal);
    assert_eq!(play.id("job-complete"), refusal);
    assert_eq!(play.id("job-finalize"), "Job 'm0' in state 'running' cannot accept command verb 'finalize'");
    assert_eq!(
        play.id("block-job-dismiss"),
        "Job 'm0' in state 'running' cannot accept command verb 'dismiss'"
    );
    play.hear(Report::Ready);
    assert_eq!(play.device("block-job-complete"), "{}");
    assert_eq!(play.device("block-job-complete"), "The active block job 'm0' cannot be completed");
    play.hear(Report::Quiesced);
    let gone = play.raw("block-job-complete", json!({"device": "m0"})).remove(0);
    assert_eq!(gone["error"], json!({"class": "DeviceNotActive", "desc": "Block job 'm0' not found"}));
    let gone = play.raw("job-complete", json!({"id": "m0"})).remove(0);
    assert_eq!(gone["error"], json!({"class": "GenericError", "desc": "Job not found"}));
}

const TWO_PHASES: fn() -> Value = || json!({"auto-finalize": false, "auto-dismiss": false});

#[test]
fn two_phases_wait_for_the_client_and_finalize_returns_when_the_switch_has_happened() {
    let mut play = Play::ready(TWO_PHASES());
    play.device("block-job-complete");
    assert_eq!(play.hear(Report::Quiesced), "m0:waiting m0:pending PENDING(m0)");
    assert!(play.is_source());
    assert_eq!(play.id("job-finalize"), "COMPLETED(10/10) m0:concluded {}");
    assert!(play.is_target());
    assert_eq!(play.hear(Report::Switched), "");
    let job = play.query("query-jobs")[0].take();
    assert_eq!(
        job,
        json!({"id": "m0", "type": "mirror", "status": "concluded", "current-progress": 10, "total-progress": 10})
    );
    // The disk is free for another one; the name is not.
    play.image("u", SIZE);
    play.add("u");
    assert_eq!(play.mirror(json!({"target": "u"})), "Job ID 'm0' already in use");
    assert_eq!(play.id("job-dismiss"), "m0:null {}");
    assert_eq!(play.mirror(json!({"target": "u"})), "m0:created m0:running {}");
}

#[test]
fn a_cancel_in_pending_keeps_the_source_and_says_why_it_ended() {
    let mut play = Play::ready(TWO_PHASES());
    play.device("block-job-complete");
    play.hear(Report::Quiesced);
    assert_eq!(play.id("job-cancel"), "m0:aborting {}");
    assert_eq!(play.hear(Report::Detached), "CANCELLED(10/10) m0:concluded");
    assert!(play.is_source());
    assert_eq!(play.query("query-jobs")[0]["error"], "Operation canceled");
    assert_eq!(play.id("block-job-dismiss"), "m0:null {}");
}

#[test]
fn a_soft_cancel_in_two_phases_keeps_the_copy_and_finalize_waits_for_it() {
    let mut play = Play::ready(TWO_PHASES());
    play.device("block-job-cancel");
    assert_eq!(play.hear(Report::Quiesced), "m0:waiting m0:pending PENDING(m0)");
    assert_eq!(play.id("block-job-finalize"), "COMPLETED(10/10) m0:concluded {}");
    assert!(play.is_source());
    assert_eq!(play.hear(Report::Detached), "");
}

#[test]
fn a_switch_that_fails_or_is_late_is_no_switch() {
    let mut play = Play::ready(none());
    play.device("block-job-complete");
    play.lab.vm.disks.fail_end(NotDone::Refused("The mirror is not finished".into()));
    assert_eq!(play.hear(Report::Quiesced), "m0:waiting m0:pending m0:aborting");
    assert_eq!(
        play.hear(Report::Detached),
        "COMPLETED(10/10, The mirror is not finished) m0:concluded m0:null"
    );
    assert!(play.is_source());
    let mut play = Play::ready(TWO_PHASES());
    play.device("block-job-complete");
    play.hear(Report::Quiesced);
    play.lab.vm.disks.fail_end(NotDone::Late("no answer".into()));
    assert_eq!(play.id("job-finalize"), "{}");
    assert_eq!(play.id("job-cancel"), "Job 'm0' in state 'pending' cannot accept command verb 'cancel'");
    assert_eq!(play.hear(Report::Switched), "COMPLETED(10/10) m0:concluded");
}

#[test]
fn errors_of_the_target_follow_the_policy() {
    let mut play = Play::with_mirror(json!({"on-target-error": "enospc"}));
    assert_eq!(play.lab.vm.disks.options().on_target_error, block::OnError::Enospc);
    let error = |action, nospace| Report::Error { is_read: false, action, nospace };
    assert_eq!(play.hear(error(Action::Stop, true)), "ERROR(write,stop) m0:paused");
    let job = play.query("query-block-jobs")[0].take();
    assert_eq!((&job["io-status"], &job["status"]), (&json!("nospace"), &json!("paused")));
    assert_eq!(play.device("block-job-resume"), "m0:running {}");
    assert_eq!(play.hear(error(Action::Ignore, false)), "ERROR(write,ignore)");
    assert_eq!(play.hear(error(Action::Report, false)), "ERROR(write,report)");
    assert_eq!(play.hear(Report::Failed("Input/output error".into())), "m0:aborting");
    assert_eq!(play.hear(Report::Detached), "COMPLETED(0/0, Input/output error) m0:concluded m0:null");
    assert!(play.is_source());
}

#[test]
fn images_of_different_size_fail_the_job_after_the_reply() {
    for size in [SIZE - 512, SIZE + 512, 0] {
        let mut play = Play::new();
        play.image("t", size);
        play.add("t");
        assert_eq!(play.mirror(none()), "m0:created m0:running {}");
        let failed =
            "m0:aborting COMPLETED(0/0, Source and target image have different sizes) m0:concluded m0:null";
        assert_eq!(play.settle(), failed);
        assert!(play.orders().is_empty());
        assert_eq!(play.ask("blockdev-del", json!({"node-name": "t"})), "{}");
    }
}

#[test]
fn arguments_are_refused_with_qemus_words_and_nothing_happens() {
    let mut play = Play::with_target();
    for (more, text) in [
        (json!({"granularity": 511}), "Parameter 'granularity' expects a value in range [512B, 64MB]"),
        (json!({"granularity": 128 << 20}), "Parameter 'granularity' expects a value in range [512B, 64MB]"),
        (json!({"granularity": 65537}), "Parameter 'granularity' expects a power of 2"),
        (json!({"granularity": -1}), "Parameter 'granularity' expects uint32"),
        (json!({"sync": "incremental"}), "Sync mode 'incremental' not supported"),
        (json!({"sync": "bitmap"}), "Sync mode 'bitmap' not supported"),
        (json!({"sync": "zzz"}), "Parameter 'sync' does not accept value 'zzz'"),
        (json!({"buf-size": -1}), "Invalid parameter 'buf-size'"),
        (json!({"target": "#block001"}), "Can't mirror node into itself"),
        (
            json!({"target": "#block002"}),
            "Node '#block002' is busy: block device is in use by a disk of the guest",
        ),
        (json!({"target": "none"}), "Cannot find device='none' nor node-name='none'"),
        (json!({"device": "none"}), "Cannot find device='none' nor node-name='none'"),
        (json!({"device": "t"}), "Node 't' is not the node of a disk of the guest"),
        (json!({"job-id": "1bad id"}), "Invalid job ID '1bad id'"),
        (json!({"speed": -1}), "Parameter 'speed' expects a non-negative value"),
        (json!({"speed": "x"}), "Invalid parameter type for 'speed', expected: integer"),
        (json!({"replaces": "none"}), "Failed to find node with node-name='none'"),
        (json!({"copy-mode": "fast"}), "Parameter 'copy-mode' does not accept value 'fast'"),
        (json!({"format": "raw"}), "Parameter 'format' is unexpected"),
    ] {
        assert_eq!(play.mirror(more.clone()), text, "{more}");
    }
    play.lab.vm.disks.refuse_start(NotDone::Refused("no".into()));
    assert_eq!(play.mirror(none()), "no");
    assert!(play.orders().is_empty() && play.is_source());
    assert_eq!(play.query("query-jobs"), json!([]));
    assert_eq!(play.mirror(json!({"granularity": 512, "buf-size": 65536})), "m0:created m0:running {}");
    let options = play.lab.vm.disks.options();
    assert_eq!((options.granularity, options.buf_size), (512, 65536));
}

#[test]
fn a_disk_has_one_mirror_and_a_target_one_source() {
    let mut play = Play::with_mirror(none());
    assert_eq!(play.mirror(json!({"job-id": "m1"})), "Need a root block node");
    assert_eq!(play.mirror(json!({"job-id": "m1", "device": "#block001"})), "Need a root block node");
    assert_eq!(
        play.mirror(json!({"job-id": "m1", "device": "disk1"})),
        "Node 't' is busy: block device is in use by block job: mirror"
    );
    play.image("u", SIZE);
    play.add("u");
    assert_eq!(
        play.mirror(json!({"job-id": "m0", "device": "disk1", "target": "u"})),
        "Job ID 'm0' already in use"
    );
    // Without a name of its own it has the disk's.
    let second = json!({"device": "disk1", "target": "u", "sync": "none"});
    assert_eq!(play.ask("blockdev-mirror", second), "disk1:created disk1:running {}");
    assert_eq!(play.query("query-jobs")[0]["id"], "disk1");
    assert_eq!(
        play.ask("block_resize", json!({"device": "disk0", "size": 512})),
        "Node '#block001' is busy: block device is in use by block job: mirror"
    );
}

#[test]
fn the_speed_is_limited_at_once_and_shown() {
    let mut play = Play::with_mirror(none());
    let set = |play: &mut Play, speed: i64| {
        play.ask("block-job-set-speed", json!({"device": "m0", "speed": speed}))
    };
    assert_eq!(set(&mut play, 1 << 20), "{}");
    assert_eq!(set(&mut play, -1), "Parameter 'speed' expects a non-negative value");
    assert_eq!(play.orders(), ["0 SetSpeed(1048576)"]);
    assert_eq!(play.query("query-block-jobs")[0]["speed"], 1 << 20);
}

#[test]
fn the_copy_mode_changes_one_way() {
    let mut play = Play::with_mirror(none());
    let change = |play: &mut Play, mode: &str| {
        play.ask("block-job-change", json!({"id": "m0", "type": "mirror", "copy-mode": mode}))
    };
    assert_eq!(change(&mut play, "background"), "{}");
    assert_eq!(change(&mut play, "write-blocking"), "{}");
    assert_eq!(change(&mut play, "background"), "Change to copy mode 'background' is not implemented");
    assert_eq!(play.orders(), ["0 SetMode(WriteBlocking)"]);
    assert_eq!(play.ask("block-job-change", json!({"id": "x", "type": "create"})), "Block job 'x' not found");
}

#[test]
fn what_is_asked_about_jobs_has_every_member_that_qemu_has() {
    let mut play = Play::ready(json!({"speed": 7}));
    assert_eq!(
        play.query("query-block-jobs"),
        json!([{
            "type": "mirror", "device": "m0", "len": 10, "offset": 10, "busy": true, "paused": false, "speed": 7,
            "io-status": "ok", "ready": true, "status": "ready", "auto-finalize": true, "auto-dismiss": true,
            "actively-synced": true,
        }])
    );
    for name in ["query-block-jobs", "query-jobs", "query-block", "query-named-block-nodes"] {
        conforms(&play.query(name), &commands::find(name).unwrap().returns).unwrap();
    }
}

#[test]
fn quit_tells_of_the_shutdown_and_then_of_the_end_of_each_job() {
    let mut running = Play::with_mirror(none());
    assert_eq!(running.ask("quit", none()), "SHUTDOWN m0:aborting CANCELLED(0/0) m0:concluded m0:null {}");
    let mut ready = Play::ready(none());
    assert_eq!(ready.ask("quit", none()), "SHUTDOWN m0:aborting CANCELLED(10/10) m0:concluded m0:null {}");
    let mut pending = Play::ready(TWO_PHASES());
    pending.device("block-job-complete");
    pending.hear(Report::Quiesced);
    assert_eq!(pending.ask("quit", none()), "SHUTDOWN m0:aborting CANCELLED(10/10) m0:concluded m0:null {}");
    assert!(pending.is_source());
    let mut leaving = Play::ready(none());
    leaving.id("job-cancel");
    assert_eq!(leaving.ask("quit", none()), "SHUTDOWN CANCELLED(10/10) m0:concluded m0:null {}");
    assert_eq!(leaving.hear(Report::Detached), "");
}

#[test]
fn nodes_are_added_listed_and_deleted() {
    let mut play = Play::with_target();
    play.image("u", 1024);
    assert_eq!(play.add("t"), "Duplicate nodes with node-name='t'");
    let add = |play: &mut Play, name: &str| {
        let filename = play.path("u");
        play.ask("blockdev-add", json!({"driver": "file", "node-name": name, "filename": filename}))
    };
    assert_eq!(add(&mut play, "0bad"), "Invalid node-name: '0bad'");
    assert_eq!(add(&mut play, "disk1"), "node-name=disk1 is conflicting with a device id");
    assert_eq!(add(&mut play, &"n".repeat(32)), "Node name too long");
    assert_eq!(add(&mut play, "u"), "{}");
    let nameless = json!({"driver": "file", "filename": "/x"});
    assert_eq!(play.ask("blockdev-add", nameless), "'node-name' must be specified for the root node");
    let qcow2 = json!({"driver": "qcow2", "node-name": "q"});
    assert_eq!(play.ask("blockdev-add", qcow2), "Parameter 'driver' does not accept value 'qcow2'");
    let missing = json!({"driver": "file", "node-name": "v", "filename": "/none"});
    assert_eq!(play.ask("blockdev-add", missing), "Could not open '/none': No such file or directory");
    let fdset = json!({"driver": "file", "node-name": "v", "filename": "/dev/fdset/7"});
    assert_eq!(play.ask("blockdev-add", fdset), "Could not open '/dev/fdset/7': No such file or directory");

    let nodes = play.query("query-named-block-nodes");
    let names: Vec<_> = nodes.as_array().unwrap().iter().map(|node| &node["node-name"]).collect();
    assert_eq!(names, ["u", "t", "#block002", "#block001"]);
    assert_eq!((&nodes[0]["drv"], &nodes[0]["image"]["virtual-size"]), (&json!("file"), &json!(1024)));
    assert_eq!(nodes[3]["cache"], json!({"writeback": true, "direct": true, "no-flush": false}));

    let del = |play: &mut Play, name: &str| play.ask("blockdev-del", json!({"node-name": name}));
    assert_eq!(del(&mut play, "none"), "Failed to find node with node-name='none'");
    assert_eq!(del(&mut play, "#block001"), "Node #block001 is in use");
    assert_eq!(del(&mut play, "u"), "{}");
    assert_eq!(add(&mut play, "u"), "{}");
}

#[test]
fn a_node_that_cannot_be_written_is_no_target() {
    let mut play = Play::new();
    play.image("t", SIZE);
    let filename = play.path("t");
    let file = json!({"driver": "file", "filename": filename});
    let add = json!({"driver": "raw", "node-name": "t", "read-only": true, "file": file});
    assert_eq!(play.ask("blockdev-add", add), "{}");
    assert_eq!(play.mirror(none()), "Block node is read-only");
}

#[test]
fn a_descriptor_that_was_handed_in_is_a_node_again_after_its_mirror() {
    let mut play = Play::new();
    play.image("t", SIZE);
    let file = std::fs::File::options().read(true).write(true).open(play.path("t")).unwrap();
    let request = br#"{"execute":"add-fd","arguments":{"fdset-id":3}}"#;
    play.client.stream.send_with_fd(&request[..], file.as_fd().as_raw_fd()).unwrap();
    play.lab.turn();
    assert_eq!(play.client.messages().len(), 1);
    let add = json!({"driver": "file", "node-name": "t", "filename": "/dev/fdset/3"});
    assert_eq!(play.ask("blockdev-add", add), "{}");
    play.raw("remove-fd", json!({"fdset-id": 3}));
    for _ in 0..2 {
        assert_eq!(play.mirror(none()), "m0:created m0:running {}");
        play.id("job-cancel");
        play.hear(Report::Detached);
    }
    play.mirror(none());
    play.hear(Report::Ready);
    play.id("job-complete");
    play.hear(Report::Quiesced);
    assert_eq!(play.inserted(), ("t".into(), "/dev/fdset/3".into()));
}

#[test]
fn an_image_is_created_in_a_job_that_stays_until_it_is_dismissed() {
    let mut play = Play::new();
    let create = |play: &mut Play, name: &str, more: Value| {
        let mut options = json!({"driver": "file", "filename": play.path(name), "size": SIZE});
        for (name, value) in more.as_object().unwrap() {
            options[name] = value.clone();
        }
        play.ask("blockdev-create", json!({"job-id": "c", "options": options}))
    };
    assert_eq!(create(&mut play, "new", json!({"preallocation": "full"})), "c:created c:running {}");
    assert_eq!(play.done(), "c:waiting c:pending c:concluded");
    assert_eq!(std::fs::metadata(play.path("new")).unwrap().len(), SIZE);
    assert_eq!(play.query("query-block-jobs"), json!([]));
    assert_eq!(play.query("query-jobs")[0]["type"], "create");
    assert_eq!(create(&mut play, "new", none()), "Job ID 'c' already in use");
    assert_eq!(play.ask("block-job-dismiss", json!({"id": "c"})), "Block job 'c' not found");
    assert_eq!(play.ask("job-dismiss", json!({"id": "c"})), "c:null {}");
    assert_eq!(create(&mut play, "no/where", none()), "c:created c:running {}");
    assert_eq!(play.done(), "c:aborting c:concluded");
    let error = play.query("query-jobs")[0]["error"].take();
    assert!(error.as_str().unwrap().ends_with("No such file or directory"), "{error}");
    play.ask("job-dismiss", json!({"id": "c"}));
    let driver = json!({"driver": "qcow2"});
    assert_eq!(create(&mut play, "x", driver), "Parameter 'options.driver' does not accept value 'qcow2'");
    assert_eq!(create(&mut play, "new", none()), "c:created c:running {}");
    let quit = play.ask("quit", none());
    assert_eq!(quit, "SHUTDOWN c:aborting c:concluded c:null {}");
}

#[test]
fn drive_mirror_makes_its_target_or_takes_one_that_is_there() {
    let mut play = Play::new();
    let (path, other) = (play.path("new"), play.path("other"));
    let mirror = |play: &mut Play, more: Value| {
        let mut arguments = json!({"job-id": "m0", "device": "disk0", "target": path, "sync": "full"});
        for (name, value) in more.as_object().unwrap() {
            arguments[name] = value.clone();
        }
        play.ask("drive-mirror", arguments)
    };
    assert_eq!(mirror(&mut play, json!({"format": "qcow2"})), "Unknown file format 'qcow2'");
    assert_eq!(
        mirror(&mut play, json!({"granularity": 1})),
        "Parameter 'granularity' expects a value in range [512B, 64MB]"
    );
    assert!(!path.exists());
    let missing = format!("Could not open '{}': No such file or directory", path.display());
    assert_eq!(mirror(&mut play, json!({"mode": "existing"})), missing);
    assert_eq!(mirror(&mut play, json!({"unmap": false})), "m0:created m0:running {}");
    assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE);
    let options = play.lab.vm.disks.options();
    assert!(options.target_is_zero && !options.unmap);
    play.id("job-cancel");
    play.hear(Report::Detached);
    // Nobody has added its node: it is gone.
    assert_eq!(play.query("query-named-block-nodes").as_array().unwrap().len(), 2);
    let named = json!({"mode": "existing", "node-name": "n", "format": "raw"});
    assert_eq!(mirror(&mut play, named), "m0:created m0:running {}");
    assert!(!play.lab.vm.disks.options().target_is_zero);
    play.hear(Report::Ready);
    play.id("job-complete");
    play.hear(Report::Quiesced);
    play.hear(Report::Switched);
    assert_eq!(play.inserted().0, "n");
    assert_eq!(mirror(&mut play, json!({"target": other})), "m0:created m0:running {}");
}
