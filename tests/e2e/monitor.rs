//! The monitor of a running VM, byte by byte: what it says, what it refuses, and that no client can harm another.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde_json::{Value, json};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::harness::{Lab, Vm, eventually, limit};
use crate::payload::Then;

/// A VM whose guest does nothing, and the path of its monitor.
fn quiet_vm<'a>(lab: &'a Lab, name: &'static str) -> (Vm<'a>, PathBuf) {
    let payload = lab.payload(Then::Halt);
    let mut vm = lab.launch(name, &payload.iter().map(String::as_str).collect::<Vec<_>>());
    vm.monitor();
    let path = vm.socket("monitor.sock");
    (vm, path)
}

/// A connection without any library in between.
struct Client {
    stream: UnixStream,
    pending: Vec<u8>,
}

impl Client {
    /// Connects; the greeting has not been read.
    fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(limit())).unwrap();
        Self { stream, pending: Vec::new() }
    }

    /// Connects and negotiates.
    fn negotiated(path: &Path) -> Self {
        let mut client = Self::connect(path);
        assert!(client.message()["QMP"].is_object());
        assert_eq!(client.ask(r#"{"execute": "qmp_capabilities"}"#), json!({"return": {}}));
        client
    }

    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    /// The next line without its end, which is CR LF; `None` at the end of the connection.
    fn line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                assert!(line.is_ascii() && line.ends_with(b"\r\n"), "{:?}", String::from_utf8_lossy(&line));
                return Some(String::from_utf8_lossy(&line[..line.len() - 2]).into_owned());
            }
            let mut buffer = [0; 64 << 10];
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(count) => self.pending.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("no message: {error}"),
            }
        }
    }

    fn message(&mut self) -> Value {
        serde_json::from_str(&self.line().expect("a message")).unwrap()
    }

    /// The next message that is no event.
    fn reply(&mut self) -> Value {
        loop {
            let message = self.message();
            if message.get("event").is_none() {
                return message;
            }
        }
    }

    fn ask(&mut self, request: impl AsRef<[u8]>) -> Value {
        self.send(request);
        self.reply()
    }

    fn run(&mut self, command: &str) -> Value {
        let reply = self.ask(json!({"execute": command}).to_string());
        reply.get("return").cloned().unwrap_or_else(|| panic!("{command}: {reply}"))
    }

    /// Class and text of the error that this request gets.
    fn refusal(&mut self, request: impl AsRef<[u8]>) -> (String, String) {
        let reply = self.ask(request);
        let text = |name: &str| reply["error"][name].as_str().unwrap_or_else(|| panic!("{reply}")).to_owned();
        (text("class"), text("desc"))
    }

    /// Shows that client and VM are well, and that no stray reply is on its way.
    fn is_well(&mut self) {
        let reply = self.ask(r#"{"execute": "query-status", "id": "well"}"#);
        assert_eq!(reply, json!({"return": {"status": "running", "running": true}, "id": "well"}));
    }
}

/// Resident memory of a process in bytes.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// What clients without manners may make the VMM keep.
const BOUND: u64 = 24 << 20;

fn quit(mut vm: Vm<'_>) {
    vm.monitor().run("quit");
    assert!(vm.wait().success(), "{}", vm.log());
}

