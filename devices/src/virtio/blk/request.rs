//! A descriptor chain becomes an owned request, once.
//!
//! ```text
//!   readable:  type u32 · reserved u32 · sector u64 │ data of a write, or 16-byte ranges
//!   writable:  data of a read, or the disk's ID │ status u8
//! ```
//!
//! The header and the ranges are copied out of guest memory here and nothing is read again; what
//! remains are addresses that were checked against guest memory. A request that makes no sense gets a
//! status; only a chain without room for one breaks the queue.

use block::Buffer;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

use crate::virtio::queue::{Buffers, Chain, Head, Segment, Violation, Virtqueue};

/// Segments of data in a request. As in QEMU: a queueful of 256 without header and status.
pub(super) const SEG_MAX: u32 = 254;
/// The unit of every address in the protocol, whatever the block size.
pub(super) const SECTOR: u64 = 512;
/// What one request may cover, which bounds how long a drain takes.
pub(super) struct RangeLimit {
    pub(super) ranges: u32,
    /// In one range.
    pub(super) sectors: u32,
    /// Flags a range may have.
    flags: u32,
}
/// Linux merges up to 256 discards into one request. Holes are cheap, so ranges may be large: 1 GiB.
pub(super) const DISCARD: RangeLimit = RangeLimit { ranges: 64, sectors: 1 << 21, flags: 0 };
/// Some hosts have to write the zeroes: 64 MiB.
pub(super) const WRITE_ZEROES: RangeLimit =
    RangeLimit { ranges: 1, sectors: 1 << 17, flags: VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
/// Length of a disk's ID (virtio 1.2, section 5.2.6).
pub(super) const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

const HEADER: usize = 16;
const RANGE: usize = 16;

/// How a request ended, for the driver: VIRTIO_BLK_S_OK, _IOERR, _UNSUPP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What requests are checked against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Size of the disk in bytes.
    pub(super) size: u64,
    pub(super) read_only: bool,
    /// What was negotiated.
    pub(super) features: u64,
}

impl Limits {
    fn has(&self, feature: u32) -> bool {
        self.features & (1 << feature) != 0
    }

    /// The byte offset of `length` bytes at `sector`, if they are on the disk.
    fn locate(&self, sector: u64, length: u64) -> Result<u64, Status> {
        sector
            .checked_mul(SECTOR)
            .filter(|offset| offset.checked_add(length).is_some_and(|end| end <= self.size))
            .ok_or(Status::IoError)
    }
}

/// A part of the disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) length: u64,
    /// Zeroes may be a hole.
    pub(super) unmap: bool,
}

/// What a request comes to.
#[derive(Debug)]
pub(super) enum Ask {
    /// The disk has something to do.
    Work(Work),
    /// The driver wants to know the disk's ID.
    Identify(Data),
    /// It makes no sense.
    Refused(Status),
}

/// What the disk is to do.
#[derive(Debug)]
pub(super) enum Work {
    Read { offset: u64, data: Data },
    Write { offset: u64, data: Data },
    Flush,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
}

/// Guest memory that a request reads from or writes to.
#[derive(Debug)]
pub(super) struct Data {
    segments: Vec<Segment>,
    length: u32,
}

impl Data {
    /// The first `length` bytes of `buffers`, in as many segments as were announced: requests are kept
    /// while they are in flight, so their size is bounded.
    fn new(buffers: &Buffers, length: u32) -> Result<Self, Status> {
        let mut left = length;
        let mut segments = Vec::with_capacity(buffers.segments().len());
        for segment in buffers.segments() {
            let len = segment.len.min(left);
            if len > 0 {
                segments.push(Segment { addr: segment.addr, len });
            }
            left -= len;
        }
        if segments.len() > SEG_MAX as usize {
            return Err(Status::IoError);
        }
        Ok(Self { segments, length })
    }

    /// Bytes.
    pub(super) fn length(&self) -> u32 {
        self.length
    }

