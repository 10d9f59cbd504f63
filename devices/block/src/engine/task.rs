//! An operation as a sequence of calls: what comes next, given what the last one said.
//!
//! ```text
//!   Transfer   call, and again with the rest while it falls short
//!   Bounce     direct I/O from memory or to offsets that do not suit: piece by piece through an
//!              aligned buffer; where a piece has ragged ends, it is first read, then patched and
//!              written back, which only works while nothing else is in flight (`exclusive`)
//!   Sync       fdatasync
//!   Discard    hole or BLKDISCARD; what cannot be done counts as done
//!   Extent     lseek, twice at most
//!   Zeroes     hole (if allowed) ▶ zero range ▶ written zeroes, until one works
//! ```

#![expect(unsafe_code, reason = "bounces through raw buffers under the contract of Engine::queue")]

use std::os::fd::RawFd;

use super::call::{Call, CallKind, MAX_SEGMENTS};
use super::memory::{self, Aligned, Buffer, Direction};
use crate::errno::Errno;
use crate::geometry::Geometry;

/// One piece of a bounced transfer, which bounds the memory a request can cost.
const BOUNCE: u64 = 256 << 10;
/// Zeroes written by one call.
const ZERO_CHUNK: u64 = 1 << 20;
/// How often a call may say `EAGAIN` before we believe it.
const MAX_RETRIES: u32 = 128;

/// What every task needs to know about its disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub(super) fd: RawFd,
    pub(super) geometry: Geometry,
    /// Writes are durable when the call is done (writethrough with direct I/O).
    pub(super) durable: bool,
    /// The calls the host has refused as unsupported before.
    pub(super) lacks: Lacks,
    /// A sync has failed, so the page cache may call clean what never reached the disk.
    pub(super) lost: Option<Errno>,
}

impl Target {
    /// The verdict on a sync. Linux tells a writeback error once and then forgets it, and the data: the
    /// next sync would succeed for nothing. So the error stays. Direct I/O has no cache to lose from.
    fn synced(&mut self, result: i32) -> Result<(), Errno> {
        let outcome = outcome(result).map(drop);
        if self.geometry.offset_alignment == 1 {
            self.lost = self.lost.or(outcome.err());
        }
        outcome
    }
}

/// What this file system or device was found not to do.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Lacks {
    pub(super) hole: bool,
    pub(super) zero_range: bool,
    pub(super) discard: bool,
}

/// Whether a task is over.
pub(super) enum Progress {
    /// It has another call to make.
    Next,
    /// It is done.
    Done(Result<(), Errno>),
}

pub(super) enum Task {
    Transfer(Transfer),
    Bounce(Bounce),
    Sync,
    Discard {
        offset: u64,
        length: u64,
        synced: bool,
    },
    Zeroes(Zeroes),
    /// One buffer, for the answer.
    Extent {
        offset: u64,
        answer: Vec<Buffer>,
    },
}

impl Task {
    /// A read or write of the caller's buffers.
    pub(super) fn transfer(target: &Target, write: bool, offset: u64, buffers: Vec<Buffer>) -> Self {
        let left = memory::total(&buffers).unwrap_or(0);
        let Geometry { offset_alignment, memory_alignment, .. } = target.geometry;
        let suits = |n: u64, alignment: u32| n.is_multiple_of(u64::from(alignment));
        let aligned = suits(offset, offset_alignment)
            && buffers
                .iter()
                .all(|b| suits(b.base() as u64, memory_alignment) && suits(b.len() as u64, offset_alignment));
        let transfer = Transfer { write, offset, left, first: 0, retries: 0, buffers };
        if aligned { Self::Transfer(transfer) } else { Self::Bounce(Bounce::new(transfer)) }
    }

    /// Whether it must be the only one in flight.
    pub(super) fn is_exclusive(&self, target: &Target) -> bool {
        let ragged = |offset: u64, length: u64| {
            let alignment = u64::from(target.geometry.offset_alignment);
            !offset.is_multiple_of(alignment) || !length.is_multiple_of(alignment)
        };
        match self {
            Self::Bounce(bounce) => bounce.user.write && ragged(bounce.user.offset, bounce.user.left),
            Self::Zeroes(zeroes) => ragged(zeroes.offset, zeroes.left),
            Self::Transfer(_) | Self::Sync | Self::Discard { .. } | Self::Extent { .. } => false,
        }
    }

    /// Whether it changes the image.
    pub(super) fn is_write(&self) -> bool {
        match self {
            Self::Transfer(transfer) => transfer.write,
            Self::Bounce(bounce) => bounce.user.write,
            Self::Discard { .. } | Self::Zeroes(_) => true,
            Self::Sync | Self::Extent { .. } => false,
        }
    }

