//! An engine with a volatile write cache: what it keeps, what it lets pass, and what it writes below.

#![expect(unsafe_code, reason = "copies between the caller's memory and what is kept")]

use std::time::Duration;

use super::filter::Filter;
use super::filter::fault::FaultRule;
use super::filter::volatile::{Content, MAX_UNFLUSHED, Piece, VolatileCache};
use super::memory::{self, Buffer};
use super::task::{Task, Zeroes};
use super::{Completion, Engine, Extent, Operation, Slot};
use crate::errno::Errno;
use crate::event::wait_readable;
use crate::options::Cache;

/// What is kept of something that was asked of the disk below; the answer of both is what the caller gets.
pub(super) enum Patch {
    /// Of a range: it lies over what was read to these buffers.
    Read { offset: u64, buffers: Vec<Buffer>, pieces: Vec<Piece> },
    /// Beyond this, of an extent.
    Extent { answer: Buffer, next: u64 },
}

impl Patch {
    /// Corrects the answer of the disk below. The caller's memory is valid until the operation was reaped, which is
    /// the contract of [`Engine::queue`].
    pub(super) fn apply(&self) {
        match self {
            Self::Read { offset, buffers, pieces } => {
                for (range, content) in pieces {
                    let skip = range.start - offset;
                    // SAFETY: the buffers are valid until the read was reaped; what is kept is ours.
                    unsafe {
                        match content {
                            Content::Data(bytes) => memory::scatter(buffers, skip, bytes),
                            Content::Zeroes { .. } => memory::clear(buffers, skip, range.end - range.start),
                        }
                    }
                }
            }
            Self::Extent { answer, next } => {
                let answer = answer.base().cast::<Extent>();
                // SAFETY: room for an extent, which was checked, valid until the question was reaped.
                unsafe {
                    let extent = answer.read_unaligned();
                    answer.write_unaligned(Extent { end: extent.end.min(*next), ..extent });
                }
            }
        }
    }
}

impl Engine {
    /// Begins or ends to cache, as the node's rules have it.
    pub(super) fn heed_cache(&mut self) {
        let keeps = self.disk.cache() != Cache::Writethrough && !self.disk.is_read_only();
        let rule = self.node.as_ref().and_then(|filter| filter.handle().cache()).filter(|_| keeps);
        match (&self.cache, rule) {
            (None, Some(FaultRule { seed, .. })) => {
                let sector = self.disk.geometry().logical_block_size;
                self.cache = Some(VolatileCache::new(MAX_UNFLUSHED, sector, seed));
            }
            (Some(_), None) => {
                self.write_out();
                self.leave_cache();
            }
            (None, None) | (Some(_), Some(_)) => {}
        }
    }

    /// Forgets a cache that has nothing more and is not wanted. One whose content cannot be written stays until it can.
    fn leave_cache(&mut self) {
        let idle = self.cache.as_ref().is_some_and(|cache| cache.is_clean() && cache.held() == 0);
        let wanted = || self.node.as_ref().is_some_and(|filter| filter.handle().cache().is_some());
        if idle && !wanted() {
            self.cache = None;
        }
    }

    /// Takes an operation that is in order, the task in `slot`.
    pub(super) fn accept_cached(&mut self, operation: Operation, slot: Slot) {
        let Some(cache) = &mut self.cache else { return self.start_task(slot) };
        let end = Completion { token: slot.token, result: slot.fails.map_or(Ok(()), Err) };
        match (operation, &slot.task) {
            (Operation::Write { offset, buffers }, _) => {
                let bytes = gather(&buffers);
                cache.keep(offset..offset + bytes.len() as u64, Content::Data(bytes.into()), end);
            }
            (Operation::WriteZeroes { offset, length, unmap }, _) => {
                let unmap = unmap && self.disk.discards();
                cache.keep(offset..offset + length, Content::Zeroes { unmap }, end);
            }
            // What it reads as must not change with a flush: zeroes then, as they are where holes are made.
            (Operation::Discard { .. }, Task::Discard { offset, length, .. }) => {
                cache.keep(*offset..offset + length, Content::Zeroes { unmap: true }, end);
            }
            (Operation::Read { offset, buffers }, _) => self.read_cached(offset, buffers, slot),
            (Operation::Extent { offset, answer }, _) => self.extent_cached(offset, answer, slot),
            (Operation::Flush, _) if !cache.is_clean() => cache.flush(slot.token),
            (Operation::Flush | Operation::Discard { .. }, _) => self.start_task(slot),
        }
        self.pump_cache();
    }

