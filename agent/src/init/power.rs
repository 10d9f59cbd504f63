//! The end of the guest, in an order that loses nothing.
#![expect(unsafe_code, reason = "neither std nor rustix can signal every process or detach a loop device")]

use std::os::fd::{AsFd, AsRawFd};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{WaitOptions, wait};
use rustix::system::{RebootCommand, reboot};

use super::{filesystems, say, timespec};
use crate::freeze::{Engine, Linux};
use crate::signals::Signals;

/// What init listens to.
pub(super) const SIGNALS: &[libc::c_int] =
    &[libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGUSR2, libc::SIGPWR];

/// How long processes may take to end after SIGTERM, and after SIGKILL.
const ENDING: Duration = Duration::from_secs(5);
const DYING: Duration = Duration::from_secs(2);
/// Longest wait for filesystems to thaw.
const THAWING: Duration = Duration::from_secs(5);
/// How long the disks may take to be written and unmounted. A disk that hangs must not keep the
/// machine from ending.
const WRITING: Duration = Duration::from_secs(60);

/// Linux `include/uapi/linux/loop.h`.
const LOOP_CLR_FD: libc::Ioctl = 0x4C01;

/// How the machine ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    PowerOff,
    Halt,
    Reboot,
}

impl Ending {
    /// What a signal asks for.
    pub(super) fn by_signal(number: libc::c_int) -> Option<Self> {
        match number {
            libc::SIGUSR2 | libc::SIGPWR => Some(Self::PowerOff),
            libc::SIGUSR1 => Some(Self::Halt),
            libc::SIGTERM | libc::SIGINT => Some(Self::Reboot),
            _ => None,
        }
    }
}

/// Ends the machine. Returns only if the kernel refuses.
pub(super) fn end(ending: Ending, signals: &Signals) {
    say!("ending: {ending:?}");
    // First: whoever waits for a frozen disk cannot end.
    thaw();
    signal_all(libc::SIGTERM);
    if !wait_for_all(ENDING, signals) {
        signal_all(libc::SIGKILL);
        wait_for_all(DYING, signals);
        // A freeze may have been under way.
        thaw();
    }
    write_disks();
    let command = match ending {
        Ending::PowerOff => RebootCommand::PowerOff,
        Ending::Halt => RebootCommand::Halt,
        Ending::Reboot => RebootCommand::Restart,
    };
    if let Err(error) = reboot(command) {
        say!("cannot end: {error}");
    }
}

/// Thaws what an agent may have left frozen, unless that hangs.
fn thaw() {
    let (done, wait) = mpsc::channel();
    let thread = std::thread::Builder::new().spawn(move || {
        let _ = done.send(Engine::new(Linux).thaw_others(&[]));
    });
    if let Err(error) = thread {
        say!("cannot start a thread: {error}");
        return;
    }
    match wait.recv_timeout(THAWING) {
        Ok(Ok(0)) => {}
        Ok(Ok(count)) => say!("thawed {count} filesystems"),
        Ok(Err(error)) => say!("{}", error.text()),
        Err(_) => say!("a filesystem does not thaw; ending all the same"),
    }
}

fn signal_all(number: libc::c_int) {
    // SAFETY: kill takes no memory; from PID 1 it reaches every process but itself.
    unsafe { libc::kill(-1, number) };
}

/// Reaps until no process is left; false if the time is up first.
fn wait_for_all(limit: Duration, signals: &Signals) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return true,
            }
        }
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return false;
        }
        let limit = timespec(rest);
        let signals_fd = signals.as_fd();
        let mut fds = [PollFd::new(&signals_fd, PollFlags::IN)];
        let _ = poll(&mut fds, Some(&limit));
        while signals.next().is_some() {}
    }
}

fn write_disks() {
    let (done, wait) = mpsc::channel();
    let writer = std::thread::Builder::new().spawn(move || {
        write_now();
        let _ = done.send(());
    });
    match writer {
        Ok(_) => {
            if wait.recv_timeout(WRITING).is_err() {
                say!("the disks are not written after {} s; ending all the same", WRITING.as_secs());
            }
        }
        Err(error) => {
            say!("cannot start a thread: {error}");
            write_now();
        }
    }
}

fn write_now() {
    rustix::fs::sync();
    filesystems::unmount_all();
    detach_loops();
    filesystems::make_read_only();
}

/// Loop devices keep the filesystems of their files from being unmounted.
fn detach_loops() {
    let Ok(devices) = std::fs::read_dir("/sys/block") else { return };
    for device in devices.filter_map(Result::ok).filter(|device| device.path().join("loop").exists()) {
        let Ok(device) = std::fs::File::open(std::path::Path::new("/dev").join(device.file_name())) else {
            continue;
        };
        // SAFETY: LOOP_CLR_FD takes no argument, and the descriptor is open.
        unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD, 0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_mean_what_busybox_means_by_them() {
        assert_eq!(Ending::by_signal(libc::SIGUSR2), Some(Ending::PowerOff));
        assert_eq!(Ending::by_signal(libc::SIGUSR1), Some(Ending::Halt));
        assert_eq!(Ending::by_signal(libc::SIGTERM), Some(Ending::Reboot));
        assert_eq!(Ending::by_signal(libc::SIGCHLD), None);
    }
}
