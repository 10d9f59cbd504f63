//! Calls carried out by a few threads, for hosts that do not allow io_uring, and for the calls that
//! io_uring does not have.

#![expect(unsafe_code, reason = "runs calls under the contract of Backend::start")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::{Condvar, Mutex};

use super::Backend;
use super::call::Call;
use crate::event::Event;

/// Enough to keep a disk's queue filled while one thread waits for a flush.
const MAX_THREADS: usize = 4;

#[derive(Default)]
struct State {
    calls: VecDeque<(u32, Call)>,
    results: Vec<(u32, i32)>,
    idle: usize,
    stop: bool,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    done: Event,
}

/// Threads are started when there is work and all are busy, and end with the pool.
pub(crate) struct ThreadPool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Started but not yet given to the threads.
    batch: Vec<(u32, Call)>,
}

impl ThreadPool {
    pub(crate) fn new() -> io::Result<Self> {
        let shared =
            Shared { state: Mutex::new(State::default()), work: Condvar::new(), done: Event::new()? };
        let mut pool = Self { shared: Arc::new(shared), threads: Vec::new(), batch: Vec::new() };
        // One always exists, so that later failures to start one only cost speed.
        pool.grow()?;
        Ok(pool)
    }

    fn grow(&mut self) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let name = format!("blk-io-{}", self.threads.len());
        self.threads.push(thread::Builder::new().name(name).spawn(move || work(&shared))?);
        Ok(())
    }
}

fn work(shared: &Shared) {
    let mut state = shared.state.lock();
    loop {
        while let Some((slot, call)) = state.calls.pop_front() {
            drop(state);
            // SAFETY: whoever started the call keeps segments and memory until the result is reaped,
            // and the pool is not dropped before that.
            let result = unsafe { call.run() };
            state = shared.state.lock();
            state.results.push((slot, result));
            if state.results.len() == 1 {
                shared.done.signal();
            }
        }
        if state.stop {
            return;
        }
        state.idle += 1;
        shared.work.wait(&mut state);
        state.idle -= 1;
    }
}

impl Backend for ThreadPool {
    unsafe fn start(&mut self, slot: u32, call: Call) {
        self.batch.push((slot, call));
    }

    fn submit(&mut self) -> io::Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let (waiting, idle) = {
            let mut state = self.shared.state.lock();
            state.calls.extend(self.batch.drain(..));
            (state.calls.len(), state.idle)
        };
        if waiting > idle && self.threads.len() < MAX_THREADS {
            // The threads there are will do.
            let _ = self.grow();
        }
        if waiting == 1 {
            self.shared.work.notify_one();
        } else {
            self.shared.work.notify_all();
        }
        Ok(())
    }

    fn reap(&mut self, results: &mut Vec<(u32, i32)>) {
        let mut state = self.shared.state.lock();
        if !state.results.is_empty() {
            // Under the lock: the next first result signals again.
            self.shared.done.clear();
            results.append(&mut state.results);
        }
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.shared.done.as_fd()
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.state.lock().stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}
