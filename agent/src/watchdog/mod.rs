//! The watchdog: a process that outlives the agent and thaws what the agent left frozen.
//!
//! ```text
//!   agent ──spawns──▶ watchdog (this binary, memory locked, touches no filesystem)
//!     │  Configure · Listen · Begin · Hook · Hold · Arm · Renew · Thaw · Thawed · End ─▶ │
//!     │ ◀──────────────────────────────────────────────────────────── Thawed      │
//!     ✗ killed                                                                    │ lease goes on
//!   agent, started again ──connects to the socket in statedir───────────────────▶ │
//!     │ ◀─────────────────────────────────────── Handover · Held + descriptor · Ready
//! ```
//!
//! It is there before the first FIFREEZE, and holds every descriptor that the agent holds. It thaws when the
//! lease runs out, or when the agent dies and no other one comes to take its place. An agent that is started
//! again finds it by a socket in the state directory, which only its user can reach, and goes on where its
//! predecessor was: same descriptors, same lease.
//!
//! [`state`] decides, [`process`] does, [`wire`] is what they say to each other.

mod process;
mod state;
mod wire;

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen as listen_on, socket_with,
    socketpair, sockopt,
};

pub(crate) use self::process::run;
pub(crate) use self::wire::Handover;
use self::wire::{Order, Packet, Tale, receive_tale, send_order};
use crate::freeze::{Cause, Hooks, Label};
use crate::log;
use crate::signals::unblock_for;

/// The process's own name for itself, by which `main` knows what to be.
pub(crate) const NAME: &str = "tarn-agent-watchdog";
/// Where an agent that returns finds it, in the state directory.
const SOCKET: &str = "tarn-agent.watchdog";
/// How long the other end may take to hand over or to take an order.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a former agent left.
#[derive(Debug)]
pub(crate) struct Inheritance {
    pub(crate) handover: Handover,
    pub(crate) held: Vec<(Label, OwnedFd)>,
}

/// How things were left.
#[derive(Debug)]
pub(crate) enum Past {
    /// No watchdog tells.
    Unknown,
    /// One does.
    Left(Inheritance),
    /// Another agent works with this state directory, and what lies there is its own.
    Elsewhere,
}

/// What the watchdog told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// It thawed all, for this reason; the freeze of this number.
    Thawed { number: u64, cause: Cause },
    /// It is gone.
    Dead,
}

/// The agent's end. Worker and main loop share it.
#[derive(Debug)]
pub(crate) struct Watchdog {
    // Fixed configuration.
    statedir: PathBuf,
    hooks: Hooks,
    // Volatile state.
    link: Mutex<Link>,
}

#[derive(Debug)]
struct Link {
    socket: Arc<OwnedFd>,
    /// Counts the processes: what one was told the next one does not know.
    incarnation: u64,
    /// Children that may have to be reaped.
    children: Vec<Child>,
    /// It has its socket, or is not to have one.
    listening: bool,
}

