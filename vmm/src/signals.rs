//! Signals as a descriptor of the control loop.
#![expect(unsafe_code, reason = "signal masks and signalfd have no safe interface here")]

use std::fs::File;
use std::io::{self, Read};
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

/// A signal that concerns the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGINT, SIGTERM, SIGHUP or SIGQUIT: end the VM.
    End(i32),
    /// SIGWINCH: the terminal has another size.
    Resize,
    /// SIGTSTP: the user wants the shell back for a while.
    Suspend,
}

/// The signals of the process, taken from their default actions for as long as this lives.
pub struct Signals {
    fd: File,
    set: libc::sigset_t,
}

const TAKEN: [i32; 6] =
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGWINCH, libc::SIGTSTP];

impl Signals {
    /// Blocks the signals in this thread and all it starts from now on, and receives them here. SIGPIPE is ignored:
    /// every write has an error path. SIGTSTP is taken only with `job_control`, for a VM that holds a terminal.
    ///
    /// # Errors
    ///
    /// No descriptor left.
    pub fn take(job_control: bool) -> io::Result<Self> {
        // SAFETY: plain calls on a set of our own; SIG_IGN is a valid disposition for SIGPIPE.
        let (fd, set) = unsafe {
            let mut set = MaybeUninit::<libc::sigset_t>::uninit();
            libc::sigemptyset(set.as_mut_ptr());
            let mut set = set.assume_init();
            for signal in TAKEN {
                if signal != libc::SIGTSTP || job_control {
                    libc::sigaddset(&raw mut set, signal);
                }
            }
            let errno = libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            if errno != 0 {
                return Err(io::Error::from_raw_os_error(errno));
            }
            libc::signal(libc::SIGPIPE, libc::SIG_IGN);
            (libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK), set)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        Ok(Self { fd: unsafe { File::from_raw_fd(fd) }, set })
    }

    /// The next signal that has arrived.
    pub fn take_next(&mut self) -> Option<Signal> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        loop {
            if self.fd.read(&mut info).ok()? != info.len() {
                return None;
            }
            // ssi_signo is the first member (signalfd(2)).
            let number = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
            match i32::try_from(number).ok()? {
                libc::SIGWINCH => return Some(Signal::Resize),
                libc::SIGTSTP => return Some(Signal::Suspend),
                number if TAKEN.contains(&number) => return Some(Signal::End(number)),
                _ => {}
            }
        }
    }
}

impl Drop for Signals {
    /// The default actions are back: whatever the process still waits for, a signal ends it.
    fn drop(&mut self) {
        // SAFETY: a plain call on a set of our own.
        unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const self.set, std::ptr::null_mut()) };
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
