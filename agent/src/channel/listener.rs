//! A socket that clients connect to.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{SocketFlags, acceptfrom_with};

use super::connection::{Connection, Kind};
use super::vsock;
use crate::poller::{Poller, Token};

#[derive(Debug)]
pub(super) struct Listener {
    socket: OwnedFd,
}

impl Listener {
    /// Listens at `path`, in place of a socket that a former agent left there. Only the agent's own
    /// user may connect: whoever may, may run anything.
    pub(super) fn unix(path: &Path) -> io::Result<Self> {
        let at_path = |error: io::Error| {
            io::Error::new(error.kind(), format!("Cannot listen at {}: {error}", path.display()))
        };
        if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) {
            fs::remove_file(path).map_err(at_path)?;
        }
        let former = rustix::process::umask(Mode::RWXG | Mode::RWXO);
        let bound = UnixListener::bind(path);
        rustix::process::umask(former);
        let socket = bound.map_err(at_path)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket: socket.into() })
    }

    /// Listens at a vsock port.
    pub(super) fn vsock(cid: u32, port: u32) -> io::Result<Self> {
        let socket = vsock::listen(cid, port).map_err(|error| {
            io::Error::new(error.kind(), format!("Cannot listen at vsock {cid}:{port}: {error}"))
        })?;
        Ok(Self { socket })
    }

    /// Takes clients from a socket that listens already and is non-blocking.
    pub(super) fn inherited(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Has the poller tell when clients come.
    pub(super) fn register(&self, poller: &Poller) -> io::Result<()> {
        poller.add_edges(&self.socket, Token::Waiting)
    }

    /// The next client, if one waits. Asked again after each client, so no edge is missed.
    pub(super) fn try_accept(&mut self) -> Option<Connection> {
        loop {
            match acceptfrom_with(&self.socket, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok((client, _)) if vsock::is_local(&client, &self.socket) => {
                    crate::log::warning(format_args!(
                        "A process of the guest was refused: only the host is served"
                    ));
                }
                Ok((client, _)) => return Some(Connection::new(client, Kind::Socket)),
                Err(Errno::WOULDBLOCK) => return None,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    crate::log::error(format_args!("Cannot accept a client: {error}"));
                    return None;
                }
            }
        }
    }
}