#[test]
fn clients_negotiate_each_for_itself_and_get_their_ids_back() {
    let Some(lab) = Lab::for_payloads("negotiation") else { return };
    let (vm, path) = quiet_vm(&lab, "polite");
    let mut client = Client::connect(&path);
    let greeting = client.message();
    let version = &greeting["QMP"]["version"];
    for number in ["major", "minor", "micro"] {
        assert!(version["qemu"][number].is_u64(), "{greeting}");
    }
    assert!(version["package"].is_string() && greeting["QMP"]["capabilities"] == json!([]), "{greeting}");
    assert_eq!(
        client.refusal(r#"{"execute": "query-status"}"#),
        ("CommandNotFound".into(), "Expecting capabilities negotiation with 'qmp_capabilities'".into())
    );
    let oob = r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}"#;
    assert_eq!(client.refusal(oob), ("GenericError".into(), "Capability oob not available".into()));
    let unknown = r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["telepathy"]}}"#;
    assert_eq!(client.refusal(unknown).0, "GenericError");
    assert_eq!(client.ask(r#"{"execute":"qmp_capabilities","id":0}"#), json!({"return": {}, "id": 0}));
    assert_eq!(
        client.refusal(r#"{"execute": "qmp_capabilities"}"#),
        ("CommandNotFound".into(), "Capabilities negotiation is already complete, command ignored".into())
    );

    for id in
        [json!(7), json!("x"), json!(null), json!({"a": [1, 2.5]}), json!(u64::MAX), json!("\u{e9}\u{1f980}")]
    {
        let reply = client.ask(json!({"execute": "query-name", "id": id}).to_string());
        assert_eq!(reply, json!({"return": {"name": "polite"}, "id": id}));
        let reply = client.ask(json!({"execute": "no-such", "id": id}).to_string());
        assert_eq!(reply["id"], id, "{reply}");
        assert_eq!(reply["error"]["desc"], "The command no-such has not been found");
    }
    // Several requests in one write, one request in many, with no line end anywhere.
    let burst: String = (0..50).map(|id| json!({"execute": "query-status", "id": id}).to_string()).collect();
    client.send(burst);
    let ids: Vec<_> = (0..50).map(|_| client.reply()["id"].as_u64().unwrap()).collect();
    assert!(ids.iter().copied().eq(0..50), "{ids:?}");
    for byte in br#"{'execute': 'query-status', 'id': 'single quotes'}"#.chunks(1) {
        client.send(byte);
    }
    assert_eq!(client.reply()["id"], "single quotes");

    // Another client starts from the beginning; one that leaves in the middle of a request is nobody's trouble.
    let mut other = Client::connect(&path);
    other.message();
    assert_eq!(other.refusal(r#"{"execute": "stop"}"#).0, "CommandNotFound");
    other.send(r#"{"execute": "quit", "#);
    drop(other);
    client.is_well();
    quit(vm);
}

#[test]
fn nonsense_gets_one_error_and_the_next_request_its_answer() {
    let Some(lab) = Lab::for_payloads("nonsense") else { return };
    let (vm, path) = quiet_vm(&lab, "patient");
    let mut client = Client::negotiated(&path);
    for (request, desc) in [
        ("garbage\n", "JSON parse error, invalid keyword 'garbage'"),
        ("[1, 2]\n", "QMP input must be a JSON object"),
        ("\"text\"\n", "QMP input must be a JSON object"),
        ("{}", "QMP input lacks member 'execute'"),
        (r#"{"execute": 5}"#, "QMP input member 'execute' must be a string"),
        (r#"{"execute": "query-status", "arguments": []}"#, "QMP input member 'arguments' must be an object"),
        (r#"{"execute": "query-status", "extra": 1}"#, "QMP input member 'extra' is unexpected"),
        (r#"{"execute": "query-status", "exec-oob": "stop"}"#, "QMP input member 'exec-oob' is unexpected"),
        (r#"{"exec-oob": "query-status"}"#, "QMP input member 'exec-oob' is unexpected"),
        (r#"{"execute": "query-status", "arguments": {"a": 1}}"#, "Parameter 'a' is unexpected"),
        (r#"{"execute": "getfd"}"#, "Parameter 'fdname' is missing"),
        (
            r#"{"execute": "getfd", "arguments": {"fdname": 1}}"#,
            "Invalid parameter type for 'fdname', expected: string",
        ),
        (r#"{"execute": "stop", "execute": "quit"}"#, "JSON parse error, duplicate key"),
        ("{\"execute\": \"stop\"\n]", "JSON parse error, expected separator in dict"),
    ] {
        assert_eq!(client.refusal(request).1, desc, "{request}");
        client.is_well();
    }
    // What is cut off by a byte that resynchronises is one error at most.
    client.send(b"{\"execute\": \"quit\", \"id\": [[[\xff");
    client.is_well_after_errors();
    client.send("[".repeat(10_000) + &"]".repeat(10_000) + "\n");
    assert!(client.reply()["error"]["desc"].as_str().unwrap().contains("nesting depth limit exceeded"));
    client.is_well();
    client.send(format!("{}1{}", "{\"a\":".repeat(10_000), "}".repeat(10_000)));
    assert!(client.reply()["error"]["desc"].as_str().unwrap().contains("nesting depth limit exceeded"));
    client.is_well();
    let gigantic = json!({"execute": "getfd", "arguments": {"fdname": "x".repeat(2 << 20)}}).to_string();
    assert_eq!(client.refusal(gigantic).1, "JSON token size limit exceeded");
    client.is_well();
    let many = format!("{{\"execute\": [{}1]}}", "1,".repeat(200_000));
    assert!(client.refusal(many).1.contains("limit exceeded"));
    client.is_well();
    quit(vm);
}

impl Client {
    /// [`is_well`](Self::is_well), with errors before it.
    fn is_well_after_errors(&mut self) {
        self.send(r#"{"execute": "query-status", "id": "well"}"#);
        while self.reply()["id"] != "well" {}
    }
}

#[test]
fn a_request_that_never_ends_takes_neither_memory_nor_time_from_others() {
    let Some(lab) = Lab::for_payloads("endless") else { return };
    let (mut vm, path) = quiet_vm(&lab, "endless");
    let mut client = Client::negotiated(&path);
    client.is_well();
    let before = resident(vm.pid());
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let (path, done) = (&path, &done);
        for beginning in ["{\"execute\": \"", "[", "{\"a\": 1234", "\"\\u00"] {
            scope.spawn(move || {
                let mut endless = Client::negotiated(path);
                endless.send(beginning);
                let piece = if beginning == "[" { "[1, ".repeat(16 << 10) } else { "7".repeat(64 << 10) };
                for _ in 0..256 {
                    // Its errors are never read; being thrown out is as good.
                    if endless.stream.write_all(piece.as_bytes()).is_err() {
                        break;
                    }
                }
                done.store(true, Ordering::Release);
            });
        }
        while !done.load(Ordering::Acquire) {
            client.is_well();
        }
    });
    client.is_well();
    let grown = resident(vm.pid()).saturating_sub(before);
    assert!(grown < BOUND, "64 MiB of endless requests have cost {grown} bytes");
    vm.monitor().run("query-status");
    quit(vm);
}

#[test]
fn a_client_that_does_not_read_waits_alone_and_loses_no_reply() {
    const REQUESTS: u64 = 1500;
    let Some(lab) = Lab::for_payloads("slow-reader") else { return };
    let (vm, path) = quiet_vm(&lab, "unread");
    let mut quick = Client::negotiated(&path);
    let before = resident(vm.pid());
    let mut slow = Client::negotiated(&path);
    let mut sender = slow.stream.try_clone().unwrap();
    let sending = thread::spawn(move || {
        for id in 0..REQUESTS {
            let request = json!({"execute": "query-qmp-schema", "id": id}).to_string();
            sender.write_all(request.as_bytes()).unwrap();
        }
    });
    for _ in 0..200 {
        quick.is_well();
    }
    let grown = resident(vm.pid()).saturating_sub(before);
    assert!(grown < BOUND, "replies that nobody reads have cost {grown} bytes");
    for id in 0..REQUESTS {
        assert_eq!(slow.reply()["id"], id);
    }
    sending.join().unwrap();
    slow.is_well();
    quit(vm);
}

#[test]
fn many_clients_are_served_at_once_and_one_more_when_one_has_left() {
    const CLIENTS: usize = 32;
    let Some(lab) = Lab::for_payloads("many-clients") else { return };
    let (vm, path) = quiet_vm(&lab, "popular");
    // The seat of the client that waited for the VM may take a moment to become free.
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| eventually("a seat", || seat(&path))).collect();
    for _ in 0..100 {
        assert!(seat(&path).is_none(), "one too many is turned away");
    }
    assert_eq!(vm.log().matches("Turned clients away").count(), 1, "{}", vm.log());
    clients.iter_mut().for_each(Client::is_well);
    clients[CLIENTS - 1].run("stop");
    for client in &mut clients[..CLIENTS - 1] {
        assert_eq!(client.message()["event"], "STOP");
    }
    clients[0].run("cont");
    drop(clients.swap_remove(10));
    let mut next = eventually("the seat of the one that left", || seat(&path));
    next.is_well();
    drop((clients, next));
    eventually("seats again", || seat(&path));
    quit(vm);
}

/// A negotiated client; `None` when it was turned away.
fn seat(path: &Path) -> Option<Client> {
    let mut client = Client::connect(path);
    client.line()?;
    assert_eq!(client.ask(r#"{"execute": "qmp_capabilities"}"#), json!({"return": {}}));
    Some(client)
}

#[test]
fn events_come_before_the_reply_of_what_caused_them_and_to_everybody() {
    let Some(lab) = Lab::for_payloads("events") else { return };
    let (mut vm, path) = quiet_vm(&lab, "eventful");
    let mut deaf = Client::connect(&path);
    let (mut client, mut witness) = (Client::negotiated(&path), Client::negotiated(&path));
    let mut step = |command: &str, event: &[&str], status: &str| {
        client.send(json!({"execute": command, "id": command}).to_string());
        for name in event {
            let (told, seen) = (client.message(), witness.message());
            assert_eq!(told, seen, "with the same time stamp");
            assert_eq!(told["event"], *name, "{told}");
            assert!(told["timestamp"]["seconds"].as_i64().unwrap() > 1_700_000_000);
            assert!((0..1_000_000).contains(&told["timestamp"]["microseconds"].as_i64().unwrap()));
        }
        assert_eq!(client.message(), json!({"return": {}, "id": command}));
        client.send(r#"{"execute": "query-status"}"#);
        assert_eq!(client.message()["return"]["status"], status, "after {command}");
    };
    step("stop", &["STOP"], "paused");
    step("stop", &[], "paused");
    step("cont", &["RESUME"], "running");
    step("cont", &[], "running");
    step("stop", &["STOP"], "paused");
    step("system_reset", &["RESET"], "prelaunch");
    step("cont", &["RESUME"], "running");
    step("system_powerdown", &["POWERDOWN"], "running");

    client.send(r#"{"execute": "quit"}"#);
    let told = client.message();
    assert_eq!(
        (&told["event"], &told["data"]),
        (&json!("SHUTDOWN"), &json!({"guest": false, "reason": "host-qmp-quit"}))
    );
    assert_eq!(client.message(), json!({"return": {}}));
    assert_eq!(client.line(), None);
    assert_eq!(witness.message()["event"], "SHUTDOWN");
    assert_eq!(witness.line(), None);
    assert!(deaf.message()["QMP"].is_object());
    assert_eq!(deaf.line(), None, "who has not negotiated hears nothing");
    assert!(vm.wait().success());
}

#[test]
fn the_status_is_one_of_those_there_can_be_whatever_others_do() {
    let Some(lab) = Lab::for_payloads("status-always") else { return };
    let (vm, path) = quiet_vm(&lab, "watched");
    let mut driver = Client::negotiated(&path);
    let done = AtomicBool::new(false);
    let asked = thread::scope(|scope| {
        let watchers: Vec<_> = (0..3).map(|_| scope.spawn(|| watch(&path, &done))).collect();
        for round in 0..60 {
            for command in ["stop", "stop", "cont", "cont"] {
                driver.run(command);
            }
            if round % 5 == 0 {
                driver.run("system_reset");
            }
        }
        done.store(true, Ordering::Release);
        watchers.into_iter().map(|watcher| watcher.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(asked.iter().all(|&count| count > 20), "nobody starves: {asked:?}");
    driver.is_well();
    quit(vm);
}

fn watch(path: &Path, done: &AtomicBool) -> usize {
    let mut client = Client::negotiated(path);
    let mut asked = 0;
    while !done.load(Ordering::Acquire) {
        let status = client.run("query-status");
        let name = status["status"].as_str().unwrap();
        assert!(["running", "paused", "prelaunch"].contains(&name), "{status}");
        assert_eq!(status["running"], name == "running");
        asked += 1;
    }
    asked
}

#[test]
fn descriptors_are_handed_in_named_put_into_sets_and_closed() {
    let Some(lab) = Lab::for_payloads("descriptors") else { return };
    let (vm, path) = quiet_vm(&lab, "handy");
    let open_fds = || fs::read_dir(format!("/proc/{}/fd", vm.pid())).unwrap().count();
    let (mut client, mut other) = (Client::negotiated(&path), Client::negotiated(&path));
    client.is_well();
    let before = open_fds();
    let file = File::open("/dev/null").unwrap();
    let request =
        |command: &str, arguments: Value| json!({"execute": command, "arguments": arguments}).to_string();
    let none = "No file descriptor supplied via SCM_RIGHTS";
    assert_eq!(client.refusal(request("getfd", json!({"fdname": "disk"}))).1, none);
    assert_eq!(client.refusal(request("add-fd", json!({}))).1, none);

    let hand_in = |client: &Client, with: &[u8]| {
        assert_eq!(client.stream.send_with_fd(with, file.as_raw_fd()).unwrap(), with.len());
    };
    // With the request, or with a blank before it, as the Python library does.
    hand_in(&client, request("getfd", json!({"fdname": "disk"})).as_bytes());
    assert_eq!(client.reply(), json!({"return": {}}));
    hand_in(&client, b" ");
    assert_eq!(client.ask(request("getfd", json!({"fdname": "disk"}))), json!({"return": {}}));
    assert_eq!(open_fds(), before + 1, "the same name again closes the first");
    hand_in(&client, b" ");
    let digit = client.refusal(request("getfd", json!({"fdname": "1st"}))).1;
    assert_eq!(digit, "Parameter 'fdname' expects a name not starting with a digit");
    assert_eq!(
        other.refusal(request("closefd", json!({"fdname": "disk"}))).1,
        "File descriptor named 'disk' not found"
    );
    assert_eq!(client.ask(request("closefd", json!({"fdname": "disk"}))), json!({"return": {}}));
    assert_eq!(
        client.refusal(request("closefd", json!({"fdname": "disk"}))).1,
        "File descriptor named 'disk' not found"
    );
    assert_eq!(open_fds(), before);

    let mut add = |arguments: Value| {
        hand_in(&client, b" ");
        client.ask(request("add-fd", arguments))["return"].clone()
    };
    let first = add(json!({"opaque": "the first"}));
    let second = add(json!({"fdset-id": first["fdset-id"]}));
    let far = add(json!({"fdset-id": 40}));
    drop(client);
    let sets = other.run("query-fdsets");
    assert_eq!(sets[0]["fdset-id"], 40, "highest first: {sets}");
    assert_eq!(sets[1]["fds"].as_array().unwrap().len(), 2, "they survive who handed them in: {sets}");
    assert!(
        sets[1]["fds"].as_array().unwrap().contains(&json!({"fd": first["fd"], "opaque": "the first"})),
        "{sets}"
    );
    let gone = json!({"fdset-id": first["fdset-id"], "fd": second["fd"]});
    assert_eq!(other.ask(request("remove-fd", gone.clone())), json!({"return": {}}));
    assert!(other.refusal(request("remove-fd", gone)).1.contains("not found"));
    for id in [&first["fdset-id"], &far["fdset-id"]] {
        assert_eq!(other.ask(request("remove-fd", json!({"fdset-id": id}))), json!({"return": {}}));
    }
    assert_eq!(other.run("query-fdsets"), json!([]));
    eventually("all of them closed", || (open_fds() == before - 1).then_some(()));

    // Whoever sends descriptors without end keeps a few.
    for _ in 0..500 {
        hand_in(&other, b" ");
    }
    other.is_well();
    assert!(open_fds() < before + 40, "{}", open_fds());
    quit(vm);
}

#[test]
fn every_query_returns_what_the_schema_says() {
    let Some(lab) = Lab::for_payloads("schema") else { return };
    let disk = lab.image("disk.raw", 1 << 20);
    let payload = lab.payload(Then::Halt);
    let mut args: Vec<&str> = payload.iter().map(String::as_str).collect();
    let disk = format!("{},serial=S1", disk.display());
    args.extend(["--disk", &disk, "--cpus", "2"]);
    let mut vm = lab.launch("described", &args);
    vm.monitor();
    let mut client = Client::negotiated(&vm.socket("monitor.sock"));
    let entities = client.run("query-qmp-schema");
    let schema = Schema(entities.as_array().unwrap());
    let mut commands: Vec<_> = client
        .run("query-commands")
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["name"].as_str().unwrap().to_owned())
        .collect();
    let mut described: Vec<_> =
        schema.of("command").map(|entity| entity["name"].as_str().unwrap().to_owned()).collect();
    commands.sort();
    described.sort();
    assert_eq!(commands, described);
    // There has been no pivot to tell of.
    let answered = |name: &&String| {
        name.starts_with("query-") || name.starts_with("tarn-query-") && **name != "tarn-query-pivot"
    };
    let mut queries = 0;
    for command in commands.iter().filter(answered) {
        let entity = schema.of("command").find(|entity| entity["name"] == **command).unwrap();
        schema.check(&client.run(command), entity["ret-type"].as_str().unwrap(), command);
        queries += 1;
    }
    assert!(queries >= 12, "{commands:?}");
    client.send(r#"{"execute": "stop"}"#);
    let event = client.message();
    let entity =
        schema.of("event").find(|entity| entity["name"] == event["event"]).expect("STOP is described");
    schema.check(event.get("data").unwrap_or(&json!({})), entity["arg-type"].as_str().unwrap(), "STOP");
    quit(vm);
}

/// What `query-qmp-schema` returned.
struct Schema<'a>(&'a [Value]);

impl Schema<'_> {
    fn of(&self, meta: &'static str) -> impl Iterator<Item = &Value> {
        self.0.iter().filter(move |entity| entity["meta-type"] == meta)
    }

    fn check(&self, value: &Value, name: &str, path: &str) {
        let entity = self
            .0
            .iter()
            .find(|entity| entity["name"] == name)
            .unwrap_or_else(|| panic!("{path}: no type {name}"));
        let list = |member: &str| entity[member].as_array().cloned().unwrap_or_default();
        match entity["meta-type"].as_str().unwrap() {
            "builtin" => {
                assert!(is_json(value, entity["json-type"].as_str().unwrap()), "{path}: {value} as {entity}");
            }
            "enum" => assert!(list("values").contains(value), "{path}: {value} as {entity}"),
            "array" => {
                for (index, item) in
                    value.as_array().unwrap_or_else(|| panic!("{path}: {value}")).iter().enumerate()
                {
                    self.check(item, entity["element-type"].as_str().unwrap(), &format!("{path}[{index}]"));
                }
            }
            "object" => {
                let object = value.as_object().unwrap_or_else(|| panic!("{path}: {value} as {entity}"));
                let mut members = list("members");
                if let Some(tag) = entity.get("tag").and_then(Value::as_str) {
                    let case = list("variants").into_iter().find(|case| case["case"] == object[tag]);
                    let case =
                        case.and_then(|case| self.0.iter().find(|entity| entity["name"] == case["type"]));
                    members.extend(
                        case.and_then(|case| case["members"].as_array().cloned()).unwrap_or_default(),
                    );
                }
                for member in &members {
                    let name = member["name"].as_str().unwrap();
                    match object.get(name) {
                        Some(value) => {
                            self.check(value, member["type"].as_str().unwrap(), &format!("{path}.{name}"));
                        }
                        None => {
                            assert!(member.get("default").is_some(), "{path}: {name} is missing in {value}");
                        }
                    }
                }
                let known = |name: &String| members.iter().any(|member| member["name"] == **name);
                assert!(object.keys().all(known), "{path}: more than {entity} in {value}");
            }
            other => panic!("{path}: {other} is no type of a value"),
        }
    }
}

fn is_json(value: &Value, kind: &str) -> bool {
    match kind {
        "string" => value.is_string(),
        "int" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "value" => true,
        _ => false,
    }
}
