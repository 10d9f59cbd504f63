//! The run-time directory of a VM: where its sockets are, and whether it lives.
//!
//! ```text
//!  $TARN_RUN_DIR, /run/tarn (root), $XDG_RUNTIME_DIR/tarn, /tmp/tarn-UID
//!    └── NAME/          0700
//!         ├── lock      write-locked (OFD) for as long as the VM's process lives: the only proof of life
//!         ├── pid       the process that holds the lock
//!         ├── monitor.sock  agent.sock  console.sock
//!         ├── config.json   what was started
//!         └── log           of a detached VM
//! ```
//!
//! The kernel drops the lock with the process, so a directory whose lock is free is what a crash left behind: clients
//! do not see it, and the next VM of that name sweeps it out, under the lock, before it binds a socket. The owner
//! removes the directory while it still holds the lock; whoever then gets the lock of a removed directory notices by
//! the inode and starts over.

mod lock;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::config::{ConfigError, MAX_SOCKET_PATH, VmSpec, check_name, check_socket_path};

/// What a directory of ours may contain, the lock apart: removed when the VM ends.
const FILES: [&str; 6] = ["monitor.sock", "agent.sock", "console.sock", "pid", "config.json", "log"];
const LOCK: &str = "lock";
/// How often a vanishing directory is tried again. Each time another VM of that name has come and gone.
const ATTEMPTS: usize = 16;

/// Why there is no run-time directory, or not this VM in it.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// Not a VM name.
    #[error(transparent)]
    Name(#[from] ConfigError),
    /// Sockets would not fit.
    #[error(
        "The run-time directory {dir:?} is too deep: {file} in it would exceed the {MAX_SOCKET_PATH} bytes of a \
         socket path; use a shorter name, or set TARN_RUN_DIR to a shorter directory"
    )]
    TooDeep {
        /// The VM's directory.
        dir: PathBuf,
        /// The file whose path is too long.
        file: &'static str,
    },
    /// One VM per name.
    #[error("A VM named {name} is already running{}; choose another --name, or end it with `tarn kill {name}`", by(.pid))]
    AlreadyRunning {
        /// Its name.
        name: String,
        /// Its process, if the pid file says.
        pid: Option<i32>,
    },
    /// No VM of that name.
    #[error("No VM named {name} is running (`tarn ps` lists them)")]
    NotRunning {
        /// The name.
        name: String,
    },
    /// Someone else's directory in a place that everybody can write to.
    #[error(
        "{dir:?} is not a directory of yours that nobody else can write to; remove it, or set TARN_RUN_DIR"
    )]
    Untrusted {
        /// The base directory.
        dir: PathBuf,
    },
    /// The kernel refused.
    #[error("Cannot {verb} {path:?}")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The directory kept vanishing.
    #[error("VMs named {name} come and go too quickly to start another one")]
    Busy {
        /// The name.
        name: String,
    },
}

fn by(pid: &Option<i32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

fn io_error(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RunDirError + use<> {
    let path = path.to_owned();
    move |source| RunDirError::Io { verb, path, source }
}

/// Where the files of the VM `name` are, whether it runs or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmPaths {
    name: String,
    dir: PathBuf,
}

impl VmPaths {
    /// Of the VM `name` below the base directory of this user.
    ///
    /// # Errors
    /// `name` is no VM name, or socket paths below it would be too long.
    pub fn new(name: &str) -> Result<Self, RunDirError> {
        Self::below(&base(), name)
    }

    fn below(base: &Path, name: &str) -> Result<Self, RunDirError> {
        check_name(name)?;
        let dir = base.join(name);
        if let Some(file) = FILES.into_iter().find(|file| check_socket_path(&dir.join(file)).is_err()) {
            return Err(RunDirError::TooDeep { dir, file });
        }
        Ok(Self { name: name.to_owned(), dir })
    }

    /// The VM's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The QMP monitor's socket.
    pub fn monitor_socket(&self) -> PathBuf {
        self.dir.join("monitor.sock")
    }

    /// The guest agent's socket.
    pub fn agent_socket(&self) -> PathBuf {
        self.dir.join("agent.sock")
    }

    /// The console's socket.
    pub fn console_socket(&self) -> PathBuf {
        self.dir.join("console.sock")
    }

    /// The process id, as text with a newline.
    pub fn pid_file(&self) -> PathBuf {
        self.dir.join("pid")
    }

    /// The [`VmSpec`] that was started.
    pub fn config_file(&self) -> PathBuf {
        self.dir.join("config.json")
    }

    /// Standard output and error of a detached VM.
    pub fn log_file(&self) -> PathBuf {
        self.dir.join("log")
    }

    fn read_pid(&self) -> Option<i32> {
        fs::read_to_string(self.pid_file()).ok()?.trim().parse().ok().filter(|pid| *pid > 0)
    }

    fn is_locked(&self) -> bool {
        // F_OFD_GETLK wants a descriptor that could take the lock, hence the write access.
        let options = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).to_owned();
        options.open(self.dir.join(LOCK)).and_then(|file| lock::is_locked(&file)).unwrap_or(false)
    }

    /// Removes the files of a VM; called by who holds the lock. What cannot be removed now is swept next time.
    fn sweep(&self) {
        for file in FILES {
            let _ = fs::remove_file(self.dir.join(file));
        }
    }
}

