//! Backups and transactions through the monitor, over disks that do what they are told on paper.

#![expect(clippy::needless_pass_by_value, reason = "arguments are written where they are used")]

use super::jobs::Play;
use super::*;
use crate::jobs::disks::NotDone;
use crate::jobs::lifecycle::{Action, Report};
use crate::jobs::testing::SIZE;

/// With nodes `t` and `u` that disks can be saved to.
fn play() -> Play {
    let mut play = Play::with_target();
    play.image("u", SIZE);
    assert_eq!(play.add("u"), "{}");
    play
}

/// With a backup `b0` of disk0 to node `t`.
fn with_backup(more: Value) -> Play {
    let mut play = play();
    assert_eq!(backup(&mut play, more), "b0:created b0:running {}");
    play.lab.vm.disks.progress(5, 10);
    play
}

fn arguments(more: Value) -> Value {
    let mut arguments = json!({"job-id": "b0", "device": "disk0", "target": "t", "sync": "full"});
    for (name, value) in more.as_object().unwrap() {
        arguments[name] = value.clone();
    }
    arguments
}

fn backup(play: &mut Play, more: Value) -> String {
    play.ask("blockdev-backup", arguments(more))
}

fn none() -> Value {
    json!({})
}

/// Of disk0 and disk1, as `b0` and `b1`.
fn both(more: Value) -> Value {
    let second = json!({"job-id": "b1", "device": "disk1", "target": "u"});
    let (mut first, mut second) = (arguments(more.clone()), arguments(second));
    for (name, value) in more.as_object().unwrap() {
        (first[name], second[name]) = (value.clone(), value.clone());
    }
    json!([{"type": "blockdev-backup", "data": first}, {"type": "blockdev-backup", "data": second}])
}

fn transact(play: &mut Play, actions: Value, mode: &str) -> String {
    play.ask("transaction", json!({"actions": actions, "properties": {"completion-mode": mode}}))
}

fn grouped(more: Value) -> Play {
    let mut play = play();
    let started = "b0:created b1:created b0:running b1:running {}";
    assert_eq!(transact(&mut play, both(more), "grouped"), started);
    play
}

#[test]
fn a_backup_ends_by_itself_when_it_is_complete() {
    let mut play = with_backup(json!({"speed": 7, "on-target-error": "stop", "on-source-error": "auto"}));
    let options = play.lab.vm.disks.options();
    assert_eq!((options.speed, options.sync), (7, block::MirrorSync::Full));
    assert_eq!(options.on_target_error, block::OnError::Stop);
    assert_eq!(options.on_source_error, block::OnError::Enospc);
    assert_eq!(play.lab.vm.disks.moments(), ["attach 0"]);
    assert_eq!(
        play.query("query-block-jobs"),
        json!([{
            "type": "backup", "device": "b0", "len": 10, "offset": 5, "busy": true, "paused": false, "speed": 7,
            "io-status": "ok", "ready": false, "status": "running", "auto-finalize": true, "auto-dismiss": true,
        }])
    );
    conforms(&play.query("query-block-jobs"), &commands::find("query-block-jobs").unwrap().returns).unwrap();
    let job = json!([{
        "id": "b0", "type": "backup", "status": "running", "current-progress": 5, "total-progress": 10,
    }]);
    assert_eq!(play.query("query-jobs"), job);
    play.lab.vm.disks.progress(10, 10);
    assert_eq!(play.hear(Report::Ready), "b0:waiting b0:pending");
    assert_eq!(play.orders(), ["0 Detach"]);
    assert_eq!(play.hear(Report::Detached), "COMPLETED(10/10) b0:concluded b0:null");
    // The target is a node again.
    assert_eq!(play.ask("blockdev-del", json!({"node-name": "t"})), "{}");
    assert_eq!(play.query("query-block-jobs"), json!([]));
}

#[test]
fn a_backup_waits_for_its_client_if_it_is_to() {
    let phases = json!({"auto-finalize": false, "auto-dismiss": false});
    let mut play = with_backup(phases.clone());
    assert_eq!(play.hear(Report::Ready), "b0:waiting b0:pending PENDING(b0)");
    assert!(play.orders().is_empty());
    assert_eq!(play.id("job-finalize"), "Job not found");
    let refused = "Job 'b0' in state 'pending' cannot accept command verb 'complete'";
    assert_eq!(play.ask("job-complete", json!({"id": "b0"})), refused);
    assert_eq!(play.ask("job-finalize", json!({"id": "b0"})), "COMPLETED(5/10) b0:concluded {}");
    assert_eq!(play.hear(Report::Detached), "");
    assert_eq!(play.ask("job-dismiss", json!({"id": "b0"})), "b0:null {}");
    let mut play = with_backup(phases);
    play.hear(Report::Ready);
    assert_eq!(play.ask("block-job-cancel", json!({"device": "b0"})), "b0:aborting {}");
    assert_eq!(play.hear(Report::Detached), "CANCELLED(5/10) b0:concluded");
    assert_eq!(play.query("query-jobs")[0]["error"], "Operation canceled");
}

