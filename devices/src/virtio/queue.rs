//! A split virtqueue, read safely.
//!
//! `virtio-queue` keeps the rings; this module closes what it leaves open, because a driver may be hostile:
//!
//! | what the driver does | `virtio-queue` 0.18 | here |
//! |---|---|---|
//! | moves the available index by more than the queue size | an error from `iter`, swallowed by `pop_descriptor_chain` | [`Violation::Ring`] |
//! | makes buffers available again that the device still holds | accepted, without bound | [`Violation::TooManyChains`] |
//! | links a chain into a loop, or past the end of the table | the chain silently ends early | [`Violation::Endless`], [`Violation::BadIndex`] |
//! | nests, misaligns or oversizes an indirect table, or never negotiated one | the chain silently ends early, or is accepted | [`Violation::BadIndirect`] |
//! | gives an empty buffer, or one outside guest memory, or more than 4 GiB | found by whoever touches it first | [`Violation::BadBuffer`] |
//! | puts a readable buffer behind a writable one | accepted | [`Violation::WrongOrder`] |
//! | suppresses interrupts without EVENT_IDX | ignored | honoured |
//!
//! Every error means that nothing further on the queue can be trusted: the device calls
//! [`Interrupt::violated`], which sets DEVICE_NEEDS_RESET, and serves nothing until it is reset.
//!
//! A descriptor is read exactly once, into a [`Chain`] of checked [`Segment`]s; its [`Head`] must be spent with
//! [`Virtqueue::complete`], the only way to give the buffers back.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_ALIGN_SIZE,
};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT as _, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::device::{ActiveQueue, Interrupt};

/// The longest indirect table that is followed. Linux builds none longer than what the device asked for
/// (`seg_max`); QEMU draws the line at the same place.
pub const MAX_INDIRECT_DESCRIPTORS: u32 = 1024;

/// Where the entries of a used ring begin, and how large each is; `avail_event` follows them (virtio 1.2, 2.7.8).
const USED_RING_ENTRIES: u64 = 4;
const USED_RING_ENTRY: u64 = 8;

