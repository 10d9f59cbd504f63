//! What the subcommands about operations share: which VM, what is told meanwhile, and how it ends.
//!
//! | exit status | |
//! |---|---|
//! | 0 | done |
//! | 1 | refused before anything has changed |
//! | 3 | aborted: everything is as it was before |
//! | 4 | not settled: `tarn recover` finds out |

mod backup;
mod freeze;
mod mirror;
mod op;
mod pivot;
mod recover;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use clap_complete::engine::ArgValueCompleter;
use coordinator::StateDir;
use coordinator::journal::{Protocol, Stage};
use coordinator::operation::{
    Connection, Copying, Observer, OperationError, Recovery, Report, Request, Timeline,
};
use coordinator::resolve::ResolveError;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use uuid::Uuid;

pub(super) use self::backup::BackupArgs;
pub(super) use self::freeze::{FreezeArgs, ThawArgs};
pub(super) use self::mirror::MirrorArgs;
pub(super) use self::op::OpArgs;
pub(super) use self::pivot::PivotArgs;
pub(super) use self::recover::RecoverArgs;
use super::vm_name::candidates;
use super::{FAILURE, interrupt, output};
use crate::run_dir::RunningVm;

pub(super) use self::backup::run as backup;
pub(super) use self::freeze::{freeze, thaw};
pub(super) use self::mirror::run as mirror;
pub(super) use self::op::run as op;
pub(super) use self::pivot::run as pivot;
pub(super) use self::recover::run as recover;

/// Everything is as it was before.
const ABORTED: u8 = 3;
/// Nobody may assume anything about it.
const UNSETTLED: u8 = 4;

/// Which VM, and how its user wants to hear of it.
#[derive(Debug, Args)]
struct Target {
    /// The VM, as `tarn run --name` names it
    #[arg(value_name = "NAME", add = ArgValueCompleter::new(candidates))]
    name: String,
    /// QMP socket of a VM that another program runs, such as QEMU; NAME is then free to choose
    #[arg(long, value_name = "SOCKET", help_heading = "Other VMMs")]
    monitor: Option<PathBuf>,
    /// Guest agent's socket of such a VM
    #[arg(long, value_name = "SOCKET", requires = "monitor", help_heading = "Other VMMs")]
    agent: Option<PathBuf>,
    /// Tell in JSON
    #[arg(long)]
    json: bool,
}

impl Target {
    fn state(&self) -> anyhow::Result<StateDir> {
        Ok(StateDir::of(&self.name)?)
    }

    fn connection(&self) -> anyhow::Result<Connection> {
        if let Some(monitor) = &self.monitor {
            return Ok(Connection { monitor: monitor.clone(), agent: self.agent.clone(), foreign: true });
        }
        let vm = RunningVm::open(&self.name)?;
        Ok(Connection { monitor: vm.monitor_socket(), agent: Some(vm.agent_socket()), foreign: false })
    }

    fn reach(&self) -> anyhow::Result<(StateDir, Connection)> {
        Ok((self.state()?, self.connection()?))
    }

    fn observer(&self) -> Bar {
        Bar { bar: None, shows: !self.json && std::io::stderr().is_terminal() }
    }
}

/// Disks and targets, and who decides.
#[derive(Debug, Args)]
struct Disks {
    /// Disk, by its id (disk0, disk1… if `tarn run` was not told another), and the image to copy it to; several are one
    /// operation
    #[arg(value_name = "DISK=TARGET", required = true, value_parser = disk)]
    disks: Vec<(String, PathBuf)>,
    /// Freeze the guest's filesystems for it
    #[arg(long)]
    freeze: bool,
    /// Stop the VM for it
    #[arg(long)]
    pause: bool,
    /// After how long the guest thaws itself, should nobody else do it
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = lease)]
    lease: Duration,
    /// Write over a target that is there
    #[arg(long)]
    reuse: bool,
}

