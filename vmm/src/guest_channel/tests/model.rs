//! The broker against a model of the guest: many clients, agents old and new, delays, deaths.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use protocol::{Error, Item};
use serde_json::{Value, json};

use super::super::Client;
use super::broker::{Lab, info};
use super::{Random, Wire};

/// How an agent deals with `exec-oob`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Manner {
    /// It does one thing after another and does not claim otherwise.
    Old,
    /// It answers at once, and lets a sync overtake what it works on.
    Able,
    /// As able, but answers twice, or with ids of its own making.
    Stuttering,
    /// It claims to be able, and answers some.
    Forgetful,
    /// It claims to be able, and refuses.
    Pretending,
}

/// An agent that works when it is told to.
struct Agent {
    manner: Manner,
    wire: Wire,
    /// Commands and whether somebody still waits for the answer.
    todo: VecDeque<(Value, bool)>,
    said: Vec<u8>,
}

impl Agent {
    fn new(random: &mut Random) -> Self {
        let manners = [
            Manner::Old,
            Manner::Able,
            Manner::Able,
            Manner::Stuttering,
            Manner::Forgetful,
            Manner::Pretending,
        ];
        Self::with_manner(manners[random.below(manners.len())])
    }

    fn with_manner(manner: Manner) -> Self {
        Self { manner, wire: Wire::new(), todo: VecDeque::new(), said: Vec::new() }
    }

    fn hear(&mut self, bytes: &[u8], guest: &mut Guest, random: &mut Random) {
        for item in self.wire.items(bytes) {
            match item {
                Item::Value(request) if request.get("exec-oob").is_some() => {
                    self.overtake(&request, guest, random);
                }
                Item::Value(request) => {
                    assert!(request.get("id").is_none(), "old agents refuse an id: {request}");
                    let is_sync =
                        request["execute"] == "guest-sync" || request["execute"] == "guest-sync-delimited";
                    let is_silent = |(command, _): &(Value, bool)| command["execute"] == "guest-shutdown";
                    let awaited = self.todo.iter().filter(|(_, awaited)| *awaited).count();
                    assert!(
                        is_sync || awaited == 0 || self.manner == Manner::Old,
                        "asked before it had answered"
                    );
                    if is_sync && self.manner != Manner::Old && !self.todo.iter().any(is_silent) {
                        self.todo.iter_mut().for_each(|(_, awaited)| *awaited = false);
                        self.answer(&request, guest, random);
                    } else {
                        self.todo.push_back((request, true));
                    }
                }
                Item::Sentinel => {}
                Item::Error(error) => panic!("the broker sent garbage: {error}"),
            }
        }
    }

    fn overtake(&mut self, request: &Value, guest: &mut Guest, random: &mut Random) {
        assert!(request["id"].is_i64());
        let mut request = request.clone();
        request["execute"] = request["exec-oob"].take();
        match self.manner {
            Manner::Old => panic!("asked out of band without a claim to know that: {request}"),
            Manner::Able => self.answer(&request, guest, random),
            Manner::Stuttering => {
                for _ in 0..=random.below(2) {
                    self.answer(&request, guest, random);
                }
                let made_up = json!({"return": "made up", "id": random.below(100)});
                self.said.extend(format!("{made_up}\n").bytes());
            }
            Manner::Forgetful if random.below(3) == 0 => {}
            Manner::Forgetful => self.answer(&request, guest, random),
            Manner::Pretending => {
                let error = Error::generic("QMP input member 'exec-oob' is unexpected");
                self.said.extend(format!("{}\n", json!({"error": error, "id": request["id"]})).bytes());
            }
        }
    }

    /// Does the next thing.
    fn work(&mut self, guest: &mut Guest, random: &mut Random) {
        let Some((request, awaited)) = self.todo.pop_front() else { return };
        if awaited {
            self.answer(&request, guest, random);
        } else {
            guest.carry_out(&request, self.manner, random);
        }
    }

    fn answer(&mut self, request: &Value, guest: &mut Guest, random: &mut Random) {
        let Some(result) = guest.carry_out(request, self.manner, random) else { return };
        let is_marked = request["execute"] == "guest-sync-delimited" && result.is_ok();
        let mut reply = match result {
            Ok(value) => json!({"return": value}),
            Err(error) => json!({"error": error}),
        };
        if let Some(id) = request.get("id") {
            reply["id"] = id.clone();
        }
        self.said.extend(is_marked.then_some(0xFF));
        self.said.extend(format!("{reply}\n").bytes());
    }
}

/// What outlives the agent.
#[derive(Default)]
struct Guest {
    frozen: bool,
}

