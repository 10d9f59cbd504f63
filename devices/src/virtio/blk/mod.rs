//! virtio-blk (virtio 1.2, section 5.2). The peer is Linux's `drivers/block/virtio_blk.c`.
//!
//! ```text
//!   one per machine                    one per disk, across resets and reboots
//!   ┌──────────────┐  activate, reset  ┌───────────────────── thread blk-<id> ──────────────────────┐
//!   │ Blk          │──────────────────▶│ Running ──▶ Session { queues, requests in flight, held }   │
//!   │ config space │     (Ticket)      │    │                  │                                    │
//!   └──────────────┘                   │    └──▶ block::Engine ◀┘  io_uring or threads              │
//!   ┌──────────────┐  pause, resume,   │           └─ block::Disk: file, lock                       │
//!   │ BlkBackend   │  flush, resize    │                                                            │
//!   │ the owner    │──────────────────▶│ ──DiskEvent──▶ callback      ──used buffers──▶ Interrupt   │
//!   └──────────────┘                   └────────────────────────────────────────────────────────────┘
//! ```
//!
//! The disk, its lock, its engine and its thread belong to [`BlkBackend`] and live as long as the VM
//! has the disk. What a guest's driver sets up, queues in guest memory, is a session: it begins with
//! DRIVER_OK and ends with the reset, which returns when nothing of it is in flight any more.
//!
//! | | |
//! |---|---|
//! | requests | read, write, flush, discard, write zeroes, get ID |
//! | features | SEG_MAX, BLK_SIZE, TOPOLOGY; FLUSH unless writethrough; RO, MQ, DISCARD, WRITE_ZEROES as configured |
//! | not offered | CONFIG_WCE: when data is durable is the host's decision; SIZE_MAX, GEOMETRY: nobody needs them |
//! | a request that makes no sense | IOERR, or UNSUPP for an unknown type or flag |
//! | a chain without a status byte, a broken ring | DEVICE_NEEDS_RESET, nothing served until then |
//! | an error of the host's | [`ErrorPolicy`] |

mod backend;
mod mirroring;
mod policy;
mod request;
mod session;
mod statistics;
mod token;
mod worker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use block::Cache;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

pub use self::backend::{BlkBackend, BlkError, BlkFacts, BlkOptions, StartError, Ticket};
use self::backend::{Command, Link};
pub use self::mirroring::{Hold, MirrorOrder};
pub use self::policy::{DiskEvent, DiskOperation, ErrorAction, ErrorPolicy, MirrorReport};
use self::request::{SECTOR, SEG_MAX};
pub use self::statistics::BlkStatistics;
use super::device::{Activation, VirtioDevice};

/// Descriptors in a queue.
const QUEUE_SIZE: u16 = 256;
/// How long the driver may have to wait for its requests when it resets the device. A disk that hangs
/// for longer is left in DEVICE_NEEDS_RESET.
const SESSION_TIMEOUT: Duration = Duration::from_secs(30);
/// Size of struct virtio_blk_config up to `write_zeroes_may_unmap` and its padding.
const CONFIG_SIZE: usize = 60;

/// A virtio block device: what one machine sees of a [`BlkBackend`].
pub struct Blk {
    link: Arc<Link>,
    owner: u64,
    queue_sizes: Vec<u16>,
    /// The disk's thread may have something of ours.
    touched: bool,
    /// It did not let go of it in time.
    hung: bool,
}

impl Blk {
    fn new(link: Arc<Link>, owner: u64) -> Self {
        let queue_sizes = vec![QUEUE_SIZE; usize::from(link.facts.queues)];
        Self { link, owner, queue_sizes, touched: false, hung: false }
    }

    /// struct virtio_blk_config (virtio 1.2, section 5.2.4).
    fn config(&self) -> [u8; CONFIG_SIZE] {
        let geometry = &self.link.facts.geometry;
        let block = geometry.logical_block_size;
        let sectors = self.link.size.load(Ordering::Acquire) / SECTOR;
        let exponent = (geometry.physical_block_size / block).max(1).ilog2();
        // At least a block; in sectors, as the unit is 512 bytes everywhere.
        let discard_alignment = geometry.discard_granularity.max(block) / 512;

        let mut config = [0; CONFIG_SIZE];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &sectors.to_le_bytes()); // capacity
        put(12, &SEG_MAX.to_le_bytes()); // seg_max
        put(20, &block.to_le_bytes()); // blk_size
        put(24, &[u8::try_from(exponent).unwrap_or(0)]); // topology.physical_block_exp
        put(26, &1_u16.to_le_bytes()); // topology.min_io_size
        put(34, &self.link.facts.queues.to_le_bytes()); // num_queues
        put(36, &request::DISCARD.sectors.to_le_bytes()); // max_discard_sectors
        put(40, &request::DISCARD.ranges.to_le_bytes()); // max_discard_seg
        put(44, &discard_alignment.to_le_bytes()); // discard_sector_alignment
        put(48, &request::WRITE_ZEROES.sectors.to_le_bytes()); // max_write_zeroes_sectors
        put(52, &request::WRITE_ZEROES.ranges.to_le_bytes()); // max_write_zeroes_seg
        put(56, &[u8::from(self.link.facts.discard)]); // write_zeroes_may_unmap
        config
    }
}

impl VirtioDevice for Blk {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn device_features(&self) -> u64 {
        let facts = &self.link.facts;
        let optional = [
            // A disk without it has no cache that loses anything: the driver sends no flushes.
            (VIRTIO_BLK_F_FLUSH, facts.cache != Cache::Writethrough),
            (VIRTIO_BLK_F_RO, facts.read_only),
            (VIRTIO_BLK_F_MQ, facts.queues > 1),
            (VIRTIO_BLK_F_DISCARD, facts.discard && !facts.read_only),
            (VIRTIO_BLK_F_WRITE_ZEROES, !facts.read_only),
        ];
        let always = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_TOPOLOGY;
        optional.iter().filter(|(_, on)| *on).fold(always, |features, (bit, _)| features | 1 << bit)
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        data.fill(0);
        if let Some(rest) = config.get(from..) {
            let n = rest.len().min(data.len());
            data[..n].copy_from_slice(&rest[..n]);
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.touched = true;
        let owner = self.owner;
        let command = |reply| Command::Activate { owner, activation, reply };
        self.link.tell("activate", command).wait(SESSION_TIMEOUT).map_err(io::Error::other)
    }

    fn reset(&mut self) -> io::Result<()> {
        if !self.touched {
            return Ok(());
        }
        let owner = self.owner;
        let command = |reply| Command::Deactivate { owner, reply };
        let done = self.link.tell("reset", command).wait(SESSION_TIMEOUT);
        self.hung = done.is_err();
        done.map_err(io::Error::other)?;
        self.touched = false;
        Ok(())
    }
}

impl Drop for Blk {
    /// The machine goes; the disk forgets its queues.
    fn drop(&mut self) {
        // One that hangs is not waited for twice.
        if !self.hung
            && let Err(error) = self.reset()
        {
            tracing::warn!(%error, "A disk was not left in order");
        }
    }
}

#[cfg(test)]
mod tests;