impl Watchdog {
    /// Finds the one that a former agent left, or starts one.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub(crate) fn start(statedir: &Path, hooks: Hooks) -> io::Result<(Self, Past)> {
        let statedir = std::path::absolute(statedir)?;
        let (socket, children, past) = match adopt(&statedir) {
            Adoption::Found(socket, inheritance) => (socket, Vec::new(), Past::Left(inheritance)),
            other => {
                let (socket, child) = spawn(&statedir, &hooks)?;
                let past = if matches!(other, Adoption::Taken) { Past::Elsewhere } else { Past::Unknown };
                (socket, vec![child], past)
            }
        };
        let listening = matches!(past, Past::Left(_) | Past::Elsewhere);
        let link = Link { socket: Arc::new(socket), incarnation: 1, children, listening };
        Ok((Self { statedir, hooks, link: Mutex::new(link) }, past))
    }

    /// Another one, in place of one that died.
    pub(crate) fn restart(&self) -> io::Result<()> {
        let (socket, child) = spawn(&self.statedir, &self.hooks)?;
        let mut link = self.link.lock();
        link.socket = Arc::new(socket);
        link.incarnation += 1;
        link.children.push(child);
        link.listening = false;
        Ok(())
    }

    /// Ends the one that was started last: it knows half of what it has to.
    pub(crate) fn kill(&self) {
        if let Some(child) = self.link.lock().children.last_mut() {
            let _ = child.kill();
        }
    }

    /// Makes the socket where an agent that returns will find the watchdog, if there is none yet. Only while nothing is
    /// frozen: it may be on a filesystem that is.
    pub(crate) fn listen(&self) {
        if std::mem::replace(&mut self.link.lock().listening, true) {
            return;
        }
        let listening = listen(&self.statedir)
            .and_then(|listener| send_order(&*self.socket(), &Order::Listen, Some(listener.as_fd())));
        if let Err(error) = listening {
            log::warning(format_args!(
                "An agent that is started again will not find the watchdog: {}: {error}",
                self.statedir.join(SOCKET).display()
            ));
        }
    }

    /// Takes the status of those that ended.
    pub(crate) fn reap(&self) {
        self.link.lock().children.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    }

    /// Which process this is, of those there were.
    pub(crate) fn incarnation(&self) -> u64 {
        self.link.lock().incarnation
    }

    /// The socket to wait on for [`news`](Self::news).
    pub(crate) fn socket(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.link.lock().socket)
    }

    /// What it has to say, if anything. Never waits.
    pub(crate) fn news(&self) -> Option<News> {
        loop {
            match receive_tale(&*self.socket()) {
                Ok(Packet::Message(Tale::Thawed { number, cause }, _)) => {
                    return Some(News::Thawed { number, cause });
                }
                Ok(Packet::Message(..)) => {}
                Ok(Packet::Nothing) => return None,
                Ok(Packet::End) | Err(_) => return Some(News::Dead),
            }
        }
    }

    /// A freeze begins; `hooks` if it has hooks that will want their thaw.
    pub(crate) fn begin(&self, number: u64, hooks: bool) -> io::Result<()> {
        self.send(&Order::Begin { number, hooks })
    }

    /// A hook runs, with this process group; 0 if none does.
    pub(crate) fn hook(&self, group: u32) -> io::Result<()> {
        self.send(&Order::Hook { group })
    }

    /// Hold this filesystem.
    pub(crate) fn hold(&self, label: Label, fd: BorrowedFd<'_>) -> io::Result<()> {
        send_order(&*self.socket(), &Order::Hold(label), Some(fd))
    }

    /// From now on filesystems may be frozen, and so much of the lease is left.
    pub(crate) fn arm(&self, lease: Option<Duration>, left: Option<Duration>) -> io::Result<()> {
        self.send(&Order::Arm { lease, left })
    }

    /// The lease begins anew.
    pub(crate) fn renew(&self) -> io::Result<()> {
        self.send(&Order::Renew)
    }

    /// Thaw all of the freeze of this number, until [`thawed`](Self::thawed).
    pub(crate) fn thaw(&self, number: u64, cause: Cause) -> io::Result<()> {
        self.send(&Order::Thaw { number, cause })
    }

    /// All is thawed; the hooks are still to be run.
    pub(crate) fn thawed(&self, cause: Cause) -> io::Result<()> {
        self.send(&Order::Thawed(cause))
    }

    /// The freeze is over.
    pub(crate) fn end(&self) -> io::Result<()> {
        self.send(&Order::End)
    }

    fn send(&self, order: &Order) -> io::Result<()> {
        send_order(&*self.socket(), order, None)
    }
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// This very binary under another name, with nothing but its socket.
fn spawn(statedir: &Path, hooks: &Hooks) -> io::Result<(OwnedFd, Child)> {
    let (ours, theirs) = pair()?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(NAME).current_dir("/");
    command.stdin(Stdio::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
    // Not of the agent's group: whoever ends that group must not end this.
    command.process_group(0);
    let child = unblock_for(&mut command).spawn()?;
    let configure =
        Order::Configure { statedir: statedir.to_string_lossy().into_owned(), hooks: hooks.clone() };
    send_order(&ours, &configure, None)?;
    Ok((ours, child))
}

/// What is at the socket in the state directory.
enum Adoption {
    Found(OwnedFd, Inheritance),
    /// The watchdog of an agent that lives.
    Taken,
    /// Nobody, or nobody who answers.
    None,
}

/// The watchdog that a former agent left, and what it holds.
fn adopt(statedir: &Path) -> Adoption {
    let Ok(socket) = reach(statedir) else { return Adoption::None };
    let deadline = Instant::now() + PATIENCE;
    let mut handover = None;
    let mut held = Vec::new();
    loop {
        match receive_tale(&socket) {
            Ok(Packet::Message(Tale::Handover(told), _)) => handover = Some(told),
            Ok(Packet::Message(Tale::Held(label), fd)) => held.extend(fd.map(|fd| (label, fd))),
            Ok(Packet::Message(Tale::Ready, _)) => break,
            Ok(Packet::Message(Tale::Thawed { .. }, _)) => {}
            Ok(Packet::Nothing) if is_readable_by(&socket, deadline) => {}
            Ok(Packet::End) => {
                log::warning(format_args!("Another agent uses the state directory {}", statedir.display()));
                return Adoption::Taken;
            }
            Ok(Packet::Nothing) | Err(_) => {
                log::error(format_args!("A former agent's watchdog does not answer"));
                return Adoption::None;
            }
        }
    }
    handover.map_or(Adoption::None, |handover| Adoption::Found(socket, Inheritance { handover, held }))
}

fn reach(statedir: &Path) -> io::Result<OwnedFd> {
    // Not to wait where somebody else's socket is in its place, with a full queue.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    at_socket(statedir, |address| Ok(connect(&socket, address)?))?;
    if same_user(&socket) { Ok(socket) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}

fn is_readable_by(socket: &OwnedFd, deadline: Instant) -> bool {
    let rest = deadline.saturating_duration_since(Instant::now());
    let limit = Timespec {
        tv_sec: rest.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: rest.subsec_nanos().into(),
    };
    poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&limit)).is_ok_and(|count| count > 0)
}

