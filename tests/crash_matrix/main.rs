//! The crash matrix: a pivot, with coordinator or VMM or both killed, or the power cut, at every step that somebody else can
//! see; recovered; and every byte compared that the guest was promised.
//!
//! ```text
//!   this program ─ cells, one after the other, a few at a time ─┐
//!                                                               ▼
//!      run: ── starts ──▶ itself as `vmm`: real disks, jobs, pivots, monitor; a thread in place of the guest
//!       │   ── starts ──▶ itself as `coordinator`: coordinator::operation::run
//!       │                        └─ both stop at a failpoint and say so; the run kills whom the cell names
//!       └─▶ recovery, once more, boot ─▶ Findings
//! ```
//!
//! | | |
//! |---|---|
//! | a process dies | SIGKILL; what it has written stays: page cache and all |
//! | the power goes | both die; disks lose what was not flushed (a volatile cache in the VMM's memory), journal, witness, configuration and stamps what was not synced (`coordinator::lose_power`) |
//! | the right image | the one that the recovery table names, or that the VM works on if it lives |
//! | nothing is lost | acknowledged writes when a process has died, flushed ones when the power has gone |
//! | recovery is over | a second one changes no byte, nor does a power cut after it |
//!
//! `--self-test` makes mistakes on purpose and fails unless they are found. The last line has the counts. A run that is not
//! clean leaves its directory under `target/crash-matrix/`, with the `cell` that repeats it.

#![expect(clippy::unwrap_used, reason = "a test that cannot do what it wants has no better way out")]

mod cells;
mod guest;
mod machine;
mod mistakes;
mod process;
mod records;
mod run;
mod setup;
mod strangers;
mod verdict;
mod vmm;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use clap::{Parser, Subcommand};
use coordinator::operation::{self, Liveness, Silent};
use devices::testing::Random;
use parking_lot::Mutex;

use cells::{Cell, Place};
use setup::Setup;
use verdict::Findings;

/// Runs at a time: they wait for syncs more than they compute.
const AT_A_TIME: usize = 4;
/// Below this the whole matrix is not what it claims to be.
const WHOLE: usize = 2000;

/// Kill the coordinator, the VMM, both, or cut the power, at every step of a pivot.
#[derive(Debug, Parser)]
#[command(bin_name = "crash_matrix")]
struct Args {
    /// So many runs, chosen at random, in place of all
    #[arg(long, value_name = "N")]
    sample: Option<usize>,
    /// Chooses loads, samples and combinations
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Also make mistakes, which have to be found
    #[arg(long)]
    self_test: bool,
    #[command(subcommand)]
    role: Option<Role>,
}

/// What a process of a run is.
#[derive(Debug, Subcommand)]
enum Role {
    /// One run, again
    Cell {
        /// As its directory has it
        cell: String,
    },
    #[command(hide = true)]
    Vmm { setup: String },
    #[command(hide = true)]
    Coordinator { setup: String },
    #[command(hide = true)]
    Second { setup: String },
    #[command(hide = true)]
    RecoverAlive { setup: String },
    #[command(hide = true)]
    RecoverDead { setup: String },
}

