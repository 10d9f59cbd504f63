//! How the agent is started, told what to do and ended: options, configuration, channels, background.

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::{Path, PathBuf};
    use std::process::{Child, Command, Output, Stdio};
    use std::time::{Duration, Instant};

    use base64::Engine as _;
    use protocol::{Decoder, Item, Limits, encode};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::tcgetattr;
    use serde_json::{Value, json};

    /// Longest wait for anything; the machine may be slow.
    const PATIENCE: Duration = Duration::from_secs(60);

    fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The agent, without a configuration of this machine.
    fn agent(directory: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tarn-agent"));
        command.current_dir(directory).env("QGA_CONF", "/nonexistent").stdin(Stdio::null());
        command
    }

    fn run(directory: &Path, arguments: &[&str]) -> Output {
        agent(directory).args(arguments).output().unwrap()
    }

    fn text(bytes: &[u8]) -> String {
        String::from_utf8_lossy(bytes).into_owned()
    }

    /// Asks one question over whatever leads to the agent.
    fn ask(mut stream: impl Read + Write, execute: &str, arguments: &Value) -> Value {
        let request = json!({"execute": execute, "arguments": arguments});
        stream.write_all((encode(&request) + "\n").as_bytes()).unwrap();
        let mut decoder = Decoder::new(Limits::AGENT);
        loop {
            match decoder.next_item() {
                Some(Item::Value(value)) => return value,
                Some(other) => panic!("{other:?}"),
                None => {}
            }
            let mut chunk = [0; 4096];
            let count = stream.read(&mut chunk).unwrap();
            assert!(count > 0, "the agent hung up");
            decoder.feed(&chunk[..count]);
        }
    }

    fn connect(path: &Path) -> UnixStream {
        let mut stream = None;
        wait_until("the agent does not listen", || {
            stream = UnixStream::connect(path).ok();
            stream.is_some()
        });
        let stream = stream.unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn ping(stream: impl Read + Write) {
        assert_eq!(ask(stream, "guest-ping", &json!({})), json!({"return": {}}));
    }

    /// An agent in the foreground, killed at the end of a test.
    struct Foreground(Child);

    impl Drop for Foreground {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// An agent in the background, ended with the test.
    struct Background {
        pid: String,
    }

    impl Background {
        fn of(pidfile: &Path) -> Self {
            Self { pid: fs::read_to_string(pidfile).unwrap().trim().to_owned() }
        }

        fn signal(&self, signal: &str) -> bool {
            Command::new("kill").args([signal, &self.pid]).stderr(Stdio::null()).status().unwrap().success()
        }

        fn end(self) {
            assert!(self.signal("-TERM"));
            wait_until("the daemon ends", || !self.is_alive());
        }

        /// Whether any of its threads runs; a process that ended may wait for its new parent for ever.
        fn is_alive(&self) -> bool {
            let Ok(stat) = fs::read_to_string(format!("/proc/{}/stat", self.pid)) else { return false };
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
            let (state, threads) = (fields[0], fields[17].parse::<u32>().unwrap());
            state != "Z" || threads > 1
        }
    }

    impl Drop for Background {
        fn drop(&mut self) {
            if self.is_alive() {
                self.signal("-KILL");
            }
        }
    }

    #[test]
    fn bad_options_end_with_status_1_and_a_hint() {
        let output = run(Path::new("/"), &["--nope"]);
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(text(&output.stdout), "Unknown option, try 'tarn-agent --help' for more information.\n");
        assert_eq!(text(&output.stderr), "tarn-agent: Unknown option '--nope'\n");
    }

    #[test]
    fn what_cannot_be_served_ends_with_status_1_and_the_reason() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("conf"), "[general]\nverbose=yes\n").unwrap();
        for (arguments, reason) in [
            (&["-m", "tcp"][..], "must specify a path for this channel"),
            (&["-m", "tcp", "-p", "x"], "Unsupported channel method/type: tcp"),
            (
                &["-c", "/nonexistent"],
                "Error loading configuration from path: /nonexistent: Cannot read it: No such",
            ),
            (&["-c", "conf"], "from path: conf: The value of 'verbose' cannot be interpreted"),
            (
                &["-t", "/nonexistent"],
                "Failed to load persistent state: /nonexistent: No such file or directory",
            ),
            (
                &["-t", ".", "-l", "/nonexistent/log"],
                "Unable to open specified log file /nonexistent/log: No such",
            ),
            (&["-t", ".", "-m", "unix-listen", "-p", "no/sock"], "Cannot listen at no/sock: No such file"),
        ] {
            let output = run(directory.path(), arguments);
            assert_eq!(output.status.code(), Some(1), "{arguments:?}");
            assert!(text(&output.stderr).contains(reason), "{arguments:?}: {}", text(&output.stderr));
        }
    }

    #[test]
    fn the_configuration_is_found_in_the_environment_and_counts_less_than_options() {
        let directory = tempfile::tempdir().unwrap();
        let config = "[general]\nmethod=unix-listen\npath=sock\nstatedir=.\nblock-rpcs=guest-info\n";
        fs::write(directory.path().join("conf"), config).unwrap();
        let mut command = agent(directory.path());
        command.env("QGA_CONF", "conf").args(["-b", "guest-exec", "-p", "other"]);
        let dumped = agent(directory.path()).env("QGA_CONF", "conf").arg("-D").output().unwrap();
        assert!(text(&dumped.stdout).starts_with("[general]\ndaemon=false\nmethod=unix-listen\npath=sock\n"));
        let _agent = Foreground(command.stderr(Stdio::null()).spawn().unwrap());
        let mut client = connect(&directory.path().join("other"));
        ping(&mut client);
        for blocked in ["guest-info", "guest-exec"] {
            let reply = ask(&mut client, blocked, &json!({}));
            let expected = format!("Command {blocked} has been disabled: the command is not allowed");
            assert_eq!(reply["error"], json!({"class": "CommandNotFound", "desc": expected}));
        }
    }

    #[test]
    fn an_allow_list_denies_everything_else() {
        let directory = tempfile::tempdir().unwrap();
        let mut command = agent(directory.path());
        command.args(["-m", "unix-listen", "-p", "sock", "-t", ".", "-a", "guest-info,guest-ping"]);
        let _agent = Foreground(command.stderr(Stdio::null()).spawn().unwrap());
        let info = ask(connect(&directory.path().join("sock")), "guest-info", &json!({}));
        let commands = info["return"]["supported_commands"].as_array().unwrap();
        let mut enabled: Vec<&str> = commands
            .iter()
            .filter(|command| command["enabled"] == true)
            .map(|command| command["name"].as_str().unwrap())
            .collect();
        enabled.sort_unstable();
        assert_eq!(enabled, ["guest-info", "guest-ping"]);
    }

    #[test]
    fn a_daemon_serves_when_its_parent_has_ended() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        let arguments = ["-d", "-m", "unix-listen", "-p", "sock", "-t", ".", "-f", "pid", "-l", "log", "-v"];
        // Its output ends although the daemon lives on: it has let go of it.
        let output = run(directory.path(), &arguments);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let daemon = Background::of(&path("pid"));
        // No wait here: who started it may use it at once.
        ping(UnixStream::connect(path("sock")).unwrap());

        let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.pid)).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        assert_eq!(fields[3], daemon.pid, "it leads a session of its own");
        assert_eq!(fs::read_link(format!("/proc/{}/cwd", daemon.pid)).unwrap(), PathBuf::from("/"));
        let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid)).unwrap();
        assert!(status.contains("Umask:\t0077"), "{status}");
        for stream in 0..3 {
            let target = fs::read_link(format!("/proc/{}/fd/{stream}", daemon.pid)).unwrap();
            assert_eq!(target, PathBuf::from("/dev/null"));
        }
        assert_eq!(fs::metadata(path("pid")).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(fs::read_to_string(path("log")).unwrap().contains("debug: Guest agent"));

        let other = run(directory.path(), &["-d", "-m", "unix-listen", "-p", "two", "-t", ".", "-f", "pid"]);
        assert_eq!(other.status.code(), Some(1), "the pid file is taken");
        assert!(text(&other.stderr).contains("Cannot create the pid file"), "{}", text(&other.stderr));
        assert_eq!(fs::read_to_string(path("pid")).unwrap().trim(), daemon.pid, "and left alone");

        daemon.end();
        assert!(!path("pid").exists());
    }

    #[test]
    fn the_parent_of_a_daemon_tells_that_the_channel_failed() {
        let directory = tempfile::tempdir().unwrap();
        let arguments = ["-d", "-m", "unix-listen", "-p", "no/sock", "-t", ".", "-f", "pid"];
        let output = run(directory.path(), &arguments);
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains("Cannot listen at"), "{}", text(&output.stderr));
    }

    #[test]
    fn the_pid_file_of_a_killed_daemon_is_taken_over() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        let arguments = ["-d", "-m", "unix-listen", "-p", "sock", "-t", ".", "-f", "pid"];
        assert!(run(directory.path(), &arguments).status.success());
        let first = Background::of(&path("pid"));
        assert!(first.signal("-KILL"));
        wait_until("it dies", || !first.is_alive());
        assert!(run(directory.path(), &arguments).status.success());
        let second = Background::of(&path("pid"));
        assert_ne!(first.pid, second.pid);
        second.end();
    }

    #[test]
    fn in_the_foreground_there_is_no_pid_file_and_sigint_ends_the_agent() {
        let directory = tempfile::tempdir().unwrap();
        let mut command = agent(directory.path());
        command.args(["-m", "unix-listen", "-p", "sock", "-t", ".", "-f", "pid"]);
        let mut agent = Foreground(command.stderr(Stdio::null()).spawn().unwrap());
        ping(connect(&directory.path().join("sock")));
        assert!(!directory.path().join("pid").exists());
        let pid = agent.0.id().to_string();
        assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
        assert_eq!(agent.0.wait().unwrap().code(), Some(0));
    }

    #[test]
    fn an_agent_that_starts_frozen_writes_nothing_until_the_thaw() {
        // Nothing is frozen here: the thaw, which tries every filesystem, finds that out.
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        fs::write(path("qga.state.isfrozen"), "").unwrap();
        let arguments = ["-d", "-m", "unix-listen", "-p", "sock", "-t", ".", "-f", "pid", "-l", "log"];
        let output = run(directory.path(), &arguments);
        assert!(output.status.success(), "{}", text(&output.stderr));

        let mut client = connect(&path("sock"));
        assert_eq!(ask(&mut client, "guest-fsfreeze-status", &json!({})), json!({"return": "frozen"}));
        assert!(!path("pid").exists() && !path("log").exists() && !path("qga.state").exists());
        assert_eq!(ask(&mut client, "guest-fsfreeze-thaw", &json!({})), json!({"return": 0}));
        assert!(fs::read_to_string(path("log")).unwrap().contains("guest-fsfreeze-thaw thaws them"));
        Background::of(&path("pid")).end();
    }

    /// Runs the agent with a socket as systemd passes it.
    fn activated(directory: &Path, socket: &UnixListener, count: &str) -> Command {
        // The shell keeps its process id, and passes on what is its standard input.
        let script = format!("exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS={count} exec \"$0\" \"$@\"");
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_tarn-agent")]);
        let socket = OwnedFd::from(socket.try_clone().unwrap());
        command.current_dir(directory).env("QGA_CONF", "/nonexistent").stdin(socket);
        command
    }

    #[test]
    fn a_socket_from_systemd_is_served_whatever_the_method() {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixListener::bind(directory.path().join("passed")).unwrap();
        // Who connects before the agent is there waits.
        let waiting = connect(&directory.path().join("passed"));
        let mut command = activated(directory.path(), &socket, "1");
        command.args(["-t", ".", "-m", "virtio-serial"]).stderr(Stdio::null());
        let _agent = Foreground(command.spawn().unwrap());
        ping(waiting);
        let mut client = connect(&directory.path().join("passed"));
        let arguments = json!({"path": "/usr/bin/env", "capture-output": true});
        let pid = ask(&mut client, "guest-exec", &arguments)["return"]["pid"].clone();
        let mut status = Value::Null;
        wait_until("the command ends", || {
            status = ask(&mut client, "guest-exec-status", &json!({"pid": pid}))["return"].take();
            status["exited"] == true
        });
        let output =
            base64::engine::general_purpose::STANDARD.decode(status["out-data"].as_str().unwrap()).unwrap();
        assert!(!text(&output).contains("LISTEN_"), "children are not meant: {}", text(&output));
    }

    #[test]
    fn more_than_one_socket_from_systemd_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixListener::bind(directory.path().join("passed")).unwrap();
        let output = activated(directory.path(), &socket, "2").output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(
            text(&output.stderr).contains("only supports listening on one socket"),
            "{}",
            text(&output.stderr)
        );
    }

    /// A pseudo-terminal: our side and the name of the other.
    fn terminal() -> (fs::File, PathBuf) {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let name = ptsname(&ours, Vec::new()).unwrap().into_string().unwrap();
        (ours.into(), name.into())
    }

    #[test]
    fn a_serial_line_carries_bytes_as_they_are_and_is_waited_for_when_lost() {
        let directory = tempfile::tempdir().unwrap();
        let (ours, name) = terminal();
        let link = directory.path().join("line");
        symlink(&name, &link).unwrap();
        let mut command = agent(directory.path());
        command.args(["-m", "isa-serial", "-p", "line", "-t", ".", "-v"]).stderr(Stdio::piped());
        let mut agent = Foreground(command.spawn().unwrap());
        // What comes before the line is set up is thrown away.
        let mut log = BufReader::new(agent.0.stderr.take().unwrap());
        read_until(&mut log, "Serving line");

        (&ours).write_all(b"{'execute':'guest-sync-delimited','arguments':{'id':7}}\r\n").unwrap();
        let mut reply = [0; 15];
        (&ours).read_exact(&mut reply).unwrap();
        assert_eq!(text(&reply[1..]), "{\"return\": 7}\n", "neither echo nor translation");
        assert_eq!(reply[0], 0xFF);
        let modes = tcgetattr(fs::File::open(&name).unwrap()).unwrap();
        assert_eq!((modes.input_speed(), modes.output_speed()), (38_400, 38_400));

        // Another line in its place.
        let (next, name) = terminal();
        fs::remove_file(&link).unwrap();
        symlink(&name, &link).unwrap();
        drop(ours);
        read_until(&mut log, "The channel is gone");
        read_until(&mut log, "Serving line");
        ping(&next);
        let pid = agent.0.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        assert!(agent.0.wait().unwrap().success());
    }

    fn read_until(log: &mut impl BufRead, wanted: &str) {
        let mut line = String::new();
        while !line.contains(wanted) {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "the agent does not say: {wanted}");
        }
    }
}
