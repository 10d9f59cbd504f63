//! The watchdog process itself: one thread, one poll, memory locked.
//!
//! It is started before anything is frozen and reads and writes no file while anything is: what it needs is
//! in its memory, what it says goes through sockets.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::net::SocketFlags;

use super::state::{Action, Input, Watch};
use super::wire::{Order, Packet, Tale, receive_order, send_tale};
use super::{listen, same_user};
use crate::freeze::{Hooks, Label, remove_state_file, thaw_fully};
use crate::signals::Signals;

/// How long a round of FITHAWs is waited for: one that hangs in a dead disk must not hold up the rest.
const ROUND: Duration = Duration::from_secs(2);
/// Each FITHAW has a thread of its own, which needs next to nothing.
const STACK: usize = 64 << 10;

/// Serves the agent at the other end of standard input until it is needed no more.
pub(crate) fn run() -> ExitCode {
    // An orphan must be found by nobody who is short of memory.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let Ok(agent) = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) else {
        return ExitCode::FAILURE;
    };
    let Ok(signals) = Signals::block(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP]) else {
        return ExitCode::FAILURE;
    };
    // Not allowed everywhere; then it works as long as nothing has to be swapped in.
    let _ = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE);
    Process {
        agent: Some(agent),
        signals,
        listener: None,
        statedir: PathBuf::new(),
        hooks: Hooks::default(),
        watch: Watch::default(),
        held: Vec::new(),
        over: false,
    }
    .serve();
    ExitCode::SUCCESS
}

struct Process {
    // Wiring.
    agent: Option<OwnedFd>,
    signals: Signals,
    /// Where an agent that returns finds this.
    listener: Option<OwnedFd>,
    // Fixed configuration, from the agent's first words.
    statedir: PathBuf,
    hooks: Hooks,
    // Volatile state.
    watch: Watch,
    held: Vec<(Label, Arc<OwnedFd>)>,
    over: bool,
}

impl Process {
    fn serve(&mut self) {
        while !self.over {
            let Ok([agent, listener, signals]) = self.wait() else { return };
            if signals {
                while self.signals.next().is_some() {
                    self.on(Input::Terminate);
                }
            }
            if agent {
                self.take_order();
            }
            if listener {
                self.accept();
            }
            if self.watch.next_tick().is_some_and(|tick| tick <= Instant::now()) {
                self.on(Input::Tick);
            }
        }
    }

    /// Sleeps; which of agent, listener and signals have something.
    fn wait(&self) -> io::Result<[bool; 3]> {
        let sources: [Option<BorrowedFd<'_>>; 3] = [
            self.agent.as_ref().map(AsFd::as_fd),
            self.listener.as_ref().map(AsFd::as_fd),
            Some(self.signals.as_fd()),
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

    fn take_order(&mut self) {
        let Some(agent) = &self.agent else { return };
        let input = match receive_order(agent) {
            Ok(Packet::Message(order, fd)) => match order {
                Order::Configure { statedir, hooks } => {
                    self.listener = listen(Path::new(&statedir)).ok();
                    self.statedir = statedir.into();
                    self.hooks = hooks;
                    return;
                }
                Order::Hold(label) => {
                    self.held.extend(fd.map(|fd| (label, Arc::new(fd))));
                    return;
                }
                Order::Begin { hooks } => Input::Begin { hooks },
                Order::Arm { lease } => Input::Arm { lease },
                Order::Renew => Input::Renew,
                Order::Thaw(cause) => Input::Thaw(cause),
                Order::Thawed(cause) => Input::Thawed(cause),
                Order::End => Input::End,
            },
            Ok(Packet::End) | Err(_) => {
                self.agent = None;
                Input::AgentGone
            }
        };
        self.on(input);
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        let Ok(peer) = rustix::net::accept_with(listener, SocketFlags::CLOEXEC) else { return };
        if !same_user(&peer) {
            return;
        }
        for action in self.watch.on(Input::AgentBack, Instant::now()) {
            if action == Action::HandOver {
                self.hand_over(&peer);
            }
        }
        if self.agent.is_none() {
            self.agent = Some(peer);
        }
    }

    /// If it fails, the agent is gone again, which its socket will tell.
    fn hand_over(&self, peer: &OwnedFd) {
        let handover = Tale::Handover(self.watch.handover(Instant::now()));
        let mut sent = send_tale(peer, &handover, None);
        for (label, fd) in &self.held {
            sent = sent.and_then(|()| send_tale(peer, &Tale::Held(label.clone()), Some(fd.as_fd())));
        }
        let _ = sent.and_then(|()| send_tale(peer, &Tale::Ready, None));
    }

    fn on(&mut self, input: Input) {
        for action in self.watch.on(input, Instant::now()) {
            match action {
                Action::Thaw => self.thaw(),
                Action::Tell(cause) => {
                    if let Some(agent) = &self.agent {
                        let _ = send_tale(agent, &Tale::Thawed(cause), None);
                    }
                }
                Action::Release => self.held.clear(),
                Action::Finish { hooks } => {
                    remove_state_file(&self.statedir);
                    if hooks {
                        self.hooks.thaw(&self.hooks.programs(), |_| {});
                    }
                }
                // Where the agent is at hand.
                Action::HandOver | Action::Refuse => {}
                Action::Exit => self.over = true,
            }
        }
    }

    /// Thaws everything at the same time, the last one frozen (and held) first.
    fn thaw(&self) {
        let (done, wait) = mpsc::channel();
        let mut started = 0;
        for (_, fd) in self.held.iter().rev() {
            let (fd, done) = (Arc::clone(fd), done.clone());
            let own = Arc::clone(&fd);
            let thread = thread::Builder::new().stack_size(STACK).spawn(move || {
                thaw_fully(&*fd);
                let _ = done.send(());
            });
            match thread {
                Ok(_) => started += 1,
                // Better late than never.
                Err(_) => thaw_fully(&*own),
            }
        }
        let deadline = Instant::now() + ROUND;
        for _ in 0..started {
            let rest = deadline.saturating_duration_since(Instant::now());
            if wait.recv_timeout(rest).is_err() {
                return;
            }
        }
    }
}