/// What the driver did wrong.
#[derive(Debug, thiserror::Error)]
pub enum Violation {
    /// The rings themselves make no sense.
    #[error("Virtqueue ring is broken")]
    Ring(#[source] virtio_queue::Error),
    /// More chains were made available than the queue can hold.
    #[error("More than {size} descriptor chains are outstanding")]
    TooManyChains {
        /// The queue's size.
        size: u16,
    },
    /// A descriptor index beyond the end of its table.
    #[error("Descriptor index {index} is outside a table of {len}")]
    BadIndex {
        /// The index.
        index: u16,
        /// Entries in the table.
        len: u32,
    },
    /// A chain that visits more descriptors than its table has.
    #[error("Descriptor chain loops in a table of {len}")]
    Endless {
        /// Entries in the table.
        len: u32,
    },
    /// An indirect table that is nested, empty, misaligned, too long or was not negotiated.
    #[error("Indirect descriptor for {len} bytes is not allowed")]
    BadIndirect {
        /// Length of the table in bytes.
        len: u32,
    },
    /// A descriptor table, or a buffer, that is empty or not all inside guest memory, or a chain beyond 4 GiB.
    #[error("Guest memory {addr:#x}+{len:#x} is no valid buffer")]
    BadBuffer {
        /// Guest-physical address.
        addr: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A device-readable buffer after a device-writable one.
    #[error("A readable descriptor follows a writable one")]
    WrongOrder,
    /// The chain is not of the form the device's protocol asks for.
    #[error("Descriptor chain is malformed: {reason}")]
    Protocol {
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// One buffer of a chain: not empty, inside guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub addr: GuestAddress,
    /// Length in bytes, at least 1.
    pub len: u32,
}

/// The buffers of one direction, consumed from the front.
#[derive(Debug, Default)]
pub struct Buffers {
    segments: Vec<Segment>,
    /// The first segment that is not used up; its `addr` and `len` shrink as it is.
    front: usize,
    remaining: u32,
}

impl Buffers {
    /// Bytes not consumed yet.
    pub fn remaining(&self) -> u32 {
        self.remaining
    }

    /// The segments not consumed yet, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments[self.front..]
    }

    /// Copies as many bytes as both sides have from the guest to `target`, and consumes them.
    ///
    /// # Errors
    ///
    /// [`Violation::BadBuffer`] if the memory has gone away since the chain was checked.
    pub fn read(&mut self, memory: &GuestMemoryMmap, target: &mut [u8]) -> Result<usize, Violation> {
        self.transfer(target.len(), |addr, at, len| memory.read_slice(&mut target[at..at + len], addr))
    }

    /// Copies as many bytes as both sides have from `source` to the guest, and consumes them.
    ///
    /// # Errors
    ///
    /// [`Violation::BadBuffer`] if the memory has gone away since the chain was checked.
    pub fn write(&mut self, memory: &GuestMemoryMmap, source: &[u8]) -> Result<usize, Violation> {
        self.transfer(source.len(), |addr, at, len| memory.write_slice(&source[at..at + len], addr))
    }

    fn transfer(
        &mut self,
        wanted: usize,
        mut copy: impl FnMut(GuestAddress, usize, usize) -> Result<(), vm_memory::GuestMemoryError>,
    ) -> Result<usize, Violation> {
        let mut done = 0;
        while let Some(segment) = self.segments.get_mut(self.front)
            && done < wanted
        {
            // At most `segment.len`, so it fits both types.
            let step = u32::try_from(wanted - done).map_or(segment.len, |left| left.min(segment.len));
            let bytes = step as usize;
            copy(segment.addr, done, bytes).map_err(|_| segment.bad())?;
            segment.addr = GuestAddress(segment.addr.0 + u64::from(step));
            segment.len -= step;
            self.remaining -= step;
            self.front += usize::from(segment.len == 0);
            done += bytes;
        }
        Ok(done)
    }

    fn push(&mut self, segment: Segment) {
        self.remaining += segment.len;
        self.segments.push(segment);
    }
}

impl Segment {
    fn bad(&self) -> Violation {
        Violation::BadBuffer { addr: self.addr.0, len: u64::from(self.len) }
    }
}

/// The device's debt to the driver: a chain that must be completed. Dropped only when the queue is.
#[must_use = "the driver waits for this chain"]
#[derive(Debug, PartialEq, Eq)]
pub struct Head(u16);

/// A descriptor chain, taken off the queue and checked.
#[derive(Debug)]
pub struct Chain {
    /// To be given to [`Virtqueue::complete`].
    pub head: Head,
    /// What the device may read.
    pub readable: Buffers,
    /// What the device may write; comes after `readable` in the chain.
    pub writable: Buffers,
}

/// What [`Virtqueue::serve`] left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// Nothing: the next chain rings the doorbell.
    Empty,
    /// More chains than the budget: the doorbell has been rung, so that the loop comes back.
    More,
}

/// A queue in use by one thread at a time.
pub struct Virtqueue {
    queue: Queue,
    doorbell: Arc<EventFd>,
    memory: GuestMemoryMmap,
    indirect: bool,
    /// Chains popped and not completed: never more than the queue's size.
    outstanding: u16,
    /// Chains were completed since the last [`Self::notify`].
    unannounced: bool,
}

impl Virtqueue {
    /// Takes over a queue from an activation with `memory` and the negotiated `features`.
    pub fn new(active: ActiveQueue, memory: GuestMemoryMmap, features: u64) -> Self {
        let ActiveQueue { queue, doorbell } = active;
        let indirect = features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0;
        Self { queue, doorbell, memory, indirect, outstanding: 0, unannounced: false }
    }

    /// Number of descriptors in the queue's table.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The memory that the chains point into.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The driver's doorbell.
    pub fn doorbell(&self) -> &Arc<EventFd> {
        &self.doorbell
    }

    /// Whether the driver has made chains available that were not popped yet.
    ///
    /// # Errors
    ///
    /// [`Violation::Ring`] when the ring cannot be read.
    pub fn has_chains(&self) -> Result<bool, Violation> {
        Ok(self.available()? > 0)
    }

    /// How many chains the driver has made available that were not popped yet. A driver that breaks the rules can
    /// make it more than the queue's size.
    ///
    /// # Errors
    ///
    /// [`Violation::Ring`] when the ring cannot be read.
    pub fn available(&self) -> Result<u16, Violation> {
        let index = self.queue.avail_idx(&self.memory, Ordering::Acquire).map_err(Violation::Ring)?;
        Ok(index.0.wrapping_sub(self.queue.next_avail()))
    }

