//! What has to survive a crash, as it lies on disk: records, and the witness of a pivot.
//!
//! ```text
//!   0      magic "TARN"     u32, little-endian like everything here
//!   4      version          u16
//!   6      kind             u16
//!   8      sequence         u64   of two records in one file the higher one counts
//!   16     operation        16 bytes, a UUID
//!   32     generation       u64   of the disk: each pivot makes it one higher
//!   40     epoch            u64   of the coordinator: a later one fences off an earlier one
//!   48     length           u32   of the payload
//!   52     payload          JSON
//!   52+n   CRC-32C          u32   of everything before it
//! ```
//!
//! A record is at most [`RECORD_MAX`] bytes, so that it fits into one block and is written by one system
//! call. A torn one fails its checksum and does not count; nor does one that was never synced, which is why a
//! reader acts on a record only after it has put its own decision on disk (the header of [`witness`]).

pub mod witness;

use serde_json::Value;
use uuid::Uuid;

/// Longest record, its header and checksum included.
pub const RECORD_MAX: usize = 4096;

const MAGIC: u32 = u32::from_le_bytes(*b"TARN");
const VERSION: u16 = 1;
const HEADER: usize = 52;
const CHECKSUM: usize = 4;

/// Which operation a record is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Operation {
    /// Its name, from its beginning to its end.
    pub id: Uuid,
    /// What the disks' generation will be if it succeeds.
    pub generation: u64,
    /// Of the coordinator that carries it out.
    pub epoch: u64,
}

/// One record.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// What it says; the file it is in gives the numbers their meaning.
    pub kind: u16,
    /// Its place in the file's history.
    pub sequence: u64,
    /// What it is about.
    pub operation: Operation,
    /// Whatever belongs to it.
    pub payload: Value,
}

/// Why bytes are no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// Nothing was ever written there.
    #[error("Empty")]
    Empty,
    /// It ends too soon: it was being written when the machine died.
    #[error("Torn record")]
    Torn,
    /// Something else, or a record of which a part is old.
    #[error("Record with a wrong checksum")]
    Checksum,
    /// From a later version of this program.
    #[error("Record of version {0}, which this program does not know")]
    Version(u16),
}

/// A payload is too long for a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("A record of {length} bytes is longer than {RECORD_MAX}")]
pub struct TooLong {
    /// Bytes it would have.
    pub length: usize,
}

impl Record {
    /// The record's bytes.
    ///
    /// # Errors
    ///
    /// It is longer than [`RECORD_MAX`].
    pub fn encode(&self) -> Result<Vec<u8>, TooLong> {
        let payload = self.payload.to_string();
        let length = HEADER + payload.len() + CHECKSUM;
        if length > RECORD_MAX {
            return Err(TooLong { length });
        }
        let Operation { id, generation, epoch } = self.operation;
        let mut bytes = Vec::with_capacity(length);
        bytes.extend(MAGIC.to_le_bytes());
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.sequence.to_le_bytes());
        bytes.extend(id.as_bytes());
        bytes.extend(generation.to_le_bytes());
        bytes.extend(epoch.to_le_bytes());
        bytes.extend(u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend(payload.as_bytes());
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        Ok(bytes)
    }

    /// How long the record that `bytes` begin with says it is, whether or not it is a good one.
    pub(crate) fn stated_length(bytes: &[u8]) -> Option<usize> {
        let mut reader = Reader { bytes: bytes.get(size_of_val(&MAGIC)..)? };
        Some(Header::read(&mut reader)?.length + HEADER + CHECKSUM)
    }

