//! What to start: the arguments of `tarn run`, and where its files go.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::state_dir::{StateDir, StateDirError};

/// How long a VM may take to boot until its agent answers: generous, for an emulated machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A VM to launch.
///
/// Everything of the VM is below one directory, so that tests do not meet each other, nor the VMs of the user:
///
/// ```text
///   DIRECTORY/
///     ├── run/NAME/       sockets: keep DIRECTORY short, a socket's path has 107 bytes at most
///     ├── state/NAME/     journal, durable configuration: on a disk, operations refuse a tmpfs
///     ├── NAME.console    what the guest printed, of all launches
///     └── NAME.log        what the VMM said, of all launches
/// ```
///
/// ```
/// use coordinator::VmOptions;
///
/// let options = VmOptions::new("db", "/var/tmp/db-test")
///     .disk("data.raw,id=data")
///     .mount("data", "/data", "ext4")
///     .memory("1G");
/// let flags = "--disk path=/var/tmp/db-test/data.raw,id=data --mount data:/data:ext4 --memory 1G";
/// assert_eq!(options.arguments().join(" ".as_ref()), format!("run --name db {flags}").as_str());
/// ```
#[derive(Clone, Debug)]
pub struct VmOptions {
    name: String,
    directory: PathBuf,
    run: Option<PathBuf>,
    state: Option<PathBuf>,
    binary: PathBuf,
    guest_image: Option<PathBuf>,
    arguments: Vec<OsString>,
    patience: Duration,
    has_agent: bool,
}

impl VmOptions {
    /// A VM called `name`, whose files are below `directory`: it is made if need be, and never removed.
    pub fn new(name: impl Into<String>, directory: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            directory: directory.into(),
            run: None,
            state: None,
            binary: "tarn".into(),
            guest_image: None,
            arguments: vec![],
            patience: PATIENCE,
            has_agent: true,
        }
    }

    /// The `tarn` to start, instead of the one in `PATH`.
    #[must_use]
    pub fn binary(mut self, path: impl Into<PathBuf>) -> Self {
        self.binary = path.into();
        self
    }

    /// The directory of the guest image, instead of the usual one (`TARN_GUEST_IMAGE`).
    #[must_use]
    pub fn guest_image(mut self, directory: impl Into<PathBuf>) -> Self {
        self.guest_image = Some(directory.into());
        self
    }

    /// Sockets go below this directory (`TARN_RUN_DIR`).
    #[must_use]
    pub fn run_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.run = Some(directory.into());
        self
    }

    /// Journals go below this directory (`TARN_STATE_DIR`).
    #[must_use]
    pub fn state_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.state = Some(directory.into());
        self
    }

    /// One more disk, as `tarn run --disk` takes it: `PATH` or `PATH,id=…,ro,…`. A relative path is one below the VM's
    /// directory.
    #[must_use]
    pub fn disk(self, disk: impl AsRef<Path>) -> Self {
        let disk = disk.as_ref().as_os_str().as_bytes();
        let path = disk.strip_prefix(b"path=").unwrap_or(disk);
        if path.starts_with(b"/") {
            return self.flag("--disk", OsStr::from_bytes(disk));
        }
        // What a comma is in a path: two.
        let mut below = Vec::new();
        for &byte in self.directory.as_os_str().as_bytes() {
            below.extend_from_slice(if byte == b',' { b",," } else { std::slice::from_ref(&byte) });
        }
        // As the long form: it does not matter then what a path looks like.
        let below = [b"path=", below.as_slice(), b"/", path].concat();
        self.flag("--disk", OsString::from_vec(below))
    }

    /// Mounts a disk, by its id or guest device, in the guest image.
    #[must_use]
    pub fn mount(self, disk: &str, directory: &str, filesystem: &str) -> Self {
        self.flag("--mount", format!("{disk}:{directory}:{filesystem}"))
    }

    /// Guest memory, as in `512M` or `2G`.
    #[must_use]
    pub fn memory(self, size: &str) -> Self {
        self.flag("--memory", size)
    }

    /// vCPUs, 1 to 32.
    #[must_use]
    pub fn cpus(self, count: u8) -> Self {
        self.flag("--cpus", count.to_string())
    }

    /// A kernel of one's own, with an initial RAM disk. If there is no agent in it, say [`without_agent`](Self::without_agent).
    #[must_use]
    pub fn kernel(self, kernel: impl AsRef<Path>, initrd: Option<&Path>) -> Self {
        let options = self.flag("--kernel", kernel.as_ref().as_os_str());
        match initrd {
            Some(initrd) => options.flag("--initrd", initrd.as_os_str()),
            None => options,
        }
    }

    /// Any other flag of `tarn run` with its value.
    #[must_use]
    pub fn flag(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.arguments.extend([name.into(), value.into()]);
        self
    }

    /// Any other argument of `tarn run`.
    #[must_use]
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// How long a launch may take (120 s if not said).
    #[must_use]
    pub fn patience(mut self, limit: Duration) -> Self {
        self.patience = limit;
        self
    }

    /// There is no agent in the guest: a launch is over when the monitor answers.
    #[must_use]
    pub fn without_agent(mut self) -> Self {
        self.has_agent = false;
        self
    }

    /// The arguments of `tarn`.
    pub fn arguments(&self) -> Vec<OsString> {
        let first = ["run".into(), "--name".into(), self.name.clone().into()];
        first.into_iter().chain(self.arguments.iter().cloned()).collect()
    }

    /// The VM's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the guest prints.
    pub fn console_file(&self) -> PathBuf {
        self.directory.join(format!("{}.console", self.name))
    }

    /// What the VMM says.
    pub fn log_file(&self) -> PathBuf {
        self.directory.join(format!("{}.log", self.name))
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn run_base(&self) -> PathBuf {
        self.run.clone().unwrap_or_else(|| self.directory.join("run"))
    }

    fn state_base(&self) -> PathBuf {
        self.state.clone().unwrap_or_else(|| self.directory.join("state"))
    }

    pub(super) fn state(&self) -> Result<StateDir, StateDirError> {
        StateDir::below(&self.state_base(), &self.name)
    }

    pub(super) fn limit(&self) -> Duration {
        self.patience
    }

    pub(super) fn expects_agent(&self) -> bool {
        self.has_agent
    }

    pub(super) fn program(&self) -> &Path {
        &self.binary
    }

    /// `tarn ARGUMENTS…`, with this VM in sight.
    pub(super) fn command(&self, arguments: impl IntoIterator<Item = OsString>) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments).env("TARN_RUN_DIR", self.run_base()).env("TARN_STATE_DIR", self.state_base());
        if let Some(image) = &self.guest_image {
            command.env("TARN_GUEST_IMAGE", image);
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_disk_is_in_the_vms_directory() {
        let disk = |directory: &str, disk: &str| {
            let arguments = VmOptions::new("vm", directory).disk(disk).arguments();
            arguments.last().and_then(|last| last.to_str().map(str::to_owned)).unwrap()
        };
        assert_eq!(disk("/tests/db", "data.raw,id=data"), "path=/tests/db/data.raw,id=data");
        assert_eq!(disk("/tests/a,b", "path=data,,1.raw"), "path=/tests/a,,b/data,,1.raw");
        for absolute in ["/images/data.raw,ro", "path=/images/data.raw"] {
            assert_eq!(disk("/tests/db", absolute), absolute);
        }
    }
}