    /// The call to make now. Called again only after [`Self::advance`] said [`Progress::Next`].
    pub(super) fn next_call(&mut self, target: &Target) -> Call {
        let range = |kind, offset, length| Call::on_range(target.fd, kind, offset, length);
        match self {
            Self::Transfer(transfer) => transfer.call(target),
            Self::Bounce(bounce) => bounce.call(target),
            Self::Sync | Self::Discard { synced: true, .. } => range(CallKind::Sync, 0, 0),
            Self::Discard { offset, length, .. } => {
                let device = target.geometry.is_block_device;
                let kind = if device { CallKind::DeviceDiscard } else { CallKind::PunchHole };
                range(kind, *offset, *length)
            }
            Self::Zeroes(zeroes) => zeroes.call(target),
            Self::Extent { offset, answer } => Call {
                segments: Buffer::as_segments(answer),
                segment_count: 1,
                ..range(CallKind::Extent, *offset, 0)
            },
        }
    }

    /// Takes the result of the call: bytes, zero or `-errno`.
    pub(super) fn advance(&mut self, target: &mut Target, result: i32) -> Progress {
        match self {
            Self::Transfer(transfer) => transfer.advance(result),
            Self::Bounce(bounce) => bounce.advance(target, result),
            Self::Sync | Self::Discard { synced: true, .. } => Progress::Done(target.synced(result)),
            Self::Discard { synced, .. } => match outcome(result) {
                Ok(_) if target.durable => {
                    *synced = true;
                    Progress::Next
                }
                Err(errno) if errno.is_unsupported() => {
                    target.lacks.discard = true;
                    Progress::Done(Ok(()))
                }
                outcome => Progress::Done(outcome.map(drop)),
            },
            Self::Zeroes(zeroes) => zeroes.advance(target, result),
            Self::Extent { .. } => Progress::Done(outcome(result).map(drop)),
        }
    }
}

/// A result of the kernel's as a value.
fn outcome(result: i32) -> Result<u64, Errno> {
    u64::try_from(result).map_err(|_| Errno::new(result.saturating_neg()))
}

/// Bytes between the disk and memory that suits it.
pub(super) struct Transfer {
    write: bool,
    offset: u64,
    /// Bytes still to move.
    left: u64,
    /// The first buffer with something left.
    first: usize,
    retries: u32,
    buffers: Vec<Buffer>,
}

impl Transfer {
    fn call(&mut self, target: &Target) -> Call {
        let kind = match (self.write, target.durable) {
            (false, _) => CallKind::Read,
            (true, false) => CallKind::Write,
            (true, true) => CallKind::DurableWrite,
        };
        let rest = self.buffers.get(self.first..).unwrap_or_default();
        let rest = &rest[..rest.len().min(MAX_SEGMENTS)];
        Call {
            fd: target.fd,
            kind,
            offset: self.offset,
            length: 0,
            segments: Buffer::as_segments(rest),
            segment_count: u32::try_from(rest.len()).unwrap_or(0),
            aside: false,
        }
    }

    fn advance(&mut self, result: i32) -> Progress {
        let moved = match outcome(result) {
            Ok(moved) => moved.min(self.left),
            Err(errno) if matches!(errno.get(), libc::EINTR | libc::EAGAIN) => {
                self.retries += 1;
                return if self.retries > MAX_RETRIES { Progress::Done(Err(errno)) } else { Progress::Next };
            }
            Err(errno) => return Progress::Done(Err(errno)),
        };
        self.left -= moved;
        self.offset += moved;
        if self.left == 0 {
            return Progress::Done(Ok(()));
        }
        if moved == 0 {
            // The image has become shorter than the disk: it holds nothing to make up for that.
            return Progress::Done(Err(Errno::new(libc::EIO)));
        }
        let mut moved = moved;
        while let Some(buffer) = self.buffers.get_mut(self.first) {
            if moved < buffer.len() as u64 {
                buffer.advance(usize::try_from(moved).unwrap_or(0));
                break;
            }
            moved -= buffer.len() as u64;
            self.first += 1;
        }
        Progress::Next
    }
}

/// Bytes between the disk and memory, or a range, that does not suit direct I/O.
pub(super) struct Bounce {
    /// What was asked; `offset` and `left` move on piece by piece.
    user: Transfer,
    /// Bytes of the user's that are done.
    done: u64,
    piece: Option<Piece>,
}

struct Piece {
    memory: Aligned,
    /// Bytes of the window on disk, a multiple of the alignment.
    window: u64,
    /// Where in the window the user's bytes begin, and how many they are.
    skip: u64,
    length: u64,
    /// What is under way: reading the window, or writing it.
    transfer: Transfer,
}

impl Bounce {
    fn new(user: Transfer) -> Self {
        Self { user, done: 0, piece: None }
    }

    fn call(&mut self, target: &Target) -> Call {
        match &mut self.piece {
            Some(piece) => piece.transfer.call(target),
            None => {
                let piece = self.next_piece(&target.geometry);
                self.piece.insert(piece).transfer.call(target)
            }
        }
    }

