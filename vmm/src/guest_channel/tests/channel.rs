//! The whole channel over real sockets.

use std::collections::{BTreeMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use protocol::{Error, Item};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::super::{CLIENTS_MAX, ChannelConfig, GuestChannel};
use super::broker::info;
use super::{Random, Wire, arguments};
use crate::event_loop::{Interest, Ready, Token, Watch};

/// Registrations of a loop that finds everything ready that is waited for: sockets never block.
#[derive(Default)]
struct Registrations(BTreeMap<RawFd, (Token, Interest)>);

impl Watch for Registrations {
    fn set(&mut self, fd: RawFd, token: Token, interest: Interest) {
        self.0.insert(fd, (token, interest));
    }
    fn remove(&mut self, fd: RawFd) {
        assert!(self.0.remove(&fd).is_some(), "removed what was not watched");
    }
}

/// An agent that does one thing after another and, like the old ones, knows no `id`.
struct FakeAgent {
    wire: Wire,
    todo: VecDeque<Value>,
    /// Answered since the last sync; asked while this is true, it was asked before it had answered.
    asked: u64,
    answered: u64,
    frozen: i64,
    /// It answers out of band, and lets a 0xFF end what it does.
    able: bool,
}

impl FakeAgent {
    fn new() -> Self {
        Self { wire: Wire::new(), todo: VecDeque::new(), asked: 0, answered: 0, frozen: 0, able: false }
    }

    fn hear(&mut self, bytes: &[u8]) {
        for item in self.wire.items(bytes) {
            match item {
                Item::Value(request) if self.able && request.get("exec-oob").is_some() => {
                    self.todo.push_front(request);
                }
                Item::Value(request) => {
                    assert!(request.get("id").is_none(), "old agents refuse an id: {request}");
                    let is_sync = request["execute"] == "guest-sync-delimited";
                    assert!(is_sync || self.asked == self.answered, "asked before it had answered");
                    self.asked += 1;
                    self.todo.push_back(request);
                }
                // Whoever says this gives up what he asked before.
                Item::Sentinel => {
                    self.answered = self.asked;
                    if self.able {
                        self.todo.clear();
                    }
                }
                Item::Error(error) => panic!("the broker sent garbage: {error}"),
            }
        }
    }

    /// Does the next thing.
    fn answer(&mut self) -> Vec<u8> {
        let Some(mut request) = self.todo.pop_front() else { return Vec::new() };
        match request.get_mut("exec-oob").map(Value::take) {
            Some(name) => request["execute"] = name,
            None => self.answered = (self.answered + 1).min(self.asked),
        }
        let args = &request["arguments"];
        let mut mark = &b""[..];
        let result = match request["execute"].as_str().unwrap() {
            "guest-sync" => Ok(args["id"].clone()),
            "guest-sync-delimited" => {
                mark = &[0xFF];
                Ok(args["id"].clone())
            }
            "guest-echo" => Ok(args.clone()),
            "guest-shutdown" => return Vec::new(),
            "guest-fsfreeze-freeze" if self.frozen > 0 => {
                Err(Error::command_disabled("guest-fsfreeze-freeze", None))
            }
            "guest-fsfreeze-freeze" => {
                self.frozen = 2;
                Ok(json!(2))
            }
            "guest-fsfreeze-thaw" => Ok(json!(std::mem::take(&mut self.frozen))),
            "guest-file-read" => Ok(json!({"buf-b64": "A".repeat(8 << 20)})),
            "guest-file-write" => Ok(json!({"count": args["buf-b64"].as_str().unwrap().len()})),
            "guest-ping" => Ok(json!({})),
            "guest-info" if self.able => Ok(info(&["tarn-fsfreeze-report"])),
            unknown => Err(Error::command_not_found(unknown)),
        };
        let mut reply = match result {
            Ok(value) => json!({"return": value}),
            Err(error) => json!({"error": error}),
        };
        if let Some(id) = request.get("id") {
            reply["id"] = id.clone();
        }
        [mark, reply.to_string().as_bytes(), b"\n"].concat()
    }
}

struct Lab {
    directory: TempDir,
    channel: GuestChannel,
    agent: FakeAgent,
    watch: Registrations,
    now: Instant,
}

impl Lab {
    /// A channel whose agent is there.
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut watch = Registrations::default();
        let path = directory.path().join("agent.sock");
        let channel = GuestChannel::bind(&path, ChannelConfig::default(), &mut watch).unwrap();
        let mut lab = Self { directory, channel, agent: FakeAgent::new(), watch, now: Instant::now() };
        lab.channel.port_opened(lab.now, &mut lab.watch);
        lab.turn();
        assert!(lab.channel.status(lab.now).in_sync);
        lab
    }

    /// One round of the loop for the clients.
    fn poll(&mut self) {
        for (token, interest) in self.watch.0.clone().into_values() {
            let ready = Ready { readable: interest.read, writable: interest.write, hung_up: true };
            self.channel.ready(token, ready, self.now, &mut self.watch);
        }
    }

    /// What there is for the guest reaches the agent.
    fn carry(&mut self) {
        let bytes = self.channel.to_guest().to_vec();
        self.agent.hear(&bytes);
        self.channel.sent_to_guest(bytes.len());
    }

    fn answer(&mut self) {
        let answer = self.agent.answer();
        self.channel.receive(&answer, self.now, &mut self.watch);
    }

    /// Everything that can happen happens.
    fn turn(&mut self) {
        for _ in 0..8 {
            self.poll();
            self.carry();
            self.answer();
        }
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(deadline) = self.channel.next_deadline().filter(|deadline| *deadline <= end) {
            self.now = self.now.max(deadline);
            self.channel.tick(self.now, &mut self.watch);
        }
        self.now = end;
    }

    fn connect(&mut self) -> Client {
        let stream = UnixStream::connect(self.directory.path().join("agent.sock")).unwrap();
        stream.set_nonblocking(true).unwrap();
        Client { stream, received: Vec::new(), ended: false }
    }

    /// Sends it and returns what comes back.
    fn ask(&mut self, client: &mut Client, bytes: &[u8]) -> Vec<u8> {
        client.send(bytes);
        self.turn();
        client.take()
    }

    fn clients(&self) -> usize {
        self.watch.0.len() - 1
    }
}

