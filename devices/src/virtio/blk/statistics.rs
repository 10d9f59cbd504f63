//! Counters of what a disk has done, in the terms of QEMU's `query-blockstats`: writing zeroes is a
//! write. They live as long as the disk and are read from any thread.

use std::sync::atomic::{AtomicU64, Ordering};

use super::policy::DiskOperation;

/// What a disk has done so far. Successful operations, unless it says otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlkStatistics {
    /// Reads.
    pub read_operations: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Reads that failed on the host.
    pub failed_reads: u64,
    /// Writes.
    pub write_operations: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Writes that failed on the host.
    pub failed_writes: u64,
    /// Flushes.
    pub flush_operations: u64,
    /// Flushes that failed.
    pub failed_flushes: u64,
    /// Discards.
    pub discard_operations: u64,
    /// Bytes discarded.
    pub discard_bytes: u64,
    /// Discards that failed on the host.
    pub failed_discards: u64,
    /// Requests that were refused without asking the host, because they make no sense.
    pub invalid_operations: u64,
    /// Requests being worked on now.
    pub in_flight: u64,
}

#[derive(Default)]
struct Counter {
    operations: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
}

/// The living counters. One thread counts.
#[derive(Default)]
pub(super) struct Counters {
    read: Counter,
    write: Counter,
    flush: Counter,
    discard: Counter,
    invalid: AtomicU64,
    in_flight: AtomicU64,
}

impl Counters {
    fn of(&self, operation: DiskOperation) -> &Counter {
        match operation {
            DiskOperation::Read => &self.read,
            DiskOperation::Write => &self.write,
            DiskOperation::Flush => &self.flush,
            DiskOperation::Discard => &self.discard,
        }
    }

    pub(super) fn succeeded(&self, operation: DiskOperation, bytes: u64) {
        let counter = self.of(operation);
        counter.operations.fetch_add(1, Ordering::Relaxed);
        counter.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn failed(&self, operation: DiskOperation) {
        self.of(operation).failed.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn invalid(&self) {
        self.invalid.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn set_in_flight(&self, count: usize) {
        self.in_flight.store(count as u64, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> BlkStatistics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlkStatistics {
            read_operations: get(&self.read.operations),
            read_bytes: get(&self.read.bytes),
            failed_reads: get(&self.read.failed),
            write_operations: get(&self.write.operations),
            write_bytes: get(&self.write.bytes),
            failed_writes: get(&self.write.failed),
            flush_operations: get(&self.flush.operations),
            failed_flushes: get(&self.flush.failed),
            discard_operations: get(&self.discard.operations),
            discard_bytes: get(&self.discard.bytes),
            failed_discards: get(&self.discard.failed),
            invalid_operations: get(&self.invalid),
            in_flight: get(&self.in_flight),
        }
    }
}