impl Guest {
    /// `None`: there is no answer.
    fn carry_out(
        &mut self,
        request: &Value,
        manner: Manner,
        random: &mut Random,
    ) -> Option<Result<Value, Error>> {
        let status = if self.frozen { "frozen" } else { "thawed" };
        let is_sign = |name: &str| name != "tarn-fsfreeze-report" || manner != Manner::Old;
        let names: Vec<_> =
            ["guest-ping", "tarn-fsfreeze-report"].into_iter().filter(|name| is_sign(name)).collect();
        Some(Ok(match request["execute"].as_str().unwrap() {
            "guest-ping" => json!({}),
            "guest-sync" | "guest-sync-delimited" => request["arguments"]["id"].clone(),
            "guest-echo" => request["arguments"].clone(),
            "guest-info" => info(&names),
            "guest-fsfreeze-status" => json!(status),
            "guest-fsfreeze-freeze" if self.frozen => return Some(Err(Error::generic("frozen already"))),
            "guest-fsfreeze-freeze" => {
                self.frozen = true;
                json!(2)
            }
            "guest-fsfreeze-thaw" if random.below(8) == 0 => return Some(Err(Error::generic("not yet"))),
            "guest-fsfreeze-thaw" => json!(i32::from(std::mem::take(&mut self.frozen)) * 2),
            "guest-shutdown" if random.below(2) == 0 => return Some(Err(Error::generic("not now"))),
            "guest-shutdown" => return None,
            unknown => return Some(Err(Error::command_not_found(unknown))),
        }))
    }
}

/// The whole: what is asked, what comes back.
struct Model {
    lab: Lab,
    agent: Agent,
    guest: Guest,
    /// What each client waits for.
    pending: BTreeMap<u64, (String, Value)>,
    /// Clients that are connected and wait for nothing.
    resting: Vec<u64>,
    clients_ever: u64,
    asked: i64,
    answered: usize,
    /// Questions that were answered without the agent getting on.
    prompt: usize,
    running: bool,
}

impl Model {
    fn new(random: &mut Random) -> Self {
        let mut lab = Lab::new();
        lab.broker.port_opened(lab.now);
        Self {
            lab,
            agent: Agent::new(random),
            guest: Guest::default(),
            pending: BTreeMap::new(),
            resting: Vec::new(),
            clients_ever: 0,
            asked: 0,
            answered: 0,
            prompt: 0,
            running: true,
        }
    }

    /// A client, new or not, asks something.
    fn ask(&mut self, random: &mut Random) -> u64 {
        let names = [
            "guest-ping",
            "guest-sync",
            "guest-sync-delimited",
            "guest-info",
            "guest-fsfreeze-status",
            "guest-echo",
            "guest-echo",
            "guest-fsfreeze-freeze",
            "guest-fsfreeze-thaw",
            "guest-shutdown",
        ];
        self.ask_for(names[random.below(names.len())], random)
    }

    fn ask_for(&mut self, name: &str, random: &mut Random) -> u64 {
        let client = if self.resting.is_empty() || random.below(4) == 0 {
            self.clients_ever += 1;
            self.clients_ever
        } else {
            self.resting.swap_remove(random.below(self.resting.len()))
        };
        self.asked += 1;
        let arguments = match name {
            "guest-echo" => {
                json!({"from": client, "number": self.asked, "pad": "x".repeat(random.below(200))})
            }
            "guest-sync" | "guest-sync-delimited" => json!({"id": self.asked}),
            _ => json!({}),
        };
        self.lab.ask(Client::Socket(client), name, arguments.clone());
        self.pending.insert(client, (name.to_owned(), arguments));
        self.check();
        client
    }

    fn leave(&mut self, random: &mut Random) {
        let clients: Vec<u64> = self.pending.keys().chain(&self.resting).copied().collect();
        if clients.is_empty() {
            return;
        }
        let client = clients[random.below(clients.len())];
        let waits = self.pending.remove(&client).is_some();
        self.resting.retain(|resting| *resting != client);
        self.lab.broker.client_gone(Client::Socket(client), !waits, self.lab.now);
        self.check();
    }

    /// A client says that it does not wait any longer.
    fn start_afresh(&mut self, random: &mut Random) {
        let Some(client) = self.pending.keys().nth(random.below(self.pending.len().max(1))).copied() else {
            return;
        };
        if self.lab.broker.start_afresh(Client::Socket(client), self.lab.now) {
            self.pending.remove(&client);
            self.resting.push(client);
        }
        self.check();
    }

    /// So many bytes reach the agent.
    fn carry(&mut self, count: usize, random: &mut Random) {
        let bytes = self.lab.broker.to_guest()[..count].to_vec();
        self.lab.broker.sent_to_guest(count);
        self.agent.hear(&bytes, &mut self.guest, random);
    }

    /// So many bytes come from it.
    fn deliver(&mut self, count: usize) {
        let bytes: Vec<u8> = self.agent.said.drain(..count).collect();
        self.lab.say(&bytes);
        self.check();
    }

