//! Where runs are made, a few at a time: each by a worker, a process with one thread, as a descriptor that one thread has
//! just opened would be inherited by what another one starts, and a lock with it.

use std::fs;
use std::io::{self, BufRead, BufReader, Write, stdin, stdout};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::cells::{Cell, Place};
use crate::run;
use crate::verdict::Findings;

/// Runs at a time: they wait for syncs more than they compute.
const AT_A_TIME: usize = 6;
/// Complaints that are shown of a run.
const SHOWN: usize = 5;

/// Runs, and what they have shown.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) runs: usize,
    /// Runs in which somebody waited at the gate.
    pub(crate) reached: usize,
    pub(crate) lost: usize,
    pub(crate) wrong: usize,
    pub(crate) repeated: usize,
    pub(crate) other: usize,
}

impl Counts {
    fn add(&mut self, findings: &Findings) {
        self.runs += 1;
        self.reached += usize::from(findings.reached);
        self.lost += findings.lost.len();
        self.wrong += findings.wrong.len();
        self.repeated += usize::from(!findings.repeated.is_empty());
        self.other += findings.other.len();
    }

    /// These, and those of earlier runs.
    pub(crate) fn and(self, other: &Self) -> Self {
        Self {
            runs: self.runs + other.runs,
            reached: self.reached + other.reached,
            lost: self.lost + other.lost,
            wrong: self.wrong + other.wrong,
            repeated: self.repeated + other.repeated,
            other: self.other + other.other,
        }
    }

    pub(crate) fn is_clean(&self) -> bool {
        self.lost + self.wrong + self.repeated + self.other == 0
    }
}

/// What a worker is to do.
#[derive(Serialize, Deserialize)]
struct Job {
    cell: Cell,
    directory: PathBuf,
}

/// What has become of it, and the places that were passed.
#[derive(Serialize, Deserialize)]
struct Done {
    findings: Findings,
    places: Vec<Place>,
}

impl Done {
    fn failed(error: &dyn std::error::Error) -> Self {
        let other = vec![format!("the run cannot be carried out: {}", coordinator::chain(error))];
        Self { findings: Findings { other, ..Findings::default() }, places: vec![] }
    }
}

/// The worker's side: a job to a line.
pub(crate) fn work() -> io::Result<()> {
    for line in stdin().lock().lines() {
        let Job { cell, directory } = serde_json::from_str(&line?)?;
        let done = match run::run(&cell, &directory) {
            Ok(findings) => Done { findings, places: run::places(&directory) },
            Err(error) => Done::failed(&*error),
        };
        println!("{}", serde_json::to_string(&done)?);
        stdout().flush()?;
    }
    Ok(())
}

struct Worker {
    child: Child,
    jobs: ChildStdin,
    done: BufReader<ChildStdout>,
}

impl Worker {
    fn start() -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut child = command.arg("worker").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (jobs, done) = pipes.ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(Self { child, jobs, done: BufReader::new(done) })
    }

    fn carry_out(&mut self, job: &Job) -> io::Result<Done> {
        writeln!(self.jobs, "{}", serde_json::to_string(job)?)?;
        let mut line = String::new();
        self.done.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where the runs are, and how they are called.
pub(crate) struct Laboratory {
    pub(crate) base: PathBuf,
    number: AtomicUsize,
}

impl Laboratory {
    /// In target/`name`; what was there goes.
    pub(crate) fn new(name: &str) -> io::Result<Self> {
        let program = std::env::current_exe()?;
        // target/PROFILE/deps/PROGRAM
        let base = program.ancestors().nth(3).ok_or(io::ErrorKind::NotFound)?.join(name);
        match fs::remove_dir_all(&base) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => removed?,
        }
        fs::create_dir_all(&base)?;
        Ok(Self { base, number: AtomicUsize::new(1) })
    }

    /// Runs a cell; one that is not clean is kept, and told of.
    fn run(&self, worker: &mut Worker, cell: &Cell) -> io::Result<Done> {
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let directory = self.base.join(format!("run-{number:05}"));
        fs::create_dir(&directory)?;
        let text = serde_json::to_string(cell)?;
        fs::write(directory.join("cell"), &text)?;
        let job = Job { cell: cell.clone(), directory };
        let done = match worker.carry_out(&job) {
            Ok(done) => done,
            Err(error) => {
                *worker = Worker::start()?;
                Done::failed(&error)
            }
        };
        if done.findings.is_clean() || cell.mistake.is_some() {
            fs::remove_dir_all(&job.directory)?;
        } else {
            let lines = done.findings.lines();
            fs::write(job.directory.join("findings"), lines.join("\n"))?;
            let shown = lines.iter().take(SHOWN).map(|line| format!("\n  {line}")).collect::<String>();
            eprintln!("{}: {text}{shown}", job.directory.display());
        }
        Ok(done)
    }

    /// Runs all of them; also the places that each has passed.
    pub(crate) fn run_all(&self, cells: &[Cell]) -> (Counts, Vec<(Cell, Vec<Place>)>) {
        let (next, all) = (AtomicUsize::new(0), Mutex::new((Counts::default(), Vec::new())));
        let work = || -> io::Result<()> {
            let mut worker = Worker::start()?;
            while let Some(cell) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
                let Done { findings, places } = self.run(&mut worker, cell)?;
                let mut all = all.lock();
                all.0.add(&findings);
                all.1.push((cell.clone(), places));
            }
            Ok(())
        };
        thread::scope(|scope| {
            for _ in 0..AT_A_TIME {
                scope.spawn(|| work().unwrap());
            }
        });
        all.into_inner()
    }
}
