//! The broker against an agent that answers simple questions beside its work.

use std::time::Duration;

use protocol::{Error, Item};
use serde_json::{Value, json};

use super::super::Client;
use super::broker::{A, B, Lab, M, SECOND, failed, info};
use super::{Wire, marked_reply, reply};

const C: Client = Client::Socket(3);
/// What an agent that answers out of band has.
const ABLE: &[&str] = &["guest-ping", "tarn-fsfreeze-report"];

fn able() -> Lab {
    let lab = Lab::with_agent(ABLE);
    assert_eq!(lab.broker.status(lab.now).out_of_band, Some(true));
    lab
}

impl Lab {
    /// The question that was asked out of band, which must be the only thing sent, and its id.
    fn question(&mut self) -> (String, Value) {
        let sent = self.sent();
        assert_eq!(sent.len(), 1, "{sent:?}");
        assert!(sent[0].get("execute").is_none());
        (sent[0]["exec-oob"].as_str().unwrap().to_owned(), sent[0]["id"].clone())
    }

    fn answer(&mut self, id: &Value, value: &Value) {
        self.say(format!("{}\n", json!({"return": value, "id": id})).as_bytes());
    }
}

fn returned(value: Value) -> Option<Result<Value, String>> {
    Some(Ok(value))
}

#[test]
fn questions_overtake_the_command_in_flight() {
    let mut lab = able();
    lab.ask(A, "guest-fsfreeze-freeze", json!({"tarn-lease-ms": 5000}));
    let freeze = json!({"execute": "guest-fsfreeze-freeze", "arguments": {"tarn-lease-ms": 5000}});
    assert_eq!(lab.sent(), [freeze], "the lease is the agent's business");
    for (name, value) in [
        ("guest-ping", json!({})),
        ("guest-info", info(ABLE)),
        ("guest-sync", json!(5)),
        ("guest-fsfreeze-status", json!("thawed")),
        ("tarn-fsfreeze-report", json!({"filesystems": []})),
    ] {
        let arguments = if name == "guest-sync" { json!({"id": 5}) } else { json!({}) };
        lab.ask(B, name, arguments);
        let (asked, id) = lab.question();
        assert_eq!(asked, name);
        lab.answer(&id, &value);
        assert_eq!(lab.outcomes(), [(B, returned(value))]);
    }
    lab.ask(B, "guest-sync-delimited", json!({"id": 77}));
    let sent = lab.sent();
    assert_eq!(sent[0]["arguments"], json!({"id": 77}));
    lab.say(b"\xff");
    lab.answer(&sent[0]["id"], &json!(77));
    assert_eq!(lab.outcomes(), [(B, returned(json!(77)))]);
    lab.ask(B, "guest-get-fsinfo", json!({}));
    assert!(lab.sent().is_empty(), "what takes work waits");
    lab.say(&reply(&json!(2)));
    assert_eq!(lab.outcomes(), [(A, returned(json!(2)))]);
    assert_eq!(lab.command(), "guest-get-fsinfo");
    assert_eq!(lab.broker.status(lab.now).malformed_replies, 0);
}

#[test]
fn answers_come_in_any_order_and_each_goes_to_who_asked() {
    let mut lab = able();
    lab.ask(A, "guest-exec", json!({"path": "x"}));
    lab.sent();
    lab.ask(B, "guest-sync", json!({"id": 1}));
    lab.ask(C, "guest-sync", json!({"id": 2}));
    lab.ask(M, "guest-ping", json!({}));
    let sent = lab.sent();
    let id = |index: usize| sent[index]["id"].clone();
    lab.answer(&id(1), &json!(2));
    lab.say(&reply(&json!({"pid": 9})));
    lab.say(
        format!("{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"no\"}}, \"id\": {}}}", id(2))
            .as_bytes(),
    );
    lab.answer(&id(0), &json!(1));
    let expected = [
        (C, returned(json!(2))),
        (A, returned(json!({"pid": 9}))),
        (M, failed("no")),
        (B, returned(json!(1))),
    ];
    assert_eq!(lab.outcomes(), expected);
    assert!(lab.broker.status(lab.now).in_sync);
}

