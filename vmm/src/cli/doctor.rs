//! `tarn doctor`: what of this host Tarn needs, whether it is there, and how to get it.

mod host;
mod kvm;

use std::io::IsTerminal;

use clap::Args;
use serde::Serialize;

use super::output;

/// Check whether this host can run VMs, and say what to do where it cannot
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  tarn doctor --json\n\nExit status: 1 if something that is needed is missing."
)]
pub(super) struct DoctorArgs {
    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Status {
    Ok,
    /// VMs run, but something is slower or missing.
    Warning,
    /// No VM runs.
    Failure,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    /// What was found.
    detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, detail: detail.into(), advice: None }
    }

    fn warning(name: &'static str, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, status: Status::Warning, detail: detail.into(), advice: Some(advice.into()) }
    }

    fn failure(name: &'static str, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { name, status: Status::Failure, detail: detail.into(), advice: Some(advice.into()) }
    }
}

pub(super) fn run(args: &DoctorArgs) -> anyhow::Result<u8> {
    let mut checks = kvm::checks();
    checks.extend([host::memory(), host::io_uring(), host::run_dir(), host::guest_image()]);
    if args.json {
        output::print_json(&checks)?;
    } else {
        output::print(report(&checks, std::io::stdout().is_terminal()))?;
    }
    Ok(u8::from(checks.iter().any(|check| check.status == Status::Failure)))
}

fn report(checks: &[Check], colours: bool) -> String {
    let mut text = String::new();
    for Check { name, status, detail, advice } in checks {
        let (mark, colour) = match status {
            Status::Ok => ("ok     ", "32"),
            Status::Warning => ("warning", "33"),
            Status::Failure => ("FAILED ", "31"),
        };
        let mark = if colours { format!("\x1b[{colour}m{mark}\x1b[0m") } else { mark.to_owned() };
        text += &format!("{mark}  {name}: {detail}\n");
        if let Some(advice) = advice {
            text += &format!("         {advice}\n");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_the_advice_below_the_finding() {
        let text = report(&[Check::ok("a", "fine"), Check::failure("b", "gone", "get it")], false);
        assert_eq!(text, "ok       a: fine\nFAILED   b: gone\n         get it\n");
    }
}
