//! The power button, as an input device (Linux `Documentation/input/event-codes.rst`).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

const DIRECTORY: &str = "/dev/input";
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
const PRESSED: i32 = 1;
/// `struct input_event`: a timeval, then type, code and value.
const EVENT: usize = size_of::<libc::timeval>() + 8;
/// Events read at a time.
const BATCH: usize = 32;

/// Every input device there is; any of them may have the button.
#[derive(Debug, Default)]
pub(super) struct Buttons {
    open: BTreeMap<OsString, File>,
}

impl Buttons {
    /// Opens the devices that came.
    pub(super) fn refresh(&mut self) {
        let Ok(entries) = fs::read_dir(DIRECTORY) else { return };
        for entry in entries.filter_map(Result::ok) {
            let name = entry.file_name();
            if !name.as_encoded_bytes().starts_with(b"event") || self.open.contains_key(&name) {
                continue;
            }
            let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(entry.path());
            if let Ok(file) = opened {
                self.open.insert(name, file);
            }
        }
    }

    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.open.values().map(AsFd::as_fd)
    }

    /// Takes all events; whether the power key went down. A device that went is forgotten.
    pub(super) fn is_power_pressed(&mut self) -> bool {
        let mut pressed = false;
        self.open.retain(|_, file| {
            let mut events = [0; EVENT * BATCH];
            loop {
                match file.read(&mut events) {
                    Ok(0) => return false,
                    Ok(count) => pressed |= events[..count].chunks_exact(EVENT).any(is_power_press),
                    Err(error) => return error.kind() == std::io::ErrorKind::WouldBlock,
                }
            }
        });
        pressed
    }
}

fn is_power_press(event: &[u8]) -> bool {
    let [.., kind0, kind1, code0, code1, value0, value1, value2, value3] = *event else { return false };
    u16::from_ne_bytes([kind0, kind1]) == EV_KEY
        && u16::from_ne_bytes([code0, code1]) == KEY_POWER
        && i32::from_ne_bytes([value0, value1, value2, value3]) == PRESSED
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: u16, code: u16, value: i32) -> Vec<u8> {
        let mut bytes = vec![0; EVENT - 8];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&code.to_ne_bytes());
        bytes.extend_from_slice(&value.to_ne_bytes());
        bytes
    }

    #[test]
    fn only_a_press_of_the_power_key_counts() {
        assert!(is_power_press(&event(EV_KEY, KEY_POWER, 1)));
        assert!(!is_power_press(&event(EV_KEY, KEY_POWER, 0)));
        assert!(!is_power_press(&event(EV_KEY, 30, 1)));
        assert!(!is_power_press(&event(0, KEY_POWER, 1)));
        assert!(!is_power_press(&[]));
    }
}
