//! The broker by itself.

use std::time::{Duration, Instant};

use protocol::{Error, ErrorClass, Item};
use serde_json::{Value, json};

use super::super::broker::{Broker, Outcome};
use super::super::{ChannelConfig, Client};
use super::{Random, Wire, arguments, marked_reply, reply};

pub(super) const A: Client = Client::Socket(1);
pub(super) const B: Client = Client::Socket(2);
pub(super) const M: Client = Client::Monitor(1);
pub(super) const SECOND: Duration = Duration::from_secs(1);

/// A broker, and the guest's end of its wire.
pub(super) struct Lab {
    pub(super) broker: Broker,
    pub(super) wire: Wire,
    pub(super) now: Instant,
}

impl Lab {
    pub(super) fn new() -> Self {
        let broker = Broker::new(ChannelConfig::default());
        Self { broker, wire: Wire::new(), now: Instant::now() }
    }

    /// A broker in step with an agent of the old kind.
    fn in_step() -> Self {
        Self::with_agent(&["guest-ping"])
    }

    /// A broker in step with an agent that it knows to have these commands.
    pub(super) fn with_agent(commands: &[&str]) -> Self {
        let mut lab = Self::new();
        lab.broker.port_opened(lab.now);
        lab.answer_sync();
        lab.ask(M, "guest-info", json!({}));
        assert_eq!(lab.command(), "guest-info");
        lab.say(&reply(&info(commands)));
        assert_eq!(lab.outcomes().len(), 1);
        lab
    }

    /// What has been sent to the guest since.
    pub(super) fn sent(&mut self) -> Vec<Value> {
        let bytes = self.broker.to_guest().to_vec();
        self.broker.sent_to_guest(bytes.len());
        self.wire.requests(&bytes)
    }

    /// As [`sent`](Self::sent), for a wire from which bytes were lost.
    pub(super) fn sent_lossy(&mut self) -> Vec<Value> {
        let bytes = self.broker.to_guest().to_vec();
        self.broker.sent_to_guest(bytes.len());
        let items = Wire::new().items(&bytes).into_iter();
        items.filter_map(|item| if let Item::Value(value) = item { Some(value) } else { None }).collect()
    }

    pub(super) fn answer_sync(&mut self) {
        let sent = self.sent();
        assert_eq!(sent.len(), 1, "{sent:?}");
        assert_eq!(sent[0]["execute"], "guest-sync-delimited");
        self.say(&marked_reply(&sent[0]["arguments"]["id"]));
        assert!(self.broker.status(self.now).in_sync);
    }

    pub(super) fn say(&mut self, bytes: &[u8]) {
        self.broker.receive(bytes, self.now);
    }

    pub(super) fn ask(&mut self, client: Client, name: &str, args: Value) {
        self.broker.request(client, name.into(), arguments(args), self.now);
    }

    /// Lets time pass, waking the broker when it wants to.
    pub(super) fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(deadline) = self.broker.next_deadline().filter(|deadline| *deadline <= end) {
            self.now = self.now.max(deadline);
            self.broker.tick(self.now);
            assert_ne!(self.broker.next_deadline(), Some(deadline), "a deadline that does not pass");
        }
        self.now = end;
    }

    pub(super) fn outcomes(&mut self) -> Vec<(Client, Option<Result<Value, String>>)> {
        let plain = |Outcome { client, result }| {
            (client, result.map(|result: Result<Value, Error>| result.map_err(|error| error.desc)))
        };
        self.broker.take_outcomes().into_iter().map(plain).collect()
    }

    /// The command that is with the guest now, which must be the only thing sent.
    pub(super) fn command(&mut self) -> String {
        let sent = self.sent();
        assert_eq!(sent.len(), 1, "{sent:?}");
        sent[0]["execute"].as_str().unwrap().to_owned()
    }

    pub(super) fn freeze(&mut self, client: Client, args: Value) {
        self.ask(client, "guest-fsfreeze-freeze", args);
        assert_eq!(self.command(), "guest-fsfreeze-freeze");
        self.say(&reply(&json!(2)));
        assert_eq!(self.outcomes(), [(client, Some(Ok(json!(2))))]);
    }

    pub(super) fn is_frozen(&self) -> bool {
        self.broker.status(self.now).frozen.is_some()
    }

    pub(super) fn expect_automatic_thaw(&mut self) {
        let before = self.broker.status(self.now).automatic_thaws;
        assert_eq!(self.command(), "guest-fsfreeze-thaw");
        self.say(&reply(&json!(2)));
        assert!(!self.is_frozen());
        assert_eq!(self.broker.status(self.now).automatic_thaws, before + 1);
        assert!(self.outcomes().is_empty());
    }
}

