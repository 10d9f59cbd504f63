//! What the agent inherited is not for its children.
#![expect(unsafe_code, reason = "neither std nor rustix has close_range")]

use std::io;

/// Keeps every descriptor but the standard streams, whoever opened it, from the programs that
/// clients start. Kernels before 5.11 cannot; there the agent's parent has to take care.
pub(crate) fn keep_from_children() -> io::Result<()> {
    let flags = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
    // SAFETY: descriptors are marked, not closed; nothing that is open changes its meaning.
    let result = unsafe { libc::close_range(3, libc::c_uint::MAX, flags) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
