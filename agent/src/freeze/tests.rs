use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::rc::Rc;

use serde_json::json;

use super::mounts::Device;
use super::order::Backing;
use super::*;
use crate::watchdog::Inheritance;
use crate::watchdog::testing::Orders;

const MOUNTS: &str = "\
22 1 0:2 / / rw - rootfs rootfs rw
27 22 254:0 / /a rw - ext4 /dev/vda rw
28 27 7:0 / /a/lm rw - ext4 /dev/loop0 rw
29 22 254:16 / /x rw - xfs /dev/vdb rw
30 22 254:16 /sub /bx rw - xfs /dev/vdb rw
33 22 254:64 / /v rw - vfat /dev/vde rw
";

/// What happens while a filesystem is being frozen.
type OnFreeze = Box<dyn Fn(&Path)>;

/// A machine whose filesystems are counters.
#[derive(Default)]
struct Machine {
    mountinfo: RefCell<Option<String>>,
    /// How often each mount point's filesystem is frozen.
    frozen: RefCell<BTreeMap<PathBuf, u32>>,
    /// What FIFREEZE and FITHAW of a mount point say instead of doing it.
    freeze_errors: RefCell<BTreeMap<PathBuf, i32>>,
    thaw_errors: RefCell<BTreeMap<PathBuf, i32>>,
    hidden: RefCell<Vec<PathBuf>>,
    can_uncover: Cell<bool>,
    log: RefCell<Vec<String>>,
    on_freeze: RefCell<Option<OnFreeze>>,
    state_file: PathBuf,
}

impl Machine {
    fn note(&self, what: &str, path: &Path) {
        let exists = if self.state_file.exists() { "" } else { " without state file" };
        self.log.borrow_mut().push(format!("{what} {}{exists}", path.display()));
    }

    fn frozen(&self) -> Vec<String> {
        let frozen = self.frozen.borrow();
        frozen.iter().filter(|(_, count)| **count > 0).map(|(path, _)| path.display().to_string()).collect()
    }
}

/// An open mount point.
#[derive(Debug)]
struct Handle {
    path: PathBuf,
    fd: OwnedFd,
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// As it comes from a watchdog: what it is, nobody knows.
impl From<OwnedFd> for Handle {
    fn from(fd: OwnedFd) -> Self {
        Self { path: PathBuf::from("/x"), fd }
    }
}

impl Kernel for Rc<Machine> {
    type Handle = Handle;

    fn mountinfo(&self) -> io::Result<Vec<u8>> {
        let text = self.mountinfo.borrow().clone();
        text.map(String::into_bytes).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
    }

    fn block_device(&self, _: &Path) -> Option<Device> {
        None
    }

    fn backing(&self, device: Device) -> Vec<Backing> {
        if device == (7, 0) { vec![Backing::File { mount: 27 }] } else { vec![] }
    }

