//! ACPI fixed hardware: power button, sleep states, timer (ACPI 6.5, section 4.8.3).
//!
//! ```text
//!   offset 0   PM1a_STS   2 bytes   write 1 to clear      ┐ PM1a event block:
//!          2   PM1a_EN    2 bytes                         ┘ a bit set in both asserts the SCI
//!          4   PM1a_CNT   2 bytes   SLP_TYP, SLP_EN         control block
//!          8   PM_TMR     4 bytes   3.579545 MHz            timer, 32 bits wide (TMR_VAL_EXT in the FADT)
//! ```
//!
//! # The SCI
//!
//! By its nature it is a level. What the VMM has is an irqfd, which makes a pulse: on a pin that the guest believes
//! level-triggered, KVM's IOAPIC loses a pulse that comes while an earlier one is in service. So the MADT should
//! declare the SCI *edge*-triggered, active high, by an interrupt source override (Linux heeds it,
//! `acpi_sci_ioapic_setup()`), and this device pulses again whenever the guest has written to the event block and a
//! cause is still pending; so none is lost in either mode.
//!
//! # Sleeping
//!
//! The DSDT's `\_S3`, `\_S4` and `\_S5` give [`AcpiPm::S3_TYPE`], [`AcpiPm::S4_TYPE`] and [`AcpiPm::S5_TYPE`]; a write
//! of SLP_EN turns into an [`Action`] that leaves the rest to the VM. A machine that wakes from S3 has lost all of
//! this device's state, as hardware may, and shows WAK_STS ([`AcpiPm::wake`]); one that comes back from S4 or S5 is
//! switched on like any other. There is no SMI command port: the machine is in ACPI mode for ever, SCI_EN reads as 1.

use std::fmt;
use std::time::{Duration, Instant};

use crate::bus::{Action, BusDevice};
use crate::irq::InterruptLine;

const STATUS: u64 = 0;
const ENABLE: u64 = 2;
const CONTROL: u64 = 4;
const TIMER: u64 = 8;

/// Bits of PM1a_STS and PM1a_EN. The timer's overflow is not among them: nobody has asked for it since there are
/// better timers.
const POWER_BUTTON: u16 = 1 << 8;
/// PM1a_STS only: the machine has been asleep.
const WAK_STS: u16 = 1 << 15;
/// Bits of PM1a_CNT.
const SCI_EN: u16 = 1;
const SLP_TYP_SHIFT: u32 = 10;
const SLP_TYP: u16 = 7 << SLP_TYP_SHIFT;
const SLP_EN: u16 = 1 << 13;

const TIMER_HZ: u128 = 3_579_545;

/// The device.
pub struct AcpiPm {
    line: Box<dyn InterruptLine>,
    clock: Box<dyn Fn() -> Duration + Send>,
    status: u16,
    enable: u16,
    control: u16,
}

impl AcpiPm {
    /// Offset of the PM1a event block, [`Self::EVENT_LEN`] bytes.
    pub const EVENT_BLOCK: u64 = STATUS;
    /// Length of the PM1a event block.
    pub const EVENT_LEN: u64 = 4;
    /// Offset of the PM1a control block, [`Self::CONTROL_LEN`] bytes.
    pub const CONTROL_BLOCK: u64 = CONTROL;
    /// Length of the PM1a control block.
    pub const CONTROL_LEN: u64 = 2;
    /// Offset of the timer block, [`Self::TIMER_LEN`] bytes.
    pub const TIMER_BLOCK: u64 = TIMER;
    /// Length of the timer block.
    pub const TIMER_LEN: u64 = 4;
    /// Number of ports in all.
    pub const LEN: u64 = 12;
    /// The SLP_TYP value of S3, "suspend to RAM".
    pub const S3_TYPE: u8 = 3;
    /// The SLP_TYP value of S4, "suspend to disk".
    pub const S4_TYPE: u8 = 4;
    /// The SLP_TYP value of S5, "soft off".
    pub const S5_TYPE: u8 = 5;

    /// A machine that is switched on, with its SCI on `line`.
    pub fn new(line: Box<dyn InterruptLine>) -> Self {
        let start = Instant::now();
        Self::with_clock(line, Box::new(move || start.elapsed()))
    }

    fn with_clock(line: Box<dyn InterruptLine>, clock: Box<dyn Fn() -> Duration + Send>) -> Self {
        Self { line, clock, status: 0, enable: 0, control: 0 }
    }

    /// Presses the power button. Returns whether the guest listens; one that does not yet will not notice.
    pub fn press_power_button(&mut self) -> bool {
        self.status |= POWER_BUTTON;
        self.assert_sci();
        self.enable & POWER_BUTTON != 0
    }