    /// Where the bytes are in our address space, for as long as `memory` is.
    ///
    /// # Errors
    ///
    /// The memory has gone away since the chain was checked.
    pub(super) fn map(&self, memory: &GuestMemoryMmap) -> Result<Vec<Buffer>, Violation> {
        let mut buffers = Vec::with_capacity(self.segments.len());
        for &Segment { addr, len } in &self.segments {
            // More than one slice where the segment crosses from one region into the next.
            for slice in memory.get_slices(addr, len as usize) {
                let slice = slice.map_err(|_| Violation::BadBuffer { addr: addr.0, len: u64::from(len) })?;
                buffers.push(Buffer::new(slice.ptr_guard_mut().as_ptr(), slice.len()));
            }
        }
        Ok(buffers)
    }

    /// Copies `bytes` to the start of the data, as far as there is room. Returns how many fit.
    pub(super) fn fill(&self, memory: &GuestMemoryMmap, mut bytes: &[u8]) -> u32 {
        let mut filled = 0;
        for segment in &self.segments {
            let n = bytes.len().min(segment.len as usize);
            // Was checked to be in memory; if that has changed, nobody is there to miss it.
            if n == 0 || memory.write_slice(&bytes[..n], segment.addr).is_err() {
                break;
            }
            bytes = &bytes[n..];
            filled += u32::try_from(n).unwrap_or(0);
        }
        filled
    }

    /// Fills all of the data with zeroes.
    pub(super) fn clear(&self, memory: &GuestMemoryMmap) {
        const ZEROES: [u8; 4096] = [0; 4096];
        for segment in &self.segments {
            let mut done = 0;
            while done < segment.len {
                let n = (segment.len - done).min(4096);
                let at = GuestAddress(segment.addr.0 + u64::from(done));
                // As in `fill`.
                let _ = memory.write_slice(&ZEROES[..n as usize], at);
                done += n;
            }
        }
    }
}

/// The debt to the driver: a status byte and the chain.
#[must_use = "the driver waits for this request"]
#[derive(Debug)]
pub(super) struct Pending {
    head: Head,
    status: GuestAddress,
    /// Device-writable bytes before the status.
    room: u32,
}

impl Pending {
    /// The only way out, but for dropping the queue with it: gives the chain back with its status, after
    /// `written` bytes were put at the start of the writable part.
    ///
    /// # Errors
    ///
    /// The queue is broken.
    pub(super) fn complete(
        self,
        queue: &mut Virtqueue,
        status: Status,
        written: u32,
    ) -> Result<(), Violation> {
        let Self { head, status: at, room } = self;
        queue
            .memory()
            .write_obj(status as u8, at)
            .map_err(|_| Violation::BadBuffer { addr: at.0, len: 1 })?;
        // "len" counts what was written without a gap from the start (virtio 1.2, section 2.7.8): with
        // the status byte only when the data before it is complete.
        queue.complete(head, if written == room { written + 1 } else { written })
    }
}

/// A request and the debt that comes with it.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) ask: Ask,
    pub(super) pending: Pending,
}

impl Request {
    /// Reads a chain.
    ///
    /// # Errors
    ///
    /// A [`Violation`] when there is no room for a status: the driver cannot be answered.
    pub(super) fn parse(memory: &GuestMemoryMmap, chain: Chain, limits: &Limits) -> Result<Self, Violation> {
        let Chain { head, readable, writable } = chain;
        let last = writable.segments().last();
        let Some(&Segment { addr, len }) = last else {
            return Err(Violation::Protocol { reason: "no room for a status" });
        };
        // Segments are not empty and do not wrap.
        let status = GuestAddress(addr.0 + u64::from(len - 1));
        let room = writable.remaining() - 1;
        let ask = parse_ask(memory, readable, &writable, limits).unwrap_or_else(Ask::Refused);
        Ok(Self { ask, pending: Pending { head, status, room } })
    }
}

