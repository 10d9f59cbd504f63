//! Figures: Tarn beside QEMU's `microvm` machine, same kernel, same initramfs, same disks, same run.
//!
//! ```text
//!   scripts/bench ─ builds, fetches ─▶ with-kvm ─▶ this program
//!                                                   │ round 0 is thrown away, 1…N count; in each, both sides in turn
//!                                                   ├─ start:  payload, kernel   ── process start to first serial byte
//!                                                   ├─ agent:  boot, ping        ── agent.sock or virtserialport
//!                                                   ├─ freeze: both agents       ── calls, and what they take in the guest
//!                                                   ├─ memory: smaps less RAM    ── payload and booted guest
//!                                                   ├─ disk:   fio in the guest  ── two images, cached and direct
//!                                                   ├─ mirror: throughput        ── drive-mirror, and cp on the host
//!                                                   ├─ latency: 4k writes        ── disk-io in the guest: no, background, write-blocking mirror
//!                                                   ├─ pivot:  guest I/O held    ── disk-io in the guest: longest time between completions
//!                                                   └─ operation: timeline       ── `tarn pivot`, protocols A and B
//!                                                        │
//!                                          Figures ──────┴─▶ table on stdout, figures.json
//! ```
//!
//! Absolute numbers are those of the machine it runs on, often an emulated one; what counts is the ratio. A guest is
//! awaited by blocking reads, so that measuring costs nothing while it is measured.

#![expect(clippy::unwrap_used, reason = "a benchmark that cannot do what it wants has no better way out")]

#[path = "../payload/mod.rs"]
#[expect(dead_code, reason = "this payload only halts")]
mod payload;

mod agent;
mod contender;
mod facts;
mod figures;
mod fio;
mod freeze;
mod memory;
mod mirror;
mod monitor;
mod pivot;
mod probe;
mod rounds;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

use figures::Figures;
use rounds::Rounds;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// A payload of a few bytes: time to its first serial byte, memory of the VMM.
    Payload,
    /// Debian's kernel: time to its first serial byte.
    Kernel,
    /// The whole guest image: time to the agent's first answer, memory of the VMM, ping.
    Agent,
    /// Freezing and thawing, and what the agents take in the guest.
    Freeze,
    /// Disk I/O.
    Disk,
    /// Live mirror: throughput, beside cp.
    Mirror,
    /// What a live mirror costs a guest that writes.
    Latency,
    /// For how long a pivot holds the guest's I/O.
    Pivot,
    /// `tarn pivot`: its timeline.
    Operation,
}

/// Measure Tarn beside QEMU's microvm machine.
#[derive(Debug, Parser)]
#[command(bin_name = "scripts/bench", no_binary_name = false)]
struct Args {
    /// One short round: shows that everything works
    #[arg(long)]
    quick: bool,
    /// Rounds that count, behind one that does not [default: 10 for payload and kernel, 5 for agent, 3 for the others]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Measure this only; may be repeated
    #[arg(long, value_enum, value_name = "GROUP")]
    only: Vec<Group>,
    /// Right here, on whatever /dev/kvm there is: the payload alone
    #[arg(long)]
    native: bool,

    /// The `tarn` to measure
    #[arg(long, hide = true)]
    tarn: PathBuf,
    /// Kernel and initramfs
    #[arg(long, hide = true)]
    image: PathBuf,
    /// An initramfs to be appended: Debian's qemu-ga
    #[arg(long, hide = true)]
    qemu_ga: Option<PathBuf>,
    /// A disk image with fio on it
    #[arg(long, hide = true)]
    tools: Option<PathBuf>,
    /// An initramfs to be appended: disk-io
    #[arg(long, hide = true)]
    disk_io: Option<PathBuf>,
    /// Where the JSON goes
    #[arg(long, hide = true)]
    output: PathBuf,
    /// What scripts/bench knows of the sources, and of the packages
    #[arg(long, hide = true, value_name = "NAME=TEXT")]
    fact: Vec<String>,
}

impl Args {
    fn measures(&self, group: Group) -> bool {
        if self.native {
            return group == Group::Payload;
        }
        self.only.is_empty() || self.only.contains(&group)
    }

    fn rounds(&self, usual: u32) -> u32 {
        self.rounds.unwrap_or(if self.quick { 1 } else { usual })
    }
}

/// Measures one group; rounds that count.
type Measure = fn(&Rounds<'_>, u32) -> Figures;

/// In the order they are measured, with how many rounds usually count.
const GROUPS: [(Group, Measure, u32); 9] = [
    (Group::Payload, |rounds, count| rounds.payload(count), 10),
    (Group::Kernel, |rounds, count| rounds.kernel(count), 10),
    (Group::Agent, |rounds, count| rounds.agent(count), 5),
    (Group::Freeze, |rounds, count| rounds.freeze(count), 3),
    (Group::Disk, |rounds, count| rounds.disk(count), 3),
    (Group::Mirror, |rounds, count| rounds.mirror(count), 3),
    (Group::Latency, |rounds, count| rounds.latency(count), 3),
    (Group::Pivot, |rounds, count| rounds.pivot(count), 3),
    (Group::Operation, |rounds, count| rounds.operation(count), 3),
];

fn main() -> ExitCode {
    let args = Args::parse();
    let mut figures = Figures::default();
    let rounds = Rounds::new(&args);
    for (_, measure, usual) in GROUPS.iter().filter(|(group, ..)| args.measures(*group)) {
        figures.append(measure(&rounds, args.rounds(*usual)));
        // What there is lasts, whatever becomes of the rest.
        save(&args, &figures);
    }
    drop(rounds);
    print!("{}", figures.table());
    eprintln!("bench: {}", args.output.display());
    ExitCode::SUCCESS
}

fn save(args: &Args, figures: &Figures) {
    let facts = facts::gather(args);
    let json =
        serde_json::json!({ "facts": facts, "figures": figures.json(), "failures": figures.failures() });
    fs::create_dir_all(args.output.parent().unwrap()).unwrap();
    fs::write(&args.output, format!("{json:#}\n")).unwrap();
}
