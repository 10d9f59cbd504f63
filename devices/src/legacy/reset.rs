//! Two ways to ask for a reset: the keyboard controller's, and port 0xCF9.
//!
//! Linux tries the ACPI reset register first, then these (`native_machine_emergency_restart()` of
//! `arch/x86/kernel/reboot.c`).

use crate::bus::{Action, BusDevice};

const KEYBOARD_DATA: u64 = 0;
const SYSTEM_CONTROL: u64 = 1;
const KEYBOARD_COMMAND: u64 = 4;

/// Pulse the reset line of the processor.
const COMMAND_RESET: u8 = 0xfe;
/// Output buffer full, input buffer empty.
const STATUS_OUTPUT_FULL: u8 = 0x01;
/// Output of timer 2 is high; no parity or channel error.
const TIMER_2_OUTPUT: u8 = 0x20;

/// An i8042 that knows the reset command, and the system control port B that lies between its ports.
///
/// The status is chosen so that nobody waits. The output buffer is always full: Linux reads 16 bytes at boot,
/// concludes that there is no controller, and goes on after a millisecond, where an empty buffer would cost it
/// half a second (`i8042_flush()`, `i8042_command()`). The input buffer is always empty: before a reset it does
/// not wait for that (`kb_wait()`).
#[derive(Debug, Default)]
pub struct KeyboardController;

impl KeyboardController {
    /// The customary first port.
    pub const BASE: u64 = 0x60;
    /// Number of ports.
    pub const LEN: u64 = 5;
}

impl BusDevice for KeyboardController {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let [value] = data {
            *value = match offset {
                KEYBOARD_DATA => 0,
                SYSTEM_CONTROL => TIMER_2_OUTPUT,
                KEYBOARD_COMMAND => STATUS_OUTPUT_FULL,
                _ => 0xff,
            };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Action {
        match (offset, data) {
            (KEYBOARD_COMMAND, [COMMAND_RESET]) => Action::Reset,
            _ => Action::None,
        }
    }
}

/// The reset control register at port 0xCF9. It does for the ACPI reset register too: the FADT names
/// [`ResetControl::PORT`] and [`ResetControl::RESET_VALUE`].
#[derive(Debug, Default)]
pub struct ResetControl {
    value: u8,
}

impl ResetControl {
    /// The customary port.
    pub const PORT: u64 = 0xcf9;
    /// Number of ports.
    pub const LEN: u64 = 1;
    /// Hard reset: what Linux writes there, and what the FADT should tell it to.
    pub const RESET_VALUE: u8 = SYSTEM_RESET | RESET_CPU;
}

const SYSTEM_RESET: u8 = 0x02;
const RESET_CPU: u8 = 0x04;

impl BusDevice for ResetControl {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let [value] = data {
            *value = self.value;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) -> Action {
        let &[value] = data else { return Action::None };
        // The bit that resets is an edge: it never reads back as set.
        self.value = value & !RESET_CPU;
        if value & RESET_CPU != 0 { Action::Reset } else { Action::None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(device: &mut impl BusDevice, offset: u64) -> u8 {
        let mut data = [0x55];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn linux_finds_no_keyboard_and_need_not_wait_before_a_reset() {
        let mut controller = KeyboardController;
        for _ in 0..17 {
            assert_eq!(read(&mut controller, 4) & 0x03, 0x01);
            read(&mut controller, 0);
        }
        assert_eq!(controller.write(4, &[0xfe]), Action::Reset);
    }

    #[test]
    fn nothing_but_the_reset_command_resets() {
        let mut controller = KeyboardController;
        for offset in 0..KeyboardController::LEN {
            for value in 0..=0xff {
                let action = controller.write(offset, &[value]);
                assert_eq!(action == Action::Reset, offset == 4 && value == 0xfe);
            }
            assert_eq!(controller.write(offset, &[0xfe, 0xfe]), Action::None);
        }
        assert_eq!(read(&mut controller, 1), 0x20);
        let mut wide = [0; 4];
        controller.read(0, &mut wide);
        assert_eq!(wide, [0xff; 4]);
    }

    #[test]
    fn the_reset_control_register_resets_when_linux_says_so() {
        let mut control = ResetControl::default();
        let before = read(&mut control, 0) & !ResetControl::RESET_VALUE;
        assert_eq!(control.write(0, &[before | 0x02]), Action::None);
        assert_eq!(read(&mut control, 0), 0x02);
        assert_eq!(control.write(0, &[before | ResetControl::RESET_VALUE]), Action::Reset);
        assert_eq!(control.write(0, &[0, 6]), Action::None);
    }
}
