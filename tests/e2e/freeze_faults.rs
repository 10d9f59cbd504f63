//! What the reference agent still does to those who freeze with it, and what ours does in its place.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::freeze::{
    Guest, HOOK, MOUNT_ALL, Port, Wire, ask, every_filesystem, freeze, freeze_list, install, report, status,
    thaw, try_ask,
};
use crate::harness::{Lab, eventually};

/// What the emulated machine may take on top of a time limit.
const TOLERANCE: Duration = Duration::from_secs(10);

#[test]
fn the_known_faults_of_freezing_are_not_ours() {
    let Some(lab) = Lab::new("freeze-faults") else { return };
    let mut guest = Guest::boot(&lab, "faults", &every_filesystem(&lab), &["--thaw-grace", "1"]);
    guest.sh(MOUNT_ALL);
    install(&mut guest, "/run/hook", HOOK);

    a_host_that_leaves_before_the_answer_finds_no_spinning_agent_and_no_stale_reply(&mut guest);
    the_broker_undoes_the_freeze_of_a_client_that_does_the_same(&mut guest);
    a_lease_is_the_clients_to_choose_and_to_renew(&mut guest);
    a_thaw_hook_follows_every_freeze_hook(&mut guest);
    a_slow_hook_is_ended_and_meanwhile_pings_are_answered(&mut guest);
    a_child_of_a_hook_that_keeps_its_output_delays_nothing(&mut guest);
    a_failing_thaw_hook_does_not_hide_a_thaw(&mut guest);
    a_filesystem_under_another_one_is_frozen_by_its_other_mount(&mut guest);
    a_mount_point_under_another_mount_is_reached_all_the_same(&mut guest);
    a_list_may_name_any_mount_of_a_filesystem(&mut guest);
    a_frozen_filesystem_cannot_be_lost_by_unmounting_it(&mut guest);
    what_stays_writable_is_named(&mut guest);
    guest.power_off();
}

fn freeze_request() -> Value {
    json!({"execute": "guest-fsfreeze-freeze"})
}

/// (a) It spun for ever in its write loop, stayed frozen, and gave the answer to the next client.
fn a_host_that_leaves_before_the_answer_finds_no_spinning_agent_and_no_stale_reply(guest: &mut Guest<'_>) {
    drop(guest.start_agent(Port::Direct, "--freeze-lease 3"));
    let mut hasty = guest.wire();
    hasty.send(&freeze_request());
    let left = eventually("the freeze", || guest.has("/run/agent/qga.state.isfrozen").then(Instant::now));
    drop(hasty);
    let begin = guest.cpu_ticks();
    eventually("the thaw", || (!guest.has("/run/agent/qga.state.isfrozen")).then_some(()));
    guest.sh("echo x >/a/late");
    let took = left.elapsed();
    assert!(took < Duration::from_secs(3) + TOLERANCE, "frozen for {took:?}");
    guest.sh("sleep 2");
    let ticks = guest.cpu_ticks() - begin;
    // Of 200 and those of the lease; freezing and thawing take some.
    assert!(ticks < 100, "{ticks} hundredths of a second of processor time, for nothing");
    // The next client gets its own answer, and learns what became of the freeze.
    let mut next = guest.wire();
    next.send(&json!({"execute": "guest-ping"}));
    assert_eq!(next.line(), "{\"return\": {}}\n");
    drop(next);
    let mut agent = guest.client();
    assert_eq!(status(&mut agent), "thawed");
    assert_eq!(thaw(&mut agent), 0);
    assert_eq!(report(&mut agent)["state"], "thawed");
}

