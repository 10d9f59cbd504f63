//! SIGINT and SIGTERM for subcommands that have something to clean up: they ask, and the work stops at its next step.

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use vmm_sys_util::signal::register_signal_handler;

/// Set once a signal has asked.
static REQUESTED: AtomicBool = AtomicBool::new(false);

/// From now on the signals only ask.
pub(super) fn only_ask() -> anyhow::Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        register_signal_handler(signal, on_signal)
            .map_err(io::Error::from)
            .context("Cannot take charge of signals")?;
    }
    Ok(())
}

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    REQUESTED.store(true, Ordering::Release);
}

/// Whether a signal has asked to stop.
pub(super) fn is_requested() -> bool {
    REQUESTED.load(Ordering::Acquire)
}

/// A reader or writer that fails once a signal has asked to stop.
pub(super) struct Interruptible<'a, T: ?Sized>(pub(super) &'a mut T);

fn go_on() -> io::Result<()> {
    if is_requested() { Err(io::Error::other("Interrupted by a signal")) } else { Ok(()) }
}

impl<T: Read + ?Sized> Read for Interruptible<'_, T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        go_on()?;
        self.0.read(buffer)
    }
}

impl<T: Write + ?Sized> Write for Interruptible<'_, T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        go_on()?;
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
