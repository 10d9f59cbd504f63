//! Unix stream sockets for a single-threaded loop: nothing here ever waits.
//!
//! A [`Listener`] makes [`Connection`]s. A connection receives bytes and file descriptors, and owns
//! the output that its peer has not taken yet. Whoever holds it bounds that output: [`Connection::queued`]
//! says how much there is, [`Connection::drop_expendable`] gives up what the peer can do without.
//!
//! ```text
//!   send() ─▶ [ started │ message │ message … ] ─▶ flush(), as far as the socket takes it
//!                          └── expendable ones may be dropped before they are begun
//! ```
#![expect(unsafe_code, reason = "socket modes before bind, and SCM_RIGHTS, have no safe interface here")]

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::event_loop::{Interest, Token, Watch};

/// Longest path of a unix socket in bytes (`sun_path` less its NUL, unix(7)).
pub const PATH_MAX: usize = 107;

/// Descriptors taken from one message; the kernel drops what is beyond.
pub const FDS_PER_MESSAGE: usize = 16;

/// Between messages about clients for whom there is no room.
const TELL_INTERVAL: Duration = Duration::from_secs(10);

/// Connections that may wait to be accepted.
const BACKLOG: libc::c_int = 128;

/// Why a socket cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path does not fit into a socket address.
    #[error("Socket path {path:?} is {length} bytes long; a unix socket allows at most {PATH_MAX}")]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        length: usize,
    },
    /// The path is empty or contains a NUL byte.
    #[error("Socket path {path:?} is not a usable file name")]
    PathUnusable {
        /// The path.
        path: PathBuf,
    },
    /// Something that is not a socket is in the way; it is left alone.
    #[error("Cannot listen on {path:?}: there is a file of another kind")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Another process listens there.
    #[error("Cannot listen on {path:?}: somebody else does")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("Cannot listen on {path:?}")]
    Listen {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A listening socket that removes its file when it is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Given up for a moment when descriptors run out, so that the waiting client can be turned away
    /// instead of waking the loop for ever.
    spare: Option<File>,
    /// Clients turned away since that was last said, and when it was.
    turned_away: u64,
    told: Option<Instant>,
}