#[test]
fn a_backup_is_paused_slowed_down_and_cancelled() {
    let mut play = with_backup(none());
    let ask = |play: &mut Play, command: &str, more: Value| {
        let mut arguments = json!({"device": "b0"});
        for (name, value) in more.as_object().unwrap() {
            arguments[name] = value.clone();
        }
        play.ask(command, arguments)
    };
    assert_eq!(ask(&mut play, "block-job-set-speed", json!({"speed": 100})), "{}");
    assert_eq!(ask(&mut play, "block-job-pause", none()), "b0:paused {}");
    let paused = "The block job for device 'b0' is currently paused";
    assert_eq!(ask(&mut play, "block-job-cancel", none()), paused);
    assert_eq!(ask(&mut play, "block-job-resume", none()), "b0:running {}");
    let complete = "Job 'b0' in state 'running' cannot accept command verb 'complete'";
    assert_eq!(ask(&mut play, "block-job-complete", none()), complete);
    let change = json!({"id": "b0", "type": "mirror", "copy-mode": "background"});
    assert_eq!(play.ask("block-job-change", change), "Job type does not support change");
    assert_eq!(play.orders(), ["0 SetSpeed(100)", "0 Pause", "0 Resume"]);
    ask(&mut play, "block-job-pause", none());
    assert_eq!(ask(&mut play, "block-job-cancel", json!({"force": true})), "b0:running b0:aborting {}");
    // It was complete at that moment.
    assert_eq!(play.hear(Report::Ready), "");
    assert_eq!(play.hear(Report::Detached), "CANCELLED(5/10) b0:concluded b0:null");
    // So was this one, when it was paused.
    assert_eq!(backup(&mut play, none()), "b0:created b0:running {}");
    ask(&mut play, "block-job-pause", none());
    assert_eq!(play.hear(Report::Ready), "b0:running b0:waiting b0:pending");
}

#[test]
fn what_is_to_be_expected_is_told_while_it_is_known() {
    use std::time::Duration;
    let expected = |play: &mut Play| {
        let jobs = play.query("query-block-jobs");
        conforms(&jobs, &commands::find("query-block-jobs").unwrap().returns).unwrap();
        ["tarn-remaining-ms", "tarn-expected-hold-us"].map(|name| jobs[0].get(name).and_then(Value::as_i64))
    };
    let mut saved = with_backup(none());
    assert_eq!(expected(&mut saved), [None, None]);
    saved.lab.vm.disks.expect(Some(Duration::from_micros(1_500_000)), Some(Duration::from_micros(2300)));
    assert_eq!(expected(&mut saved), [Some(1500), None]);
    saved.ask("job-pause", json!({"id": "b0"}));
    assert_eq!(expected(&mut saved), [None, None]);
    let mut mirrored = Play::with_target();
    mirrored.ask("blockdev-mirror", arguments(none()));
    mirrored.lab.vm.disks.expect(Some(Duration::MAX), Some(Duration::from_micros(2300)));
    assert_eq!(expected(&mut mirrored), [Some(i64::MAX), Some(2300)]);
    mirrored.lab.vm.disks.expect(None, None);
    assert_eq!(expected(&mut mirrored), [None, None]);
}

#[test]
fn errors_of_a_backup_follow_the_policy() {
    let mut play = with_backup(json!({"on-target-error": "enospc"}));
    let error = |action, nospace| Report::Error { is_read: false, action, nospace };
    assert_eq!(play.hear(error(Action::Stop, true)), "ERROR(write,stop) b0:paused");
    assert_eq!(play.query("query-block-jobs")[0]["io-status"], "nospace");
    assert_eq!(play.ask("job-resume", json!({"id": "b0"})), "b0:running {}");
    assert_eq!(play.hear(error(Action::Report, false)), "ERROR(write,report)");
    assert_eq!(play.hear(Report::Failed("Input/output error".into())), "b0:aborting");
    assert_eq!(play.hear(Report::Detached), "COMPLETED(5/10, Input/output error) b0:concluded b0:null");
}