#[test]
fn what_the_agent_can_do_is_asked_once_and_only_when_somebody_may_have_to_wait() {
    let mut lab = Lab::new();
    lab.broker.port_opened(lab.now);
    lab.answer_sync();
    assert!(lab.sent().is_empty());
    lab.ask(A, "guest-ping", json!({}));
    assert_eq!(lab.sent(), [json!({"execute": "guest-ping"})]);
    lab.say(&reply(&json!({})));
    assert_eq!(lab.broker.status(lab.now).out_of_band, None);
    lab.outcomes();
    lab.ask(A, "guest-exec", json!({}));
    lab.ask(B, "guest-ping", json!({}));
    assert_eq!(lab.command(), "guest-info");
    lab.say(&reply(&info(ABLE)));
    let sent = lab.sent();
    let names: Vec<_> =
        sent.iter().map(|sent| sent.get("execute").or(sent.get("exec-oob")).unwrap()).collect();
    assert_eq!(names, ["guest-ping", "guest-exec"]);
    lab.answer(&sent[0]["id"], &json!({}));
    lab.say(&reply(&json!({"pid": 1})));
    assert_eq!(lab.outcomes().len(), 2);
    lab.ask(A, "guest-exec", json!({}));
    assert_eq!(lab.command(), "guest-exec");
    // Another agent may open the port next.
    lab.broker.port_closed(lab.now);
    lab.broker.port_opened(lab.now);
    lab.answer_sync();
    lab.ask(A, "guest-exec", json!({}));
    assert_eq!(lab.command(), "guest-info");
    lab.say(&reply(&info(&["guest-exec"])));
    assert_eq!(lab.command(), "guest-exec");
    lab.ask(B, "guest-ping", json!({}));
    assert!(lab.sent().is_empty());
    lab.say(&reply(&json!({"pid": 1})));
    assert_eq!(lab.sent(), [json!({"execute": "guest-ping"})]);
}

#[test]
fn an_agent_that_does_not_tell_what_it_can_do_is_served_as_one_that_cannot() {
    let refusal = json!({"error": {"class": "CommandNotFound", "desc": "disabled"}}).to_string();
    let replies =
        [refusal.into_bytes(), reply(&json!(7)), reply(&json!({"supported_commands": [{}, 1, null]}))];
    for reply in replies {
        let mut lab = Lab::new();
        lab.broker.port_opened(lab.now);
        lab.answer_sync();
        lab.ask(A, "guest-exec", json!({}));
        assert_eq!(lab.command(), "guest-info");
        lab.say(&reply);
        assert_eq!(lab.command(), "guest-exec");
        assert_eq!(lab.broker.status(lab.now).out_of_band, Some(false));
    }
    let mut lab = Lab::new();
    lab.broker.port_opened(lab.now);
    lab.answer_sync();
    lab.ask(A, "guest-exec", json!({}));
    assert_eq!(lab.command(), "guest-info");
    lab.pass(30 * SECOND);
    lab.answer_sync();
    assert_eq!(lab.command(), "guest-exec");
}

#[test]
fn an_answer_with_a_strange_id_answers_nothing_and_leaves_the_broker_in_step() {
    let mut lab = able();
    lab.ask(B, "guest-ping", json!({}));
    let (_, id) = lab.question();
    lab.answer(&id, &json!({}));
    assert_eq!(lab.outcomes().len(), 1);
    lab.answer(&id, &json!({"again": true}));
    lab.answer(&json!(5), &json!({}));
    lab.answer(&json!({"a": "b"}), &json!({}));
    lab.ask(A, "guest-exec", json!({}));
    assert_eq!(lab.command(), "guest-exec");
    lab.answer(&id, &json!({"again": true}));
    lab.say(
        format!("{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"no\"}}, \"id\": {id}}}").as_bytes(),
    );
    assert!(lab.outcomes().is_empty());
    assert_eq!(lab.broker.status(lab.now).malformed_replies, 5);
    lab.say(&reply(&json!({"pid": 1})));
    assert_eq!(lab.outcomes(), [(A, returned(json!({"pid": 1})))]);
    // What bears the right id but is no reply leaves the question open.
    lab.ask(A, "guest-exec", json!({}));
    lab.sent();
    lab.ask(B, "guest-ping", json!({}));
    let (_, id) = lab.question();
    lab.say(format!("{{\"event\": \"X\", \"id\": {id}}} {{\"id\": {id}}}").as_bytes());
    assert!(lab.outcomes().is_empty());
    lab.answer(&id, &json!({}));
    assert_eq!(lab.outcomes(), [(B, returned(json!({})))]);
}

