//! The guest's clock: guest-get-time, guest-set-time, guest-get-timezone.
#![expect(unsafe_code, reason = "neither std nor rustix knows time zones")]

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::process::{self, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use protocol::{Args, Error};
use rustix::time::{ClockId, Timespec, clock_settime};
use serde_json::{Value, json};

use super::root::Root;
use super::{child, failed};
use crate::guest::Guest;
use crate::schema::{Command, Run, Type, optional, required};

const ZONE: Type = Type::Object(&[optional("zone", Type::Str), required("offset", Type::Int)]);

pub(crate) const COMMANDS: &[Command] = &[
    Command::new(
        "guest-get-timezone",
        "The time zone and its seconds east of UTC",
        Run::Worker(get_timezone),
    )
    .returns(ZONE),
    Command::new(
        "guest-set-time",
        "Sets the clock to nanoseconds since 1970, and the hardware clock by it; without a time, the clock by the hardware clock",
        Run::Worker(set_time),
    )
    .takes(&[optional("time", Type::Int)]),
    Command::new("guest-get-time", "Nanoseconds since 1970 by the guest's clock", Run::Worker(get_time))
        .returns(Type::Int),
];

const SECOND: i64 = 1_000_000_000;
/// Times that can be set: from 1970 to the end of 2069, in seconds. Hardware clocks have two digits for the year.
const YEARS: std::ops::Range<i64> = 0..3_155_760_000;

fn get_time(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanoseconds = since.ok().and_then(|since| i64::try_from(since.as_nanos()).ok());
    nanoseconds.map(Value::from).ok_or_else(|| Error::generic("Failed to get time"))
}

fn set_time(_: &mut Guest, mut args: Args) -> Result<Value, Error> {
    let time = args.optional_int("time")?;
    args.finish()?;
    if let Some(time) = time {
        let time = timespec(time)?;
        clock_settime(ClockId::Realtime, time)
            .map_err(|error| failed("Failed to set time to guest", &error.into()))?;
    }
    if time.is_some() && !has_hardware_clock(&Root::guest()) {
        // A microVM: there is nothing to keep in step, and the clock is set.
        return Ok(json!({}));
    }
    let direction = if time.is_some() { "-w" } else { "-s" };
    let mut hwclock = process::Command::new("/sbin/hwclock");
    child::succeed(hwclock.arg(direction).stdin(Stdio::null()), "set hardware clock to system time")?;
    Ok(json!({}))
}

fn has_hardware_clock(root: &Root) -> bool {
    root.names("/sys/class/rtc").is_ok_and(|clocks| !clocks.is_empty())
}

/// A time to set the clock to.
fn timespec(nanoseconds: i64) -> Result<Timespec, Error> {
    let (seconds, rest) = (nanoseconds.div_euclid(SECOND), nanoseconds.rem_euclid(SECOND));
    if YEARS.contains(&seconds) {
        return Ok(Timespec { tv_sec: seconds, tv_nsec: rest });
    }
    Err(failed("Invalid time", &std::io::Error::from_raw_os_error(libc::EINVAL)))
}

fn get_timezone(_: &mut Guest, args: Args) -> Result<Value, Error> {
    args.finish()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.ok().and_then(|now| i64::try_from(now.as_secs()).ok()).unwrap_or_default();
    zone(now).ok_or_else(|| Error::generic("Couldn't retrieve time zone"))
}

unsafe extern "C" {
    /// tzset(3): looks again which zone is configured.
    fn tzset();
}

/// The zone in force at a time.
fn zone(seconds: i64) -> Option<Value> {
    let mut broken_down = MaybeUninit::<libc::tm>::zeroed();
    // SAFETY: the environment, which tzset reads, is never changed, and only the worker calls it.
    // localtime_r fills the structure, or returns null.
    let local = unsafe {
        tzset();
        libc::localtime_r(&raw const seconds, broken_down.as_mut_ptr())
    };
    if local.is_null() {
        return None;
    }
    // SAFETY: an all-zero structure is valid, and so is what localtime_r made of it.
    let broken_down = unsafe { broken_down.assume_init() };
    let offset = broken_down.tm_gmtoff;
    if broken_down.tm_zone.is_null() {
        return Some(json!({"offset": offset}));
    }
    // SAFETY: it points to a string of the C library that stays until the next tzset.
    let name = unsafe { CStr::from_ptr(broken_down.tm_zone) };
    Some(json!({"zone": name.to_string_lossy(), "offset": offset}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_times_that_a_hardware_clock_can_hold_are_set() {
        assert_eq!(timespec(1), Ok(Timespec { tv_sec: 0, tv_nsec: 1 }));
        let last = timespec(3_155_760_000 * SECOND - 1);
        assert_eq!(last, Ok(Timespec { tv_sec: 3_155_759_999, tv_nsec: 999_999_999 }));
        for time in [-1, 3_155_760_000 * SECOND, i64::MIN, i64::MAX] {
            assert_eq!(timespec(time).unwrap_err().desc, "Invalid time: Invalid argument", "{time}");
        }
    }

    #[test]
    fn a_machine_may_have_no_hardware_clock() {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::at(directory.path());
        assert!(!has_hardware_clock(&root));
        std::fs::create_dir_all(root.join("/sys/class/rtc")).unwrap();
        assert!(!has_hardware_clock(&root));
        std::fs::create_dir(root.join("/sys/class/rtc/rtc0")).unwrap();
        assert!(has_hardware_clock(&root));
    }

    #[test]
    fn there_is_always_a_zone() {
        for seconds in [0, 1_700_000_000, i64::from(i32::MAX) + 1] {
            ZONE.check(&zone(seconds).unwrap()).unwrap();
        }
        assert_eq!(zone(i64::MAX), None, "no such year");
    }
}
