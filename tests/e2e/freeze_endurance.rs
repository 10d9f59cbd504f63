//! Freezing again and again: nothing is lost, nothing piles up.

use std::time::Instant;

use serde_json::json;

use crate::freeze::{Guest, Port, ask, freeze, thaw};
use crate::harness::Lab;

/// Rounds; `TARN_SOAK=1` is for the whole job.
const ROUNDS: u32 = 50;
const ROUNDS_SOAK: u32 = 1000;
/// Rounds before anything is measured: buffers have their size then.
const WARM_UP: u32 = 10;

/// Writes files through the page cache and past it, for as long as it may.
const LOAD: &str = "#!/bin/sh
while [ ! -e /run/enough ]; do
    dd if=/dev/zero of=/a/load bs=16k count=16 conv=fsync
    date >>/a/log
    mv /a/load /a/loaded
done >/dev/null 2>&1
: >/run/ended
";

#[test]
fn a_thousand_freezes_under_load_leave_nothing_behind() {
    let Some(lab) = Lab::new("freeze-endurance") else { return };
    let disk = lab.ext4("a.raw", 64 << 20);
    let mut guest = Guest::boot(&lab, "endurance", std::slice::from_ref(&disk), &[]);
    guest.sh("mkdir /a && mount -t ext4 /dev/vda /a");
    crate::freeze::install(&mut guest, "/run/load", LOAD);
    guest.sh("(/run/load </dev/null >/dev/null 2>&1 &)");
    let soak = std::env::var("TARN_SOAK").is_ok_and(|value| value == "1");
    let rounds = if soak { ROUNDS_SOAK } else { ROUNDS };

    let mut agent = guest.start_agent(Port::Standard, "");
    let mut before = Vec::new();
    let begin = Instant::now();
    for round in 0..rounds + WARM_UP {
        if round == WARM_UP {
            before = guest.holdings();
        }
        assert_eq!(freeze(&mut agent), 1, "round {round}");
        assert_eq!(thaw(&mut agent), 1, "round {round}");
    }
    let each = begin.elapsed() / (rounds + WARM_UP);
    let after = guest.holdings();
    eprintln!("{rounds} rounds, {each:?} each; agent and watchdog hold {before:?}, {after:?}");
    let processes = |holdings: &[Holding]| holdings.iter().map(|holding| holding.pid).collect::<Vec<_>>();
    assert_eq!(processes(&before), processes(&after), "neither agent nor watchdog was started again");
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before.descriptors, after.descriptors, "{before:?}, {after:?}");
        assert_eq!(before.threads, after.threads, "{before:?}, {after:?}");
        assert!(after.resident <= before.resident + 128, "{before:?}, {after:?}");
        assert!(after.resident <= 4096, "beyond 4 MiB: {after:?}");
    }
    ask(&mut agent, "guest-ping", &json!({}));
    guest.sh("touch /run/enough; until [ -e /run/ended ]; do usleep 50000; done; umount /a");
    guest.power_off();
    crate::harness::run(std::process::Command::new("fsck.ext4").args(["-f", "-n"]).arg(&disk));
}

/// What a process has.
#[derive(Debug)]
struct Holding {
    pid: u32,
    descriptors: u32,
    threads: u32,
    /// KiB.
    resident: u32,
}

impl Guest<'_> {
    /// What the agent under test and its children have.
    fn holdings(&mut self) -> Vec<Holding> {
        let text = self.sh(
            "agent=$(cat /run/agent.pid); for p in /proc/[0-9]*; do read -r pid _ _ parent _ <$p/stat || continue; \
             { [ $pid = $agent ] || [ $parent = $agent ]; } || continue; \
             echo $pid $(ls $p/fd | wc -l) $(sed -n 's/^\\(Threads\\|VmRSS\\):[^0-9]*\\([0-9]*\\).*/\\2/p' $p/status); \
             done 2>/dev/null",
        );
        let mut holdings: Vec<_> = text
            .lines()
            .map(|line| {
                let numbers: Vec<u32> =
                    line.split_whitespace().map(|number| number.parse().unwrap()).collect();
                let [pid, descriptors, resident, threads] = numbers[..] else { panic!("{line}") };
                Holding { pid, descriptors, threads, resident }
            })
            .collect();
        holdings.sort_by_key(|holding| holding.pid);
        assert_eq!(holdings.len(), 2, "agent and watchdog: {text}");
        holdings
    }
}