    /// Takes the next chain, or `None` when the driver has made none available.
    ///
    /// # Errors
    ///
    /// A [`Violation`] when the ring or the chain is not well-formed; the queue is unusable then.
    pub fn pop(&mut self) -> Result<Option<Chain>, Violation> {
        let size = self.queue.size();
        let mut available = self.queue.iter(&self.memory).map_err(Violation::Ring)?;
        let Some(next) = available.next() else { return Ok(None) };
        let head = next.head_index();
        if self.outstanding >= size {
            return Err(Violation::TooManyChains { size });
        }
        let chain = self.walk(head)?;
        self.outstanding += 1;
        Ok(Some(chain))
    }

    /// Takes the next chain. When there is none, the driver has been asked to ring for the next: no wake-up is
    /// missed between looking and asking.
    ///
    /// # Errors
    ///
    /// As for [`Self::pop`].
    pub fn pop_or_arm(&mut self) -> Result<Option<Chain>, Violation> {
        match self.pop()? {
            None if self.enable_doorbell()? => self.pop(),
            chain => Ok(chain),
        }
    }

    /// The same for a driver that will make `batch` chains available before it waits for anything, 1 or more: it is
    /// asked to ring when all of them are there, not for each. Without EVENT_IDX it cannot be asked, and rings for the
    /// first.
    ///
    /// # Errors
    ///
    /// As for [`Self::pop`].
    pub fn pop_or_arm_for(&mut self, batch: u16) -> Result<Option<Chain>, Violation> {
        match self.pop()? {
            None if self.enable_doorbell_for(batch)? => self.pop(),
            chain => Ok(chain),
        }
    }

    /// Gives a chain back, after the device has written `written` bytes from the start of its writable part.
    ///
    /// # Errors
    ///
    /// [`Violation::Ring`] when the used ring cannot be written.
    #[expect(clippy::needless_pass_by_value, reason = "a head can be spent once")]
    pub fn complete(&mut self, head: Head, written: u32) -> Result<(), Violation> {
        self.queue.add_used(&self.memory, head.0, written).map_err(Violation::Ring)?;
        self.outstanding -= 1;
        self.unannounced = true;
        Ok(())
    }

    /// Raises the interrupt if chains were completed since the last call and the driver wants to hear of them.
    ///
    /// # Errors
    ///
    /// [`Violation::Ring`] when the ring cannot be read.
    pub fn notify(&mut self, interrupt: &Interrupt) -> Result<(), Violation> {
        if std::mem::take(&mut self.unannounced) && self.wants_interrupt()? {
            interrupt.used_buffers();
        }
        Ok(())
    }

    /// Asks the driver not to ring while the device is looking anyway.
    ///
    /// # Errors
    ///
    /// [`Violation::Ring`] when the ring cannot be written.
    pub fn disable_doorbell(&mut self) -> Result<(), Violation> {
        self.queue.disable_notification(&self.memory).map_err(Violation::Ring)
    }

    /// Asks the driver to ring for the next chain. Returns whether one has come in meanwhile, for which it may not
    /// have rung: then the device must look again.
    ///
    /// # Errors
    ///
    /// [`Violation::Ring`] when the ring cannot be accessed.
    pub fn enable_doorbell(&mut self) -> Result<bool, Violation> {
        self.queue.enable_notification(&self.memory).map_err(Violation::Ring)
    }

    /// As [`Self::enable_doorbell`], for the last of `batch` chains. Returns whether that many are there.
    fn enable_doorbell_for(&mut self, batch: u16) -> Result<bool, Violation> {
        if batch <= 1 || !self.queue.event_idx_enabled() {
            return self.enable_doorbell();
        }
        let addr =
            self.queue.used_ring() + USED_RING_ENTRIES + USED_RING_ENTRY * u64::from(self.queue.size());
        let event = self.queue.next_avail().wrapping_add(batch - 1);
        self.memory
            .store(event.to_le(), GuestAddress(addr), Ordering::Relaxed)
            .map_err(|_| Violation::BadBuffer { addr, len: 2 })?;
        // The wish must be visible before the index is read, or the driver may not ring and we not look.
        fence(Ordering::SeqCst);
        Ok(self.available()? >= batch)
    }

