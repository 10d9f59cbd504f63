//! `tarn stop`.

use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use coordinator::{GuestSession, Map, MonitorSession};

use super::guest_state;
use super::process::VmProcess;
use super::vm_name::{AT_ONCE, VmName};

/// How long an agent may take to show that it is there.
const AGENT: Duration = Duration::from_secs(5);
/// How long a VM may take to go away after its guest has; then a policy keeps it, and `quit` is in order.
const AFTER_SHUTDOWN: Duration = Duration::from_secs(2);

/// Let the guest of a VM shut down, and wait for the end of the VM
///
/// Asks the guest agent, or presses the power button where there is none.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tarn stop web --timeout 120")]
pub(super) struct StopArgs {
    #[command(flatten)]
    vm: VmName,
    /// Seconds until this is an error; the VM goes on then
    #[arg(long, value_name = "SECONDS", default_value_t = 90)]
    timeout: u64,
}

pub(super) fn run(args: &StopArgs) -> anyhow::Result<u8> {
    let began = Instant::now();
    let timeout = Duration::from_secs(args.timeout);
    let vm = args.vm.open()?;
    let name = vm.name();
    let Some(process) = VmProcess::of(&vm)? else { return Ok(0) };
    let mut monitor = MonitorSession::connect(&vm.monitor_socket(), AT_ONCE)?;
    let status = monitor.execute("query-status", None, AT_ONCE)?;
    match status["status"].as_str().unwrap_or_default() {
        "running" => {
            if let Err(error) = ask_agent(&vm.agent_socket(), timeout.min(AGENT)) {
                tracing::info!("{error}; pressing the power button instead");
                monitor.execute("system_powerdown", None, AT_ONCE)?;
            }
        }
        // Its guest is gone already: there is nothing to ask, and nothing to lose.
        "shutdown" | "guest-panicked" | "internal-error" => return quit(&mut monitor, &process, name),
        state => {
            let obstacle = guest_state::obstacle(name, state, guest_state::holder(&mut monitor).as_deref());
            bail!("{obstacle}, or `tarn kill {name}`")
        }
    }
    loop {
        let left = timeout.saturating_sub(began.elapsed());
        if left.is_zero() {
            bail!("VM {name} still runs after {} s; `tarn kill {name}` ends it at once", args.timeout);
        }
        // Its end closes the connection; a guest that is down while its VM stays is told by an event.
        match monitor.next_event(left) {
            Ok(Some(event)) if event.name == "SHUTDOWN" => break,
            Ok(_) => {}
            Err(_) => break,
        }
    }
    if process.wait(AFTER_SHUTDOWN)? { Ok(0) } else { quit(&mut monitor, &process, name) }
}

fn ask_agent(socket: &std::path::Path, patience: Duration) -> Result<(), coordinator::SessionError> {
    let mut agent = GuestSession::connect(socket)?;
    agent.wait_for_agent(patience)?;
    let arguments = Map::from_iter([("mode".to_owned(), "powerdown".into())]);
    agent.execute_without_reply("guest-shutdown", Some(arguments), Duration::from_secs(1))
}

/// Ends a VM whose guest is down.
fn quit(monitor: &mut MonitorSession, process: &VmProcess, name: &str) -> anyhow::Result<u8> {
    // An answer may not come any more; the process tells.
    let asked = monitor.execute("quit", None, AT_ONCE);
    if process.wait(AT_ONCE)? {
        return Ok(0);
    }
    asked?;
    bail!("The guest of VM {name} is down, but the VM does not end; `tarn kill {name}` ends it")
}
