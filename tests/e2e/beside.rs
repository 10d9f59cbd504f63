//! While one client's freeze takes its time, the others are answered, and one that gives up leaves nothing behind.

use std::thread;

use serde_json::{Value, json};

use crate::freeze::{Guest, Port, ask, freeze, install, refusal, status, thaw, try_ask};
use crate::harness::{Lab, eventually};

/// Takes as long as it is told to.
const SLOW_HOOK: &str = "#!/bin/sh
[ $1 = freeze ] || exit 0
touch /run/hook.started
until [ -e /run/hook.go ]; do sleep 0.1; done
";

#[test]
fn a_freeze_that_takes_long_holds_up_nobody_and_ends_with_its_client_or_its_lease() {
    let Some(lab) = Lab::new("beside") else { return };
    let disk = lab.ext4("data.raw", 64 << 20);
    let mut guest = Guest::boot(&lab, "beside", &[disk], &["--mount", "/dev/vda:/data:ext4"]);
    install(&mut guest, "/run/hook", SLOW_HOOK);
    drop(guest.start_agent(Port::Standard, "--fsfreeze-hook=/run/hook"));

    others_are_answered_while_it_freezes(&lab, &mut guest);
    a_thaw_cancels_it(&mut guest);
    so_does_the_end_of_its_client(&mut guest);
    a_poller_does_not_renew_the_lease(&mut guest);
    guest.power_off();
}

/// Another client's freeze, which is inside its hook; what it returns in the end.
fn slow_freeze(guest: &mut Guest<'_>) -> thread::JoinHandle<Result<Value, String>> {
    guest.sh("rm -f /run/hook.*");
    let mut client = guest.client();
    let freeze = move || {
        let frozen = try_ask(&mut client, "guest-fsfreeze-freeze", &Value::Null);
        frozen.map_err(|error| error.refusal().map_or(error.to_string(), |refusal| refusal.desc.clone()))
    };
    let freeze = thread::spawn(freeze);
    eventually("the hook to run", || guest.has("/run/hook.started").then_some(()));
    freeze
}

fn others_are_answered_while_it_freezes(lab: &Lab, guest: &mut Guest<'_>) {
    let freeze = slow_freeze(guest);
    for command in ["guest-ping", "guest-info", "guest-fsfreeze-status", "tarn-fsfreeze-report"] {
        let output = lab.output(&["agent", "beside", command]);
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(guest.vm.monitor().run("guest-ping"), json!({}));
    assert_eq!(guest.vm.monitor().run("tarn-query-agent")["out-of-band"], true);
    assert!(!freeze.is_finished());
    guest.sh("touch /run/hook.go");
    assert_eq!(freeze.join().unwrap(), Ok(json!(1)));
    assert_eq!(thaw(&mut guest.client()), 1);
}

fn a_thaw_cancels_it(guest: &mut Guest<'_>) {
    let freeze = slow_freeze(guest);
    assert_eq!(thaw(&mut guest.client()), 0, "nothing was frozen yet");
    let error = freeze.join().unwrap().unwrap_err();
    assert_eq!(error, "A thaw was asked for before 'guest-fsfreeze-freeze' was answered");
    assert_eq!(status(&mut guest.client()), "thawed");
}

fn so_does_the_end_of_its_client(guest: &mut Guest<'_>) {
    guest.sh("rm -f /run/hook.*");
    let mut client = guest.client();
    let soon = std::time::Duration::from_secs(2);
    let patience = client.execute("guest-fsfreeze-freeze", None, soon);
    assert!(patience.is_err(), "{patience:?}");
    eventually("the hook to run", || guest.has("/run/hook.started").then_some(()));
    // Its session gets in step behind its own freeze.
    assert_eq!(ask(&mut client, "guest-ping", &Value::Null), json!({}));
    let mut monitor = guest.vm.monitor();
    eventually("the automatic thaw", || {
        (monitor.run("tarn-query-agent")["automatic-thaws"] == 1).then_some(())
    });
    assert_eq!(status(&mut client), "thawed");
}

/// The owner of the freeze is there, but does not ask; somebody else does all the time.
fn a_poller_does_not_renew_the_lease(guest: &mut Guest<'_>) {
    guest.sh("touch /run/hook.go");
    let mut owner = guest.client();
    assert_eq!(ask(&mut owner, "guest-fsfreeze-freeze", &json!({"tarn-lease-ms": 3000})), 1);
    let mut poller = guest.client();
    eventually("the lease to run out", || (status(&mut poller) == "thawed").then_some(()));
    let agent = guest.vm.monitor().run("tarn-query-agent");
    assert_eq!((&agent["frozen"], &agent["automatic-thaws"]), (&json!(false), &json!(2)));
    assert_eq!(thaw(&mut owner), 0);
    // An agent that knows the lease checks it.
    let (class, _) = refusal(&mut owner, "guest-fsfreeze-freeze", &json!({"tarn-lease-ms": -1}));
    assert_eq!(class, "GenericError");
    assert_eq!(freeze(&mut owner), 1);
    assert_eq!(thaw(&mut owner), 1);
}