    /// The record that `bytes` begin with, and how long it is.
    ///
    /// # Errors
    ///
    /// [`Damage`]: they begin with none that counts.
    pub fn decode(bytes: &[u8]) -> Result<(Self, usize), Damage> {
        if bytes.iter().take(HEADER).all(|&byte| byte == 0) {
            return Err(Damage::Empty);
        }
        let mut reader = Reader { bytes };
        if reader.u32().ok_or(Damage::Torn)? != MAGIC {
            return Err(Damage::Checksum);
        }
        let header = Header::read(&mut reader).ok_or(Damage::Torn)?;
        let length = HEADER + header.length + CHECKSUM;
        if length > RECORD_MAX {
            return Err(Damage::Checksum);
        }
        let payload = reader.take(header.length).ok_or(Damage::Torn)?;
        let checksum = reader.u32().ok_or(Damage::Torn)?;
        if checksum != crc32c::crc32c(&bytes[..HEADER + header.length]) {
            return Err(Damage::Checksum);
        }
        // Only now: a version that is part of a torn record says nothing.
        if header.version != VERSION {
            return Err(Damage::Version(header.version));
        }
        let payload = serde_json::from_slice(payload).map_err(|_| Damage::Checksum)?;
        let Header { kind, sequence, operation, .. } = header;
        Ok((Self { kind, sequence, operation, payload }, length))
    }
}

struct Header {
    version: u16,
    kind: u16,
    sequence: u64,
    operation: Operation,
    length: usize,
}

impl Header {
    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            version: reader.u16()?,
            kind: reader.u16()?,
            sequence: reader.u64()?,
            operation: Operation {
                id: Uuid::from_slice(reader.take(16)?).ok()?,
                generation: reader.u64()?,
                epoch: reader.u64()?,
            },
            length: usize::try_from(reader.u32()?).ok()?,
        })
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(count)?;
        self.bytes = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    pub(super) fn record(sequence: u64) -> Record {
        let operation = Operation { id: Uuid::from_u128(0x1234_5678), generation: 7, epoch: 3 };
        Record { kind: 2, sequence, operation, payload: json!({"disks": ["vda", "vdb"]}) }
    }

    #[test]
    fn a_record_is_read_as_it_was_written_whatever_follows() {
        let mut bytes = record(9).encode().unwrap();
        let length = bytes.len();
        bytes.extend([0xAA; 100]);
        assert_eq!(Record::decode(&bytes), Ok((record(9), length)));
    }

    #[test]
    fn a_record_torn_anywhere_does_not_count() {
        let bytes = record(9).encode().unwrap();
        for end in 0..bytes.len() {
            let mut torn = bytes[..end].to_vec();
            assert!(Record::decode(&torn).is_err(), "cut at {end}");
            torn.resize(RECORD_MAX, 0);
            assert!(Record::decode(&torn).is_err(), "zeroes from {end} on");
            let mut mixed = record(8).encode().unwrap();
            mixed[..end].copy_from_slice(&bytes[..end]);
            // Two records of the same length differ in their sequence, which comes early.
            let is_old = end <= 8;
            assert_eq!(Record::decode(&mixed).is_ok(), is_old, "old from {end} on");
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let bytes = record(9).encode().unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Record::decode(&flipped).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn damage_is_told_apart() {
        assert_eq!(Record::decode(&[]), Err(Damage::Empty));
        assert_eq!(Record::decode(&[0; RECORD_MAX]), Err(Damage::Empty));
        assert_eq!(Record::decode(b"a stray file of somebody else"), Err(Damage::Checksum));
        let bytes = record(1).encode().unwrap();
        assert_eq!(Record::decode(&bytes[..60]), Err(Damage::Torn));
        let mut later = bytes.clone();
        later[4] = 9;
        let end = later.len() - CHECKSUM;
        let checksum = crc32c::crc32c(&later[..end]).to_le_bytes();
        later[end..].copy_from_slice(&checksum);
        assert_eq!(Record::decode(&later), Err(Damage::Version(9)));
    }

    #[test]
    fn a_record_fits_its_block_or_is_refused() {
        let mut long = record(1);
        long.payload = "x".repeat(RECORD_MAX - HEADER - CHECKSUM - 2).into();
        assert_eq!(long.encode().unwrap().len(), RECORD_MAX);
        long.payload = "x".repeat(RECORD_MAX).into();
        assert_eq!(long.encode(), Err(TooLong { length: RECORD_MAX + HEADER + CHECKSUM + 2 }));
    }
}