#[test]
fn an_agent_that_claims_to_answer_and_does_not_has_to_show_it_again() {
    let mut lab = able();
    lab.ask(A, "guest-fsfreeze-freeze", json!({}));
    lab.sent();
    lab.ask(B, "guest-ping", json!({}));
    let (_, id) = lab.question();
    lab.pass(60 * SECOND);
    assert_eq!(lab.outcomes(), [(B, failed("Guest agent did not answer 'guest-ping' in time"))]);
    assert_eq!(lab.broker.status(lab.now).out_of_band, None);
    lab.ask(B, "guest-ping", json!({}));
    assert!(lab.sent().is_empty(), "the freeze goes on undisturbed");
    lab.answer(&id, &json!({"late": true}));
    lab.say(&reply(&json!(1)));
    assert_eq!(lab.outcomes(), [(A, returned(json!(1)))]);
    assert_eq!(lab.command(), "guest-ping");
    lab.say(&reply(&json!({})));
    assert_eq!(lab.outcomes(), [(B, returned(json!({})))]);
    lab.ask(A, "guest-fsfreeze-thaw", json!({}));
    assert_eq!(lab.command(), "guest-info");
}

#[test]
fn questions_that_are_lost_are_asked_again_in_turn() {
    // The broker gets in step again.
    let mut lab = able();
    lab.ask(A, "guest-exec", json!({}));
    lab.sent();
    lab.pass(30 * SECOND);
    lab.ask(B, "guest-ping", json!({}));
    let (_, id) = lab.question();
    lab.pass(30 * SECOND);
    assert_eq!(lab.outcomes(), [(A, failed("Guest agent did not answer 'guest-exec' in time"))]);
    lab.answer(&id, &json!({"while": "syncing"}));
    lab.answer_sync();
    assert_eq!(lab.command(), "guest-ping");
    lab.answer(&id, &json!({"late": true}));
    assert!(lab.outcomes().is_empty());
    lab.say(&reply(&json!({})));
    assert_eq!(lab.outcomes(), [(B, returned(json!({})))]);
    // The agent dies, and its successor is asked.
    lab.ask(B, "guest-sync", json!({"id": 3}));
    lab.question();
    lab.broker.port_closed(lab.now);
    assert!(lab.outcomes().is_empty());
    lab.pass(20 * SECOND);
    lab.broker.port_opened(lab.now);
    lab.answer_sync();
    assert_eq!(lab.command(), "guest-info");
    lab.say(&reply(&info(&[])));
    assert_eq!(lab.command(), "guest-sync");
    lab.say(&reply(&json!(3)));
    assert_eq!(lab.outcomes(), [(B, returned(json!(3)))]);
    // It dies and has none.
    lab.broker.port_closed(lab.now);
    lab.ask(B, "guest-ping", json!({}));
    lab.pass(30 * SECOND);
    assert_eq!(lab.outcomes(), [(B, failed("Guest agent is not connected"))]);
}

#[test]
fn a_question_behind_half_a_command_does_not_hide_that_only_half_was_sent() {
    let mut lab = able();
    lab.ask(A, "guest-exec", json!({"path": "x"}));
    lab.broker.sent_to_guest(5);
    lab.ask(B, "guest-ping", json!({}));
    lab.say(&reply(&json!({"pid": 1})));
    assert_eq!(lab.broker.to_guest()[0], 0xFF);
    lab.wire = Wire::new();
    lab.answer_sync();
    assert_eq!(lab.command(), "guest-ping");
    // A command that was sent as a whole is answered although a question behind it was not.
    let mut lab = able();
    lab.ask(A, "guest-exec", json!({"path": "x"}));
    let length = lab.broker.to_guest().len();
    lab.ask(B, "guest-ping", json!({}));
    lab.broker.sent_to_guest(length + 5);
    lab.say(&reply(&json!({"pid": 1})));
    lab.ask(A, "guest-exec", json!({"path": "y"}));
    let rest = lab.broker.to_guest().to_vec();
    assert!(lab.broker.status(lab.now).in_sync);
    assert_eq!(Wire::new().items(&rest[rest.len() - 20..]).len(), 1, "{rest:?}");
}