#[test]
fn a_backup_is_refused_with_qemus_words_and_nothing_happens() {
    let mut play = play();
    play.image("small", SIZE / 2);
    play.add("small");
    let sizes = "Source and target image have different sizes";
    for (more, text) in [
        (json!({"device": "none", "target": "nor"}), "Cannot find device='none' nor node-name='none'"),
        (json!({"target": "none", "sync": "bitmap"}), "Cannot find device='none' nor node-name='none'"),
        (json!({"device": "t"}), "Node 't' is not the node of a disk of the guest"),
        (json!({"target": "#block001"}), "Source and target cannot be the same"),
        (json!({"target": "disk0", "speed": -1}), "Source and target cannot be the same"),
        (
            json!({"target": "disk1"}),
            "Node '#block002' is busy: block device is in use by a disk of the guest",
        ),
        (json!({"target": "small", "job-id": "1bad"}), sizes),
        (json!({"job-id": "1bad", "speed": -1}), "Invalid job ID '1bad'"),
        (json!({"speed": -1}), "Parameter 'speed' expects a non-negative value"),
        (
            json!({"sync": "incremental", "target": "disk0"}),
            "must provide a valid bitmap name for 'incremental' sync mode",
        ),
        (json!({"sync": "bitmap"}), "must provide a valid bitmap name for 'bitmap' sync mode"),
        (json!({"sync": "bitmap", "bitmap": "zz", "target": "small"}), "Bitmap 'zz' could not be found"),
        (json!({"bitmap": "zz", "bitmap-mode": "never"}), "Bitmap 'zz' could not be found"),
        (json!({"bitmap-mode": "always"}), "Cannot specify bitmap sync mode without a bitmap"),
        (
            json!({"sync": "incremental", "bitmap": "zz", "bitmap-mode": "always"}),
            "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
        ),
        (json!({"compress": true, "target": "small"}), "Compression is not supported for this drive "),
        (
            json!({"filter-node-name": "0bad", "job-id": "1bad"}),
            "Could not create node: Invalid node-name: '0bad'",
        ),
        (json!({"filter-node-name": "t"}), "Could not create node: Duplicate nodes with node-name='t'"),
        (json!({"sync": "zzz"}), "Parameter 'sync' does not accept value 'zzz'"),
        (json!({"format": "raw"}), "Parameter 'format' is unexpected"),
    ] {
        assert_eq!(backup(&mut play, more.clone()), text, "{more}");
    }
    assert!(play.lab.vm.disks.moments().is_empty());
    play.lab.vm.disks.refuse_start(NotDone::Refused("no".into()));
    assert_eq!(backup(&mut play, none()), "b0:created b0:aborting b0:concluded b0:null no");
    assert!(play.orders().is_empty());
    assert_eq!(play.query("query-jobs"), json!([]));
    assert_eq!(backup(&mut play, json!({"filter-node-name": "filter"})), "b0:created b0:running {}");
    let busy = "Node 'disk0' is busy: block device is in use by block job: backup";
    assert_eq!(backup(&mut play, json!({"job-id": "b1", "target": "u"})), busy);
    let busy = "Node 't' is busy: block device is in use by block job: backup";
    assert_eq!(backup(&mut play, json!({"job-id": "b1", "device": "disk1"})), busy);
    let mirror = json!({"device": "disk0", "target": "u", "sync": "full"});
    assert_eq!(play.ask("blockdev-mirror", mirror), "Need a root block node");
    assert_eq!(
        play.ask("block_resize", json!({"device": "disk0", "size": 512})),
        "Node '#block001' is busy: block device is in use by block job: backup"
    );
    assert_eq!(play.ask("quit", none()), "SHUTDOWN b0:aborting CANCELLED(0/0) b0:concluded b0:null {}");
}

#[test]
fn a_backup_of_changes_alone_is_asked_for() {
    for (sync, copied) in [("none", block::MirrorSync::None), ("top", block::MirrorSync::Full)] {
        let play = with_backup(json!({"sync": sync, "job-id": "b0"}));
        assert_eq!(play.lab.vm.disks.options().sync, copied);
    }
    let mut play = Play::with_target();
    let nameless = json!({"device": "#block001", "target": "t", "sync": "full"});
    assert_eq!(play.ask("blockdev-backup", nameless), "disk0:created disk0:running {}");
}

