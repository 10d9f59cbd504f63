//! The mirror or the backup of a disk: what its owner orders, and when its thread holds the guest for it.
//!
//! ```text
//!               start: drained                    quiesce: ready, little enough left
//!   no mirror ─────────────────▶ mirroring ────────────▶ target flushed ──────────▶ gate closed, draining
//!       ▲                          ▲  ▲                                                   │ nothing in flight
//!       │                          │  └─ unfinished, not converged, release ──────────────┤
//!       │      switch, detach      │                                                      ▼
//!       └──────────────────────────┴────────────────────────────── quiesced ◀──── last pass, sync
//! ```
//!
//! A detach from anywhere else lets the guest go on while what the mirror itself has under way comes to its end, for ever
//! if the target does not answer; the gate is closed only for the guest's own last requests.
//!
//! A backup is started and detached in the same way; it is never quiesced, and [`MirrorReport::Ready`] says that it is
//! complete.
//!
//! A quiesce stays wanted until it is reached, or until a pause, a release or a detach takes it back: a guest that
//! writes faster than the mirror copies is not held in vain. While the gate is closed for it the guest's requests wait
//! in their queues; held ones are tried again afterwards.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use block::{
    CopyMode, Disk, Drive, Engine, EngineOptions, MirrorAction, MirrorEvent, MirrorOperation, MirrorOptions,
    MirrorRefusal, MirrorStatus, Side,
};

use super::backend::{BlkBackend, BlkError, Command, Link, Reply, Ticket};
use super::policy::{DiskEvent, EventSink, MirrorReport};

/// What a target becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Equal to the disk, and perhaps the disk.
    Mirror,
    /// What the disk is now.
    Backup,
}

/// What a mirror is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MirrorOrder {
    /// Copy nothing for now; a quiesce is not wanted any more.
    Pause,
    /// Copy again, also what has failed.
    Resume,
    /// So many bytes per second, 0 = as fast as it goes.
    SetSpeed(u64),
    /// When a guest's write is done, from now on.
    SetMode(CopyMode),
    /// Once it is ready and at most `limit` bytes remain: hold the guest, copy them, sync the target, and report
    /// [`MirrorReport::Quiesced`]. Not for backups.
    Quiesce {
        /// In bytes.
        limit: u64,
    },
    /// Let the guest go on, on the source.
    Release,
    /// When quiesced: the target becomes the disk, and the guest goes on; then [`MirrorReport::Switched`].
    Switch,
    /// The mirror ends, whatever it has reached, and the guest goes on; then [`MirrorReport::Detached`].
    Detach,
}

impl MirrorOrder {
    /// Whether it is carried out when the mirror has ended, and answered then.
    pub(super) fn is_end(self) -> bool {
        matches!(self, Self::Switch | Self::Detach)
    }
}

/// The owner's side.
impl BlkBackend {
    /// Begins to mirror the disk to `target`, once what is in flight is over. What becomes of it is told by
    /// [`DiskEvent::Mirror`]. The target is as large as the disk, or larger: then as much of it is used.
    ///
    /// # Errors
    ///
    /// The host has no ring or no thread left for it; the target is closed.
    pub fn start_mirror(
        &self,
        target: Disk,
        engine: &EngineOptions,
        options: MirrorOptions,
    ) -> io::Result<Ticket<()>> {
        self.start_copy("mirror", Purpose::Mirror, target, engine, options)
    }

    /// Begins to save to `target` what the disk holds once what is in flight is over: what the guest changes is copied
    /// first, and its write waits for that. [`MirrorReport::Ready`] tells that the backup is
    /// complete and durable; then it is to be detached. The rest is as with [`Self::start_mirror`].
    ///
    /// # Errors
    ///
    /// As [`Self::start_mirror`].
    pub fn start_backup(
        &self,
        target: Disk,
        engine: &EngineOptions,
        options: MirrorOptions,
    ) -> io::Result<Ticket<()>> {
        self.start_copy("backup", Purpose::Backup, target, engine, options)
    }

    fn start_copy(
        &self,
        command: &'static str,
        purpose: Purpose,
        target: Disk,
        engine: &EngineOptions,
        options: MirrorOptions,
    ) -> io::Result<Ticket<()>> {
        // They come into force when the target becomes the disk.
        let engine = EngineOptions { filters: self.filters.clone(), ..engine.clone() };
        let target = Box::new(Engine::start(target, &engine)?);
        Ok(self.link.tell(command, |reply| Command::StartCopy { purpose, target, options, reply }))
    }

