//! What becomes of an operation on the command line when something is refused, fails, or comes too late: exit status,
//! message, and that nothing is left frozen, held or stamped. One run each, with `tarn` in place of the library.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use coordinator::journal::{self, OperationKind, OperationLog, Outcome, Protocol};
use coordinator::stamp::Stamp;
use coordinator::{GuestSession, MonitorSession};
use serde_json::{Value, json};

use crate::laboratory::Laboratory;
use crate::process::{PATIENCE, Process};
use crate::records::Ledger;
use crate::setup::{Recipe, SIZE, Setup};
use crate::verdict::{self, Findings};

type Failure = Box<dyn Error>;
type Case = fn(&Bench) -> Result<(), Failure>;

const CASES: [(&str, Case); 7] = [
    ("a pivot that has happened is not aborted, but finished", pivoted),
    ("a pivot that is decided is not aborted", decided),
    (
        "a freeze that cannot be is refused, and one that the guest refuses leaves nothing behind",
        refused_freeze,
    ),
    ("a journal that cannot be written lets the guest go", failed_journal),
    ("disks that have moved apart and cannot follow stop the VM, and nobody ends it unawares", parted),
    ("a mirror that was told to end is gone on with", told_to_end),
    ("a backup that is complete is not undone", complete_backup),
];

/// Runs all of them; whether each was as it should be.
pub(crate) fn pass() -> bool {
    let laboratory = Laboratory::new("crash-matrix-cases").expect("a directory below target");
    let failed = CASES.iter().enumerate().filter(|(index, (name, case))| {
        let directory = laboratory.base.join(format!("case-{index}"));
        let result = Bench::new(&directory).and_then(|bench| case(&bench));
        if let Err(error) = &result {
            eprintln!("{}: {name}: {error}", directory.display());
        }
        result.is_err()
    });
    let failed = failed.count();
    eprintln!("crash matrix: {} cases on the command line, {failed} failed", CASES.len());
    failed == 0
}

/// A VM without a guest, with two disks, and its user.
struct Bench {
    setup: Setup,
    _vmm: Process,
    _sockets: tempfile::TempDir,
}

macro_rules! ensure {
    ($holds:expr, $($what:tt)*) => {
        if !$holds {
            return Err(format!($($what)*).into());
        }
    };
}

impl Bench {
    fn new(directory: &Path) -> Result<Self, Failure> {
        let sockets = tempfile::tempdir()?;
        let (kind, protocol) = (OperationKind::Pivot, Protocol::A);
        let (disks, freeze, pause, write_blocking, reuse) = (2, false, false, false, false);
        let setup = Setup {
            recipe: Recipe { kind, protocol, disks, freeze, pause, write_blocking, reuse },
            target_fault: None,
            power: false,
            seed: 1,
            mistake: None,
            directory: directory.to_owned(),
            sockets: sockets.path().to_owned(),
        };
        fs::create_dir_all(setup.images())?;
        for disk in 0..disks {
            fs::File::create_new(setup.source(disk))?.set_len(SIZE)?;
        }
        let mut vmm = Process::start(&setup, "vmm", "")?;
        vmm.line()?;
        Ok(Self { setup, _vmm: vmm, _sockets: sockets })
    }

