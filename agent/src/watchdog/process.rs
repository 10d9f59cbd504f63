//! The watchdog process itself: one loop, memory locked.
//!
//! It reads and writes no file while anything is frozen: what it needs is in its memory, what it says goes through
//! sockets. What may hang has a thread of its own: each FITHAW, because a
//! dead disk must not hold up the others, and the hooks, once all is thawed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::net::{SocketFlags, sockopt};

use super::state::{Action, Input, Watch};
use super::wire::{Order, Packet, Tale, receive_order, send_tale};
use super::{PATIENCE, same_user};
use crate::freeze::{Hooks, Label, kill_group, remove_state_file, thaw_fully};
use crate::signals::Signals;

/// A FITHAW needs next to nothing.
const STACK: usize = 64 << 10;

/// Serves the agent at the other end of standard input until it is needed no more.
pub(crate) fn run() -> ExitCode {
    // An orphan must be found by nobody who is short of memory.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    match Process::new() {
        Ok(mut process) => {
            // Not allowed everywhere; then it works as long as nothing has to be swapped in.
            let _ = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE);
            process.serve();
            ExitCode::SUCCESS
        }
        // Nobody would read it.
        Err(_) => ExitCode::FAILURE,
    }
}

/// A filesystem held, and how far its thaw is.
struct Held {
    label: Label,
    fd: Arc<OwnedFd>,
    thaw: Arc<AtomicU8>,
}

/// Nobody has tried, or it failed.
const IDLE: u8 = 0;
/// A thread is at it.
const BUSY: u8 = 1;
/// The kernel says that it is not frozen.
const THAWED: u8 = 2;
/// It is held no more: a thread that is still at it must not touch it again.
const LET_GO: u8 = 3;

struct Process {
    // Wiring.
    agent: Option<OwnedFd>,
    signals: Signals,
    /// A FITHAW has come back.
    came_back: Arc<OwnedFd>,
    /// Where an agent that returns finds this.
    listener: Option<OwnedFd>,
    // Fixed configuration, from the agent's first words.
    configured: bool,
    statedir: PathBuf,
    hooks: Hooks,
    // Volatile state.
    watch: Watch,
    held: Vec<Held>,
    /// Of attempts to thaw.
    round: Arc<AtomicU64>,
    /// The hook that the agent runs.
    hook_group: u32,
    /// The hooks that this runs in its place.
    running_hooks: Option<JoinHandle<()>>,
    over: bool,
}

