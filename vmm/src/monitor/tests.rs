//! Whole sessions over real sockets, against a fake VM.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use protocol::Map;
use serde_json::json;
use tempfile::TempDir;
use uuid::Uuid;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::schema::{Type, conforms};
use super::*;
use crate::guest_channel::{AgentStatus, FreezeStatus};
use crate::jobs::nodes::{NodeSource, NodeSpec, Nodes};
use crate::jobs::registry::JobDone;
use crate::jobs::testing::FakeDisks;
use crate::jobs::{Disks, Jobs};
use crate::pauses::{Holder, Pauses};
use crate::run_state::RunState;

mod backup;
mod filters;
mod jobs;
mod pivot;

/// A VM that does what it is told at once.
struct FakeVm {
    state: RunState,
    events: Vec<Event>,
    requests: Vec<(SessionId, String, Map)>,
    closed: Vec<SessionId>,
    quit: bool,
    pauses: Pauses,
    filters: block::Filters,
    jobs: Jobs,
    disks: FakeDisks,
    /// Ends of jobs that have threads.
    done: std::sync::mpsc::Receiver<JobDone>,
}

impl FakeVm {
    fn new() -> Self {
        let node = |disk| {
            let source = NodeSource::Path(format!("/images/{disk}.raw").into());
            let filters = Some(block::Filters::new().unwrap());
            (None, NodeSpec { direct: true, filters, ..NodeSpec::new(source) })
        };
        let (sender, done) = std::sync::mpsc::channel();
        let post = move || {
            let sender = sender.clone();
            Box::new(move |done| sender.send(done).unwrap_or_default()) as Box<dyn FnOnce(JobDone) + Send>
        };
        let disks = FakeDisks::default();
        Self {
            state: RunState::Running,
            events: Vec::new(),
            requests: Vec::new(),
            closed: Vec::new(),
            quit: false,
            pauses: Pauses::default(),
            filters: block::Filters::new().unwrap(),
            jobs: Jobs::new(Nodes::new([node("a"), node("b")]), disks.count(), Box::new(post)),
            disks,
            done,
        }
    }
}

impl Vm for FakeVm {
    fn name(&self) -> String {
        "fake".into()
    }
    fn uuid(&self) -> Uuid {
        Uuid::nil()
    }
    fn run_state(&self) -> RunState {
        self.state
    }
    fn cpus(&self) -> Vec<CpuInfo> {
        vec![CpuInfo { index: 0, thread_id: 17, socket: 0, core: 0, thread: 0 }]
    }
    fn chardevs(&self) -> Vec<ChardevInfo> {
        vec![ChardevInfo { label: "agent".into(), filename: "unix:/x".into(), frontend_open: true }]
    }
    fn disks(&self) -> Vec<DiskInfo> {
        let filters = Some(self.filters.clone());
        let (device, io_status) = ("disk0".into(), IoStatus::Ok);
        vec![DiskInfo { device, virtual_size: 1 << 30, block_size: 512, io_status, filters }]
    }
    fn agent(&self) -> AgentStatus {
        let frozen = FreezeStatus { by: Some("agent client 1".into()), thaw_in: None };
        AgentStatus {
            connected: true,
            in_sync: true,
            out_of_band: Some(true),
            frozen: Some(frozen),
            automatic_thaws: 2,
            malformed_replies: 0,
        }
    }
    fn stop(&mut self, by: Holder) -> Result<(), VmError> {
        self.pauses.add(by)?;
        if self.state == RunState::Running {
            self.state = RunState::Paused;
            self.events.push(Event::Stop);
        }
        Ok(())
    }
    fn paused_by(&self) -> Vec<Holder> {
        self.pauses.list()
    }
    fn cont(&mut self, by: Holder, force: bool) -> Result<(), VmError> {
        if !self.pauses.remove(by, force)? {
            return Ok(());
        }
        match self.state {
            RunState::Running => Ok(()),
            RunState::GuestPanicked => Err(VmError::ResetRequired),
            _ => {
                self.state = RunState::Running;
                self.events.push(Event::Resume);
                Ok(())
            }
        }
    }
    fn system_reset(&mut self) -> Result<(), VmError> {
        self.events.push(Event::Reset(ShutdownCause::HostReset));
        Ok(())
    }
    fn system_wakeup(&mut self) -> Result<(), VmError> {
        Err(VmError::NotSuspended)
    }

