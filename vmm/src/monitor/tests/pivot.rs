//! Pivots through the monitor, over disks that do what they are told on paper and a witness on a real disk.

#![expect(clippy::needless_pass_by_value, reason = "arguments are written where they are used")]

use std::path::PathBuf;

use coordinator::record::witness::{Verdict, Witness};

use super::jobs::Play;
use super::*;
use crate::jobs::disks::NotDone;
use crate::jobs::lifecycle::{Action, Report};
use crate::jobs::testing::SIZE;

const ONE: &str = "00000000-0000-0000-0000-000000000001";
const TWO: &str = "00000000-0000-0000-0000-000000000002";

/// What becomes of the jobs of a disk that pivots.
const PIVOTED: &str = "COMPLETED(10/10) m0:concluded m0:null PIVOT:pivoted";

/// A mirror of disk0 that is ready, and a client that pivots it.
fn pivoting(more: Value) -> (Play, String) {
    let mut play = Play::ready(json!({}));
    let said = pivot(&mut play, more);
    (play, said)
}

fn with(mut arguments: Value, more: Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        arguments[name] = value.clone();
    }
    arguments
}

fn pivot(play: &mut Play, more: Value) -> String {
    play.ask("tarn-pivot", with(json!({"op": ONE, "gen": 1, "job": "m0"}), more))
}

fn witness(play: &Play) -> PathBuf {
    let path = play.path("witness");
    Witness::create(&path).unwrap();
    path
}

fn verdict(path: &std::path::Path) -> Option<Verdict> {
    Witness::open(path).unwrap().read().unwrap().map(|decision| decision.verdict)
}

/// What the client is told once its answer is there.
fn answered(play: &mut Play) -> String {
    let told = play.told();
    for (session, result) in play.lab.vm.jobs.take_answers() {
        let result = result.map(|info| pivot_info(&info));
        play.lab.complete(SessionId(session), result);
    }
    [told, super::jobs::shown(&play.client.messages())].join(" ").trim().to_owned()
}

fn hears(play: &mut Play, disk: usize, report: Report) -> String {
    let vm = &mut play.lab.vm;
    vm.jobs.hear(&vm.disks, disk, report);
    answered(play)
}

fn scribe_is_done(play: &mut Play) -> String {
    let vm = &mut play.lab.vm;
    let done = vm.done.recv_timeout(std::time::Duration::from_secs(60)).unwrap();
    vm.jobs.done(&vm.disks, done);
    answered(play)
}

/// What another client is told.
fn another(play: &mut Play, command: &str, arguments: Value) -> Value {
    let mut client = play.lab.client();
    play.lab.ask(&mut client, &json!({"execute": command, "arguments": arguments}))
}

fn query(play: &mut Play) -> Value {
    another(play, "tarn-query-pivot", json!({"op": ONE}))["return"].take()
}

#[test]
fn a_disk_pivots_once_its_witness_is_durable() {
    let mut play = Play::ready(json!({}));
    let path = witness(&play);
    assert_eq!(pivot(&mut play, json!({"witness": path})), "PIVOT:draining");
    assert_eq!(play.orders(), ["0 Quiesce"]);
    assert_eq!(query(&mut play)["state"], "draining");
    assert_eq!(hears(&mut play, 0, Report::Quiesced), "m0:waiting m0:pending PENDING(m0) PIVOT:held");
    assert!(play.orders().is_empty(), "switched before the decision was durable");
    assert_eq!(scribe_is_done(&mut play), format!("{PIVOTED} pivoted"));
    assert_eq!(play.orders(), ["0 Switch"]);
    assert!(play.is_target());
    assert_eq!(verdict(&path), Some(Verdict::Pivoted));
    let details = Witness::open(&path).unwrap().read().unwrap().unwrap().details;
    let target = play.path("t");
    assert_eq!(details, json!({"disks": [{"device": "disk0", "source": "/images/a.raw", "target": target}]}));
    let expected = json!({
        "op": ONE, "gen": 1, "epoch": 0, "state": "pivoted", "witness": "durable", "held-us": 70,
        "disks": [{"device": "disk0", "job": "m0", "source": "/images/a.raw", "target": target}],
    });
    assert_eq!(query(&mut play), expected);
    conforms(&expected, &commands::find("tarn-query-pivot").unwrap().returns).unwrap();
    // Asked again, also by somebody who has not heard: the same answer, and nothing done.
    assert_eq!(pivot(&mut play, json!({})), "pivoted");
    assert_eq!(another(&mut play, "tarn-pivot", json!({"op": ONE, "gen": 1}))["return"], expected);
    let late = play.ask("tarn-pivot-abort", json!({"op": ONE, "gen": 1}));
    assert_eq!(late, format!("Operation {ONE} is pivoted, it cannot be aborted"));
}