    fn open(&self, path: &Path, _: u64) -> io::Result<Handle> {
        self.log.borrow_mut().push(format!("open {}", path.display()));
        if self.hidden.borrow().iter().any(|hidden| hidden == path) {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        Ok(Handle { path: path.to_owned(), fd: File::open("/dev/null")?.into() })
    }

    fn uncover(&self, superblock: &Superblock) -> io::Result<Handle> {
        if !self.can_uncover.get() {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        let path = superblock.mountpoint().to_owned();
        self.log.borrow_mut().push(format!("uncover {}", path.display()));
        Ok(Handle { path, fd: File::open("/dev/null")?.into() })
    }

    fn sync(&self, Handle { path, .. }: &Handle) -> io::Result<()> {
        self.log.borrow_mut().push(format!("sync {}", path.display()));
        Ok(())
    }

    fn freeze(&self, Handle { path, .. }: &Handle) -> io::Result<()> {
        self.note("freeze", path);
        if let Some(act) = &*self.on_freeze.borrow() {
            act(path);
        }
        if let Some(&number) = self.freeze_errors.borrow().get(path) {
            return Err(io::Error::from_raw_os_error(number));
        }
        let mut frozen = self.frozen.borrow_mut();
        let count = frozen.entry(path.clone()).or_default();
        if *count > 0 {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        *count += 1;
        Ok(())
    }

    fn thaw(&self, Handle { path, .. }: &Handle) -> io::Result<()> {
        self.note("thaw", path);
        if let Some(&number) = self.thaw_errors.borrow().get(path) {
            return Err(io::Error::from_raw_os_error(number));
        }
        match self.frozen.borrow_mut().get_mut(path) {
            Some(count) if *count > 0 => {
                *count -= 1;
                Ok(())
            }
            _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        }
    }
}

struct Lab {
    machine: Rc<Machine>,
    freezer: Freezer<Rc<Machine>>,
    orders: Orders,
    directory: tempfile::TempDir,
}

const LEASE: Duration = Duration::from_secs(60);

fn freezer(
    machine: &Rc<Machine>,
    directory: &Path,
    past: Option<Inheritance>,
) -> (Freezer<Rc<Machine>>, Orders) {
    let (watchdog, orders) = Watchdog::fake();
    let watchdog = (Arc::new(watchdog), past.map_or(Past::Unknown, Past::Left));
    let freezer = Freezer::new(Rc::clone(machine), directory, Hooks::default(), Some(LEASE), watchdog);
    (freezer.unwrap(), orders)
}

impl Lab {
    fn freeze(&mut self) -> Result<u64, FreezeError> {
        self.freezer.freeze(&Selection::default())
    }

    fn report(&self) -> serde_json::Value {
        let report = self.freezer.freezing().report();
        REPORT.check(&report).unwrap();
        report
    }
}

fn lab() -> Lab {
    let directory = tempfile::tempdir().unwrap();
    let machine = Rc::new(Machine {
        mountinfo: RefCell::new(Some(MOUNTS.into())),
        freeze_errors: RefCell::new([("/v".into(), libc::EOPNOTSUPP)].into()),
        state_file: directory.path().join("qga.state.isfrozen"),
        ..Machine::default()
    });
    let (freezer, orders) = freezer(&machine, directory.path(), None);
    Lab { machine, freezer, orders, directory }
}

#[test]
fn all_mounts_are_open_before_the_last_mounted_is_frozen_first() {
    let mut lab = lab();
    assert_eq!(lab.freeze().unwrap(), 3);
    assert!(lab.freezer.is_frozen());
    let order = ["/v", "/x", "/a/lm", "/a"];
    let steps = ["open", "sync", "freeze"];
    let expected: Vec<String> =
        steps.iter().flat_map(|step| order.map(|mountpoint| format!("{step} {mountpoint}"))).collect();
    assert_eq!(*lab.machine.log.borrow(), expected);
    let orders = [
        "Begin { number: 1, hooks: false }",
        "Hold /v",
        "Hold /x",
        "Hold /a/lm",
        "Hold /a",
        "Arm { lease: Some(60s), left: Some(60s) }",
    ];
    assert_eq!(lab.orders.take(), orders);
}

#[test]
fn a_thaw_counts_what_was_frozen_and_removes_the_state_file() {
    let mut lab = lab();
    lab.freeze().unwrap();
    assert!(lab.machine.state_file.exists());
    assert_eq!(lab.freezer.thaw().unwrap(), 3);
    assert!(!lab.freezer.is_frozen());
    assert!(!lab.machine.state_file.exists());
    assert_eq!(lab.freezer.thaw().unwrap(), 0);
}

#[test]
fn the_state_file_exists_while_anything_is_frozen() {
    let mut lab = lab();
    lab.freeze().unwrap();
    lab.freezer.thaw().unwrap();
    let log = lab.machine.log.borrow();
    assert!(log.iter().all(|line| !line.contains("without state file")), "{log:?}");
}

#[test]
fn what_somebody_else_froze_does_not_count_but_is_thawed() {
    let mut lab = lab();
    lab.machine.frozen.borrow_mut().insert("/x".into(), 1);
    assert_eq!(lab.freeze().unwrap(), 2);
    assert_eq!(lab.freezer.thaw().unwrap(), 3);
    assert_eq!(lab.machine.frozen(), [""; 0]);
}

#[test]
fn a_mount_that_cannot_be_opened_fails_the_freeze_before_anything_is_frozen() {
    let mut lab = lab();
    lab.machine.hidden.borrow_mut().push("/a/lm".into());
    let error = lab.freeze().unwrap_err();
    assert_eq!(error.to_string(), "failed to open /a/lm");
    assert!(!lab.freezer.is_frozen() && !lab.machine.state_file.exists());
    assert!(lab.machine.log.borrow().iter().all(|line| line.starts_with("open")));
}

#[test]
fn a_hidden_filesystem_is_reached_by_its_other_mount() {
    let mut lab = lab();
    lab.machine.hidden.borrow_mut().push("/x".into());
    assert_eq!(lab.freeze().unwrap(), 3);
    assert_eq!(lab.machine.frozen(), ["/a", "/a/lm", "/bx"]);
}

#[test]
fn a_failed_freeze_thaws_everything_and_names_the_filesystem() {
    let mut lab = lab();
    lab.machine.freeze_errors.borrow_mut().insert("/a".into(), libc::EIO);
    let error = lab.freeze().unwrap_err();
    assert_eq!(error.to_string(), "failed to freeze /a");
    assert_eq!(lab.machine.frozen(), [""; 0]);
    assert!(!lab.freezer.is_frozen() && !lab.machine.state_file.exists());
}

#[test]
fn nothing_to_freeze_is_not_frozen() {
    let mut lab = lab();
    *lab.machine.mountinfo.borrow_mut() = Some("22 1 0:2 / / rw - rootfs rootfs rw\n".into());
    assert_eq!(lab.freeze().unwrap(), 0);
    assert!(!lab.freezer.is_frozen() && !lab.machine.state_file.exists());
}

#[test]
fn a_new_agent_knows_that_a_former_one_froze_and_thaws_for_it() {
    let mut lab = lab();
    lab.freeze().unwrap();
    let Lab { machine, directory, freezer: former, .. } = lab;
    drop(former);
    let (mut freezer, orders) = freezer(&machine, directory.path(), None);
    assert!(freezer.is_frozen());
    let orders = orders.take();
    assert!(orders.iter().any(|order| order == "Hold /x"), "{orders:?}");
    assert!(orders.last().unwrap().starts_with("Arm { lease: Some("), "{orders:?}");
    assert_eq!(freezer.thaw().unwrap(), 3);
    assert!(!freezer.is_frozen() && !machine.state_file.exists());
}

#[test]
fn a_stale_state_file_is_cleared_by_a_thaw_of_nothing() {
    let Lab { machine, directory, .. } = lab();
    fs::write(&machine.state_file, "").unwrap();
    let (mut freezer, _orders) = freezer(&machine, directory.path(), None);
    assert!(freezer.is_frozen());
    assert_eq!(freezer.thaw().unwrap(), 0);
    assert!(!freezer.is_frozen());
}

#[test]
fn a_thaw_depends_on_no_path_and_no_list() {
    let mut lab = lab();
    lab.freeze().unwrap();
    *lab.machine.mountinfo.borrow_mut() = None;
    assert_eq!(lab.freezer.thaw().unwrap(), 3);
}

#[test]
fn nested_freezes_are_thawed_to_the_ground() {
    let mut lab = lab();
    lab.freeze().unwrap();
    *lab.machine.frozen.borrow_mut().get_mut(Path::new("/x")).unwrap() = 3;
    assert_eq!(lab.freezer.thaw().unwrap(), 3);
    assert_eq!(lab.machine.frozen(), [""; 0]);
}

#[test]
fn a_filesystem_that_will_not_thaw_keeps_the_agent_frozen_until_it_does() {
    let mut lab = lab();
    lab.freeze().unwrap();
    lab.machine.thaw_errors.borrow_mut().insert("/x".into(), libc::EIO);
    assert_eq!(lab.freezer.thaw().unwrap_err().to_string(), "failed to thaw /x");
    assert!(lab.freezer.is_frozen() && lab.machine.state_file.exists());
    lab.machine.thaw_errors.borrow_mut().clear();
    assert_eq!(lab.freezer.thaw().unwrap(), 1);
    assert!(!lab.freezer.is_frozen());
}

#[test]
fn without_a_mount_list_nothing_is_claimed() {
    let mut lab = lab();
    *lab.machine.mountinfo.borrow_mut() = None;
    assert_eq!(lab.freeze().unwrap_err().to_string(), "failed to open /proc/self/mountinfo");
    assert!(lab.freezer.thaw().is_err());
}

#[test]
fn a_filesystem_to_which_no_path_leads_is_uncovered() {
    let mut lab = lab();
    lab.machine.hidden.borrow_mut().push("/a/lm".into());
    lab.machine.can_uncover.set(true);
    assert_eq!(lab.freeze().unwrap(), 3);
    assert!(lab.machine.log.borrow().contains(&"uncover /a/lm".to_owned()));
}

#[test]
fn a_list_selects_filesystems_by_any_of_their_mounts() {
    for (list, count) in
        [(vec!["/bx"], 1), (vec!["/nope"], 0), (vec![], 0), (vec!["/v"], 0), (vec!["/x", "/a"], 2)]
    {
        let mut lab = lab();
        let mountpoints = Some(list.iter().map(PathBuf::from).collect());
        assert_eq!(lab.freezer.freeze(&Selection { mountpoints, lease: None }).unwrap(), count, "{list:?}");
        assert_eq!(lab.freezer.is_frozen(), count > 0);
        assert_eq!(lab.freezer.thaw().unwrap(), count);
    }
}

#[test]
fn the_lease_is_what_the_client_asks_for_and_zero_is_none() {
    for (asked, armed) in [(None, "Some(60s)"), (Some(5), "Some(5s)"), (Some(0), "None")] {
        let mut lab = lab();
        let lease = asked.map(Duration::from_secs);
        lab.freezer.freeze(&Selection { mountpoints: None, lease }).unwrap();
        let orders = lab.orders.take();
        assert_eq!(orders.last().unwrap(), &format!("Arm {{ lease: {armed}, left: {armed} }}"));
        assert_eq!(lab.report()["lease-ms"], asked.unwrap_or(60) * 1000);
    }
}

#[test]
fn the_report_tells_what_became_of_each_filesystem() {
    let mut lab = lab();
    lab.machine.frozen.borrow_mut().insert("/x".into(), 1);
    lab.freeze().unwrap();
    let report = lab.report();
    let of = |report: &serde_json::Value, member: &str| -> Vec<String> {
        let filesystems = report["filesystems"].as_array().unwrap().iter();
        filesystems.map(|filesystem| filesystem[member].as_str().unwrap_or("-").to_owned()).collect()
    };
    assert_eq!(of(&report, "mountpoint"), ["/v", "/x", "/a/lm", "/a"]);
    assert_eq!(of(&report, "outcome"), ["unsupported", "busy", "frozen", "frozen"]);
    assert_eq!((&report["state"], &report["void"]), (&json!("frozen"), &json!(false)));
    assert_eq!(report["not-frozen"], json!([{"mountpoint": "/v", "type": "vfat"}]));
    lab.machine.frozen.borrow_mut().insert("/a".into(), 0);
    lab.freezer.thaw().unwrap();
    let report = lab.report();
    assert_eq!(of(&report, "thaw"), ["-", "-", "thawed", "was-not-frozen"]);
    assert_eq!((&report["thawed-by"], &report["void"]), (&json!("command"), &json!(true)));
}

#[test]
fn what_the_watchdog_thawed_is_void_and_over() {
    let mut lab = lab();
    lab.freeze().unwrap();
    lab.machine.frozen.borrow_mut().values_mut().for_each(|count| *count = 0);
    assert_eq!(lab.freezer.thaw_for(Cause::Lease).unwrap(), 0);
    assert!(!lab.freezer.is_frozen() && !lab.machine.state_file.exists());
    let report = lab.report();
    assert_eq!((&report["thawed-by"], &report["void"]), (&json!("lease"), &json!(true)));
    assert_eq!(lab.freezer.thaw().unwrap(), 0);
    let orders = lab.orders.take();
    assert_eq!(orders[orders.len() - 3..], ["Thawed(Lease)", "End", "End"]);
}

#[test]
fn a_cancelled_freeze_stops_where_it_is_and_thaws() {
    let mut lab = lab();
    let freezing = Arc::clone(lab.freezer.freezing());
    *lab.machine.on_freeze.borrow_mut() = Some(Box::new(move |path| {
        if path == Path::new("/x") {
            assert!(freezing.cancel("Enough").is_some());
        }
    }));
    assert_eq!(lab.freeze().unwrap_err().to_string(), "Enough");
    assert_eq!(lab.machine.frozen(), [""; 0]);
    assert!(!lab.machine.log.borrow().iter().any(|line| line.starts_with("freeze /a")));
    assert!(!lab.freezer.is_frozen() && !lab.machine.state_file.exists());
    *lab.machine.on_freeze.borrow_mut() = None;
    assert_eq!(lab.freeze().unwrap(), 3, "the next freeze is another one");
}

#[test]
fn a_freeze_without_a_watchdog_does_not_begin() {
    let mut lab = lab();
    let Lab { machine, directory, .. } = &mut lab;
    let (mut freezer, orders) = freezer(machine, directory.path(), None);
    drop(orders);
    let error = freezer.freeze(&Selection::default()).unwrap_err();
    assert_eq!(error.text(), "failed to arm the watchdog: Broken pipe");
    assert!(!freezer.is_frozen() && lab.machine.log.borrow().is_empty());
}

#[test]
fn an_agent_that_returns_goes_on_with_what_its_watchdog_held() {
    let lab = lab();
    lab.machine.frozen.borrow_mut().insert("/x".into(), 1);
    fs::write(&lab.machine.state_file, "").unwrap();
    let label =
        Label { mountpoint: "/x".into(), identity: (254, 16), device: (254, 16), fstype: "xfs".into() };
    let handover = |thawed| crate::watchdog::Handover {
        number: 3,
        armed: true,
        lease: Some(LEASE),
        left: Some(LEASE / 2),
        hooks: false,
        thawed,
    };
    let inheritance = |thawed| {
        let fd = File::open("/dev/null").unwrap().into();
        Inheritance { handover: handover(thawed), held: vec![(label.clone(), fd)] }
    };
    let (mut returned, _orders) = freezer(&lab.machine, lab.directory.path(), Some(inheritance(None)));
    assert!(returned.is_frozen());
    assert!(returned.freezing().report()["lease-left-ms"].as_u64().unwrap() <= 30_000);
    assert_eq!(returned.thaw().unwrap(), 1);
    assert_eq!(lab.machine.frozen(), [""; 0]);
    let too_late = Some(inheritance(Some(Cause::AgentLost)));
    let (mut returned, orders) = freezer(&lab.machine, lab.directory.path(), too_late);
    assert!(returned.is_frozen(), "the rest is the worker's to do");
    assert_eq!(returned.unfinished(), Some(Cause::AgentLost));
    assert_eq!(returned.thaw_for(Cause::AgentLost).unwrap(), 0);
    assert!(!returned.is_frozen() && !lab.machine.state_file.exists());
    assert_eq!(returned.freezing().number(), 3, "it is the same freeze");
    let report = returned.freezing().report();
    assert_eq!((&report["thawed-by"], &report["void"]), (&json!("agent-lost"), &json!(true)));
    assert_eq!(orders.take().last().unwrap(), "End");
}

#[test]
fn a_cancel_that_comes_when_everything_is_frozen_is_in_time_or_finds_the_freeze_complete() {
    let mut lab = lab();
    let freezing = Arc::clone(lab.freezer.freezing());
    // The last one.
    *lab.machine.on_freeze.borrow_mut() = Some(Box::new(move |path| {
        if path == Path::new("/a") {
            freezing.cancel("Enough");
        }
    }));
    assert_eq!(lab.freeze().unwrap_err().to_string(), "Enough");
    assert_eq!(lab.machine.frozen(), [""; 0]);
    *lab.machine.on_freeze.borrow_mut() = None;
    assert_eq!(lab.freeze().unwrap(), 3);
    assert!(lab.freezer.freezing().cancel("Too late").is_none());
    assert!(lab.freezer.is_frozen());
}

#[test]
fn a_new_watchdog_is_told_of_what_is_frozen_with_what_is_left_of_the_lease() {
    let mut lab = lab();
    let (watchdog, orders) = Watchdog::fake();
    lab.freezer.freezing().rearm(&watchdog).unwrap();
    assert_eq!(orders.take(), [""; 0], "nothing is frozen");
    lab.freeze().unwrap();
    lab.freezer.freezing().rearm(&watchdog).unwrap();
    let told = orders.take();
    assert_eq!(told[..5], lab.orders.take()[..5]);
    assert!(told[5].starts_with("Arm { lease: Some(60s), left: Some(5"), "{}", told[5]);
    lab.freezer.thaw().unwrap();
    lab.freezer.freezing().rearm(&watchdog).unwrap();
    assert_eq!(orders.take(), [""; 0]);
}

#[test]
fn a_freeze_that_nobody_watched_over_is_void() {
    let lab = lab();
    fs::write(&lab.machine.state_file, "").unwrap();
    let (mut freezer, _orders) = freezer(&lab.machine, lab.directory.path(), None);
    freezer.thaw().unwrap();
    assert_eq!(freezer.freezing().report()["void"], json!(true));
}
