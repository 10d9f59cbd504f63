//! Standard input and output of a foreground VM, without ever blocking the control loop.
//!
//! The descriptors are shared with the user's shell, so they are not made non-blocking. A terminal is opened once more
//! for that; a pipe is written only when epoll says so, and only as much as then fits for certain. Files and /dev/null
//! cannot be polled: they are always ready.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::event_loop::{Interest, Token, Watch};
use crate::terminal::{EscapeFilter, RawMode, Typed};

/// Output held for a slow terminal before some is lost.
const OUTPUT_MAX: usize = 1 << 20;
/// What a writable pipe takes without waiting (PIPE_BUF).
const PIPE_CHUNK: usize = 4096;

/// What came in.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// For the guest.
    Bytes(Vec<u8>),
    /// The user wants to leave.
    Leave,
    /// Nothing will come any more.
    End,
}

/// The terminal of a foreground VM. Dropped, it is as it was.
pub struct TerminalIo {
    raw: Option<RawMode>,
    filter: Option<EscapeFilter>,
    /// Duplicates of standard input and output: std's own buffer.
    input: File,
    output: File,
    input_ended: bool,
    /// Whether the input can be polled.
    input_polls: bool,
    pending: VecDeque<u8>,
    output_polls: bool,
}

impl TerminalIo {
    /// Takes the terminal over: raw if it is one.
    ///
    /// # Errors
    ///
    /// The mode cannot be set.
    pub fn attach() -> io::Result<Self> {
        let raw = RawMode::enter()?;
        let filter = raw.is_some().then(EscapeFilter::default);
        let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let output = match own_terminal() {
            Some(terminal) => terminal,
            None => File::from(io::stdout().as_fd().try_clone_to_owned()?),
        };
        Ok(Self {
            raw,
            filter,
            input_ended: false,
            input_polls: polls(&input),
            pending: VecDeque::new(),
            output_polls: polls(&output),
            input,
            output,
        })
    }

    /// Gives the terminal back until the user continues the process (SIGTSTP).
    pub fn suspend(&self) {
        if let Some(raw) = &self.raw {
            raw.suspend();
        }
    }

    /// Whether keys are passed through one by one.
    pub fn is_raw(&self) -> bool {
        self.raw.is_some()
    }

    /// Waits for input, or stops waiting while the guest does not take it.
    pub fn watch_input(&mut self, wanted: bool, watch: &mut dyn Watch) {
        if !self.input_polls {
            return;
        }
        let fd = self.input.as_raw_fd();
        if wanted && !self.input_ended {
            watch.set(fd, Token::Stdin, Interest::READ);
        } else {
            watch.remove(fd);
        }
    }

    /// Whether input is there that epoll will never tell of.
    pub fn has_silent_input(&self) -> bool {
        !self.input_polls && !self.input_ended
    }

    /// Reads what was typed, at most `room` bytes.
    pub fn read(&mut self, room: usize, watch: &mut dyn Watch) -> Input {
        if room == 0 {
            self.watch_input(false, watch);
            return Input::Bytes(vec![]);
        }
        let mut buffer = vec![0; room.min(4096)];
        let len = match self.input.read(&mut buffer) {
            Ok(0) => return self.end(watch),
            Ok(len) => len,
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => 0,
            Err(error) => {
                tracing::debug!(%error, "Standard input failed");
                return self.end(watch);
            }
        };
        let typed = &buffer[..len];
        let Some(filter) = &mut self.filter else { return Input::Bytes(typed.to_vec()) };
        let mut bytes = Vec::with_capacity(len);
        match filter.pass(typed, &mut bytes) {
            Typed::More => Input::Bytes(bytes),
            Typed::Leave => Input::Leave,
        }
    }

    fn end(&mut self, watch: &mut dyn Watch) -> Input {
        self.input_ended = true;
        self.watch_input(false, watch);
        Input::End
    }

    /// Shows what the guest printed.
    pub fn print(&mut self, bytes: &[u8], watch: &mut dyn Watch) {
        if self.pending.len() + bytes.len() > OUTPUT_MAX {
            self.pending.clear();
            self.pending.extend(b"\r\n[tarn: console output lost, the reader is too slow]\r\n");
        }
        self.pending.extend(bytes);
        if self.output_polls {
            watch.set(self.output.as_raw_fd(), Token::Stdout, Interest::WRITE);
        } else {
            self.finish();
        }
    }

    /// Standard output takes more.
    pub fn writable(&mut self, watch: &mut dyn Watch) {
        self.write_some();
        if self.pending.is_empty() {
            watch.remove(self.output.as_raw_fd());
        }
    }

    /// Writes what is left before the end; waits for a slow reader as any program that ends does.
    pub fn finish(&mut self) {
        while !self.pending.is_empty() {
            if !self.write_some() {
                wait_until_writable(&self.output);
            }
        }
    }

    /// Returns whether the reader keeps up.
    fn write_some(&mut self) -> bool {
        let (first, _) = self.pending.as_slices();
        match self.output.write(&first[..first.len().min(PIPE_CHUNK)]) {
            Ok(len) if len > 0 => {
                self.pending.drain(..len);
                true
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => true,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => false,
            // A reader that is gone misses nothing.
            _ => {
                self.pending.clear();
                true
            }
        }
    }
}

/// The terminal on standard output, opened once more and non-blocking; `None` if there is none.
fn own_terminal() -> Option<File> {
    if !io::stdout().is_terminal() {
        return None;
    }
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open("/proc/self/fd/1").ok()
}

/// Waits as long as it takes, or until a signal ends the process.
fn wait_until_writable(output: &File) {
    use rustix::event::{PollFd, PollFlags, poll};
    // Whatever it says, the next write finds out.
    let _ = poll(&mut [PollFd::new(output, PollFlags::OUT)], None);
}

/// Whether epoll takes the descriptor: not files, nor /dev/null.
fn polls(fd: &impl AsRawFd) -> bool {
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
    Epoll::new().is_ok_and(|epoll| {
        epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::empty(), 0)).is_ok()
    })
}
