//! How far a freeze is: what the worker's engine tells, and what the main loop may do about it.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use serde_json::Value;

use super::label::Label;
use super::report::{Cause, Report, milliseconds};
use crate::watchdog::Watchdog;

/// Where the engine is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Phase {
    #[default]
    Thawed,
    /// Filesystems are being frozen, or brought to rest for it.
    Freezing,
    Frozen,
    Thawing,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Thawed => "thawed",
            Self::Freezing => "freezing",
            Self::Frozen => "frozen",
            Self::Thawing => "thawing",
        }
    }
}

/// A filesystem that is, or may be, frozen: for who has to tell a new watchdog.
type Guarded = (Label, Arc<dyn AsFd + Send + Sync>);

/// Shared by the worker, which freezes, and the main loop, which watches, tells and interrupts.
pub(crate) struct Freezing {
    inner: Mutex<Inner>,
    /// Readable once the freeze in progress is cancelled.
    cancelled: OwnedFd,
    /// Readable once a freeze has begun that the main loop does not know of yet.
    begun: OwnedFd,
}

impl fmt::Debug for Freezing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Freezing").field("phase", &self.phase()).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Inner {
    phase: Phase,
    /// When the freeze in progress began.
    since: Option<Instant>,
    /// When the first filesystem was frozen.
    frozen_at: Option<Instant>,
    lease_end: Option<Instant>,
    cancel: Option<String>,
    /// From the first FIFREEZE on.
    guarded: Vec<Guarded>,
    /// Hooks want their thaw.
    owes_hooks: bool,
    report: Report,
}