    fn system_powerdown(&mut self) -> Result<(), VmError> {
        let source = std::io::Error::other("no power button");
        Err(VmError::Failed(Box::new(SocketError::Listen { path: "/x".into(), source })))
    }
    fn resize_disk(&mut self, _: usize, _: u64) -> Result<(), VmError> {
        Ok(())
    }
    fn block(&mut self) -> BlockLayer<'_> {
        BlockLayer { jobs: &mut self.jobs, disks: &self.disks }
    }
    fn quit(&mut self) {
        self.quit = true;
        self.events.push(Event::Shutdown(ShutdownCause::HostQuit));
        self.jobs.end_all(&self.disks);
    }
    fn take_events(&mut self) -> Vec<Event> {
        let mut events = std::mem::take(&mut self.events);
        events.append(&mut self.jobs.take_events());
        events
    }
    fn guest_request(&mut self, session: SessionId, execute: String, arguments: Map) {
        self.requests.push((session, execute, arguments));
    }
    fn guest_session_closed(&mut self, session: SessionId) {
        self.closed.push(session);
    }
}

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

struct Lab {
    directory: TempDir,
    monitor: Monitor,
    vm: FakeVm,
    watch: Registrations,
    now: Instant,
}

impl Lab {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut watch = Registrations::default();
        let monitor = Monitor::bind(&directory.path().join("monitor.sock"), &mut watch).unwrap();
        let vm = FakeVm::new();
        Self { directory, monitor, vm, watch, now: Instant::now() }
    }

    /// One round of the loop.
    fn turn(&mut self) {
        for (token, interest) in self.watch.0.clone().into_values() {
            let ready = Ready { readable: interest.read, writable: interest.write, hung_up: true };
            self.monitor.ready(token, ready, &mut self.vm, self.now, &mut self.watch);
        }
    }

    fn connect(&mut self) -> Client {
        let stream = UnixStream::connect(self.directory.path().join("monitor.sock")).unwrap();
        stream.set_nonblocking(true).unwrap();
        self.turn();
        Client { stream, received: Vec::new(), ended: false }
    }

    /// A client that has negotiated.
    fn client(&mut self) -> Client {
        let mut client = self.connect();
        client.send(r#"{"execute":"qmp_capabilities"}"#);
        self.turn();
        assert_eq!(client.messages().len(), 2);
        client
    }

    fn ask(&mut self, client: &mut Client, request: &Value) -> Value {
        client.send(&request.to_string());
        // A read ends where descriptors came with the bytes (unix(7)), so one round may not be enough.
        self.turn();
        self.turn();
        let mut messages = client.messages();
        messages.retain(|message| message.get("event").is_none());
        assert_eq!(messages.len(), 1, "{request}: {messages:?}");
        messages.remove(0)
    }

    fn emit(&mut self, event: &Event) {
        self.monitor.emit(event, &mut self.vm, self.now, &mut self.watch);
    }

    fn complete(&mut self, session: SessionId, result: Result<Value, Error>) {
        self.monitor.complete(session, result, &mut self.vm, self.now, &mut self.watch);
    }
}

struct Client {
    stream: UnixStream,
    received: Vec<u8>,
    ended: bool,
}