/// The run-time directory of this process's own VM: locked, clean, and removed when dropped.
#[derive(Debug)]
pub struct RunDir {
    paths: VmPaths,
    /// Closing it is what ends the VM for everybody else, so it is closed last.
    _lock: File,
}

impl std::ops::Deref for RunDir {
    type Target = VmPaths;

    fn deref(&self) -> &VmPaths {
        &self.paths
    }
}

impl RunDir {
    /// Creates and locks the directory of the VM `name`, sweeps out what a dead VM left there, and writes `pid`.
    ///
    /// # Errors
    /// The name is taken or impossible, or the directory cannot be made.
    pub fn create(name: &str) -> Result<Self, RunDirError> {
        Self::create_in(&base(), name)
    }

    /// [`create`](Self::create) below another base directory.
    ///
    /// # Errors
    /// The same.
    pub fn create_in(base: &Path, name: &str) -> Result<Self, RunDirError> {
        let paths = VmPaths::below(base, name)?;
        make_base(base)?;
        for _ in 0..ATTEMPTS {
            let is_new = make_private(&paths.dir).map_err(io_error("create", &paths.dir))?;
            let path = paths.dir.join(LOCK);
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            let lock = match options.mode(0o600).custom_flags(libc::O_NOFOLLOW).open(&path) {
                Ok(file) => file,
                // Its owner has just removed the directory.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(io_error("open", &path)(error)),
            };
            if !lock::try_lock(&lock).map_err(io_error("lock", &path))? {
                return Err(RunDirError::AlreadyRunning { name: name.to_owned(), pid: paths.read_pid() });
            }
            if same_file(&lock, &path) {
                if !is_new {
                    paths.sweep();
                }
                let dir = Self { paths, _lock: lock };
                dir.write("pid", format!("{}\n", std::process::id()).as_bytes())?;
                return Ok(dir);
            }
        }
        Err(RunDirError::Busy { name: name.to_owned() })
    }

    /// Writes `config.json`, for `tarn ps` and for who wants to start the same VM again.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_config(&self, spec: &VmSpec) -> Result<(), RunDirError> {
        let text = serde_json::to_string_pretty(spec).map_err(io::Error::from);
        self.write("config.json", text.map_err(io_error("write", &self.config_file()))?.as_bytes())
    }

    /// Creates `log`, readable by the user alone.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create_log(&self) -> Result<File, RunDirError> {
        let path = self.log_file();
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o600).open(&path).map_err(io_error("create", &path))
    }

    fn write(&self, file: &str, content: &[u8]) -> Result<(), RunDirError> {
        let path = self.dir.join(file);
        fs::write(&path, content).map_err(io_error("write", &path))
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        self.sweep();
        let _ = fs::remove_file(self.dir.join(LOCK));
        // Fails when someone put a file of his own there: then it stays, and is no VM.
        let _ = fs::remove_dir(&self.dir);
    }
}

/// A VM that another process runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningVm {
    paths: VmPaths,
    /// Its process. Certain only while [`RunningVm::is_alive`]: a dead VM's number may be someone else's.
    pub pid: Option<i32>,
}

impl std::ops::Deref for RunningVm {
    type Target = VmPaths;

    fn deref(&self) -> &VmPaths {
        &self.paths
    }
}

