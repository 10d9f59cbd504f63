//! `tarn ps`.

use std::fmt::Write;
use std::time::{Duration, SystemTime};

use clap::Args;
use coordinator::disks::DurableDisks;
use coordinator::{MonitorSession, SessionError, StateDir};
use serde::Serialize;
use serde_json::Value;

use super::output;
use crate::config::{DiskSpec, format_size};
use crate::run_dir::RunningVm;

/// How long a monitor may take. One that hangs must not hide the others.
const PATIENCE: Duration = Duration::from_millis(1500);
const HUNG: &str = "not responding";
/// Its process lives and has no monitor yet.
const STARTING: &str = "starting";

/// List the running VMs
///
/// With the images that their disks have now: those that a pivot moved them to, if one did.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tarn ps --json")]
pub(super) struct PsArgs {
    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Row {
    name: String,
    pid: Option<i32>,
    /// As `query-status` names it.
    state: String,
    uptime_seconds: Option<u64>,
    cpus: Option<u8>,
    memory: Option<u64>,
    disks: Vec<String>,
}

pub(super) fn run(args: &PsArgs) -> anyhow::Result<u8> {
    let vms = RunningVm::list()?;
    // Side by side: several that hang take no longer than one.
    let rows: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = vms.iter().map(|vm| scope.spawn(|| row(vm))).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok().flatten()).collect()
    });
    if args.json {
        output::print_json(&rows)?;
    } else {
        output::print(table(&rows))?;
    }
    Ok(0)
}

/// `None` when it has ended meanwhile.
fn row(vm: &RunningVm) -> Option<Row> {
    let asked = MonitorSession::connect(&vm.monitor_socket(), PATIENCE).and_then(|mut monitor| {
        let status = monitor.execute("query-status", None, PATIENCE)?;
        let state = status["status"].as_str().unwrap_or("unknown").to_owned();
        Ok((state, monitor.execute("query-block", None, PATIENCE).ok()))
    });
    let (state, blocks) = match asked {
        Ok((state, blocks)) => (Ok(state), blocks),
        Err(error) => (Err(error), None),
    };
    if state.is_err() && !vm.is_alive() {
        return None;
    }
    let config = vm.config();
    Some(Row {
        name: vm.name().to_owned(),
        pid: vm.pid,
        state: match state {
            Ok(state) => state,
            Err(SessionError::Connect { .. }) => STARTING.to_owned(),
            Err(_) => HUNG.to_owned(),
        },
        uptime_seconds: vm
            .started()
            .and_then(|started| SystemTime::now().duration_since(started).ok())
            .map(|uptime| uptime.as_secs()),
        cpus: config.as_ref().map(|config| config.cpus),
        memory: config.as_ref().map(|config| config.memory.size),
        disks: match blocks {
            Some(blocks) => images(&blocks),
            None => config.map(|config| recorded_images(vm.name(), &config.disks)).unwrap_or_default(),
        },
    })
}

/// The images that disks have now, as `query-block` tells them.
fn images(blocks: &Value) -> Vec<String> {
    let files = blocks.as_array().into_iter().flatten().map(|block| &block["inserted"]["file"]);
    files.filter_map(|file| file.as_str().map(str::to_owned)).collect()
}

/// The same of a VM that does not tell: what is written down of its disks, and of those that never moved, what it was
/// started with.
fn recorded_images(name: &str, disks: &[DiskSpec]) -> Vec<String> {
    let state = StateDir::of(name).ok();
    let moved = state.and_then(|state| DurableDisks::load(&state).ok()).unwrap_or_default();
    let now = |disk: &DiskSpec| {
        let moved = moved.successor(&disk.id, &disk.path);
        let path = moved.map(|moved| moved.by.locate().unwrap_or_else(|_| moved.by.path.clone()));
        path.unwrap_or_else(|| disk.path.clone()).display().to_string()
    };
    disks.iter().map(now).collect()
}

fn table(rows: &[Row]) -> String {
    let header = ["NAME", "PID", "STATE", "UPTIME", "CPUS", "MEMORY", "DISKS"].map(str::to_owned);
    let unknown = || "-".to_owned();
    let mut cells = vec![header];
    cells.extend(rows.iter().map(|row| {
        [
            row.name.clone(),
            row.pid.map_or_else(unknown, |pid| pid.to_string()),
            row.state.clone(),
            row.uptime_seconds.map_or_else(unknown, uptime),
            row.cpus.map_or_else(unknown, |cpus| cpus.to_string()),
            row.memory.map_or_else(unknown, format_size),
            if row.disks.is_empty() { unknown() } else { row.disks.join(" ") },
        ]
    }));
    let widths: [usize; 7] =
        std::array::from_fn(|i| cells.iter().map(|row| row[i].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for row in &cells {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            // Writing to a String cannot fail.
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn uptime(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, minutes) => format!("{minutes}m{}s", seconds % 60),
        (0, hours, minutes) => format!("{hours}h{minutes}m"),
        (days, hours, _) => format!("{days}d{hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uptimes_have_two_units() {
        let text: Vec<_> = [0, 59, 60, 3599, 3600, 90_000].into_iter().map(uptime).collect();
        assert_eq!(text, ["0s", "59s", "1m0s", "59m59s", "1h0m", "1d1h"]);
    }

    #[test]
    fn a_table_lines_up_and_has_no_blanks_at_the_ends() {
        let row = |name: &str, pid| Row {
            name: name.into(),
            pid,
            state: "running".into(),
            uptime_seconds: Some(5),
            cpus: Some(2),
            memory: Some(512 << 20),
            disks: vec![],
        };
        let text = table(&[row("a", Some(7)), row("longer", None)]);
        assert_eq!(
            text,
            "NAME    PID  STATE    UPTIME  CPUS  MEMORY  DISKS\n\
             a       7    running  5s      2     512M    -\n\
             longer  -    running  5s      2     512M    -\n"
        );
    }
}
