//! `tarn exec`.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Read, Write};
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::Args;
use coordinator::GuestSession;
use coordinator::recipes::{self, ExecError, ExecRequest, Output, Stream};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::output;
use super::vm_name::VmName;

/// Run a command in the guest of a VM, through its agent
///
/// Standard input goes in unless it is a terminal; both outputs come back when the command has ended, and so does its
/// exit status (128+N after signal N). Of each output 16 MiB are kept: if there was more, the exit status is 74, unless the
/// command has failed by itself. Larger ones go to a file in the guest, and out by `tarn cp`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  tarn exec web -- uname -r\n  \
    tarn exec web -e LANG=C -- sh -c 'cat > /tmp/list; wc -l /tmp/list' < list")]
pub(super) struct ExecArgs {
    #[command(flatten)]
    vm: VmName,
    /// Set a variable of the command's environment
    #[arg(short, long = "env", value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<String>,
    /// Pass standard input on even if it is a terminal
    #[arg(short, long)]
    input: bool,
    /// Do not touch standard input
    #[arg(short, long, conflicts_with = "input")]
    no_input: bool,
    /// Seconds to wait for the end of the command; it is left running then
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// The command and its arguments
    #[arg(required = true, last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// After this long without a byte of standard input, its user may wonder.
const PUZZLING: Timespec = Timespec { tv_sec: 3, tv_nsec: 0 };

/// Exit status when an output is not complete, although the command has succeeded (EX_IOERR of sysexits.h).
const TRUNCATED: u8 = 74;

/// How long an agent may take to show that it is there.
const AGENT: Duration = Duration::from_secs(30);

pub(super) fn run(args: ExecArgs) -> anyhow::Result<u8> {
    let mut agent = args.vm.agent()?;
    let timeout = args.timeout.map(Duration::from_secs);
    agent.wait_for_agent(timeout.map_or(AGENT, |timeout| timeout.min(AGENT)))?;
    let mut request = request(args.env, args.command)?;
    request.timeout = timeout;
    if args.input || !(args.no_input || io::stdin().is_terminal()) {
        request.input = Some(read_input()?);
    }
    run_and_pass_on(&mut agent, &request)
}

/// The agent's own way to set variables replaces the whole environment, `PATH` included; env(1) adds to it.
fn request(env: Vec<String>, command: Vec<OsString>) -> anyhow::Result<ExecRequest> {
    let mut words = if env.is_empty() { Vec::new() } else { vec!["env".to_owned()] };
    words.extend(env);
    for word in command {
        words.push(word.into_string().map_err(|word| anyhow!("Argument {word:?} is not UTF-8"))?);
    }
    Ok(ExecRequest { path: words.remove(0), args: words, ..ExecRequest::default() })
}

fn variable(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((name, _)) if !name.is_empty() => Ok(text.to_owned()),
        _ => Err("a variable is NAME=VALUE".into()),
    }
}

/// All of standard input. The agent takes it whole, so this waits for its end: which may never come, if it was inherited
/// from something that just happens to hold a pipe open.
pub(super) fn read_input() -> anyhow::Result<Vec<u8>> {
    let mut input = Vec::new();
    let stdin = io::stdin();
    let mut fds = [PollFd::new(&stdin, PollFlags::IN)];
    if let Ok(0) = poll(&mut fds, Some(&PUZZLING)) {
        output::complain("Waiting for the end of standard input (--no-input leaves it alone)");
    }
    stdin.lock().read_to_end(&mut input).context("Cannot read standard input")?;
    Ok(input)
}

/// Runs a command in the guest, passes on its outputs, and gives its status as a shell does.
pub(super) fn run_and_pass_on(agent: &mut GuestSession, request: &ExecRequest) -> anyhow::Result<u8> {
    let mut truncated = false;
    let mut pass_on = |output: Output<'_>| {
        truncated |= matches!(output, Output::Truncated(_));
        pass_on(output)
    };
    match recipes::exec(agent, request, &mut pass_on) {
        Ok(status) if status.code() == 0 && truncated => Ok(TRUNCATED),
        Ok(status) => Ok(status.code()),
        Err(ExecError::Output { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => {
            Err(output::Closed.into())
        }
        Err(error) => Err(error.into()),
    }
}

fn pass_on(output: Output<'_>) -> io::Result<()> {
    match output {
        Output::Bytes(Stream::Stdout, bytes) => {
            let mut stdout = io::stdout().lock();
            stdout.write_all(bytes)?;
            stdout.flush()
        }
        Output::Bytes(Stream::Stderr, bytes) => io::stderr().write_all(bytes),
        Output::Truncated(stream) => {
            let name = if stream == Stream::Stdout { "output" } else { "error output" };
            output::complain(&format!(
                "The standard {name} is not complete: the agent keeps the first 16 MiB, the rest is lost"
            ));
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_set_by_env() {
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        let plain = request(vec![], words(&["uname", "-r"])).unwrap();
        assert_eq!((plain.path.as_str(), plain.args), ("uname", vec!["-r".to_owned()]));
        let with = request(vec!["A=b c".into()], words(&["ls"])).unwrap();
        assert_eq!((with.path.as_str(), with.args), ("env", vec!["A=b c".to_owned(), "ls".to_owned()]));
        assert!(variable("A").is_err() && variable("=x").is_err() && variable("A=").is_ok());
    }
}
