//! `tarn freeze` and `tarn thaw`.

use std::time::Duration;

use clap::Args;
use coordinator::Map;
use serde_json::{Value, json};

use super::super::output;
use super::super::vm_name::{VmName, WITH_DISKS};
use super::lease;

/// Freeze the filesystems of a VM's guest
///
/// They thaw by `tarn thaw`, or by themselves when the lease is over: no guest stays frozen because somebody forgot.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tarn freeze web --lease 2m")]
pub(in super::super) struct FreezeArgs {
    #[command(flatten)]
    vm: VmName,
    /// After how long the guest thaws itself
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = lease)]
    lease: Duration,
    /// Tell in JSON
    #[arg(long)]
    json: bool,
}

/// Thaw the filesystems of a VM's guest
///
/// Says whether they were still frozen: otherwise what was copied meanwhile is void.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tarn thaw web")]
pub(in super::super) struct ThawArgs {
    #[command(flatten)]
    vm: VmName,
    /// Tell in JSON
    #[arg(long)]
    json: bool,
}

pub(in super::super) fn freeze(args: &FreezeArgs) -> anyhow::Result<u8> {
    let lease = u64::try_from(args.lease.as_millis())?;
    // This process leaves: the freeze outlives it as long as its lease does.
    let arguments = json!({"tarn-lease-ms": lease, "tarn-thaw-grace-ms": lease});
    let arguments = arguments.as_object().cloned().map(Map::from_iter);
    let frozen = args.vm.agent()?.execute("guest-fsfreeze-freeze", arguments, WITH_DISKS)?;
    if args.json {
        output::print_json(&json!({"filesystems": frozen, "lease-ms": lease}))?;
    } else {
        let name = &args.vm.name;
        let count = filesystems(&frozen);
        output::print(format!("{name} is frozen, {count}, for {:?} at most\n", args.lease))?;
    }
    Ok(0)
}

pub(in super::super) fn thaw(args: &ThawArgs) -> anyhow::Result<u8> {
    let mut agent = args.vm.agent()?;
    let was_frozen = agent.execute("guest-fsfreeze-status", None, WITH_DISKS)? == "frozen";
    let thawed = agent.execute("guest-fsfreeze-thaw", None, WITH_DISKS)?;
    // An agent without it has not much to say.
    let report = agent.execute("tarn-fsfreeze-report", None, WITH_DISKS).unwrap_or(Value::Null);
    if args.json {
        output::print_json(&json!({"was-frozen": was_frozen, "filesystems": thawed, "report": report}))?;
    } else if was_frozen {
        output::print(format!("{} is thawed, {}\n", args.vm.name, filesystems(&thawed)))?;
    } else {
        output::print(format!("{} was not frozen\n", args.vm.name))?;
    }
    if report["void"] == true {
        output::complain(
            "warning: the guest was thawed before: what was copied while it seemed frozen is void",
        );
    }
    Ok(0)
}

fn filesystems(count: &Value) -> String {
    format!("{count} filesystem{}", if *count == 1 { "" } else { "s" })
}
