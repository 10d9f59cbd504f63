//! What a KVM exit means.

use devices::bus::{Action, Bus};
use kvm_ioctls::VcpuExit;

/// Why KVM cannot run the guest any further: the text of state internal-error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VcpuFault {
    /// KVM_EXIT_FAIL_ENTRY.
    #[error(
        "The processor refused to enter the guest (hardware reason {reason:#x} on host CPU {cpu}); \
         `dmesg` on the host may say more, and on nested virtualization the outer hypervisor is the first suspect"
    )]
    FailEntry {
        /// VMX exit reason or SVM exit code.
        reason: u64,
        /// Host CPU.
        cpu: u32,
    },
    /// KVM_EXIT_INTERNAL_ERROR.
    #[error(
        "KVM gave up at guest RIP {rip:#x}: internal error {suberror} ({meaning}), data {data:x?}; \
         a /dev/kvm without svm or vmx in /proc/cpuinfo interprets code and ends like this: see `tarn doctor`"
    )]
    Internal {
        /// KVM_INTERNAL_ERROR_*.
        suberror: u32,
        /// In words.
        meaning: &'static str,
        /// Guest instruction pointer.
        rip: u64,
        /// As KVM gives it.
        data: Vec<u64>,
    },
    /// An exit that this VM never asked for.
    #[error("KVM exited with {exit}, which this machine does not use")]
    Unexpected {
        /// Its name.
        exit: String,
    },
    /// The KVM_RUN ioctl failed.
    #[error("KVM_RUN failed: {}", std::io::Error::from_raw_os_error(*errno))]
    Run {
        /// errno.
        errno: i32,
    },
}

/// KVM_INTERNAL_ERROR_* in words (include/uapi/linux/kvm.h).
pub(super) fn suberror_meaning(suberror: u32) -> &'static str {
    match suberror {
        1 => "an instruction cannot be emulated",
        2 => "simultaneous exceptions",
        3 => "an event cannot be delivered",
        4 => "an unexpected hardware exit",
        _ => "unknown",
    }
}

/// What a vCPU tells the control loop. All but [`Self::CrashLoaded`] leave it parked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuEvent {
    /// The guest switched itself off.
    Shutdown,
    /// The guest put the machine to sleep, its memory kept.
    SuspendToRam,
    /// The guest has written its memory to a disk and switched the machine off.
    SuspendToDisk,
    /// The guest asked for a reset.
    Reset,
    /// The guest triple-faulted.
    TripleFault,
    /// The guest's kernel panicked.
    Panicked,
    /// The guest's kernel panicked and its crash kernel takes over: let it.
    CrashLoaded,
    /// KVM cannot go on.
    Fault(VcpuFault),
}

/// What the run loop does after an exit.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Enter the guest again.
    Continue,
    /// Tell the control loop.
    Event(VcpuEvent),
    /// Look into `kvm_run` for the details of an internal error.
    InternalError,
}

/// Carries out one exit. `io_size` is the width of a port access, which a string instruction repeats.
pub(super) fn handle(exit: VcpuExit<'_>, io_size: usize, pio: &Bus, mmio: &Bus) -> Outcome {
    match exit {
        VcpuExit::IoOut(port, data) => {
            let actions = data.chunks(io_size).map(|chunk| pio.write(u64::from(port), chunk));
            // Several actions from one string instruction are not a thing a sane guest does: the first counts.
            let mut first = Action::None;
            for action in actions {
                if first == Action::None {
                    first = action;
                }
            }
            ask(first)
        }
        VcpuExit::IoIn(port, data) => {
            for chunk in data.chunks_mut(io_size) {
                pio.read(u64::from(port), chunk);
            }
            Outcome::Continue
        }
        VcpuExit::MmioWrite(address, data) => ask(mmio.write(address, data)),
        VcpuExit::MmioRead(address, data) => {
            mmio.read(address, data);
            Outcome::Continue
        }
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => Outcome::Continue,
        VcpuExit::Shutdown => Outcome::Event(VcpuEvent::TripleFault),
        VcpuExit::SystemEvent(1, _) => Outcome::Event(VcpuEvent::Shutdown),
        VcpuExit::SystemEvent(2, _) => Outcome::Event(VcpuEvent::Reset),
        VcpuExit::SystemEvent(3, _) => Outcome::Event(VcpuEvent::Panicked),
        VcpuExit::FailEntry(reason, cpu) => fault(VcpuFault::FailEntry { reason, cpu }),
        VcpuExit::InternalError => Outcome::InternalError,
        other => fault(VcpuFault::Unexpected { exit: format!("{other:?}") }),
    }
}