    /// Takes no requests any more until the [`Hold`] is dropped; the ticket tells when nothing is in flight. Several disks
    /// that are held at the same time show one moment of their guest.
    pub fn hold(&self) -> (Hold, Ticket<()>) {
        let ticket = self.link.tell("hold", |reply| Command::Hold { reply });
        (Hold { link: Arc::clone(&self.link) }, ticket)
    }

    /// Tells the mirror or the backup something.
    pub fn mirror(&self, order: MirrorOrder) -> Ticket<()> {
        self.link.tell("mirror order", |reply| Command::Mirror { order, reply })
    }

    /// Where the mirror or the backup stands, as of a moment ago; `None` without one.
    pub fn mirror_status(&self) -> Option<MirrorStatus> {
        self.link.mirror.lock().clone()
    }
}

/// As long as it is there, the disk takes no requests: see [`BlkBackend::hold`].
#[must_use = "the disk goes on when it is dropped"]
pub struct Hold {
    link: Arc<Link>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.link.order(Command::LetGo);
    }
}

/// How a mirror ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Switch,
    Detach,
}

/// How far the target is flushed before the guest is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Preparation {
    #[default]
    Due,
    UnderWay,
    Done,
}

/// A disk's mirror, if it has one.
#[derive(Debug, Default)]
pub(super) struct Mirroring {
    /// It is a backup.
    backup: bool,
    /// A quiesce is wanted once so many bytes remain at most.
    wanted: Option<u64>,
    /// What would be flushed while the guest is held is flushed before.
    preparation: Preparation,
    /// Since when the gate has been closed for it.
    holding: Option<Instant>,
    /// The last pass is under way or over.
    finishing: bool,
    /// It ends as soon as nothing is in flight.
    ending: Option<End>,
}

/// Who else has to know that the images have changed.
pub(super) enum Changed {
    Nothing,
    /// Nobody, but the drive has something new to do.
    Begun,
    /// The target's event is to be watched, or not any more.
    Target,
    /// Both events are others.
    Switched,
}

impl Mirroring {
    /// Whether requests have to wait.
    pub(super) fn is_holding(&self) -> bool {
        self.holding.is_some()
    }

    /// How long requests have been waiting.
    pub(super) fn held(&self) -> Option<Duration> {
        self.holding.map(|since| since.elapsed())
    }

    /// Whether it ends as soon as nothing is in flight.
    pub(super) fn is_ending(&self) -> bool {
        self.ending.is_some()
    }

    /// Attaches a target, while nothing is in flight.
    pub(super) fn start(
        &mut self,
        drive: &mut Drive,
        (purpose, target): (Purpose, Engine),
        options: &MirrorOptions,
        disk: &Arc<str>,
    ) -> Result<(), BlkError> {
        let attached = match purpose {
            Purpose::Mirror => drive.attach_mirror(target, options),
            Purpose::Backup => drive.attach_backup(target, options),
        };
        if attached.is_ok() {
            *self = Self { backup: purpose == Purpose::Backup, ..Self::default() };
        }
        attached.map_err(|error| BlkError::Attach { disk: Arc::clone(disk), source: error.reason })
    }

    /// Takes an order. What it leads to is reported, or seen to in [`settle`](Self::settle).
    pub(super) fn order(&mut self, drive: &mut Drive, order: MirrorOrder) -> Result<(), MirrorRefusal> {
        if self.ending.is_some() && order != MirrorOrder::Detach {
            return Err(MirrorRefusal::Busy);
        }
        match order {
            // It stands still as it is, and its owner is about to hear, or has heard, that it is quiesced.
            MirrorOrder::Pause if is_quiesced(drive) => Ok(()),
            MirrorOrder::Pause => {
                self.release(drive)?;
                drive.pause()
            }
            MirrorOrder::Resume => drive.resume(),
            MirrorOrder::SetSpeed(speed) => drive.set_speed(speed),
            MirrorOrder::SetMode(mode) => drive.set_mode(mode),
            MirrorOrder::Quiesce { limit } => {
                if drive.target().is_none() {
                    return Err(MirrorRefusal::NotMirrored);
                }
                if self.backup {
                    return Err(MirrorRefusal::Backup);
                }
                (self.wanted, self.preparation) = (Some(limit), Preparation::Due);
                Ok(())
            }
            MirrorOrder::Release => self.release(drive),
            MirrorOrder::Switch => {
                if !is_quiesced(drive) {
                    return Err(MirrorRefusal::NotQuiesced);
                }
                self.ending = Some(End::Switch);
                Ok(())
            }
            MirrorOrder::Detach => {
                if !is_quiesced(drive) {
                    self.release(drive)?;
                }
                drive.give_up()?;
                self.ending = Some(End::Detach);
                Ok(())
            }
        }
    }