#[test]
fn two_disks_pivot_together_and_a_client_that_comes_later_hears_of_it_too() {
    let mut play = Play::ready(json!({}));
    play.image("u", SIZE);
    play.add("u");
    play.mirror(json!({"job-id": "m1", "device": "disk1", "target": "u"}));
    assert_eq!(hears(&mut play, 1, Report::Ready), "m1:ready READY(10/10)");
    let asked = json!({"op": ONE, "gen": 1, "jobs": ["m0", "m1"]});
    play.client.send(&json!({"execute": "tarn-pivot", "arguments": asked}).to_string());
    play.lab.turn();
    let mut late = play.lab.client();
    late.send(&json!({"execute": "tarn-pivot", "arguments": {"op": ONE, "gen": 1}}).to_string());
    play.lab.turn();
    assert_eq!(answered(&mut play), "PIVOT:draining");
    hears(&mut play, 1, Report::Quiesced);
    assert_eq!(play.orders(), ["0 Quiesce", "1 Quiesce"]);
    hears(&mut play, 0, Report::Quiesced);
    assert_eq!(play.orders(), ["0 Switch", "1 Switch"]);
    let messages = late.messages();
    assert_eq!(messages.last().unwrap()["return"]["state"], "pivoted", "{messages:?}");
    assert_eq!(query(&mut play)["disks"].as_array().unwrap().len(), 2);
}

#[test]
fn one_that_fails_keeps_the_others_on_their_sources() {
    let mut play = Play::ready(json!({}));
    play.image("u", SIZE);
    play.add("u");
    play.mirror(json!({"job-id": "m1", "device": "disk1", "target": "u"}));
    hears(&mut play, 1, Report::Ready);
    let asked = json!({"op": ONE, "gen": 1, "jobs": ["m0", "m1"]});
    play.ask("tarn-pivot", asked);
    hears(&mut play, 0, Report::Quiesced);
    let told = hears(&mut play, 1, Report::Failed("Input/output error".into()));
    assert_eq!(told, "m1:aborting m0:aborting");
    assert_eq!(play.orders(), ["0 Quiesce", "1 Quiesce", "1 Detach", "0 Detach"]);
    hears(&mut play, 1, Report::Detached);
    let error = "Disk 'disk1': Input/output error";
    assert_eq!(
        hears(&mut play, 0, Report::Detached),
        format!("CANCELLED(10/10) m0:concluded m0:null PIVOT:aborted Operation {ONE} was aborted: {error}")
    );
    assert!(play.is_source());
    let info = query(&mut play);
    assert_eq!((&info["state"], &info["error"]), (&json!("aborted"), &json!(error)));
}

#[test]
fn a_mirror_that_stops_at_an_error_does_not_hold_the_guest() {
    let (mut play, _) = pivoting(json!({}));
    hears(&mut play, 0, Report::Error { is_read: false, action: Action::Stop, nospace: true });
    assert_eq!(play.orders(), ["0 Quiesce", "0 Detach"]);
    let told = hears(&mut play, 0, Report::Detached);
    assert!(told.ends_with("was aborted: Disk 'disk0': No space left on device"), "{told}");
}

#[test]
fn an_abort_in_time_leaves_the_disk_on_its_source() {
    let (mut play, _) = pivoting(json!({}));
    let mut other = play.lab.client();
    other.send(&json!({"execute": "tarn-pivot-abort", "arguments": {"op": ONE, "gen": 1}}).to_string());
    play.lab.turn();
    assert_eq!(play.orders(), ["0 Quiesce", "0 Detach"]);
    let told = hears(&mut play, 0, Report::Detached);
    assert!(told.ends_with(&format!("Operation {ONE} was aborted: It was aborted by a client")), "{told}");
    assert_eq!(other.messages().last().unwrap()["return"]["state"], "aborted");
    assert!(play.is_source());
    // What was aborted before it came does not begin.
    let told = play.ask("tarn-pivot-abort", json!({"op": TWO, "gen": 1}));
    assert_eq!(told, "aborted");
    let late = play.ask("tarn-pivot", json!({"op": TWO, "gen": 1, "job": "m0"}));
    assert_eq!(late, format!("Operation {TWO} was aborted: It was aborted before it began"));
}