fn parse_ask(
    memory: &GuestMemoryMmap,
    mut readable: Buffers,
    writable: &Buffers,
    limits: &Limits,
) -> Result<Ask, Status> {
    let mut header = [0; HEADER];
    match readable.read(memory, &mut header) {
        Ok(HEADER) => {}
        Ok(_) | Err(_) => return Err(Status::IoError),
    }
    let kind = u32::from_le_bytes(field(&header, 0));
    let sector = u64::from_le_bytes(field(&header, 8));
    let input = readable.remaining();
    let output = writable.remaining() - 1;

    // Whatever a kind of request does not use must not be there.
    let (wants_input, wants_output) = match kind {
        VIRTIO_BLK_T_IN | VIRTIO_BLK_T_GET_ID => (false, true),
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => (true, false),
        VIRTIO_BLK_T_FLUSH => (false, false),
        _ => return Err(Status::Unsupported),
    };
    if (input > 0 && !wants_input) || (output > 0 && !wants_output) {
        return Err(Status::IoError);
    }
    let work = match kind {
        VIRTIO_BLK_T_IN => {
            let offset = locate_sectors(limits, sector, output)?;
            Work::Read { offset, data: Data::new(writable, output)? }
        }
        VIRTIO_BLK_T_OUT => {
            writable_disk(limits)?;
            let offset = locate_sectors(limits, sector, input)?;
            Work::Write { offset, data: Data::new(&readable, input)? }
        }
        VIRTIO_BLK_T_DISCARD if limits.has(VIRTIO_BLK_F_DISCARD) => {
            writable_disk(limits)?;
            Work::Discard(parse_ranges(memory, &mut readable, limits, &DISCARD)?)
        }
        VIRTIO_BLK_T_WRITE_ZEROES if limits.has(VIRTIO_BLK_F_WRITE_ZEROES) => {
            writable_disk(limits)?;
            Work::WriteZeroes(parse_ranges(memory, &mut readable, limits, &WRITE_ZEROES)?)
        }
        VIRTIO_BLK_T_FLUSH => Work::Flush,
        VIRTIO_BLK_T_GET_ID => return Ok(Ask::Identify(Data::new(writable, output)?)),
        _ => return Err(Status::Unsupported),
    };
    Ok(Ask::Work(work))
}

/// The driver of a read-only disk may not have looked at VIRTIO_BLK_F_RO.
fn writable_disk(limits: &Limits) -> Result<(), Status> {
    if limits.read_only { Err(Status::IoError) } else { Ok(()) }
}

fn locate_sectors(limits: &Limits, sector: u64, length: u32) -> Result<u64, Status> {
    let length = u64::from(length);
    if !length.is_multiple_of(SECTOR) {
        return Err(Status::IoError);
    }
    limits.locate(sector, length)
}

/// struct virtio_blk_discard_write_zeroes: sector u64 · num_sectors u32 · flags u32.
fn parse_ranges(
    memory: &GuestMemoryMmap,
    readable: &mut Buffers,
    limits: &Limits,
    allowed: &RangeLimit,
) -> Result<Vec<Range>, Status> {
    let length = readable.remaining() as usize;
    if length == 0 || !length.is_multiple_of(RANGE) || length > RANGE * allowed.ranges as usize {
        return Err(Status::IoError);
    }
    let mut bytes = vec![0; length];
    if !readable.read(memory, &mut bytes).is_ok_and(|n| n == length) {
        return Err(Status::IoError);
    }
    bytes.chunks_exact(RANGE).map(|range| parse_range(range, limits, allowed)).collect()
}

fn parse_range(range: &[u8], limits: &Limits, allowed: &RangeLimit) -> Result<Range, Status> {
    let sector = u64::from_le_bytes(field(range, 0));
    let sectors = u32::from_le_bytes(field(range, 8));
    let flags = u32::from_le_bytes(field(range, 12));
    if flags & !allowed.flags != 0 {
        return Err(Status::Unsupported);
    }
    if sectors > allowed.sectors {
        return Err(Status::IoError);
    }
    let length = u64::from(sectors) * SECTOR;
    let offset = limits.locate(sector, length)?;
    Ok(Range { offset, length, unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 })
}

/// `N` bytes of `bytes` from `at`, which are there.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}
