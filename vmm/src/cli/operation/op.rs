//! `tarn op`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::bail;
use clap::{Args, Subcommand};
use coordinator::StateDir;
use coordinator::journal::{self, Hold, OperationLog};
use coordinator::operation::{self, Connection};
use uuid::Uuid;

use super::super::{interrupt, output};
use super::{Target, bytes, fail, finish, known_vms, refuse, tell_recovery};

/// List, show, go on with, or end operations on disks
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  tarn op list\n  tarn op show web\n  tarn op resume web")]
pub(in super::super) struct OpArgs {
    #[command(subcommand)]
    verb: OpVerb,
}

#[derive(Debug, Subcommand)]
enum OpVerb {
    /// All operations that are remembered, of one VM or of all
    List {
        /// A VM, running or not
        #[arg(value_name = "NAME")]
        name: Option<String>,
        /// Tell in JSON
        #[arg(long)]
        json: bool,
    },
    /// The last operation of a VM, or the one of that id, step by step
    Show {
        /// A VM, running or not
        #[arg(value_name = "NAME")]
        name: String,
        /// The operation
        #[arg(value_name = "ID")]
        id: Option<Uuid>,
        /// Tell in JSON
        #[arg(long)]
        json: bool,
    },
    /// Go on with the operation that is open
    Resume(Target),
    /// End the operation that is open, on its sources
    Abort(Target),
}

pub(in super::super) fn run(args: &OpArgs) -> anyhow::Result<u8> {
    match &args.verb {
        OpVerb::List { name, json } => list(name.as_deref(), *json),
        OpVerb::Show { name, id, json } => show(name, *id, *json),
        OpVerb::Resume(target) => {
            interrupt::only_ask()?;
            let (state, vm) = match running(target) {
                Ok(reached) => reached,
                Err(error) => return refuse(target, &error),
            };
            finish(target, operation::resume(&state, &vm, &mut target.observer()))
        }
        OpVerb::Abort(target) => {
            let (state, vm) = match running(target) {
                Ok(reached) => reached,
                Err(error) => return refuse(target, &error),
            };
            match operation::abort(&state, &vm, &mut target.observer()) {
                Ok(recovery) => tell_recovery(target, &recovery),
                Err(error) => fail(target, error),
            }
        }
    }
}

/// Without a VM there is nothing to go on with or to take back, only something to settle, if it has left that.
fn running(target: &Target) -> anyhow::Result<(StateDir, Connection)> {
    let name = &target.name;
    target.reach().map_err(|error| {
        let operations = target.state().ok().and_then(|state| journal::operations(&state).ok());
        match operations.iter().flatten().last().filter(|last| last.is_open()) {
            Some(open) => error.context(format!(
                "What VM {name} has left is for `tarn recover {}` to settle",
                open.vm_for_commands(name)
            )),
            None => error,
        }
    })
}

fn list(name: Option<&str>, json: bool) -> anyhow::Result<u8> {
    let names = match name {
        Some(name) => vec![name.to_owned()],
        None => known_vms()?,
    };
    let mut all = Vec::new();
    for name in names {
        let operations = journal::operations(&StateDir::of(&name)?)?;
        all.extend(operations.into_iter().map(|operation| (name.clone(), operation)));
    }
    if json {
        let with_name = |(name, operation): &(String, OperationLog)| {
            let mut value = operation.to_json(false);
            value["vm"] = name.as_str().into();
            value
        };
        output::print_json(&all.iter().map(with_name).collect::<Vec<_>>())?;
        return Ok(0);
    }
    let mut text = String::new();
    for (name, operation) in &all {
        let plan = &operation.plan;
        let disks: Vec<_> = plan.disks.iter().map(|disk| disk.disk.as_str()).collect();
        text += &format!(
            "{:<12} {} {:<7} {:<16} {:<10} {}\n",
            name,
            operation.id(),
            word(plan.kind),
            operation.stage().name(),
            word(operation.outcome()),
            disks.join(",")
        );
    }
    output::print(text)?;
    Ok(0)
}

fn show(name: &str, id: Option<Uuid>, json: bool) -> anyhow::Result<u8> {
    let operations = journal::operations(&StateDir::of(name)?)?;
    let found = operations.iter().rev().find(|operation| id.is_none_or(|id| operation.id() == id));
    let Some(operation) = found else {
        match id {
            Some(id) => bail!("VM {name} has had no operation {id} (`tarn op list {name}` lists them)"),
            None => bail!("VM {name} has had no operation (`tarn op list` lists those of all VMs)"),
        }
    };
    if json {
        output::print_json(&operation.to_json(true))?;
        return Ok(0);
    }
    let plan = &operation.plan;
    let mut text = format!(
        "operation {}, {} of generation {}: {}\n",
        operation.id(),
        word(plan.kind),
        operation.operation.generation,
        word(operation.outcome())
    );
    for disk in &plan.disks {
        let (from, to) = (disk.source.path.display(), disk.target.path.display());
        text += &format!("disk '{}': {from} → {to}, {}\n", disk.disk, bytes(disk.target.size));
    }
    for entry in &operation.entries {
        let details = serde_json::to_string(&entry.details)?;
        let details = if entry.details.is_empty() { "" } else { &details };
        text += &format!("  {}  {:<17} {details}\n", clock(entry.at), entry.stage.name());
    }
    if operation.is_open() {
        text += &format!("It is open: {}\n", operation.what_next(name));
        text += &held(operation);
    }
    output::print(text)?;
    Ok(0)
}

/// What of the guest waits for the end of an operation.
fn held(operation: &OperationLog) -> String {
    let progress = operation.progress;
    let (stopped, frozen) = (progress.pause() != Hold::None, progress.freeze() != Hold::None);
    match (stopped, frozen) {
        (false, false) => String::new(),
        (true, false) => "Unless a coordinator has let it go, the VM is stopped until then\n".to_owned(),
        (false, true) => {
            "Unless a coordinator or its lease has thawed it, the guest is frozen until then\n".to_owned()
        }
        (true, true) => {
            "Unless a coordinator has let it go, the VM is stopped until then, and its guest frozen\n"
                .to_owned()
        }
    }
}

fn word(value: impl serde::Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

/// How long ago, for people.
fn clock(at_ms: u64) -> String {
    let then = UNIX_EPOCH + Duration::from_millis(at_ms);
    let ago = SystemTime::now().duration_since(then).unwrap_or_default().as_secs_f64();
    match ago {
        ago if ago < 600.0 => format!("{ago:>7.1} s ago"),
        ago if ago < 48.0 * 3600.0 => format!("{:>7.1} h ago", ago / 3600.0),
        ago => format!("{:>7.1} d ago", ago / 86400.0),
    }
}