#[test]
fn drive_backup_makes_its_target_or_takes_one_that_is_there() {
    let mut play = Play::new();
    let path = play.path("new");
    let ask = |play: &mut Play, more: Value| {
        let mut arguments = arguments(more);
        arguments["target"] = json!(path);
        play.ask("drive-backup", arguments)
    };
    assert_eq!(ask(&mut play, json!({"format": "zzz"})), "Unknown file format 'zzz'");
    assert_eq!(ask(&mut play, json!({"format": "zzz", "mode": "existing"})), "Unknown driver 'zzz'");
    assert_eq!(ask(&mut play, json!({"sync": "none"})), "Backing file not supported for file format 'raw'");
    assert_eq!(ask(&mut play, json!({"job-id": "1bad"})), "Invalid job ID '1bad'");
    assert_eq!(ask(&mut play, json!({"node-name": "n"})), "Parameter 'node-name' is unexpected");
    assert!(!path.exists());
    let missing = format!("Could not open '{}': No such file or directory", path.display());
    assert_eq!(ask(&mut play, json!({"mode": "existing"})), missing);
    assert_eq!(ask(&mut play, none()), "b0:created b0:running {}");
    assert!(play.lab.vm.disks.options().target_is_zero);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE);
    play.hear(Report::Ready);
    play.hear(Report::Detached);
    // Nobody has added its node: it is gone.
    assert_eq!(play.query("query-named-block-nodes").as_array().unwrap().len(), 2);
    assert_eq!(ask(&mut play, json!({"mode": "existing", "sync": "none"})), "b0:created b0:running {}");
    assert!(!play.lab.vm.disks.options().target_is_zero);
    play.ask("job-cancel", json!({"id": "b0"}));
    play.hear(Report::Detached);
    std::fs::File::create(&path).unwrap().set_len(512).unwrap();
    let sizes = "Source and target image have different sizes";
    assert_eq!(ask(&mut play, json!({"mode": "existing", "format": "raw"})), sizes);
    assert_eq!(play.query("query-named-block-nodes").as_array().unwrap().len(), 2);
}

#[test]
fn backups_of_a_transaction_begin_at_one_moment() {
    let mut play = play();
    let started = "b0:created b1:created b0:running b1:running {}";
    assert_eq!(transact(&mut play, both(none()), "individual"), started);
    assert_eq!(play.lab.vm.disks.moments(), ["hold [0, 1]", "attach 0", "attach 1", "let go"]);
    // Each ends for itself.
    assert_eq!(play.hear_of(1, Report::Ready), "b1:waiting b1:pending");
    assert_eq!(play.hear_of(1, Report::Detached), "COMPLETED(0/0) b1:concluded b1:null");
    assert_eq!(play.ask("job-cancel", json!({"id": "b0"})), "b0:aborting {}");
    assert_eq!(play.hear(Report::Detached), "CANCELLED(0/0) b0:concluded b0:null");
    assert_eq!(play.ask("transaction", json!({"actions": []})), "{}");
}

#[test]
fn a_transaction_happens_as_a_whole_or_not_at_all() {
    let mut play = play();
    let first = || both(none())[0].take();
    let path = play.path("new");
    let drive = json!({"type": "drive-backup", "data": arguments(json!({"target": path}))});
    let abort = json!({"type": "abort", "data": {}});
    let other = |more: Value| {
        let mut other = both(none())[1].take();
        for (name, value) in more.as_object().unwrap() {
            other["data"][name] = value.clone();
        }
        other
    };
    let aborted = "Transaction aborted using Abort action";
    let gone = |text: &str| format!("b0:created b0:aborting b0:concluded b0:null {text}");
    for (actions, text) in [
        (json!([abort]), aborted.to_owned()),
        (json!([abort, first()]), aborted.to_owned()),
        (json!([first(), abort]), gone(aborted)),
        (json!([drive, abort]), gone(aborted)),
        (
            json!([first(), other(json!({"target": "none"}))]),
            gone("Cannot find device='none' nor node-name='none'"),
        ),
        (json!([first(), other(json!({"job-id": "b0"}))]), gone("Job ID 'b0' already in use")),
        (
            json!([first(), other(json!({"target": "t"}))]),
            gone("Node 't' is busy: block device is in use by block job: backup"),
        ),
        (
            json!([first(), other(json!({"device": "disk0"}))]),
            gone("Node 'disk0' is busy: block device is in use by block job: backup"),
        ),
        (json!([{"type": "blockdev-backup"}]), "Parameter 'actions[0].data' is missing".to_owned()),
        (
            json!([first(), other(json!({"zz": 1}))]),
            "Parameter 'actions[1].data.zz' is unexpected".to_owned(),
        ),
    ] {
        for mode in ["individual", "grouped"] {
            assert_eq!(transact(&mut play, actions.clone(), mode), text, "{actions}");
            assert!(play.lab.vm.disks.moments().is_empty());
            assert_eq!(play.query("query-jobs"), json!([]));
        }
    }
    assert_eq!(play.query("query-named-block-nodes").as_array().unwrap().len(), 4);
    let mode = "Parameter 'properties.completion-mode' does not accept value 'zz'";
    assert_eq!(transact(&mut play, json!([]), "zz"), mode);
}