#[test]
fn clients_that_ask_and_leave_cannot_fill_a_guest_that_takes_nothing() {
    let mut lab = able();
    for number in 0..10_000 {
        let client = Client::Socket(100 + number);
        lab.ask(client, "guest-sync", json!({"id": 5, "pad": "x".repeat(3000)}));
        lab.broker.client_gone(client, true, lab.now);
    }
    assert!(lab.broker.to_guest().len() < 128 << 10);
    lab.ask(A, "guest-ping", json!({"pad": "x".repeat(1 << 20)}));
    lab.ask(B, "guest-ping", json!({}));
    lab.pass(60 * SECOND);
    assert!(matches!(&lab.outcomes()[..], [(A, Some(Err(_)))]), "too long to overtake, so in turn");
    assert_eq!(lab.broker.status(lab.now).out_of_band, None);
    lab.pass(30 * SECOND);
    assert_eq!(lab.outcomes(), [(B, failed("Guest agent is not responding"))]);
}

#[test]
fn many_questions_are_asked_a_few_at_a_time_and_never_in_turn() {
    let mut lab = able();
    for number in 0..40 {
        lab.ask(Client::Socket(100 + number), "guest-ping", json!({}));
    }
    let mut answered = 0;
    while answered < 40 {
        let sent = lab.sent();
        assert!(!sent.is_empty() && sent.len() <= 16);
        for question in sent {
            lab.answer(&question["id"], &json!({}));
            answered += 1;
        }
    }
    assert_eq!(lab.outcomes().len(), 40);
}

#[test]
fn a_shutdown_is_accepted_by_the_answer_to_the_sync_behind_it_and_not_by_a_question() {
    let mut lab = able();
    lab.ask(M, "guest-shutdown", json!({}));
    let sent = lab.sent();
    assert_eq!(
        (&sent[0]["execute"], &sent[1]["execute"]),
        (&json!("guest-shutdown"), &json!("guest-sync-delimited"))
    );
    let token = &sent[1]["arguments"]["id"];
    lab.ask(B, "guest-sync-delimited", json!({"id": 3}));
    let (_, id) = lab.question();
    lab.say(b"\xff");
    lab.answer(&id, &json!(3));
    assert_eq!(lab.outcomes(), [(B, returned(json!(3)))]);
    lab.say(&marked_reply(token));
    assert_eq!(lab.outcomes(), [(M, None)]);
}

#[test]
fn an_agent_that_has_the_sign_and_refuses_the_envelope_is_served_in_turn() {
    let mut lab = able();
    lab.ask(A, "guest-exec", json!({}));
    lab.sent();
    lab.ask(B, "guest-ping", json!({}));
    lab.ask(C, "guest-ping", json!({}));
    for question in lab.sent() {
        let error = Error::generic("QMP input member 'exec-oob' is unexpected");
        lab.say(json!({"error": error, "id": question["id"]}).to_string().as_bytes());
    }
    assert!(lab.outcomes().is_empty());
    assert_eq!(lab.broker.status(lab.now).out_of_band, Some(false));
    lab.say(&reply(&json!({})));
    for _ in 0..2 {
        assert_eq!(lab.command(), "guest-ping");
        lab.say(&reply(&json!({})));
    }
    let outcomes = [(A, returned(json!({}))), (B, returned(json!({}))), (C, returned(json!({})))];
    assert_eq!(lab.outcomes(), outcomes);
}

#[test]
fn only_the_owner_of_a_freeze_renews_the_agents_lease() {
    let mut lab = able();
    lab.freeze(A, json!({"tarn-thaw-grace-ms": null}));
    lab.ask(A, "guest-fsfreeze-status", json!({}));
    assert_eq!(lab.command(), "guest-fsfreeze-status");
    lab.ask(B, "guest-fsfreeze-status", json!({}));
    let (_, id) = lab.question();
    lab.answer(&id, &json!("frozen"));
    lab.say(&reply(&json!("frozen")));
    assert!(lab.is_frozen());
    lab.outcomes();
    lab.broker.client_gone(A, true, lab.now);
    lab.ask(B, "guest-fsfreeze-status", json!({}));
    lab.question();
    // After another agent has opened the port, it is asked first whether it can.
    lab.broker.client_gone(B, true, lab.now);
    lab.broker.port_closed(lab.now);
    lab.broker.port_opened(lab.now);
    lab.answer_sync();
    lab.ask(C, "guest-fsfreeze-status", json!({}));
    assert_eq!(lab.command(), "guest-info");
    lab.say(&reply(&info(ABLE)));
    let (_, id) = lab.question();
    lab.answer(&id, &json!("frozen"));
    assert_eq!(lab.outcomes(), [(C, returned(json!("frozen")))]);
}