impl Client {
    fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    fn receive(&mut self) {
        let mut buffer = [0; 65536];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return self.ended = true,
                Ok(length) => self.received.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// What has come since, line by line.
    fn lines(&mut self) -> Vec<String> {
        self.receive();
        let text = String::from_utf8(std::mem::take(&mut self.received)).unwrap();
        assert!(text.is_ascii());
        assert!(text.is_empty() || text.ends_with("\r\n"), "{text}");
        assert_eq!(text.matches('\n').count(), text.matches("\r\n").count());
        text.lines().map(str::to_owned).collect()
    }

    fn messages(&mut self) -> Vec<Value> {
        self.lines().iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

fn names(messages: &[Value]) -> Vec<&str> {
    let name = |message: &Value| message.as_object().unwrap().keys().next().cloned();
    messages
        .iter()
        .map(|message| match message.get("event").and_then(Value::as_str) {
            Some(event) => event,
            None if name(message).as_deref() == Some("error") => "error",
            None => "return",
        })
        .collect()
}

#[test]
fn the_greeting_is_what_clients_look_for() {
    let mut lab = Lab::new();
    let mut client = lab.connect();
    let greeting = client.messages().remove(0);
    let qemu = &greeting["QMP"]["version"]["qemu"];
    assert!(qemu["major"].is_u64() && qemu["minor"].is_u64() && qemu["micro"].is_u64(), "{greeting}");
    assert!(greeting["QMP"]["version"]["package"].as_str().unwrap().starts_with("tarn-"));
    assert_eq!(greeting["QMP"]["capabilities"], json!([]));
}

#[test]
fn nothing_works_before_the_negotiation_and_negotiating_twice_does_not() {
    let mut lab = Lab::new();
    let mut client = lab.connect();
    client.messages();
    let reply = lab.ask(&mut client, &json!({"execute": "query-status", "id": 1}));
    assert_eq!(
        reply,
        json!({"id": 1, "error": {
            "class": "CommandNotFound",
            "desc": "Expecting capabilities negotiation with 'qmp_capabilities'",
        }})
    );
    let reply = lab.ask(&mut client, &json!({"execute": "guest-ping"}));
    assert_eq!(reply["error"]["class"], "CommandNotFound");
    let oob = json!({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}});
    assert_eq!(lab.ask(&mut client, &oob)["error"]["desc"], "Capability oob not available");
    let unknown = json!({"execute": "qmp_capabilities", "arguments": {"enable": ["foo"]}});
    assert_eq!(lab.ask(&mut client, &unknown)["error"]["class"], "GenericError");
    let none = json!({"execute": "qmp_capabilities", "arguments": {"enable": []}});
    assert_eq!(lab.ask(&mut client, &none), json!({"return": {}}));
    assert_eq!(
        lab.ask(&mut client, &none)["error"],
        json!({
            "class": "CommandNotFound",
            "desc": "Capabilities negotiation is already complete, command ignored",
        })
    );
}

#[test]
fn events_go_to_everyone_who_has_negotiated_and_come_before_the_return() {
    let mut lab = Lab::new();
    let (mut asks, mut listens, mut silent) = (lab.client(), lab.client(), lab.connect());
    asks.send(r#"{"execute":"stop","id":"s"}{"execute":"stop","id":"again"}{"execute":"cont"}"#);
    lab.turn();
    let messages = asks.messages();
    assert_eq!(names(&messages), ["STOP", "return", "return", "RESUME", "return"]);
    assert!(messages[0].get("data").is_none());
    assert_eq!(messages[1], json!({"return": {}, "id": "s"}));
    assert!(messages[4].get("id").is_none());
    let heard = listens.messages();
    assert_eq!(names(&heard), ["STOP", "RESUME"]);
    assert_eq!(heard[0]["timestamp"], messages[0]["timestamp"]);
    assert_eq!(silent.messages().len(), 1);
    silent.send(r#"{"execute":"qmp_capabilities"}"#);
    lab.turn();
    assert_eq!(silent.messages(), [json!({"return": {}})]);
}

#[test]
fn the_vms_refusals_reach_the_client_with_their_causes() {
    let mut lab = Lab::new();
    let mut client = lab.client();
    lab.vm.state = RunState::GuestPanicked;
    let reply = lab.ask(&mut client, &json!({"execute": "cont"}));
    assert_eq!(reply["error"]["desc"], "Resetting the Virtual Machine is required");
    let reply = lab.ask(&mut client, &json!({"execute": "system_powerdown"}));
    assert_eq!(reply["error"]["desc"], "Cannot listen on \"/x\": no power button");
    let reply = lab.ask(&mut client, &json!({"execute": "query-status"}));
    assert_eq!(reply["return"], json!({"status": "guest-panicked", "running": false}));
}

#[test]
fn faulty_requests_get_the_recorded_errors() {
    let mut lab = Lab::new();
    let mut client = lab.client();
    for (request, class, desc) in [
        ("[] ", "GenericError", "QMP input must be a JSON object"),
        ("{'x':1}", "GenericError", "QMP input member 'x' is unexpected"),
        ("{}", "GenericError", "QMP input lacks member 'execute'"),
        ("{'execute':1}", "GenericError", "QMP input member 'execute' must be a string"),
        (
            "{'execute':'stop','arguments':[]}",
            "GenericError",
            "QMP input member 'arguments' must be an object",
        ),
        ("{'exec-oob':'stop'}", "GenericError", "QMP input member 'exec-oob' is unexpected"),
        ("{'execute':'nope'}", "CommandNotFound", "The command nope has not been found"),
        ("{'execute':'stop','arguments':{'x':1}}", "GenericError", "Parameter 'x' is unexpected"),
        ("{'execute':'getfd'}", "GenericError", "Parameter 'fdname' is missing"),
        (
            "{'execute':'add-fd','arguments':{'fdset-id':1.0}}",
            "GenericError",
            "Invalid parameter type for 'fdset-id', expected: integer",
        ),
        ("{'execute':", "", ""),
        ("}}}\n", "GenericError", "JSON parse error, expecting value"),
    ] {
        client.send(request);
        lab.turn();
        for message in client.messages() {
            assert_eq!(message["error"], json!({"class": class, "desc": desc}), "{request}");
        }
    }
    assert_eq!(lab.ask(&mut client, &json!({"execute": "stop"})), json!({"return": {}}));
}

#[test]
fn a_session_means_the_same_wherever_its_bytes_are_split() {
    let script = concat!(
        r#"{"execute":"qmp_capabilities","arguments":{"enable":[]}}"#,
        r#"{"execute":"query-status","id":{"a":[1,null]}} {"execute":"stop","id":2}"#,
        "\r\n{'execute':'nope','id':'it\\'s'}\n garbage \n{\"execute\":\"query-name\",\"id\":3.5}",
    );
    let play = |split: usize| {
        let mut lab = Lab::new();
        let mut client = lab.connect();
        let mut heard = String::new();
        for piece in [&script[..split], &script[split..]] {
            client.send(piece);
            lab.turn();
            heard += &client.lines().join("\n");
            heard.push('\n');
        }
        let mut messages: Vec<Value> =
            heard.lines().filter(|line| !line.is_empty()).map(|l| serde_json::from_str(l).unwrap()).collect();
        messages.iter_mut().for_each(|message| {
            message.as_object_mut().unwrap().remove("timestamp");
        });
        messages
    };
    let whole = play(script.len());
    assert_eq!(whole.len(), 8);
    for split in 0..script.len() {
        assert_eq!(play(split), whole, "split at {split}");
    }
}

#[test]
fn gigantic_deep_and_endless_input_costs_one_error_and_bounded_memory() {
    let mut lab = Lab::new();
    let mut client = lab.client();
    for (bytes, desc) in [
        (format!("{{'execute':'{}'}}\n", "x".repeat(2 << 20)), "JSON token size limit exceeded"),
        (["[".repeat(10_000), "]".repeat(10_000)].concat(), "JSON nesting depth limit exceeded"),
        (format!("[{}1]\n", "1,".repeat(100_000)), "JSON token count limit exceeded"),
        ("[".repeat(4 << 20) + "\n", "JSON nesting depth limit exceeded"),
    ] {
        let mut rest = bytes.as_bytes();
        while !rest.is_empty() {
            let piece = rest.len().min(50_000);
            client.stream.write_all(&rest[..piece]).unwrap();
            rest = &rest[piece..];
            lab.turn();
        }
        lab.turn();
        let messages = client.messages();
        assert_eq!(messages.len(), 1, "{desc}");
        assert_eq!(messages[0]["error"]["desc"], desc);
    }
    assert!(lab.ask(&mut client, &json!({"execute": "query-status"})).get("return").is_some());
}

#[test]
fn a_client_that_does_not_read_is_not_served_and_its_requests_wait_in_its_own_socket() {
    let mut lab = Lab::new();
    let mut client = lab.client();
    let request = r#"{"execute":"query-qmp-schema"}"#;
    let mut sent = 0;
    while client.stream.write_all(request.as_bytes()).is_ok() && sent < 3000 {
        sent += 1;
        if sent % 100 == 0 {
            lab.turn();
        }
    }
    for _ in 0..10 {
        lab.turn();
    }
    assert!(
        !lab.watch
            .0
            .values()
            .any(|(token, interest)| { matches!(token, Token::MonitorClient(_)) && interest.read })
    );
    let mut other = lab.client();
    assert!(lab.ask(&mut other, &json!({"execute": "query-status"})).get("return").is_some());
    let mut answered = 0;
    for _ in 0..100_000 {
        answered += client.messages_so_far();
        if answered >= sent {
            break;
        }
        lab.turn();
    }
    assert_eq!(answered, sent);
}

impl Client {
    /// Complete lines so far; an incomplete one stays.
    fn messages_so_far(&mut self) -> usize {
        self.receive();
        let end = self.received.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let lines = self.received.drain(..end).filter(|byte| *byte == b'\n').count();
        assert!(self.received.len() < 65536, "a line of {} bytes", self.received.len());
        lines
    }
}

#[test]
fn a_client_that_ignores_its_events_loses_the_expendable_ones_and_then_the_connection() {
    let mut lab = Lab::new();
    let (mut deaf, mut awake) = (lab.client(), lab.client());
    let port = |open| Event::VserportChange { id: "p".repeat(2000), open };
    for index in 0..4000 {
        lab.now += std::time::Duration::from_secs(2);
        lab.emit(&port(index % 2 == 0));
        awake.messages_so_far();
    }
    assert_eq!(lab.watch.0.len(), 3, "8 MB of expendable events cost nobody the connection");
    for _ in 0..60_000 {
        lab.emit(&Event::Reset(ShutdownCause::GuestReset));
        awake.messages_so_far();
    }
    assert_eq!(lab.watch.0.len(), 2);
    deaf.receive();
    assert!(deaf.ended);
    lab.turn();
    awake.messages_so_far();
    assert!(!awake.ended);
    assert!(lab.ask(&mut awake, &json!({"execute": "query-status"})).get("return").is_some());
}

#[test]
fn what_was_held_back_comes_a_second_later() {
    let mut lab = Lab::new();
    let mut client = lab.client();
    let port = |open| Event::VserportChange { id: "agent".into(), open };
    for open in [true, false, true] {
        lab.emit(&port(open));
    }
    assert_eq!(client.messages()[0]["data"], json!({"id": "agent", "open": true}));
    let due = lab.monitor.next_deadline().unwrap();
    lab.monitor.tick(&mut lab.vm, due, &mut lab.watch);
    assert_eq!(names(&client.messages()), ["VSERPORT_CHANGE"]);
    assert_eq!(lab.monitor.next_deadline(), None);
}

#[test]
fn a_relayed_command_holds_up_its_own_client_alone() {
    let mut lab = Lab::new();
    let (mut first, mut second) = (lab.client(), lab.client());
    first.send(r#"{"execute":"guest-exec","arguments":{"path":"x"},"id":7}{"execute":"stop"}"#);
    lab.turn();
    assert_eq!(first.messages(), Vec::<Value>::new());
    assert_eq!(lab.ask(&mut second, &json!({"execute": "query-name"})), json!({"return": {"name": "fake"}}));
    let (session, execute, arguments) = lab.vm.requests.remove(0);
    assert_eq!((execute.as_str(), &arguments["path"]), ("guest-exec", &json!("x")));
    lab.complete(session, Ok(json!({"pid": 5})));
    let messages = first.messages();
    assert_eq!(messages[0], json!({"return": {"pid": 5}, "id": 7}));
    assert_eq!(names(&messages[1..]), ["STOP", "return"]);
    first.send(r#"{"execute":"guest-ping"}"#);
    lab.turn();
    let (session, ..) = lab.vm.requests.remove(0);
    lab.complete(session, Err(Error::command_disabled("guest-ping", None)));
    assert_eq!(first.messages()[0]["error"]["desc"], "Command guest-ping has been disabled");
}

#[test]
fn the_vm_hears_when_a_client_with_guest_business_leaves() {
    let mut lab = Lab::new();
    let (mut client, other) = (lab.client(), lab.client());
    client.send(r#"{"execute":"guest-fsfreeze-freeze"}"#);
    lab.turn();
    let (session, ..) = lab.vm.requests.remove(0);
    drop((client, other));
    lab.turn();
    assert_eq!(lab.vm.closed, [session]);
    assert_eq!(lab.watch.0.len(), 1);
    lab.complete(session, Ok(json!(3)));
}

#[test]
fn a_client_that_only_stopped_sending_gets_all_its_answers() {
    let mut lab = Lab::new();
    let mut client = lab.client();
    client.send(r#"{"execute":"query-name"}{"execute":"guest-ping"}{"execute":"query-status"}"#);
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    lab.turn();
    lab.turn();
    assert_eq!(client.messages().len(), 1);
    let (session, ..) = lab.vm.requests.remove(0);
    lab.complete(session, Ok(json!({})));
    lab.turn();
    assert_eq!(client.messages().len(), 2);
    assert!(client.ended);
    assert_eq!(lab.vm.closed, [session]);
}

#[test]
fn quit_answers_first_and_closing_ends_every_connection() {
    let mut lab = Lab::new();
    let mut client = lab.client();
    client.send(r#"{"execute":"quit","id":null}"#);
    lab.turn();
    assert!(lab.vm.quit);
    let mut watch = lab.watch;
    lab.monitor.close(&mut watch);
    assert!(watch.0.is_empty());
    let messages = client.messages();
    assert_eq!(names(&messages), ["SHUTDOWN", "return"]);
    assert_eq!(messages[1], json!({"return": {}, "id": null}));
    assert!(client.ended);
}

#[test]
fn descriptors_wait_for_their_command_and_belong_to_their_connection() {
    let mut lab = Lab::new();
    let (mut client, mut other) = (lab.client(), lab.client());
    let file = tempfile::tempfile().unwrap();
    client.stream.send_with_fds(&[b" ".as_ref()], &[file.as_raw_fd()]).unwrap();
    assert!(lab.ask(&mut client, &json!({"execute": "query-status"})).get("return").is_some());
    let getfd = json!({"execute": "getfd", "arguments": {"fdname": "w"}});
    assert_eq!(lab.ask(&mut other, &getfd)["error"]["desc"], "No file descriptor supplied via SCM_RIGHTS");
    assert_eq!(lab.ask(&mut client, &getfd), json!({"return": {}}));
    let closefd = json!({"execute": "closefd", "arguments": {"fdname": "w"}});
    assert_eq!(lab.ask(&mut other, &closefd)["error"]["desc"], "File descriptor named 'w' not found");
    assert_eq!(lab.ask(&mut client, &closefd), json!({"return": {}}));
}

#[test]
fn descriptor_sets_belong_to_the_vm_and_survive_the_client() {
    let mut lab = Lab::new();
    let mut client = lab.client();
    let file = tempfile::tempfile().unwrap();
    let request = json!({"execute": "add-fd", "arguments": {"fdset-id": 3, "opaque": "n"}}).to_string();
    client.stream.send_with_fds(&[request.as_bytes()], &[file.as_raw_fd()]).unwrap();
    lab.turn();
    let added = client.messages().remove(0);
    assert_eq!(added["return"]["fdset-id"], 3);
    drop(client);
    lab.turn();
    let mut next = lab.client();
    let sets = lab.ask(&mut next, &json!({"execute": "query-fdsets"}));
    assert_eq!(
        sets["return"],
        json!([{"fdset-id": 3, "fds": [{"fd": added["return"]["fd"], "opaque": "n"}]}])
    );
    assert!(lab.monitor.fdsets().open(3, libc::O_RDWR).is_ok());
    let remove = json!({"execute": "remove-fd", "arguments": {"fdset-id": 3}});
    assert_eq!(lab.ask(&mut next, &remove), json!({"return": {}}));
}

#[test]
fn commands_return_what_the_schema_says_and_every_line_is_short() {
    let mut lab = Lab::new();
    let mut client = lab.client();
    // There is something to ask about.
    let arguments = json!({"op": Uuid::nil().to_string(), "gen": 1});
    lab.ask(&mut client, &json!({"execute": "tarn-pivot-abort", "arguments": arguments}));
    for command in commands::all().filter(|command| command.name.contains("query-")) {
        client.send(&json!({"execute": command.name, "arguments": {}}).to_string());
        lab.turn();
        let line = client.lines().remove(0);
        assert!(line.len() < 65536, "{}: {} bytes", command.name, line.len());
        let reply: Value = serde_json::from_str(&line).unwrap();
        conforms(&reply["return"], &command.returns).unwrap();
    }
    let known = lab.ask(&mut client, &json!({"execute": "query-commands"}));
    for command in commands::all() {
        assert!(known["return"].as_array().unwrap().contains(&json!({"name": command.name})));
    }
    let schema = lab.ask(&mut client, &json!({"execute": "query-qmp-schema"}));
    let described = |meta: &str| {
        let entities = schema["return"].as_array().unwrap();
        entities.iter().filter(|entity| entity["meta-type"] == meta).count()
    };
    assert_eq!(described("command"), commands::all().count());
    assert_eq!(described("event"), events::EVENTS.len());
    assert!(matches!(commands::find("stop").unwrap().returns, Type::Object(_)));
}

#[test]
fn one_client_too_many_is_turned_away_and_its_place_is_free_again_later() {
    let mut lab = Lab::new();
    let mut clients: Vec<_> = (0..CLIENTS_MAX).map(|_| lab.client()).collect();
    let mut extra = lab.connect();
    extra.receive();
    assert!(extra.ended && extra.received.is_empty());
    drop(clients.remove(11));
    lab.turn();
    let mut late = lab.client();
    assert!(lab.ask(&mut late, &json!({"execute": "query-status"})).get("return").is_some());
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((mixed ^ (mixed >> 31)) % bound as u64).unwrap()
    }
}

/// A client of the random test: what it has still to send, and the ids it awaits.
struct Talker {
    client: Client,
    unsent: Vec<u8>,
    asked: usize,
    answered: usize,
}

#[test]
fn random_clients_get_each_its_own_answers_in_order() {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = std::env::var("SEED").map_or(u64::from(clock.subsec_nanos()), |seed| seed.parse().unwrap());
    println!("SEED={seed}");
    let mut random = Random(seed);
    let commands = ["query-status", "stop", "cont", "nope", "guest-ping", "query-block", "system_reset"];
    let mut lab = Lab::new();
    let mut talkers: Vec<Talker> = Vec::new();
    for _ in 0..3000 {
        match random.below(12) {
            0 if talkers.len() < 8 => {
                let client = lab.client();
                talkers.push(Talker { client, unsent: Vec::new(), asked: 0, answered: 0 });
            }
            1 if random.below(4) == 0 && !talkers.is_empty() => {
                drop(talkers.swap_remove(random.below(talkers.len())));
            }
            2..6 if !talkers.is_empty() => {
                let index = random.below(talkers.len());
                let talker = &mut talkers[index];
                let command = commands[random.below(commands.len())];
                let request = json!({"execute": command, "id": [index, talker.asked]});
                talker.asked += 1;
                talker.unsent.extend_from_slice(request.to_string().as_bytes());
            }
            6..9 if !talkers.is_empty() => {
                let index = random.below(talkers.len());
                let talker = &mut talkers[index];
                let length = random.below(talker.unsent.len() + 1);
                let piece: Vec<u8> = talker.unsent.drain(..length).collect();
                talker.client.stream.write_all(&piece).unwrap();
            }
            9 if !lab.vm.requests.is_empty() => {
                let index = random.below(lab.vm.requests.len());
                let (session, ..) = lab.vm.requests.swap_remove(index);
                lab.complete(session, Ok(json!({})));
            }
            _ => lab.turn(),
        }
        for talker in &mut talkers {
            for reply in talker.client.messages().iter().filter(|reply| reply.get("event").is_none()) {
                assert_eq!(reply["id"][1], talker.answered, "{reply}");
                talker.answered += 1;
            }
        }
    }
    for _ in 0..10_000 {
        for talker in &mut talkers {
            let piece = std::mem::take(&mut talker.unsent);
            talker.client.stream.write_all(&piece).unwrap();
            let replies = talker.client.messages();
            talker.answered += replies.iter().filter(|reply| reply.get("event").is_none()).count();
        }
        lab.turn();
        for (session, ..) in std::mem::take(&mut lab.vm.requests) {
            lab.complete(session, Ok(json!({})));
        }
        if talkers.iter().all(|talker| talker.answered == talker.asked) {
            return;
        }
    }
    panic!("Somebody was never answered");
}