    fn die(&mut self, successor: Agent) {
        self.lab.broker.port_closed(self.lab.now);
        self.agent = successor;
        self.lab.broker.port_opened(self.lab.now);
        self.check();
    }

    /// Everything on the wire arrives, without the agent doing any work.
    fn settle(&mut self, random: &mut Random) {
        while !self.lab.broker.to_guest().is_empty() || !self.agent.said.is_empty() {
            self.carry(self.lab.broker.to_guest().len(), random);
            self.deliver(self.agent.said.len());
        }
    }

    /// Whoever has an answer waited for it, and it is right, or an error.
    fn check(&mut self) {
        for (client, result) in self.lab.outcomes() {
            let Client::Socket(client) = client else { panic!("{client}") };
            let (name, arguments) = self.pending.remove(&client).expect("an outcome that nobody waits for");
            self.resting.push(client);
            self.answered += 1;
            let Some(result) = result else {
                assert_eq!(name, "guest-shutdown");
                continue;
            };
            let Ok(value) = result else { continue };
            match name.as_str() {
                "guest-echo" => assert_eq!(value, arguments),
                "guest-sync" | "guest-sync-delimited" => assert_eq!(value, arguments["id"]),
                "guest-ping" => assert_eq!(value, json!({})),
                "guest-info" => assert!(value["supported_commands"].is_array(), "{value}"),
                "guest-fsfreeze-status" => assert!(value == "frozen" || value == "thawed", "{value}"),
                "guest-fsfreeze-freeze" | "guest-fsfreeze-thaw" => assert!(value.is_i64(), "{value}"),
                _ => panic!("{name} has no answer, but this: {value}"),
            }
        }
        assert!(self.lab.broker.to_guest().len() < 16 << 10, "one command and a few questions");
    }

    /// A question is answered although the agent does not get on with its work.
    fn expect_promptness(&mut self, random: &mut Random) {
        self.settle(random);
        let status = self.lab.broker.status(self.lab.now);
        let able = self.agent.manner == Manner::Able && status.out_of_band == Some(true);
        if !able || !status.in_sync || !self.running {
            return;
        }
        let client = self.ask_for(["guest-ping", "guest-sync", "guest-info"][random.below(3)], random);
        self.settle(random);
        assert!(!self.pending.contains_key(&client), "{status:?}");
        self.prompt += 1;
    }

    fn step(&mut self, random: &mut Random) {
        match random.below(40) {
            0..6 if self.pending.len() < 40 => _ = self.ask(random),
            6 if random.below(3) == 0 => self.leave(random),
            7..15 => self.carry(random.below(self.lab.broker.to_guest().len() + 1), random),
            15..22 => self.agent.work(&mut self.guest, random),
            22..30 => self.deliver(random.below(self.agent.said.len() + 1)),
            30 if random.below(10) == 0 => {
                let successor = Agent::new(random);
                self.die(successor);
            }
            31 if random.below(4) == 0 => {
                self.lab.pass(Duration::from_secs([0, 1, 10, 70, 700, 4000][random.below(6)]));
                self.check();
            }
            32 if random.below(4) == 0 => {
                self.running = random.below(3) > 0;
                self.lab.broker.vm_running(self.running, self.lab.now);
                self.check();
            }
            35 => self.start_afresh(random),
            33 | 34 => self.expect_promptness(random),
            _ => {}
        }
    }
}

#[test]
fn whatever_agent_is_there_every_client_gets_its_own_answer_and_no_freeze_outlives_its_owner() {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = std::env::var("SEED").map_or(u64::from(clock.subsec_nanos()), |seed| seed.parse().unwrap());
    println!("SEED={seed}");
    let mut random = Random(seed);
    let mut prompt = 0;
    for _ in 0..20 {
        let mut model = Model::new(&mut random);
        for _ in 0..3_000 {
            model.step(&mut random);
        }
        // An agent that works is there from now on, and the clients leave once they have their answers.
        model.lab.broker.vm_running(true, model.lab.now);
        let manner = [Manner::Old, Manner::Able][random.below(2)];
        model.die(Agent::with_manner(manner));
        for _ in 0..300 {
            model.settle(&mut random);
            model.agent.work(&mut model.guest, &mut random);
        }
        assert!(model.pending.is_empty(), "{:?}", model.pending);
        assert!(model.answered > 50, "{} answers", model.answered);
        for client in std::mem::take(&mut model.resting) {
            model.lab.broker.client_gone(Client::Socket(client), true, model.lab.now);
        }
        for _ in 0..30 {
            model.lab.pass(Duration::from_secs(60));
            model.settle(&mut random);
            model.agent.work(&mut model.guest, &mut random);
            model.settle(&mut random);
        }
        assert!(!model.guest.frozen, "the guest was left frozen");
        assert_eq!(model.lab.broker.status(model.lab.now).frozen, None);
        prompt += model.prompt;
    }
    assert!(prompt > 50, "{prompt} prompt answers");
}