#[test]
fn a_lease_that_ran_out_shows_in_the_next_status_or_thaw() {
    let mut lab = able();
    let automatic_thaws = |lab: &Lab| lab.broker.status(lab.now).automatic_thaws;
    lab.freeze(A, json!({}));
    lab.ask(B, "guest-fsfreeze-status", json!({}));
    let (_, id) = lab.question();
    lab.answer(&id, &json!("thawed"));
    assert!(!lab.is_frozen());
    assert_eq!(automatic_thaws(&lab), 1);
    lab.ask(A, "guest-fsfreeze-thaw", json!({}));
    lab.sent();
    lab.say(&reply(&json!(0)));
    assert_eq!(automatic_thaws(&lab), 1, "known already");
    lab.outcomes();
    lab.freeze(A, json!({}));
    lab.ask(A, "guest-fsfreeze-thaw", json!({}));
    lab.sent();
    lab.say(&reply(&json!(0)));
    assert_eq!(automatic_thaws(&lab), 2);
    lab.outcomes();
    lab.freeze(A, json!({}));
    lab.ask(A, "guest-fsfreeze-thaw", json!({}));
    lab.sent();
    lab.say(&reply(&json!(1)));
    assert_eq!(automatic_thaws(&lab), 2);
}

#[test]
fn a_status_from_the_middle_of_a_freeze_does_not_end_it() {
    // Asked before the freeze was answered.
    let mut lab = able();
    lab.ask(A, "guest-fsfreeze-freeze", json!({}));
    lab.sent();
    lab.ask(B, "guest-fsfreeze-status", json!({}));
    let (_, id) = lab.question();
    lab.say(&reply(&json!(1)));
    lab.answer(&id, &json!("thawed"));
    assert!(lab.is_frozen());
    // Asked before it began.
    let mut lab = able();
    lab.ask(B, "guest-fsfreeze-status", json!({}));
    let (_, id) = lab.question();
    lab.freeze(A, json!({}));
    lab.answer(&id, &json!("thawed"));
    assert!(lab.is_frozen());
}

#[test]
fn a_freeze_that_is_not_answered_in_time_is_undone_by_a_thaw_that_succeeds() {
    let mut lab = able();
    lab.ask(A, "guest-fsfreeze-freeze", json!({}));
    lab.sent();
    lab.pass(Duration::from_secs(3600));
    assert_eq!(lab.outcomes(), [(A, failed("Guest agent did not answer 'guest-fsfreeze-freeze' in time"))]);
    // The agent answers the sync at once, although it is still freezing, and forgets about the answer.
    lab.answer_sync();
    assert_eq!(lab.command(), "guest-fsfreeze-thaw");
    lab.ask(B, "guest-fsfreeze-status", json!({}));
    let (_, id) = lab.question();
    lab.answer(&id, &json!("thawed"));
    assert!(lab.is_frozen(), "the freeze may yet come");
    lab.say(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"not yet\"}}\n");
    lab.pass(SECOND);
    lab.outcomes();
    lab.expect_automatic_thaw();
}