/// What `guest-info` returns.
pub(super) fn info(commands: &[&str]) -> Value {
    let commands: Vec<_> = commands.iter().map(|name| json!({"name": name, "enabled": true})).collect();
    json!({"version": "1", "supported_commands": commands})
}

pub(super) fn failed(text: &str) -> Option<Result<Value, String>> {
    Some(Err(text.into()))
}

#[test]
fn nothing_is_sent_before_the_port_opens_and_nothing_but_a_sync_before_it_is_answered() {
    let mut lab = Lab::new();
    lab.ask(A, "guest-ping", json!({}));
    assert!(lab.sent().is_empty());
    lab.pass(20 * SECOND);
    lab.broker.port_opened(lab.now);
    assert_eq!(lab.broker.to_guest()[0], 0xFF);
    lab.answer_sync();
    assert_eq!(lab.sent(), [json!({"execute": "guest-ping"})]);
    lab.say(b"{\"return\": {}}\n");
    assert_eq!(lab.outcomes(), [(A, Some(Ok(json!({}))))]);
    assert_eq!(lab.broker.next_deadline(), None);
}

#[test]
fn a_request_waits_for_an_absent_agent_and_then_no_longer() {
    let mut lab = Lab::new();
    lab.ask(A, "guest-ping", json!({}));
    lab.pass(29 * SECOND);
    lab.ask(B, "guest-ping", json!({}));
    assert!(lab.outcomes().is_empty());
    lab.pass(SECOND);
    assert_eq!(lab.outcomes(), [(A, failed("Guest agent is not connected"))]);
    lab.broker.port_opened(lab.now);
    lab.pass(29 * SECOND);
    assert_eq!(lab.outcomes(), [(B, failed("Guest agent is not responding"))]);
    lab.sent();
}

#[test]
fn what_a_former_conversation_left_behind_is_not_believed() {
    let mut lab = Lab::new();
    lab.ask(A, "guest-ping", json!({}));
    lab.broker.port_opened(lab.now);
    let token = lab.sent()[0]["arguments"]["id"].clone();
    lab.say(
        b"n\": \"half\"}\n{\"return\": 5}\n{\"error\": {\"class\": \"GenericError\", \"desc\": \"x\"}}\n",
    );
    lab.say(&reply(&token));
    lab.say(&marked_reply(&json!(1)));
    assert!(!lab.broker.status(lab.now).in_sync);
    lab.say(&marked_reply(&token));
    assert_eq!(lab.command(), "guest-ping");
}

#[test]
fn an_unanswered_sync_is_sent_again_ever_more_seldom_and_only_the_last_counts() {
    let mut lab = Lab::new();
    lab.broker.port_opened(lab.now);
    let first = lab.sent()[0]["arguments"]["id"].clone();
    lab.pass(5 * SECOND);
    let second = lab.sent()[0]["arguments"]["id"].clone();
    assert_ne!(first, second);
    let start = lab.now;
    lab.pass(Duration::from_secs(3600));
    let last = lab.sent();
    assert!(last.len() <= 1, "only the newest is kept while the guest takes nothing");
    assert!(lab.broker.next_deadline().unwrap() - start <= Duration::from_secs(3700));
    lab.say(&marked_reply(&second));
    assert!(!lab.broker.status(lab.now).in_sync);
    lab.say(&marked_reply(&last[0]["arguments"]["id"]));
    assert!(lab.broker.status(lab.now).in_sync);
}