/// A socket in the place of what a former one left there. Only the agent's own user may connect.
fn listen(statedir: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    let _ = fs::remove_file(statedir.join(SOCKET));
    // Before it has a name: the name gets the mode of the socket.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    at_socket(statedir, |address| Ok(bind(&socket, address)?))?;
    listen_on(&socket, 1)?;
    Ok(socket)
}

/// A path of any length, by way of a descriptor.
fn at_socket<T>(statedir: &Path, act: impl FnOnce(&SocketAddrUnix) -> io::Result<T>) -> io::Result<T> {
    let directory =
        rustix::fs::open(statedir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let path = format!("/proc/self/fd/{}/{SOCKET}", directory.as_raw_fd());
    act(&SocketAddrUnix::new(path)?)
}

fn same_user(socket: impl AsFd) -> bool {
    let peer = sockopt::socket_peercred(&socket);
    peer.is_ok_and(|peer| peer.uid == rustix::process::geteuid())
}

/// A watchdog that only listens.
#[cfg(test)]
pub(crate) mod testing {
    use super::wire::receive_order;
    use super::*;

    /// What it was told.
    #[derive(Debug)]
    pub(crate) struct Orders(OwnedFd);

    impl Orders {
        /// Since the last call.
        pub(crate) fn take(&self) -> Vec<String> {
            let mut orders = Vec::new();
            while let Ok(Packet::Message(order, _)) = receive_order(&self.0) {
                orders.push(match order {
                    Order::Hold(label) => format!("Hold {}", label.mountpoint.display()),
                    order => format!("{order:?}"),
                });
            }
            orders
        }
    }

    impl Watchdog {
        pub(crate) fn fake() -> (Self, Orders) {
            let (ours, theirs) = pair().unwrap();
            let link = Mutex::new(Link {
                socket: Arc::new(ours),
                incarnation: 1,
                children: Vec::new(),
                listening: true,
            });
            (Self { statedir: PathBuf::new(), hooks: Hooks::default(), link }, Orders(theirs))
        }
    }
}