/// The client says how long it needs, and takes longer as long as it asks how things are.
fn a_lease_is_the_clients_to_choose_and_to_renew(guest: &mut Guest<'_>) {
    let mut agent = guest.start_agent(Port::Direct, "--freeze-lease 3600");
    let lease = Duration::from_secs(2);
    assert_eq!(ask(&mut agent, "guest-fsfreeze-freeze", &json!({"tarn-lease-ms": 2000})), 5);
    guest.start_writers(&["/a/leased"]);
    let begin = Instant::now();
    while begin.elapsed() < 2 * lease {
        assert_eq!(status(&mut agent), "frozen", "after {:?}", begin.elapsed());
        std::thread::sleep(lease / 10);
    }
    let last = Instant::now();
    guest.expect_released(1);
    assert!(last.elapsed() < lease + TOLERANCE, "{:?}", last.elapsed());
    let told = report(&mut agent);
    assert_eq!((&told["lease-ms"], &told["void"]), (&json!(2000), &json!(true)), "{told}");
    assert_eq!((&told["state"], &told["thawed-by"]), (&json!("thawed"), &json!("lease")), "{told}");
    assert_eq!(thaw(&mut agent), 0, "too late");

    let list = json!({"mountpoints": ["/x"], "tarn-lease-ms": 0});
    assert_eq!(ask(&mut agent, "guest-fsfreeze-freeze-list", &list), 1);
    assert_eq!(report(&mut agent)["lease-ms"], 0, "none");
    assert_eq!(thaw(&mut agent), 1);
    let told = report(&mut agent);
    assert_eq!((&told["thawed-by"], &told["void"]), (&json!("command"), &json!(false)), "{told}");
}

/// The broker knows that nobody waits for that freeze: it calls it off, or thaws.
fn the_broker_undoes_the_freeze_of_a_client_that_does_the_same(guest: &mut Guest<'_>) {
    drop(guest.start_agent(Port::Standard, ""));
    for _ in 0..3 {
        let mut hasty = Wire::connect(&guest.vm.socket("agent.sock"));
        hasty.send(&freeze_request());
        drop(hasty);
        let mut next = guest.client();
        eventually("the thaw", || (status(&mut next) == "thawed").then_some(()));
        guest.sh("echo x >/a/late");
        assert_eq!(thaw(&mut next), 0);
    }
}

/// (b) With nothing frozen it never told the applications that they may go on.
fn a_thaw_hook_follows_every_freeze_hook(guest: &mut Guest<'_>) {
    let mut agent = guest.start_agent(Port::Direct, "-F/run/hook");
    guest.sh("rm -f /run/hook.log");
    assert_eq!(freeze_list(&mut agent, &["/nope"]), 0);
    assert_eq!(guest.sh("cat /run/hook.log"), "freeze\nthaw");
    // A freeze that fails is none; nor is one that the hook vetoes.
    guest.sh("rm /run/hook.log; touch /run/hook.fails");
    let error = try_ask(&mut agent, "guest-fsfreeze-freeze", &Value::Null).unwrap_err();
    let text = &error.refusal().unwrap().desc;
    assert_eq!(text, "child process has failed to execute fsfreeze hook: hook says no\n");
    assert_eq!(status(&mut agent), "thawed");
    guest.sh("rm /run/hook.fails; echo x >/a/vetoed");
}

/// (c) It waited for ever, and was deaf meanwhile.
fn a_slow_hook_is_ended_and_meanwhile_pings_are_answered(guest: &mut Guest<'_>) {
    install(guest, "/run/slow", "#!/bin/sh\necho $1 >>/run/hook.log\n[ $1 = thaw ] || sleep 1234\n");
    drop(guest.start_agent(Port::Direct, "-F/run/slow --hook-timeout 4"));
    guest.sh("rm -f /run/hook.log");
    let mut wire = guest.wire();
    let begin = Instant::now();
    wire.send(&freeze_request());
    eventually("the hook", || guest.has("/run/hook.log").then_some(()));
    wire.send(&json!({"exec-oob": "guest-ping", "id": "while it runs"}));
    assert_eq!(wire.reply(), json!({"return": {}, "id": "while it runs"}));
    let pinged = begin.elapsed();
    let answer = wire.reply();
    let took = begin.elapsed();
    eprintln!("slow hook: ping after {pinged:?}, failure after {took:?}: {answer}");
    assert!(answer["error"]["desc"].as_str().unwrap().contains("fsfreeze hook"), "{answer}");
    assert!(took < Duration::from_secs(4) + TOLERANCE, "{took:?}");
    assert_eq!(guest.sh("ps | grep -c '[s]leep 1234' || true"), "0", "what the hook started has ended, too");
    assert_eq!(guest.sh("cat /run/hook.log"), "freeze\nthaw", "what it has quiesced so far goes on");
    drop(wire);
    assert_eq!(status(&mut guest.client()), "thawed");
    guest.sh("echo x >/a/slow");
}

