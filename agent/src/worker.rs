//! The thread for commands that may take long.
//!
//! ```text
//!   main loop                                 worker
//!     submit(command, args) ── queue ──▶  runs them one at a time, in order
//!     finished() ◀── queue, eventfd ────  ticket, result
//! ```
//!
//! One at a time, because they share files and filesystems and none of them is in a hurry; what is in a
//! hurry runs on the main loop. The worker owns the [`Guest`] and ends when the main loop drops its end
//! of the queue; it is not waited for, as it may hang in a dead disk.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use protocol::{Args, Error};
use rustix::event::{EventfdFlags, eventfd};
use serde_json::Value;

use crate::access::Access;
use crate::dispatch;
use crate::guest::Guest;
use crate::schema::Command;

/// Memory is locked while frozen, stacks included.
const STACK: usize = 256 << 10;

/// A job's number.
pub(crate) type Ticket = u64;

/// A command's code on the worker.
pub(crate) type Handler = fn(&mut Guest, Args) -> Result<Value, Error>;

struct Job {
    ticket: Ticket,
    command: &'static Command,
    handler: Handler,
    args: Args,
}

/// A job that ended.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) ticket: Ticket,
    pub(crate) result: Result<Value, Error>,
}

/// The main loop's end.
pub(crate) struct Worker {
    jobs: Sender<Job>,
    finished: Receiver<Finished>,
    bell: Arc<OwnedFd>,
    last: Ticket,
    waiting: usize,
}

impl Worker {
    /// Starts the thread.
    pub(crate) fn start(mut guest: Guest, access: Access) -> io::Result<Self> {
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (jobs, queue) = mpsc::channel::<Job>();
        let (results, finished) = mpsc::channel();
        let ring = Arc::clone(&bell);
        thread::Builder::new().name("worker".into()).stack_size(STACK).spawn(move || {
            for Job { ticket, command, handler, args } in queue {
                // Looked at again: filesystems may be frozen since the request came.
                let frozen = guest.freezer.is_frozen();
                let result = dispatch::check_enabled(command, &access, frozen)
                    .and_then(|()| handler(&mut guest, args));
                if results.send(Finished { ticket, result }).is_err() {
                    return;
                }
                // Fails only if the counter is full: then the bell rings already.
                let _ = rustix::io::write(&ring, &1_u64.to_ne_bytes());
            }
        })?;
        Ok(Self { jobs, finished, bell, last: 0, waiting: 0 })
    }

    /// Queues a command.
    pub(crate) fn submit(&mut self, command: &'static Command, handler: Handler, args: Args) -> Ticket {
        self.last += 1;
        self.waiting += 1;
        // The worker ends after this end of the queue, not before.
        let _ = self.jobs.send(Job { ticket: self.last, command, handler, args });
        self.last
    }

    /// Jobs that have not been taken from [`finished`](Self::finished) yet.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Jobs that ended since the last call.
    pub(crate) fn finished(&mut self) -> Vec<Finished> {
        let mut count = [0; 8];
        let _ = rustix::io::read(&*self.bell, &mut count);
        let finished: Vec<Finished> = self.finished.try_iter().collect();
        self.waiting -= finished.len();
        finished
    }
}

impl AsFd for Worker {
    /// Readable when a job has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
