//! What an operation is allowed, and what becomes of it: offsets and lengths originate with a guest.

use super::task::{Task, Zeroes};
use super::{Engine, Extent, Operation, memory};
use crate::errno::Errno;
use crate::options::Cache;

impl Engine {
    /// Turns an operation into a task; `None` when there is nothing to do.
    pub(super) fn check(&self, operation: Operation) -> Result<Option<Task>, Errno> {
        let invalid = Errno::new(libc::EINVAL);
        let in_range = |offset: u64, length: u64| {
            offset.checked_add(length).filter(|end| *end <= self.disk.size()).map(drop).ok_or(invalid)
        };
        let writable = || if self.disk.is_read_only() { Err(Errno::new(libc::EROFS)) } else { Ok(()) };
        match operation {
            Operation::Read { offset, buffers } => {
                let length = memory::total(&buffers).ok_or(invalid)?;
                in_range(offset, length)?;
                Ok((length > 0).then(|| Task::transfer(&self.target, false, offset, buffers)))
            }
            Operation::Write { offset, buffers } => {
                writable()?;
                let length = memory::total(&buffers).ok_or(invalid)?;
                in_range(offset, length)?;
                Ok((length > 0).then(|| Task::transfer(&self.target, true, offset, buffers)))
            }
            Operation::Flush => {
                let void = self.disk.cache() == Cache::Unsafe || self.disk.is_read_only();
                Ok((!void).then_some(Task::Sync))
            }
            Operation::Discard { offset, length } => {
                writable()?;
                in_range(offset, length)?;
                Ok(self.discard(offset, length))
            }
            Operation::WriteZeroes { offset, length, unmap } => {
                writable()?;
                in_range(offset, length)?;
                let unmap = unmap && self.disk.discards();
                Ok((length > 0).then(|| Task::Zeroes(Zeroes::new(&self.target, offset, length, unmap))))
            }
            Operation::Extent { offset, answer } => {
                in_range(offset, 1)?;
                let fits = answer.len() == size_of::<Extent>();
                if fits { Ok(Some(Task::Extent { offset, answer: vec![answer] })) } else { Err(invalid) }
            }
        }
    }

    /// A discard is a hint: on devices it shrinks to whole blocks.
    fn discard(&self, offset: u64, length: u64) -> Option<Task> {
        let geometry = self.disk.geometry();
        let block = if geometry.is_block_device { u64::from(geometry.logical_block_size) } else { 1 };
        let end = offset + length;
        let (start, end) = (offset.checked_next_multiple_of(block)?, end - end % block);
        let useful = self.disk.discards() && !self.target.lacks.discard && start < end;
        useful.then(|| Task::Discard { offset: start, length: end - start, synced: false })
    }
}
