//! Frozen, and then: the agent is killed, the client is killed, the service manager ends it, state is left over.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use crate::freeze::{DIRECT, Guest, Port, ask, freeze, refusal, status, thaw, try_ask};
use crate::harness::{Lab, Monitor, connect, eventually, limit};

/// What a freeze may last without anybody's doing.
const LEASE: Duration = Duration::from_secs(2);
/// What the emulated machine may take on top of it.
const TOLERANCE: Duration = Duration::from_secs(3);

/// Writes to a file again and again, and keeps the longest time in which a write did not succeed, in hundredths of a
/// second.
const PULSE: &str = "#!/bin/sh
now() { read -r up _ </proc/uptime; up=${up%.*}${up#*.}; }
longest=0
while [ -e /run/pulse/$2.on ]; do
    now; begin=$up
    echo x >$1/pulse
    now; took=$((up - begin))
    if [ $took -gt $longest ]; then longest=$took; echo $longest >/run/pulse/$2.longest; fi
    usleep 20000
done
: >/run/pulse/$2.done
";

/// The filesystems, and what they are called in /run/pulse.
const FILESYSTEMS: &[(&str, &str)] = &[("/a", "a"), ("/x", "x")];

/// A sequence of numbers that a test can be run with again.
struct Dice(u64);

impl Dice {
    fn new() -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let seed = std::env::var("TARN_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or(now.as_secs() | 1);
        eprintln!("TARN_TEST_SEED={seed}");
        Self(seed)
    }

    /// Below `bound`. By Marsaglia's xorshift64.
    fn roll(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

impl Guest<'_> {
    fn start_pulses(&mut self) {
        self.sh("rm -rf /run/pulse; mkdir /run/pulse");
        for (dir, name) in FILESYSTEMS {
            self.sh(&format!(
                ": >/run/pulse/{name}.on; (/run/pulse.sh {dir} {name} >/dev/null 2>&1 </dev/null &)"
            ));
        }
    }

    /// Ends them when each has written once more; returns the longest time without a write.
    fn stop_pulses(&mut self) -> Duration {
        self.sh("rm -f /run/pulse/*.on");
        for (_, name) in FILESYSTEMS {
            eventually("a write", || self.has(&format!("/run/pulse/{name}.done")).then_some(()));
        }
        let longest = self.sh("cat /run/pulse/*.longest | sort -n | tail -n 1");
        Duration::from_millis(10 * longest.parse::<u64>().unwrap())
    }

    /// Both filesystems take a write.
    fn expect_writable(&mut self) {
        for (dir, _) in FILESYSTEMS {
            self.sh(&format!("echo x >{dir}/writable"));
        }
    }
}

#[test]
fn who_ends_starts_anew_or_leaves_leaves_nothing_frozen() {
    let Some(lab) = Lab::new("freeze-crash") else { return };
    let mut guest = boot(&lab);
    an_agent_that_starts_anew_knows_that_it_has_to_thaw(&mut guest);
    a_state_file_without_a_freeze_is_believed_until_the_thaw(&mut guest);
    an_agent_that_is_told_to_end_thaws_first(&mut guest);
    clients_killed_at_any_moment_leave_nothing_frozen_for_longer_than_the_grace(&lab, &mut guest);
    guest.power_off();
}

/// A hundred kills in four guests: an emulated machine may lose one in the minutes that they take.
#[test]
fn agents_killed_at_any_moment_leave_nothing_frozen_1_of_4() {
    kill_agents("freeze-crash-1");
}

#[test]
fn agents_killed_at_any_moment_leave_nothing_frozen_2_of_4() {
    kill_agents("freeze-crash-2");
}

#[test]
fn agents_killed_at_any_moment_leave_nothing_frozen_3_of_4() {
    kill_agents("freeze-crash-3");
}

#[test]
fn agents_killed_at_any_moment_leave_nothing_frozen_4_of_4() {
    kill_agents("freeze-crash-4");
}

fn kill_agents(name: &'static str) {
    let Some(lab) = Lab::new(name) else { return };
    let mut guest = boot(&lab);
    agents_killed_at_any_moment_leave_nothing_frozen_for_longer_than_the_lease(&mut guest);
    guest.power_off();
}

fn boot(lab: &Lab) -> Guest<'_> {
    let ext4 = lab.ext4("a.raw", 64 << 20);
    let xfs = lab.image("x.raw", 320 << 20);
    crate::harness::run(std::process::Command::new("mkfs.xfs").arg("-q").arg(&xfs));
    let mut guest = Guest::boot(lab, "crash", &[ext4, xfs], &["--thaw-grace", "1"]);
    guest.sh("mkdir /a /x && mount -t ext4 /dev/vda /a && mount -t xfs /dev/vdb /x");
    crate::freeze::install(&mut guest, "/run/pulse.sh", PULSE);
    guest
}

fn an_agent_that_starts_anew_knows_that_it_has_to_thaw(guest: &mut Guest<'_>) {
    let options = "--freeze-lease 60";
    let mut agent = guest.start_agent(Port::Direct, options);
    assert_eq!(freeze(&mut agent), 2);
    drop(agent);
    let mut agent = guest.start_agent_again(Port::Direct, options);
    assert_eq!(status(&mut agent), "frozen");
    only_what_the_frozen_may_do_is_enabled(&mut agent);
    guest.expect_blocked(&["/a/f", "/x/f"], &["/run/f"]);
    assert_eq!(thaw(&mut agent), 2);
    guest.expect_released(3);
    assert_eq!(status(&mut agent), "thawed");
    assert_eq!(thaw(&mut agent), 0);
    assert!(!guest.has("/run/agent/qga.state.isfrozen"));
    assert_eq!(freeze(&mut agent), 2);
    assert_eq!(thaw(&mut agent), 2);
}

fn only_what_the_frozen_may_do_is_enabled(agent: &mut coordinator::GuestSession) {
    let info = ask(agent, "guest-info", &json!({}));
    let commands = info["supported_commands"].as_array().unwrap();
    let mut enabled: Vec<_> = commands
        .iter()
        .filter(|command| command["enabled"] == true)
        .map(|command| command["name"].as_str().unwrap())
        .filter(|name| name.starts_with("guest-"))
        .collect();
    enabled.sort_unstable();
    let expected = [
        "guest-fsfreeze-status",
        "guest-fsfreeze-thaw",
        "guest-info",
        "guest-ping",
        "guest-sync",
        "guest-sync-delimited",
    ];
    assert_eq!(enabled, expected);
    assert_eq!(refusal(agent, "guest-exec", &json!({"path": "true"})).0, "CommandNotFound");
}

fn a_state_file_without_a_freeze_is_believed_until_the_thaw(guest: &mut Guest<'_>) {
    guest.stop_agent();
    guest.sh("touch /run/agent/qga.state.isfrozen");
    let mut agent = guest.start_agent_again(Port::Direct, "");
    assert_eq!(status(&mut agent), "frozen");
    only_what_the_frozen_may_do_is_enabled(&mut agent);
    assert_eq!(thaw(&mut agent), 0);
    assert_eq!(status(&mut agent), "thawed");
    assert!(!guest.has("/run/agent/qga.state.isfrozen"));
    ask(&mut agent, "guest-get-time", &json!({}));
}

fn an_agent_that_is_told_to_end_thaws_first(guest: &mut Guest<'_>) {
    for signal in ["TERM", "INT"] {
        let mut agent = guest.start_agent(Port::Direct, "");
        assert_eq!(freeze(&mut agent), 2);
        drop(agent);
        guest.sh(&format!("kill -{signal} $(cat /run/agent.pid)"));
        eventually("the end of the agent", || guest.has("/run/agent.ended").then_some(()));
        assert_eq!(guest.sh("cat /run/agent.ended"), "0", "SIG{signal}");
        guest.expect_writable();
        assert_eq!(status(&mut guest.client()), "thawed");
        assert!(!guest.has("/run/agent/qga.state.isfrozen"));
    }
}

fn agents_killed_at_any_moment_leave_nothing_frozen_for_longer_than_the_lease(guest: &mut Guest<'_>) {
    const ROUNDS: u64 = 25;
    let mut dice = Dice::new();
    let mut agent = guest.start_agent(Port::Direct, &format!("--freeze-lease {}", LEASE.as_secs()));
    let usual = usual_times(&mut agent);
    let mut assassin = guest.assassin();
    let mut seen = BTreeMap::<String, u32>::new();
    guest.start_pulses();
    let mut monitor = guest.vm.monitor();
    let begin = Instant::now();
    for round in 0..ROUNDS {
        let in_freeze = dice.roll(2) == 0;
        let (request, time) = if in_freeze { (FREEZE, usual.0) } else { (THAW, usual.1) };
        if !in_freeze {
            assert_eq!(freeze(&mut agent), 2, "round {round}");
        }
        drop(agent);
        // One in twenty is not started again before its lease is over; another one is, but nobody thaws.
        let fate = dice.roll(20);
        if fate == 0 {
            guest.sh("touch /run/agent.hold");
        }
        monitor.forget_events();
        let mut wire = guest.wire();
        wire.send(&json!({"execute": request}));
        let struck = Instant::now();
        assassin.strike(Duration::from_micros(dice.roll(2 * u64::try_from(time.as_micros()).unwrap())));
        assassin.await_death();
        drop(wire);
        if fate == 0 {
            guest.expect_writable();
            assert!(struck.elapsed() < LEASE + TOLERANCE, "round {round}: frozen for {:?}", struck.elapsed());
            guest.sh("rm /run/agent.hold");
        }
        await_agents_port(&mut monitor);
        agent = guest.client();
        let found = status(&mut agent);
        *seen.entry(format!("{request}: {}", found.as_str().unwrap())).or_default() += 1;
        if fate == 1 {
            // Who asks for the status renews the lease.
            let asked = Instant::now();
            guest.expect_writable();
            assert!(asked.elapsed() < LEASE + TOLERANCE, "round {round}: frozen for {:?}", asked.elapsed());
        }
        let count = thaw(&mut agent).as_u64().unwrap();
        assert!(count <= 2, "round {round}: {count}");
        assert_eq!(thaw(&mut agent), 0, "round {round}");
        assert_eq!(status(&mut agent), "thawed", "round {round}");
    }
    let took = begin.elapsed();
    let longest = guest.stop_pulses();
    eprintln!(
        "{ROUNDS} kills in {took:?}, freeze and thaw take {usual:?}; {seen:?}; longest without a write: {longest:?}"
    );
    // Once as long as the agent is dead, and once more if its successor is asked.
    assert!(longest < 2 * LEASE + TOLERANCE, "no write for {longest:?}");
    assert!(seen.len() > 2, "the moments are not random: {seen:?}");
}

/// Waits until the agent has opened its port again.
fn await_agents_port(monitor: &mut Monitor) {
    loop {
        let event = monitor.await_event("VSERPORT_CHANGE");
        if event.data["id"] == DIRECT && event.data["open"] == true {
            return;
        }
    }
}

const FREEZE: &str = "guest-fsfreeze-freeze";
const THAW: &str = "guest-fsfreeze-thaw";

/// How long a freeze and a thaw take.
fn usual_times(agent: &mut coordinator::GuestSession) -> (Duration, Duration) {
    let mut best = (limit(), limit());
    for _ in 0..5 {
        let begin = Instant::now();
        freeze(agent);
        let frozen = Instant::now();
        thaw(agent);
        best = (best.0.min(frozen - begin), best.1.min(frozen.elapsed()));
    }
    best
}

fn clients_killed_at_any_moment_leave_nothing_frozen_for_longer_than_the_grace(
    lab: &Lab,
    guest: &mut Guest<'_>,
) {
    const GRACE: Duration = Duration::from_secs(1);
    let mut dice = Dice::new();
    drop(guest.start_agent(Port::Standard, ""));
    let mut monitor = guest.vm.monitor();
    let mut thaws = || monitor.run("tarn-query-agent")["automatic-thaws"].as_u64().unwrap();
    let before = thaws();
    guest.start_pulses();
    for round in 0..20 {
        let pause = Duration::from_millis(dice.roll(700));
        if round % 2 == 0 {
            // What people type.
            let mut client = lab
                .tarn(&["agent", "crash", FREEZE])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(pause);
            let _ = client.kill();
            client.wait().unwrap();
        } else {
            let mut client = connect(&guest.vm.socket("agent.sock"));
            client.write_all(format!("{}\n", json!({"execute": FREEZE})).as_bytes()).unwrap();
            std::thread::sleep(pause);
        }
        if dice.roll(4) == 0 {
            guest.expect_writable();
        }
    }
    let longest = guest.stop_pulses();
    let thaws = thaws() - before;
    eprintln!("20 clients killed: {thaws} thaws in their place; longest without a write: {longest:?}");
    assert!(thaws > 0, "none of them had frozen anything");
    assert!(longest < GRACE + TOLERANCE, "no write for {longest:?}");
    let mut client = guest.client();
    eventually("the last thaw", || {
        try_ask(&mut client, "guest-fsfreeze-status", &Value::Null)
            .is_ok_and(|status| status == "thawed")
            .then_some(())
    });
    assert_eq!(thaw(&mut client), 0);
}