    /// Rings the doorbell on behalf of the driver, so that the loop comes back to this queue.
    pub fn ring(&self) {
        ring(&self.doorbell);
    }

    /// Hands up to `budget` chains to `handle`, which must complete each or keep its head, then raises the
    /// interrupt if it is due. No wake-up is missed, and no queue holds the thread for longer than its budget.
    ///
    /// # Errors
    ///
    /// The first [`Violation`] of the queue, or error of `handle`.
    pub fn serve<E: From<Violation>>(
        &mut self,
        budget: u16,
        interrupt: &Interrupt,
        mut handle: impl FnMut(&mut Self, Chain) -> Result<(), E>,
    ) -> Result<Served, E> {
        self.disable_doorbell()?;
        for _ in 0..budget {
            let Some(chain) = self.pop_or_arm()? else {
                self.notify(interrupt)?;
                return Ok(Served::Empty);
            };
            handle(self, chain)?;
        }
        self.ring();
        self.notify(interrupt)?;
        Ok(Served::More)
    }

    fn wants_interrupt(&mut self) -> Result<bool, Violation> {
        if self.queue.event_idx_enabled() {
            return self.queue.needs_notification(&self.memory).map_err(Violation::Ring);
        }
        // The used index must be visible before the flag is read, or both sides may wait for each other.
        fence(Ordering::SeqCst);
        let flags: u16 = self
            .memory
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(|_| Violation::BadBuffer { addr: self.queue.avail_ring(), len: 2 })?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Follows a chain from `head` through the queue's table and at most one indirect table.
    fn walk(&self, head: u16) -> Result<Chain, Violation> {
        let mut chain =
            Chain { head: Head(head), readable: Buffers::default(), writable: Buffers::default() };
        let mut table = self.queue.desc_table();
        let mut len = u32::from(self.queue.size());
        let mut left = len;
        let mut nested = false;
        let mut index = head;
        loop {
            if u32::from(index) >= len {
                return Err(Violation::BadIndex { index, len });
            }
            left = left.checked_sub(1).ok_or(Violation::Endless { len })?;
            let descriptor = self.descriptor(table, index)?;
            if descriptor.refers_to_indirect_table() {
                let bytes = descriptor.len();
                if nested || !self.indirect || descriptor.has_next() || !is_table(bytes) {
                    return Err(Violation::BadIndirect { len: bytes });
                }
                table = descriptor.addr().0;
                len = bytes / VRING_DESC_ALIGN_SIZE;
                (left, nested, index) = (len, true, 0);
                continue;
            }
            self.append(&mut chain, descriptor)?;
            if !descriptor.has_next() {
                return Ok(chain);
            }
            index = descriptor.next();
        }
    }

    fn descriptor(&self, table: u64, index: u16) -> Result<Descriptor, Violation> {
        let size = u64::from(VRING_DESC_ALIGN_SIZE);
        let addr = table.checked_add(u64::from(index) * size);
        addr.and_then(|addr| self.memory.read_obj::<RawDescriptor>(GuestAddress(addr)).ok())
            .map(Descriptor::from)
            .ok_or(Violation::BadBuffer { addr: table, len: size * (u64::from(index) + 1) })
    }

    fn append(&self, chain: &mut Chain, descriptor: Descriptor) -> Result<(), Violation> {
        let segment = Segment { addr: descriptor.addr(), len: descriptor.len() };
        let total = chain.readable.remaining().checked_add(chain.writable.remaining());
        if segment.len == 0
            || total.and_then(|total| total.checked_add(segment.len)).is_none()
            || segment.addr.0.checked_add(u64::from(segment.len)).is_none()
            || !self.memory.check_range(segment.addr, segment.len as usize)
        {
            return Err(segment.bad());
        }
        if descriptor.is_write_only() {
            chain.writable.push(segment);
        } else if chain.writable.segments.is_empty() {
            chain.readable.push(segment);
        } else {
            return Err(Violation::WrongOrder);
        }
        Ok(())
    }
}

fn is_table(bytes: u32) -> bool {
    bytes > 0
        && bytes.is_multiple_of(VRING_DESC_ALIGN_SIZE)
        && bytes / VRING_DESC_ALIGN_SIZE <= MAX_INDIRECT_DESCRIPTORS
}

/// Makes a doorbell readable. It fails only when the counter is full: then it is readable already.
pub(super) fn ring(doorbell: &EventFd) {
    let _ = doorbell.write(1);
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::AtomicU32;
    use std::time::Instant;

    use parking_lot::Mutex;

    use super::*;
    use crate::testing::{
        Buffer, FakeDriver, INDIRECT, MEMORY_SIZE, NEXT, PATIENCE, Random, Used, WILD_ADDRESS, WRITE,
    };
    use crate::virtio::device::{Activation, VirtioDevice};

    const SIZE: u16 = 8;

    /// A device that gives its one queue to the test.
    #[derive(Clone, Default)]
    struct Bench(Arc<Mutex<Option<Activation>>>);

    impl VirtioDevice for Bench {
        fn device_id(&self) -> u32 {
            1
        }
        fn device_features(&self) -> u64 {
            0
        }
        fn queue_max_sizes(&self) -> &[u16] {
            &[SIZE]
        }
        fn read_config(&self, _: u64, _: &mut [u8]) {}
        fn activate(&mut self, activation: Activation) -> io::Result<()> {
            *self.0.lock() = Some(activation);
            Ok(())
        }
        fn reset(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Rig {
        driver: FakeDriver,
        queue: Virtqueue,
        interrupt: Arc<Interrupt>,
    }

    fn rig_with(features: u64) -> Rig {
        let bench = Bench::default();
        let mut driver = FakeDriver::new(Box::new(bench.clone()));
        driver.start(features | 1 << 32);
        assert!(driver.take_doorbell(0));
        let mut activation = bench.0.lock().take().unwrap();
        let active = activation.queues[0].take().unwrap();
        let queue = Virtqueue::new(active, activation.memory, activation.features);
        Rig { driver, queue, interrupt: activation.interrupt }
    }

    fn rig() -> Rig {
        rig_with(u64::MAX)
    }

    /// Serves like a device that upper-cases.
    fn shout(rig: &mut Rig, budget: u16) -> Served {
        let serve = |queue: &mut Virtqueue, mut chain: Chain| -> Result<(), Violation> {
            let mut text = vec![0; chain.readable.remaining() as usize];
            chain.readable.read(&queue.memory, &mut text)?;
            text.make_ascii_uppercase();
            let written = chain.writable.write(&queue.memory, &text)?;
            queue.complete(chain.head, u32::try_from(written).unwrap())
        };
        rig.queue.serve(budget, &rig.interrupt, serve).unwrap()
    }

    fn hostile(rig: &mut Rig, descriptors: &[Descriptor]) -> Violation {
        rig.driver.send_raw(0, descriptors);
        rig.queue.pop().unwrap_err()
    }

    fn d(addr: u64, len: u32, flags: u16, next: u16) -> Descriptor {
        Descriptor::new(addr, len, flags, next)
    }

    #[test]
    fn a_chain_is_split_by_direction_copied_and_returned() {
        for features in [u64::MAX, 0] {
            let mut rig = rig_with(features);
            let buffers =
                [Buffer::Readable(b"hel"), Buffer::Readable(b"lo"), Buffer::Writable(1), Buffer::Writable(9)];
            let head = rig.driver.send(0, &buffers);
            assert!(rig.driver.take_doorbell(0));
            assert_eq!(shout(&mut rig, 10), Served::Empty);
            let used = rig.driver.take_used(0).unwrap();
            assert_eq!((used.head, used.written()), (head, &b"HELLO"[..]));
            assert_eq!(used.data[5..], [0xaa; 5]);
            assert_eq!(rig.driver.line().count(), 1);
        }
    }

    #[test]
    fn an_indirect_chain_is_followed_also_behind_direct_descriptors() {
        let mut rig = rig();
        rig.driver.add_indirect(0, &[Buffer::Readable(b"abc"), Buffer::Writable(3)]);
        assert_eq!(shout(&mut rig, 10), Served::Empty);
        assert_eq!(rig.driver.take_used(0).unwrap().written(), b"ABC");

        let addr = rig.driver.allocate(16);
        let (table, len) = rig.driver.write_table(&[d(addr, 4, NEXT, 1), d(addr, 8, WRITE, 0)]);
        rig.driver.send_raw(0, &[d(addr, 2, NEXT, 1), d(table, len, INDIRECT, 0)]);
        let chain = rig.queue.pop().unwrap().unwrap();
        assert_eq!((chain.readable.remaining(), chain.writable.remaining()), (6, 8));
    }

    #[test]
    fn buffers_are_consumed_from_the_front_across_segments() {
        let mut rig = rig();
        rig.driver.add(0, &[Buffer::Readable(b"0123"), Buffer::Readable(b"456"), Buffer::Writable(2)]);
        let mut chain = rig.queue.pop().unwrap().unwrap();
        let mut five = [0; 5];
        assert_eq!(chain.readable.read(&rig.queue.memory, &mut five).unwrap(), 5);
        assert_eq!((&five, chain.readable.remaining()), (b"01234", 2));
        assert_eq!(chain.readable.segments().iter().map(|s| s.len).collect::<Vec<_>>(), [2]);
        assert_eq!(chain.readable.read(&rig.queue.memory, &mut five).unwrap(), 2);
        assert_eq!(chain.readable.read(&rig.queue.memory, &mut five).unwrap(), 0);
        assert_eq!(chain.writable.write(&rig.queue.memory, b"too long").unwrap(), 2);
        rig.queue.complete(chain.head, 2).unwrap();
        assert_eq!(rig.driver.take_used(0).unwrap().written(), b"to");
    }

    #[test]
    fn a_budget_leaves_the_rest_and_rings() {
        let mut rig = rig();
        for _ in 0..5 {
            rig.driver.send(0, &[Buffer::Readable(b"x")]);
        }
        rig.driver.take_doorbell(0);
        assert_eq!(shout(&mut rig, 3), Served::More);
        assert!(rig.driver.take_doorbell(0));
        assert_eq!(rig.driver.drain_used(0).len(), 3);
        assert_eq!(shout(&mut rig, 3), Served::Empty);
        assert!(!rig.driver.take_doorbell(0));
        assert_eq!(rig.driver.drain_used(0).len(), 2);
    }

    #[test]
    fn the_driver_rings_exactly_when_the_device_has_stopped_looking() {
        for features in [u64::MAX, 0] {
            let mut rig = rig_with(features);
            for _ in 0..100 {
                rig.driver.add(0, &[Buffer::Readable(b"x")]);
                assert!(rig.driver.kick(0), "the device sleeps");
                rig.queue.disable_doorbell().unwrap();
                rig.driver.add(0, &[Buffer::Readable(b"y")]);
                assert!(!rig.driver.kick(0), "the device is awake");
                assert!(rig.queue.enable_doorbell().unwrap(), "nobody rang for the second chain");
                assert_eq!(shout(&mut rig, 10), Served::Empty);
                assert_eq!(rig.driver.drain_used(0).len(), 2);
            }
        }
    }

    #[test]
    fn no_wake_up_is_missed_between_looking_and_arming() {
        const ROUNDS: u32 = 20_000;
        for features in [u64::MAX, 0] {
            let Rig { mut driver, mut queue, .. } = rig_with(features);
            let addr = driver.allocate(16);
            driver.write_descriptor(0, 0, d(addr, 16, 0, 0));
            let served = Arc::new(AtomicU32::new(0));
            let (doorbell, counter) = (driver.doorbell(0), Arc::clone(&served));
            let device = std::thread::spawn(move || {
                let mut random = Random::new(1);
                let mut count = 0;
                while count < ROUNDS {
                    await_or_fail(count, || doorbell.read().is_ok());
                    queue.disable_doorbell().unwrap();
                    while let Some(chain) = queue.pop_or_arm().unwrap() {
                        queue.complete(chain.head, 0).unwrap();
                        count += 1;
                        counter.store(count, Ordering::Release);
                        // The driver's next chain comes at any point of the next look.
                        (0..random.below(200)).for_each(|_| std::hint::spin_loop());
                    }
                }
            });
            for round in 1..=ROUNDS {
                driver.publish(0, 0);
                driver.kick(0);
                await_or_fail(round, || served.load(Ordering::Acquire) == round);
            }
            device.join().unwrap();
        }
    }

    fn await_or_fail(round: u32, mut condition: impl FnMut() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < PATIENCE, "a wake-up was missed in round {round}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn interrupts_come_only_when_wanted() {
        let mut with_flag = rig_with(0);
        with_flag.driver.suppress_interrupts(0, true);
        with_flag.driver.send(0, &[Buffer::Readable(b"x")]);
        shout(&mut with_flag, 10);
        assert_eq!(with_flag.driver.line().count(), 0);
        with_flag.driver.suppress_interrupts(0, false);
        with_flag.driver.send(0, &[Buffer::Readable(b"x")]);
        shout(&mut with_flag, 10);
        assert_eq!(with_flag.driver.line().count(), 1);

        shout(&mut with_flag, 10);
        assert_eq!(with_flag.driver.line().count(), 1, "there was nothing to tell");

        let mut with_index = rig();
        for _ in 0..3 {
            // The driver does not look in between, so only the first is worth an interrupt.
            with_index.driver.send(0, &[Buffer::Readable(b"x")]);
            shout(&mut with_index, 10);
        }
        assert_eq!(with_index.driver.line().count(), 1);
        assert_eq!(with_index.driver.drain_used(0).len(), 3);
    }

    #[test]
    fn indices_wrap_around_for_ever() {
        let mut rig = rig();
        for round in 0..70_000u32 {
            rig.driver.send(0, &[Buffer::Readable(b"x"), Buffer::Writable(1)]);
            shout(&mut rig, 10);
            let used: Used = rig.driver.take_used(0).unwrap();
            assert_eq!(used.written(), b"X", "round {round}");
        }
    }

    #[test]
    fn an_available_index_that_jumps_is_a_violation() {
        for jump in [SIZE + 1, 0x7fff, u16::MAX] {
            let mut rig = rig();
            rig.driver.set_avail_idx(0, jump);
            assert!(matches!(rig.queue.pop().unwrap_err(), Violation::Ring(_)));
        }
    }

    #[test]
    fn chains_that_the_device_still_holds_cannot_be_piled_up() {
        let mut rig = rig();
        let addr = rig.driver.allocate(16);
        rig.driver.write_descriptor(0, 0, d(addr, 16, 0, 0));
        let mut held = Vec::new();
        for _ in 0..SIZE {
            rig.driver.publish(0, 0);
            held.push(rig.queue.pop().unwrap().unwrap());
        }
        rig.driver.publish(0, 0);
        assert!(matches!(rig.queue.pop().unwrap_err(), Violation::TooManyChains { size: SIZE }));
    }

    #[test]
    fn a_head_outside_the_table_is_a_violation() {
        let mut rig = rig();
        rig.driver.publish(0, SIZE);
        assert!(matches!(rig.queue.pop().unwrap_err(), Violation::BadIndex { index: SIZE, .. }));
    }

    #[test]
    fn loops_are_violations_direct_and_indirect() {
        let mut rig = rig();
        let addr = rig.driver.allocate(16);
        for ring in [&[d(addr, 1, NEXT, 0)][..], &[d(addr, 1, NEXT, 1), d(addr, 1, NEXT, 0)]] {
            assert!(matches!(hostile(&mut rig, ring), Violation::Endless { len: 8 }));
            let (table, len) = rig.driver.write_table(ring);
            let indirect = [d(table, len, INDIRECT, 0)];
            assert!(matches!(hostile(&mut rig, &indirect), Violation::Endless { .. }));
        }
    }

    #[test]
    fn a_next_index_outside_the_table_is_a_violation() {
        let mut rig = rig();
        let addr = rig.driver.allocate(16);
        assert!(matches!(hostile(&mut rig, &[d(addr, 1, NEXT, 8)]), Violation::BadIndex { .. }));
        let (table, len) = rig.driver.write_table(&[d(addr, 1, NEXT, 1)]);
        assert!(matches!(hostile(&mut rig, &[d(table, len, INDIRECT, 0)]), Violation::BadIndex { .. }));
    }

    #[test]
    fn empty_wild_wrapping_and_gigantic_buffers_are_violations() {
        let mut rig = rig();
        let addr = rig.driver.allocate(16);
        for bad in [
            d(addr, 0, 0, 0),
            d(WILD_ADDRESS, 1, 0, 0),
            d(MEMORY_SIZE - 1, 2, 0, 0),
            d(MEMORY_SIZE, 1, 0, 0),
            d(u64::MAX, 1, 0, 0),
            d(u64::MAX - 7, 16, 0, 0),
            d(addr, u32::MAX, 0, 0),
        ] {
            assert!(matches!(hostile(&mut rig, &[bad]), Violation::BadBuffer { .. }), "{bad:?}");
            let writable = d(bad.addr().0, bad.len(), WRITE, 0);
            assert!(matches!(hostile(&mut rig, &[writable]), Violation::BadBuffer { .. }), "{bad:?}");
        }
    }

    #[test]
    fn a_chain_beyond_four_gigabytes_is_a_violation() {
        let mut rig = rig();
        let half = u32::try_from(MEMORY_SIZE).unwrap();
        let entries: Vec<_> = (1..=64).map(|next| d(0, half, NEXT, next)).chain([d(0, 1, 0, 0)]).collect();
        let (table, len) = rig.driver.write_table(&entries);
        assert!(matches!(hostile(&mut rig, &[d(table, len, INDIRECT, 0)]), Violation::BadBuffer { .. }));
    }

    #[test]
    fn a_readable_buffer_behind_a_writable_one_is_a_violation() {
        let mut rig = rig();
        let addr = rig.driver.allocate(16);
        let chain = [d(addr, 1, WRITE | NEXT, 1), d(addr, 1, 0, 0)];
        assert!(matches!(hostile(&mut rig, &chain), Violation::WrongOrder));
    }

    #[test]
    fn a_bad_indirect_table_is_a_violation() {
        let mut rig = rig();
        let addr = rig.driver.allocate(16);
        let (inner, inner_len) = rig.driver.write_table(&[d(addr, 1, 0, 0)]);
        let (nested, nested_len) = rig.driver.write_table(&[d(inner, inner_len, INDIRECT, 0)]);
        let too_long = 16 * (MAX_INDIRECT_DESCRIPTORS + 1);
        for bad in [
            d(nested, nested_len, INDIRECT, 0),
            d(inner, 0, INDIRECT, 0),
            d(inner, 15, INDIRECT, 0),
            d(inner, too_long, INDIRECT, 0),
            d(inner, 0xffff_fff0, INDIRECT, 0),
            d(inner, inner_len, INDIRECT | NEXT, 1),
        ] {
            assert!(matches!(hostile(&mut rig, &[bad]), Violation::BadIndirect { .. }), "{bad:?}");
        }
        for wild in [WILD_ADDRESS, u64::MAX - 8, MEMORY_SIZE - 8] {
            let bad = [d(wild, 16, INDIRECT, 0)];
            assert!(matches!(hostile(&mut rig, &bad), Violation::BadBuffer { .. }), "{wild:#x}");
        }
        let mut without = rig_with(0);
        let (table, len) = without.driver.write_table(&[d(addr, 1, 0, 0)]);
        let indirect = [d(table, len, INDIRECT, 0)];
        assert!(matches!(hostile(&mut without, &indirect), Violation::BadIndirect { .. }));
    }

    #[test]
    fn random_rings_never_hang_or_panic() {
        let mut random = Random::new(0x7a42);
        for _ in 0..200 {
            let mut rig = rig();
            let addr = rig.driver.allocate(4096);
            let entries: Vec<_> = (0..16)
                .map(|_| {
                    let addr =
                        random.pick(&[addr, addr + 64, MEMORY_SIZE - 4, WILD_ADDRESS, u64::MAX - 2, 0]);
                    let len = random.pick(&[0, 1, 16, 32, 256, u32::MAX]);
                    d(addr, len, random.below(8), random.below(10))
                })
                .collect();
            for (index, &entry) in (0u16..).zip(&entries[..usize::from(SIZE)]) {
                rig.driver.write_descriptor(0, index, entry);
            }
            rig.driver.memory().write_obj(RawDescriptor::from(entries[9]), GuestAddress(addr)).unwrap();
            for _ in 0..4 {
                rig.driver.publish(0, random.below(SIZE + 1));
            }
            let mut sink = [0; 512];
            let serve = |queue: &mut Virtqueue, mut chain: Chain| -> Result<(), Violation> {
                while chain.readable.read(&queue.memory, &mut sink)? > 0 {}
                let written = chain.writable.write(&queue.memory, &sink)?;
                queue.complete(chain.head, u32::try_from(written).unwrap())
            };
            let _ = rig.queue.serve(16, &rig.interrupt, serve);
        }
    }
}
