//! The watchdog: a process that outlives the agent and thaws what the agent left frozen.
//!
//! ```text
//!   agent ──spawns──▶ watchdog (this binary, memory locked, touches no filesystem)
//!     │  Begin · Hold + descriptor · Arm{lease} · Renew · Thaw · Thawed · End ─▶ │
//!     │ ◀──────────────────────────────────────────────────────────── Thawed      │
//!     ✗ killed                                                                    │ lease goes on
//!   agent, started again ──connects to the abstract socket──────────────────────▶ │
//!     │ ◀─────────────────────────────────────── Handover · Held + descriptor · Ready
//! ```
//!
//! It is there before the first FIFREEZE, and holds every descriptor that the agent holds. It thaws when the
//! lease runs out, or when the agent dies and no other one comes to take its place. An agent that is started
//! again finds it by an abstract socket, which is named after the state directory, and goes on where its
//! predecessor was: same descriptors, same lease.
//!
//! [`state`] decides, [`process`] does, [`wire`] is what they say to each other.

mod process;
mod state;
mod wire;

use std::ffi::OsStr;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
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
/// Longest abstract name, its leading zero not counted.
const ADDRESS: usize = 107;
/// How long the other end may take to hand over or to take an order.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a former agent left.
#[derive(Debug)]
pub(crate) struct Inheritance {
    pub(crate) handover: Handover,
    pub(crate) held: Vec<(Label, OwnedFd)>,
}

/// What the watchdog told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// It thawed all, for this reason.
    Thawed(Cause),
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
    /// Absent if a former agent started it.
    child: Option<Child>,
}

impl Watchdog {
    /// Finds the one that a former agent left, or starts one.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub(crate) fn start(statedir: &Path, hooks: Hooks) -> io::Result<(Self, Option<Inheritance>)> {
        let statedir = std::path::absolute(statedir)?;
        let (link, inheritance) = match adopt(&statedir) {
            Some((socket, inheritance)) => {
                (Link { socket: Arc::new(socket), child: None }, Some(inheritance))
            }
            None => (spawn(&statedir, &hooks)?, None),
        };
        Ok((Self { statedir, hooks, link: Mutex::new(link) }, inheritance))
    }

    /// Another one, in place of one that died.
    pub(crate) fn restart(&self) -> io::Result<()> {
        let fresh = spawn(&self.statedir, &self.hooks)?;
        let mut former = std::mem::replace(&mut *self.link.lock(), fresh);
        if let Some(child) = &mut former.child {
            let _ = child.try_wait();
        }
        Ok(())
    }

    /// The socket to wait on for [`news`](Self::news).
    pub(crate) fn socket(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.link.lock().socket)
    }

    /// What it has to say; to be called when its socket is readable.
    pub(crate) fn news(&self) -> Option<News> {
        match receive_tale(&*self.socket()) {
            Ok(Packet::Message(Tale::Thawed(cause), _)) => Some(News::Thawed(cause)),
            Ok(Packet::Message(..)) => None,
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Ok(Packet::End) | Err(_) => Some(News::Dead),
        }
    }

    /// A freeze begins; `hooks` if it has hooks that will want their thaw.
    pub(crate) fn begin(&self, hooks: bool) -> io::Result<()> {
        self.send(&Order::Begin { hooks })
    }

    /// Hold this filesystem.
    pub(crate) fn hold(&self, label: Label, fd: BorrowedFd<'_>) -> io::Result<()> {
        send_order(&*self.socket(), &Order::Hold(label), Some(fd))
    }

    /// From now on filesystems may be frozen, for so long.
    pub(crate) fn arm(&self, lease: Option<Duration>) -> io::Result<()> {
        self.send(&Order::Arm { lease })
    }

    /// The lease begins anew.
    pub(crate) fn renew(&self) -> io::Result<()> {
        self.send(&Order::Renew)
    }

    /// Thaw all, until [`thawed`](Self::thawed).
    pub(crate) fn thaw(&self, cause: Cause) -> io::Result<()> {
        self.send(&Order::Thaw(cause))
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
fn spawn(statedir: &Path, hooks: &Hooks) -> io::Result<Link> {
    let (ours, theirs) = pair()?;
    let mut command = Command::new("/proc/self/exe");
    command.arg0(NAME).env_clear().current_dir("/");
    command.stdin(Stdio::from(theirs)).stdout(Stdio::null()).stderr(Stdio::null());
    // Not of the agent's group: whoever ends that group must not end this.
    command.process_group(0);
    let child = unblock_for(&mut command).spawn()?;
    sockopt::set_socket_timeout(&ours, sockopt::Timeout::Send, Some(PATIENCE))?;
    let statedir = statedir.to_string_lossy().into_owned();
    send_order(&ours, &Order::Configure { statedir, hooks: hooks.clone() }, None)?;
    Ok(Link { socket: Arc::new(ours), child: Some(child) })
}

/// The watchdog that a former agent left, and what it holds.
fn adopt(statedir: &Path) -> Option<(OwnedFd, Inheritance)> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).ok()?;
    connect(&socket, &address(statedir).ok()?).ok()?;
    if !same_user(&socket) {
        return None;
    }
    let timeouts = [sockopt::Timeout::Recv, sockopt::Timeout::Send];
    timeouts.iter().try_for_each(|id| sockopt::set_socket_timeout(&socket, *id, Some(PATIENCE))).ok()?;
    let mut handover = None;
    let mut held = Vec::new();
    loop {
        match receive_tale(&socket) {
            Ok(Packet::Message(Tale::Handover(told), _)) => handover = Some(told),
            Ok(Packet::Message(Tale::Held(label), fd)) => held.extend(fd.map(|fd| (label, fd))),
            Ok(Packet::Message(Tale::Ready, _)) => break,
            Ok(Packet::Message(Tale::Thawed(_), _)) => {}
            Ok(Packet::End) => {
                // It has another agent, which lives.
                log::warning(format_args!("Another agent uses the state directory {}", statedir.display()));
                return None;
            }
            Err(error) => {
                log::error(format_args!("Cannot take over from a former agent's watchdog: {error}"));
                return None;
            }
        }
    }
    Some((socket, Inheritance { handover: handover?, held }))
}

fn listen(statedir: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    bind(&socket, &address(statedir)?)?;
    listen_on(&socket, 1)?;
    Ok(socket)
}

/// An abstract address is in no filesystem. Of a long path the end tells more.
fn address(statedir: &Path) -> io::Result<SocketAddrUnix> {
    let prefix = format!("{NAME}:");
    let path = OsStr::as_bytes(statedir.as_os_str());
    let tail = &path[path.len().saturating_sub(ADDRESS - prefix.len())..];
    Ok(SocketAddrUnix::new_abstract_name(&[prefix.as_bytes(), tail].concat())?)
}

/// Anybody may bind or connect to an abstract address.
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
            rustix::io::ioctl_fionbio(&self.0, true).unwrap();
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
            let link = Link { socket: Arc::new(ours), child: None };
            (
                Self { statedir: PathBuf::new(), hooks: Hooks::default(), link: Mutex::new(link) },
                Orders(theirs),
            )
        }
    }
}
