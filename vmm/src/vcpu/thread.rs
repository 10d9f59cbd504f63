//! The inside of a vCPU thread: a state function over commands and exits.
#![expect(
    unsafe_code,
    reason = "The kick handler writes kvm_run.immediate_exit, and exit details live in a union that only a raw \
              read reaches"
)]

use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, TryRecvError};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::exit::{self, Outcome};
use super::{Buses, VcpuCommand, VcpuEvent, VcpuFault};
use crate::machine::notify::Notifier;

thread_local! {
    /// This thread's `kvm_run.immediate_exit`, for the kick handler; null outside a vCPU thread.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

/// Installs the handler of the kick signal, once for the process.
pub(super) fn install_kick() -> Result<(), errno::Error> {
    static INSTALLED: OnceLock<Result<(), errno::Error>> = OnceLock::new();
    *INSTALLED.get_or_init(|| register_signal_handler(SIGRTMIN(), kick))
}

extern "C" fn kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // A const-initialized thread-local without destructor is a plain memory access: fit for a signal handler.
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer is into this thread's kvm_run mapping, set while the VcpuFd that owns the mapping is
        // alive and cleared before it is dropped. Only the kernel and this thread look at the byte.
        unsafe { flag.write_volatile(1) };
    }
}

pub(super) fn gettid() -> libc::pid_t {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::gettid() }
}

pub(super) struct VcpuThread {
    pub index: u8,
    pub fd: VcpuFd,
    pub buses: Buses,
    pub commands: Receiver<VcpuCommand>,
    pub acks: Sender<VcpuCommand>,
    pub events: Notifier,
    /// Has been in the guest: a resume must tell the guest's watchdogs of the lost time.
    pub ran: bool,
    /// Has told that a crash kernel takes over.
    pub crash_told: bool,
}

enum State {
    Paused,
    Running,
    Finished,
}

impl VcpuThread {
    pub(super) fn run(mut self) {
        let flag = &raw mut self.fd.get_kvm_run().immediate_exit;
        IMMEDIATE_EXIT.set(flag);
        let mut state = State::Paused;
        loop {
            state = match state {
                State::Paused => self.paused(),
                State::Running => self.running(),
                State::Finished => break,
            };
        }
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
        let acks = self.acks.clone();
        drop(self);
        // The control loop may have stopped waiting.
        let _ = acks.send(VcpuCommand::Finish);
    }

    fn paused(&mut self) -> State {
        match self.commands.recv() {
            Ok(command) => self.obey(command),
            Err(_) => State::Finished,
        }
    }

    fn running(&mut self) -> State {
        match self.enter() {
            Ok(None) => State::Running,
            Ok(Some(event)) => self.tell(event),
            Err(libc::EINTR) => {
                self.fd.set_kvm_immediate_exit(0);
                match self.commands.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(TryRecvError::Empty) => State::Running,
                    Err(TryRecvError::Disconnected) => State::Finished,
                }
            }
            // An application processor before its start-up IPI.
            Err(libc::EAGAIN) => State::Running,
            Err(errno) => self.tell(VcpuEvent::Fault(VcpuFault::Run { errno })),
        }
    }

    fn obey(&mut self, command: VcpuCommand) -> State {
        let next = match command {
            VcpuCommand::Pause => match self.retire() {
                // The half-done access asked for something: the control loop will hear of it.
                Some(event) => {
                    self.tell(event);
                    State::Paused
                }
                None => State::Paused,
            },
            VcpuCommand::Resume => {
                if self.ran {
                    self.forgive_lost_time();
                }
                self.ran = true;
                State::Running
            }
            VcpuCommand::Finish => return State::Finished, // acknowledged at the very end
        };
        // The control loop may have stopped waiting.
        let _ = self.acks.send(command);
        next
    }

    /// Posts `event`; all but a crash kernel's start park the vCPU.
    fn tell(&mut self, event: VcpuEvent) -> State {
        if event == VcpuEvent::CrashLoaded {
            // The one event that a guest can repeat without being parked: once is enough.
            if !std::mem::replace(&mut self.crash_told, true) {
                self.events.post_vcpu(self.index, event);
            }
            return State::Running;
        }
        self.events.post_vcpu(self.index, event);
        State::Paused
    }

    /// KVM_KVMCLOCK_CTRL: the guest's soft-lockup detector must not count the pause. A guest without kvmclock
    /// gives EINVAL, which is as good.
    fn forgive_lost_time(&self) {
        if let Err(error) = self.fd.kvmclock_ctrl()
            && error.errno() != libc::EINVAL
        {
            tracing::warn!(%error, index = self.index, "Cannot mark the guest as paused");
        }
    }

    /// Finishes the access under way without running the guest.
    fn retire(&mut self) -> Option<VcpuEvent> {
        /// One access completes in one or two entries; more means that KVM does not honour `immediate_exit`.
        const ENTRIES: u32 = 64;
        let mut last = None;
        for _ in 0..ENTRIES {
            self.fd.set_kvm_immediate_exit(1);
            match self.enter() {
                Ok(None) => {}
                Ok(event) => {
                    last = event;
                    break;
                }
                Err(_) => break,
            }
        }
        self.fd.set_kvm_immediate_exit(0);
        last
    }

    /// Enters the guest once and carries out the exit.
    fn enter(&mut self) -> Result<Option<VcpuEvent>, i32> {
        let run: *const kvm_run = self.fd.get_kvm_run();
        let exit = self.fd.run().map_err(|e| e.errno())?;
        // SAFETY: `run` points into the mapping that self.fd owns. For an I/O exit the union holds `io`; for any
        // other exit the value is not used. It is plain bytes, so every bit pattern is valid.
        let size = unsafe { (&raw const (*run).__bindgen_anon_1.io.size).read() };
        let outcome = exit::handle(exit, usize::from(size).max(1), &self.buses.pio, &self.buses.mmio);
        Ok(match outcome {
            Outcome::Continue => None,
            Outcome::Event(event) => Some(event),
            Outcome::InternalError => Some(VcpuEvent::Fault(self.internal_error())),
        })
    }

    fn internal_error(&mut self) -> VcpuFault {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which the union holds `internal`; plain integers.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let count = usize::try_from(internal.ndata).unwrap_or(usize::MAX).min(internal.data.len());
        VcpuFault::Internal {
            suberror: internal.suberror,
            meaning: exit::suberror_meaning(internal.suberror),
            rip,
            data: internal.data[..count].to_vec(),
        }
    }
}
