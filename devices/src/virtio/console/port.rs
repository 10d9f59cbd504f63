//! The two data queues of a port.

use super::super::device::{ActiveQueue, Interrupt};
use super::super::queue::{Chain, Violation, Virtqueue};
use super::PortSpec;
use super::control::Control;

/// Chains handled in one call, so that a guest with tiny buffers cannot hold the caller.
const CHAINS_PER_CALL: u16 = 64;

/// One port: what it is, what has been said about it, and its data queues while the device is active.
pub(super) struct Port {
    pub(super) spec: PortSpec,
    pub(super) control: Control,
    /// Host to guest ("receiveq").
    rx: Option<Virtqueue>,
    /// The most buffers that were seen in `rx` at once: those that go round between driver and device.
    rx_pool: u16,
    /// Guest to host ("transmitq").
    tx: Option<Virtqueue>,
    /// The chain of `tx` that was read in part.
    partial: Option<Chain>,
}

impl Port {
    pub(super) fn new(spec: PortSpec) -> Self {
        Self { spec, control: Control::new(), rx: None, rx_pool: 0, tx: None, partial: None }
    }

    pub(super) fn activate(&mut self, mut queue: impl FnMut(ActiveQueue) -> Virtqueue, rx_tx: RxTx) {
        let RxTx { rx, tx } = rx_tx;
        self.rx = rx.map(&mut queue);
        self.tx = tx.map(&mut queue);
    }

    /// Forgets the guest.
    pub(super) fn reset(&mut self) {
        let Self { spec: _, control, rx, rx_pool, tx, partial } = self;
        control.reset();
        *rx = None;
        *rx_pool = 0;
        *tx = None;
        *partial = None;
    }

    /// Whether there is anything to read.
    pub(super) fn is_readable(&self) -> Result<bool, Violation> {
        let waiting = self.tx.as_ref().map_or(Ok(false), Virtqueue::has_chains)?;
        Ok(waiting || self.partial.is_some())
    }

    /// Whether there is room for anything to write.
    pub(super) fn is_writable(&self) -> Result<bool, Violation> {
        let room = self.rx.as_ref().map_or(Ok(false), Virtqueue::has_chains)?;
        Ok(room && self.control.guest.is_open())
    }

    /// Rings the doorbell of the transmit queue.
    pub(super) fn ring(&self) {
        if let Some(tx) = &self.tx {
            tx.ring();
        }
    }

    /// Copies out what the guest has sent. 0 when there is nothing: then the doorbell will ring.
    pub(super) fn read(&mut self, target: &mut [u8]) -> Result<usize, Violation> {
        let mut done = 0;
        self.consume(|queue, chain| {
            done += chain.readable.read(queue.memory(), &mut target[done..])?;
            Ok(done < target.len())
        })?;
        Ok(done)
    }

    /// Tells the guest of the buffers that were read to the end.
    pub(super) fn announce(&mut self, interrupt: &Interrupt) -> Result<(), Violation> {
        self.tx.as_mut().map_or(Ok(()), |tx| tx.notify(interrupt))
    }

    /// Throws away what the guest has sent, as far as one call goes: the doorbell rings for the rest.
    pub(super) fn discard(&mut self, interrupt: &Interrupt) -> Result<(), Violation> {
        let more = self.consume(|_, chain| {
            chain.readable = Default::default();
            Ok(true)
        })?;
        self.announce(interrupt)?;
        if more {
            self.ring();
        }
        Ok(())
    }

    /// Shows chains to `take` until it says that it has enough; a chain goes back to the guest when nothing is
    /// left of it, and is kept otherwise. Returns whether there may be more.
    fn consume(
        &mut self,
        mut take: impl FnMut(&Virtqueue, &mut Chain) -> Result<bool, Violation>,
    ) -> Result<bool, Violation> {
        let Some(tx) = &mut self.tx else { return Ok(false) };
        tx.disable_doorbell()?;
        let mut wants = true;
        let mut more = true;
        for _ in 0..CHAINS_PER_CALL {
            if !wants {
                break;
            }
            let next = match self.partial.take() {
                Some(chain) => Some(chain),
                None => tx.pop_or_arm()?,
            };
            let Some(mut chain) = next else {
                more = false;
                break;
            };
            if chain.writable.remaining() > 0 {
                return Err(Violation::Protocol { reason: "a writable buffer in a transmit queue" });
            }
            wants = take(tx, &mut chain)?;
            if chain.readable.remaining() == 0 {
                tx.complete(chain.head, 0)?;
            } else {
                self.partial = Some(chain);
            }
        }
        Ok(more)
    }

    /// Copies `source` into the guest's buffers as far as it fits. 0 when there is no room: then the doorbell
    /// will ring.
    ///
    /// Not for the first buffer, though: Linux gives back every page as soon as it has been read, and a doorbell, a
    /// turn of the loop and an interrupt for each 4 KiB are what a transfer takes most of its time for. Once the queue
    /// is empty, the driver has its whole pool in its hands, and a reader that waits for more has given all of it back;
    /// so the doorbell for half of it comes in any case, while the reader still has the other half to read.
    pub(super) fn write(&mut self, interrupt: &Interrupt, source: &[u8]) -> Result<usize, Violation> {
        let Some(rx) = &mut self.rx else { return Ok(0) };
        if !self.control.guest.is_open() {
            return Ok(0);
        }
        rx.disable_doorbell()?;
        self.rx_pool = self.rx_pool.max(rx.available()?.min(rx.size()));
        let batch = (self.rx_pool / 2).max(1);
        let mut done = 0;
        for _ in 0..CHAINS_PER_CALL {
            if done == source.len() {
                break;
            }
            let Some(mut chain) = rx.pop_or_arm_for(batch)? else { break };
            if chain.readable.remaining() > 0 {
                return Err(Violation::Protocol { reason: "a readable buffer in a receive queue" });
            }
            let before = chain.writable.remaining();
            done += chain.writable.write(rx.memory(), &source[done..])?;
            rx.complete(chain.head, before - chain.writable.remaining())?;
        }
        rx.notify(interrupt)?;
        Ok(done)
    }
}

/// The queues of a port as the driver has set them up.
pub(super) struct RxTx {
    pub(super) rx: Option<ActiveQueue>,
    pub(super) tx: Option<ActiveQueue>,
}
