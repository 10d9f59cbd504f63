//! A disk between its device and its images: one image, or two while it is mirrored to another.
//!
//! ```text
//!               no mirror                              mirrored
//!
//!   device ─queue─▶ Drive ─▶ Engine      device ─queue─▶ Drive ─▶ Mirror ─orders─┬─▶ Engine, source
//!          ◀─reap──       ◀─                    ◀─reap──       ◀─        ◀───────┴─▶ Engine, target
//!                                        worker ─advance(now)─▶   │ ledger, claims, copier, bounce pool
//!
//!   attach_mirror ─▶ copying ─▶ Ready ─▶ prepare ─▶ Prepared ─▶ gate closed, drained ─▶ finish ─▶ Quiesced ─┬─▶ switch
//!   (drained)           ▲               (optional: most of                               │                └─▶ detach
//!                       │                the last flush)                                 │
//!                       └───────────────────── Unfinished, NotConverged: gate open ──────┘
//! ```
//!
//! A backup ([`Drive::attach_backup`]) goes the same ways, but its target is to be what the disk was in the beginning; it
//! ends when all is copied, and is detached.
//!
//! A [`Drive`] has an [`Engine`]'s interface, and without a mirror it does nothing but hand on. With one, the rules of
//! [`mirror`] hold. It has one owner, one thread at a time, no lock, no clock and no thread of its own: what has to
//! happen later happens in [`Drive::advance`], which the owner calls after every round of work, when
//! [`Drive::target_event`] is readable, and when the time has come that it named.
//!
//! # Who answers for what
//!
//! - The device's **gate** is the owner's. [`Drive::attach_mirror`], [`Drive::finish`], [`Drive::switch`] and
//!   [`Drive::detach`] refuse while a request is in flight; between [`Drive::finish`] and the end the owner queues
//!   nothing that writes.
//! - Size and identity of a disk are its device's: a target that is larger is used as far as the source reaches, and
//!   whether a switch to it is wanted is for the owner to say. Resizing a disk that is mirrored is not.
//! - What a target lacks or loses never fails a guest's request, and never delays one while the mirror is paused or in
//!   error. Only requests that were given to the target before wait for it, until the mirror is given up.

#![expect(unsafe_code, reason = "hands the caller's memory and the mirror's own to engines")]

mod bitmap;
mod claims;
mod ledger;
mod mirror;
mod options;
mod pace;
mod pool;

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use self::mirror::{Images, Kind, Limits, Mirror};
use self::options::unfit;
pub use self::options::{
    AttachError, AttachReason, CopyMode, MirrorAction, MirrorError, MirrorEvent, MirrorOperation,
    MirrorOptions, MirrorRefusal, MirrorStatus, MirrorSync, OnError, Side,
};
use crate::disk::Disk;
use crate::engine::filter::Filters;
use crate::engine::{Completion, Engine, EngineKind, Operation};
use crate::error::ResizeError;

/// Rounds that one call may take before it lets others work.
const ROUNDS: usize = 4;

/// What a mirror leaves behind: the image that is not the disk's any more, and memory. To close the one and free the
/// other takes milliseconds, so let the guest go on first.
pub struct Former {
    /// Before `core`, as in [`Mirrored`].
    engine: Engine,
    _core: Mirror,
}

impl Former {
    /// The image.
    pub fn disk(&self) -> &Disk {
        self.engine.disk()
    }

    /// The image at work; nothing is in flight.
    pub fn into_engine(self) -> Engine {
        self.engine
    }
}

impl std::fmt::Debug for Former {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Former").field(&self.disk().name()).finish()
    }
}

/// A disk at work, and perhaps its mirror.
pub struct Drive {
    /// Before `mirror`, whose memory it uses: its drop waits for what is in flight.
    source: Engine,
    mirror: Option<Box<Mirrored>>,
}

struct Mirrored {
    /// Before `core`, for the same reason.
    target: Engine,
    core: Mirror,
    /// Kept for its memory.
    results: Vec<Completion>,
}

impl Drive {
    /// A disk without a mirror.
    pub fn new(source: Engine) -> Self {
        Self { source, mirror: None }
    }

    /// Who makes the calls.
    pub fn kind(&self) -> EngineKind {
        self.source.kind()
    }

    /// The disk that the guest works on.
    pub fn disk(&self) -> &Disk {
        self.source.disk()
    }

    /// As [`Engine::resize`], of that disk, which is not to be done while it is mirrored.
    ///
    /// # Errors
    ///
    /// As [`Engine::resize`].
    pub fn resize(&mut self, size: Option<u64>) -> Result<u64, ResizeError> {
        self.source.resize(size)
    }