/// (c) It read to the end of the pipe that the hook's children had as well.
fn a_child_of_a_hook_that_keeps_its_output_delays_nothing(guest: &mut Guest<'_>) {
    install(guest, "/run/parent", "#!/bin/sh\nsleep 1234 &\nexit 0\n");
    let mut agent = guest.start_agent(Port::Direct, "-F/run/parent");
    let begin = Instant::now();
    assert_eq!(freeze(&mut agent), 5);
    assert_eq!(thaw(&mut agent), 5);
    assert!(begin.elapsed() < TOLERANCE, "{:?}", begin.elapsed());
    guest.sh("killall sleep || true");
}

/// (h) It answered a thaw with an error.
fn a_failing_thaw_hook_does_not_hide_a_thaw(guest: &mut Guest<'_>) {
    let mut agent = guest.start_agent(Port::Direct, "-F/run/hook");
    assert_eq!(freeze(&mut agent), 5);
    guest.sh("touch /run/hook.fails");
    assert_eq!(thaw(&mut agent), 5);
    let told = report(&mut agent).to_string();
    assert!(told.contains("hook says no"), "{told}");
    guest.sh("rm /run/hook.fails");
}

/// (d) It froze only the one on top, and said nothing.
fn a_filesystem_under_another_one_is_frozen_by_its_other_mount(guest: &mut Guest<'_>) {
    let mut agent = guest.start_agent(Port::Direct, "");
    guest.sh("umount /ro && mount -t ext4 /dev/vdc /x");
    assert_eq!(freeze(&mut agent), 5);
    guest.expect_blocked(&["/bx/under", "/x/over"], &[]);
    assert_eq!(thaw(&mut agent), 5);
    guest.expect_released(2);
    // And if there is no other way to it, the agent makes one for itself. Only who has a file open can write there.
    guest.sh("umount /x && mkfifo /run/go && rm -rf /run/writers && mkdir /run/writers");
    guest.sh(
        "(sh -c 'exec 5>>/x/held; echo $$ >/run/writers/0.pid; read -r _ </run/go; echo x >&5; : >/run/writers/0.done') \
         >/dev/null 2>&1 </dev/null &",
    );
    eventually("a writer with an open file", || guest.has("/run/writers/0.pid").then_some(()));
    guest.sh("umount /bx && mount -t ext4 /dev/vdc /x");
    assert_eq!(freeze(&mut agent), 5);
    guest.sh("echo go >/run/go");
    eventually("the writer to wait", || (guest.writers(1) == ["D"]).then_some(()));
    assert_eq!(thaw(&mut agent), 5);
    guest.expect_released(1);
    guest.sh("umount /x && mount -o bind /x /bx && mount -t ext4 -o ro /dev/vdc /ro");
}