struct Client {
    stream: UnixStream,
    received: Vec<u8>,
    ended: bool,
}

impl Client {
    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    fn receive(&mut self) {
        let mut buffer = vec![0; 256 << 10];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return self.ended = true,
                Ok(length) => self.received.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn take(&mut self) -> Vec<u8> {
        self.receive();
        std::mem::take(&mut self.received)
    }
}

#[test]
fn proxmox_gets_both_answers_side_by_side() {
    let mut lab = Lab::new();
    let mut client = lab.connect();
    let both =
        b"{\"execute\":\"guest-sync-delimited\",\"arguments\":{\"id\":4711}}\n{\"execute\":\"guest-ping\"}\n";
    let answer = lab.ask(&mut client, both);
    assert_eq!(answer, b"\xff{\"return\": 4711}\n{\"return\": {}}\n");
}

#[test]
fn libvirt_gets_its_sync_back_and_never_a_0xff() {
    let mut lab = Lab::new();
    let mut client = lab.connect();
    let sync = b"{\"execute\":\"guest-sync\", \"arguments\":{\"id\":1795155922918}}\n";
    assert_eq!(lab.ask(&mut client, sync), b"{\"return\": 1795155922918}\n");
    assert_eq!(lab.ask(&mut client, b"{\"execute\":\"guest-ping\"}\n"), b"{\"return\": {}}\n");
}

#[test]
fn a_leading_0xff_and_a_missing_newline_cost_nothing() {
    let mut lab = Lab::new();
    let mut client = lab.connect();
    let sync = b"{'execute': 'guest-pi\xff{'execute':'guest-sync-delimited','arguments':{'id':1}}";
    assert_eq!(lab.ask(&mut client, sync), b"\xff{\"return\": 1}\n");
    let failing = b"\xff{\"execute\":\"guest-sync-delimited\"}";
    lab.agent.wire = Wire::new();
    client.send(failing);
    lab.poll();
    lab.carry();
    let error = b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"Parameter 'id' is missing\"}}\n";
    lab.channel.receive(error, lab.now, &mut lab.watch);
    assert_eq!(client.take(), error, "an error is not marked");
}

#[test]
fn ids_come_back_from_an_agent_that_knows_none() {
    let mut lab = Lab::new();
    let mut client = lab.connect();
    let answer = lab.ask(&mut client, b"{\"execute\":\"guest-ping\",\"id\":{\"a\":[null]}}");
    assert_eq!(answer, b"{\"return\": {}, \"id\": {\"a\": [null]}}\n");
    let answer = lab.ask(&mut client, b"{\"execute\":\"nope\",\"id\":null}");
    let expected = "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"The command nope has not been found\"}, \"id\": null}\n";
    assert_eq!(String::from_utf8(answer).unwrap(), expected);
}

#[test]
fn half_a_message_stays_with_its_client_and_goes_with_it() {
    let mut lab = Lab::new();
    let (mut first, mut second) = (lab.connect(), lab.connect());
    assert_eq!(lab.ask(&mut first, b"{\"execute\":\"guest-shut"), b"");
    assert_eq!(lab.ask(&mut second, b"{\"execute\":\"guest-ping\"}"), b"{\"return\": {}}\n");
    drop(first);
    lab.turn();
    assert_eq!(lab.clients(), 1);
    assert_eq!(lab.ask(&mut second, b"{\"execute\":\"guest-ping\"}"), b"{\"return\": {}}\n");
}

#[test]
fn what_is_no_request_is_answered_in_its_place_without_the_guest() {
    let mut lab = Lab::new();
    let mut client = lab.connect();
    let answer = lab.ask(
        &mut client,
        b"{\"execute\":\"guest-ping\",\"id\":1} [] {\"execute\":7,\"id\":2} }\n{\"execute\":\"guest-ping\",\"id\":3}",
    );
    let answer = String::from_utf8(answer).unwrap();
    let lines: Vec<Value> = answer.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let seen: Vec<_> = lines.iter().map(|line| (line.get("error").is_some(), line["id"].clone())).collect();
    let null = Value::Null;
    let expected =
        [(false, json!(1)), (true, null.clone()), (true, json!(2)), (true, null), (false, json!(3))];
    assert_eq!(seen, expected);
    assert_eq!(lab.agent.asked, 3, "the sync and two pings");
}

#[test]
fn socat_gets_its_answer_after_it_has_stopped_sending() {
    let mut lab = Lab::new();
    let mut client = lab.connect();
    client.send(b"{\"execute\":\"guest-ping\"}{\"execute\":\"guest-sync\",\"arguments\":{\"id\":5}}\n");
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    lab.turn();
    lab.turn();
    assert_eq!(client.take(), b"{\"return\": {}}\n{\"return\": 5}\n");
    assert!(client.ended);
    assert_eq!(lab.clients(), 0);
}

#[test]
fn the_monitors_commands_are_one_more_client() {
    let mut lab = Lab::new();
    let mut client = lab.connect();
    client.send(b"{\"execute\":\"guest-echo\",\"arguments\":{\"from\":\"socket\"}}");
    lab.channel.request(9, "guest-echo".into(), arguments(json!({"from": "monitor"})), lab.now);
    lab.channel.request(10, "guest-shutdown".into(), arguments(json!({})), lab.now);
    lab.turn();
    assert_eq!(client.take(), b"{\"return\": {\"from\": \"socket\"}}\n");
    let relayed = lab.channel.take_relayed();
    assert_eq!(relayed, [(9, Ok(json!({"from": "monitor"}))), (10, Ok(json!({})))]);
    lab.channel.request(
        11,
        "guest-fsfreeze-freeze".into(),
        arguments(json!({"tarn-thaw-grace-ms": -1})),
        lab.now,
    );
    assert!(matches!(&lab.channel.take_relayed()[..], [(11, Err(_))]));
    lab.channel.request(
        12,
        "guest-fsfreeze-freeze".into(),
        arguments(json!({"tarn-thaw-grace-ms": 0})),
        lab.now,
    );
    lab.turn();
    assert_eq!(lab.channel.take_relayed().len(), 1);
    lab.channel.session_closed(12, lab.now);
    lab.turn();
    assert_eq!((lab.agent.frozen, lab.channel.status(lab.now).automatic_thaws), (0, 1));
}

#[test]
fn a_one_shot_client_has_the_grace_to_come_back_and_thaw() {
    let mut lab = Lab::new();
    let mut client = lab.connect();
    assert_eq!(lab.ask(&mut client, b"{\"execute\":\"guest-fsfreeze-freeze\"}"), b"{\"return\": 2}\n");
    drop(client);
    lab.turn();
    lab.pass(Duration::from_secs(50));
    lab.turn();
    assert_eq!(lab.agent.frozen, 2);
    let mut client = lab.connect();
    assert_eq!(lab.ask(&mut client, b"{\"execute\":\"guest-fsfreeze-thaw\"}"), b"{\"return\": 2}\n");
    assert_eq!(lab.channel.status(lab.now).frozen, None);
    lab.pass(Duration::from_secs(500));
    lab.turn();
    assert_eq!(lab.channel.status(lab.now).automatic_thaws, 0);
}

#[test]
fn a_client_that_dies_without_reading_that_it_froze_is_thawed_for_at_once() {
    let mut lab = Lab::new();
    let mut client = lab.connect();
    client.send(b"{\"execute\":\"guest-fsfreeze-freeze\"}");
    lab.turn();
    assert_eq!(lab.agent.frozen, 2);
    drop(client);
    lab.turn();
    assert_eq!((lab.agent.frozen, lab.channel.status(lab.now).automatic_thaws), (0, 1));
}

#[test]
fn a_client_that_synchronises_behind_its_freeze_is_answered_and_the_freeze_is_undone() {
    let mut lab = Lab::new();
    lab.agent.able = true;
    let mut client = lab.connect();
    client.send(b"{\"execute\":\"guest-fsfreeze-freeze\"}");
    lab.poll();
    lab.poll();
    lab.carry();
    lab.answer();
    lab.carry();
    assert_eq!(lab.agent.todo[0]["execute"], "guest-fsfreeze-freeze");
    // Half a message does not tell yet; others are not affected.
    client.send(b"\n{\"execute\":\"guest-sync\",\"argu");
    let mut other = lab.connect();
    lab.poll();
    other.send(b"{\"execute\":\"guest-ping\"}");
    lab.poll();
    lab.carry();
    lab.answer();
    assert_eq!(other.take(), b"{\"return\": {}}\n");
    client.send(b"ments\":{\"id\":5}}{\"execute\":\"guest-ping\"}");
    lab.poll();
    assert_eq!(lab.channel.to_guest()[0], 0xFF);
    lab.turn();
    assert_eq!(client.take(), b"{\"return\": 5}\n{\"return\": {}}\n");
    assert_eq!((lab.agent.frozen, lab.channel.status(lab.now).automatic_thaws), (0, 1));
    // What is soon done is answered first, as everywhere.
    let answer = lab.ask(
        &mut client,
        b"{\"execute\":\"guest-echo\"}\xff{\"execute\":\"guest-sync\",\"arguments\":{\"id\":6}}",
    );
    assert_eq!(answer, b"{\"return\": null}\n{\"return\": 6}\n");
}

#[test]
fn what_a_client_sends_while_it_waits_is_bounded_and_takes_no_permit() {
    let mut lab = Lab::new();
    let (mut hasty, mut other) = (lab.connect(), lab.connect());
    lab.poll();
    hasty.send(b"{\"execute\":\"guest-ping\"}");
    lab.poll();
    let payload = "A".repeat(6 << 20);
    let request = format!("{{\"execute\":\"guest-file-write\",\"arguments\":{{\"buf-b64\":\"{payload}\"}}}}");
    let mut sent = [0, 0];
    for _ in 0..400 {
        sent[0] += push(&mut hasty, &request.as_bytes()[sent[0]..]);
        lab.poll();
    }
    assert!(sent[0] < 3 << 20, "{} bytes", sent[0]);
    for _ in 0..400 {
        sent[1] += push(&mut other, &request.as_bytes()[sent[1]..]);
        lab.poll();
    }
    assert_eq!(sent[1], request.len());
    for _ in 0..400 {
        sent[0] += push(&mut hasty, &request.as_bytes()[sent[0]..]);
        lab.turn();
    }
    let answer = format!("{{\"return\": {{\"count\": {}}}}}\n", payload.len());
    assert_eq!(String::from_utf8(hasty.take()).unwrap(), format!("{{\"return\": {{}}}}\n{answer}"));
    assert_eq!(other.take(), answer.as_bytes());
}

/// Sends as much as goes; returns how much that was.
fn push(client: &mut Client, bytes: &[u8]) -> usize {
    match client.stream.write(bytes) {
        Ok(length) => length,
        Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn one_client_at_a_time_sends_a_large_request_and_one_that_stalls_in_it_is_given_up() {
    let mut lab = Lab::new();
    let (mut first, mut second, mut small) = (lab.connect(), lab.connect(), lab.connect());
    let payload = "A".repeat(6 << 20);
    let request = format!("{{\"execute\":\"guest-file-write\",\"arguments\":{{\"buf-b64\":\"{payload}\"}}}}");
    let mut sent = [0, 0];
    for _ in 0..400 {
        let end = request.len() - 100;
        sent[0] += push(&mut first, &request.as_bytes()[sent[0]..end]);
        lab.poll();
        sent[1] += push(&mut second, &request.as_bytes()[sent[1]..]);
        lab.poll();
    }
    assert_eq!(sent[0], request.len() - 100);
    assert!(sent[1] < 3 << 20, "{} bytes", sent[1]);
    assert_eq!(lab.ask(&mut small, b"{\"execute\":\"guest-ping\"}"), b"{\"return\": {}}\n");
    lab.pass(Duration::from_secs(60));
    first.receive();
    assert!(first.ended);
    for _ in 0..400 {
        sent[1] += push(&mut second, &request.as_bytes()[sent[1]..]);
        lab.turn();
    }
    assert_eq!(second.take(), format!("{{\"return\": {{\"count\": {}}}}}\n", payload.len()).as_bytes());
}

#[test]
fn a_client_that_does_not_read_stalls_nobody_and_is_given_up_in_the_end() {
    let mut lab = Lab::new();
    let (mut slow, mut quick) = (lab.connect(), lab.connect());
    let read = b"{\"execute\":\"guest-file-read\",\"arguments\":{\"handle\":1,\"count\":6291456}}";
    slow.send(&read.repeat(3));
    lab.turn();
    for _ in 0..5 {
        lab.pass(Duration::from_secs(10));
        assert_eq!(lab.ask(&mut quick, b"{\"execute\":\"guest-ping\"}"), b"{\"return\": {}}\n");
    }
    assert_eq!(lab.agent.asked, 2 + 1 + 5, "its second read waits for it to take the first");
    lab.pass(Duration::from_secs(11));
    lab.turn();
    slow.receive();
    assert!(slow.ended);
    assert_eq!(lab.clients(), 1);
}

#[test]
fn answers_nobody_takes_are_bounded_over_all_clients() {
    let mut lab = Lab::new();
    let read = b"{\"execute\":\"guest-file-read\",\"arguments\":{\"handle\":1,\"count\":6291456}}";
    let mut slow: Vec<_> = (0..25).map(|_| lab.connect()).collect();
    for client in &mut slow {
        client.send(read);
        lab.now += Duration::from_millis(1);
        lab.turn();
    }
    assert!((18..21).contains(&lab.clients()), "{} clients", lab.clients());
    slow[0].receive();
    assert!(slow[0].ended, "the one that has not moved for longest goes first");
    let mut taken = Vec::new();
    while !taken.ends_with(b"\n") {
        taken.extend(slow[24].take());
        lab.poll();
    }
    assert_eq!(taken.len(), (8 << 20) + "{\"return\": {\"buf-b64\": \"\"}}\n".len());
}

#[test]
fn one_client_too_many_is_turned_away() {
    let mut lab = Lab::new();
    let clients: Vec<_> = (0..CLIENTS_MAX).map(|_| lab.connect()).collect();
    lab.poll();
    let mut extra = lab.connect();
    lab.poll();
    extra.receive();
    assert!(extra.ended);
    assert_eq!(lab.clients(), clients.len());
}

#[test]
fn closing_ends_every_connection() {
    let mut lab = Lab::new();
    let mut client = lab.connect();
    lab.poll();
    let Lab { channel, mut watch, now, .. } = lab;
    channel.close(now, &mut watch);
    assert!(watch.0.is_empty());
    client.receive();
    assert!(client.ended);
}

/// A client of the random test.
struct Talker {
    name: usize,
    client: Client,
    unsent: Vec<u8>,
    asked: usize,
    answered: usize,
}

impl Talker {
    fn ask(&mut self, random: &mut Random) {
        let echo = json!({"from": self.name, "number": self.asked, "pad": "x".repeat(random.below(300))});
        let mut request = json!({"execute": "guest-echo", "arguments": echo, "id": self.asked});
        if random.below(4) == 0 {
            request = json!({"execute": "guest-sync", "arguments": {"id": self.asked}, "id": self.asked});
        } else if random.below(10) == 0 {
            request = json!({"execute": "guest-nothing", "id": self.asked});
        }
        self.unsent.extend_from_slice(request.to_string().as_bytes());
        if random.below(3) == 0 {
            self.unsent.push(b'\n');
        }
        self.asked += 1;
    }

    fn send(&mut self, length: usize) {
        let taken = push(&mut self.client, &self.unsent[..length]);
        self.unsent.drain(..taken);
    }

    /// Every answer is to the next question, and right or an error.
    fn check(&mut self) {
        self.client.receive();
        while let Some(end) = self.client.received.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.client.received.drain(..=end).collect();
            let reply: Value = serde_json::from_slice(&line).unwrap();
            assert_eq!(reply["id"], self.answered, "{reply}");
            if let Some(number) = reply["return"].as_u64() {
                assert_eq!(usize::try_from(number).unwrap(), self.answered);
            } else if let Some(value) = reply.get("return") {
                assert_eq!((&value["from"], &value["number"]), (&json!(self.name), &json!(self.answered)));
            } else {
                assert!(reply["error"]["class"].is_string());
            }
            self.answered += 1;
        }
        assert!(self.answered <= self.asked);
    }
}

#[test]
fn random_traffic_reaches_who_asked_in_order_with_nothing_lost_or_doubled() {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = std::env::var("SEED").map_or(u64::from(clock.subsec_nanos()), |seed| seed.parse().unwrap());
    println!("SEED={seed}");
    let mut random = Random(seed);
    let mut lab = Lab::new();
    let mut talkers: Vec<Talker> = Vec::new();
    let (mut names, mut served) = (0, 0);
    let mut from_agent: Vec<u8> = Vec::new();
    for _ in 0..20_000 {
        let pick = (!talkers.is_empty()).then(|| random.below(talkers.len()));
        match (random.below(40), pick) {
            (0, _) if talkers.len() < 6 => {
                let client = lab.connect();
                names += 1;
                talkers.push(Talker { name: names, client, unsent: Vec::new(), asked: 0, answered: 0 });
            }
            (1, Some(index)) if random.below(5) == 0 => served += talkers.swap_remove(index).answered,
            (2..8, Some(index)) => talkers[index].ask(&mut random),
            (8..16, Some(index)) => {
                let length = random.below(talkers[index].unsent.len() + 1);
                talkers[index].send(length);
            }
            (16..23, _) => {
                let count = random.below(lab.channel.to_guest().len() + 1);
                let bytes = lab.channel.to_guest()[..count].to_vec();
                lab.agent.hear(&bytes);
                lab.channel.sent_to_guest(count);
            }
            (23..29, _) => from_agent.extend(lab.agent.answer()),
            (29..36, _) => {
                let count = random.below(from_agent.len() + 1);
                let piece: Vec<u8> = from_agent.drain(..count).collect();
                lab.channel.receive(&piece, lab.now, &mut lab.watch);
            }
            (36, _) if random.below(20) == 0 => {
                // The agent dies and comes back.
                lab.channel.port_closed(lab.now, &mut lab.watch);
                lab.agent = FakeAgent::new();
                lab.agent.able = random.below(3) > 0;
                from_agent.clear();
                lab.channel.port_opened(lab.now, &mut lab.watch);
            }
            (37, _) if random.below(10) == 0 => lab.pass(Duration::from_secs(random.below(70) as u64)),
            (38, _) if random.below(10) == 0 => lab.channel.vm_running(random.below(2) == 0, lab.now),
            _ => lab.poll(),
        }
        talkers.iter_mut().for_each(Talker::check);
    }
    lab.channel.vm_running(true, lab.now);
    for _ in 0..20_000 {
        for talker in &mut talkers {
            talker.send(talker.unsent.len());
        }
        lab.poll();
        lab.carry();
        from_agent.extend(lab.agent.answer());
        lab.channel.receive(&std::mem::take(&mut from_agent), lab.now, &mut lab.watch);
        talkers.iter_mut().for_each(Talker::check);
        if talkers.iter().all(|talker| talker.answered == talker.asked) {
            println!("{} answers", served + talkers.iter().map(|talker| talker.answered).sum::<usize>());
            return;
        }
    }
    panic!("Somebody was never answered: {:?}", lab.channel.status(lab.now));
}