    /// Whether the guest has not cleared a press of the power button yet.
    pub fn is_power_button_pending(&self) -> bool {
        self.status & POWER_BUTTON != 0
    }

    /// The machine wakes from S3: by its power button, or by another event that has no bit here. The guest finds
    /// out by reading; no interrupt is enabled yet.
    pub fn wake(&mut self, by_power_button: bool) {
        self.reset();
        self.status = if by_power_button { WAK_STS | POWER_BUTTON } else { WAK_STS };
    }

    /// Back to the state after power-on, for a reset of the machine.
    pub fn reset(&mut self) {
        let Self { line: _, clock: _, status, enable, control } = self;
        (*status, *enable, *control) = (0, 0, 0);
    }

    fn assert_sci(&self) {
        if self.status & self.enable != 0
            && let Err(error) = self.line.trigger()
        {
            tracing::warn!(%error, "Cannot raise the SCI");
        }
    }

    fn timer(&self) -> u32 {
        let ticks = (self.clock)().as_nanos() * TIMER_HZ / 1_000_000_000;
        u32::try_from(ticks & u128::from(u32::MAX)).unwrap_or_default()
    }

    /// All registers in a row, to be read in any width.
    fn image(&self) -> [u8; 12] {
        let mut image = [0; 12];
        let control = self.control | SCI_EN;
        for (at, register) in [(STATUS, self.status), (ENABLE, self.enable), (CONTROL, control)] {
            let at = usize::try_from(at).unwrap_or_default();
            image[at..at + 2].copy_from_slice(&register.to_le_bytes());
        }
        image[8..].copy_from_slice(&self.timer().to_le_bytes());
        image
    }

    fn sleep(&mut self) -> Action {
        let kind = (self.control & SLP_TYP) >> SLP_TYP_SHIFT;
        // SLP_EN is write-only (section 4.8.3.2.1).
        self.control &= !SLP_EN;
        match u8::try_from(kind) {
            Ok(Self::S3_TYPE) => Action::SuspendToRam,
            Ok(Self::S4_TYPE) => Action::SuspendToDisk,
            Ok(Self::S5_TYPE) => Action::Shutdown,
            _ => {
                tracing::debug!(kind, "The guest asks for a sleep state that the DSDT does not offer");
                Action::None
            }
        }
    }
}

impl BusDevice for AcpiPm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let image = self.image();
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(image.len());
        for (byte, &value) in data.iter_mut().zip(&image[from..]) {
            *byte = value;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        let mut clear = 0;
        merge(&mut clear, STATUS, offset, data);
        self.status &= !clear;
        merge(&mut self.enable, ENABLE, offset, data);
        self.enable &= POWER_BUTTON;
        if offset < CONTROL {
            self.assert_sci();
        }
        merge(&mut self.control, CONTROL, offset, data);
        self.control &= SLP_TYP | SLP_EN;
        if self.control & SLP_EN != 0 { self.sleep() } else { Action::None }
    }
}

impl fmt::Debug for AcpiPm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line: _, clock: _, status, enable, control } = self;
        let mut debug = f.debug_struct("AcpiPm");
        debug.field("status", status).field("enable", enable).field("control", control).finish()
    }
}

