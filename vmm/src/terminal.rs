//! The user's terminal while it belongs to a guest: raw mode that is always undone, its size, and the escape keys.
//!
//! Standard input that is no terminal is left alone: scripts and pipes work as they are. On a terminal, [`RawMode`]
//! passes every key to the guest as it is (Enter is CR, and the guest's own line discipline decides what that means),
//! but keeps output processing on, so that log lines of the host do not come out as a staircase.
//!
//! The old mode comes back on drop, on a panic (also with `panic = "abort"`: a hook does it), and when SIGINT, SIGTERM,
//! SIGHUP or SIGQUIT end the process; SIGTSTP gives the terminal back for as long as the process is stopped. An event
//! loop that takes these signals from a signalfd has them blocked, so that the handlers here never run, and calls
//! [`RawMode::suspend`] for SIGTSTP itself.
#![expect(unsafe_code, reason = "a signal's default action is restored with signal(2)")]

use std::io::{self, IsTerminal};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::stdio::{stdin, stdout};
use rustix::termios::{OptionalActions, OutputModes, Termios, Winsize, tcgetattr, tcgetwinsize, tcsetattr};
use vmm_sys_util::signal::register_signal_handler;

/// How the terminal was, and how a guest wants it. Set once: a process has one standard input.
static MODES: OnceLock<Modes> = OnceLock::new();
static RAW: AtomicBool = AtomicBool::new(false);

struct Modes {
    before: Termios,
    raw: Termios,
}

/// Raw mode of standard input, until dropped.
#[derive(Debug)]
#[must_use = "dropping it restores the terminal"]
pub struct RawMode(());

impl RawMode {
    /// Switches standard input to raw mode; `None` when it is no terminal.
    ///
    /// # Errors
    /// The terminal refuses, for example because it has been hung up.
    pub fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let first = MODES.get().is_none();
        let before = tcgetattr(stdin())?;
        let modes = MODES.get_or_init(|| {
            let mut raw = before.clone();
            raw.make_raw();
            raw.output_modes |= OutputModes::OPOST;
            Modes { before, raw }
        });
        if first {
            restore_on_panic();
            restore_on_signals()?;
        }
        tcsetattr(stdin(), OptionalActions::Flush, &modes.raw)?;
        RAW.store(true, Ordering::Release);
        Ok(Some(Self(())))
    }

    /// Gives the terminal back, stops this process as SIGTSTP would, and takes the terminal again when it goes on.
    pub fn suspend(&self) {
        stop_and_go_on();
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Undoes [`RawMode::enter`]. Only system calls and atomics: it runs in signal handlers.
fn restore() -> bool {
    let was_raw = RAW.swap(false, Ordering::AcqRel);
    if let (true, Some(modes)) = (was_raw, MODES.get()) {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &modes.before);
    }
    was_raw
}

fn stop_and_go_on() {
    let was_raw = restore();
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP);
    if let (true, Some(modes)) = (was_raw, MODES.get()) {
        let _ = tcsetattr(stdin(), OptionalActions::Now, &modes.raw);
        RAW.store(true, Ordering::Release);
    }
}

fn restore_on_panic() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        previous(info);
    }));
}

fn restore_on_signals() -> io::Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
        register_signal_handler(signal, restore_and_die).map_err(io::Error::from)?;
    }
    register_signal_handler(libc::SIGTSTP, on_stop).map_err(io::Error::from)
}

extern "C" fn restore_and_die(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    restore();
    // SAFETY: both are async-signal-safe. The signal is blocked until this handler returns, then its default action
    // ends the process with the status that a caller expects of it.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

extern "C" fn on_stop(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    stop_and_go_on();
}

/// Columns and rows of the terminal on standard output; `None` when it is none or does not know.
pub fn size() -> Option<(u16, u16)> {
    let Winsize { ws_col, ws_row, .. } = tcgetwinsize(stdout()).ok()?;
    (ws_col > 0 && ws_row > 0).then_some((ws_col, ws_row))
}

/// Watches typed input for the keys that mean us instead of the guest.
///
/// `Ctrl-]` then `.` leaves; `Ctrl-]` twice sends one `Ctrl-]`; `Ctrl-]` and any other key send both.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    /// `Ctrl-]` was the last byte and is held back.
    armed: bool,
}

/// What the user wants after the bytes that passed an [`EscapeFilter`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Typed {
    /// Go on.
    More,
    /// Leave the console.
    Leave,
}

impl EscapeFilter {
    /// How to leave, for messages and help.
    pub const HINT: &'static str = "Ctrl-] then . leaves";
    const ESCAPE: u8 = 0x1d;

    /// Moves what is for the guest from `typed` to `to_guest`; what follows a [`Typed::Leave`] is dropped.
    pub fn pass(&mut self, typed: &[u8], to_guest: &mut Vec<u8>) -> Typed {
        for &byte in typed {
            match (std::mem::take(&mut self.armed), byte) {
                (false, Self::ESCAPE) => self.armed = true,
                (true, b'.') => return Typed::Leave,
                (true, Self::ESCAPE) | (false, _) => to_guest.push(byte),
                (true, _) => to_guest.extend([Self::ESCAPE, byte]),
            }
        }
        Typed::More
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(chunks: &[&[u8]]) -> (Vec<u8>, Typed) {
        let (mut filter, mut passed) = (EscapeFilter::default(), Vec::new());
        let last = chunks.iter().map(|chunk| filter.pass(chunk, &mut passed)).last();
        (passed, last.unwrap_or(Typed::More))
    }

    #[test]
    fn the_escape_leaves_also_in_two_reads() {
        assert_eq!(typed(&[b"ls\r\x1d.rest"]), (b"ls\r".to_vec(), Typed::Leave));
        assert_eq!(typed(&[b"a\x1d", b"."]), (b"a".to_vec(), Typed::Leave));
    }

    #[test]
    fn everything_else_reaches_the_guest() {
        assert_eq!(typed(&[b"\x1d\x1d."]), (b"\x1d.".to_vec(), Typed::More));
        assert_eq!(typed(&[b"\x1dx."]), (b"\x1dx.".to_vec(), Typed::More));
        assert_eq!(typed(&[b"\x1b[A\x03\x04\x00\xff"]), (b"\x1b[A\x03\x04\x00\xff".to_vec(), Typed::More));
    }

    #[test]
    fn input_that_is_no_terminal_is_left_alone() {
        // Test runners and CI have no terminal there; on a developer's terminal there is nothing to see.
        if !io::stdin().is_terminal() {
            assert!(RawMode::enter().unwrap().is_none());
        }
    }
}