impl Disks {
    fn fill(&self, request: Request) -> Request {
        let mut request = Request { freeze: self.freeze, pause: self.pause, reuse: self.reuse, ..request };
        request.settings.lease = self.lease;
        request
    }
}

fn disk(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((disk, target)) if !disk.is_empty() && !target.is_empty() => {
            Ok((disk.to_owned(), target.into()))
        }
        _ => Err("expected DISK=TARGET, as in disk0=/images/new.raw".to_owned()),
    }
}

/// A time with its unit.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        _ => return Err("expected a time with its unit, as in 50ms, 30s or 2m".to_owned()),
    };
    let seconds = number.parse::<f64>().map_err(|error| error.to_string())? * factor;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

/// How long a guest is frozen at most. The agent takes none for no limit.
fn lease(text: &str) -> Result<Duration, String> {
    duration(text).and_then(|lease| match lease.as_millis() {
        0 => Err("a lease is at least 1ms".to_owned()),
        _ => Ok(lease),
    })
}

/// A name for `--protocol`.
fn protocol(text: &str) -> Result<Protocol, String> {
    match text {
        "a" => Ok(Protocol::A),
        "b" => Ok(Protocol::B),
        _ => Err("expected a (the VM decides) or b (this process does; works with QEMU, too)".to_owned()),
    }
}

/// A bar on a terminal.
struct Bar {
    bar: Option<ProgressBar>,
    shows: bool,
}

impl Observer for Bar {
    fn stage(&mut self, id: Uuid, stage: Stage) {
        tracing::info!(operation = %id, stage = stage.name(), "The operation is further");
        if stage == Stage::Ready
            && let Some(bar) = self.bar.take()
        {
            bar.finish_and_clear();
        }
    }

    fn copying(&mut self, copying: &Copying) {
        if !self.shows || copying.total == 0 {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let style =
                ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes}, {bytes_per_sec}{msg}");
            ProgressBar::new(copying.total).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        bar.set_length(copying.total);
        bar.set_position(copying.done);
        let mut message = String::new();
        if let Some(remaining) = copying.remaining {
            message = format!(", {:.0} s left", remaining.as_secs_f64());
        }
        if let Some(hold) = copying.expected_hold {
            message += &format!(", guest held for {} expected", short(hold));
        }
        bar.set_message(message);
    }