/// Overwrites those bytes of the register at `at` that a write of `data` at `offset` meets.
fn merge(register: &mut u16, at: u64, offset: u64, data: &[u8]) {
    let mut bytes = register.to_le_bytes();
    for (address, byte) in (at..).zip(&mut bytes) {
        let index = address.checked_sub(offset).and_then(|index| usize::try_from(index).ok());
        if let Some(&value) = index.and_then(|index| data.get(index)) {
            *byte = value;
        }
    }
    *register = u16::from_le_bytes(bytes);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::testing::FakeLine;

    fn pm() -> (AcpiPm, FakeLine) {
        let line = FakeLine::default();
        (AcpiPm::new(Box::new(line.clone())), line)
    }

    fn read16(pm: &mut AcpiPm, offset: u64) -> u16 {
        let mut data = [0; 2];
        pm.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    fn write16(pm: &mut AcpiPm, offset: u64, value: u16) -> Action {
        pm.write(offset, &value.to_le_bytes())
    }

    #[test]
    fn the_power_button_reaches_a_guest_that_listens() {
        let (mut pm, line) = pm();
        write16(&mut pm, ENABLE, 0x0100);
        assert!(pm.press_power_button());
        assert_eq!((line.count(), read16(&mut pm, STATUS)), (1, 0x0100));
        write16(&mut pm, STATUS, 0x0100);
        assert_eq!((line.count(), read16(&mut pm, STATUS)), (1, 0));
    }

    #[test]
    fn a_press_before_the_guest_listens_waits_for_it() {
        let (mut pm, line) = pm();
        assert!(!pm.press_power_button());
        assert_eq!(line.count(), 0);
        write16(&mut pm, ENABLE, 0x0100);
        assert_eq!(line.count(), 1);
    }

    #[test]
    fn a_cause_that_is_not_cleared_pulses_again() {
        let (mut pm, line) = pm();
        write16(&mut pm, ENABLE, 0x0100);
        pm.press_power_button();
        write16(&mut pm, STATUS, 0x0001);
        assert_eq!((line.count(), read16(&mut pm, STATUS)), (2, 0x0100));
        write16(&mut pm, CONTROL, 0);
        assert_eq!(line.count(), 2);
    }

    #[test]
    fn only_the_events_there_are_can_be_enabled() {
        let (mut pm, _) = pm();
        write16(&mut pm, ENABLE, 0xffff);
        assert_eq!(read16(&mut pm, ENABLE), 0x0100);
    }

    #[test]
    fn soft_off_shuts_the_machine_down_as_acpica_does_it() {
        let (mut pm, _) = pm();
        assert_eq!(read16(&mut pm, CONTROL), SCI_EN);
        let kind = u16::from(AcpiPm::S5_TYPE) << 10;
        assert_eq!(write16(&mut pm, CONTROL, SCI_EN | kind), Action::None);
        assert_eq!(write16(&mut pm, CONTROL, SCI_EN | kind | SLP_EN), Action::Shutdown);
        assert_eq!(read16(&mut pm, CONTROL), SCI_EN | kind);
        assert_eq!(write16(&mut pm, CONTROL, 1 << 10 | SLP_EN), Action::None);
    }

    #[test]
    fn every_sleep_state_of_the_dsdt_asks_for_its_own_action_and_no_other_does() {
        for kind in 0..8 {
            let (mut pm, _) = pm();
            let action = match kind {
                3 => Action::SuspendToRam,
                4 => Action::SuspendToDisk,
                5 => Action::Shutdown,
                _ => Action::None,
            };
            assert_eq!(write16(&mut pm, CONTROL, kind << 10 | SLP_EN), action, "SLP_TYP {kind}");
        }
    }

    #[test]
    fn a_machine_that_wakes_shows_that_it_was_asleep_until_the_guest_clears_it() {
        for (by_power_button, status) in [(false, 0x8000), (true, 0x8100)] {
            let (mut pm, line) = pm();
            write16(&mut pm, ENABLE, 0x0100);
            pm.wake(by_power_button);
            assert_eq!((read16(&mut pm, STATUS), read16(&mut pm, ENABLE)), (status, 0));
            assert_eq!(read16(&mut pm, CONTROL), SCI_EN);
            write16(&mut pm, STATUS, 0x8000);
            assert_eq!((read16(&mut pm, STATUS), line.count()), (status & 0x0100, 0));
        }
    }

    #[test]
    fn registers_are_bytes_in_a_row_for_any_width_and_offset() {
        let (mut pm, line) = pm();
        pm.write(STATUS, &[0, 0, 0, 1]);
        pm.press_power_button();
        let mut all = [0xff; 8];
        pm.read(0, &mut all);
        assert_eq!(all, [0, 1, 0, 1, 1, 0, 0, 0]);
        pm.write(1, &[1]);
        assert_eq!((read16(&mut pm, STATUS), line.count()), (0, 1));
        assert_eq!(pm.write(5, &[0x34]), Action::Shutdown);
        for offset in 0..16 {
            for width in [1, 2, 4, 8] {
                pm.read(offset, &mut [0; 8][..width]);
                pm.write(offset, &[0xff; 8][..width]);
            }
        }
    }

    #[test]
    fn the_timer_ticks_at_its_rate_and_wraps() {
        let nanos = Arc::new(AtomicU64::new(0));
        let clock = Arc::clone(&nanos);
        let clock = Box::new(move || Duration::from_nanos(clock.load(Ordering::Relaxed)));
        let mut pm = AcpiPm::with_clock(Box::new(FakeLine::default()), clock);
        let mut at = |seconds: u64| {
            nanos.store(seconds * 1_000_000_000, Ordering::Relaxed);
            let mut data = [0; 4];
            pm.read(TIMER, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!((at(0), at(1), at(10)), (0, 3_579_545, 35_795_450));
        assert_eq!(at(1200), u32::try_from(1200 * 3_579_545 % (1u64 << 32)).unwrap());
    }

    #[test]
    fn a_reset_leaves_no_event_behind() {
        let (mut pm, line) = pm();
        write16(&mut pm, ENABLE, 0x0100);
        pm.press_power_button();
        pm.reset();
        write16(&mut pm, ENABLE, 0x0100);
        assert_eq!((line.count(), read16(&mut pm, STATUS)), (1, 0));
    }
}
