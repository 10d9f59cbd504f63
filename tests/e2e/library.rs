//! What a user's own test looks like: the crate `coordinator` and nothing else, but for the place that the lab gives it.

use std::time::Duration;

use coordinator::journal::{Consistency, Outcome};
use coordinator::operation::Request;
use coordinator::{Vm, VmOptions};

use crate::harness::{Lab, TARN, eventually, guest_image, limit, sha256};

const LEASE: Duration = Duration::from_secs(60);

#[test]
fn a_users_test_freezes_pivots_and_crashes_a_vm_and_finds_its_data() {
    let Some(lab) = Lab::new("library") else { return };
    let (disk, target) = (lab.ext4("data.raw", 32 << 20), lab.path("new.raw"));
    let options = VmOptions::new("library", lab.path(""))
        .binary(TARN)
        .guest_image(guest_image(""))
        .disk("data.raw,id=data")
        .mount("data", "/data", "ext4")
        .patience(limit());
    let mut vm = Vm::launch(&options).unwrap();
    vm.guest().exec("echo precious > /data/file; sync").unwrap();
    let error = vm.guest().exec("cat /data/none").unwrap_err().to_string();
    assert!(error.contains("status 1") && error.contains("No such file"), "{error}");

    // Frozen: a program that writes waits, the image stands still, and nothing else is started.
    let write = "while ! test -e /tmp/go; do :; done; echo late > /data/late; touch /tmp/written";
    vm.guest().exec(&format!("setsid sh -c '{write}' >/dev/null 2>&1 </dev/null & touch /tmp/go")).unwrap();
    let frozen = vm.freeze(LEASE).unwrap();
    assert_eq!(frozen.filesystems(), 1);
    let still = sha256(&disk);
    let error = vm.guest().exec("touch /data/x").unwrap_err().to_string();
    assert!(error.contains("the guest's filesystems are frozen"), "{error}");
    assert_eq!(sha256(&disk), still);
    assert_eq!(frozen.thaw().unwrap(), Consistency::Filesystem);
    vm.guest().exec("while ! test -e /tmp/written; do :; done; sync").unwrap();

    // A freeze that did not last is told from one that did; one that is forgotten ends with its value.
    let mut frozen = vm.freeze(Duration::from_millis(500)).unwrap();
    eventually("the lease to end", || vm.guest().exec("true").ok());
    assert_eq!(frozen.consistency().unwrap(), Consistency::Void);
    assert_eq!(frozen.thaw().unwrap(), Consistency::Void);
    drop(vm.freeze(LEASE).unwrap());

    // Files go in and out; what the VM does not do it says.
    std::fs::write(lab.path("in"), "through the guest").unwrap();
    vm.guest().copy_to(lab.path("in"), "/data/copied").unwrap();
    assert_eq!(vm.guest().copy_from("/data/copied", lab.path("out")).unwrap(), 17);
    assert_eq!(std::fs::read(lab.path("out")).unwrap(), b"through the guest");
    let error = vm.pivot([("nope", &target)]).unwrap_err().to_string();
    assert!(error.contains("The VM has no disk 'nope'; it has data"), "{error}");

    vm.pause().unwrap();
    vm.resume().unwrap();
    vm.backup([("data", lab.path("backup.raw"))]).unwrap();
    let report = vm.operate(&Request { freeze: true, ..Request::pivot([("data", "new.raw")]) }).unwrap();
    assert_eq!((report.outcome, report.consistency), (Outcome::Pivoted, Consistency::Filesystem));
    assert!(report.timeline.held.is_some_and(|held| held < LEASE), "{report:?}");
    assert!(vm.recover().unwrap().operation.is_none());

    // A crash. The same options start it on the disk that took the place of the old one.
    vm.guest().exec("echo after > /data/after; sync").unwrap();
    vm.kill().unwrap();
    assert!(vm.recover().unwrap().operation.is_none(), "nothing was open");
    drop(vm);
    let mut vm = Vm::launch(&options).unwrap();
    assert_eq!(vm.guest().exec("cat /data/file /data/after /data/late").unwrap(), "precious\nafter\nlate");
    assert!(vm.shutdown().unwrap().is_some_and(|status| status.success()));
}