    fn wants_end(&mut self) -> bool {
        interrupt::is_requested()
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn short(time: Duration) -> String {
    match time.as_secs_f64() {
        seconds if seconds >= 1.0 => format!("{seconds:.2} s"),
        seconds => format!("{:.2} ms", seconds * 1e3),
    }
}

/// Carries an operation out, and says how it went. A signal that would end this process ends the operation, cleanly.
fn carry_out(target: &Target, request: &Request) -> anyhow::Result<u8> {
    interrupt::only_ask()?;
    let (state, connection) = match target.reach() {
        Ok(reached) => reached,
        Err(error) => return refuse(target, &error),
    };
    finish(target, coordinator::operation::run(&state, &connection, request, &mut target.observer()))
}

fn finish(target: &Target, result: Result<Report, OperationError>) -> anyhow::Result<u8> {
    match result {
        Ok(report) if target.json => {
            output::print_json(&report.to_json())?;
            Ok(0)
        }
        Ok(report) => {
            tell(&report)?;
            Ok(0)
        }
        Err(error) => fail(target, error),
    }
}

/// Nothing was begun.
fn refuse(target: &Target, error: &anyhow::Error) -> anyhow::Result<u8> {
    complain(target, "refused", &format!("{error:#}"))?;
    Ok(FAILURE)
}

fn complain(target: &Target, outcome: &str, text: &str) -> anyhow::Result<()> {
    if target.json {
        output::print_json(&serde_json::json!({"outcome": outcome, "error": text}))?;
    }
    output::complain(text);
    Ok(())
}

fn fail(target: &Target, error: OperationError) -> anyhow::Result<u8> {
    let (status, outcome) = match &error {
        OperationError::Aborted { warnings, .. } => {
            warn(warnings);
            (ABORTED, "aborted")
        }
        // What is written down is not what its user chose.
        OperationError::Resolve(ResolveError::Decided { .. }) => (FAILURE, "refused"),
        OperationError::Unsettled { .. } | OperationError::Resolve(_) => (UNSETTLED, "unsettled"),
        _ => (FAILURE, "refused"),
    };
    let text = format!("{:#}", anyhow::Error::new(error));
    complain(target, outcome, &text)?;
    Ok(status)
}

fn tell(report: &Report) -> anyhow::Result<()> {
    use coordinator::journal::{Consistency, OperationKind};
    let Report { id, kind, consistency, disks, timeline, warnings, .. } = report;
    let mut text = String::new();
    for disk in disks {
        let verb = match kind {
            OperationKind::Pivot => "moved to",
            OperationKind::Mirror | OperationKind::Backup => "copied to",
        };
        text += &format!("disk '{}' {verb} {}\n", disk.disk, disk.target.path.display());
    }
    let worth = match consistency {
        Consistency::Crash => "as after a power cut",
        Consistency::Filesystem => "frozen filesystems",
        Consistency::Application => "frozen filesystems, hooks ran",
        Consistency::Void => "void: the guest was thawed too early",
    };
    text += &format!("operation {id}, consistency: {worth}\n");
    text += &times(timeline);
    output::print(text)?;
    warn(warnings);
    Ok(())
}

fn times(timeline: &Timeline) -> String {
    let Timeline { copied, frozen, paused, held, whole } = timeline;
    let named =
        [("copied", copied), ("frozen", frozen), ("paused", paused), ("held", held), ("whole", whole)];
    let times: Vec<_> =
        named.iter().filter_map(|(name, time)| time.map(|time| format!("{name} {}", short(time)))).collect();
    format!("{}\n", times.join(", "))
}

fn warn(warnings: &[String]) {
    for warning in warnings {
        output::complain(&format!("warning: {warning}"));
    }
}

fn tell_recovery(target: &Target, recovery: &Recovery) -> anyhow::Result<u8> {
    if target.json {
        let operation = recovery.operation.as_ref().map(|operation| operation.to_json(true));
        output::print_json(&serde_json::json!({
            "operation": operation,
            "found": recovery.found.map(Stage::name),
            "story": recovery.story,
            "warnings": recovery.warnings,
        }))?;
    } else if recovery.operation.is_none() {
        output::print(format!("VM {}: nothing to recover\n", target.name))?;
    } else {
        output::print(recovery.story.join("\n") + "\n")?;
    }
    warn(&recovery.warnings);
    Ok(0)
}

/// Bytes for people.
fn bytes(count: u64) -> String {
    HumanBytes(count).to_string()
}

/// All VMs of this user that have had an operation.
fn known_vms() -> anyhow::Result<Vec<String>> {
    // Any name will do to find the directory above.
    let base = StateDir::of("x")?.base().to_owned();
    let entries = match std::fs::read_dir(&base) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        entries => entries.with_context(|| format!("Cannot read {}", base.display()))?,
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| StateDir::of(name).is_ok_and(|state| state.journal().exists()))
        .collect();
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        assert_eq!(duration("50ms").unwrap(), Duration::from_millis(50));
        assert_eq!(duration("1.5s").unwrap(), Duration::from_millis(1500));
        assert_eq!(duration("2m").unwrap(), Duration::from_secs(120));
        for wrong in ["50", "ms", "-1s", "1e3s", "s", ""] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_freeze_without_a_lease_cannot_be_asked_for() {
        assert_eq!(lease("1ms").unwrap(), Duration::from_millis(1));
        for wrong in ["0s", "0ms", "999us", "30"] {
            assert!(lease(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_disk_has_a_target() {
        assert_eq!(disk("vda=/a=b").unwrap(), ("vda".to_owned(), PathBuf::from("/a=b")));
        for wrong in ["vda", "=x", "vda=", ""] {
            assert!(disk(wrong).is_err(), "{wrong}");
        }
    }
}