#[test]
fn a_witness_that_cannot_be_written_is_revoked_or_holds_the_guest() {
    let mut play = Play::ready(json!({}));
    let path = witness(&play);
    assert_eq!(pivot(&mut play, json!({"witness": path})), "PIVOT:draining");
    // Somebody writes over it, and nothing can be written to what is none.
    std::fs::write(&path, "my only copy").unwrap();
    hears(&mut play, 0, Report::Quiesced);
    // The revocation may be tried before anybody has heard of the first failure.
    let told = [scribe_is_done(&mut play), scribe_is_done(&mut play)].concat();
    assert!(told.starts_with(&format!("PIVOT:undetermined Operation {ONE} is undetermined: ")), "{told}");
    assert!(told.contains(&format!("({} is no witness", path.display())), "{told}");
    assert_eq!(play.orders(), ["0 Quiesce"], "guest I/O goes on");
    let info = query(&mut play);
    assert_eq!((&info["state"], &info["witness"]), (&json!("undetermined"), &json!("failed")));
    // Its job obeys nobody else meanwhile.
    for command in ["block-job-cancel", "block-job-complete", "block-job-pause", "block-job-finalize"] {
        let member = if command == "block-job-finalize" { "id" } else { "device" };
        let told = play.ask(command, json!({member: "m0"}));
        let text =
            format!("Job 'm0' is part of operation {ONE}, which is in progress; 'tarn-pivot-abort' ends it");
        assert_eq!(told, text);
    }
    play.client.send(&json!({"execute": "tarn-pivot-abort", "arguments": {"op": ONE, "gen": 1}}).to_string());
    play.lab.turn();
    assert_eq!(play.orders(), ["0 Detach"]);
    let told = hears(&mut play, 0, Report::Detached);
    assert!(told.ends_with("PIVOT:aborted aborted"), "{told}");
}

#[test]
fn a_switch_that_is_refused_after_the_decision_does_not_let_the_guest_go_on() {
    let (mut play, _) = pivoting(json!({}));
    play.lab.vm.disks.fail_end(NotDone::Refused("the disk is gone".into()));
    hears(&mut play, 0, Report::Quiesced);
    assert_eq!(play.orders(), ["0 Quiesce", "0 Switch"], "nothing takes the decision back");
    assert_eq!(query(&mut play)["state"], "held");
    // One that is only late.
    let told = hears(&mut play, 0, Report::Switched);
    assert_eq!(told, format!("{PIVOTED} pivoted"));
}

#[test]
fn the_end_of_the_vm_decides_an_operation_first() {
    // Not drained yet: the source stays.
    let mut play = Play::ready(json!({}));
    let path = witness(&play);
    pivot(&mut play, json!({"witness": path}));
    let vm = &mut play.lab.vm;
    assert!(!vm.jobs.conclude_pivot(&vm.disks));
    vm.jobs.end_all(&vm.disks);
    let told = answered(&mut play);
    assert!(told.ends_with("was aborted: The VM ended"), "{told}");
    assert_eq!(verdict(&path), None);
    // The decision is under way: it is waited for, and carried out.
    let mut play = Play::ready(json!({}));
    let path = witness(&play);
    pivot(&mut play, json!({"witness": path}));
    hears(&mut play, 0, Report::Quiesced);
    let vm = &mut play.lab.vm;
    assert!(!vm.jobs.conclude_pivot(&vm.disks));
    assert_eq!(answered(&mut play), format!("{PIVOTED} pivoted"));
    assert_eq!(verdict(&path), Some(Verdict::Pivoted));
    assert!(play.is_target());
}

#[test]
fn what_cannot_be_begun_is_refused_and_changes_nothing() {
    let mut play = Play::with_mirror(json!({}));
    let refused = |play: &mut Play, more: Value, text: &str| assert_eq!(pivot(play, more), text);
    let running = "Job 'm0' in state 'running' cannot accept command verb 'complete'";
    refused(&mut play, json!({}), running);
    refused(&mut play, json!({"job": "nope"}), "Block job 'nope' not found");
    refused(&mut play, json!({"op": "nonsense"}), "Parameter 'op' expects a UUID");
    refused(&mut play, json!({"gen": 0}), "Parameter 'gen' expects a positive value");
    refused(&mut play, json!({"epoch": -1}), "Parameter 'epoch' expects a non-negative value");
    let arguments = json!({"op": ONE, "gen": 1});
    assert_eq!(play.ask("tarn-pivot", arguments), "Parameter 'jobs' expects 1 to 16 jobs");
    play.hear(Report::Ready);
    refused(&mut play, json!({"jobs": ["m0"]}), "Job 'm0' is named twice");
    let missing = "Cannot open the witness /nowhere/w: No such file or directory (os error 2)";
    refused(&mut play, json!({"witness": "/nowhere/w"}), missing);
    refused(&mut play, json!({"witness": "w"}), "File descriptor named 'w' has not been found");
    let memory = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    let text = format!(
        "Cannot keep the witness {} on a filesystem in memory, which does not survive a crash of this machine",
        memory.path().display()
    );
    refused(&mut play, json!({"witness": memory.path()}), &text);
    std::fs::write(play.path("precious"), "my only copy").unwrap();
    let text = format!("{} is no witness: Record with a wrong checksum", play.path("precious").display());
    let precious = play.path("precious");
    refused(&mut play, json!({"witness": precious}), &text);
    assert!(play.orders().is_empty());
    assert!(play.is_source());
    assert_eq!(query(&mut play)["state"], "none");
    assert_eq!(play.ask("tarn-query-pivot", json!({})), "There was no operation yet");
}