    fn next_piece(&self, geometry: &Geometry) -> Piece {
        let alignment = u64::from(geometry.offset_alignment);
        let skip = self.user.offset % alignment;
        let start = self.user.offset - skip;
        let window = (skip + self.user.left).next_multiple_of(alignment).min(BOUNCE);
        let length = self.user.left.min(window - skip);
        let size = usize::try_from(window).unwrap_or(0);
        let memory_alignment = geometry.memory_alignment.max(geometry.offset_alignment) as usize;
        let mut memory = Aligned::new(size, memory_alignment);
        let ragged = skip != 0 || length != window;
        if self.user.write && !ragged {
            // SAFETY: the user's memory is valid until completion; the bounce buffer is ours.
            unsafe {
                memory::copy(&self.user.buffers, self.done, memory.as_mut_slice(), Direction::Gather);
            }
        }
        let transfer = Transfer {
            write: self.user.write && !ragged,
            offset: start,
            left: window,
            first: 0,
            retries: 0,
            buffers: vec![memory.buffer(size)],
        };
        Piece { memory, window, skip, length, transfer }
    }

    fn advance(&mut self, target: &Target, result: i32) -> Progress {
        let Some(piece) = &mut self.piece else { return Progress::Done(Err(Errno::new(libc::EIO))) };
        match piece.transfer.advance(result) {
            Progress::Done(Ok(())) => {}
            other => return other,
        }
        if !piece.transfer.write {
            let start = usize::try_from(piece.skip).unwrap_or(0);
            let end = usize::try_from(piece.skip + piece.length).unwrap_or(0);
            let direction = if self.user.write { Direction::Gather } else { Direction::Scatter };
            let slice = &mut piece.memory.as_mut_slice()[start..end];
            // SAFETY: the user's memory is valid until completion; the bounce buffer is ours.
            unsafe { memory::copy(&self.user.buffers, self.done, slice, direction) };
            if self.user.write {
                let size = usize::try_from(piece.window).unwrap_or(0);
                piece.transfer = Transfer {
                    write: true,
                    offset: self.user.offset - piece.skip,
                    left: piece.window,
                    first: 0,
                    retries: 0,
                    buffers: vec![piece.memory.buffer(size)],
                };
                return Progress::Next;
            }
        }
        self.done += piece.length;
        self.user.offset += piece.length;
        self.user.left -= piece.length;
        self.piece = if self.user.left == 0 { None } else { Some(self.next_piece(&target.geometry)) };
        if self.piece.is_some() { Progress::Next } else { Progress::Done(Ok(())) }
    }
}

/// How a range becomes zeroes, from the cheapest way to the surest.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Method {
    Hole,
    ZeroRange,
    Written,
    Sync,
}

/// A range that is to read as zeroes.
pub(super) struct Zeroes {
    offset: u64,
    left: u64,
    method: Method,
    /// The write under way, and how long it is.
    write: Option<(Box<Task>, u64)>,
}

impl Zeroes {
    /// `unmap`: a hole will do.
    pub(super) fn new(target: &Target, offset: u64, length: u64, unmap: bool) -> Self {
        let method = match (unmap && !target.lacks.hole, target.lacks.zero_range) {
            (true, _) => Method::Hole,
            (false, false) => Method::ZeroRange,
            (false, true) => Method::Written,
        };
        Self { offset, left: length, method, write: None }
    }

    fn call(&mut self, target: &Target) -> Call {
        let kind = match self.method {
            Method::Hole => CallKind::PunchHole,
            Method::ZeroRange => CallKind::ZeroRange,
            Method::Sync => return Call::on_range(target.fd, CallKind::Sync, 0, 0),
            Method::Written => {
                let (offset, left) = (self.offset, self.left);
                let (write, _) = self.write.get_or_insert_with(|| {
                    let length = left.min(ZERO_CHUNK);
                    (Box::new(Task::transfer(target, true, offset, memory::zeroes(length))), length)
                });
                return write.next_call(target);
            }
        };
        Call::on_range(target.fd, kind, self.offset, self.left)
    }

    fn advance(&mut self, target: &mut Target, result: i32) -> Progress {
        match self.method {
            Method::Sync => Progress::Done(target.synced(result)),
            Method::Written => {
                let Some((write, length)) = &mut self.write else {
                    return Progress::Done(Err(Errno::new(libc::EIO)));
                };
                match write.advance(target, result) {
                    Progress::Done(Ok(())) => {}
                    other => return other,
                }
                self.offset += *length;
                self.left -= *length;
                self.write = None;
                // Durable writes need no sync of their own.
                if self.left == 0 { Progress::Done(Ok(())) } else { Progress::Next }
            }
            Method::Hole | Method::ZeroRange => match outcome(result) {
                Ok(_) if target.durable => {
                    self.method = Method::Sync;
                    Progress::Next
                }
                Ok(_) => Progress::Done(Ok(())),
                Err(errno) if errno.is_unsupported() || errno.get() == libc::EINVAL => {
                    // EINVAL may be about this range alone.
                    self.fall_back(target, errno.is_unsupported());
                    Progress::Next
                }
                Err(errno) if errno.get() == libc::EINTR => Progress::Next,
                Err(errno) => Progress::Done(Err(errno)),
            },
        }
    }

    fn fall_back(&mut self, target: &mut Target, forever: bool) {
        if self.method == Method::Hole {
            target.lacks.hole |= forever;
            self.method = if target.lacks.zero_range { Method::Written } else { Method::ZeroRange };
        } else {
            target.lacks.zero_range |= forever;
            self.method = Method::Written;
        }
    }
}