    /// The disk it is mirrored to.
    pub fn target(&self) -> Option<&Disk> {
        self.mirror.as_ref().map(|mirrored| mirrored.target.disk())
    }

    /// Readable while completions wait that the host has sent. Another one after [`Self::switch`].
    pub fn event(&self) -> BorrowedFd<'_> {
        self.source.event()
    }

    /// The same for the target: then [`Self::reap`] and [`Self::advance`] have work.
    pub fn target_event(&self) -> Option<BorrowedFd<'_>> {
        self.mirror.as_ref().map(|mirrored| mirrored.target.event())
    }

    /// The handle on the limits and faults of the disk that the guest works on, as [`Engine::node_filters`].
    pub fn node_filters(&self) -> Option<&Filters> {
        self.source.node_filters()
    }

    /// As [`Engine::set_throttled`], of the disk that the guest works on, and of the one it is mirrored to.
    pub fn set_throttled(&mut self, source: bool, target: bool) {
        self.source.set_throttled(source);
        if let Some(mirrored) = &mut self.mirror {
            mirrored.target.set_throttled(target);
        }
    }

    /// Operations queued by the caller whose completions were not reaped.
    pub fn in_flight(&self) -> usize {
        match &self.mirror {
            None => self.source.in_flight(),
            Some(mirrored) => mirrored.core.guests_in_flight() + mirrored.core.completions(),
        }
    }

    /// As [`Engine::queue`].
    ///
    /// # Safety
    ///
    /// As [`Engine::queue`].
    pub unsafe fn queue(&mut self, token: u64, operation: Operation) {
        match &mut self.mirror {
            // SAFETY: by the contract of this function.
            None => unsafe { self.source.queue(token, operation) },
            Some(mirrored) => {
                // SAFETY: by the contract of this function.
                unsafe { mirrored.core.guest(token, operation) };
                self.carry_out();
            }
        }
    }

    /// As [`Engine::queue_flush`].
    pub fn queue_flush(&mut self, token: u64) {
        // SAFETY: there are no buffers.
        unsafe { self.queue(token, Operation::Flush) };
    }

    /// As [`Engine::submit`].
    ///
    /// # Errors
    ///
    /// As [`Engine::submit`], of either image.
    pub fn submit(&mut self) -> io::Result<()> {
        self.source.submit()?;
        self.mirror.as_mut().map_or(Ok(()), |mirrored| mirrored.target.submit())
    }

    /// As [`Engine::reap`].
    ///
    /// # Errors
    ///
    /// As [`Engine::reap`], of either image.
    pub fn reap(&mut self, completions: &mut Vec<Completion>) -> io::Result<()> {
        if self.mirror.is_none() {
            return self.source.reap(completions);
        }
        let result = self.collect();
        if let Some(mirrored) = &mut self.mirror {
            completions.append(&mut mirrored.core.output().completions);
        }
        result
    }

    /// Gives the mirror's orders to the engines.
    fn carry_out(&mut self) {
        let Some(mirrored) = &mut self.mirror else { return };
        for order in mirrored.core.output().orders.drain(..) {
            let engine = match order.side {
                Side::Source => &mut self.source,
                Side::Target => &mut mirrored.target,
            };
            // SAFETY: a guest's buffers by the contract of `queue`, since its completion comes after that of its orders;
            // the mirror's own live in `core`, which is dropped after both engines or when nothing is in flight.
            unsafe {
                match order.aside {
                    true => engine.queue_aside(u64::from(order.id), order.operation),
                    false => engine.queue(u64::from(order.id), order.operation),
                }
            }
        }
    }

    /// Takes the results of both engines, and goes on with what they allow.
    fn collect(&mut self) -> io::Result<()> {
        for _ in 0..ROUNDS {
            let Some(mirrored) = &mut self.mirror else { return Ok(()) };
            let Mirrored { target, core, results } = &mut **mirrored;
            let mut any = false;
            for (side, engine) in [(Side::Source, &mut self.source), (Side::Target, target)] {
                engine.reap(results)?;
                for completion in results.drain(..) {
                    any = true;
                    if !core.completed(side, completion.token, completion.result) {
                        // Of before the mirror: there are none, where attaching is done right.
                        core.output().completions.push(completion);
                    }
                }
            }
            self.carry_out();
            self.submit()?;
            if !any {
                break;
            }
        }
        Ok(())
    }
}

