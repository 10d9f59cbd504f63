//! The process of a VM that was launched here: started, watched, and never left behind.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::guest::file;
use super::{VmError, VmOptions};

/// How much of a log an error quotes, in bytes.
const TAIL: u64 = 2000;

#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    /// Readable once the process has ended.
    pidfd: OwnedFd,
    status: Option<ExitStatus>,
    /// Where its part of the log begins.
    log_start: u64,
    pub(super) options: VmOptions,
}

impl Process {
    pub(super) fn start(options: &VmOptions) -> Result<Self, VmError> {
        let directory = options.directory();
        fs::create_dir_all(directory).map_err(file("create", directory))?;
        let (console, log) = (append(&options.console_file())?, append(&options.log_file())?);
        let log_start = log.metadata().map_err(file("examine", &options.log_file()))?.len();
        let mut command = options.command(options.arguments());
        command.stdin(Stdio::null()).stdout(console).stderr(log);
        let start = |cause| VmError::Start { binary: options.program().to_owned(), cause };
        let mut child = command.spawn().map_err(start)?;
        // It cannot be anybody else: the child is not reaped before this.
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Self { child, pidfd, status: None, log_start, options: options.clone() }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(start(error.into()))
            }
        }
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it does within `limit`.
    pub(super) fn wait(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            let timeout = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => self.status = self.child.try_wait()?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.status)
    }

    /// Whether it has ended, as far as that is known; after a kill it is.
    pub(super) fn status(&mut self) -> Option<ExitStatus> {
        self.wait(Duration::ZERO).ok().flatten()
    }

    /// Ends it as a crash would.
    pub(super) fn kill(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        self.child.kill()?;
        let status = self.child.wait()?;
        self.status = Some(status);
        Ok(status)
    }

    /// That it has ended, as an error that quotes its log.
    pub(super) fn ended(&self, status: ExitStatus) -> VmError {
        let log = self.options.log_file();
        let tail = tail(&log, self.log_start).unwrap_or_default();
        VmError::Ended { name: self.options.name().to_owned(), status, log, tail }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

fn append(path: &Path) -> Result<File, VmError> {
    OpenOptions::new().append(true).create(true).open(path).map_err(file("open", path))
}

fn tail(path: &Path, start: u64) -> io::Result<String> {
    let mut log = File::open(path)?;
    let start = log.metadata()?.len().saturating_sub(TAIL).max(start);
    log.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    log.take(TAIL).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
}
