use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use super::*;

const MOUNTS: &str = "\
22 1 0:2 / / rw - rootfs rootfs rw
27 22 254:0 / /a rw - ext4 /dev/vda rw
28 27 7:0 / /a/lm rw - ext4 /dev/loop0 rw
29 22 254:16 / /x rw - xfs /dev/vdb rw
30 22 254:16 /sub /bx rw - xfs /dev/vdb rw
33 22 254:64 / /v rw - vfat /dev/vde rw
";

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
    log: RefCell<Vec<String>>,
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

impl Kernel for Rc<Machine> {
    type Handle = PathBuf;

    fn mountinfo(&self) -> io::Result<Vec<u8>> {
        let text = self.mountinfo.borrow().clone();
        text.map(String::into_bytes).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
    }

    fn block_device(&self, _: &Path) -> Option<Device> {
        None
    }

    fn open(&self, path: &Path, _: u64) -> io::Result<PathBuf> {
        self.log.borrow_mut().push(format!("open {}", path.display()));
        if self.hidden.borrow().iter().any(|hidden| hidden == path) {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        Ok(path.to_owned())
    }

    fn freeze(&self, path: &PathBuf) -> io::Result<()> {
        self.note("freeze", path);
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

    fn thaw(&self, path: &PathBuf) -> io::Result<()> {
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
    directory: tempfile::TempDir,
}

fn lab() -> Lab {
    let directory = tempfile::tempdir().unwrap();
    let machine = Rc::new(Machine {
        mountinfo: RefCell::new(Some(MOUNTS.into())),
        freeze_errors: RefCell::new([("/v".into(), libc::EOPNOTSUPP)].into()),
        state_file: directory.path().join("qga.state.isfrozen"),
        ..Machine::default()
    });
    let freezer = Freezer::new(Rc::clone(&machine), directory.path());
    Lab { machine, freezer, directory }
}

#[test]
fn all_mounts_are_open_before_the_last_mounted_is_frozen_first() {
    let mut lab = lab();
    assert_eq!(lab.freezer.freeze().unwrap(), 3);
    assert!(lab.freezer.is_frozen());
    let expected = [
        "open /a",
        "open /a/lm",
        "open /x",
        "open /v",
        "freeze /v",
        "freeze /x",
        "freeze /a/lm",
        "freeze /a",
    ];
    assert_eq!(*lab.machine.log.borrow(), expected);
}

#[test]
fn a_thaw_counts_what_was_frozen_and_removes_the_state_file() {
    let mut lab = lab();
    lab.freezer.freeze().unwrap();
    assert!(lab.machine.state_file.exists());
    assert_eq!(lab.freezer.thaw().unwrap(), 3);
    assert!(!lab.freezer.is_frozen());
    assert!(!lab.machine.state_file.exists());
    assert_eq!(lab.freezer.thaw().unwrap(), 0);
}

#[test]
fn the_state_file_exists_while_anything_is_frozen() {
    let mut lab = lab();
    lab.freezer.freeze().unwrap();
    lab.freezer.thaw().unwrap();
    let log = lab.machine.log.borrow();
    assert!(log.iter().all(|line| !line.contains("without state file")), "{log:?}");
}

#[test]
fn what_somebody_else_froze_does_not_count_but_is_thawed() {
    let mut lab = lab();
    lab.machine.frozen.borrow_mut().insert("/x".into(), 1);
    assert_eq!(lab.freezer.freeze().unwrap(), 2);
    assert_eq!(lab.freezer.thaw().unwrap(), 3);
    assert_eq!(lab.machine.frozen(), [""; 0]);
}

#[test]
fn a_mount_that_cannot_be_opened_fails_the_freeze_before_anything_is_frozen() {
    let mut lab = lab();
    lab.machine.hidden.borrow_mut().push("/a/lm".into());
    let error = lab.freezer.freeze().unwrap_err();
    assert_eq!(error.to_string(), "failed to open /a/lm");
    assert!(!lab.freezer.is_frozen() && !lab.machine.state_file.exists());
    assert!(lab.machine.log.borrow().iter().all(|line| line.starts_with("open")));
}

#[test]
fn a_hidden_filesystem_is_reached_by_its_other_mount() {
    let mut lab = lab();
    lab.machine.hidden.borrow_mut().push("/x".into());
    assert_eq!(lab.freezer.freeze().unwrap(), 3);
    assert_eq!(lab.machine.frozen(), ["/a", "/a/lm", "/bx"]);
}

#[test]
fn a_failed_freeze_thaws_everything_and_names_the_filesystem() {
    let mut lab = lab();
    lab.machine.freeze_errors.borrow_mut().insert("/a".into(), libc::EIO);
    let error = lab.freezer.freeze().unwrap_err();
    assert_eq!(error.to_string(), "failed to freeze /a");
    assert_eq!(lab.machine.frozen(), [""; 0]);
    assert!(!lab.freezer.is_frozen() && !lab.machine.state_file.exists());
}

#[test]
fn nothing_to_freeze_is_not_frozen() {
    let mut lab = lab();
    *lab.machine.mountinfo.borrow_mut() = Some("22 1 0:2 / / rw - rootfs rootfs rw\n".into());
    assert_eq!(lab.freezer.freeze().unwrap(), 0);
    assert!(!lab.freezer.is_frozen() && !lab.machine.state_file.exists());
}

#[test]
fn a_new_agent_knows_that_a_former_one_froze_and_thaws_for_it() {
    let Lab { machine, mut freezer, directory } = lab();
    freezer.freeze().unwrap();
    drop(freezer);
    let mut freezer = Freezer::new(Rc::clone(&machine), directory.path());
    assert!(freezer.is_frozen());
    assert_eq!(freezer.thaw().unwrap(), 3);
    assert!(!freezer.is_frozen() && !machine.state_file.exists());
}

#[test]
fn a_stale_state_file_is_cleared_by_a_thaw_of_nothing() {
    let Lab { machine, directory, .. } = lab();
    fs::write(&machine.state_file, "").unwrap();
    let mut freezer = Freezer::new(Rc::clone(&machine), directory.path());
    assert!(freezer.is_frozen());
    assert_eq!(freezer.thaw().unwrap(), 0);
    assert!(!freezer.is_frozen());
}

#[test]
fn a_thaw_depends_on_no_path_and_no_list() {
    let mut lab = lab();
    lab.freezer.freeze().unwrap();
    *lab.machine.mountinfo.borrow_mut() = None;
    assert_eq!(lab.freezer.thaw().unwrap(), 3);
}

#[test]
fn nested_freezes_are_thawed_to_the_ground() {
    let mut lab = lab();
    lab.freezer.freeze().unwrap();
    *lab.machine.frozen.borrow_mut().get_mut(Path::new("/x")).unwrap() = 3;
    assert_eq!(lab.freezer.thaw().unwrap(), 3);
    assert_eq!(lab.machine.frozen(), [""; 0]);
}

#[test]
fn a_filesystem_that_will_not_thaw_keeps_the_agent_frozen_until_it_does() {
    let mut lab = lab();
    lab.freezer.freeze().unwrap();
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
    assert_eq!(lab.freezer.freeze().unwrap_err().to_string(), "failed to open /proc/self/mountinfo");
    assert!(lab.freezer.thaw().is_err());
}