/// Mirrors.
impl Drive {
    /// Begins to mirror the disk to `target`, which holds all of it or more. [`Self::advance`] is due.
    ///
    /// # Errors
    ///
    /// [`AttachReason`], with the target given back.
    pub fn attach_mirror(&mut self, target: Engine, options: &MirrorOptions) -> Result<(), Box<AttachError>> {
        self.attach(Kind::Mirror, target, options, Limits::default())
    }

    /// Begins to save to `target` what the disk holds now, while the guest goes on: what it changes is copied first. Ends
    /// with [`MirrorEvent::Ready`], after which it is to be detached; a backup only of what the guest changes
    /// ([`MirrorSync::None`]) goes on until it is. The options' copy mode means nothing here.
    ///
    /// An error of a copy that a guest's write waits for fails the backup, whatever the policies say: the guest neither
    /// waits nor fails for it.
    ///
    /// # Errors
    ///
    /// As [`Self::attach_mirror`].
    pub fn attach_backup(&mut self, target: Engine, options: &MirrorOptions) -> Result<(), Box<AttachError>> {
        let kind = Kind::Backup { background: options.sync == MirrorSync::Full };
        self.attach(kind, target, options, Limits::default())
    }

    fn attach(
        &mut self,
        kind: Kind,
        target: Engine,
        options: &MirrorOptions,
        limits: Limits,
    ) -> Result<(), Box<AttachError>> {
        let reason = if self.mirror.is_some() {
            Some(AttachReason::Mirrored)
        } else if self.source.in_flight() > 0 {
            Some(AttachReason::Busy)
        } else {
            unfit(self.disk(), target.disk(), options)
        };
        if let Some(reason) = reason {
            return Err(Box::new(AttachError { target, reason }));
        }
        self.install(kind, target, options, limits);
        Ok(())
    }

    fn install(&mut self, kind: Kind, mut target: Engine, options: &MirrorOptions, limits: Limits) {
        let images = Images {
            size: self.disk().size(),
            tells_extents: !self.disk().geometry().is_block_device,
            sync_errors_stay: !target.disk().is_direct(),
        };
        let core = Mirror::new(kind, images, options, limits);
        // The device's limits and faults are about what it works on.
        target.set_filtering(false);
        self.mirror = Some(Box::new(Mirrored { target, core, results: Vec::new() }));
    }

    /// Lets the mirror do what it can do now. Returns when it is to be called again at the latest; earlier after every
    /// [`Self::reap`].
    ///
    /// # Errors
    ///
    /// As [`Engine::submit`], of either image.
    pub fn advance(&mut self, now: Instant) -> io::Result<Option<Instant>> {
        let Some(mirrored) = &mut self.mirror else { return Ok(None) };
        mirrored.core.pump(now);
        self.carry_out();
        self.submit()?;
        self.collect()?;
        let Some(mirrored) = &self.mirror else { return Ok(None) };
        let unseen = mirrored.core.completions() > 0 || self.source.has_done() || mirrored.target.has_done();
        Ok(if unseen { Some(now) } else { mirrored.core.deadline(now) })
    }

    /// What has happened since the last time.
    pub fn take_events(&mut self) -> Vec<MirrorEvent> {
        self.mirror
            .as_mut()
            .map_or_else(Vec::new, |mirrored| mirrored.core.output().events.drain(..).collect())
    }

    /// Where the mirror stands; `None` without one.
    pub fn mirror_status(&self) -> Option<MirrorStatus> {
        self.mirror.as_ref().map(|mirrored| mirrored.core.status())
    }

    /// Copies nothing more until [`Self::resume`]; what is under way is finished. Writes are remembered.
    ///
    /// # Errors
    ///
    /// [`MirrorRefusal::NotMirrored`].
    pub fn pause(&mut self) -> Result<(), MirrorRefusal> {
        self.with_core(Mirror::pause)
    }

    /// Ends a pause, and tries again what an error has stopped.
    ///
    /// # Errors
    ///
    /// [`MirrorRefusal::NotMirrored`].
    pub fn resume(&mut self) -> Result<(), MirrorRefusal> {
        self.with_core(Mirror::resume)
    }

    /// Limits copies to `speed` bytes per second, 0 = no limit, from now on.
    ///
    /// # Errors
    ///
    /// [`MirrorRefusal::NotMirrored`].
    pub fn set_speed(&mut self, speed: u64) -> Result<(), MirrorRefusal> {
        self.with_core(|core| core.set_speed(speed))
    }

    /// Changes the copy mode, at any moment: no drain is needed.
    ///
    /// # Errors
    ///
    /// [`MirrorRefusal::NotMirrored`], [`MirrorRefusal::Backup`].
    pub fn set_mode(&mut self, mode: CopyMode) -> Result<(), MirrorRefusal> {
        self.with_core(|core| core.set_mode(mode))?
    }