    fn release(&mut self, drive: &mut Drive) -> Result<(), MirrorRefusal> {
        *self = Self { backup: self.backup, ..Self::default() };
        drive.reopen()
    }

    /// Does what can be done now; `drained` if no request of the guest's is in flight.
    pub(super) fn settle(&mut self, drive: &mut Drive, drained: bool, disk: &Arc<str>) -> Changed {
        if let Some(end) = self.ending {
            // A target that does not answer is waited for with the gate open: only then is the guest's turn.
            if self.holding.is_none() && drive.is_left_to_the_guest() {
                self.holding = Some(Instant::now());
            }
            return if drained { self.end(end, drive, disk) } else { Changed::Nothing };
        }
        let Some(limit) = self.wanted else { return Changed::Nothing };
        let Some(status) = drive.mirror_status() else { return Changed::Nothing };
        if self.holding.is_none() {
            let may_go = status.ready && !status.paused && !status.stopped && !status.failed;
            match self.preparation {
                _ if !may_go || status.remaining > limit => {}
                Preparation::Due if drive.prepare().is_ok() => {
                    self.preparation = Preparation::UnderWay;
                    return Changed::Begun;
                }
                Preparation::Due | Preparation::UnderWay => {}
                Preparation::Done => self.holding = Some(Instant::now()),
            }
        }
        if self.holding.is_some() && !self.finishing && drained {
            match drive.finish(limit) {
                Ok(()) => {
                    self.finishing = true;
                    return Changed::Begun;
                }
                Err(MirrorRefusal::Busy) => {}
                // It was written to since, or an error came between: another time.
                Err(_) => self.holding = None,
            }
        }
        Changed::Nothing
    }

    fn end(&mut self, end: End, drive: &mut Drive, disk: &Arc<str>) -> Changed {
        let ended = match end {
            End::Switch => drive.switch(),
            End::Detach => drive.detach(),
        };
        match ended {
            Ok(other) => {
                // With its file and its lock: nothing of it is in flight.
                drop(other);
                *self = Self::default();
                if end == End::Switch { Changed::Switched } else { Changed::Target }
            }
            Err(MirrorRefusal::Busy) => Changed::Nothing,
            Err(error) => {
                tracing::error!(%disk, %error, "The mirror does not end as it should");
                // One that was to switch may be decided: the guest must not go on with the source.
                let holding = self.holding.filter(|_| end == End::Switch);
                *self = Self { backup: self.backup, holding, ..Self::default() };
                Changed::Nothing
            }
        }
    }

    /// Tells the owner what has happened.
    pub(super) fn report(&mut self, drive: &mut Drive, disk: &Arc<str>, events: &mut EventSink) {
        for event in drive.take_events() {
            let mut tell = |report| events.send(DiskEvent::Mirror { disk: Arc::clone(disk), report });
            match event {
                MirrorEvent::Ready => tell(MirrorReport::Ready),
                MirrorEvent::Error { error, action } => {
                    let is_read = error.side == Side::Source && error.operation == MirrorOperation::Read;
                    tell(MirrorReport::Error { is_read, action, nospace: error.errno.is_no_space() });
                    if action == MirrorAction::Report {
                        tell(MirrorReport::Failed(error.errno.to_string()));
                    }
                }
                MirrorEvent::Prepared => self.preparation = Preparation::Done,
                MirrorEvent::Quiesced => {
                    self.wanted = None;
                    tell(MirrorReport::Quiesced);
                }
                MirrorEvent::Unfinished => {
                    // One that was reported as quiesced stays so for the guest, whatever has become of its target.
                    if self.ending.is_none() && self.wanted.is_some() {
                        (self.preparation, self.holding, self.finishing) = (Preparation::Due, None, false);
                        // It stays wanted; there is no mirror to reopen only if it has ended.
                        let _ = drive.reopen();
                    }
                }
            }
        }
    }
}

fn is_quiesced(drive: &Drive) -> bool {
    drive.mirror_status().is_some_and(|status| status.quiesced)
}

/// Lets the mirror work; when it has to be looked after again.
pub(super) fn advance(drive: &mut Drive, link: &Link, now: Instant) -> Option<Instant> {
    let next = drive.advance(now).unwrap_or_else(|error| {
        tracing::error!(disk = %link.facts.id, %error, "The mirror cannot go on");
        None
    });
    *link.mirror.lock() = drive.mirror_status();
    next
}

/// The answer to an order.
pub(super) fn answer(result: Result<(), MirrorRefusal>, disk: &Arc<str>, reply: &Reply<()>) {
    let _ = reply.send(result.map_err(|source| BlkError::Mirror { disk: Arc::clone(disk), source }));
}
