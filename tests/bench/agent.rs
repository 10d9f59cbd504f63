//! The agent's port, spoken to with as little as possible in between.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use coordinator::GuestSession;
use coordinator::recipes::{ExecRequest, Output, Stream, exec};

use crate::contender::{LIMIT, Running};

const PING: &[u8] = b"{\"execute\":\"guest-ping\"}\n";
/// How long it takes to notice a socket that has just come up; far below what a boot takes.
const PAUSE: Duration = Duration::from_micros(500);

/// A connection to an agent.
#[derive(Debug)]
pub struct Agent {
    stream: UnixStream,
    /// From the start of the VMM to the agent's first answer.
    pub up: Duration,
}

impl Agent {
    /// Asks as soon as there is a socket, and waits for the answer. Both sides hold the question until the guest takes it.
    pub fn wait(vm: &mut Running) -> Result<Self, String> {
        let stream = loop {
            match UnixStream::connect(&vm.agent_socket) {
                Ok(stream) => break stream,
                Err(error) if vm.started.elapsed() > LIMIT => {
                    return Err(vm.autopsy(&format!("no agent socket: {error}")));
                }
                Err(_) => std::thread::sleep(PAUSE),
            }
        };
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut agent = Self { stream, up: Duration::ZERO };
        if let Err(error) = agent.ask() {
            return Err(vm.autopsy(&format!("no agent: {error}")));
        }
        agent.up = vm.started.elapsed();
        Ok(agent)
    }

    /// One round trip.
    pub fn ping(&mut self) -> Result<Duration, String> {
        let start = Instant::now();
        self.ask().map_err(|error| format!("ping: {error}"))?;
        Ok(start.elapsed())
    }

    fn ask(&mut self) -> std::io::Result<()> {
        self.stream.write_all(PING)?;
        let mut answer = [0; 512];
        let mut len = 0;
        while len == 0 || answer[len - 1] != b'\n' {
            let count = self.stream.read(&mut answer[len..])?;
            if count == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            len += count;
        }
        let answer = String::from_utf8_lossy(&answer[..len]);
        if answer.starts_with("{\"return\": {}}") {
            return Ok(());
        }
        Err(std::io::Error::other(format!("the agent answers {answer}")))
    }
}

/// Standard output of a script that must succeed.
pub fn guest_output(session: &mut GuestSession, script: &str, time: Duration) -> Result<String, String> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let request = ExecRequest { timeout: Some(LIMIT / 2 + 2 * time), ..ExecRequest::shell(script) };
    let status = exec(session, &request, &mut |output| {
        match output {
            Output::Bytes(Stream::Stdout, bytes) => stdout.extend_from_slice(bytes),
            Output::Bytes(Stream::Stderr, bytes) => stderr.extend_from_slice(bytes),
            Output::Truncated(_) => {}
        }
        Ok(())
    })
    .map_err(|error| error.to_string())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match status.code() {
        0 => Ok(text(&stdout)),
        code => Err(format!("exit status {code}\n{}\n{}", text(&stdout), text(&stderr))),
    }
}
