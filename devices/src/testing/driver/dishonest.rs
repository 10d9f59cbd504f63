//! What no honest driver does.

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes as _, GuestAddress};

use super::{FakeDriver, store};

impl FakeDriver {
    /// Overwrites a descriptor of the queue's table.
    pub fn write_descriptor(&self, queue: usize, index: u16, descriptor: Descriptor) {
        let addr = self.queues[queue].desc + 16 * u64::from(index);
        self.memory
            .write_obj(RawDescriptor::from(descriptor), GuestAddress(addr))
            .expect("table is in memory");
    }

    /// Writes an indirect table into fresh memory. Returns its address and length in bytes.
    ///
    /// # Panics
    ///
    /// When the table is too large.
    pub fn write_table(&mut self, entries: &[Descriptor]) -> (u64, u32) {
        let len = u32::try_from(16 * entries.len()).expect("a small table");
        let table = self.allocate(len);
        for (at, &entry) in (0u64..).zip(entries) {
            let addr = GuestAddress(table + 16 * at);
            self.memory.write_obj(RawDescriptor::from(entry), addr).expect("table is in memory");
        }
        (table, len)
    }

    /// Makes `head` available, whatever is behind it.
    pub fn publish(&mut self, queue: usize, head: u16) {
        let q = &mut self.queues[queue];
        store(&self.memory, q.avail + 4 + 2 * u64::from(q.avail_idx % q.size), head);
        q.avail_idx = q.avail_idx.wrapping_add(1);
        store(&self.memory, q.avail + 2, q.avail_idx);
    }

    /// Moves the available index, whatever is in the ring.
    pub fn set_avail_idx(&mut self, queue: usize, index: u16) {
        let q = &mut self.queues[queue];
        q.avail_idx = index;
        store(&self.memory, q.avail + 2, index);
    }

    /// The available index.
    pub fn avail_idx(&self, queue: usize) -> u16 {
        self.queues[queue].avail_idx
    }

    /// Makes raw descriptors, put at the start of the table, available as one chain, and rings. The chain is not
    /// expected back.
    pub fn send_raw(&mut self, queue: usize, descriptors: &[Descriptor]) {
        for (index, &descriptor) in (0u16..).zip(descriptors) {
            self.write_descriptor(queue, index, descriptor);
        }
        self.publish(queue, 0);
        self.ring(queue);
    }
}
