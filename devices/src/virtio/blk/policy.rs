//! What happens when the host cannot carry out a request.
//!
//! | policy | the guest sees | the disk |
//! |---|---|---|
//! | report | an I/O error | goes on |
//! | ignore | success; a read gives zeroes | goes on |
//! | stop | nothing, the request is held | takes no requests until it is resumed |
//! | enospc | as *stop* when there is no room left, else as *report* | |
//!
//! The names, the defaults and the event are QEMU's (`rerror`, `werror`, BLOCK_IO_ERROR).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use block::{Errno, MirrorAction};

/// What to do about errors of the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorPolicy {
    /// Tell the guest.
    Report,
    /// Pretend that nothing happened.
    Ignore,
    /// Hold the request and stop.
    Stop,
    /// Stop when there is no room left, report everything else.
    Enospc,
}

impl ErrorPolicy {
    /// What this policy means for `errno`.
    pub fn action(self, errno: Errno) -> ErrorAction {
        match self {
            Self::Report => ErrorAction::Report,
            Self::Ignore => ErrorAction::Ignore,
            Self::Stop => ErrorAction::Stop,
            Self::Enospc if errno.is_no_space() => ErrorAction::Stop,
            Self::Enospc => ErrorAction::Report,
        }
    }
}

/// What was done about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorAction {
    /// The guest was told.
    Report,
    /// The guest was told that all is well.
    Ignore,
    /// The request is held; the VM should stop.
    Stop,
}

/// What could not be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskOperation {
    /// A read.
    Read,
    /// A write, or writing zeroes.
    Write,
    /// A flush.
    Flush,
    /// A discard.
    Discard,
}

/// Something the owner of the VM should know about a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskEvent {
    /// A request failed on the host.
    IoError {
        /// The disk, as named in [`super::BlkOptions`].
        disk: Arc<str>,
        /// What could not be done.
        operation: DiskOperation,
        /// What was done about it.
        action: ErrorAction,
        /// There is no room left.
        nospace: bool,
        /// Why.
        errno: Errno,
        /// First sector of the request; 0 for flushes.
        sector: u64,
    },
    /// Something about the disk's mirror.
    Mirror {
        /// The disk.
        disk: Arc<str>,
        /// What.
        report: MirrorReport,
    },
}

/// What a mirror has to say to who ordered it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MirrorReport {
    /// For the first time the target is equal to the source, and durable.
    Ready,
    /// Something failed.
    Error {
        /// A read of the source, or else something about the target.
        is_read: bool,
        /// What was done about it.
        action: MirrorAction,
        /// There is no room left.
        nospace: bool,
    },
    /// It has failed for good, for this reason; it is to be detached.
    Failed(String),
    /// The guest is held, the images are equal, the target is durable.
    Quiesced,
    /// The target is the disk, and the guest goes on.
    Switched,
    /// There is no mirror any more, and the guest goes on.
    Detached,
}

/// Where events go. A guest can make any number of requests fail, so events are rationed, except those
/// that say that the disk has stopped: on them the VM's state depends, and each costs a resume.
pub(super) struct EventSink {
    send: Box<dyn Fn(DiskEvent) + Send>,
    /// Set before an event says so: whoever hears of it finds it true, unless the disk goes on already.
    stopped: Arc<AtomicBool>,
    left: u32,
    since: Instant,
    dropped: u64,
}

/// Events in one [`PERIOD`].
const RATION: u32 = 10;
const PERIOD: Duration = Duration::from_secs(1);

impl EventSink {
    pub(super) fn new(send: Box<dyn Fn(DiskEvent) + Send>, stopped: Arc<AtomicBool>) -> Self {
        Self { send, stopped, left: RATION, since: Instant::now(), dropped: 0 }
    }

    pub(super) fn send(&mut self, event: DiskEvent) {
        let (stops, counts) = match &event {
            DiskEvent::IoError { action, .. } => (*action == ErrorAction::Stop, *action != ErrorAction::Stop),
            // There are few, and each matters, but for errors that are ignored again and again.
            DiskEvent::Mirror { report: MirrorReport::Error { action, .. }, .. } => {
                (false, *action == MirrorAction::Ignore)
            }
            DiskEvent::Mirror { .. } => (false, false),
        };
        if stops {
            self.stopped.store(true, Ordering::Release);
        }
        if !counts || self.take(Instant::now()) {
            (self.send)(event);
        } else {
            self.dropped += 1;
            if self.dropped.is_power_of_two() {
                tracing::warn!(dropped = self.dropped, ?event, "Too many disk errors for an event each");
            }
        }
    }

    fn take(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.since) >= PERIOD {
            (self.since, self.left) = (now, RATION);
        }
        self.left.checked_sub(1).map(|left| self.left = left).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_decides_by_the_kind_of_error() {
        let (full, broken) = (Errno::new(libc::ENOSPC), Errno::new(libc::EIO));
        let actions = |policy: ErrorPolicy| (policy.action(full), policy.action(broken));
        use ErrorAction::{Ignore, Report, Stop};
        assert_eq!(actions(ErrorPolicy::Report), (Report, Report));
        assert_eq!(actions(ErrorPolicy::Ignore), (Ignore, Ignore));
        assert_eq!(actions(ErrorPolicy::Stop), (Stop, Stop));
        assert_eq!(actions(ErrorPolicy::Enospc), (Stop, Report));
    }

    #[test]
    fn events_are_rationed_but_never_those_of_a_stop() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let mut sink = EventSink::new(Box::new(move |event| sender.send(event).unwrap()), Arc::default());
        let event = |action| DiskEvent::IoError {
            disk: "d".into(),
            operation: DiskOperation::Read,
            action,
            nospace: false,
            errno: Errno::new(libc::EIO),
            sector: 0,
        };
        (0..1000).for_each(|_| sink.send(event(ErrorAction::Report)));
        // The clock may have moved on to the next ration or two.
        let count = receiver.try_iter().count();
        assert!((10..100).contains(&count), "{count}");
        (0..1000).for_each(|_| sink.send(event(ErrorAction::Stop)));
        assert_eq!(receiver.try_iter().count(), 1000);
        assert!(sink.take(Instant::now() + PERIOD));
    }
}
