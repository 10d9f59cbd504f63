//! The kernel's announcements of devices (Linux `lib/kobject_uevent.c`).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::netlink::{KOBJECT_UEVENT, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};

/// One announcement.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Uevent {
    pub(super) subsystem: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct Uevents {
    socket: OwnedFd,
}

/// The kernel's own multicast group; the other one is udev's.
const KERNEL_GROUP: u32 = 1;
/// The kernel's messages are at most 2 KiB (`UEVENT_BUFFER_SIZE`) and a header.
const LONGEST: usize = 8 << 10;

impl Uevents {
    pub(super) fn listen() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(KOBJECT_UEVENT))?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, KERNEL_GROUP))?;
        Ok(Self { socket })
    }

    /// The next announcement, if there is one.
    pub(super) fn next(&mut self) -> Option<Uevent> {
        let mut buffer = [0; LONGEST];
        loop {
            match rustix::net::recv(&self.socket, &mut buffer, RecvFlags::empty()) {
                Ok((count, _)) => {
                    if let Some(event) = Uevent::parse(&buffer[..count.min(LONGEST)]) {
                        return Some(event);
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                // More were sent than the socket holds: of each kind there may have been one.
                Err(rustix::io::Errno::NOBUFS) => {}
                Err(_) => return None,
            }
        }
    }

    /// Waits for announcements and takes them all; false if the time is up.
    pub(super) fn wait_until(&mut self, deadline: Instant) -> bool {
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return false;
        }
        let limit = super::timespec(rest);
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        match poll(&mut fds, Some(&limit)) {
            Ok(0) => return false,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
        while self.next().is_some() {}
        true
    }
}

impl AsFd for Uevents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Uevent {
    /// `ACTION@DEVPATH`, then `KEY=VALUE` each after a NUL.
    fn parse(message: &[u8]) -> Option<Self> {
        let mut fields = message.split(|&byte| byte == 0);
        let header = fields.next()?;
        if !header.contains(&b'@') {
            return None;
        }
        let subsystem = fields.find_map(|field| field.strip_prefix(b"SUBSYSTEM="))?;
        Some(Self { subsystem: subsystem.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_subsystem_is_found_among_the_keys() {
        let message = b"add@/devices/x\0ACTION=add\0SUBSYSTEM=virtio-ports\0SEQNUM=7\0";
        assert_eq!(Uevent::parse(message), Some(Uevent { subsystem: b"virtio-ports".to_vec() }));
        assert_eq!(Uevent::parse(b"libudev\0SUBSYSTEM=input\0"), None);
        assert_eq!(Uevent::parse(b"add@/x\0"), None);
        assert_eq!(Uevent::parse(b""), None);
    }
}