    fn read_cached(&mut self, offset: u64, buffers: Vec<Buffer>, slot: Slot) {
        let Some(cache) = &self.cache else { return self.start_task(slot) };
        let range = offset..offset + memory::total(&buffers).unwrap_or(0);
        let pieces = cache.overlay(&range);
        let patch = (!pieces.is_empty()).then_some(Patch::Read { offset, buffers, pieces });
        self.start_task(Slot { patch, ..slot });
    }

    fn extent_cached(&mut self, offset: u64, answer: Buffer, slot: Slot) {
        let Some(cache) = &self.cache else { return self.start_task(slot) };
        match cache.extent(offset) {
            Ok(extent) => {
                // SAFETY: as in `Patch::apply`.
                unsafe { answer.base().cast::<Extent>().write_unaligned(extent) };
                self.done.push(Completion { token: slot.token, result: slot.fails.map_or(Ok(()), Err) });
            }
            Err(next) => self.start_task(Slot { patch: Some(Patch::Extent { answer, next }), ..slot }),
        }
    }

    /// The result of a write of the cache's.
    pub(super) fn settled(&mut self, order: u64, result: Result<(), Errno>) {
        if let Some(cache) = &mut self.cache {
            cache.written(order, result);
        }
        self.pump_cache();
    }

    /// Carries out what the cache wants done.
    fn pump_cache(&mut self) {
        let Some(cache) = &mut self.cache else { return };
        cache.pump();
        let output = std::mem::take(cache.output());
        let cost = cache.cost();
        self.done.extend(output.done);
        self.sync_due.extend(output.synced);
        for order in output.orders {
            let length = order.range.end - order.range.start;
            let task = match &order.content {
                Content::Data(bytes) => {
                    // Only read from.
                    let buffer = Buffer::new(bytes.as_ptr().cast_mut(), bytes.len());
                    Task::transfer(&self.target, true, order.range.start, vec![buffer])
                }
                Content::Zeroes { unmap } => {
                    Task::Zeroes(Zeroes::new(&self.target, order.range.start, length, *unmap))
                }
            };
            self.waiting.push_back(Slot { aside: true, settles: true, ..Slot::new(order.id, task) });
        }
        if let Some(handle) = self.node.as_ref().map(Filter::handle) {
            handle.set_unflushed(cost);
        }
        self.leave_cache();
        self.dispatch();
    }

    /// Writes everything that is kept, and waits for it; what cannot be written stays.
    pub(super) fn write_out(&mut self) {
        if let Some(cache) = &mut self.cache {
            cache.settle();
        }
        self.pump_cache();
        let mut broken = self.backend.submit().is_err();
        while self.cache.as_ref().is_some_and(|cache| !cache.is_settled()) && !broken {
            wait_readable(self.backend.event(), Duration::from_secs(1));
            self.take_results();
            broken = self.backend.submit().is_err();
        }
    }
}

fn gather(buffers: &[Buffer]) -> Vec<u8> {
    let length = memory::total(buffers).and_then(|total| usize::try_from(total).ok());
    let mut bytes = vec![0; length.unwrap_or(0)];
    // SAFETY: the caller's buffers are valid until the write was reaped; the bytes are ours.
    unsafe { memory::copy(buffers, 0, &mut bytes, memory::Direction::Gather) };
    bytes
}

#[cfg(test)]
mod tests;
