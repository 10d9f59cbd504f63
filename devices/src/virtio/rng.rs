//! virtio-rng: entropy from the host's kernel (virtio 1.2, section 5.4).
//!
//! The one queue holds writable buffers. The control loop fills them through an [`RngHandle`], with
//! getrandom(2), which does not block once the host has booted.

#![expect(unsafe_code, reason = "getrandom(2)")]

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::device::{Activation, Interrupt, VirtioDevice};
use super::queue::{Chain, Violation, Virtqueue};

/// The most bytes that one request gets, however long it is: the driver asks again.
pub const MAX_BYTES: u32 = 64 << 10;
/// Requests served in one go, so that a greedy guest shares the thread.
const REQUESTS_PER_CALL: u16 = 16;
const QUEUE_SIZES: [u16; 1] = [16];

/// Fills a buffer with random bytes.
type Source = fn(&mut [u8]) -> io::Result<()>;

/// The device, as the transport sees it.
pub struct Rng {
    state: Arc<Mutex<Option<Active>>>,
}

/// The device, as the control loop sees it. Clones are the same device.
#[derive(Clone)]
pub struct RngHandle {
    state: Arc<Mutex<Option<Active>>>,
    source: Source,
}

struct Active {
    queue: Virtqueue,
    interrupt: Arc<Interrupt>,
}

#[derive(Debug, thiserror::Error)]
enum RngError {
    #[error("Entropy request is malformed")]
    Request(#[from] Violation),
    #[error("Host has no entropy")]
    Source(#[source] io::Error),
}

impl Rng {
    /// A device and the handle to it.
    pub fn new() -> (Self, RngHandle) {
        let state = Arc::new(Mutex::new(None));
        (Self { state: Arc::clone(&state) }, RngHandle { state, source: getrandom })
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn device_features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { memory, features, queues, interrupt } = activation;
        let queue = queues.into_iter().next().flatten();
        let active = queue.map(|queue| Active { queue: Virtqueue::new(queue, memory, features), interrupt });
        *self.state.lock() = active;
        Ok(())
    }

    fn reset(&mut self) -> io::Result<()> {
        *self.state.lock() = None;
        Ok(())
    }
}

impl RngHandle {
    /// Serves the doorbell: call it after reading the eventfd. Bounded; when there is more to do, the doorbell has
    /// been rung again.
    pub fn doorbell(&self) {
        let mut state = self.state.lock();
        let Some(Active { queue, interrupt }) = &mut *state else { return };
        if interrupt.is_reset_needed() {
            *state = None;
            return;
        }
        let served =
            queue.serve(REQUESTS_PER_CALL, interrupt, |queue, chain| fill(queue, chain, self.source));
        if let Err(error) = served {
            interrupt.violated(&error);
            *state = None;
        }
    }
}

fn fill(queue: &mut Virtqueue, mut chain: Chain, source: Source) -> Result<(), RngError> {
    if chain.readable.remaining() > 0 {
        return Err(Violation::Protocol { reason: "a readable buffer in an entropy request" }.into());
    }
    let wanted = chain.writable.remaining().min(MAX_BYTES);
    let mut written = 0;
    let mut bytes = [0; 4096];
    while written < wanted {
        let step = bytes.len().min((wanted - written) as usize);
        source(&mut bytes[..step]).map_err(RngError::Source)?;
        chain.writable.write(queue.memory(), &bytes[..step])?;
        written += u32::try_from(step).unwrap_or_default();
    }
    Ok(queue.complete(chain.head, written)?)
}

fn getrandom(mut target: &mut [u8]) -> io::Result<()> {
    while !target.is_empty() {
        // SAFETY: pointer and length describe `target`, which is writable and stays borrowed over the call.
        let count = unsafe { libc::getrandom(target.as_mut_ptr().cast(), target.len(), 0) };
        match usize::try_from(count) {
            Ok(count) => target = &mut target[count..],
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use virtio_queue::desc::split::Descriptor;

    use super::*;
    use crate::testing::{Buffer, FakeDriver, WILD_ADDRESS, WRITE};

    fn started(source: Source) -> (FakeDriver, RngHandle) {
        let (rng, mut handle) = Rng::new();
        handle.source = source;
        let mut driver = FakeDriver::new(Box::new(rng));
        driver.start(u64::MAX);
        driver.take_doorbell(0);
        (driver, handle)
    }

    #[test]
    fn requests_are_filled_with_different_bytes() {
        let (mut driver, handle) = started(getrandom);
        for len in [1, 64, 5000] {
            driver.send(0, &[Buffer::Writable(len), Buffer::Writable(3)]);
        }
        assert!(driver.take_doorbell(0));
        handle.doorbell();
        let used = driver.drain_used(0);
        assert_eq!(used.iter().map(|used| used.len).collect::<Vec<_>>(), [4, 67, 5003]);
        assert_ne!(used[1].data[..60], used[2].data[..60]);
        // 5003 equal bytes in a row are not random, also not at the end.
        assert!(used[2].data[4000..].iter().any(|&byte| byte != used[2].data[5002]));
        assert_eq!(driver.line().count(), 1);
        assert!(!driver.take_doorbell(0));
    }

    #[test]
    fn a_request_gets_no_more_than_its_share_and_a_call_serves_no_more_than_its() {
        let (mut driver, handle) = started(getrandom);
        driver.send(0, &[Buffer::Writable(1 << 20)]);
        handle.doorbell();
        assert_eq!(driver.take_used(0).unwrap().len, MAX_BYTES);
        for _ in 0..QUEUE_SIZES[0] {
            driver.send(0, &[Buffer::Writable(8)]);
        }
        driver.take_doorbell(0);
        handle.doorbell();
        assert!(driver.take_doorbell(0), "the loop is to come back");
        handle.doorbell();
        assert!(!driver.take_doorbell(0));
    }

    #[test]
    fn malformed_requests_need_a_reset() {
        for bad in [Descriptor::new(0x1000, 8, 0, 0), Descriptor::new(WILD_ADDRESS, 8, WRITE, 0)] {
            let (mut driver, handle) = started(getrandom);
            driver.send_raw(0, &[bad]);
            handle.doorbell();
            assert!(driver.needs_reset());
            handle.doorbell();
            driver.start(u64::MAX);
            driver.send(0, &[Buffer::Writable(8)]);
            handle.doorbell();
            assert_eq!(driver.take_used(0).unwrap().len, 8);
        }
    }

    #[test]
    fn a_host_without_entropy_gives_none() {
        let (mut driver, handle) = started(|_| Err(io::ErrorKind::Unsupported.into()));
        driver.send(0, &[Buffer::Writable(8)]);
        handle.doorbell();
        assert!(driver.needs_reset());
        assert_eq!(driver.take_used(0), None);
    }

    #[test]
    fn nothing_is_served_after_a_reset() {
        let (mut driver, handle) = started(getrandom);
        driver.send(0, &[Buffer::Writable(8)]);
        driver.write(0x70, 0);
        handle.doorbell();
        assert_eq!(driver.take_used(0), None);
    }
}
