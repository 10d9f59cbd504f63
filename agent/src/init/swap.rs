//! Swap space: a hibernated guest goes on from it, any other uses it.
//!
//! The kernel cannot look for an image by itself (`resume=`): the disk's driver is a module. So init tells it where to
//! look, before anything is mounted: filesystems are mounted already in the image, and must not change under it.
#![expect(unsafe_code, reason = "swapon(2) is not in rustix")]

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::cmdline::DeviceName;
use super::filesystems::wait_for;
use super::say;
use super::uevents::Uevents;

/// Resumes from the image on the device, which does not return; or else uses it as swap space, which is where the next
/// image will go.
pub(super) fn resume_or_use(device: &DeviceName, uevents: &mut Uevents) {
    match wait_for(device, uevents) {
        Ok(path) => {
            if let Err(error) = resume(&path) {
                say!("cannot look for an image on {device}: {error}");
            }
            if let Err(error) = swap_on(&path) {
                say!("cannot use {device} as swap space: {error}");
            }
        }
        Err(error) => say!("cannot resume from {device}: {error}"),
    }
}

/// Returns if there is no image, or none that this kernel can go on from; it says which on its log.
fn resume(path: &Path) -> io::Result<()> {
    let device = fs::metadata(path)?.rdev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    fs::write("/sys/power/resume", format!("{major}:{minor}"))
}

fn swap_on(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the path is a string that lives over the call.
    if unsafe { libc::swapon(path.as_ptr(), 0) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EINVAL) => Err(io::Error::new(
            error.kind(),
            "no swap space is on the device, or an image nobody resumed from",
        )),
        _ => Err(error),
    }
}