    /// Makes the target durable, as far as it is written, before the guest is held: most of what [`Self::finish`] would take
    /// is a flush. Ends with [`MirrorEvent::Prepared`] or [`MirrorEvent::Unfinished`].
    ///
    /// # Errors
    ///
    /// Not ready; paused; failed; finishing already; a backup.
    pub fn prepare(&mut self) -> Result<(), MirrorRefusal> {
        self.with_core(Mirror::prepare)?
    }

    /// Copies what remains, as fast as it goes, and makes the target durable, while the owner holds the guest. Ends with
    /// [`MirrorEvent::Quiesced`] or [`MirrorEvent::Unfinished`].
    ///
    /// # Errors
    ///
    /// [`MirrorRefusal::NotConverged`] when more than `limit` bytes remain; requests are in flight; paused; failed.
    pub fn finish(&mut self, limit: u64) -> Result<(), MirrorRefusal> {
        let waiting = self.mirror.as_ref().is_some_and(|mirrored| mirrored.core.completions() > 0);
        if waiting {
            return Err(MirrorRefusal::Busy);
        }
        self.with_core(|core| core.finish(limit))?
    }

    /// Takes [`Self::finish`] back: the owner lets the guest go on.
    ///
    /// # Errors
    ///
    /// [`MirrorRefusal::NotMirrored`].
    pub fn reopen(&mut self) -> Result<(), MirrorRefusal> {
        self.with_core(Mirror::reopen)
    }

    /// Puts the target in the source's place, which is given back. Only when [`MirrorEvent::Quiesced`] holds.
    ///
    /// # Errors
    ///
    /// It does not; something is in flight. Nothing has changed.
    pub fn switch(&mut self) -> Result<Former, MirrorRefusal> {
        let Some(mirrored) =
            self.mirror.take_if(|mirrored| mirrored.may_end() && mirrored.core.is_quiesced())
        else {
            return Err(match &self.mirror {
                None => MirrorRefusal::NotMirrored,
                Some(mirrored) if mirrored.core.is_quiesced() => MirrorRefusal::Busy,
                Some(_) => MirrorRefusal::NotQuiesced,
            });
        };
        let Mirrored { target, core, .. } = *mirrored;
        let mut former = std::mem::replace(&mut self.source, target);
        former.set_filtering(false);
        self.source.set_filtering(true);
        Ok(Former { engine: former, _core: core })
    }

    /// Nobody wants the target any more: what is under way to it comes to its end, which the guest does not wait for, and
    /// nothing is begun. [`Self::detach`] is to follow.
    ///
    /// # Errors
    ///
    /// [`MirrorRefusal::NotMirrored`].
    pub fn give_up(&mut self) -> Result<(), MirrorRefusal> {
        self.with_core(Mirror::give_up)
    }

    /// Whether nothing is under way but requests of the guest's that no other image is needed for. Once it is given up
    /// that stays so.
    pub fn is_left_to_the_guest(&self) -> bool {
        self.mirror.as_ref().is_none_or(|mirrored| mirrored.core.is_left_to_the_guest())
    }

    /// Ends the mirror, whatever it has reached; the target is given back. What is under way must be over: [give it up](Self::give_up),
    /// wait until it [is left to the guest](Self::is_left_to_the_guest), close the gate, and wait for the guest's.
    ///
    /// # Errors
    ///
    /// Something is in flight. Nothing has changed.
    pub fn detach(&mut self) -> Result<Former, MirrorRefusal> {
        match self.mirror.take_if(|mirrored| mirrored.may_end()) {
            Some(mirrored) => {
                let Mirrored { target, core, .. } = *mirrored;
                Ok(Former { engine: target, _core: core })
            }
            None if self.mirror.is_some() => Err(MirrorRefusal::Busy),
            None => Err(MirrorRefusal::NotMirrored),
        }
    }

    fn with_core<T>(&mut self, run: impl FnOnce(&mut Mirror) -> T) -> Result<T, MirrorRefusal> {
        let Some(mirrored) = &mut self.mirror else { return Err(MirrorRefusal::NotMirrored) };
        let result = run(&mut mirrored.core);
        self.carry_out();
        Ok(result)
    }
}

impl Mirrored {
    /// Nothing is in flight, of anybody's.
    fn may_end(&self) -> bool {
        let idle = self.core.is_idle() && self.core.completions() == 0;
        debug_assert!(!idle || self.core.is_clean(), "an idle mirror owes memory or claims");
        idle
    }
}

#[cfg(test)]
mod tests;
