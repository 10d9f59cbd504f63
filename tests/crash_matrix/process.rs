//! Processes of a run: this program again, in another role; and the gate where they wait to be killed.

use std::fs::File;
use std::io::{self, BufRead, BufReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::setup::Setup;

/// Longer than anything takes here, on a machine that is busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// For a guest that may be held.
const MOMENT: Duration = Duration::from_millis(40);

/// A child. Dropping it kills it.
pub(crate) struct Process {
    child: Child,
    pidfd: OwnedFd,
    output: Option<BufReader<std::process::ChildStdout>>,
    /// Answers to come.
    due: usize,
}

impl Process {
    /// This program as `role`, with places armed; what it complains about goes to a file of that name.
    pub(crate) fn start(setup: &Setup, role: &str, armed: &str) -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        let complaints = File::options().create(true).append(true).open(setup.directory.join(role))?;
        let text = serde_json::to_string(setup).map_err(io::Error::other)?;
        command.args([role, &text]).env("TARN_FAILPOINT", armed).env("TARN_FAILPOINT_GATE", setup.gate());
        command.env("TARN_FAILPOINT_LOG", setup.directory.join(format!("{role}.places")));
        if let Some(mistake) = setup.mistake {
            command.env("TARN_MISTAKE", mistake.name());
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(complaints);
        let mut child = command.spawn()?;
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let output = child.stdout.take().map(BufReader::new);
        Ok(Self { child, pidfd, output, due: 0 })
    }

    /// The next line of its output. An error: it has ended, or says nothing.
    pub(crate) fn line(&mut self) -> io::Result<String> {
        let output = self.output.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        let mut line = String::new();
        if output.buffer().is_empty() && !is_readable(&[output.get_ref().as_fd()], PATIENCE)?[0] {
            return Err(io::ErrorKind::TimedOut.into());
        }
        output.read_line(&mut line)?;
        if line.is_empty() {
            Err(io::ErrorKind::UnexpectedEof.into())
        } else {
            Ok(line.trim_end().to_owned())
        }
    }

    /// Asks it something, and waits for the answer.
    pub(crate) fn ask(&mut self, line: &str) -> io::Result<()> {
        self.tell(line)?;
        while self.due > 0 {
            self.line()?;
            self.due -= 1;
        }
        Ok(())
    }

    /// Asks it something, and waits for a moment.
    pub(crate) fn prod(&mut self, line: &str) -> io::Result<()> {
        self.tell(line)?;
        let output = self.output.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        is_readable(&[output.get_ref().as_fd()], MOMENT).map(drop)
    }

    fn tell(&mut self, line: &str) -> io::Result<()> {
        let input = self.child.stdin.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        self.due += 1;
        writeln!(input, "{line}")
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end; whether it has ended well. An error: it goes on.
    pub(crate) fn end(&mut self) -> io::Result<bool> {
        if !is_readable(&[self.pidfd.as_fd()], PATIENCE)?[0] {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(self.child.wait()?.success())
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Where processes wait.
pub(crate) struct Gate(UnixListener);

/// Somebody at the gate; it goes on when this is dropped.
pub(crate) struct Waiting {
    _stream: UnixStream,
    pub(crate) place: String,
}

impl Gate {
    pub(crate) fn new(setup: &Setup) -> io::Result<Self> {
        Ok(Self(UnixListener::bind(setup.gate())?))
    }

    /// Waits until somebody is at the gate, or until `process` has ended.
    pub(crate) fn await_arrival(&self, process: &Process) -> io::Result<Option<Waiting>> {
        let ready = is_readable(&[self.0.as_fd(), process.pidfd.as_fd()], PATIENCE)?;
        match ready[..] {
            [true, _] => self.accept().map(Some),
            [_, true] => Ok(None),
            _ => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Lets everybody pass from now on, until what is returned is dropped: recovery, too, may come to the place.
    pub(crate) fn open(self) -> io::Result<PipeWriter> {
        let (closed, open) = io::pipe()?;
        thread::spawn(move || {
            while let Ok(ready) = is_readable(&[self.0.as_fd(), closed.as_fd()], PATIENCE) {
                match ready[..] {
                    [_, true] => return,
                    [true, _] => drop(self.accept()),
                    _ => {}
                }
            }
        });
        Ok(open)
    }

    fn accept(&self) -> io::Result<Waiting> {
        let (mut stream, _) = self.0.accept()?;
        let mut place = Vec::new();
        let mut byte = [0];
        while stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
            place.push(byte[0]);
        }
        Ok(Waiting { _stream: stream, place: String::from_utf8_lossy(&place).into_owned() })
    }
}

/// Which of these can be read, or have ended; none of them after `limit`.
fn is_readable(fds: &[std::os::fd::BorrowedFd<'_>], limit: Duration) -> io::Result<Vec<bool>> {
    let deadline = Instant::now() + limit;
    loop {
        let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut polled, Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            polled_fds => {
                polled_fds?;
                return Ok(polled.iter().map(|fd| !fd.revents().is_empty()).collect());
            }
        }
    }
}