#[test]
fn a_late_answer_goes_to_nobody() {
    let mut lab = Lab::in_step();
    lab.ask(A, "guest-exec", json!({"path": "x"}));
    lab.ask(B, "guest-ping", json!({}));
    assert_eq!(lab.command(), "guest-exec");
    lab.pass(60 * SECOND);
    assert_eq!(lab.outcomes(), [(A, failed("Guest agent did not answer 'guest-exec' in time"))]);
    lab.say(b"{\"return\": {\"pid\": 1}}\n");
    lab.answer_sync();
    assert_eq!(lab.command(), "guest-ping");
    lab.say(b"{\"return\": {}}\n");
    assert_eq!(lab.outcomes(), [(B, Some(Ok(json!({}))))]);
}

#[test]
fn what_waits_for_storage_may_take_long() {
    for (name, seconds) in
        [("guest-fsfreeze-freeze", 3600), ("guest-fstrim", 3600), ("guest-fsfreeze-thaw", 600)]
    {
        let mut lab = Lab::in_step();
        lab.ask(A, name, json!({}));
        lab.sent();
        lab.pass(Duration::from_secs(seconds - 1));
        assert!(lab.outcomes().is_empty());
        lab.pass(SECOND);
        assert_eq!(lab.outcomes(), [(A, failed(&format!("Guest agent did not answer '{name}' in time")))]);
    }
}

#[test]
fn an_agent_that_dies_with_a_request_is_reported_at_once() {
    let mut lab = Lab::in_step();
    lab.ask(A, "guest-get-fsinfo", json!({}));
    lab.ask(B, "guest-ping", json!({}));
    lab.say(b"{\"return\": [");
    lab.broker.port_closed(lab.now);
    assert_eq!(lab.outcomes(), [(A, failed("Guest agent went away before it answered 'guest-get-fsinfo'"))]);
    assert!(lab.broker.to_guest().is_empty());
    lab.broker.port_opened(lab.now);
    lab.answer_sync();
    assert_eq!(lab.command(), "guest-ping");
}

#[test]
fn an_answer_to_half_a_request_puts_the_broker_out_of_step() {
    let mut lab = Lab::in_step();
    lab.ask(A, "guest-ping", json!({}));
    lab.broker.sent_to_guest(5);
    lab.say(b"{\"return\": {}}\n");
    assert_eq!(lab.outcomes().len(), 1);
    assert_eq!(lab.broker.to_guest()[0], 0xFF);
}

#[test]
fn shutdown_has_no_answer_and_does_not_hold_up_what_comes_next() {
    let mut lab = Lab::in_step();
    lab.ask(M, "guest-shutdown", json!({"mode": "reboot"}));
    lab.ask(A, "guest-ping", json!({}));
    assert!(!lab.broker.to_guest().contains(&0xFF), "qemu-ga answers a bare 0xFF with an error");
    let sent = lab.sent();
    assert_eq!(sent[0], json!({"execute": "guest-shutdown", "arguments": {"mode": "reboot"}}));
    lab.say(&marked_reply(&sent[1]["arguments"]["id"]));
    assert_eq!(lab.outcomes(), [(M, None)]);
    assert_eq!(lab.command(), "guest-ping");
}