impl Freezing {
    pub(crate) fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self { inner: Mutex::default(), cancelled: eventfd(0, flags)?, begun: eventfd(0, flags)? })
    }

    /// Whether filesystems are frozen, or may be.
    pub(crate) fn is_frozen(&self) -> bool {
        self.phase() != Phase::Thawed
    }

    pub(crate) fn phase(&self) -> Phase {
        self.inner.lock().phase
    }

    // ---- The main loop's part ----

    /// When a freeze in progress has taken as long as this.
    pub(crate) fn overdue_at(&self, timeout: Duration) -> Option<Instant> {
        let inner = self.inner.lock();
        let is_running = inner.phase == Phase::Freezing && inner.cancel.is_none();
        inner.since.filter(|_| is_running).and_then(|since| since.checked_add(timeout))
    }

    /// Ends a freeze in progress as soon as that is possible; its number, if there is one.
    pub(crate) fn cancel(&self, why: &str) -> Option<u64> {
        let mut inner = self.inner.lock();
        if inner.phase != Phase::Freezing {
            return None;
        }
        inner.cancel.get_or_insert_with(|| why.to_owned());
        let _ = rustix::io::write(&self.cancelled, &1_u64.to_ne_bytes());
        Some(inner.report.number)
    }

    /// When the lease ends, if it runs.
    pub(crate) fn lease_end(&self) -> Option<Instant> {
        let inner = self.inner.lock();
        inner.lease_end.filter(|_| inner.phase == Phase::Frozen)
    }

    /// The lease begins anew; false if there is nothing to renew.
    pub(crate) fn renew(&self) -> bool {
        let mut inner = self.inner.lock();
        if inner.phase != Phase::Frozen {
            return false;
        }
        inner.lease_end = inner.report.lease.and_then(|lease| Instant::now().checked_add(lease));
        inner.lease_end.is_some()
    }

    /// The lease has run out, and the main loop sees to it.
    pub(crate) fn lapse(&self) {
        self.inner.lock().lease_end = None;
        self.lost(Cause::Lease);
    }

    /// Somebody else has thawed, for this reason; the worker will see to the rest.
    pub(crate) fn lost(&self, cause: Cause) {
        let mut inner = self.inner.lock();
        if inner.phase != Phase::Thawed {
            inner.report.thawed_by.get_or_insert(cause);
        }
    }

    /// Readable once a freeze has begun, until [`hear`](Self::hear).
    pub(crate) fn begun(&self) -> BorrowedFd<'_> {
        self.begun.as_fd()
    }

    /// Now the main loop knows.
    pub(crate) fn hear(&self) {
        let _ = rustix::io::read(&self.begun, &mut [0; 8]);
    }

    /// The number of the last freeze.
    pub(crate) fn number(&self) -> u64 {
        self.inner.lock().report.number
    }

    /// Tells a new watchdog of what is frozen, if anything is.
    pub(crate) fn rearm(&self, watchdog: &Watchdog) -> io::Result<()> {
        let inner = self.inner.lock();
        if inner.guarded.is_empty() {
            return Ok(());
        }
        watchdog.begin(inner.report.number, inner.owes_hooks)?;
        for (label, fd) in &inner.guarded {
            watchdog.hold(label.clone(), fd.as_fd())?;
        }
        let now = Instant::now();
        let left = inner.lease_end.map(|end| end.saturating_duration_since(now));
        watchdog.arm(inner.report.lease, left)
    }

    /// The reply to `tarn-fsfreeze-report`.
    pub(crate) fn report(&self) -> Value {
        let inner = self.inner.lock();
        let now = Instant::now();
        let mut members = inner.report.members();
        members.insert("state".into(), inner.phase.name().into());
        if let Some(end) = inner.lease_end.filter(|_| inner.phase == Phase::Frozen) {
            members.insert("lease-left-ms".into(), milliseconds(end.saturating_duration_since(now)).into());
        }
        let frozen_for = match inner.report.frozen_for {
            Some(time) => Some(time),
            None => inner.frozen_at.map(|at| now.saturating_duration_since(at)),
        };
        if let Some(time) = frozen_for {
            members.insert("frozen-ms".into(), milliseconds(time).into());
        }
        Value::Object(members)
    }

    // ---- The engine's part ----

    /// Goes on with the number of a former agent's freeze.
    pub(super) fn begin_again(&self, number: u64, lease: Option<Duration>) {
        self.inner.lock().report.number = number.saturating_sub(1);
        self.begin(lease);
    }

    /// A freeze begins; its number.
    pub(super) fn begin(&self, lease: Option<Duration>) -> u64 {
        let mut inner = self.inner.lock();
        // Whatever was rung for the last one.
        let _ = rustix::io::read(&self.cancelled, &mut [0; 8]);
        let number = inner.report.number + 1;
        *inner = Inner {
            phase: Phase::Freezing,
            since: Some(Instant::now()),
            report: Report { number, lease, ..Report::default() },
            ..Inner::default()
        };
        let _ = rustix::io::write(&self.begun, &1_u64.to_ne_bytes());
        number
    }

    /// Everything is frozen. No cancel comes between: it was in time, or it finds the freeze complete.
    ///
    /// # Errors
    ///
    /// Why the freeze is to end instead.
    pub(super) fn complete(&self) -> Result<(), String> {
        let mut inner = self.inner.lock();
        match inner.cancel.clone() {
            Some(why) => Err(why),
            None => {
                inner.phase = Phase::Frozen;
                Ok(())
            }
        }
    }

    /// The lease runs, and these may be frozen.
    pub(super) fn arm(&self, left: Option<Duration>, guarded: Vec<Guarded>, owes_hooks: bool) {
        let mut inner = self.inner.lock();
        inner.guarded = guarded;
        inner.owes_hooks = owes_hooks;
        let now = Instant::now();
        inner.frozen_at.get_or_insert(now);
        inner.lease_end = left.and_then(|left| now.checked_add(left));
    }

    pub(super) fn enter(&self, phase: Phase) {
        let mut inner = self.inner.lock();
        inner.phase = phase;
    }

    /// Everything is thawed.
    pub(super) fn thawed(&self, cause: Cause) {
        let mut inner = self.inner.lock();
        let frozen_for = inner.frozen_at.map(|at| at.elapsed());
        inner.report.frozen_for = inner.report.frozen_for.or(frozen_for);
        inner.report.thawed_by.get_or_insert(cause);
        inner.guarded.clear();
        inner.lease_end = None;
        inner.phase = Phase::Thawed;
    }

    /// Why the freeze in progress is to end, if it is.
    pub(super) fn cancel_reason(&self) -> Option<String> {
        self.inner.lock().cancel.clone()
    }

    /// Readable once the freeze in progress is cancelled.
    pub(super) fn cancelled(&self) -> BorrowedFd<'_> {
        self.cancelled.as_fd()
    }

    pub(super) fn with_report<T>(&self, change: impl FnOnce(&mut Report) -> T) -> T {
        change(&mut self.inner.lock().report)
    }
}
