//! Memory for data on its way between two images: so much and no more. Who finds none left waits for what comes back.

#![expect(unsafe_code, reason = "the kernel reads and writes the memory while it is lent out")]

use std::mem::offset_of;

use crate::engine::memory::{self, Direction, Pages};
use crate::engine::{Buffer, Extent};

/// What memory is lent in: suits every direct I/O.
pub(super) const BLOCK: usize = 64 << 10;
/// More than anybody needs.
const MOST: u64 = 1 << 30;

/// Memory lent out. Comes back with [`Pool::give_back`], when nobody reads or writes it any more.
#[derive(Debug, Default)]
pub(super) struct Loan {
    blocks: Vec<usize>,
}

impl Loan {
    /// How much there is room for.
    pub(super) fn bytes(&self) -> u64 {
        (self.blocks.len() * BLOCK) as u64
    }
}

pub(super) struct Pool {
    pages: Pages,
    free: Vec<usize>,
    capacity: usize,
}

impl Pool {
    /// Up to `bytes`, rounded up to whole blocks. Memory is used as it is lent.
    pub(super) fn new(bytes: u64) -> Self {
        let capacity = usize::try_from(bytes.clamp(1, MOST)).unwrap_or(BLOCK).div_ceil(BLOCK);
        Self { pages: Pages::new(capacity * BLOCK), free: (0..capacity).rev().collect(), capacity }
    }

    /// The most that can be lent at all, in bytes.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity as u64 * BLOCK as u64
    }

    /// Whether nothing is lent out.
    pub(super) fn is_whole(&self) -> bool {
        self.free.len() == self.capacity
    }

    /// Lends `bytes`, or nothing when there is not enough left.
    pub(super) fn lend(&mut self, bytes: u64) -> Option<Loan> {
        let blocks = usize::try_from(bytes).ok()?.div_ceil(BLOCK);
        let rest = self.free.len().checked_sub(blocks)?;
        Some(Loan { blocks: self.free.split_off(rest) })
    }

    /// Takes memory back.
    pub(super) fn give_back(&mut self, loan: Loan) {
        self.free.extend(loan.blocks);
    }

    /// The first `length` bytes of a loan, for a transfer.
    pub(super) fn buffers(&self, loan: &Loan, length: u64) -> Vec<Buffer> {
        let mut left = usize::try_from(length).unwrap_or(usize::MAX);
        let mut buffers = Vec::with_capacity(loan.blocks.len());
        for block in &loan.blocks {
            let count = left.min(BLOCK);
            if count > 0 {
                buffers.push(Buffer::new(self.pages.base().wrapping_add(block * BLOCK), count));
            }
            left -= count;
        }
        buffers
    }

    /// Copies the caller's `buffers` into a loan.
    ///
    /// # Safety
    ///
    /// They are valid for reading, whoever else may write to them meanwhile.
    pub(super) unsafe fn gather(&mut self, loan: &Loan, buffers: &[Buffer]) {
        let mut skip = 0;
        for block in &loan.blocks {
            let slice = self.slice(*block);
            // SAFETY: valid by the contract, and apart from memory of ours.
            unsafe { memory::copy(buffers, skip, slice, Direction::Gather) };
            skip += BLOCK as u64;
        }
    }

    /// Whether the first `length` bytes of a loan are all zeroes. No transfer into it is under way.
    pub(super) fn is_zero(&mut self, loan: &Loan, length: u64) -> bool {
        let mut left = usize::try_from(length).unwrap_or(usize::MAX);
        loan.blocks.iter().all(|block| {
            let count = left.min(BLOCK);
            left -= count;
            self.slice(*block)[..count]
                .chunks(4096)
                .all(|page| page.iter().fold(0, |all, byte| all | byte) == 0)
        })
    }

    /// Where in a loan an extent is to be told; until it is, nothing is known.
    pub(super) fn answer(&mut self, loan: &Loan) -> Option<Buffer> {
        let first = *self.buffers(loan, size_of::<Extent>() as u64).first()?;
        // SAFETY: a block of ours, with room for it.
        unsafe { first.base().cast::<Extent>().write_unaligned(Extent::UNKNOWN) };
        Some(first)
    }

    /// What was told where [`Self::answer`] said.
    pub(super) fn told(&mut self, loan: &Loan) -> Extent {
        let Some(block) = loan.blocks.first() else { return Extent::UNKNOWN };
        let bytes = &self.slice(*block)[..size_of::<Extent>()];
        let mut end = [0; 8];
        end.copy_from_slice(&bytes[offset_of!(Extent, end)..][..8]);
        Extent { hole: bytes[offset_of!(Extent, hole)] != 0, end: u64::from_ne_bytes(end) }
    }

    fn slice(&mut self, block: usize) -> &mut [u8] {
        &mut self.pages.as_mut_slice()[block * BLOCK..][..BLOCK]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lent_is_bounded_and_comes_back() {
        let mut pool = Pool::new(3 * BLOCK as u64 - 1);
        assert_eq!(pool.capacity(), 3 * BLOCK as u64);
        let first = pool.lend(1).unwrap();
        let second = pool.lend(BLOCK as u64 + 1).unwrap();
        assert!(pool.lend(1).is_none());
        assert!(pool.lend(u64::MAX).is_none());
        assert!(!pool.is_whole());
        pool.give_back(first);
        pool.give_back(second);
        assert!(pool.is_whole());
        assert!(pool.lend(3 * BLOCK as u64).is_some());
    }

    #[test]
    fn bytes_are_gathered_into_blocks_and_zeroes_are_seen() {
        let mut pool = Pool::new(4 * BLOCK as u64);
        let mut bytes = vec![0; BLOCK + 100];
        let loan = pool.lend(bytes.len() as u64).unwrap();
        assert!(pool.is_zero(&loan, bytes.len() as u64));
        bytes[BLOCK + 99] = 7;
        let theirs =
            [Buffer::new(bytes.as_mut_ptr(), 1000), Buffer::new(&raw mut bytes[1000], bytes.len() - 1000)];
        // SAFETY: `bytes` outlives the call.
        unsafe { pool.gather(&loan, &theirs) };
        assert!(pool.is_zero(&loan, BLOCK as u64 + 99));
        assert!(!pool.is_zero(&loan, BLOCK as u64 + 100));
        let lengths: Vec<_> = pool.buffers(&loan, bytes.len() as u64).iter().map(Buffer::len).collect();
        assert_eq!(lengths, [BLOCK, 100]);
    }

    #[test]
    fn an_extent_that_nobody_told_is_unknown() {
        let mut pool = Pool::new(1);
        let loan = pool.lend(1).unwrap();
        let answer = pool.answer(&loan).unwrap();
        assert_eq!(pool.told(&loan), Extent::UNKNOWN);
        let told = Extent { hole: true, end: 512 };
        // SAFETY: memory of the pool's, with room for it.
        unsafe { answer.base().cast::<Extent>().write_unaligned(told) };
        assert_eq!(pool.told(&loan), told);
    }
}
