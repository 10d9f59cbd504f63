//! What operations ask of a VM's monitor. Verbs of QEMU, and those of Tarn where the VM is one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::request::CopyMode;
use crate::record::Operation;
use crate::{MonitorSession, SessionError};

/// For the VM to answer; it may drain a disk first.
const PATIENCE: Duration = Duration::from_secs(120);
/// For a pivot: it copies what is left, and syncs.
const PIVOT_PATIENCE: Duration = Duration::from_secs(300);

/// A disk as it is now.
#[derive(Clone, Debug, Default)]
pub(super) struct DiskNow {
    pub(super) id: String,
    pub(super) qdev: String,
    pub(super) node: String,
    pub(super) file: PathBuf,
    pub(super) size: u64,
    /// Bytes in a block, as the guest sees it, where the VM tells.
    pub(super) block_size: Option<u64>,
    pub(super) read_only: bool,
    pub(super) direct: bool,
}

impl DiskNow {
    /// The name by which it is known as long as the VM is configured in the same way, whatever image it works on. That of
    /// its device; QEMU's newer ones have none but in a path.
    pub(super) fn name(&self) -> &str {
        if self.id.is_empty() { self.device().unwrap_or(&self.qdev) } else { &self.id }
    }

    /// The id of its device, if it was given one.
    fn device(&self) -> Option<&str> {
        self.qdev.strip_prefix("/machine/peripheral/")?.split('/').next()
    }

    /// Users name the device by its id or path. A node's name goes from one image to the other: it names no disk.
    pub(super) fn is_named(&self, name: &str) -> bool {
        !name.is_empty() && (self.id == name || self.device() == Some(name) || self.qdev == name)
    }
}

/// A job as it is now.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct JobNow {
    pub(super) id: String,
    pub(super) status: String,
    pub(super) done: u64,
    pub(super) total: u64,
    pub(super) error: Option<String>,
    pub(super) remaining: Option<Duration>,
    pub(super) expected_hold: Option<Duration>,
}

/// Where a pivot of protocol A is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PivotNow {
    pub(super) state: String,
    pub(super) held: Option<Duration>,
    pub(super) error: Option<String>,
}

/// A session with the monitor of a VM.
#[derive(Debug)]
pub(super) struct VmSession {
    session: MonitorSession,
}

impl VmSession {
    pub(super) fn connect(path: &Path) -> Result<Self, SessionError> {
        Ok(Self { session: MonitorSession::connect(path, PATIENCE)? })
    }

    fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, SessionError> {
        self.ask_for(command, arguments, PATIENCE)
    }

    fn ask_for(&mut self, command: &str, arguments: Value, limit: Duration) -> Result<Value, SessionError> {
        let arguments = match arguments {
            Value::Object(arguments) => Some(arguments.into_iter().collect()),
            _ => None,
        };
        self.session.execute(command, arguments, limit)
    }

    /// Waits a moment, or until something happens.
    pub(super) fn await_event(&mut self, limit: Duration) -> Result<(), SessionError> {
        self.session.next_event(limit).map(drop)
    }

    /// Whether it has a command.
    pub(super) fn knows(&mut self, command: &str) -> Result<bool, SessionError> {
        let commands = self.ask("query-commands", Value::Null)?;
        Ok(commands.as_array().is_some_and(|all| all.iter().any(|known| known["name"] == command)))
    }

    pub(super) fn is_running(&mut self) -> Result<bool, SessionError> {
        Ok(self.ask("query-status", Value::Null)?["running"] == true)
    }

    /// In one word, such as `running`, `paused` or `suspended`.
    pub(super) fn status(&mut self) -> Result<String, SessionError> {
        Ok(self.ask("query-status", Value::Null)?["status"].as_str().unwrap_or_default().to_owned())
    }