#[test]
fn an_operation_in_progress_an_old_generation_and_a_former_coordinator_are_refused() {
    let (mut play, _) = pivoting(json!({"gen": 7, "epoch": 3}));
    let other = another(&mut play, "tarn-pivot", json!({"op": TWO, "gen": 8, "epoch": 3, "job": "m0"}));
    let text =
        format!("Job 'm0' is part of operation {ONE}, which is in progress; 'tarn-pivot-abort' ends it");
    assert_eq!(other["error"]["desc"], text);
    let other = another(&mut play, "tarn-pivot", json!({"op": ONE, "gen": 8, "epoch": 3}));
    assert_eq!(other["error"]["desc"], format!("Operation {ONE} is of generation 7, not 8"));
    let zombie = another(&mut play, "tarn-pivot-abort", json!({"op": ONE, "gen": 7, "epoch": 2}));
    let text = "Epoch 2 is older than 3: another coordinator has taken over";
    assert_eq!(zombie["error"]["desc"], text);
    hears(&mut play, 0, Report::Quiesced);
    play.add("back");
    assert!(play.is_target());
    play.image("back", SIZE);
    play.add("back");
    play.mirror(json!({"device": "t", "target": "back"}));
    hears(&mut play, 0, Report::Switched);
    hears(&mut play, 0, Report::Ready);
    let old = pivot(&mut play, json!({"op": TWO, "gen": 7, "epoch": 3}));
    assert_eq!(old, "Generation 7 is not newer than 7, which this VM has seen");
    assert_eq!(pivot(&mut play, json!({"op": TWO, "gen": 8, "epoch": 3})), "PIVOT:draining");
}

#[test]
fn a_job_that_is_pending_already_pivots_and_one_that_keeps_its_source_does_not() {
    let mut play = Play::ready(json!({"auto-finalize": false}));
    play.device("block-job-complete");
    play.hear(Report::Quiesced);
    let path = witness(&play);
    assert_eq!(pivot(&mut play, json!({"witness": path})), "PIVOT:draining PIVOT:held");
    assert_eq!(scribe_is_done(&mut play), format!("{PIVOTED} pivoted"));
    let mut play = Play::ready(json!({}));
    play.device("block-job-cancel");
    let text = "The active block job 'm0' cannot be completed";
    assert_eq!(pivot(&mut play, json!({})), text);
}

#[test]
fn the_proposal_of_2012_names_the_image() {
    let mut play = Play::ready(json!({}));
    let path = witness(&play);
    let target = play.path("t");
    let reopen = |more| with(json!({"device": "disk0", "new-image-file": target}), more);
    let elsewhere = play.ask("drive-reopen", reopen(json!({"new-image-file": "/other"})));
    let text = "Disk 'disk0' is not mirrored to '/other': only an image that holds what the disk holds can replace it";
    assert_eq!(elsewhere, text);
    assert_eq!(play.ask("drive-reopen", reopen(json!({"device": "nope"}))), "Device 'nope' not found");
    assert_eq!(play.ask("drive-reopen", reopen(json!({"witness": path}))), "PIVOT:draining");
    hears(&mut play, 0, Report::Quiesced);
    assert_eq!(scribe_is_done(&mut play), format!("{PIVOTED} pivoted"));
    assert!(play.is_target());
}

