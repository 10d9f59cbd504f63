//! Sockets between a guest and its host (vsock(7)).
//!
//! A vsock port has no permissions: any process of the guest reaches it too, by way of the loopback. The agent does
//! whatever it is asked to, as root, so only those who are outside are served, unless it was told to listen on the loopback.
#![expect(unsafe_code, reason = "neither std nor rustix has addresses of vsock")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, listen as start_listening, socket_with};

/// Clients that may wait for a seat.
const BACKLOG: i32 = 8;

/// Listens at a port; a `cid` of `VMADDR_CID_ANY` means every one.
pub(super) fn listen(cid: u32, port: u32) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    let address = address(cid, port);
    // SAFETY: the address is a whole structure of the size that is given, and is only read.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), SIZE) };
    if bound < 0 {
        return Err(io::Error::last_os_error());
    }
    start_listening(&socket, BACKLOG)?;
    Ok(socket)
}

/// Whether a client comes by the loopback and `listener` is not there for such clients. Of other families none does.
pub(super) fn is_local(client: impl AsFd, listener: impl AsFd) -> bool {
    let [peer, own] = [(client.as_fd().as_raw_fd(), Side::Peer), (listener.as_fd().as_raw_fd(), Side::Own)]
        .map(|(fd, side)| cid(fd, side));
    peer == Some(libc::VMADDR_CID_LOCAL) && own != Some(libc::VMADDR_CID_LOCAL)
}

#[derive(Clone, Copy)]
enum Side {
    Own,
    Peer,
}

const SIZE: libc::socklen_t = 16;
const _: () = assert!(SIZE as usize == size_of::<libc::sockaddr_vm>());

/// The CID of a socket's address; `None` if it is of another family.
fn cid(fd: RawFd, side: Side) -> Option<u32> {
    let mut address = address(0, 0);
    let mut size = SIZE;
    // SAFETY: the kernel writes at most `size` bytes, which are the structure's, and all values are valid in it.
    let result = unsafe {
        match side {
            Side::Own => libc::getsockname(fd, (&raw mut address).cast(), &raw mut size),
            Side::Peer => libc::getpeername(fd, (&raw mut address).cast(), &raw mut size),
        }
    };
    let is_vsock = address.svm_family == AddressFamily::VSOCK.as_raw();
    (result == 0 && size >= SIZE && is_vsock).then_some(address.svm_cid)
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: the structure consists of integers.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = AddressFamily::VSOCK.as_raw();
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

#[cfg(test)]
mod tests {
    use rustix::net::accept;

    use super::*;

    /// Connects by the loopback, if this kernel has one.
    fn connect(port: u32) -> io::Result<OwnedFd> {
        let socket = socket_with(AddressFamily::VSOCK, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        let address = address(libc::VMADDR_CID_LOCAL, port);
        // SAFETY: the address is a whole structure of the size that is given, and is only read.
        let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), SIZE) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
    }

    #[test]
    fn a_client_on_the_loopback_is_known_and_welcome_only_there() {
        // Ports from 1024 on are for everybody; the process id keeps concurrent runs apart.
        let port = 1024 + std::process::id() % 60_000 * 2;
        let Ok(everywhere) = listen(libc::VMADDR_CID_ANY, port) else { return };
        let Ok(_client) = connect(port) else {
            eprintln!("skipped: this kernel has no vsock loopback (module vsock_loopback)");
            return;
        };
        assert!(is_local(accept(&everywhere).unwrap(), &everywhere));
        let loopback = listen(libc::VMADDR_CID_LOCAL, port + 1).unwrap();
        let _client = connect(port + 1).unwrap();
        assert!(!is_local(accept(&loopback).unwrap(), &loopback));
    }

    #[test]
    fn other_sockets_have_no_cid() {
        let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(cid(one.as_raw_fd(), Side::Peer), None);
        assert!(!is_local(one, other));
    }
}