impl RunningVm {
    /// The VM `name`.
    ///
    /// # Errors
    /// It is not running, or `name` is no VM name.
    pub fn open(name: &str) -> Result<Self, RunDirError> {
        Self::open_below(&base(), name)
    }

    fn open_below(base: &Path, name: &str) -> Result<Self, RunDirError> {
        Self::open_at(VmPaths::below(base, name)?)
    }

    fn open_at(paths: VmPaths) -> Result<Self, RunDirError> {
        if !paths.is_locked() {
            return Err(RunDirError::NotRunning { name: paths.name });
        }
        let pid = paths.read_pid();
        Ok(Self { paths, pid })
    }

    /// All VMs of this user, by name.
    ///
    /// # Errors
    /// The base directory cannot be read. That there is none means that there are no VMs.
    pub fn list() -> Result<Vec<Self>, RunDirError> {
        Self::list_below(&base())
    }

    fn list_below(base: &Path) -> Result<Vec<Self>, RunDirError> {
        let entries = match fs::read_dir(base) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io_error("read", base)(error)),
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut vms: Vec<_> = names.filter_map(|name| Self::open_below(base, &name).ok()).collect();
        vms.sort_by(|a, b| a.paths.name.cmp(&b.paths.name));
        Ok(vms)
    }

    /// Looks again: is it still, or again, running?
    ///
    /// # Errors
    /// It is not.
    pub fn again(&self) -> Result<Self, RunDirError> {
        Self::open_at(self.paths.clone())
    }

    /// Whether its process still lives.
    pub fn is_alive(&self) -> bool {
        self.paths.is_locked()
    }

    /// Removes what it left when it was killed. Does nothing if one of its name runs (again).
    pub fn sweep_dead(&self) {
        if let Some(base) = self.dir.parent() {
            // To own the directory for a moment is all it takes.
            drop(RunDir::create_in(base, &self.name));
        }
    }

    /// When it was started.
    pub fn started(&self) -> Option<SystemTime> {
        fs::metadata(self.pid_file()).and_then(|metadata| metadata.modified()).ok()
    }

    /// What was started; `None` while it is not written yet.
    pub fn config(&self) -> Option<VmSpec> {
        serde_json::from_slice(&fs::read(self.config_file()).ok()?).ok()
    }
}

/// Where the directories of this user's VMs are.
pub fn base() -> PathBuf {
    coordinator::run_base()
}

/// Creates the base directory. Below `/tmp` anybody might have done that before us, or made it a symbolic link.
fn make_base(base: &Path) -> Result<(), RunDirError> {
    make_private(base).map_err(io_error("create", base))?;
    let metadata = fs::symlink_metadata(base).map_err(io_error("examine", base))?;
    let ours = metadata.uid() == rustix::process::getuid().as_raw() && metadata.mode() & 0o022 == 0;
    if metadata.is_dir() && ours { Ok(()) } else { Err(RunDirError::Untrusted { dir: base.to_owned() }) }
}

/// Creates a directory, and those above it, with mode 0700; `false` if it exists already.
fn make_private(dir: &Path) -> io::Result<bool> {
    let mut builder = DirBuilder::new();
    builder.mode(0o700);
    match builder.create(dir) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            builder.recursive(true).create(dir).map(|()| true)
        }
        Err(error) => Err(error),
    }
}