fn main() -> ExitCode {
    let args = Args::parse();
    let Some(role) = &args.role else { return matrix(&args) };
    let parse = |text: &str| serde_json::from_str::<Setup>(text).unwrap();
    let done = match role {
        Role::Cell { cell } => return repeat(cell),
        Role::Vmm { setup } => vmm::run(&parse(setup)).map_err(|error| run::chain(&*error)),
        Role::Coordinator { setup } | Role::Second { setup } => coordinate(&parse(setup)),
        Role::RecoverAlive { setup } => {
            let setup = parse(setup);
            recover(&setup, &Liveness::Alive(setup.connection()))
        }
        Role::RecoverDead { setup } => recover(&parse(setup), &Liveness::Dead),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn coordinate(setup: &Setup) -> Result<(), String> {
    let done = operation::run(&setup.state(), &setup.connection(), &setup.request(), &mut Silent);
    done.map(drop).map_err(|error| run::chain(&error))
}

fn recover(setup: &Setup, vm: &Liveness) -> Result<(), String> {
    operation::recover(&setup.state(), vm, &mut Silent).map(drop).map_err(|error| run::chain(&error))
}

/// Runs, and what they have shown.
#[derive(Debug, Default)]
struct Counts {
    runs: usize,
    /// Runs in which somebody waited at the gate.
    reached: usize,
    lost: usize,
    wrong: usize,
    repeated: usize,
    other: usize,
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

    fn is_clean(&self) -> bool {
        self.lost + self.wrong + self.repeated + self.other == 0
    }
}

/// Where the runs are, and how they are called.
struct Laboratory {
    base: PathBuf,
    number: AtomicUsize,
}

impl Laboratory {
    fn new(name: &str) -> Self {
        let target = std::env::current_exe().unwrap();
        // target/PROFILE/deps/PROGRAM
        let base = target.ancestors().nth(3).unwrap().join(name);
        let _ = fs::remove_dir_all(&base);
        fs::create_dir_all(&base).unwrap();
        Self { base, number: AtomicUsize::new(1) }
    }

    /// Runs a cell; one that is not clean is kept, and told of.
    fn run(&self, cell: &Cell) -> (Findings, Vec<Place>) {
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let directory = self.base.join(format!("run-{number:05}"));
        fs::create_dir(&directory).unwrap();
        let text = serde_json::to_string(cell).unwrap();
        fs::write(directory.join("cell"), &text).unwrap();
        let findings = run::run(cell, &directory).unwrap_or_else(|error| {
            let other = vec![format!("the run cannot be carried out: {}", run::chain(&*error))];
            Findings { other, ..Findings::default() }
        });
        let places = run::places(&directory);
        if findings.is_clean() || cell.mistake.is_some() {
            fs::remove_dir_all(&directory).unwrap();
        } else {
            fs::write(directory.join("findings"), findings.lines().join("\n")).unwrap();
            let shown: Vec<_> = findings.lines().into_iter().take(5).collect();
            eprintln!("{}: {text}\n  {}", directory.display(), shown.join("\n  "));
        }
        (findings, places)
    }

    /// Runs all of them.
    fn run_all(&self, cells: &[Cell]) -> (Counts, Vec<(Cell, Vec<Place>)>) {
        let (next, done) = (AtomicUsize::new(0), Mutex::new((Counts::default(), Vec::new())));
        thread::scope(|scope| {
            for _ in 0..AT_A_TIME {
                scope.spawn(|| {
                    while let Some(cell) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let (findings, places) = self.run(cell);
                        let mut done = done.lock();
                        done.0.add(&findings);
                        done.1.push((cell.clone(), places));
                    }
                });
            }
        });
        done.into_inner()
    }
}

fn matrix(args: &Args) -> ExitCode {
    let (laboratory, began) = (Laboratory::new("crash-matrix"), Instant::now());
    let mut random = Random::new(args.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let (quiet, mut passed) = laboratory.run_all(&cells::scenarios(&mut random));
    // Those that came first are not always the same.
    passed.sort_by_key(|(cell, _)| cell.seed);
    let mut cells = cells::all(&passed, &mut random);
    let all = cells.len();
    shuffle(&mut cells, &mut random);
    if args.self_test && !mistakes::are_found(&laboratory, &cells) {
        return ExitCode::FAILURE;
    }
    cells.truncate(args.sample.map_or(all, |sample| sample.saturating_sub(quiet.runs)));
    eprintln!(
        "crash matrix: seed {}, {} of {all} cells, directories in {}",
        args.seed,
        cells.len(),
        laboratory.base.display()
    );
    let (mut counts, _) = laboratory.run_all(&cells);
    counts.runs += quiet.runs;
    counts.lost += quiet.lost;
    counts.wrong += quiet.wrong;
    counts.repeated += quiet.repeated;
    counts.other += quiet.other;
    let Counts { runs, reached, lost, wrong, repeated, other } = counts;
    eprintln!(
        "crash matrix: a place was reached in {reached} runs, {other} other complaints, {} s",
        began.elapsed().as_secs()
    );
    println!(
        "crash matrix: {runs} runs, {lost} lost writes, {wrong} wrong images, {repeated} repeated recoveries that changed \
         something"
    );
    let enough = runs >= args.sample.unwrap_or(WHOLE) && reached * 2 > runs;
    if counts.is_clean() && enough { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn shuffle<T>(list: &mut [T], random: &mut Random) {
    for last in (1..list.len()).rev() {
        let other = random.bits() % (last as u64 + 1);
        list.swap(last, usize::try_from(other).unwrap());
    }
}

fn repeat(cell: &str) -> ExitCode {
    let cell: Cell = serde_json::from_str(cell).unwrap();
    let (findings, places) = Laboratory::new("crash-matrix-again").run(&cell);
    for place in places {
        eprintln!("  {:?} {}:{}", place.role, place.name, place.nth);
    }
    println!("{}", findings.lines().join("\n"));
    if findings.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
