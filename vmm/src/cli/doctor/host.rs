//! What else of the host matters.
#![expect(unsafe_code, reason = "io_uring_setup is asked for by number")]

use super::Check;
use crate::cli::run::guest_image::GuestImage;
use crate::config::format_size;
use crate::host;
use crate::run_dir;

/// A guest image and its page cache are comfortable with this much.
const COMFORTABLE: u64 = 1 << 30;

pub(super) fn memory() -> Check {
    const NAME: &str = "memory";
    let available = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| available_in(&text));
    let total = round(host::total_memory());
    match available {
        Some(available) if available < COMFORTABLE => Check::warning(
            NAME,
            format!("{} of {total} available", round(available)),
            "end something, or give VMs little memory (`--memory 128M`)",
        ),
        Some(available) => Check::ok(NAME, format!("{} of {total} available", round(available))),
        None => Check::ok(NAME, total),
    }
}

fn available_in(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}

/// Whole mebibytes: nobody reads more digits.
fn round(bytes: u64) -> String {
    format_size(bytes >> 20 << 20)
}

pub(super) fn io_uring() -> Check {
    const NAME: &str = "io_uring";
    // SAFETY: no ring of zero entries is ever made, so that the kernel does not look at the null pointer beyond finding
    // that there is nothing.
    let result =
        unsafe { libc::syscall(libc::SYS_io_uring_setup, 0_u32, std::ptr::null_mut::<libc::c_void>()) };
    let error = std::io::Error::last_os_error();
    match error.raw_os_error() {
        _ if result >= 0 => Check::ok(NAME, "allowed"),
        // It came as far as looking at the arguments.
        Some(libc::EFAULT | libc::EINVAL) => Check::ok(NAME, "allowed"),
        Some(libc::ENOSYS) => Check::warning(
            NAME,
            "this kernel has none",
            "disks work with threads, more slowly; Linux 5.6 has it",
        ),
        _ => Check::warning(
            NAME,
            format!("not allowed ({error})"),
            "disks work with threads, more slowly; see /proc/sys/kernel/io_uring_disabled and the container's seccomp \
             profile",
        ),
    }
}

pub(super) fn run_dir() -> Check {
    const NAME: &str = "run-time directory";
    let base = run_dir::base();
    // Making the directory of a VM shows all that can go wrong.
    match run_dir::RunDir::create(&format!("doctor-{}", std::process::id())) {
        Ok(_) => Check::ok(NAME, base.display().to_string()),
        Err(error) => Check::failure(
            NAME,
            format!("{:#}", anyhow::Error::new(error)),
            "set TARN_RUN_DIR to a directory of your own with a short path",
        ),
    }
}

pub(super) fn guest_image() -> Check {
    const NAME: &str = "guest image";
    match GuestImage::find() {
        Ok(image) => Check::ok(NAME, image.kernel.display().to_string()),
        Err(error) => Check::warning(NAME, "none", format!("{error:#}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_in_kib() {
        assert_eq!(available_in("MemTotal: 1 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(available_in("MemTotal: 1 kB\n"), None);
    }
}
