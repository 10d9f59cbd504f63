//! Memory that is read from and written to: the caller's buffers, bounce buffers, zeroes.

#![expect(unsafe_code, reason = "copies between raw buffers and aligned memory")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// A piece of somebody's memory; a plain `struct iovec`.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct Buffer(libc::iovec);

// SAFETY: a buffer is an address and a length; the contract of `Engine::queue` covers its use on
// whatever thread.
unsafe impl Send for Buffer {}

impl Buffer {
    /// `length` bytes from `base`.
    pub fn new(base: *mut u8, length: usize) -> Self {
        Self(libc::iovec { iov_base: base.cast(), iov_len: length })
    }

    /// Address of the first byte.
    pub fn base(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    /// Forgets the first `n` bytes, `n` ≤ `len`.
    pub(crate) fn advance(&mut self, n: usize) {
        self.0.iov_base = self.base().wrapping_add(n).cast();
        self.0.iov_len -= n;
    }

    pub(crate) fn as_segments(buffers: &[Self]) -> *const libc::iovec {
        buffers.as_ptr().cast()
    }
}

/// Sum of the lengths, `None` when it overflows.
pub(crate) fn total(buffers: &[Buffer]) -> Option<u64> {
    buffers.iter().try_fold(0_u64, |sum, buffer| sum.checked_add(buffer.len() as u64))
}

/// Which way [`copy`] goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the buffers into the slice.
    Gather,
    /// From the slice into the buffers.
    Scatter,
}

/// Copies between `slice` and the bytes from `skip` on that `buffers` describe, as far as both reach.
///
/// # Safety
///
/// The buffers are valid for reads (gather) or writes (scatter) and do not overlap `slice`. Somebody
/// else may change them meanwhile; then the bytes copied are any of those that were there.
pub(crate) unsafe fn copy(buffers: &[Buffer], mut skip: u64, slice: &mut [u8], direction: Direction) {
    let mut at = 0;
    for buffer in buffers {
        if skip >= buffer.len() as u64 {
            skip -= buffer.len() as u64;
            continue;
        }
        // Below buffer.len().
        let start = usize::try_from(skip).unwrap_or(usize::MAX);
        skip = 0;
        let count = (buffer.len() - start).min(slice.len() - at);
        let theirs = buffer.base().wrapping_add(start);
        let ours = slice[at..at + count].as_mut_ptr();
        match direction {
            // SAFETY: both are valid for `count` bytes and apart, by the contract.
            Direction::Gather => unsafe { std::ptr::copy_nonoverlapping(theirs, ours, count) },
            // SAFETY: both are valid for `count` bytes and apart, by the contract.
            Direction::Scatter => unsafe { std::ptr::copy_nonoverlapping(ours, theirs, count) },
        }
        at += count;
        if at == slice.len() {
            return;
        }
    }
}

/// Copies `bytes` to the place from `skip` on that `buffers` describe, as far as it reaches.
///
/// # Safety
///
/// As [`copy`], to scatter.
pub(crate) unsafe fn scatter(buffers: &[Buffer], mut skip: u64, mut bytes: &[u8]) {
    for buffer in buffers {
        if skip >= buffer.len() as u64 {
            skip -= buffer.len() as u64;
            continue;
        }
        // Below buffer.len().
        let start = usize::try_from(skip).unwrap_or(usize::MAX);
        skip = 0;
        let (now, rest) = bytes.split_at(bytes.len().min(buffer.len() - start));
        let theirs = buffer.base().wrapping_add(start);
        // SAFETY: both are valid for as many bytes and apart, by the contract.
        unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), theirs, now.len()) };
        bytes = rest;
    }
}

/// The same with `length` zeroes.
///
/// # Safety
///
/// As [`copy`], to scatter.
pub(crate) unsafe fn clear(buffers: &[Buffer], skip: u64, length: u64) {
    let mut at = 0;
    while at < length {
        let now = usize::try_from(length - at).unwrap_or(usize::MAX).min(ZEROES);
        // SAFETY: by the contract.
        unsafe { scatter(buffers, skip + at, &ZERO_PAGES.0[..now]) };
        at += now as u64;
    }
}

/// Zeroed memory with an alignment.
pub(crate) struct Aligned {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it owns plain memory.
unsafe impl Send for Aligned {}

impl Aligned {
    /// `length` > 0 bytes at a multiple of `alignment`, a power of two.
    pub(crate) fn new(length: usize, alignment: usize) -> Self {
        let Ok(layout) = Layout::from_size_align(length.max(1), alignment) else {
            // No allocator could serve that, and no geometry asks for it.
            handle_alloc_error(Layout::new::<u8>())
        };
        // SAFETY: the layout is not empty.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) });
        Self { base: base.unwrap_or_else(|| handle_alloc_error(layout)), layout }
    }

    /// Address of the first byte.
    #[cfg(test)]
    pub(crate) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: allocated with this size, initialised, and borrowed mutably through self.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.layout.size()) }
    }

    /// The first `length` bytes, for a transfer.
    pub(crate) fn buffer(&self, length: usize) -> Buffer {
        Buffer::new(self.base.as_ptr(), length.min(self.layout.size()))
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

/// Zeroed pages that cost nothing until they are used, and are given back whole.
pub(crate) struct Pages {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: it owns plain memory.
unsafe impl Send for Pages {}

impl Pages {
    /// `length` > 0 bytes.
    pub(crate) fn new(length: usize) -> Self {
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, which touches no other.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
        match NonNull::new(base.cast::<u8>()) {
            Some(valid) if base != libc::MAP_FAILED => Self { base: valid, length },
            // As any other allocation that fails.
            _ => handle_alloc_error(Layout::new::<u8>()),
        }
    }

    /// Address of the first byte, page-aligned.
    pub(crate) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: mapped with this size, and borrowed mutably through self.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.length) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody has it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
    }
}

const ZEROES: usize = 64 << 10;

#[repr(align(4096))]
struct Zeroes([u8; ZEROES]);
static ZERO_PAGES: Zeroes = Zeroes([0; ZEROES]);

/// `length` bytes of zeroes to write; they are never written to.
pub(crate) fn zeroes(length: u64) -> Vec<Buffer> {
    let mut left = length;
    let mut buffers = Vec::new();
    while left > 0 {
        // At most ZEROES.
        let n = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROES);
        buffers.push(Buffer::new(ZERO_PAGES.0.as_ptr().cast_mut(), n));
        left -= n as u64;
    }
    buffers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_gathered_and_scattered_across_buffers() {
        let (mut a, mut b) = (*b"abc", *b"defg");
        let buffers = [
            Buffer::new(a.as_mut_ptr(), 3),
            Buffer::new(std::ptr::null_mut(), 0),
            Buffer::new(b.as_mut_ptr(), 4),
        ];
        let mut out = [b'.'; 4];
        // SAFETY: both arrays outlive the calls.
        unsafe { copy(&buffers, 2, &mut out, Direction::Gather) };
        assert_eq!(&out, b"cdef");
        // SAFETY: as above.
        unsafe { copy(&buffers, 5, &mut [b'!'; 9], Direction::Scatter) };
        assert_eq!((&a, &b), (b"abc", b"de!!"));
    }

    #[test]
    fn zeroes_add_up_to_the_length() {
        assert_eq!(total(&zeroes(200_000)), Some(200_000));
        assert!(zeroes(0).is_empty());
    }
}