impl Listener {
    /// Listens on `path`, with access for the owner alone (mode 0600) from the first moment on.
    ///
    /// A socket that is there already is replaced: the caller holds the lock that proves its owner dead.
    ///
    /// # Errors
    ///
    /// The path is too long or unusable, is something else than a socket, or cannot be created.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let address = address(path)?;
        let failed = |source| SocketError::Listen { path: path.into(), source };
        remove_stale(path)?;
        let socket = listen(&address).map_err(failed)?;
        let spare = File::open("/dev/null").ok();
        Ok(Self { socket: UnixListener::from(socket), path: path.into(), spare, turned_away: 0, told: None })
    }

    /// [`bind`](Self::bind) where no lock proves anything: a socket that somebody listens on is left alone.
    ///
    /// # Errors
    ///
    /// The same, and that.
    pub fn bind_unowned(path: &Path) -> Result<Self, SocketError> {
        if is_alive(path) {
            return Err(SocketError::InUse { path: path.into() });
        }
        Self::bind(path)
    }

    /// The next client that waits, if any. Ask until there is none.
    pub fn accept(&mut self) -> Option<Connection> {
        loop {
            let error = match self.socket.accept() {
                Ok((stream, _)) => match Connection::new(stream) {
                    Ok(connection) => return Some(connection),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            match error.raw_os_error() {
                Some(libc::EAGAIN) => return None,
                Some(libc::EMFILE | libc::ENFILE) if self.spare.take().is_some() => {
                    tracing::warn!(path = ?self.path, "Out of file descriptors, turning a client away");
                    drop(self.socket.accept());
                    self.spare = File::open("/dev/null").ok();
                }
                Some(libc::EINTR | libc::ECONNABORTED) => {}
                _ => {
                    tracing::warn!(path = ?self.path, "Cannot accept a client: {error}");
                    return None;
                }
            }
        }
    }

    /// Closes a connection that there is no room for. How often clients come is up to them: the log hears of it now and
    /// then.
    pub fn turn_away(&mut self, client: Connection, limit: usize) {
        drop(client);
        self.turned_away += 1;
        if self.told.is_none_or(|told| told.elapsed() >= TELL_INTERVAL) {
            tracing::warn!(path = ?self.path, "Turned clients away ({}): {limit} are connected", self.turned_away);
            self.turned_away = 0;
            self.told = Some(Instant::now());
        }
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Nothing to do about a failure: a stale socket is replaced by the next owner.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn address(path: &Path) -> Result<libc::sockaddr_un, SocketError> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.contains(&0) {
        return Err(SocketError::PathUnusable { path: path.into() });
    }
    if bytes.len() > PATH_MAX {
        return Err(SocketError::PathTooLong { path: path.into(), length: bytes.len() });
    }
    let mut address = libc::sockaddr_un { sun_family: FAMILY, sun_path: [0; PATH_MAX + 1] };
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    Ok(address)
}

/// Whether a process has the socket at `path`. It does not notice: a connection between sockets of different types fails
/// in the kernel, but in another way than one to a socket that nobody has (net/unix/af_unix.c, `unix_find_bsd`).
fn is_alive(path: &Path) -> bool {
    let connected = UnixDatagram::unbound().and_then(|probe| probe.connect(path));
    match connected.map_err(|error| error.raw_os_error()) {
        Err(Some(libc::ECONNREFUSED | libc::ENOENT | libc::ENOTDIR)) => false,
        Err(Some(libc::EPROTOTYPE | libc::EACCES)) | Ok(()) => true,
        // What this is, binding will tell.
        Err(_) => false,
    }
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    use std::os::unix::fs::FileTypeExt;
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {
            std::fs::remove_file(path).map_err(|source| SocketError::Listen { path: path.into(), source })
        }
        Ok(_) => Err(SocketError::NotASocket { path: path.into() }),
        Err(_) => Ok(()),
    }
}

fn listen(address: &libc::sockaddr_un) -> io::Result<OwnedFd> {
    // SAFETY: No pointers; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_UNIX, SOCKET_TYPE, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: The descriptor was just made and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // The socket file inherits this mode (net/unix/af_unix.c, unix_bind_bsd), so there is no moment
    // in which others could connect.
    // SAFETY: The descriptor is open; no pointers.
    check(unsafe { libc::fchmod(fd, 0o600) })?;
    // SAFETY: `address` is a valid sockaddr_un of the length given, NUL-terminated by construction.
    check(unsafe { libc::bind(fd, (&raw const *address).cast(), ADDRESS_LENGTH) })?;
    // SAFETY: The descriptor is open; no pointers.
    check(unsafe { libc::listen(fd, BACKLOG) })?;
    Ok(socket)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What [`Connection::receive`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// This many bytes.
    Data(usize),
    /// Nothing for now.
    Nothing,
    /// The peer will send no more. It may still read.
    End,
    /// The connection is broken.
    Broken,
}

/// A message on its way out.
#[derive(Debug)]
struct Message {
    bytes: Vec<u8>,
    expendable: bool,
}

/// A connected client.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// What the client has not taken yet, and how much of the first message it has.
    output: VecDeque<Message>,
    begun: usize,
    queued: usize,
    /// A write failed: the peer is gone.
    broken: bool,
    /// What the loop was last told.
    watched: Option<Interest>,
}

impl Connection {
    /// Takes over a connected stream.
    ///
    /// # Errors
    ///
    /// The stream cannot be made non-blocking.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let output = VecDeque::new();
        Ok(Self { stream, output, begun: 0, queued: 0, broken: false, watched: None })
    }

    /// Receives bytes, and appends descriptors that came with them (close-on-exec) to `fds`.
    pub fn receive(&mut self, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> Received {
        loop {
            return match receive_message(self.stream.as_raw_fd(), buffer, fds) {
                Ok(0) => Received::End,
                Ok(length) => Received::Data(length),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => continue,
                    io::ErrorKind::WouldBlock => Received::Nothing,
                    _ => Received::Broken,
                },
            };
        }
    }

    /// Receives bytes; descriptors that came with them are closed.
    pub fn receive_bytes(&mut self, buffer: &mut [u8]) -> Received {
        loop {
            return match self.stream.read(buffer) {
                Ok(0) => Received::End,
                Ok(length) => Received::Data(length),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => continue,
                    io::ErrorKind::WouldBlock => Received::Nothing,
                    _ => Received::Broken,
                },
            };
        }
    }

    /// Queues a message that the client must get.
    pub fn send(&mut self, bytes: Vec<u8>) {
        self.push(bytes, false);
    }

    /// Queues a message that may be dropped while it has not been begun.
    pub fn send_expendable(&mut self, bytes: Vec<u8>) {
        self.push(bytes, true);
    }

    fn push(&mut self, bytes: Vec<u8>, expendable: bool) {
        if !bytes.is_empty() && !self.broken {
            self.queued += bytes.len();
            self.output.push_back(Message { bytes, expendable });
        }
    }

    /// Drops expendable messages that have not been begun.
    pub fn drop_expendable(&mut self) {
        let mut untouchable = self.begun > 0;
        let queued = &mut self.queued;
        self.output.retain(|message| {
            let keep = mem::take(&mut untouchable) || !message.expendable;
            if !keep {
                *queued -= message.bytes.len();
            }
            keep
        });
    }

    /// Writes as much as the socket takes. Returns how many bytes that was.
    pub fn flush(&mut self) -> usize {
        let mut written = 0;
        while let Some(message) = self.output.front() {
            match self.stream.write(&message.bytes[self.begun..]) {
                Ok(length) => {
                    written += length;
                    self.queued -= length;
                    self.begun += length;
                    if self.begun == message.bytes.len() {
                        self.output.pop_front();
                        self.begun = 0;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.broken = true;
                    self.output.clear();
                    (self.begun, self.queued) = (0, 0);
                }
            }
        }
        written
    }

    /// Writes all there is, waiting for the client until `deadline`: for the end, when no loop runs any more.
    pub fn flush_until(&mut self, deadline: Instant) {
        loop {
            self.flush();
            let left = deadline.saturating_duration_since(Instant::now());
            if self.queued == 0 || self.broken || left.is_zero() {
                return;
            }
            let mut poll = libc::pollfd { fd: self.stream.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
            let timeout = libc::c_int::try_from(left.as_millis()).unwrap_or(libc::c_int::MAX).max(1);
            // SAFETY: One valid pollfd.
            unsafe { libc::poll(&raw mut poll, 1, timeout) };
        }
    }

    /// Tells the loop to forget it; it stays open.
    pub fn stop_watching(&mut self, watch: &mut dyn Watch) {
        if self.watched.take().is_some() {
            watch.remove(self.stream.as_raw_fd());
        }
    }

    /// Bytes the client has not taken yet.
    pub fn queued(&self) -> usize {
        self.queued
    }

    /// Whether a write failed: the client is gone, and output is discarded.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether the peer has closed both directions. What it sent before may still be there to read.
    pub fn is_hung_up(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.stream.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: One valid pollfd; a timeout of 0 never waits.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
        ready > 0 && poll.revents & (libc::POLLHUP | libc::POLLERR) != 0
    }

    /// Tells the loop what to wait for, if that has changed.
    pub fn watch(&mut self, token: Token, interest: Interest, watch: &mut dyn Watch) {
        if self.watched != Some(interest) {
            watch.set(self.stream.as_raw_fd(), token, interest);
            self.watched = Some(interest);
        }
    }

    /// Tells the loop to forget it, and closes it.
    pub fn close(self, watch: &mut dyn Watch) {
        if self.watched.is_some() {
            watch.remove(self.stream.as_raw_fd());
        }
    }
}

/// `recvmsg` with room for [`FDS_PER_MESSAGE`] descriptors.
fn receive_message(fd: RawFd, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut control = Control { bytes: [0; CONTROL_LENGTH], _align: [] };
    let mut io = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: All-zero is a valid msghdr: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut io;
    message.msg_iovlen = 1;
    message.msg_control = control.bytes.as_mut_ptr().cast();
    message.msg_controllen = CONTROL_LENGTH;
    // SAFETY: `message` points at `io`, `buffer` and `control`, all alive and of the lengths given.
    let length = unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: The kernel filled `message`; `control` is aligned for cmsghdr and still alive.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: The CMSG macros yield null or a header inside `control`.
    while let Some(found) = unsafe { header.as_ref() } {
        if (found.cmsg_level, found.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: `header` is inside `control`; its data follows it.
            let data: *const RawFd = unsafe { libc::CMSG_DATA(header) }.cast();
            // SAFETY: Pure arithmetic.
            let overhead = unsafe { libc::CMSG_LEN(0) } as usize;
            for index in 0..found.cmsg_len.saturating_sub(overhead) / mem::size_of::<RawFd>() {
                // SAFETY: The kernel wrote `cmsg_len` bytes, so descriptor `index` is inside; each is
                // new in this process and owned by nobody else. The data may be unaligned.
                fds.push(unsafe { OwnedFd::from_raw_fd(data.add(index).read_unaligned()) });
            }
        }
        // SAFETY: `header` is a header inside `message`'s control data.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Ok(length)
}

/// Room for control data, aligned for its headers.
#[repr(C)]
struct Control {
    _align: [libc::cmsghdr; 0],
    bytes: [u8; CONTROL_LENGTH],
}

#[expect(clippy::cast_possible_truncation, reason = "64 bytes")]
// SAFETY: Pure arithmetic.
const CONTROL_LENGTH: usize =
    unsafe { libc::CMSG_SPACE((FDS_PER_MESSAGE * mem::size_of::<RawFd>()) as u32) } as usize;
#[expect(clippy::cast_possible_truncation, reason = "1 and 110")]
const FAMILY: libc::sa_family_t = libc::AF_UNIX as libc::sa_family_t;
#[expect(clippy::cast_possible_truncation, reason = "1 and 110")]
const ADDRESS_LENGTH: libc::socklen_t = mem::size_of::<libc::sockaddr_un>() as libc::socklen_t;
const SOCKET_TYPE: libc::c_int = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    use super::*;

    fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Connection::new(ours).unwrap(), theirs)
    }

    #[test]
    fn a_socket_is_for_its_owner_alone_and_vanishes_with_the_listener() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let mut listener = Listener::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(listener.accept().is_none());
        let _client = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().is_some());
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_any_other_file_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        Listener::bind_unowned(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        for bind in [Listener::bind, Listener::bind_unowned] {
            let error = bind(&path).unwrap_err();
            assert!(matches!(error, SocketError::NotASocket { .. }), "{error}");
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_socket_that_somebody_listens_on_is_not_taken_away_and_sees_no_client() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let mut listener = Listener::bind_unowned(&path).unwrap();
        let error = Listener::bind_unowned(&path).unwrap_err();
        assert!(matches!(error, SocketError::InUse { .. }), "{error}");
        assert!(listener.accept().is_none());
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn the_longest_path_works_and_one_byte_more_is_named_in_the_error() {
        let directory = tempfile::tempdir().unwrap();
        let room = PATH_MAX - directory.path().as_os_str().len() - 1;
        let longest = directory.path().join("s".repeat(room));
        let listener = Listener::bind(&longest).unwrap();
        UnixStream::connect(listener.path()).unwrap();
        let error = Listener::bind(&directory.path().join("s".repeat(room + 1))).unwrap_err();
        assert!(error.to_string().contains("is 108 bytes long"), "{error}");
        let missing = Listener::bind(&directory.path().join("no/s")).unwrap_err();
        assert!(matches!(missing, SocketError::Listen { .. }), "{missing}");
    }

    #[test]
    fn descriptors_arrive_with_their_bytes_and_are_close_on_exec() {
        let (mut ours, theirs) = pair();
        let file = tempfile::tempfile().unwrap();
        theirs.send_with_fds(&[b"x".as_ref()], &[file.as_raw_fd(), file.as_raw_fd()]).unwrap();
        let (mut buffer, mut fds) = ([0; 16], Vec::new());
        assert_eq!(ours.receive(&mut buffer, &mut fds), Received::Data(1));
        assert_eq!(fds.len(), 2);
        for fd in &fds {
            let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
            assert_ne!(i32::from_str_radix(flags.trim(), 8).unwrap() & libc::O_CLOEXEC, 0);
        }
        assert_eq!(ours.receive(&mut buffer, &mut fds), Received::Nothing);
        drop(theirs);
        assert_eq!(ours.receive(&mut buffer, &mut fds), Received::End);
    }

    #[test]
    fn more_descriptors_than_there_is_room_for_are_not_leaked() {
        let (mut ours, theirs) = pair();
        let (reader, writer) = std::io::pipe().unwrap();
        let many = vec![writer.as_raw_fd(); FDS_PER_MESSAGE + 3];
        theirs.send_with_fds(&[b"x".as_ref()], &many).unwrap();
        let mut fds = Vec::new();
        assert_eq!(ours.receive(&mut [0; 16], &mut fds), Received::Data(1));
        assert!(fds.len() <= FDS_PER_MESSAGE + 1);
        drop((fds, writer));
        // The end of the pipe shows that nobody holds its writing side any more.
        assert_eq!((&reader).read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn output_the_peer_does_not_take_stays_queued_in_order() {
        let (mut ours, mut theirs) = pair();
        let block = vec![7; 100_000];
        for _ in 0..20 {
            ours.send(block.clone());
        }
        ours.flush();
        assert!(ours.queued() > 0 && ours.queued() < 2_000_000);
        ours.send(b"end".to_vec());
        let mut received = Vec::new();
        while ours.queued() > 0 {
            let mut buffer = [0; 65536];
            let length = theirs.read(&mut buffer).unwrap();
            received.extend_from_slice(&buffer[..length]);
            ours.flush();
        }
        drop(ours);
        theirs.read_to_end(&mut received).unwrap();
        assert_eq!(received.len(), 2_000_003);
        assert!(received.ends_with(b"\x07end"));
    }

    #[test]
    fn expendable_messages_go_unless_they_have_been_begun() {
        let (mut ours, mut theirs) = pair();
        ours.send_expendable(vec![b'a'; 1_000_000]);
        ours.flush();
        ours.send_expendable(b"dropped".to_vec());
        ours.send(b"kept".to_vec());
        ours.drop_expendable();
        let mut received = Vec::new();
        while ours.queued() > 0 {
            let mut buffer = [0; 65536];
            let length = theirs.read(&mut buffer).unwrap();
            received.extend_from_slice(&buffer[..length]);
            ours.flush();
        }
        drop(ours);
        theirs.read_to_end(&mut received).unwrap();
        assert_eq!(received.len(), 1_000_004);
        assert!(received.ends_with(b"akept"));
    }

    #[test]
    fn a_peer_that_left_breaks_the_connection_and_takes_the_output_along() {
        let (mut ours, theirs) = pair();
        drop(theirs);
        ours.send(b"anyone?".to_vec());
        ours.flush();
        assert!(ours.is_broken());
        assert_eq!(ours.queued(), 0);
    }

    #[derive(Default)]
    struct Recorder(Vec<Option<Interest>>);

    impl Watch for Recorder {
        fn set(&mut self, _: RawFd, _: Token, interest: Interest) {
            self.0.push(Some(interest));
        }
        fn remove(&mut self, _: RawFd) {
            self.0.push(None);
        }
    }

    #[test]
    fn the_loop_hears_of_changes_only() {
        let (mut ours, _theirs) = pair();
        let mut recorder = Recorder::default();
        ours.watch(Token::Stdin, Interest::READ, &mut recorder);
        ours.watch(Token::Stdin, Interest::READ, &mut recorder);
        ours.watch(Token::Stdin, Interest::WRITE, &mut recorder);
        ours.close(&mut recorder);
        assert_eq!(recorder.0, [Some(Interest::READ), Some(Interest::WRITE), None]);
    }
}
