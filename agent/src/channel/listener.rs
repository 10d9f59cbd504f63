//! A unix socket with one client at a time.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::Mode;

use super::connection::{Connection, Kind};
use crate::poller::{Poller, Token};

#[derive(Debug)]
pub(super) struct Listener {
    socket: UnixListener,
}

impl Listener {
    /// Listens at `path`, in place of a socket that a former agent left there. Only the agent's own
    /// user may connect: whoever may, may run anything.
    pub(super) fn bind(path: &Path, poller: &Poller) -> io::Result<Self> {
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
        poller.add_edges(&socket, Token::Waiting)?;
        Ok(Self { socket })
    }

    /// The next client, if one waits. Asked again after each client, so no edge is missed.
    pub(super) fn try_accept(&mut self) -> Option<Connection> {
        loop {
            match self.socket.accept() {
                Ok((stream, _)) => match stream.set_nonblocking(true) {
                    Ok(()) => return Some(Connection::new(stream.into(), Kind::Socket)),
                    Err(error) => crate::log::error(format_args!("Cannot serve a client: {error}")),
                },
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    crate::log::error(format_args!("Cannot accept a client: {error}"));
                    return None;
                }
            }
        }
    }
}