#[test]
fn a_failed_shutdown_is_answered_and_the_sync_behind_it_is_not_mistaken_for_an_answer() {
    let mut lab = Lab::in_step();
    lab.ask(A, "guest-suspend-ram", json!({}));
    lab.ask(B, "guest-ping", json!({}));
    let sent = lab.sent();
    lab.say(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\n");
    assert_eq!(lab.outcomes(), [(A, failed("no"))]);
    assert!(lab.sent().is_empty());
    lab.say(&marked_reply(&sent[1]["arguments"]["id"]));
    assert_eq!(lab.command(), "guest-ping");
}

#[test]
fn a_guest_that_goes_down_or_to_sleep_has_accepted_the_command() {
    let mut lab = Lab::in_step();
    lab.ask(A, "guest-shutdown", json!({}));
    lab.broker.port_closed(lab.now);
    assert_eq!(lab.outcomes(), [(A, None)]);
    let mut lab = Lab::in_step();
    lab.ask(A, "guest-suspend-ram", json!({}));
    lab.sent();
    lab.pass(60 * SECOND);
    assert_eq!(lab.outcomes(), [(A, None)]);
    assert!(!lab.broker.status(lab.now).in_sync);
    lab.answer_sync();
}

#[test]
fn a_stale_answer_to_a_clients_own_sync_is_dropped() {
    let mut lab = Lab::in_step();
    lab.ask(A, "guest-sync", json!({"id": 77}));
    lab.sent();
    lab.say(b"{\"return\": 76}\n{\"return\": {}}\n{\"return\": 77}\n");
    assert_eq!(lab.outcomes(), [(A, Some(Ok(json!(77))))]);
    assert_eq!(lab.broker.status(lab.now).malformed_replies, 2);
    lab.ask(A, "guest-sync", json!({"id": "x"}));
    lab.sent();
    lab.say(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"type\"}}");
    assert_eq!(lab.outcomes(), [(A, failed("type"))]);
}

#[test]
fn clients_are_served_one_command_each_in_turn() {
    let mut lab = Lab::in_step();
    for client in [A, B, M] {
        lab.ask(client, "guest-ping", json!({}));
    }
    for client in [A, B, M] {
        assert_eq!(lab.command(), "guest-ping");
        assert!(lab.sent().is_empty());
        lab.say(b"{\"return\": {}}");
        assert_eq!(lab.outcomes()[0].0, client);
        lab.ask(client, "guest-info", json!({}));
    }
    assert_eq!(lab.command(), "guest-info");
}

#[test]
fn the_answer_for_a_client_that_left_is_dropped() {
    let mut lab = Lab::in_step();
    lab.ask(A, "guest-exec", json!({}));
    lab.ask(B, "guest-info", json!({}));
    lab.broker.client_gone(A, false, lab.now);
    lab.sent();
    lab.say(b"{\"return\": {\"pid\": 1}}");
    assert!(lab.outcomes().is_empty());
    lab.broker.client_gone(B, false, lab.now);
    assert_eq!(lab.command(), "guest-info");
}

#[test]
fn garbage_is_counted_and_dropped_and_a_stray_answer_means_out_of_step() {
    let mut lab = Lab::in_step();
    lab.ask(A, "guest-ping", json!({}));
    lab.sent();
    lab.say(b"garbage }\n{\"event\": \"STOP\"}\n[1]\n{\"QMP\": {}}\n{\"return\": {}}\n");
    assert_eq!(lab.outcomes(), [(A, Some(Ok(json!({}))))]);
    assert_eq!(lab.broker.status(lab.now).malformed_replies, 4);
    lab.say(b"{\"return\": {}}\n");
    assert!(!lab.broker.status(lab.now).in_sync);
    lab.answer_sync();
}

#[test]
fn an_endless_answer_is_cut_off_where_it_stops_being_plausible() {
    let mut lab = Lab::in_step();
    lab.ask(A, "guest-file-read", json!({"handle": 1, "count": 3000}));
    lab.sent();
    lab.say(b"{\"return\": {\"buf-b64\": \"");
    for _ in 0..8 {
        lab.say(&[b'A'; 16 << 10]);
    }
    let text = "Guest agent's answer to 'guest-file-read' is beyond all bounds";
    assert_eq!(lab.outcomes(), [(A, failed(text))]);
    lab.say(b"\"}}\n");
    lab.answer_sync();
}

#[test]
fn a_guest_that_never_stops_sending_is_not_listened_to() {
    let mut lab = Lab::in_step();
    for flood in ["{\"a\":\"aaaaaaaa", "[", "{\"return\": 1}", "x", "\"", " \n", "\u{1}"] {
        for _ in 0..200 {
            lab.say(flood.repeat((32 << 10) / flood.len()).as_bytes());
        }
        let bytes = lab.broker.to_guest().to_vec();
        assert!(bytes.len() < 200, "one sync at most");
    }
    lab.pass(120 * SECOND);
    lab.answer_sync();
    lab.ask(A, "guest-ping", json!({}));
    assert_eq!(lab.command(), "guest-ping");
}

#[test]
fn an_orphaned_freeze_lives_on_for_the_grace_and_is_then_thawed() {
    let mut lab = Lab::in_step();
    lab.freeze(A, json!({}));
    let status = lab.broker.status(lab.now).frozen.unwrap();
    assert_eq!((status.by.as_deref(), status.thaw_in), (Some("agent client 1"), None));
    lab.pass(Duration::from_secs(24 * 3600));
    assert!(lab.sent().is_empty(), "its owner is there");
    lab.broker.client_gone(A, true, lab.now);
    lab.pass(59 * SECOND);
    assert!(lab.sent().is_empty());
    let status = lab.broker.status(lab.now).frozen.unwrap();
    assert_eq!((status.by, status.thaw_in), (None, Some(SECOND)));
    lab.pass(SECOND);
    lab.expect_automatic_thaw();
}

#[test]
fn a_client_says_how_long_its_freeze_outlives_it() {
    let mut lab = Lab::in_step();
    lab.freeze(M, json!({"tarn-thaw-grace-ms": 0}));
    lab.broker.client_gone(M, true, lab.now);
    lab.expect_automatic_thaw();
    lab.freeze(A, json!({"tarn-thaw-grace-ms": null}));
    lab.broker.client_gone(A, true, lab.now);
    lab.pass(Duration::from_secs(24 * 3600));
    assert!(lab.sent().is_empty());
    assert!(lab.is_frozen());
    lab.ask(B, "guest-fsfreeze-freeze", json!({"tarn-thaw-grace-ms": "soon"}));
    assert!(matches!(&lab.outcomes()[..], [(B, Some(Err(_)))]));
}

#[test]
fn a_freeze_that_nobody_knows_of_is_undone_at_once() {
    // The client left before the answer.
    let mut lab = Lab::in_step();
    lab.ask(A, "guest-fsfreeze-freeze", json!({"tarn-thaw-grace-ms": null}));
    lab.sent();
    lab.broker.client_gone(A, false, lab.now);
    lab.say(&reply(&json!(1)));
    lab.expect_automatic_thaw();
    // The client left before it read the answer.
    lab.freeze(A, json!({}));
    lab.broker.client_gone(A, false, lab.now);
    lab.expect_automatic_thaw();
    // The answer was still with the broker.
    lab.ask(M, "guest-fsfreeze-freeze", json!({}));
    lab.sent();
    lab.say(&reply(&json!(1)));
    lab.broker.client_gone(M, true, lab.now);
    lab.expect_automatic_thaw();
    // The answer did not come in time.
    lab.ask(A, "guest-fsfreeze-freeze-list", json!({"mountpoints": ["/"]}));
    lab.sent();
    lab.pass(Duration::from_secs(3600));
    assert_eq!(lab.outcomes().len(), 1);
    lab.answer_sync();
    lab.expect_automatic_thaw();
    // The agent died meanwhile.
    lab.ask(A, "guest-fsfreeze-freeze", json!({}));
    lab.broker.port_closed(lab.now);
    assert_eq!(lab.outcomes().len(), 1);
    lab.broker.port_opened(lab.now);
    lab.answer_sync();
    lab.expect_automatic_thaw();
}

#[test]
fn anybody_may_thaw_and_then_nothing_is_owed() {
    let mut lab = Lab::in_step();
    lab.freeze(A, json!({}));
    lab.broker.client_gone(A, true, lab.now);
    lab.ask(B, "guest-fsfreeze-thaw", json!({}));
    lab.sent();
    lab.say(&reply(&json!(2)));
    assert!(!lab.is_frozen());
    lab.pass(Duration::from_secs(3600));
    assert!(lab.sent().is_empty());
    assert_eq!(lab.broker.status(lab.now).automatic_thaws, 0);
}

#[test]
fn a_thaw_that_fails_is_tried_until_one_succeeds() {
    let mut lab = Lab::in_step();
    lab.freeze(A, json!({"tarn-thaw-grace-ms": 0}));
    lab.broker.client_gone(A, true, lab.now);
    for wait in [1, 2, 4, 8, 16, 30, 30] {
        assert_eq!(lab.command(), "guest-fsfreeze-thaw");
        lab.say(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\n");
        lab.pass(wait * SECOND - Duration::from_millis(1));
        assert!(lab.sent().is_empty());
        lab.pass(Duration::from_millis(1));
    }
    // Not answered at all, then the agent dies: still tried again.
    lab.sent();
    lab.pass(Duration::from_secs(600));
    lab.answer_sync();
    lab.pass(30 * SECOND);
    lab.sent();
    lab.broker.port_closed(lab.now);
    lab.broker.port_opened(lab.now);
    lab.answer_sync();
    lab.pass(30 * SECOND);
    lab.expect_automatic_thaw();
}

#[test]
fn what_froze_nothing_or_thawed_by_itself_owes_no_thaw() {
    let mut lab = Lab::in_step();
    lab.ask(A, "guest-fsfreeze-freeze", json!({}));
    lab.sent();
    lab.say(&reply(&json!(0)));
    assert!(!lab.is_frozen());
    lab.ask(A, "guest-fsfreeze-freeze", json!({}));
    lab.sent();
    lab.say(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"failed to open /x\"}}\n");
    assert!(!lab.is_frozen());
    lab.outcomes();
    lab.freeze(A, json!({}));
    for (status, frozen) in [("frozen", true), ("thawed", false)] {
        lab.ask(B, "guest-fsfreeze-status", json!({}));
        lab.sent();
        lab.say(&reply(&json!(status)));
        assert_eq!(lab.is_frozen(), frozen);
    }
    lab.outcomes();
    lab.freeze(A, json!({}));
    lab.broker.guest_reset(lab.now);
    assert!(!lab.is_frozen());
}

#[test]
fn freezing_twice_leaves_the_first_owner_in_charge() {
    let mut lab = Lab::in_step();
    lab.freeze(A, json!({"tarn-thaw-grace-ms": 0}));
    lab.ask(B, "guest-fsfreeze-freeze", json!({}));
    lab.sent();
    let error = Error::command_disabled("guest-fsfreeze-freeze", Some("the command is not allowed"));
    assert_eq!(error.class, ErrorClass::CommandNotFound);
    lab.say(format!("{}\n", json!({"error": error})).as_bytes());
    lab.outcomes();
    lab.broker.client_gone(B, true, lab.now);
    assert!(lab.sent().is_empty());
    lab.broker.client_gone(A, true, lab.now);
    lab.expect_automatic_thaw();
}

#[test]
fn the_guests_time_stands_still_with_the_vm() {
    let mut lab = Lab::in_step();
    lab.freeze(A, json!({}));
    lab.pass(10 * SECOND);
    lab.broker.vm_running(false, lab.now);
    lab.pass(100 * SECOND);
    lab.broker.client_gone(A, true, lab.now);
    lab.pass(Duration::from_secs(3600));
    assert!(lab.sent().is_empty());
    assert_eq!(lab.broker.status(lab.now).frozen.unwrap().thaw_in, Some(60 * SECOND));
    lab.broker.vm_running(true, lab.now);
    lab.pass(59 * SECOND);
    assert!(lab.sent().is_empty());
    lab.pass(SECOND);
    lab.expect_automatic_thaw();
    // A command in flight has its time, too.
    lab.ask(B, "guest-exec", json!({}));
    lab.pass(59 * SECOND);
    lab.broker.vm_running(false, lab.now);
    lab.pass(Duration::from_secs(3600));
    lab.broker.vm_running(true, lab.now);
    assert!(lab.outcomes().is_empty());
    lab.pass(SECOND);
    assert_eq!(lab.outcomes().len(), 1);
}

#[test]
fn a_stopped_vm_is_not_asked_and_the_client_is_told() {
    let mut lab = Lab::in_step();
    lab.broker.vm_running(false, lab.now);
    lab.ask(A, "guest-ping", json!({}));
    lab.pass(20 * SECOND);
    lab.ask(B, "guest-ping", json!({}));
    assert!(lab.sent().is_empty());
    lab.pass(10 * SECOND);
    assert_eq!(lab.outcomes(), [(A, failed("Guest agent cannot answer: the virtual machine is stopped"))]);
    lab.broker.vm_running(true, lab.now);
    assert_eq!(lab.command(), "guest-ping");
    lab.pass(50 * SECOND);
    lab.say(&reply(&json!({})));
    assert_eq!(lab.outcomes(), [(B, Some(Ok(json!({}))))]);
}

/// A guest that says anything, at any time, to a broker whose clients come and go.
#[test]
fn whatever_the_guest_says_every_request_has_one_outcome_in_the_end() {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = std::env::var("SEED").map_or(u64::from(clock.subsec_nanos()), |seed| seed.parse().unwrap());
    println!("SEED={seed}");
    let mut random = Random(seed);
    let mut lab = Lab::new();
    let commands = [
        "guest-ping",
        "guest-sync",
        "guest-info",
        "guest-exec",
        "guest-fsfreeze-freeze",
        "guest-fsfreeze-thaw",
        "guest-fsfreeze-status",
        "guest-shutdown",
    ];
    let mut waiting = Vec::new();
    let (mut token, mut id) = (json!(0), json!(0));
    for _ in 0..20_000 {
        match random.below(22) {
            0..5 if waiting.len() < 5 => {
                let client = (0..).map(Client::Socket).find(|client| !waiting.contains(client)).unwrap();
                waiting.push(client);
                lab.ask(client, commands[random.below(commands.len())], json!({"id": 5}));
            }
            5 if !waiting.is_empty() => {
                let client = waiting.swap_remove(random.below(waiting.len()));
                lab.broker.client_gone(client, random.below(2) == 0, lab.now);
            }
            6 => lab.broker.port_opened(lab.now),
            7 if random.below(10) == 0 => lab.broker.port_closed(lab.now),
            8 => lab.broker.vm_running(random.below(4) > 0, lab.now),
            9 => lab.pass(Duration::from_secs([0, 1, 10, 100][random.below(4)])),
            10 => lab.broker.sent_to_guest(random.below(100)),
            11..14 => {
                for request in lab.sent_lossy() {
                    if request["execute"] == "guest-sync-delimited" {
                        token = request["arguments"]["id"].clone();
                    }
                    id = request.get("id").cloned().unwrap_or(id);
                }
            }
            14 => lab.say(&marked_reply(&token)),
            15 => lab.say(&reply(&json!([5, 0, 1, "thawed", {}])[random.below(5)])),
            20 => lab.say(&reply(&info(&["tarn-fsfreeze-report"]))),
            21 => lab.say(json!({"return": 5, "id": id}).to_string().as_bytes()),
            16 => lab.say(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}"),
            _ => {
                let alphabet = b"{}[]:,\"\n\x01\xff\\r019";
                let garbage: Vec<u8> =
                    (0..random.below(30)).map(|_| alphabet[random.below(alphabet.len())]).collect();
                lab.say(&garbage);
            }
        }
        for (client, _) in lab.outcomes() {
            let index = waiting.iter().position(|waiting| *waiting == client);
            waiting.swap_remove(index.expect("an outcome nobody waits for"));
        }
    }
    lab.broker.vm_running(true, lab.now);
    lab.pass(Duration::from_secs(6 * 3600));
    assert_eq!(lab.outcomes().len(), waiting.len());
}