    pub(super) fn disks(&mut self) -> Result<Vec<DiskNow>, SessionError> {
        let reply = self.ask("query-block", Value::Null)?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let disk = |disk: &Value| {
            let inserted = disk.get("inserted")?;
            Some(DiskNow {
                id: text(&disk["device"]),
                qdev: text(&disk["qdev"]),
                node: text(&inserted["node-name"]),
                file: text(&inserted["file"]).into(),
                size: inserted["image"]["virtual-size"].as_u64().unwrap_or_default(),
                block_size: disk["tarn-block-size"].as_u64(),
                read_only: inserted["ro"] == true,
                direct: inserted["cache"]["direct"] == true,
            })
        };
        Ok(reply.as_array().into_iter().flatten().filter_map(disk).collect())
    }

    pub(super) fn disk(&mut self, id: &str) -> Result<Option<DiskNow>, SessionError> {
        Ok(self.disks()?.into_iter().find(|disk| disk.name() == id))
    }

    pub(super) fn jobs(&mut self) -> Result<Vec<JobNow>, SessionError> {
        let jobs = self.ask("query-jobs", Value::Null)?;
        let block = self.ask("query-block-jobs", Value::Null)?;
        let job = |job: &Value| {
            let id = job["id"].as_str().unwrap_or_default().to_owned();
            let more = block.as_array().into_iter().flatten().find(|more| more["device"] == job["id"]);
            let estimate = |name: &str| more.and_then(|more| more[name].as_u64());
            JobNow {
                status: job["status"].as_str().unwrap_or_default().to_owned(),
                done: job["current-progress"].as_u64().unwrap_or_default(),
                total: job["total-progress"].as_u64().unwrap_or_default(),
                error: job["error"].as_str().map(str::to_owned),
                remaining: estimate("tarn-remaining-ms").map(Duration::from_millis),
                expected_hold: estimate("tarn-expected-hold-us").map(Duration::from_micros),
                id,
            }
        };
        Ok(jobs.as_array().into_iter().flatten().map(job).collect())
    }

    pub(super) fn query_pivot(&mut self, id: Uuid) -> Result<PivotNow, SessionError> {
        self.ask("tarn-query-pivot", json!({"op": id})).map(|reply| PivotNow::of(&reply))
    }

    /// For who is still this VM's coordinator, and for one order.
    pub(super) fn orders(&mut self) -> Orders<'_> {
        Orders(self)
    }
}

/// What changes something in a VM.
#[derive(Debug)]
pub(super) struct Orders<'a>(&'a mut VmSession);