#[test]
fn a_thaw_does_not_wait_for_the_freeze_it_ends() {
    let mut lab = able();
    lab.ask(A, "guest-fsfreeze-freeze", json!({}));
    lab.sent();
    lab.ask(B, "guest-fsfreeze-thaw", json!({}));
    let text = "A thaw was asked for before 'guest-fsfreeze-freeze' was answered";
    assert_eq!(lab.outcomes(), [(A, failed(text))]);
    lab.answer_sync();
    assert_eq!(lab.command(), "guest-fsfreeze-thaw");
    lab.say(&reply(&json!(1)));
    assert_eq!(lab.outcomes(), [(B, returned(json!(1)))]);
    assert!(!lab.is_frozen());
    assert_eq!(lab.broker.status(lab.now).automatic_thaws, 0, "it was a client's");
    // Nor for one that has not begun.
    lab.ask(C, "guest-exec", json!({}));
    lab.sent();
    lab.ask(A, "guest-fsfreeze-freeze", json!({}));
    lab.ask(B, "guest-fsfreeze-thaw", json!({}));
    for name in ["guest-fsfreeze-thaw", "guest-fsfreeze-freeze"] {
        lab.say(&reply(&json!(0)));
        assert_eq!(lab.command(), name);
    }
    lab.say(&reply(&json!(0)));
    lab.outcomes();
    // A thaw of a client that fails is the broker's to try again.
    lab.ask(A, "guest-fsfreeze-freeze", json!({}));
    lab.sent();
    lab.ask(B, "guest-fsfreeze-thaw", json!({}));
    lab.answer_sync();
    assert_eq!(lab.command(), "guest-fsfreeze-thaw");
    lab.say(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\n");
    lab.outcomes();
    lab.expect_automatic_thaw();
}

#[test]
fn a_freeze_whose_client_leaves_is_cancelled() {
    let mut lab = able();
    lab.ask(A, "guest-fsfreeze-freeze", json!({"tarn-thaw-grace-ms": null}));
    lab.sent();
    lab.broker.client_gone(A, false, lab.now);
    lab.answer_sync();
    lab.expect_automatic_thaw();
    assert!(!lab.broker.start_afresh(A, lab.now), "it is gone");
}

#[test]
fn a_client_that_synchronises_does_not_wait_for_what_takes_long() {
    let mut lab = able();
    // A trim goes on, its answer is nobody's.
    lab.ask(A, "guest-fstrim", json!({}));
    lab.sent();
    assert!(!lab.broker.start_afresh(B, lab.now));
    assert!(lab.broker.start_afresh(A, lab.now));
    lab.ask(A, "guest-sync", json!({"id": 1}));
    let (_, id) = lab.question();
    lab.answer(&id, &json!(1));
    assert_eq!(lab.outcomes(), [(A, returned(json!(1)))]);
    // What has not been sent never will be.
    lab.ask(B, "guest-fsfreeze-freeze", json!({}));
    assert!(lab.broker.start_afresh(B, lab.now));
    lab.say(&reply(&json!({"paths": []})));
    assert!(lab.sent().is_empty() && lab.outcomes().is_empty());
    // What is soon done is waited for, and so is everything by an old agent.
    lab.ask(A, "guest-exec", json!({}));
    lab.sent();
    assert!(!lab.broker.start_afresh(A, lab.now));
    let mut lab = Lab::with_agent(&[]);
    lab.ask(A, "guest-fsfreeze-freeze", json!({}));
    assert!(!lab.broker.start_afresh(A, lab.now));
}

#[test]
fn an_old_agent_is_never_asked_out_of_band() {
    let mut lab = Lab::with_agent(&["guest-ping", "guest-fsfreeze-status"]);
    lab.freeze(A, json!({"tarn-lease-ms": 1}));
    lab.ask(A, "guest-exec", json!({}));
    assert_eq!(lab.command(), "guest-exec");
    for (client, name) in [(B, "guest-ping"), (C, "guest-fsfreeze-status")] {
        lab.ask(client, name, json!({}));
    }
    assert!(lab.sent().is_empty());
    for name in ["guest-ping", "guest-fsfreeze-status"] {
        lab.say(&reply(&json!({})));
        assert_eq!(lab.sent(), [json!({"execute": name})]);
    }
}

#[test]
fn a_sync_of_the_brokers_own_is_not_answered_by_a_marked_answer_to_a_question() {
    let mut lab = able();
    lab.ask(B, "guest-sync-delimited", json!({"id": 9}));
    let (_, id) = lab.question();
    lab.ask(A, "guest-exec", json!({}));
    lab.sent();
    lab.pass(60 * SECOND);
    lab.outcomes();
    let sync = lab.wire.items(lab.broker.to_guest());
    let Some(Item::Value(sync)) = sync.into_iter().find(|item| matches!(item, Item::Value(_))) else {
        panic!()
    };
    lab.broker.sent_to_guest(usize::MAX >> 1);
    lab.say(b"\xff");
    lab.answer(&id, &json!(9));
    lab.say(&reply(&sync["arguments"]["id"]));
    assert!(!lab.broker.status(lab.now).in_sync, "the mark was not its own");
    lab.say(&marked_reply(&sync["arguments"]["id"]));
    assert!(lab.broker.status(lab.now).in_sync);
}