impl Process {
    fn new() -> io::Result<Self> {
        let agent = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
        sockopt::set_socket_timeout(&agent, sockopt::Timeout::Send, Some(PATIENCE))?;
        Ok(Self {
            agent: Some(agent),
            signals: Signals::block(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP])?,
            came_back: Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?),
            listener: None,
            configured: false,
            statedir: PathBuf::new(),
            hooks: Hooks::default(),
            watch: Watch::default(),
            held: Vec::new(),
            round: Arc::default(),
            hook_group: 0,
            running_hooks: None,
            over: false,
        })
    }

    fn serve(&mut self) {
        while !self.over {
            let Ok([agent, listener, signals, came_back]) = self.wait() else { break };
            if signals {
                while self.signals.next().is_some() {
                    self.on(Input::Terminate);
                }
            }
            if agent {
                // All of them: an agent that has died must be known to have, before the next one is looked at.
                while self.take_order() {}
            }
            if listener && !self.over {
                self.accept();
            }
            if came_back {
                let _ = rustix::io::read(&*self.came_back, &mut [0; 8]);
                self.look_after_thaws();
            }
            if self.watch.next_tick().is_some_and(|tick| tick <= Instant::now()) {
                self.on(Input::Tick);
            }
        }
        if let Some(hooks) = self.running_hooks.take() {
            let _ = hooks.join();
        }
    }

    /// Sleeps; which of agent, listener, signals and thaws have something.
    fn wait(&self) -> io::Result<[bool; 4]> {
        let sources: [Option<BorrowedFd<'_>>; 4] = [
            self.agent.as_ref().map(AsFd::as_fd),
            self.listener.as_ref().map(AsFd::as_fd),
            Some(self.signals.as_fd()),
            Some(self.came_back.as_fd()),
        ];
        let mut fds: Vec<PollFd<'_>> =
            sources.iter().flatten().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        let limit = self.watch.next_tick().map(|tick| {
            let rest = tick.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: rest.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: rest.subsec_nanos().into(),
            }
        });
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        Ok(sources.map(|source| source.is_some() && ready.next().unwrap_or(false)))
    }

    /// False if there is none.
    fn take_order(&mut self) -> bool {
        let Some(agent) = &self.agent else { return false };
        let (order, fd) = match receive_order(agent) {
            Ok(Packet::Message(order, fd)) => (order, fd),
            Ok(Packet::Nothing) => return false,
            Ok(Packet::End) | Err(_) => {
                self.agent = None;
                self.on(Input::AgentGone);
                return false;
            }
        };
        let input = match order {
            Order::Configure { statedir, hooks } => {
                // Only from whoever started this.
                if !std::mem::replace(&mut self.configured, true) {
                    self.listener = fd;
                    self.statedir = statedir.into();
                    self.hooks = hooks;
                }
                return true;
            }
            Order::Hold(label) => {
                let thaw = || Arc::new(AtomicU8::new(IDLE));
                self.held.extend(fd.map(|fd| Held { label, fd: Arc::new(fd), thaw: thaw() }));
                return true;
            }
            Order::Hook { group } => {
                self.hook_group = group;
                return true;
            }
            Order::Begin { number, hooks } => Input::Begin { number, hooks },
            Order::Arm { lease, left } => Input::Arm { lease, left },
            Order::Renew => Input::Renew,
            Order::Listen => {
                self.listener = fd;
                return true;
            }
            Order::Thaw { number, cause } => Input::Thaw { number, cause },
            Order::Thawed(cause) => Input::Thawed(cause),
            Order::End => Input::End,
        };
        self.on(input);
        true
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        let Ok(peer) = rustix::net::accept_with(listener, SocketFlags::CLOEXEC) else { return };
        let timed = sockopt::set_socket_timeout(&peer, sockopt::Timeout::Send, Some(PATIENCE));
        if timed.is_err() || !same_user(&peer) || has_left(&peer) {
            return;
        }
        for action in self.watch.on(Input::AgentBack, Instant::now()) {
            if action == Action::HandOver {
                self.hand_over(&peer);
                self.agent = Some(peer);
                return;
            }
        }
    }

    /// If it fails, the agent is gone again, which its socket will tell.
    fn hand_over(&self, peer: &OwnedFd) {
        let handover = Tale::Handover(self.watch.handover(Instant::now()));
        let mut sent = send_tale(peer, &handover, None);
        for held in &self.held {
            sent =
                sent.and_then(|()| send_tale(peer, &Tale::Held(held.label.clone()), Some(held.fd.as_fd())));
        }
        let _ = sent.and_then(|()| send_tale(peer, &Tale::Ready, None));
    }

    fn on(&mut self, input: Input) {
        for action in self.watch.on(input, Instant::now()) {
            match action {
                Action::Thaw => self.thaw(),
                Action::Tell { number, cause } => {
                    if let Some(agent) = &self.agent {
                        let _ = send_tale(agent, &Tale::Thawed { number, cause }, None);
                    }
                }
                Action::Release => {
                    for held in self.held.drain(..) {
                        held.thaw.store(LET_GO, Ordering::Release);
                    }
                }
                Action::Finish { hooks } => self.finish(hooks),
                // Where the agent is at hand.
                Action::HandOver | Action::Refuse => {}
                Action::Exit => self.over = true,
            }
        }
    }

    /// Starts a thread for everything that has none. What was not frozen a moment ago may be by now: a FIFREEZE that was
    /// under way is not noticed before it is through.
    fn thaw(&mut self) {
        let round = self.round.fetch_add(1, Ordering::AcqRel) + 1;
        for held in &self.held {
            let _ = held.thaw.compare_exchange(THAWED, IDLE, Ordering::AcqRel, Ordering::Acquire);
            let free = held.thaw.compare_exchange(IDLE, BUSY, Ordering::AcqRel, Ordering::Acquire);
            if free.is_err() {
                continue;
            }
            let (fd, thaw, bell) =
                (Arc::clone(&held.fd), Arc::clone(&held.thaw), Arc::clone(&self.came_back));
            let rounds = Arc::clone(&self.round);
            let thread = thread::Builder::new().stack_size(STACK).spawn(move || {
                let done = thaw_fully(&*fd, || thaw.load(Ordering::Acquire) == BUSY);
                // Of an earlier round it says nothing.
                let counts = rounds.load(Ordering::Acquire) == round;
                let outcome = if done && counts { THAWED } else { IDLE };
                let _ = thaw.compare_exchange(BUSY, outcome, Ordering::AcqRel, Ordering::Acquire);
                let _ = rustix::io::write(&*bell, &1_u64.to_ne_bytes());
            });
            if thread.is_err() {
                // The next attempt is not far.
                held.thaw.store(IDLE, Ordering::Release);
            }
        }
        self.look_after_thaws();
    }

    fn look_after_thaws(&mut self) {
        if self.held.iter().all(|held| held.thaw.load(Ordering::Acquire) == THAWED) {
            self.on(Input::AllThawed);
        }
    }

    /// Nothing is frozen any more, and there is no agent.
    fn finish(&mut self, hooks: bool) {
        kill_group(std::mem::take(&mut self.hook_group));
        remove_state_file(&self.statedir);
        if hooks {
            let hooks = self.hooks.clone();
            let run = move || hooks.thaw(&hooks.programs(), |_| {});
            self.running_hooks = thread::Builder::new().spawn(run).ok();
        }
    }
}

/// Whether the other end is closed already.
fn has_left(peer: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(peer, PollFlags::empty())];
    poll(&mut fds, Some(&Timespec::default())).is_ok() && fds[0].revents().contains(PollFlags::HUP)
}
