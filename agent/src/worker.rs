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
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use protocol::{Args, Error};
use rustix::event::{EventfdFlags, eventfd};
use serde_json::Value;

use crate::access::Access;
use crate::dispatch;
use crate::guest::Guest;
use crate::schema::{Command, Role};

/// Memory is locked while frozen, stacks included.
const STACK: usize = 256 << 10;

/// A job's number.
pub(crate) type Ticket = u64;

/// A command's code on the worker.
pub(crate) type Handler = fn(&mut Guest, Args) -> Result<Value, Error>;

/// What the agent itself has to do there.
pub(crate) type Chore = Box<dyn FnOnce(&mut Guest) + Send>;

struct Job {
    ticket: Ticket,
    work: Work,
    wanted: Arc<AtomicBool>,
}

enum Work {
    Command { command: &'static Command, handler: Handler, args: Args },
    Chore(Chore),
}

/// A job that ended.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) ticket: Ticket,
    pub(crate) role: Role,
    /// The number of the last freeze.
    pub(crate) freeze: u64,
    pub(crate) result: Result<Value, Error>,
}

/// A job as its client sees it.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) ticket: Ticket,
    /// Somebody waits for the result.
    pub(crate) wanted: Arc<AtomicBool>,
}

/// The main loop's end.
pub(crate) struct Worker {
    jobs: Sender<Job>,
    finished: Receiver<Finished>,
    bell: Arc<OwnedFd>,
    /// The job that runs.
    current: Arc<AtomicU64>,
    last: Ticket,
    waiting: usize,
}

impl Worker {
    /// Starts the thread.
    pub(crate) fn start(mut guest: Guest, access: Access) -> io::Result<Self> {
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (jobs, queue) = mpsc::channel::<Job>();
        let (results, finished) = mpsc::channel();
        let current = Arc::new(AtomicU64::new(0));
        let (ring, running) = (Arc::clone(&bell), Arc::clone(&current));
        thread::Builder::new().name("worker".into()).stack_size(STACK).spawn(move || {
            for Job { ticket, work, wanted } in queue {
                let role = work.role();
                running.store(ticket, Ordering::SeqCst);
                let result = if role == Role::Freeze && !wanted.load(Ordering::SeqCst) {
                    Err(Error::generic("Nobody waits for the freeze any more"))
                } else {
                    carry_out(work, &mut guest, &access)
                };
                if results
                    .send(Finished { ticket, role, freeze: guest.freezer.freezing().number(), result })
                    .is_err()
                {
                    return;
                }
                // Fails only if the counter is full: then the bell rings already.
                let _ = rustix::io::write(&ring, &1_u64.to_ne_bytes());
            }
        })?;
        Ok(Self { jobs, finished, bell, current, last: 0, waiting: 0 })
    }

    /// Queues a command.
    pub(crate) fn submit(&mut self, command: &'static Command, handler: Handler, args: Args) -> Pending {
        self.queue(Work::Command { command, handler, args })
    }

    /// The job that runs, or the last one that did.
    pub(crate) fn current(&self) -> Ticket {
        self.current.load(Ordering::SeqCst)
    }

    /// Queues something of the agent's own.
    pub(crate) fn submit_chore(&mut self, chore: Chore) {
        self.queue(Work::Chore(chore));
    }

    fn queue(&mut self, work: Work) -> Pending {
        self.last += 1;
        self.waiting += 1;
        let wanted = Arc::new(AtomicBool::new(true));
        // The worker ends after this end of the queue, not before.
        let _ = self.jobs.send(Job { ticket: self.last, work, wanted: Arc::clone(&wanted) });
        Pending { ticket: self.last, wanted }
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

impl Work {
    fn role(&self) -> Role {
        match self {
            Self::Command { command, .. } => command.role,
            Self::Chore(_) => Role::None,
        }
    }
}

fn carry_out(work: Work, guest: &mut Guest, access: &Access) -> Result<Value, Error> {
    match work {
        Work::Command { command, handler, args } => {
            // Looked at again: filesystems may be frozen since the request came.
            dispatch::check_enabled(command, access, guest.freezer.is_frozen())?;
            handler(guest, args)
        }
        Work::Chore(chore) => {
            chore(guest);
            Ok(Value::Null)
        }
    }
}

impl AsFd for Worker {
    /// Readable when a job has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
