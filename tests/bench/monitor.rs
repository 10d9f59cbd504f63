//! Mirrors, by the verbs that both VMMs have.

use std::path::Path;
use std::time::{Duration, Instant};

use coordinator::{Map, MonitorSession};
use serde_json::{Value, json};

use crate::contender::{LIMIT, Running};

const JOB: &str = "mirror";

/// A session with a VM's monitor.
#[derive(Debug)]
pub struct Monitor {
    session: MonitorSession,
    /// Mirrors begun: each target is a node of its own.
    mirrors: u32,
}

/// How a disk is mirrored.
#[derive(Debug, Clone, Copy)]
pub struct Mirror<'a> {
    pub disk: &'a str,
    /// Is made, and must not be there.
    pub target: &'a Path,
    pub copy_mode: &'a str,
    /// Bytes per second; 0: as fast as it can.
    pub speed: u64,
}

impl Monitor {
    pub fn connect(vm: &Running) -> Result<Self, String> {
        let session = MonitorSession::connect(&vm.monitor_socket, LIMIT);
        Ok(Self { session: session.map_err(|error| format!("monitor: {error}"))?, mirrors: 0 })
    }

    /// Runs a command.
    pub fn run(&mut self, command: &str, arguments: &Value) -> Result<Value, String> {
        let arguments: Option<Map> = arguments.as_object().map(|map| map.clone().into_iter().collect());
        let answer = self.session.execute(command, arguments, LIMIT);
        answer.map_err(|error| match error.refusal() {
            Some(refusal) => format!("{command}: {}", refusal.desc),
            None => format!("{command}: {error}"),
        })
    }

    /// Begins a mirror.
    pub fn mirror(&mut self, mirror: &Mirror<'_>) -> Result<(), String> {
        let Mirror { disk, target, copy_mode, speed } = *mirror;
        self.mirrors += 1;
        let arguments = json!({
            "job-id": JOB, "device": self.node(disk)?, "target": target, "node-name": format!("target-{}", self.mirrors),
            "sync": "full", "mode": "absolute-paths", "format": "raw", "copy-mode": copy_mode, "speed": speed,
        });
        self.run("drive-mirror", &arguments).map(drop)
    }

    /// The node that is a disk's root now.
    fn node(&mut self, disk: &str) -> Result<Value, String> {
        let disks = self.run("query-block", &Value::Null)?;
        let is_it = |entry: &&Value| {
            entry["device"] == disk
                || entry["qdev"].as_str().is_some_and(|path| path.split('/').any(|part| part == disk))
        };
        let found = disks.as_array().into_iter().flatten().find(is_it);
        found.map(|entry| entry["inserted"]["node-name"].clone()).ok_or(format!("no disk {disk} in {disks}"))
    }

    /// Waits until the mirror is ready.
    pub fn ready(&mut self) -> Result<(), String> {
        self.until("BLOCK_JOB_READY")
    }

    /// The job's target becomes the disk, as soon as both are the same; how long until the job has gone.
    pub fn complete(&mut self) -> Result<Duration, String> {
        let begin = Instant::now();
        self.run("job-complete", &json!({"id": JOB}))?;
        self.until("null")?;
        Ok(begin.elapsed())
    }

    /// The same with a witness; microseconds for which guest I/O was held, as the VM says.
    pub fn pivot(&mut self, generation: u32, witness: &Path) -> Result<f64, String> {
        let op = format!("7461726e-0000-4000-8000-{generation:012x}");
        let arguments = json!({"op": op, "gen": generation, "job": JOB, "witness": witness});
        let info = self.run("tarn-pivot", &arguments)?;
        self.until("null")?;
        info["held-us"].as_f64().ok_or(format!("tarn-pivot: {info}"))
    }

    /// Ends the mirror, whatever it has copied.
    pub fn cancel(&mut self) -> Result<(), String> {
        self.run("block-job-cancel", &json!({"device": JOB, "force": true}))?;
        self.until("null")
    }

    /// Whether the mirror still has something to copy.
    pub fn is_copying(&mut self) -> Result<bool, String> {
        let jobs = self.run("query-jobs", &Value::Null)?;
        Ok(jobs.as_array().into_iter().flatten().any(|job| job["status"] == "running"))
    }

    /// Waits for an event or for a job's status.
    fn until(&mut self, last: &str) -> Result<(), String> {
        let begin = Instant::now();
        while begin.elapsed() < LIMIT {
            let event = self.session.next_event(LIMIT).map_err(|error| error.to_string())?;
            let Some(event) = event else { break };
            if let Some(error) = event.data.get("error") {
                return Err(format!("{}: {error}", event.name));
            }
            if event.name == last || event.data.get("status").is_some_and(|status| status == last) {
                return Ok(());
            }
        }
        Err(format!("no {last} in {LIMIT:?}"))
    }
}