/// (g) It failed because the path to a mount point led elsewhere.
fn a_mount_point_under_another_mount_is_reached_all_the_same(guest: &mut Guest<'_>) {
    let mut agent = guest.start_agent(Port::Direct, "");
    guest.sh("mkdir -p /alias/lm && mount -o bind /a /alias && mount -o bind /a/lm /alias/lm && mount -t tmpfs t /a");
    assert_eq!(freeze(&mut agent), 5);
    guest.expect_blocked(&["/alias/under", "/alias/lm/under"], &["/a/over"]);
    assert_eq!(thaw(&mut agent), 5);
    guest.expect_released(3);
    guest.sh("umount /alias/lm /alias");
    // Only the overlay leads there now.
    assert_eq!(freeze(&mut agent), 5);
    guest.expect_blocked(&["/ov/under"], &["/a/over"]);
    assert_eq!(thaw(&mut agent), 5);
    guest.expect_released(2);
    guest.sh("umount /a");
}

/// (e) It froze nothing and said so by a number.
fn a_list_may_name_any_mount_of_a_filesystem(guest: &mut Guest<'_>) {
    let mut agent = guest.start_agent(Port::Direct, "");
    for list in [&["/bx"][..], &["/bx", "/x"], &["/x/", "/bx"]] {
        assert_eq!(freeze_list(&mut agent, list), 1, "{list:?}");
        guest.expect_blocked(&["/x/list", "/bx/list"], &["/a/list", "/b/list"]);
        assert_eq!(thaw(&mut agent), 1);
        guest.expect_released(4);
    }
    assert_eq!(freeze_list(&mut agent, &["/b2"]), 1);
    guest.expect_blocked(&["/b/list"], &["/x/list"]);
    assert_eq!(thaw(&mut agent), 1);
    guest.expect_released(2);
}

/// (f) It let go of it, and what was unmounted stayed frozen until somebody mounted it again.
fn a_frozen_filesystem_cannot_be_lost_by_unmounting_it(guest: &mut Guest<'_>) {
    let mut agent = guest.start_agent(Port::Direct, "");
    assert_eq!(freeze(&mut agent), 5);
    let (one, other) = (guest.try_sh("umount /b2"), guest.try_sh("umount /b"));
    assert!(one.0 != 0 || other.0 != 0, "both mounts of a frozen filesystem are gone");
    let text = format!("{}{}", one.1, other.1);
    assert!(text.contains("busy"), "{text}");
    let (code, text) = guest.try_sh("mount -o remount,ro /x");
    assert!(code != 0 && text.contains("busy"), "a remount of a frozen filesystem: {code}, {text}");
    // Even one that nobody can reach any more.
    guest.sh("umount -l /bx /x");
    assert_eq!(thaw(&mut agent), 5);
    assert_eq!(thaw(&mut agent), 0);
    guest.sh("umount /b /b2 2>/dev/null; ! grep btrfs /proc/mounts");
    guest.sh("mount -t btrfs /dev/vdd /b && mount -t btrfs /dev/vdd /b2 && echo x >/b/again && umount /b2 && mount -t btrfs /dev/vdd /b2");
    guest.sh("mount -t xfs /dev/vdb /x && mount -o bind /x /bx && echo x >/x/again && mount -o remount,ro /x && mount -o remount,rw /x");
    assert_eq!(freeze(&mut agent), 5);
    assert_eq!(thaw(&mut agent), 5);
}

/// (i) It left them writable and kept it to itself.
fn what_stays_writable_is_named(guest: &mut Guest<'_>) {
    let mut agent = guest.start_agent(Port::Direct, "");
    assert_eq!(freeze(&mut agent), 5);
    let told = report(&mut agent);
    assert_eq!(thaw(&mut agent), 5);
    let names = |list: &str, wanted: &dyn Fn(&Value) -> bool| {
        let list = told[list].as_array().unwrap().iter().filter(|entry| wanted(entry));
        let mut names: Vec<_> = list.map(|entry| entry["mountpoint"].as_str().unwrap()).collect();
        names.sort_unstable();
        names.join(" ")
    };
    assert_eq!(names("filesystems", &|entry| entry["outcome"] == "frozen"), "/a /a/lm /b /ro /x", "{told}");
    assert_eq!(names("not-frozen", &|_| true), "/ov /v", "{told}");
}
