//! The agent as a process, over its unix socket. Nothing here freezes: the machine is a real one.

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::Shutdown;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixStream;
    use std::path::{Path, PathBuf};
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use base64::Engine as _;
    use protocol::{Decoder, Handshake, Item, Limits, Progress, encode};
    use serde_json::{Value, json};

    const RECORDED: &str = include_str!("../protocol/tests/data/wire.txt");
    const RECORDED_FILES: &str = include_str!("data/files.txt");
    /// Longest wait for anything; the machine may be slow.
    const PATIENCE: Duration = Duration::from_secs(60);

    struct Agent {
        process: Child,
        directory: tempfile::TempDir,
    }

    impl Agent {
        fn start() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let process = Self::spawn(directory.path());
            Self { process, directory }
        }

        /// With a freeze hook, which is told `freeze` or `thaw`.
        fn with_hook(script: &str, options: &[&str]) -> Self {
            use std::os::unix::fs::PermissionsExt;
            let directory = tempfile::tempdir().unwrap();
            let hook = directory.path().join("hook");
            std::fs::write(&hook, format!("#!/bin/sh\ncd {}\n{script}\n", directory.path().display()))
                .unwrap();
            std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).unwrap();
            let hook = format!("-F{}", hook.display());
            let options: Vec<&str> = std::iter::once(hook.as_str()).chain(options.iter().copied()).collect();
            let process = Self::spawn_with(directory.path(), &options);
            Self { process, directory }
        }

        fn spawn(directory: &Path) -> Child {
            Self::spawn_with(directory, &[])
        }

        fn spawn_with(directory: &Path, options: &[&str]) -> Child {
            let mut command = Command::new(env!("CARGO_BIN_EXE_tarn-agent"));
            command.args(["-m", "unix-listen", "-p", "sock", "-t", "."]).args(options).current_dir(directory);
            let process = command.stderr(Stdio::null()).spawn().unwrap();
            let deadline = Instant::now() + PATIENCE;
            while UnixStream::connect(directory.join("sock")).is_err() {
                assert!(Instant::now() < deadline, "the agent does not listen");
                std::thread::yield_now();
            }
            process
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn client(&self) -> Client {
            let stream = UnixStream::connect(self.path("sock")).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            Client { stream, decoder: Decoder::new(Limits::AGENT) }
        }

        fn signal(&self, signal: &str) {
            let pid = self.process.id().to_string();
            assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
        }

        fn restart(&mut self) {
            self.process.kill().unwrap();
            self.process.wait().unwrap();
            self.process = Self::spawn(self.directory.path());
        }

        /// Waits until the agent uses no processor time; one that spins never gets there.
        fn wait_until_asleep(&self) {
            wait_until("the agent sleeps", || {
                let before = self.ticks();
                std::thread::sleep(Duration::from_millis(300));
                self.ticks() == before
            });
        }

        /// Processor time used so far, in clock ticks (proc(5), `/proc/PID/stat`, utime and stime).
        fn ticks(&self) -> u64 {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process.id())).unwrap();
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
            fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
        }
    }

    impl Drop for Agent {
        fn drop(&mut self) {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }

    struct Client {
        stream: UnixStream,
        decoder: Decoder,
    }

    impl Client {
        fn item(&mut self) -> Item {
            loop {
                if let Some(item) = self.decoder.next_item() {
                    return item;
                }
                let mut chunk = [0; 64 << 10];
                let count = self.stream.read(&mut chunk).expect("a reply in time");
                assert!(count > 0, "the agent hung up");
                self.decoder.feed(&chunk[..count]);
            }
        }

        fn reply(&mut self) -> Value {
            match self.item() {
                Item::Value(value) => value,
                other => panic!("{other:?}"),
            }
        }

        fn ask(&mut self, execute: &str, arguments: &Value) -> Value {
            let request = json!({"execute": execute, "arguments": arguments});
            self.stream.write_all(encode(&request).as_bytes()).unwrap();
            self.reply()
        }

        fn result(&mut self, execute: &str, arguments: &Value) -> Value {
            let reply = self.ask(execute, arguments);
            reply.get("return").unwrap_or_else(|| panic!("{execute}: {reply}")).clone()
        }

        fn ping(&mut self) {
            assert_eq!(self.result("guest-ping", &json!({})), json!({}));
        }

        fn desc(&mut self, execute: &str, arguments: &Value) -> String {
            let reply = self.ask(execute, arguments);
            reply
                .pointer("/error/desc")
                .and_then(Value::as_str)
                .unwrap_or_else(|| panic!("{reply}"))
                .to_owned()
        }

        /// Runs a command to its end and gives back its status.
        fn run(&mut self, arguments: &Value) -> Value {
            let pid = self.result("guest-exec", arguments)["pid"].clone();
            self.finish(&pid)
        }

        /// Asks for a status until there is one; the protocol has no other way.
        fn finish(&mut self, pid: &Value) -> Value {
            let deadline = Instant::now() + PATIENCE;
            loop {
                let status = self.result("guest-exec-status", &json!({"pid": pid}));
                if status["exited"] == true {
                    let again = self.ask("guest-exec-status", &json!({"pid": pid}));
                    assert_eq!(again["error"]["class"], "GenericError", "the report is given once");
                    return status;
                }
                assert!(Instant::now() < deadline, "{pid} does not end");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    fn shell(script: &str) -> Value {
        json!({"path": "/bin/sh", "arg": ["-c", script], "capture-output": true})
    }

    fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn unescape(text: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut rest = text.bytes();
        while let Some(byte) = rest.next() {
            let escaped = (byte == b'\\').then(|| rest.next().unwrap());
            bytes.push(match escaped {
                None => byte,
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b't') => b'\t',
                Some(b'x') => {
                    let digits = [rest.next().unwrap(), rest.next().unwrap()];
                    u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap()
                }
                Some(other) => other,
            });
        }
        bytes
    }

    /// Whether 0xFF comes first, and the reply.
    fn split_mark(line: &[u8]) -> (bool, Value) {
        match line {
            [0xFF, json @ ..] => (true, serde_json::from_slice(json).unwrap()),
            json => (false, serde_json::from_slice(json).unwrap()),
        }
    }

    #[test]
    fn recorded_dialogues_get_the_recorded_replies() {
        let agent = Agent::start();
        let dialogues: Vec<&str> =
            RECORDED.split("\n\n").filter(|dialogue| dialogue.starts_with("> ")).collect();
        assert!(dialogues.len() > 90);
        for dialogue in dialogues {
            let mut lines = dialogue.lines();
            let request = unescape(lines.next().unwrap().strip_prefix("> ").unwrap());
            let mut client = agent.client();
            client.stream.write_all(&request).unwrap();
            client.stream.shutdown(Shutdown::Write).unwrap();
            let mut replies = Vec::new();
            client.stream.read_to_end(&mut replies).unwrap();
            let mut replies = replies.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
            for expected in lines {
                let reply = replies.next().unwrap_or_else(|| panic!("{dialogue}: no reply"));
                if expected == "!" {
                    assert_eq!(split_mark(reply).1["error"]["class"], "GenericError", "{dialogue}");
                    continue;
                }
                let expected = unescape(expected.strip_prefix("< ").unwrap());
                assert_eq!(split_mark(reply), split_mark(&expected), "{dialogue}");
            }
            assert_eq!(replies.next(), None, "{dialogue}: too many replies");
        }
    }

    #[test]
    fn a_client_gets_in_step_whatever_it_finds() {
        let agent = Agent::start();
        let mut client = agent.client();
        client.stream.write_all(b"{\"execute\":\"guest-pi").unwrap();
        let mut handshake = Handshake::new(42);
        client.stream.write_all(&handshake.request()).unwrap();
        while handshake.on(&client.item()) == Progress::Pending {}
        client.ping();
    }

    #[test]
    fn pipelined_requests_are_answered_in_order() {
        let agent = Agent::start();
        let mut client = agent.client();
        let request = |id| format!("{{'execute':'guest-sync','arguments':{{'id':{id}}}}}");
        let requests: String = (0..2000).map(request).collect();
        client.stream.write_all(requests.as_bytes()).unwrap();
        for id in 0..2000 {
            assert_eq!(client.reply(), json!({"return": id}));
        }
    }

    #[test]
    fn the_next_client_starts_afresh_when_the_former_has_left() {
        let agent = Agent::start();
        let mut first = agent.client();
        first.ping();
        let mut second = agent.client();
        second.stream.write_all(b"{'execute':'guest-ping','id':2}").unwrap();
        first.stream.write_all(b"{'execute':").unwrap();
        drop(first);
        assert_eq!(second.reply(), json!({"return": {}, "id": 2}));
    }

    #[test]
    fn guest_info_lists_every_command_and_what_it_answers() {
        let agent = Agent::start();
        let info = agent.client().result("guest-info", &json!({}));
        let commands = info["supported_commands"].as_array().unwrap();
        let named = |name: &str| commands.iter().find(|command| command["name"] == name).unwrap();
        assert_eq!(named("guest-shutdown")["success-response"], false);
        assert_eq!(named("guest-ping")["success-response"], true);
        assert!(commands.iter().all(|command| command["enabled"] == true));
        assert!(info["version"].is_string());
    }

    #[test]
    fn facts_about_the_guest_are_given() {
        let agent = Agent::start();
        let mut client = agent.client();
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        assert_eq!(client.result("guest-get-host-name", &json!({})), json!({"host-name": name.trim()}));
        assert_eq!(client.result("guest-get-osinfo", &json!({}))["machine"], std::env::consts::ARCH);
        assert!(client.result("guest-get-time", &json!({})).as_i64().unwrap() > 1_700_000_000_000_000_000);
        assert_eq!(client.result("guest-fsfreeze-status", &json!({})), "thawed");
    }

    /// Whether a value is what the schema document says; the path to the first place where it is not.
    fn check(of: &Value, value: &Value) -> Result<(), String> {
        let fits = match (of.as_str(), of.as_object().and_then(|of| of.iter().next())) {
            (Some("integer"), _) => value.is_i64() || value.is_u64(),
            (Some("number"), _) => value.is_number(),
            (Some("boolean"), _) => value.is_boolean(),
            (Some("string" | "base64"), _) => value.is_string(),
            (_, Some((kind, of))) => match (kind.as_str(), of, value) {
                ("enum", Value::Array(words), word) => words.contains(word),
                ("any-of", Value::Array(types), value) => types.iter().any(|of| check(of, value).is_ok()),
                ("array", of, Value::Array(values)) => {
                    return values.iter().try_for_each(|value| check(of, value));
                }
                ("object", Value::Object(members), Value::Object(object)) => {
                    return check_members(members, object);
                }
                _ => false,
            },
            _ => false,
        };
        if fits { Ok(()) } else { Err(format!(": {value} is no {of}")) }
    }

    type Object = serde_json::Map<String, Value>;

    fn check_members(members: &Object, object: &Object) -> Result<(), String> {
        for (name, of) in members {
            let (name, is_optional) = name.strip_prefix('*').map_or((&name[..], false), |name| (name, true));
            match object.get(name) {
                Some(value) => check(of, value).map_err(|path| format!(".{name}{path}"))?,
                None if is_optional => {}
                None => return Err(format!(".{name} is missing")),
            }
        }
        let declared =
            |name: &&String| members.contains_key(*name) || members.contains_key(&format!("*{name}"));
        object
            .keys()
            .find(|name| !declared(name))
            .map_or(Ok(()), |name| Err(format!(".{name} is not declared")))
    }

    #[test]
    fn facts_are_as_the_schema_document_says() {
        let output = Command::new(env!("CARGO_BIN_EXE_tarn-agent")).arg("--schema").output().unwrap();
        let schema: Value = serde_json::from_slice(&output.stdout).unwrap();
        let agent = Agent::start();
        let mut client = agent.client();
        let harmless = ["guest-info", "guest-ping", "guest-fsfreeze-status"];
        let is_harmless = |name: &str| {
            name.starts_with("guest-get-")
                || name.starts_with("guest-network-get-")
                || harmless.contains(&name)
        };
        let mut asked = Vec::new();
        for command in schema["commands"].as_array().unwrap() {
            let name = command["name"].as_str().unwrap();
            if is_harmless(name) {
                let reply = client.ask(name, &json!({}));
                match reply.get("return") {
                    Some(value) => assert_eq!(check(&command["returns"], value), Ok(()), "{name}"),
                    // A container may lack what a machine has.
                    None => assert_eq!(reply["error"]["class"], "GenericError", "{name}: {reply}"),
                }
                asked.push(name);
            }
        }
        assert!(asked.len() >= 18, "{asked:?}");
    }

    #[test]
    fn commands_that_change_the_guest_refuse_what_they_cannot_do_before_they_do_anything() {
        let agent = Agent::start();
        let mut client = agent.client();
        let password =
            |user: &str, password: &str| json!({"username": user, "password": password, "crypted": false});
        let keys = |user: &str, key: &str| json!({"username": user, "keys": [key]});
        for (command, arguments, expected) in [
            ("guest-set-time", json!({"time": -1}), "Invalid time: Invalid argument"),
            ("guest-set-vcpus", json!({}), "Parameter 'vcpus' is missing"),
            (
                "guest-set-vcpus",
                json!({"vcpus": [{"logical-id": 0}]}),
                "Parameter 'vcpus[0].online' is missing",
            ),
            (
                "guest-set-vcpus",
                json!({"vcpus": [{"logical-id": 99_999, "online": false}]}),
                "open(\"/sys/devices/system/cpu/cpu99999/\"): No such file or directory",
            ),
            (
                "guest-set-memory-blocks",
                json!({"mem-blks": [{"phys-index": -1, "online": true}]}),
                "Parameter 'mem-blks[0].phys-index' expects a non-negative value",
            ),
            ("guest-set-user-password", password("root", "%"), "Base64 data contains invalid characters"),
            ("guest-set-user-password", password("root", "YQpi"), "forbidden characters in raw password"),
            ("guest-set-user-password", password("a:b", "YQ=="), "forbidden characters in username"),
            ("guest-ssh-add-authorized-keys", keys("nosuchuser", "#"), "invalid OpenSSH public key: '#'"),
            (
                "guest-ssh-add-authorized-keys",
                keys("nosuchuser", "a"),
                "failed to lookup user 'nosuchuser': Success",
            ),
            (
                "guest-ssh-remove-authorized-keys",
                keys("nosuchuser", "a"),
                "failed to lookup user 'nosuchuser': Success",
            ),
            (
                "guest-ssh-get-authorized-keys",
                json!({"username": "nosuchuser"}),
                "failed to lookup user 'nosuchuser': Success",
            ),
            (
                "guest-fstrim",
                json!({"minimum": "1"}),
                "Invalid parameter type for 'minimum', expected: integer",
            ),
        ] {
            assert_eq!(client.desc(command, &arguments), expected, "{command} {arguments}");
        }
        let nothing = client.result("guest-set-vcpus", &json!({"vcpus": []}));
        assert_eq!(nothing, 0);
        let blocks = json!({"mem-blks": [{"phys-index": u64::MAX, "online": true}]});
        let response = client.result("guest-set-memory-blocks", &blocks);
        assert_eq!(response, json!([{"phys-index": u64::MAX, "response": "not-found"}]));
    }

    #[test]
    fn an_unknown_way_to_end_is_refused() {
        let agent = Agent::start();
        let refused = agent.client().desc("guest-shutdown", &json!({"mode": "sleep"}));
        assert_eq!(refused, "mode is invalid (valid values are: halt|powerdown|reboot");
    }

    #[test]
    fn files_behave_as_recorded() {
        let agent = Agent::start();
        let mut client = agent.client();
        let mut lines = RECORDED_FILES.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
        while let Some(request) = lines.next() {
            let (verb, arguments) = request.strip_prefix("> ").unwrap().split_once(' ').unwrap();
            let arguments = serde_json::from_str(arguments).unwrap();
            let expected: Value =
                serde_json::from_str(lines.next().unwrap().strip_prefix("< ").unwrap()).unwrap();
            let reply = client.ask(&format!("guest-file-{verb}"), &arguments);
            assert_eq!(reply, expected, "{request}");
        }
        let mode = std::fs::metadata(agent.path("foo")).unwrap().mode();
        assert_eq!(mode, 0o100_666, "whatever the umask");
        assert_eq!(std::fs::read_to_string(agent.path("qga.state")).unwrap(), "[global]\nfd_counter=1004\n");
    }

    #[test]
    fn fifos_never_block_the_agent() {
        let agent = Agent::start();
        let mut client = agent.client();
        assert!(Command::new("mkfifo").arg(agent.path("ff")).status().unwrap().success());
        assert_eq!(
            client.desc("guest-file-open", &json!({"path": "ff", "mode": "w"})),
            "failed to open file 'ff' (mode: 'w'): No such device or address"
        );
        let reader = client.result("guest-file-open", &json!({"path": "ff"}));
        assert_eq!(client.result("guest-file-read", &json!({"handle": reader}))["eof"], true);
        let writer = client.result("guest-file-open", &json!({"path": "ff", "mode": "w"}));
        let again = "failed to read file: Resource temporarily unavailable";
        assert_eq!(client.desc("guest-file-read", &json!({"handle": reader})), again);
        let written = client.result("guest-file-write", &json!({"handle": writer, "buf-b64": "YWJj"}));
        assert_eq!(written, json!({"count": 3, "eof": false}));
        assert_eq!(client.result("guest-file-read", &json!({"handle": reader}))["buf-b64"], "YWJj");
        let seek = json!({"handle": reader, "offset": 0, "whence": 0});
        assert_eq!(client.desc("guest-file-seek", &seek), "failed to seek file: Illegal seek");
    }

    #[test]
    fn handles_are_not_given_twice_even_after_a_crash() {
        let mut agent = Agent::start();
        assert_eq!(agent.client().result("guest-file-open", &json!({"path": "/dev/null"})), 1000);
        agent.restart();
        assert_eq!(agent.client().result("guest-file-open", &json!({"path": "/dev/null"})), 1001);
    }

    #[test]
    fn commands_report_their_status_as_recorded() {
        let agent = Agent::start();
        let mut client = agent.client();
        let success = || json!({"exitcode": 0, "exited": true});
        let captured =
            |data: &str| json!({"exitcode": 0, "out-data": data, "out-truncated": false, "exited": true});
        let cases = [
            (json!({"path": "true"}), success()),
            (json!({"path": "false"}), json!({"exitcode": 1, "exited": true})),
            (shell("kill -9 $$"), json!({"signal": 9, "exited": true})),
            (shell("exit 0"), success()),
            (
                shell("echo out; echo err >&2; exit 3"),
                json!({"exitcode": 3, "err-data": "ZXJyCg==", "out-data": "b3V0Cg==", "err-truncated": false,
                    "out-truncated": false, "exited": true}),
            ),
            (
                json!({"path": "/bin/cat", "capture-output": true, "input-data": "aGVsbG8="}),
                captured("aGVsbG8="),
            ),
            (json!({"path": "/bin/cat", "capture-output": true}), success()),
            (
                json!({"path": "env", "env": ["A=b", "C=d e"], "capture-output": true}),
                captured("QT1iCkM9ZCBlCg=="),
            ),
            (json!({"path": "env", "env": [], "capture-output": true}), success()),
        ];
        for (arguments, expected) in cases {
            assert_eq!(client.run(&arguments), expected, "{arguments}");
        }
    }

    #[test]
    fn each_capture_mode_takes_what_it_says() {
        let agent = Agent::start();
        let mut client = agent.client();
        for (mode, out, err) in [
            (json!(false), None, None),
            (json!("none"), None, None),
            (json!("stdout"), Some("b3V0Cg=="), None),
            (json!("stderr"), None, Some("ZXJyCg==")),
            (json!("separated"), Some("b3V0Cg=="), Some("ZXJyCg==")),
            (json!("merged"), Some("b3V0CmVycgo="), None),
        ] {
            let mut arguments = shell("echo out; echo err >&2");
            arguments["capture-output"] = mode.clone();
            let status = client.run(&arguments);
            assert_eq!(status.get("out-data").and_then(Value::as_str), out, "{mode}");
            assert_eq!(status.get("err-data").and_then(Value::as_str), err, "{mode}");
            assert_eq!(status.get("out-truncated").is_some(), out.is_some(), "{mode}");
        }
    }

    #[test]
    fn commands_that_cannot_start_say_why() {
        let agent = Agent::start();
        let mut client = agent.client();
        let failed = |path: &str, why: &str| format!("Failed to execute child process “{path}” ({why})");
        let missing = "No such file or directory";
        for (arguments, expected) in [
            (json!({"path": "/etc"}), failed("/etc", "Permission denied")),
            (json!({"path": "/etc/passwd"}), failed("/etc/passwd", "Permission denied")),
            (json!({"path": ""}), failed("", missing)),
            (json!({"path": "nonexistcmd"}), failed("nonexistcmd", missing)),
            (json!({"path": "env", "env": ["PATH=/nonexist"]}), failed("env", missing)),
            (json!({"path": "true", "input-data": "@@@"}), "Base64 data contains invalid characters".into()),
            (
                json!({"path": "true", "capture-output": "zzz"}),
                "Parameter 'capture-output' does not accept value 'zzz'".into(),
            ),
            (
                json!({"path": "true", "capture-output": 5}),
                "Invalid parameter type for 'capture-output', expected: GuestExecCaptureOutput".into(),
            ),
        ] {
            assert_eq!(client.desc("guest-exec", &arguments), expected, "{arguments}");
        }
        let unknown = client.desc("guest-exec-status", &json!({"pid": 999_999_999}));
        assert_eq!(unknown, "PID 999999999 does not exist");
    }

    #[test]
    fn output_beyond_the_cap_is_drained_and_marked() {
        let agent = Agent::start();
        let mut client = agent.client();
        let status = client.run(&shell("head -c 20000000 /dev/zero"));
        assert_eq!(status["out-truncated"], true);
        assert_eq!(status["out-data"].as_str().unwrap().len(), (16_usize << 20).div_ceil(3) * 4);
    }

    #[test]
    fn input_larger_than_any_pipe_reaches_the_child() {
        let agent = Agent::start();
        let mut client = agent.client();
        let data = "YWJj".repeat(1 << 20);
        let arguments = json!({"path": "/bin/cat", "input-data": data, "capture-output": true});
        assert_eq!(client.run(&arguments)["out-data"], data);
        // A child that does not read its input holds up nothing.
        assert_eq!(client.run(&json!({"path": "true", "input-data": data}))["exitcode"], 0);
    }

    #[test]
    fn a_grandchild_that_holds_the_pipe_holds_up_the_report_but_not_the_agent() {
        let agent = Agent::start();
        let mut client = agent.client();
        assert!(Command::new("mkfifo").arg(agent.path("gate")).status().unwrap().success());
        let script = shell("echo $$ > parent; (read line < gate; echo hi) & exit 0");
        let pid = client.result("guest-exec", &script)["pid"].clone();
        // Reaped: the parent is gone, its child holds the pipe.
        wait_until("the parent ends", || !Path::new(&format!("/proc/{pid}")).exists());
        client.ping();
        let status = client.result("guest-exec-status", &json!({"pid": pid}));
        assert_eq!(status, json!({"exited": false}));
        let mut gate = std::fs::OpenOptions::new().write(true).open(agent.path("gate")).unwrap();
        gate.write_all(b"go\n").unwrap();
        assert_eq!(client.finish(&pid)["out-data"], "aGkK");
    }

    #[test]
    fn children_find_signals_and_descriptors_as_if_started_from_a_shell() {
        let agent = Agent::start();
        let script = "grep -E '^Sig(Blk|Ign)' /proc/self/status; ls /proc/self/fd | wc -l";
        let status = agent.client().run(&shell(script));
        let output = base64::engine::general_purpose::STANDARD.decode(status["out-data"].as_str().unwrap());
        let output = String::from_utf8(output.unwrap()).unwrap();
        let words: Vec<&str> = output.split_whitespace().collect();
        assert_eq!(words[..2], ["SigBlk:", "0000000000000000"]);
        // glibc ignores two signals of its own, 32 and 33, in what it spawns; and whoever runs this may ignore some, as
        // nohup does. SIGPIPE is ignored by Rust's programs, and must not be by what they start.
        let own = std::fs::read_to_string("/proc/self/status").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap().trim();
        let expected = u64::from_str_radix(own, 16).unwrap() & !(1 << (libc::SIGPIPE - 1));
        let ignored = u64::from_str_radix(words[3], 16).unwrap() & !(3 << 31);
        assert_eq!(ignored, expected & !(3 << 31), "{output}");
        // The standard streams and the listing's own descriptor.
        assert_eq!(words[4], "4");
    }

    #[test]
    fn a_request_of_a_client_that_left_at_once_is_carried_out() {
        let agent = Agent::start();
        let request = encode(&json!({"execute": "guest-exec", "arguments": shell("echo done > proof")}));
        agent.client().stream.write_all(request.as_bytes()).unwrap();
        let proof = || std::fs::read_to_string(agent.path("proof")).unwrap_or_default();
        wait_until("the command runs", || proof() == "done\n");
    }

    #[test]
    fn a_client_that_does_not_read_stops_only_itself() {
        let agent = Agent::start();
        let mut client = agent.client();
        client.stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
        let request = b"{'execute':'guest-info'}".repeat(1000);
        let mut asked = 0;
        while let Ok(count) = client.stream.write(&request) {
            asked += count;
        }
        assert!(asked < 16 << 20, "{asked} bytes of requests taken");
        agent.wait_until_asleep();
        drop(client);
        agent.client().ping();
    }

    #[test]
    fn sigterm_ends_the_agent_with_status_0() {
        let mut agent = Agent::start();
        agent.client().ping();
        agent.signal("-TERM");
        assert!(agent.process.wait().unwrap().success());
    }

    #[test]
    fn a_missing_port_is_waited_for_asleep() {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_tarn-agent"));
        command.args(["-p", "ports/agent", "-t", "."]).current_dir(directory.path()).stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(process.stderr.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("Waiting for ports/agent"), "{line}");
        let mut agent = Agent { process, directory };
        agent.wait_until_asleep();
        agent.signal("-TERM");
        assert!(agent.process.wait().unwrap().success());
    }

    // ---- Freezes of nothing: what surrounds a freeze, on a machine that must not be frozen ----

    /// A freeze of no filesystem at all; hooks run all the same.
    fn freeze_nothing() -> Vec<u8> {
        let request = json!({"execute": "guest-fsfreeze-freeze-list", "arguments": {"mountpoints": []}});
        encode(&request).into_bytes()
    }

    const NOTHING: fn() -> Value = || json!({});

    #[test]
    fn hooks_run_in_pairs_and_a_failure_after_the_thaw_is_only_reported() {
        let agent = Agent::with_hook("echo $1 >> log; test $1 = freeze", &[]);
        let mut client = agent.client();
        client.stream.write_all(&freeze_nothing()).unwrap();
        assert_eq!(client.reply(), json!({"return": 0}));
        assert_eq!(std::fs::read_to_string(agent.path("log")).unwrap(), "freeze\nthaw\n");
        let report = client.ask("tarn-fsfreeze-report", &NOTHING());
        assert_eq!(report["return"]["hooks"][1]["error"], json!("exit status 1"));
        assert_eq!(report["return"]["state"], json!("thawed"));
    }

    #[test]
    fn a_freeze_that_takes_too_long_fails_in_time_while_its_client_is_silent() {
        let agent = Agent::with_hook("echo $1 >> log; test $1 = thaw || sleep 1000", &["--freeze-timeout=1"]);
        let mut client = agent.client();
        let start = Instant::now();
        client.stream.write_all(&freeze_nothing()).unwrap();
        let reply = client.reply();
        assert_eq!(reply["error"]["desc"], json!("The freeze took too long"));
        assert!(start.elapsed() < Duration::from_secs(20), "the hook's own limit is 30 s");
        let log = || std::fs::read_to_string(agent.path("log")).unwrap_or_default();
        wait_until("the hook is told of the end", || log() == "freeze\nthaw\n");
        agent.wait_until_asleep();
    }

    #[test]
    fn while_a_freeze_is_in_progress_the_agent_answers_everybody() {
        let agent = Agent::with_hook("test $1 = thaw || until test -e go; do sleep 0.1; done", &[]);
        let (mut freezer, mut other) = (agent.client(), agent.client());
        freezer.stream.write_all(&freeze_nothing()).unwrap();
        wait_until("the freeze has begun", || {
            other.ask("tarn-fsfreeze-report", &NOTHING())["return"]["state"] == "freezing"
        });
        other.ping();
        assert_eq!(other.ask("guest-fsfreeze-status", &NOTHING()), json!({"return": "frozen"}));
        let refused = other.ask("guest-get-time", &NOTHING());
        assert_eq!(refused["error"]["class"], json!("CommandNotFound"));
        // Out of turn on the very connection that waits for the freeze.
        freezer.stream.write_all(b"{'exec-oob':'guest-ping','id':7}").unwrap();
        assert_eq!(freezer.reply(), json!({"return": {}, "id": 7}));
        freezer.stream.write_all(b"{'execute':'guest-ping','id':8}").unwrap();
        std::fs::write(agent.path("go"), "").unwrap();
        assert_eq!(freezer.reply(), json!({"return": 0}), "in turn");
        assert_eq!(freezer.reply(), json!({"return": {}, "id": 8}));
    }

    #[test]
    fn a_freeze_ends_when_its_client_gives_up_leaves_or_somebody_thaws() {
        let agent = Agent::with_hook("echo $1 >> log; test $1 = thaw || sleep 1000", &[]);
        let mut other = agent.client();
        let mut state = || other.ask("tarn-fsfreeze-report", &NOTHING())["return"].clone();
        let log = || std::fs::read_to_string(agent.path("log")).unwrap_or_default();
        for (number, way) in (1..).zip(["sync", "leave", "thaw"]) {
            let mut client = agent.client();
            client.stream.write_all(&freeze_nothing()).unwrap();
            wait_until("the freeze has begun", || log().matches("freeze").count() == number);
            match way {
                "sync" => assert_eq!(client.ask("guest-sync", &json!({"id": 9})), json!({"return": 9})),
                "leave" => drop(client),
                _ => {
                    let mut third = agent.client();
                    assert!(third.ask("guest-fsfreeze-thaw", &NOTHING())["return"].is_u64());
                    let failed = client.reply();
                    assert_eq!(
                        failed["error"]["desc"],
                        json!("The freeze was cancelled by guest-fsfreeze-thaw")
                    );
                }
            }
            wait_until("it is over", || state()["state"] == "thawed");
        }
        wait_until("every hook has its pair", || log().matches("thaw").count() >= 3);
    }

    #[test]
    fn an_agent_killed_within_a_hook_has_its_watchdog_kill_that_and_run_the_thaw() {
        let mut agent = Agent::with_hook("echo $1 $$ >> log; test $1 = thaw || sleep 1000", &[]);
        let mut client = agent.client();
        client.stream.write_all(&freeze_nothing()).unwrap();
        let log = || std::fs::read_to_string(agent.path("log")).unwrap_or_default();
        wait_until("the hook runs", || log().starts_with("freeze "));
        let hook = log().trim().trim_start_matches("freeze ").to_owned();
        agent.process.kill().unwrap();
        wait_until("the hook is told of the end", || {
            std::fs::read_to_string(agent.directory.path().join("log")).unwrap_or_default().contains("thaw")
        });
        let stat = format!("/proc/{hook}/stat");
        wait_until("the hook is gone", || {
            std::fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "))
        });
        let _ = agent.process.wait();
    }

    #[test]
    fn a_watchdog_that_dies_is_replaced_and_one_agent_has_one() {
        let agent = Agent::start();
        let watchdogs = || -> Vec<i32> {
            let children = format!("/proc/{0}/task/{0}/children", agent.process.id());
            let children = std::fs::read_to_string(children).unwrap();
            children.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
        };
        wait_until("there is a watchdog", || watchdogs().len() == 1);
        let first = watchdogs()[0];
        assert!(Command::new("kill").args(["-KILL", &first.to_string()]).status().unwrap().success());
        wait_until("there is another one", || watchdogs().len() == 1 && watchdogs()[0] != first);
        agent.wait_until_asleep();
        agent.client().ping();
    }

    #[test]
    fn more_commands_than_can_wait_are_refused_and_the_agent_stays_reachable() {
        let agent = Agent::with_hook(
            "test $1 = thaw || until test -e go; do sleep 0.1; done",
            &["--freeze-timeout=0"],
        );
        let mut client = agent.client();
        client.stream.write_all(&freeze_nothing()).unwrap();
        wait_until("the freeze has begun", || {
            agent.client().ask("tarn-fsfreeze-report", &NOTHING())["return"]["state"] == "freezing"
        });
        // Of several clients each gives up again and again.
        let mut poller = agent.client();
        for _ in 0..40 {
            poller
                .stream
                .write_all(b"{'execute':'guest-fsfreeze-thaw'}{'execute':'guest-sync','arguments':{'id':5}}")
                .unwrap();
            while poller.reply()["return"] != json!(5) {}
        }
        poller.ping();
        std::fs::write(agent.path("go"), "").unwrap();
        agent.client().ping();
    }
}
