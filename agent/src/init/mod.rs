//! The guest image's init: this program when it runs as PID 1.
//!
//! ```text
//!  boot    proc, sys, dev, run, tmp ▶ console ▶ modules ▶ tarn.resume= ▶ tarn.mount=… ▶ agent ▶ shell, power button
//!
//!  serve   ┌──────────────── poll ────────────────┐
//!          │ signals   reap, restart, end         │      agent ── its own children, reaped by it
//!          │ uevents   port names, power button   │      shell
//!          │ buttons   KEY_POWER                  │      orphans of everybody, reaped here
//!          └──────────────────┬───────────────────┘
//!  end     thaw ▶ TERM ▶ wait ▶ KILL ▶ sync ▶ unmount ▶ reboot(2)
//! ```
//!
//! The agent is a child process, so that `waitpid(-1)` here never takes a status away from a command
//! that waits for its own child there.
//!
//! On the kernel's command line:
//!
//! | parameter | meaning |
//! |---|---|
//! | `tarn.mount=DEVICE:DIR:FSTYPE[:OPTIONS]` | mount before the agent starts; repeatable; DEVICE is a path or `serial:ID` |
//! | `tarn.resume=DEVICE` | go on from the image that hibernation left on this swap space, or use it for the next |
//! | `tarn.agent=PROGRAM[,ARGUMENT…]` | run this agent instead |
//! | `tarn.shell[=TTY]` | a shell, on the console unless told otherwise |
//! | `tarn.hostname=NAME` | default `tarn` |
//!
//! In the image: `/etc/tarn/modules` lists kernel modules to load at boot, one absolute path per line,
//! in order; `/etc/tarn/modules.d/FSTYPE` those to load before a mount of that type, `pci` those for
//! virtio devices on a PCI bus, and `button`, `pvpanic` and `late` those that can wait for the agent.
//!
//! Signals, as busybox's `poweroff`, `halt` and `reboot` send them: SIGUSR2 (and SIGPWR) power off,
//! SIGUSR1 halts, SIGTERM (and SIGINT, which is Ctrl-Alt-Del) reboots.

mod buttons;
mod cmdline;
mod console;
mod filesystems;
mod modules;
mod ports;
mod power;
mod services;
mod swap;
mod uevents;

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use self::buttons::Buttons;
use self::cmdline::Cmdline;
use self::power::Ending;
use self::services::Services;
use self::uevents::Uevents;
use crate::signals::Signals;

/// Lists of modules that nobody needs before the agent answers.
const AFTER_AGENT: &[&str] = &["button", "pvpanic", "late"];

/// Prints a line on the console, where whoever looks at a guest looks first.
macro_rules! say {
    ($($text:tt)*) => { eprintln!("init: {}", format_args!($($text)*)) };
}
use say;

/// Why init cannot do its work; the kernel panics next, which the host notices.
#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error("Cannot take signals")]
    Signals(#[source] io::Error),
    #[error("Cannot listen to kernel events")]
    Uevents(#[source] io::Error),
    #[error("Cannot wait")]
    Wait(#[source] io::Error),
}

/// True if this process is the init of a machine, and not merely the first process of a container.
pub(crate) fn is_wanted(name: &OsStr) -> bool {
    rustix::process::getpid().is_init() && Path::new(name).file_name() == Some(OsStr::new("init"))
}

/// Runs the guest until it ends. Returns only if that fails.
pub(crate) fn run() -> ExitCode {
    filesystems::mount_base();
    console::attach();
    match Init::boot().and_then(Init::serve) {
        Ok(never) => match never {},
        Err(error) => {
            say!("{}; giving up", crate::chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// There is no way back from [`Init::serve`] but an error.
enum Never {}

struct Init {
    signals: Signals,
    uevents: Uevents,
    buttons: Buttons,
    services: Services,
}

impl Init {
    /// Everything up to the agent's start is on the way to its first answer: only what it needs.
    fn boot() -> Result<Self, InitError> {
        let cmdline = Cmdline::read();
        console::set_hostname(&cmdline.hostname);
        let signals = Signals::block(power::SIGNALS).map_err(InitError::Signals)?;
        // Before the modules, whose devices it announces.
        let mut uevents = Uevents::listen().map_err(InitError::Uevents)?;
        modules::load_boot();
        ports::refresh();
        if let Some(device) = &cmdline.resume {
            swap::resume_or_use(device, &mut uevents);
        }
        for mount in &cmdline.mounts {
            filesystems::mount(mount, &mut uevents);
        }
        let mut services = Services::default();
        services.start_agent(cmdline.agent.as_deref());
        ports::refresh();
        if let Some(tty) = &cmdline.shell {
            services.start_shell(tty.as_deref());
        }
        for name in AFTER_AGENT {
            modules::load_named(name);
        }
        let mut buttons = Buttons::default();
        buttons.refresh();
        Ok(Self { signals, uevents, buttons, services })
    }

    fn serve(mut self) -> Result<Never, InitError> {
        loop {
            self.wait()?;
            if let Some(ending) = self.take_signals() {
                power::end(ending, &self.signals);
            }
            self.take_uevents();
            if self.buttons.is_power_pressed() {
                say!("power button pressed");
                power::end(Ending::PowerOff, &self.signals);
            }
            self.services.restart_due();
        }
    }

    fn wait(&self) -> Result<(), InitError> {
        let mut sources: Vec<BorrowedFd<'_>> = vec![self.signals.as_fd(), self.uevents.as_fd()];
        sources.extend(self.buttons.fds());
        let mut fds: Vec<PollFd<'_>> =
            sources.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        let limit =
            self.services.restart_at().map(|at| timespec(at.saturating_duration_since(Instant::now())));
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(InitError::Wait(error.into())),
        }
    }

    fn take_signals(&mut self) -> Option<Ending> {
        let mut ending = None;
        while let Some(number) = self.signals.next() {
            match number {
                libc::SIGCHLD => self.services.reap(),
                number => ending = ending.or(Ending::by_signal(number)),
            }
        }
        ending
    }

    fn take_uevents(&mut self) {
        let (mut ports, mut inputs) = (false, false);
        while let Some(event) = self.uevents.next() {
            ports |= event.subsystem == b"virtio-ports";
            inputs |= event.subsystem == b"input";
        }
        if ports {
            ports::refresh();
        }
        if inputs {
            self.buttons.refresh();
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}