#[test]
fn a_pause_belongs_to_who_asked_for_it() {
    let mut play = Play::new();
    assert_eq!(play.ask("stop", json!({"tarn-op": ONE})), "STOP {}");
    let status = play.query("tarn-query-status");
    assert_eq!(status, json!({"status": "paused", "running": false, "paused-by": [ONE]}));
    let text = format!(
        "The VM is paused by operation {ONE}, which lets it go on when it is done; 'cont' with 'tarn-force': true does so now"
    );
    assert_eq!(play.ask("cont", json!({})), text);
    assert_eq!(play.ask("cont", json!({"tarn-op": TWO})), "{}");
    assert_eq!(play.query("query-status")["status"], "paused");
    assert_eq!(play.ask("cont", json!({"tarn-op": ONE})), "RESUME {}");
    assert_eq!(play.ask("cont", json!({"tarn-op": ONE})), "{}");
    // A user's own pause is older, and stays.
    play.ask("stop", json!({}));
    play.ask("stop", json!({"tarn-op": ONE}));
    assert_eq!(play.query("tarn-query-status")["paused-by"], json!(["user", ONE]));
    assert_eq!(play.ask("cont", json!({"tarn-op": ONE})), "{}");
    assert_eq!(play.query("query-status")["status"], "paused");
    play.ask("stop", json!({"tarn-op": ONE}));
    assert_eq!(play.ask("cont", json!({"tarn-force": true})), "RESUME {}");
    assert_eq!(play.query("tarn-query-status")["paused-by"], json!([]));
    assert_eq!(play.ask("stop", json!({"tarn-op": "x"})), "Parameter 'tarn-op' expects a UUID");
}

#[test]
fn a_client_that_leaves_changes_nothing_about_its_operation() {
    // At each of its steps: draining, held, over.
    for leaves_at in 0..3 {
        let mut play = Play::ready(json!({}));
        let path = witness(&play);
        pivot(&mut play, json!({"witness": path}));
        for step in 0..3 {
            if step == leaves_at {
                play.client = play.lab.client();
            }
            match step {
                0 => drop(hears(&mut play, 0, Report::Quiesced)),
                1 => drop(scribe_is_done(&mut play)),
                _ => {}
            }
        }
        assert_eq!(query(&mut play)["state"], "pivoted", "left at {leaves_at}");
        assert!(play.is_target());
        assert_eq!(verdict(&path), Some(Verdict::Pivoted));
    }
}

#[test]
fn a_descriptor_that_a_decision_could_not_be_written_to_is_refused() {
    let mut play = Play::ready(json!({}));
    let path = witness(&play);
    let mut options = std::fs::File::options();
    let opened = [options.read(true).open(&path).unwrap(), options.append(true).open(&path).unwrap()];
    for file in opened {
        play.client.stream.send_with_fd(b" ".as_slice(), file.as_raw_fd()).unwrap();
        play.lab.turn();
        assert_eq!(play.ask("getfd", json!({"fdname": "w"})), "{}");
        let told = pivot(&mut play, json!({"witness": "w"}));
        assert_eq!(
            told,
            "Cannot use the witness w: It has to be open for reading and writing, and not for appending"
        );
    }
    assert!(play.orders().is_empty());
}

#[test]
fn nothing_is_held_without_end() {
    let later = || Instant::now() + std::time::Duration::from_secs(61);
    // A disk for another that does not come to rest.
    let mut play = Play::ready(json!({}));
    play.image("u", SIZE);
    play.add("u");
    play.mirror(json!({"job-id": "m1", "device": "disk1", "target": "u"}));
    hears(&mut play, 1, Report::Ready);
    play.ask("tarn-pivot", json!({"op": ONE, "gen": 1, "jobs": ["m0", "m1"]}));
    assert_eq!(play.lab.vm.jobs.next_deadline(), None, "nobody is held yet");
    hears(&mut play, 0, Report::Quiesced);
    assert!(play.lab.vm.jobs.next_deadline().is_some());
    let vm = &mut play.lab.vm;
    vm.jobs.tick(&vm.disks, Instant::now());
    assert_eq!(play.orders(), ["0 Quiesce", "1 Quiesce"]);
    let vm = &mut play.lab.vm;
    vm.jobs.tick(&vm.disks, later());
    assert_eq!(play.orders(), ["0 Detach", "1 Detach"]);
    // All, for a witness: somebody else may decide then.
    let mut play = Play::ready(json!({}));
    let path = witness(&play);
    pivot(&mut play, json!({"witness": path}));
    hears(&mut play, 0, Report::Quiesced);
    let vm = &mut play.lab.vm;
    vm.jobs.tick(&vm.disks, later());
    let told = answered(&mut play);
    assert!(told.contains("PIVOT:undetermined") && told.contains("(Guest I/O was held for 60 s)"), "{told}");
    assert_eq!(query(&mut play)["state"], "undetermined");
    play.client.send(&json!({"execute": "tarn-pivot-abort", "arguments": {"op": ONE, "gen": 1}}).to_string());
    play.lab.turn();
    assert_eq!(play.orders(), ["0 Quiesce", "0 Detach"]);
}
