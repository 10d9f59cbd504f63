//! Freezing by either agent: how long the calls take, and what the agents themselves take.

use std::time::{Duration, Instant};

use coordinator::{GuestSession, Map};

use crate::agent::guest_output;
use crate::contender::LIMIT;
use crate::figures::Better::Lower;
use crate::figures::{Figures, Side};

/// Filesystems of the guest.
const MOUNTED: u64 = 2;
/// Bytes on each of them that are not on its disk yet, in the rounds that have some.
const DIRTY: &str =
    "for dir in /one /two; do dd if=/dev/zero of=$dir/dirty bs=1M count=8 conv=notrunc 2>/dev/null; done";
/// KiB: resident memory of every process of the agent but init, which is the same program on one side; its program.
const HOLDINGS: &str = "for p in /proc/[0-9]*; do [ $p = /proc/1 ] || case $(readlink $p/exe) in \
     */tarn-agent | */qemu-ga) sed -n 's/^VmRSS:[^0-9]*\\([0-9]*\\).*/resident \\1/p' $p/status; echo program $(($(stat -Lc %s $p/exe) / 1024));; \
     esac; done";

/// Freezes and thaws, `count` times with nothing to write and a third as often with something.
pub fn rounds(
    session: &mut GuestSession,
    count: usize,
    side: Side,
    figures: &mut Figures,
) -> Result<(), String> {
    for (state, dirty, count) in
        [("nothing to write", None, count), ("8 MiB each to write", Some(DIRTY), count.div_ceil(3))]
    {
        let (mut freezes, mut thaws) = (Vec::new(), Vec::new());
        for _ in 0..count {
            if let Some(script) = dirty {
                guest_output(session, script, Duration::ZERO)?;
            }
            freezes.push(timed(session, "guest-fsfreeze-freeze")?);
            thaws.push(timed(session, "guest-fsfreeze-thaw")?);
        }
        figures.add(&format!("freeze: {state}, freeze"), ("ms", Lower), side, median(freezes));
        figures.add(&format!("freeze: {state}, thaw"), ("ms", Lower), side, median(thaws));
    }
    let holdings = guest_output(session, HOLDINGS, Duration::ZERO)?;
    let numbers = |name: &str| -> Vec<f64> {
        holdings.lines().filter_map(|line| line.strip_prefix(name)?.trim().parse().ok()).collect()
    };
    let program = numbers("program").first().copied().ok_or("no agent among the guest's processes")?;
    figures.add("freeze: agent's program, without libraries", ("KiB", Lower), side, program);
    figures.add("freeze: agent's resident memory", ("KiB", Lower), side, numbers("resident").iter().sum());
    Ok(())
}

/// Milliseconds of a call that must tell of every filesystem.
fn timed(session: &mut GuestSession, command: &str) -> Result<f64, String> {
    let begin = Instant::now();
    let count = session.execute(command, None::<Map>, LIMIT).map_err(|error| error.to_string())?;
    let took = begin.elapsed();
    if count != MOUNTED {
        return Err(format!("{command}: {count}"));
    }
    Ok(took.as_secs_f64() * 1000.0)
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}
