//! The crash matrix: a pivot, with coordinator or VMM or both killed, or the power cut, at every step that somebody else can
//! see; recovered; and every byte compared that the guest was promised.
//!
//! ```text
//!   this program ─ cells, one after the other, a few at a time ─┐
//!                                                               ▼
//!      run: ── starts ──▶ itself as `vmm`: real disks, jobs, pivots, monitor; threads in place of the guest and its agent
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

mod agent;
mod cases;
mod cells;
mod guest;
mod laboratory;
mod machine;
mod mistakes;
mod process;
mod records;
mod run;
mod setup;
mod strangers;
mod verdict;
mod vmm;

use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, Subcommand};
use coordinator::operation::{self, Liveness, Silent};
use devices::testing::Random;

use cells::Cell;
use laboratory::{Counts, Laboratory};
use setup::Setup;

/// Below this the whole matrix is not what it claims to be.
const WHOLE: usize = 2000;

/// Kill the coordinator, the VMM, both, or cut the power, at every step of a pivot.
#[derive(Debug, Parser)]
#[command(bin_name = "crash_matrix")]
struct Args {
    /// So many runs, chosen at random, in place of all
    #[arg(long, value_name = "N")]
    sample: Option<usize>,
    /// Only runs whose cell, as JSON, has this in it, such as `"stranger":"Successor"` or `image.create`
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
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
    Worker,
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
        Role::Worker => laboratory::work().map_err(|error| error.to_string()),
        Role::Vmm { setup } => vmm::run(&parse(setup)).map_err(|error| coordinator::chain(&*error)),
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
    done.map(drop).map_err(|error| coordinator::chain(&error))
}

fn recover(setup: &Setup, vm: &Liveness) -> Result<(), String> {
    operation::recover(&setup.state(), vm, &mut Silent).map(drop).map_err(|error| coordinator::chain(&error))
}

fn matrix(args: &Args) -> ExitCode {
    let (laboratory, began) = (Laboratory::new("crash-matrix").unwrap(), Instant::now());
    if args.only.is_none() && !cases::pass() {
        return ExitCode::FAILURE;
    }
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
    if let Some(text) = &args.only {
        cells.retain(|cell| serde_json::to_string(cell).unwrap().contains(text));
    }
    cells.truncate(args.sample.map_or(all, |sample| sample.saturating_sub(quiet.runs)));
    eprintln!(
        "crash matrix: seed {}, {} of {all} cells, directories in {}",
        args.seed,
        cells.len(),
        laboratory.base.display()
    );
    let counts = laboratory.run_all(&cells).0.and(&quiet);
    let Counts { runs, reached, lost, wrong, repeated, other } = counts;
    eprintln!(
        "crash matrix: a place was reached in {reached} runs, {other} other complaints, {} s",
        began.elapsed().as_secs()
    );
    println!(
        "crash matrix: {runs} runs, {lost} lost writes, {wrong} wrong images, {repeated} repeated recoveries that changed \
         something"
    );
    let enough = args.only.is_some() || runs >= args.sample.unwrap_or(WHOLE) && reached * 2 > runs;
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
    let (counts, passed) = Laboratory::new("crash-matrix-again").unwrap().run_all(&[cell]);
    for place in passed.iter().flat_map(|(_, places)| places) {
        println!("{:?} {}:{}", place.role, place.name, place.nth);
    }
    if counts.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
