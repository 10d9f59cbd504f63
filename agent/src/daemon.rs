//! Going to the background, without losing the news of a failed start.
//!
//! ```text
//!   parent ── fork ──▶ daemon: new session, umask 077, /
//!     │                  │ log, pid file, channel
//!     ◀──── status ──────┤ ready, or not
//!    exit                │ standard streams to /dev/null
//!                        ▼ serves
//! ```
//!
//! The daemon's threads start behind the fork: only the thread that forks lives on in the child.
#![expect(unsafe_code, reason = "neither std nor rustix has fork")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use rustix::fs::Mode;
use rustix::pipe::{PipeFlags, pipe_with};

/// Who goes on behind the fork.
pub(crate) enum Fork {
    /// Whoever waits for the start: what to tell them.
    Parent(ExitCode),
    Daemon(Daemon),
}

/// The one that the parent waits for.
pub(crate) struct Daemon {
    parent: OwnedFd,
}

const READY: u8 = 0;
const FAILED: u8 = 1;

/// Forks. The parent comes back when the daemon has said how its start went, or has died.
pub(crate) fn fork() -> io::Result<Fork> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    // SAFETY: this process has one thread, so the child may do whatever it likes.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            drop(reader);
            let daemon = Daemon { parent: writer };
            rustix::process::setsid()?;
            rustix::process::umask(Mode::RWXG | Mode::RWXO);
            rustix::process::chdir("/")?;
            Ok(Fork::Daemon(daemon))
        }
        _ => {
            drop(writer);
            let mut status = [FAILED];
            while let Err(rustix::io::Errno::INTR) = rustix::io::read(&reader, &mut status) {}
            Ok(Fork::Parent(ExitCode::from(status[0])))
        }
    }
}

/// Standard streams to nowhere: whoever reads what the agent wrote there sees the end of it.
fn let_go_of_streams() -> io::Result<()> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(rustix::stdio::dup2_stderr(&null)?)
}

impl Daemon {
    /// The start went well: lets the parent go, and the terminal.
    pub(crate) fn ready(self) -> io::Result<()> {
        let_go_of_streams()?;
        self.tell(READY);
        Ok(())
    }

    fn tell(&self, status: u8) {
        // A parent that was killed misses nothing.
        let _ = rustix::io::write(&self.parent, &[status]);
    }
}

impl Drop for Daemon {
    /// Second after `ready`, and then nobody listens.
    fn drop(&mut self) {
        self.tell(FAILED);
    }
}