fn fault(fault: VcpuFault) -> Outcome {
    Outcome::Event(VcpuEvent::Fault(fault))
}

fn ask(action: Action) -> Outcome {
    match action {
        Action::None => Outcome::Continue,
        Action::Shutdown => Outcome::Event(VcpuEvent::Shutdown),
        Action::SuspendToRam => Outcome::Event(VcpuEvent::SuspendToRam),
        Action::SuspendToDisk => Outcome::Event(VcpuEvent::SuspendToDisk),
        Action::Reset => Outcome::Event(VcpuEvent::Reset),
        Action::Panicked { crash_loaded: false } => Outcome::Event(VcpuEvent::Panicked),
        Action::Panicked { crash_loaded: true } => Outcome::Event(VcpuEvent::CrashLoaded),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::bus::BusDevice;
    use parking_lot::Mutex;
    use std::sync::Arc;

    #[derive(Default)]
    struct Recorder(Vec<(u64, Vec<u8>)>);
    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(data.len()).unwrap());
            self.0.push((offset, vec![]));
        }
        fn write(&mut self, offset: u64, data: &[u8]) -> Action {
            self.0.push((offset, data.to_vec()));
            if data == [0xfe] { Action::Reset } else { Action::None }
        }
    }

    fn bus() -> (Bus, Arc<Mutex<Recorder>>) {
        let device = Arc::new(Mutex::new(Recorder::default()));
        let mut bus = Bus::default();
        bus.insert(0x60, 8, Arc::clone(&device) as Arc<Mutex<dyn BusDevice>>).unwrap();
        (bus, device)
    }

    #[test]
    fn a_string_instruction_is_one_access_per_element() {
        let (pio, device) = bus();
        let exit = VcpuExit::IoOut(0x60, &[1, 2, 3, 4]);
        assert_eq!(handle(exit, 2, &pio, &Bus::default()), Outcome::Continue);
        assert_eq!(device.lock().0, [(0, vec![1, 2]), (0, vec![3, 4])]);
        let mut data = [0; 3];
        assert_eq!(handle(VcpuExit::IoIn(0x60, &mut data), 1, &pio, &Bus::default()), Outcome::Continue);
        assert_eq!(data, [1, 1, 1]);
    }

    #[test]
    fn what_a_device_asks_for_becomes_an_event() {
        let (pio, _) = bus();
        let exit = VcpuExit::IoOut(0x64, &[0xfe]);
        assert_eq!(handle(exit, 1, &pio, &Bus::default()), Outcome::Event(VcpuEvent::Reset));
    }

    #[test]
    fn a_triple_fault_and_a_failed_entry_are_told_apart() {
        let none = Bus::default();
        assert_eq!(handle(VcpuExit::Shutdown, 1, &none, &none), Outcome::Event(VcpuEvent::TripleFault));
        let Outcome::Event(VcpuEvent::Fault(fault)) =
            handle(VcpuExit::FailEntry(0x8000_0021, 3), 1, &none, &none)
        else {
            panic!("not a fault");
        };
        assert!(fault.to_string().contains("0x80000021 on host CPU 3"), "{fault}");
    }
}