#[test]
fn a_backup_that_has_begun_is_taken_back_when_another_does_not() {
    let mut play = play();
    play.lab.vm.disks.refuse_backup(1, NotDone::Refused("no".into()));
    let undone = "b0:created b1:created b1:aborting b1:concluded b1:null b0:aborting b0:concluded b0:null no";
    assert_eq!(transact(&mut play, both(none()), "individual"), undone);
    assert_eq!(play.lab.vm.disks.moments(), ["hold [0, 1]", "attach 0", "attach 1", "let go"]);
    assert_eq!(play.orders(), ["0 Detach"]);
    // What the disk has to tell of it is old.
    assert_eq!(
        transact(&mut play, both(none()), "individual"),
        "b0:created b1:created b0:running b1:running {}"
    );
    assert_eq!(play.hear(Report::Ready), "");
    assert_eq!(play.hear(Report::Detached), "");
    assert_eq!(play.hear(Report::Ready), "b0:waiting b0:pending");
}

#[test]
fn jobs_of_a_group_succeed_together() {
    let mut play = grouped(none());
    assert_eq!(play.hear(Report::Ready), "b0:waiting");
    assert!(play.orders().is_empty());
    assert_eq!(play.query("query-jobs")[1]["status"], "waiting");
    let together = "b1:waiting b1:pending b0:pending \
                    COMPLETED(0/0) b1:concluded b1:null COMPLETED(0/0) b0:concluded b0:null";
    assert_eq!(play.hear_of(1, Report::Ready), together);
    assert_eq!(play.orders(), ["1 Detach", "0 Detach"]);
    assert_eq!(play.hear_of(0, Report::Detached), "");
    assert_eq!(play.hear_of(1, Report::Detached), "");
    // One that waits for its client has the others wait.
    let mut play = grouped(json!({"auto-finalize": false}));
    play.hear(Report::Ready);
    let pending = "b1:waiting b1:pending PENDING(b1) b0:pending PENDING(b0)";
    assert_eq!(play.hear_of(1, Report::Ready), pending);
    let done = "COMPLETED(0/0) b1:concluded b1:null COMPLETED(0/0) b0:concluded b0:null {}";
    assert_eq!(play.ask("job-finalize", json!({"id": "b0"})), done);
    let mut play = play_alone();
    assert_eq!(play.hear(Report::Ready), "b0:waiting b0:pending COMPLETED(0/0) b0:concluded b0:null");
}

fn play_alone() -> Play {
    let mut play = play();
    let alone = json!([both(none())[0].take()]);
    assert_eq!(transact(&mut play, alone, "grouped"), "b0:created b0:running {}");
    play
}

#[test]
fn jobs_of_a_group_fail_together() {
    let mut play = grouped(none());
    assert_eq!(play.ask("job-cancel", json!({"id": "b0"})), "b0:aborting b1:aborting {}");
    assert_eq!(play.hear_of(1, Report::Detached), "CANCELLED(0/0) b1:concluded b1:null");
    assert_eq!(play.hear_of(0, Report::Detached), "CANCELLED(0/0) b0:concluded b0:null");

    let mut play = grouped(none());
    play.hear_of(1, Report::Ready);
    play.ask("job-pause", json!({"id": "b0"}));
    assert_eq!(play.ask("job-cancel", json!({"id": "b1"})), "b1:aborting b0:running b0:aborting {}");

    let mut play = grouped(json!({"auto-finalize": false, "auto-dismiss": false}));
    play.hear(Report::Ready);
    let failed = play.hear_of(1, Report::Failed("Input/output error".into()));
    assert_eq!(failed, "b1:aborting b0:aborting");
    assert_eq!(play.hear(Report::Detached), "CANCELLED(0/0) b0:concluded");
    let reason = "COMPLETED(0/0, Input/output error) b1:concluded";
    assert_eq!(play.hear_of(1, Report::Detached), reason);
    assert_eq!(play.orders(), ["1 Detach", "0 Detach"]);

    let mut play = grouped(none());
    let quit = "SHUTDOWN b0:aborting b1:aborting CANCELLED(0/0) b0:concluded b0:null \
                CANCELLED(0/0) b1:concluded b1:null {}";
    assert_eq!(play.ask("quit", none()), quit);
}