impl Orders<'_> {
    /// Opens an image for a disk that is to work on it.
    pub(super) fn add_node(&mut self, name: &str, image: &Path, like: &DiskNow) -> Result<(), SessionError> {
        use std::os::unix::fs::FileTypeExt;
        let is_device = std::fs::metadata(image).is_ok_and(|metadata| metadata.file_type().is_block_device());
        let driver = if is_device { "host_device" } else { "file" };
        let cache = json!({"direct": like.direct});
        let file = json!({"driver": driver, "filename": image, "cache": cache, "discard": "unmap"});
        let node =
            json!({"driver": "raw", "node-name": name, "file": file, "cache": cache, "discard": "unmap"});
        self.0.ask("blockdev-add", node).map(drop)
    }

    pub(super) fn remove_node(&mut self, name: &str) -> Result<(), SessionError> {
        self.0.ask("blockdev-del", json!({"node-name": name})).map(drop)
    }

    pub(super) fn mirror(
        &mut self,
        job: &str,
        disk: &DiskNow,
        target: &str,
        mode: CopyMode,
    ) -> Result<(), SessionError> {
        let arguments = json!({
            "job-id": job, "device": disk.node, "target": target, "sync": "full", "copy-mode": mode.name(),
            "auto-finalize": false, "auto-dismiss": false,
        });
        self.0.ask("blockdev-mirror", arguments).map(drop)
    }

    /// Begins to copy several disks as they are at one moment: job, disk's node, target's node.
    pub(super) fn backup(&mut self, jobs: &[(String, String, String)]) -> Result<(), SessionError> {
        let action = |(job, device, target): &(String, String, String)| {
            let data = json!({
                "job-id": job, "device": device, "target": target, "sync": "full", "auto-dismiss": false,
            });
            json!({"type": "blockdev-backup", "data": data})
        };
        let actions: Vec<_> = jobs.iter().map(action).collect();
        self.0.ask("transaction", json!({"actions": actions})).map(drop)
    }

    pub(super) fn job(&mut self, verb: &str, id: &str) -> Result<(), SessionError> {
        self.0.ask(&format!("job-{verb}"), json!({"id": id})).map(drop)
    }

    /// Ends a job; one that is ready and not forced keeps its copy.
    pub(super) fn cancel(&mut self, id: &str, force: bool) -> Result<(), SessionError> {
        self.0.ask("block-job-cancel", json!({"device": id, "force": force})).map(drop)
    }

    pub(super) fn write_blocking(&mut self, id: &str) -> Result<(), SessionError> {
        let arguments = json!({"id": id, "type": "mirror", "copy-mode": CopyMode::WriteBlocking.name()});
        self.0.ask("block-job-change", arguments).map(drop)
    }

    pub(super) fn pivot(
        &mut self,
        operation: &Operation,
        jobs: &[String],
        witness: &Path,
    ) -> Result<PivotNow, SessionError> {
        let mut arguments = of(operation);
        arguments.insert("jobs".into(), jobs.into());
        arguments.insert("witness".into(), witness.to_string_lossy().into());
        let reply = self.0.ask_for("tarn-pivot", Value::Object(arguments), PIVOT_PATIENCE)?;
        Ok(PivotNow::of(&reply))
    }

    pub(super) fn abort_pivot(&mut self, operation: &Operation) -> Result<(), SessionError> {
        self.0.ask_for("tarn-pivot-abort", Value::Object(of(operation)), PIVOT_PATIENCE).map(drop)
    }

    /// Stops the VM in the name of an operation, where the VM knows of such.
    pub(super) fn stop(&mut self, operation: Option<Uuid>) -> Result<(), SessionError> {
        self.0.ask("stop", named(operation)).map(drop)
    }

    pub(super) fn cont(&mut self, operation: Option<Uuid>) -> Result<(), SessionError> {
        self.0.ask("cont", named(operation)).map(drop)
    }
}

impl PivotNow {
    fn of(reply: &Value) -> Self {
        Self {
            state: reply["state"].as_str().unwrap_or_default().to_owned(),
            held: reply["held-us"].as_u64().map(Duration::from_micros),
            error: reply["error"].as_str().map(str::to_owned),
        }
    }
}

fn of(operation: &Operation) -> Map<String, Value> {
    let Operation { id, generation, epoch } = operation;
    let mut arguments = Map::new();
    arguments.insert("op".into(), id.to_string().into());
    arguments.insert("gen".into(), (*generation).into());
    arguments.insert("epoch".into(), (*epoch).into());
    arguments
}

fn named(operation: Option<Uuid>) -> Value {
    operation.map_or(Value::Null, |id| json!({"tarn-op": id}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_named_by_its_device_and_not_by_its_image() {
        let (with, without) =
            ("/machine/peripheral/d0/virtio-backend", "/machine/peripheral-anon/device[0]/backend");
        let cases = [
            ("vda", with, "vda", &["vda", "d0", with][..]),
            ("", with, "d0", &["d0", with]),
            ("", without, without, &[without]),
            ("", "", "", &[]),
        ];
        for (id, qdev, name, names) in cases {
            let disk =
                DiskNow { id: id.into(), qdev: qdev.into(), node: "node".into(), ..DiskNow::default() };
            assert_eq!(disk.name(), name);
            assert!(names.iter().all(|name| disk.is_named(name)), "{disk:?}");
            for other in ["", "node", "machine", "peripheral", "virtio-backend", "vdb"] {
                assert!(!disk.is_named(other), "{disk:?} {other}");
            }
        }
    }
}
