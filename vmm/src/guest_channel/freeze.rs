//! Who froze the guest, and when to thaw in its place.
//!
//! ```text
//!             frozen, owner there       owner leaves         grace over
//!   thawed ──────────────────────▶ owned ────────────▶ orphaned ────────▶ due ─┐
//!     ▲                              │                    │                ▲   │ thaw sent
//!     │ any successful thaw, status  │                    │                │   ▼
//!     │ "thawed", reset of the guest │                    │          back-off, failed
//!     └──────────────────────────────┴────────────────────┴──────────────── succeeded
//! ```
//!
//! The rule, in words. A frozen guest is a guest that stands still, so somebody must answer for it:
//!
//! * While the client that froze it is connected, it answers, for as long as it likes.
//! * Many clients open a connection for every command (Proxmox, socat, scripts): their departure says
//!   nothing. So an orphaned freeze lives on for the grace, [`ChannelConfig::thaw_grace`], which has to be
//!   longer than what such clients do between freeze and thaw. Any client may thaw meanwhile.
//! * A client that stays connected says so with the freeze, and shortens the grace:
//!   `"arguments": {"tarn-thaw-grace-ms": 0}` thaws as soon as it is gone. `null` means never.
//! * If nobody knows of the freeze, there is no grace: the client left before it could read the answer, or
//!   the answer never came (timeout, agent died). Such a freeze is undone at once.
//! * Time stands still while the VM does. A thaw that fails is tried again until one succeeds.
//!
//! [`ChannelConfig::thaw_grace`]: super::ChannelConfig::thaw_grace

use std::time::{Duration, Instant};

use super::{Client, FreezeStatus};

/// First and longest pause between attempts to thaw.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// A freeze in force.
#[derive(Debug)]
pub(super) struct Freeze {
    owner: Option<Client>,
    /// How long it outlives its owner; `None` is for ever.
    grace: Option<Duration>,
    /// When to thaw.
    thaw_at: Option<Instant>,
    retry: Duration,
}

impl Freeze {
    /// A freeze that its client knows of.
    pub(super) fn owned(owner: Client, grace: Option<Duration>) -> Self {
        Self { owner: Some(owner), grace, thaw_at: None, retry: RETRY }
    }

    /// A freeze that nobody knows of.
    pub(super) fn unknown(now: Instant) -> Self {
        Self { owner: None, grace: None, thaw_at: Some(now), retry: RETRY }
    }

    /// A client is gone; `informed` if it can have read all its answers.
    pub(super) fn client_gone(&mut self, client: Client, informed: bool, now: Instant) {
        if self.owner == Some(client) {
            self.owner = None;
            let grace = if informed { self.grace } else { Some(Duration::ZERO) };
            self.thaw_at = grace.and_then(|grace| now.checked_add(grace));
        }
    }

    /// Whether to thaw now.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.thaw_at.is_some_and(|at| at <= now)
    }

    /// When to thaw.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.thaw_at
    }

    /// A thaw was tried and failed.
    pub(super) fn thaw_failed(&mut self, now: Instant) {
        self.thaw_at = Some(now + self.retry);
        self.retry = (self.retry * 2).min(RETRY_MAX);
    }

    pub(super) fn status(&self, now: Instant) -> FreezeStatus {
        FreezeStatus {
            by: self.owner.map(|owner| owner.to_string()),
            thaw_in: self.thaw_at.map(|at| at.saturating_duration_since(now)),
        }
    }
}
