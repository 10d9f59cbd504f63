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
//! * A thaw does not wait for a freeze that is under way, if the agent is one that can cancel it (that is one that
//!   answers questions meanwhile): the client that freezes gets an error. The same when that client leaves.
//! * Time stands still while the VM does. A thaw that fails is tried again until one succeeds.
//!
//! An agent may have a lease of its own on freezes, for the day when the whole VMM is dead: `tarn-lease-ms`, which
//! goes through to it with the freeze. Nothing here renews that by itself: being connected is not being
//! alive.
//!
//! * The owner of a freeze renews the lease by asking for `guest-fsfreeze-status`.
//! * The same question from anybody else, a program that polls for instance, must not keep a guest frozen whose
//!   owner is gone or hangs. So it is asked out of band, which does not renew.
//! * That the lease ran out shows in the next status, whoever asks, or in a thaw that finds nothing to do.
//!   Then the snapshot that was to be taken is void: it is logged and counted with the automatic thaws. A
//!   status is not believed if it may be older than a freeze or thaw, and only a thaw ends what nobody knows of:
//!   the agent may still be at it.
//!
//! [`ChannelConfig::thaw_grace`]: super::ChannelConfig::thaw_grace

use std::time::{Duration, Instant};

use serde_json::Value;

use super::command::Kind;
use super::in_flight::{Asker, Ending, InFlight};
use super::{Client, FreezeStatus};

/// First and longest pause between attempts to thaw.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// The books on freezes.
#[derive(Debug, Default)]
pub(super) struct Freezes {
    in_force: Option<Freeze>,
    automatic_thaws: u64,
}

impl Freezes {
    /// A command has ended.
    pub(super) fn command_ended(&mut self, request: &InFlight, ending: &Ending, now: Instant) {
        match (request.kind, ending) {
            (Kind::Freeze, Ending::Answered(Ok(count))) if count.as_i64() != Some(0) => {
                self.in_force = Some(match request.asker {
                    Asker::Client(client) => Freeze::owned(client, request.grace),
                    Asker::Nobody | Asker::Broker => Freeze::unknown(now),
                });
            }
            (Kind::Freeze, Ending::Unknown(_)) => self.in_force = Some(Freeze::unknown(now)),
            (Kind::Thaw, Ending::Answered(Ok(count))) => {
                let known = self.in_force.take().is_some_and(|freeze| freeze.is_known);
                if request.asker == Asker::Broker {
                    self.automatic_thaws += 1;
                } else if known && count.as_i64() == Some(0) {
                    self.thawed_in_guest();
                }
            }
            (Kind::Thaw, _) if request.asker == Asker::Broker => {
                tracing::warn!("The thaw failed, trying again");
                if let Some(freeze) = &mut self.in_force {
                    freeze.thaw_failed(now);
                }
            }
            (Kind::Status, Ending::Answered(Ok(status))) => self.status_answered(status),
            _ => {}
        }
    }

    /// What the guest says about itself when it has neither a freeze nor a thaw to do. A freeze that it has not
    /// even confirmed may yet come.
    pub(super) fn status_answered(&mut self, status: &Value) {
        if status == "thawed" && self.in_force.take_if(|freeze| freeze.is_known).is_some() {
            self.thawed_in_guest();
        }
    }

    fn thawed_in_guest(&mut self) {
        tracing::warn!(
            "The guest is thawed, and no client did it: its agent's lease ran out, or somebody in it did"
        );
        self.automatic_thaws += 1;
    }

    /// Whether this client froze the guest.
    pub(super) fn is_owner(&self, client: Client) -> bool {
        self.in_force.as_ref().is_some_and(|freeze| freeze.owner == Some(client))
    }

    /// Whether the guest is frozen, as far as is known here.
    pub(super) fn is_frozen(&self) -> bool {
        self.in_force.is_some()
    }

    /// A client is gone; `informed` if it can have read all its answers.
    pub(super) fn client_gone(&mut self, client: Client, informed: bool, now: Instant) {
        if let Some(freeze) = &mut self.in_force {
            freeze.client_gone(client, informed, now);
        }
    }

    /// The guest starts again from nothing.
    pub(super) fn guest_reset(&mut self) {
        self.in_force = None;
    }

    /// When to thaw in the place of a client that is gone.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.in_force.as_ref().and_then(|freeze| freeze.thaw_at)
    }

    /// Whether that is now.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.deadline().is_some_and(|at| at <= now)
    }

    pub(super) fn status(&self, now: Instant) -> Option<FreezeStatus> {
        self.in_force.as_ref().map(|freeze| freeze.status(now))
    }

    /// Freezes that ended otherwise than by a client's thaw.
    pub(super) fn automatic_thaws(&self) -> u64 {
        self.automatic_thaws
    }
}

/// A freeze in force.
#[derive(Debug)]
struct Freeze {
    owner: Option<Client>,
    /// How long it outlives its owner; `None` is for ever.
    grace: Option<Duration>,
    /// When to thaw.
    thaw_at: Option<Instant>,
    retry: Duration,
    /// The guest said that it is frozen.
    is_known: bool,
}

impl Freeze {
    /// A freeze that its client knows of.
    fn owned(owner: Client, grace: Option<Duration>) -> Self {
        Self { owner: Some(owner), grace, thaw_at: None, retry: RETRY, is_known: true }
    }

    /// A freeze that nobody knows of.
    fn unknown(now: Instant) -> Self {
        Self { owner: None, grace: None, thaw_at: Some(now), retry: RETRY, is_known: false }
    }

    /// A client is gone; `informed` if it can have read all its answers.
    fn client_gone(&mut self, client: Client, informed: bool, now: Instant) {
        if self.owner == Some(client) {
            self.owner = None;
            let grace = if informed { self.grace } else { Some(Duration::ZERO) };
            self.thaw_at = grace.and_then(|grace| now.checked_add(grace));
        }
    }

    /// A thaw was tried and failed.
    fn thaw_failed(&mut self, now: Instant) {
        self.thaw_at = Some(now + self.retry);
        self.retry = (self.retry * 2).min(RETRY_MAX);
    }

    fn status(&self, now: Instant) -> FreezeStatus {
        FreezeStatus {
            by: self.owner.map(|owner| owner.to_string()),
            thaw_in: self.thaw_at.map(|at| at.saturating_duration_since(now)),
        }
    }
}