    /// `tarn VERB… vm ARGUMENTS…`, with places armed.
    fn tarn(&self, verb: &str, arguments: &[&str], armed: &str) -> Result<Output, Failure> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tarn"));
        command.args(verb.split(' ')).arg(self.setup.state().name()).args(arguments);
        command.arg("--monitor").arg(self.setup.monitor()).arg("--agent").arg(self.setup.agent());
        command.env("TARN_STATE_DIR", self.setup.state().base()).env("TARN_FAILPOINT", armed);
        Ok(command.output()?)
    }

    /// The same; it has this exit status (`None`: it was killed), and says all of that.
    fn says(
        &self,
        verb: &str,
        arguments: &[&str],
        armed: &str,
        status: Option<i32>,
        words: &[&str],
    ) -> Result<(), Failure> {
        let output = self.tarn(verb, arguments, armed)?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        ensure!(output.status.code() == status, "tarn {verb}: {}: {text}", output.status);
        match words.iter().find(|word| !text.contains(**word)) {
            Some(word) => Err(format!("tarn {verb} does not say {word:?}: {text}").into()),
            None => Ok(()),
        }
    }

    /// `DISK=TARGET` of this many disks.
    fn disks(&self, count: usize) -> Vec<String> {
        (0..count)
            .map(|disk| format!("{}={}", Setup::disk(disk), self.setup.target(disk).display()))
            .collect()
    }

    fn ask(&self, command: &str, arguments: &Value) -> Result<Value, Failure> {
        let mut session = MonitorSession::connect(&self.setup.monitor(), PATIENCE)?;
        let arguments = arguments.as_object().map(|map| map.clone().into_iter().collect());
        Ok(session.execute(command, arguments, PATIENCE)?)
    }

    /// Waits until something holds.
    fn until(&self, command: &str, holds: impl Fn(&Value) -> bool) -> Result<(), Failure> {
        let began = Instant::now();
        loop {
            let now = self.ask(command, &Value::Null)?;
            if holds(&now) {
                return Ok(());
            }
            ensure!(began.elapsed() < PATIENCE, "{command} stays at {now}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn last(&self) -> Result<OperationLog, Failure> {
        Ok(journal::operations(&self.setup.state())?.pop().ok_or("no operation has begun")?)
    }

    /// The guest runs, nothing of it is frozen or held.
    fn goes_on(&self) -> Result<(), Failure> {
        let status = self.ask("query-status", &Value::Null)?;
        ensure!(status["running"] == true, "the VM does not run: {status}");
        let frozen =
            GuestSession::connect(&self.setup.agent())?.execute("guest-fsfreeze-status", None, PATIENCE)?;
        ensure!(frozen == "thawed", "the guest is {frozen}");
        Ok(())
    }

    /// The same, and nothing is left of the operation.
    fn is_as_before(&self) -> Result<(), Failure> {
        self.goes_on()?;
        let jobs = self.ask("query-jobs", &Value::Null)?;
        ensure!(jobs == json!([]), "jobs are left: {jobs}");
        for disk in 0..2 {
            let target = self.setup.target(disk);
            let stamp = Stamp::read(&self.setup.state(), &target)?;
            ensure!(!target.exists() && stamp.is_none(), "{} is left", target.display());
        }
        let last = self.last()?;
        ensure!(last.outcome() == Outcome::Aborted && !last.is_open(), "it is {:?}", last.stage());
        Ok(())
    }
}

fn pivoted(bench: &Bench) -> Result<(), Failure> {
    let disks = bench.disks(1);
    bench.says("pivot", &[&disks[0], "--pause"], "coordinator.pivot.done", None, &[])?;
    let words = ["past that: its disks have moved, and it is finished"];
    bench.says("op abort", &[], "", Some(1), &words)?;
    let last = bench.last()?;
    ensure!(last.outcome() == Outcome::Pivoted && !last.is_open(), "it is {:?}", last.stage());
    bench.goes_on()
}

fn decided(bench: &Bench) -> Result<(), Failure> {
    let disks = bench.disks(1);
    bench.says("pivot", &[&disks[0], "--pause"], "journal.config-committed.before", None, &[])?;
    let words = ["is decided: its targets are the disks", "`tarn recover vm --monitor "];
    bench.says("op abort", &[], "", Some(1), &words)?;
    ensure!(bench.last()?.is_open(), "it is over");
    bench.says("recover", &[], "", Some(0), &["it was decided, and is finished"])?;
    bench.goes_on()
}

fn refused_freeze(bench: &Bench) -> Result<(), Failure> {
    // As an agent that has frozen already, in somebody's name.
    let mut session = GuestSession::connect(&bench.setup.agent())?;
    session.execute("guest-fsfreeze-freeze", None, PATIENCE)?;
    let verbs = ["pivot", "mirror", "backup"];
    for verb in verbs {
        let disks = bench.disks(1);
        bench.says(verb, &[&disks[0], "--freeze", "--pause"], "", Some(1), &["are frozen already"])?;
        // Whoever froze it is not thawed by an operation that was refused.
        let frozen = session.execute("guest-fsfreeze-status", None, PATIENCE)?;
        ensure!(frozen == "frozen", "{verb}: the guest is {frozen}");
    }
    session.execute("guest-fsfreeze-thaw", None, PATIENCE)?;
    session.execute("block-freeze", None, PATIENCE)?;
    for verb in verbs {
        let disks = bench.disks(1);
        let words = ["was aborted: The command guest-fsfreeze-freeze has been disabled"];
        bench.says(verb, &[&disks[0], "--freeze", "--pause"], "", Some(3), &words)?;
        bench.is_as_before()?;
    }
    // What its user has paused cannot be frozen, and is not tried.
    bench.ask("stop", &Value::Null)?;
    let disks = bench.disks(1);
    bench.says(
        "backup",
        &[&disks[0], "--freeze"],
        "",
        Some(1),
        &["is paused: its guest cannot be frozen"],
    )?;
    bench.ask("cont", &Value::Null)?;
    Ok(())
}

fn failed_journal(bench: &Bench) -> Result<(), Failure> {
    let disks = bench.disks(2);
    for place in ["journal.frozen.written", "journal.stopped.before", "journal.stopped.synced"] {
        let arguments = [disks[0].as_str(), &disks[1], "--freeze", "--pause"];
        let words = ["is not settled: Cannot ", "`tarn recover vm --monitor "];
        bench.says("pivot", &arguments, &format!("{place}+=eio"), Some(4), &words)?;
        bench.goes_on()?;
        let undone = ["nothing was decided, and all is undone", "disk 'vda' is "];
        bench.says("recover", &[], "", Some(0), &undone)?;
        bench.is_as_before()?;
        bench.says("recover", &[], "", Some(0), &["nothing to recover"])?;
    }
    Ok(())
}

fn parted(bench: &Bench) -> Result<(), Failure> {
    let disks = bench.disks(2);
    bench.says("pivot", &[&disks[0], &disks[1]], "journal.ready.synced", None, &[])?;
    bench.says(
        "pivot",
        &[&disks[0], &disks[1]],
        "journal.pivot-intent.before",
        Some(1),
        &["goes on with it"],
    )?;
    // Jobs and targets are named after operation and disk.
    let prefix = format!("tarn-{}", &bench.last()?.id().simple().to_string()[..8]);
    let (first, second) = (format!("{prefix}-0"), format!("{prefix}-1"));
    let is = |jobs: &Value, id: &str, status: &str| {
        jobs.as_array().into_iter().flatten().any(|job| job["id"] == id && job["status"] == status)
    };
    bench.until("query-jobs", |jobs| is(jobs, &first, "ready") && is(jobs, &second, "ready"))?;
    bench.ask("block-job-cancel", &json!({"device": second, "force": true}))?;
    bench.ask("job-complete", &json!({"id": first}))?;
    bench.until("query-jobs", |jobs| is(jobs, &first, "pending"))?;
    bench.ask("job-finalize", &json!({"id": first}))?;
    bench.until("query-jobs", |jobs| is(jobs, &first, "concluded") && is(jobs, &second, "concluded"))?;
    let words =
        ["another client has moved the VM to ", "Do not end it", "`tarn recover vm` settles", "its job is "];
    for _ in 0..2 {
        bench.says("recover", &[], "", Some(4), &words)?;
        let status = bench.ask("query-status", &Value::Null)?;
        ensure!(status["running"] == false, "the VM runs: {status}");
    }
    // What the message says.
    let disks = bench.ask("query-block", &Value::Null)?;
    let disk = disks.as_array().into_iter().flatten().find(|disk| disk["device"] == "vdb");
    let node = disk.ok_or("no disk vdb")?["inserted"]["node-name"].clone();
    let mirror = json!({"job-id": "by-hand", "device": node, "target": second, "sync": "full"});
    bench.ask("blockdev-mirror", &mirror)?;
    let by_hand =
        |jobs: &Value| jobs.as_array().into_iter().flatten().find(|job| job["id"] == "by-hand").cloned();
    bench.until("query-jobs", |jobs| by_hand(jobs).is_some_and(|job| job["status"] == "ready"))?;
    bench.ask("job-complete", &json!({"id": "by-hand"}))?;
    bench.until("query-jobs", |jobs| by_hand(jobs).is_none())?;
    bench.says("recover", &[], "", Some(0), &["it was decided, and is finished"])?;
    bench.ask("cont", &Value::Null)?;
    ensure!(bench.last()?.outcome() == Outcome::Pivoted, "it was not followed");
    bench.goes_on()
}

fn told_to_end(bench: &Bench) -> Result<(), Failure> {
    let promised = || -> Result<Vec<Ledger>, Failure> {
        Ok(Ledger::parse(&fs::read_to_string(bench.setup.log())?, bench.setup.recipe.disks))
    };
    for place in ["coordinator.end.done", "journal.copied.before", "stamp.remove.before"] {
        let (disks, before) = (bench.disks(2), promised()?);
        let arguments = [disks[0].as_str(), &disks[1], "--freeze", "--pause"];
        bench.says("mirror", &arguments, place, None, &[])?;
        // As long as it is stopped, nothing more is promised.
        let is_held = bench.ask("query-status", &Value::Null)?["running"] == false;
        let early = if is_held { promised()? } else { before };
        bench.says("op resume", &[], "", Some(0), &["disk 'vda' copied to ", "disk 'vdb' copied to "])?;
        bench.goes_on()?;
        let mut findings = Findings::default();
        verdict::copies(&bench.setup, &early, &mut findings)?;
        ensure!(findings.is_clean(), "{place}: {}", findings.lines().join(", "));
        for disk in 0..2 {
            let target = bench.setup.target(disk);
            ensure!(Stamp::read(&bench.setup.state(), &target)?.is_none(), "{} is stamped", target.display());
            fs::remove_file(target)?;
        }
    }
    Ok(())
}

fn complete_backup(bench: &Bench) -> Result<(), Failure> {
    let disks = bench.disks(1);
    bench.says("backup", &[&disks[0]], "journal.done.before", None, &[])?;
    let words = ["are complete: `tarn recover vm --monitor "];
    bench.says("op abort", &[], "", Some(1), &words)?;
    bench.says("recover", &[], "", Some(0), &["its copies were complete, and it is finished"])?;
    ensure!(bench.last()?.outcome() == Outcome::Completed, "it was undone");
    ensure!(bench.setup.target(0).exists(), "the backup is gone");
    bench.goes_on()
}
