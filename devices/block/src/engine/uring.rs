//! Calls carried out by io_uring: one ring per disk, one `io_uring_enter` per batch.
//!
//! The ring's own descriptor is the event: it is readable exactly while completions wait, so nothing
//! has to be read to quiet it, and completions reaped in time cause no wake-up at all (an eventfd
//! would be signalled for each of them).
//!
//! `BLKDISCARD` and `lseek` have no opcode on the kernels we support; such calls go to a thread, and a poll
//! request on the thread's event brings its results back through the ring.

#![expect(unsafe_code, reason = "submission entries carry raw pointers")]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use io_uring::{IoUring, opcode, squeue, types};

use super::Backend;
use super::call::{Call, CallKind};
use super::threads::ThreadPool;

/// The user data of the poll request on the thread pool's event; no slot has it.
const POOL: u64 = u64::MAX;

pub(crate) struct Uring {
    ring: IoUring,
    pool: Option<ThreadPool>,
    /// Calls given to the pool whose results have not come.
    in_pool: usize,
    /// A poll request on the pool's event is in the ring.
    polling: bool,
    /// Whether `submit` has anything to do.
    unsubmitted: bool,
}

impl Uring {
    /// A ring for up to `depth` calls at a time.
    ///
    /// # Errors
    ///
    /// The host's refusal: `ENOSYS`, `EPERM` (sysctl, seccomp), `ENOMEM` (locked memory, before
    /// Linux 5.12).
    pub(crate) fn new(depth: u32) -> io::Result<Self> {
        // One more for the poll request. Completions never overflow: the completion ring is twice as
        // large, and no more than `depth` calls are in flight.
        let entries = depth.saturating_add(1).next_power_of_two();
        let ring = IoUring::builder()
            .dontfork()
            // Completions need no interrupt: every wait of the owner is a system call.
            .setup_coop_taskrun()
            .build(entries)
            .or_else(|error| match error.raw_os_error() {
                // Before Linux 5.19.
                Some(libc::EINVAL) => IoUring::builder().dontfork().build(entries),
                _ => Err(error),
            })?;
        require_opcodes(&ring)?;
        Ok(Self { ring, pool: None, in_pool: 0, polling: false, unsubmitted: false })
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the entry's pointers stay valid by the contract of `Backend::start`.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            // Full only if earlier entries were never submitted.
            let _ = self.enter();
        }
        self.unsubmitted = true;
    }

    fn start_in_pool(&mut self, slot: u32, call: Call) -> io::Result<()> {
        let pool = match self.pool.take() {
            Some(pool) => pool,
            None => ThreadPool::new()?,
        };
        let pool = self.pool.insert(pool);
        // SAFETY: handed on under the same contract.
        unsafe { pool.start(slot, call) };
        self.in_pool += 1;
        Ok(())
    }

    fn poll_pool(&mut self) {
        let Some(pool) = self.pool.as_ref().filter(|_| self.in_pool > 0 && !self.polling) else { return };
        let fd = types::Fd(pool.event().as_raw_fd());
        let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32).build().user_data(POOL);
        self.polling = true;
        self.push(&entry);
    }

    fn enter(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit() {
                Ok(_) if self.ring.submission().is_empty() => return Ok(()),
                Ok(_) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // The kernel is short of memory for requests, which passes by itself and cannot be
                    // waited for.
                    Some(libc::EAGAIN | libc::EBUSY) => std::thread::yield_now(),
                    _ => return Err(error),
                },
            }
        }
    }
}

/// `IORING_OP_FALLOCATE` is the youngest operation we need (Linux 5.6).
fn require_opcodes(ring: &IoUring) -> io::Result<()> {
    let mut probe = io_uring::Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::PollAdd::CODE,
    ];
    if needed.iter().all(|code| probe.is_supported(*code)) {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::ENOSYS))
    }
}

impl Backend for Uring {
    unsafe fn start(&mut self, slot: u32, call: Call) {
        let fd = types::Fd(call.fd);
        let entry = match call.kind {
            CallKind::Read => opcode::Readv::new(fd, call.segments, call.segment_count)
                .offset(call.offset)
                .rw_flags(call.rw_flags())
                .build(),
            CallKind::Write | CallKind::DurableWrite => {
                opcode::Writev::new(fd, call.segments, call.segment_count)
                    .offset(call.offset)
                    .rw_flags(call.rw_flags())
                    .build()
            }
            CallKind::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            CallKind::PunchHole | CallKind::ZeroRange => opcode::Fallocate::new(fd, call.length)
                .offset(call.offset)
                .mode(call.fallocate_mode())
                .build(),
            CallKind::DeviceDiscard | CallKind::Extent => match self.start_in_pool(slot, call) {
                Ok(()) => return,
                // No thread: "not supported" is an answer every discard must live with, and so must who asks for an
                // extent: the answer stays as it was.
                Err(_) => opcode::Nop::new().build().user_data(u64::from(slot)),
            },
        };
        let flags = if call.aside { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        self.push(&entry.user_data(u64::from(slot)).flags(flags));
    }

    fn submit(&mut self) -> io::Result<()> {
        if let Some(pool) = &mut self.pool {
            pool.submit()?;
            self.poll_pool();
        }
        if self.unsubmitted {
            self.enter()?;
            self.unsubmitted = false;
        }
        Ok(())
    }

    fn reap(&mut self, results: &mut Vec<(u32, i32)>) {
        for entry in self.ring.completion() {
            if entry.user_data() == POOL {
                self.polling = false;
            } else {
                // Slots are u32.
                results.push((u32::try_from(entry.user_data()).unwrap_or(u32::MAX), entry.result()));
            }
        }
        if let Some(pool) = &mut self.pool
            && !self.polling
            && self.in_pool > 0
        {
            let before = results.len();
            pool.reap(results);
            self.in_pool -= results.len() - before;
            self.poll_pool();
            if self.polling {
                // A failure shows again at the next submission.
                let _ = self.submit();
            }
        }
    }

    fn event(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor lives as long as the ring, which outlives the borrow.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_ring_is_not_readable() {
        let Ok(mut ring) = Uring::new(8) else {
            eprintln!("io_uring is not allowed here");
            return;
        };
        assert!(!crate::event::wait_readable(ring.event(), std::time::Duration::ZERO));
        ring.submit().unwrap();
        let mut results = Vec::new();
        ring.reap(&mut results);
        assert!(results.is_empty());
    }
}