fn same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A process that holds the lock of a VM's directory and is no VM.
    pub(crate) struct Stand {
        pub(crate) vm: RunningVm,
        child: Child,
    }

    impl Stand {
        pub(crate) fn start(base: &Path, name: &str) -> Self {
            let paths = VmPaths::below(base, name).unwrap();
            make_private(paths.dir()).unwrap();
            let lock = File::create(paths.dir().join(LOCK)).unwrap();
            assert!(lock::try_lock(&lock).unwrap());
            // Its standard input is the very file that is locked; ours is closed.
            let child = Command::new("sleep").arg("1000").stdin(Stdio::from(lock)).spawn().unwrap();
            fs::write(paths.pid_file(), child.id().to_string()).unwrap();
            Self { vm: RunningVm::open_below(base, name).unwrap(), child }
        }

        /// Waits for its end and tells how it came.
        pub(crate) fn end(mut self) -> String {
            self.child.wait().unwrap().to_string()
        }
    }

    impl Drop for Stand {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn temporary() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn a_directory_is_private_and_gone_with_its_owner() {
        let base = temporary();
        let dir = RunDir::create_in(base.path(), "vm").unwrap();
        let mode = fs::metadata(dir.dir()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        assert_eq!(fs::read_to_string(dir.pid_file()).unwrap(), format!("{}\n", std::process::id()));
        UnixListener::bind(dir.monitor_socket()).unwrap();
        dir.write_config(&VmSpec::default()).unwrap();
        dir.create_log().unwrap();
        drop(dir);
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 0);
    }

    #[test]
    fn one_name_is_one_vm() {
        let base = temporary();
        let _first = RunDir::create_in(base.path(), "vm").unwrap();
        let error = RunDir::create_in(base.path(), "vm").unwrap_err();
        let expected = format!("A VM named vm is already running (process {})", std::process::id());
        assert!(error.to_string().starts_with(&expected), "{error}");
        RunDir::create_in(base.path(), "other").unwrap();
    }

    #[test]
    fn what_a_crash_left_is_swept_and_is_no_vm() {
        let base = temporary();
        let dir = base.path().join("vm");
        fs::create_dir(&dir).unwrap();
        for file in ["lock", "pid", "config.json", "log"] {
            fs::write(dir.join(file), "1\n").unwrap();
        }
        drop(UnixListener::bind(dir.join("monitor.sock")).unwrap());
        assert_eq!(RunningVm::list_below(base.path()).unwrap(), []);
        assert!(matches!(RunningVm::open_below(base.path(), "vm"), Err(RunDirError::NotRunning { .. })));
        let vm = RunDir::create_in(base.path(), "vm").unwrap();
        assert!(!vm.monitor_socket().exists() && !vm.log_file().exists());
        UnixListener::bind(vm.monitor_socket()).unwrap();
    }

    #[test]
    fn running_vms_are_listed_by_name_and_looking_does_not_disturb_them() {
        let base = temporary();
        assert_eq!(RunningVm::list_below(&base.path().join("none")).unwrap(), []);
        fs::create_dir(base.path().join("unrelated")).unwrap();
        let b = RunDir::create_in(base.path(), "b").unwrap();
        let _a = RunDir::create_in(base.path(), "a").unwrap();
        let listed = RunningVm::list_below(base.path()).unwrap();
        assert_eq!(listed.iter().map(|vm| vm.name()).collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(listed[1].pid, i32::try_from(std::process::id()).ok());
        assert!(listed[1].is_alive());
        drop(b);
        assert!(!listed[1].is_alive());
    }

    #[test]
    fn the_files_of_others_survive_the_end_of_a_vm() {
        let base = temporary();
        let dir = RunDir::create_in(base.path(), "vm").unwrap();
        let kept = dir.dir().join("notes.txt");
        fs::write(&kept, "mine").unwrap();
        drop(dir);
        assert!(kept.exists());
        RunDir::create_in(base.path(), "vm").unwrap();
    }

    #[test]
    fn a_vm_that_is_not_there_is_said_to_be_so() {
        let base = temporary();
        let error = RunningVm::open_below(base.path(), "web").unwrap_err().to_string();
        assert_eq!(error, "No VM named web is running (`tarn ps` lists them)");
        assert!(matches!(RunningVm::open_below(base.path(), "../x"), Err(RunDirError::Name(_))));
    }

    #[test]
    fn a_directory_too_deep_for_sockets_is_refused_before_it_is_made() {
        let base = temporary();
        let deep = base.path().join("d".repeat(90));
        let error = RunDir::create_in(&deep, "vm").unwrap_err().to_string();
        assert!(error.contains("TARN_RUN_DIR"), "{error}");
        assert!(!deep.exists());
    }

    #[test]
    fn a_base_that_others_can_write_to_is_refused() {
        let base = temporary();
        let shared = base.path().join("shared");
        fs::create_dir(&shared).unwrap();
        fs::set_permissions(&shared, fs::Permissions::from_mode(0o1777)).unwrap();
        let link = base.path().join("link");
        std::os::unix::fs::symlink(base.path(), &link).unwrap();
        for dir in [shared, link] {
            let result = RunDir::create_in(&dir, "vm");
            assert!(matches!(result, Err(RunDirError::Untrusted { .. })), "{result:?}");
        }
    }
}
