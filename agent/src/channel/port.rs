//! A virtio-serial port or a serial line, which may be absent, or in use by somebody else, for a while or for ever.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{Mode, OFlags};
use rustix::termios::{
    ControlModes, InputModes, OptionalActions, QueueSelector, tcflush, tcgetattr, tcsetattr,
};

use super::connection::{Connection, Kind};
use crate::poller::{Poller, Token};

/// First and longest pause between two attempts to open a port that is there and refuses.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LONGEST: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Port {
    // Fixed configuration.
    path: PathBuf,
    kind: Kind,
    // Volatile state.
    /// Tells when the node appears or its other user closes it; absent while the port is open.
    watch: Option<OwnedFd>,
    retry: Option<Retry>,
    /// The last complaint, so that each is logged once.
    reported: Option<ErrorKind>,
}

#[derive(Clone, Copy, Debug)]
struct Retry {
    pause: Duration,
    at: Instant,
}

impl Port {
    /// A port, or a line, by its `kind`.
    pub(super) fn new(path: &Path, kind: Kind) -> Self {
        Self { path: path.to_owned(), kind, watch: None, retry: None, reported: None }
    }

    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.retry.map(|retry| retry.at)
    }

    /// Opens the port, or sees to it that the poller, or the clock, brings the next attempt.
    pub(super) fn try_open(&mut self, poller: &Poller) -> Option<Connection> {
        // The watch comes first: what happens between the two is then an event.
        self.watch = None;
        let is_watched = self.watch(poller).is_ok();
        match self.open() {
            Ok(fd) => {
                crate::log::debug(format_args!("Serving {}", self.path.display()));
                let Self { path: _, kind, watch, retry, reported } = self;
                (*watch, *retry, *reported) = (None, None, None);
                Some(Connection::new(fd, *kind))
            }
            Err(error) => {
                self.wait_for_another_attempt(&error, is_watched);
                None
            }
        }
    }

    fn open(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&self.path, flags, Mode::empty())?;
        if self.kind == Kind::Line {
            set_up_line(&fd)?;
        }
        Ok(fd)
    }

    /// The open port failed. Another one may come in its place, but not at once: a port that opens and
    /// fails for ever must not keep the agent busy.
    pub(super) fn lost(&mut self, poller: &Poller) {
        if let Err(error) = self.watch(poller) {
            crate::log::debug(format_args!("Cannot watch for {}: {error}", self.path.display()));
        }
        self.retry = Some(Retry { pause: RETRY_FIRST, at: Instant::now() + RETRY_FIRST });
    }

    fn wait_for_another_attempt(&mut self, error: &io::Error, is_watched: bool) {
        if self.reported != Some(error.kind()) {
            // The driver lets one process have a port and refuses the next one.
            let why = match error.raw_os_error() {
                Some(libc::EBUSY | libc::EMFILE) => "another process has it".to_owned(),
                _ => error.to_string(),
            };
            crate::log::warning(format_args!("Waiting for {}: {why}", self.path.display()));
            self.reported = Some(error.kind());
        }
        // An absent node announces itself. Anything else may end without a sign.
        if error.kind() == ErrorKind::NotFound && is_watched {
            self.retry = None;
            return;
        }
        let pause = self.retry.map_or(RETRY_FIRST, |retry| (retry.pause * 2).min(RETRY_LONGEST));
        self.retry = Some(Retry { pause, at: Instant::now() + pause });
    }

    /// Watches the node for being closed, and the nearest directory there is for new entries.
    fn watch(&mut self, poller: &Poller) -> io::Result<()> {
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let closed = WatchFlags::CLOSE_WRITE | WatchFlags::CLOSE_NOWRITE | WatchFlags::ATTRIB;
        // Not there yet, most of the time.
        let _ = inotify::add_watch(&watch, &self.path, closed);
        let created = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
        let here = Path::new(".");
        let directories = self.path.ancestors().skip(1);
        let mut directories = directories.map(|path| if path == Path::new("") { here } else { path });
        let nearest = directories.find(|&path| inotify::add_watch(&watch, path, created).is_ok());
        nearest.ok_or_else(|| io::Error::from(ErrorKind::NotFound))?;
        poller.add_readable(&watch, Token::Waiting)?;
        self.watch = Some(watch);
        Ok(())
    }
}

/// Bytes as they are at the reference's 38400 baud, whatever the modem lines say; what came before is for nobody.
fn set_up_line(fd: &OwnedFd) -> io::Result<()> {
    const BAUD: u32 = 38_400;
    let mut modes = tcgetattr(fd)?;
    modes.make_raw();
    modes.input_modes = InputModes::empty();
    modes.control_modes = ControlModes::CS8 | ControlModes::CREAD | ControlModes::CLOCAL;
    modes.set_speed(BAUD)?;
    tcsetattr(fd, OptionalActions::Now, &modes)?;
    Ok(tcflush(fd, QueueSelector::IFlush)?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// Waits until the poller brings the event that makes another attempt worthwhile.
    fn open_on_event(port: &mut Port, poller: &Poller) -> Option<Connection> {
        let events = poller.wait(Some(Duration::from_secs(20))).unwrap();
        assert!(events.iter().any(|(token, _)| *token == Token::Waiting), "nothing happened");
        port.try_open(poller)
    }

    #[test]
    fn a_port_that_appears_later_is_opened_without_polling() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("virtio-ports");
        let poller = Poller::new().unwrap();
        let mut port = Port::new(&directory.join("agent"), Kind::Port);
        assert!(port.try_open(&poller).is_none());
        assert_eq!(port.retry_at(), None, "no timer while the node is absent");
        fs::create_dir(&directory).unwrap();
        assert!(open_on_event(&mut port, &poller).is_none());
        fs::write(root.path().join("vport0p1"), "").unwrap();
        symlink("../vport0p1", directory.join("agent")).unwrap();
        let mut opened = open_on_event(&mut port, &poller);
        while opened.is_none() {
            opened = open_on_event(&mut port, &poller);
        }
        assert!(port.watch.is_none());
    }

    #[test]
    fn a_port_that_refuses_is_tried_again_with_growing_pauses() {
        let root = tempfile::tempdir().unwrap();
        let poller = Poller::new().unwrap();
        // A directory cannot be opened for writing, whoever asks.
        let mut port = Port::new(root.path(), Kind::Port);
        let mut pauses = Vec::new();
        for _ in 0..8 {
            assert!(port.try_open(&poller).is_none());
            pauses.push(port.retry.unwrap().pause);
        }
        assert_eq!(pauses[0], RETRY_FIRST);
        assert_eq!(pauses[1], 2 * RETRY_FIRST);
        assert_eq!(*pauses.last().unwrap(), RETRY_LONGEST);
    }
}
