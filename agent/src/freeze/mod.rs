//! Freezing and thawing the guest's filesystems.
//!
//! ```text
//!             hooks ▶ open all ▶ sync ▶ state file ▶ watchdog armed ▶ FIFREEZE, dependents first
//!   ┌────────┐ ──────────────────────────── Freezing ───────────────────────────────▶ ┌────────┐
//!   │ Thawed │          any failure, cancelled, too long: what is frozen is thawed     │ Frozen │
//!   └────────┘ ◀──────────────────────────── Thawing ──────────────────────────────── └────────┘
//!             FITHAW until the kernel says no ▶ state file removed ▶ hooks
//! ```
//!
//! Every descriptor is open before the first filesystem is frozen: a mount that cannot be opened fails
//! the freeze while nothing is frozen, and the thaw depends on no path. Holding them until the thaw
//! makes `umount` say busy instead of leaving a frozen filesystem that nobody can reach. Before writers
//! have to wait, what is dirty is written back, so that they wait less.
//!
//! The state file is there before the first filesystem is frozen and until the last one is thawed, so
//! that an agent that starts anew knows that it has to thaw. Its name is the reference agent's: either
//! takes over from the other.
//!
//! A frozen guest has four ways out, each of which needs none of the others: the client thaws; the agent
//! thaws when it ends or loses the host; the [`crate::watchdog`] thaws when the lease runs out or the agent
//! dies; an agent that starts again takes over from its predecessor, lease included.
//!
//! [`mounts`] and [`order`] are pure; [`engine`] is what happens between agent and kernel; [`progress`] is
//! what the main loop sees of it while the worker is at it; [`report`] is what is told afterwards.

mod engine;
mod hooks;
mod label;
mod linux;
mod mounts;
mod order;
mod progress;
mod report;
mod takeover;
mod uncover;

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::mm::{MlockAllFlags, mlockall, munlockall};

use self::engine::Held;
pub(crate) use self::engine::{Engine, FreezeError, Kernel};
pub(crate) use self::hooks::{Hooks, kill_group};
pub(crate) use self::label::Label;
pub(crate) use self::linux::Linux;
#[cfg(test)]
pub(crate) use self::mounts::survey;
pub(crate) use self::mounts::{Superblock, mountpoints};
pub(crate) use self::progress::{Freezing, Phase};
pub(crate) use self::report::{Cause, REPORT, milliseconds};
use self::report::{Outcome, Report, Thaw};
use crate::watchdog::{Past, Watchdog};
use crate::{log, pidfile};

/// In the state directory for as long as filesystems may be frozen.
pub(crate) const STATE_FILE: &str = "qga.state.isfrozen";

/// Knows what is frozen, and freezes and thaws.
#[derive(Debug)]
pub(crate) struct Freezer<K: Kernel> {
    // Fixed configuration.
    engine: Engine<K>,
    hooks: Hooks,
    /// The lease of a freeze that asks for none.
    lease: Option<Duration>,
    state_file: PathBuf,
    // Wiring.
    freezing: Arc<Freezing>,
    watchdog: Arc<Watchdog>,
    // Volatile state.
    /// In the order of freezing. Those a former agent froze are here only if its watchdog held them.
    held: Vec<Held<K::Handle>>,
    /// Hooks that were told of a freeze and not of its end.
    owed: Vec<PathBuf>,
    /// A former agent's watchdog has thawed, for this reason, and the rest is still to be done.
    unfinished: Option<Cause>,
}

/// What to freeze, and for how long.
#[derive(Clone, Debug, Default)]
pub(crate) struct Selection {
    /// All if absent.
    pub(crate) mountpoints: Option<Vec<PathBuf>>,
    /// The usual lease if absent; zero for none.
    pub(crate) lease: Option<Duration>,
}

impl<K: Kernel> Freezer<K>
where
    K::Handle: AsFd + From<OwnedFd> + Send + Sync + 'static,
{
    /// Thawed, unless a former agent left something frozen.
    pub(crate) fn new(
        kernel: K,
        statedir: &Path,
        hooks: Hooks,
        lease: Option<Duration>,
        (watchdog, past): (Arc<Watchdog>, Past),
    ) -> io::Result<Self> {
        let mut freezer = Self {
            engine: Engine::new(kernel),
            hooks,
            lease,
            state_file: statedir.join(STATE_FILE),
            freezing: Arc::new(Freezing::new()?),
            watchdog,
            held: Vec::new(),
            owed: Vec::new(),
            unfinished: None,
        };
        match past {
            Past::Left(inheritance) => freezer.inherit(inheritance),
            Past::Unknown => freezer.look_for_state_file(),
            Past::Elsewhere => {}
        }
        if !freezer.is_frozen() {
            freezer.watchdog.listen();
        }
        Ok(freezer)
    }

    /// Why [`thaw_for`](Self::thaw_for) is to be called first of all.
    pub(crate) fn unfinished(&self) -> Option<Cause> {
        self.unfinished
    }

    /// What other threads may know.
    pub(crate) fn freezing(&self) -> &Arc<Freezing> {
        &self.freezing
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.freezing.is_frozen()
    }

    /// Freezes every filesystem on a block device, or those selected; returns how many. Filesystems that
    /// cannot freeze and those that somebody else froze do not count.
    ///
    /// # Errors
    ///
    /// The first failure, after everything was thawed again.
    pub(crate) fn freeze(&mut self, selection: &Selection) -> Result<u64, FreezeError> {
        let lease = selection.lease.or(self.lease).filter(|lease| !lease.is_zero());
        let number = self.freezing.begin(lease);
        let result = self.try_freeze(number, selection, lease);
        let result = match result {
            Ok(count) if count > 0 => match self.freezing.complete() {
                Ok(()) => return Ok(count),
                Err(why) => Err(FreezeError::Cancelled(why)),
            },
            other => other,
        };
        match &result {
            Ok(_) => {}
            Err(error) => self.freezing.with_report(|report| report.error = Some(error.text())),
        }
        // Nothing frozen is no failure, and still the end: hooks may have run.
        if let Err(error) = self.settle(Cause::Failure, false, false) {
            log::error(format_args!("{} after a freeze that failed", error.text()));
        }
        if result.is_ok() {
            self.freezing.with_report(|report| report.thawed_by = None);
        }
        result
    }

    fn try_freeze(
        &mut self,
        number: u64,
        selection: &Selection,
        lease: Option<Duration>,
    ) -> Result<u64, FreezeError> {
        let incarnation = self.watchdog.incarnation();
        self.watchdog.begin(number, !self.hooks.is_empty()).map_err(FreezeError::Watchdog)?;
        self.run_freeze_hooks()?;
        self.hold(selection.mountpoints.as_deref())?;
        for held in &self.held {
            self.check_cancelled()?;
            self.engine.sync(held);
        }
        self.check_cancelled()?;
        // From here on nothing may wait for a disk.
        log::hold();
        if let Err(error) = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE) {
            log::debug(format_args!("Cannot lock memory: {error}"));
        }
        if let Err(error) = self.create_state_file() {
            log::warning(format_args!("Cannot create {}: {error}", self.state_file.display()));
        }
        // In this order: a watchdog that is replaced meanwhile is told of everything by the main loop.
        self.arm(lease);
        self.watchdog.arm(lease, lease).map_err(FreezeError::Watchdog)?;
        if self.watchdog.incarnation() != incarnation {
            return Err(FreezeError::Watchdog(ErrorKind::BrokenPipe.into()));
        }
        self.freeze_held()
    }

    /// From now on filesystems may be frozen.
    fn arm(&mut self, left: Option<Duration>) {
        let guard = |held: &Held<K::Handle>| {
            let handle: Arc<dyn AsFd + Send + Sync> = Arc::clone(&held.handle) as _;
            (held.superblock.label(), handle)
        };
        self.freezing.arm(left, self.held.iter().map(guard).collect(), !self.owed.is_empty());
    }

    fn run_freeze_hooks(&mut self) -> Result<(), FreezeError> {
        let Self { hooks, freezing, owed, watchdog, .. } = self;
        // Who takes over from a dead agent has to know which hook may still be running.
        let tell = |group| drop(watchdog.hook(group));
        let ran = hooks.freeze(freezing.cancelled(), tell, |run| {
            if run.started {
                owed.push(run.program.clone());
            }
            freezing.with_report(|report| report.hooks.push(run));
        });
        self.check_cancelled()?;
        ran.map_err(FreezeError::Hook)
    }

    /// Opens what is to be frozen, and has the watchdog hold it, too.
    fn hold(&mut self, mountpoints: Option<&[PathBuf]>) -> Result<(), FreezeError> {
        let mut survey = self.engine.survey()?;
        if let Some(mountpoints) = mountpoints {
            survey.superblocks.retain(|superblock| {
                superblock.mounts().any(|mount| mountpoints.contains(&mount.mountpoint))
            });
            survey.others.clear();
        }
        self.held = self.engine.open_all(&survey.superblocks)?;
        for held in &self.held {
            let fd = held.handle.as_fd();
            self.watchdog.hold(held.superblock.label(), fd).map_err(FreezeError::Watchdog)?;
        }
        self.freezing.with_report(|report| {
            report.filesystems = self.held.iter().map(Held::record).collect();
            report.others = survey.others;
        });
        Ok(())
    }

    fn freeze_held(&mut self) -> Result<u64, FreezeError> {
        let mut count = 0;
        for (index, held) in self.held.iter().enumerate() {
            self.check_cancelled()?;
            let mut record = held.record();
            self.freezing.with_report(|report| {
                if let Some(record) = report.filesystems.get_mut(index) {
                    record.outcome = Outcome::Freezing;
                }
            });
            let result = self.engine.freeze(held, &mut record);
            count += u64::from(record.outcome == Outcome::Frozen);
            self.freezing.with_report(|report| {
                if let Some(place) = report.filesystems.get_mut(index) {
                    *place = record;
                }
            });
            result?;
        }
        self.check_cancelled()?;
        Ok(count)
    }

    fn check_cancelled(&self) -> Result<(), FreezeError> {
        self.freezing.cancel_reason().map_or(Ok(()), |why| Err(FreezeError::Cancelled(why)))
    }

    /// Thaws everything, whoever froze it and whether or not anything is known to be frozen; returns
    /// how many filesystems were frozen.
    ///
    /// # Errors
    ///
    /// When a filesystem stays frozen, or when it cannot be told what is mounted and nothing was
    /// thawed. The state stays "frozen" then, and another thaw is allowed.
    pub(crate) fn thaw(&mut self) -> Result<u64, FreezeError> {
        self.settle(Cause::Command, true, true)
    }

    /// Thaws what this agent, or a former one, froze, without being asked by the host.
    pub(crate) fn thaw_for(&mut self, cause: Cause) -> Result<u64, FreezeError> {
        if !self.is_frozen() {
            return Ok(0);
        }
        // Without descriptors there are only the mount points to go by.
        let everywhere = self.held.is_empty();
        self.settle(cause, everywhere, false)
    }

    /// `everywhere`: also what nobody here has frozen. `all_hooks`: also those that were told of no freeze.
    fn settle(&mut self, cause: Cause, everywhere: bool, all_hooks: bool) -> Result<u64, FreezeError> {
        let was_frozen = self.is_frozen();
        if was_frozen {
            self.freezing.enter(Phase::Thawing);
        }
        match self.thaw_filesystems(everywhere) {
            Ok(count) => {
                if was_frozen {
                    self.finish(cause);
                }
                self.run_thaw_hooks(all_hooks);
                self.tell_watchdog(self.watchdog.end());
                self.watchdog.listen();
                Ok(count)
            }
            Err(error) => {
                if was_frozen {
                    self.freezing.enter(Phase::Frozen);
                }
                Err(error)
            }
        }
    }

    /// Thaws those held and, if asked to, all others; what does not thaw stays held.
    fn thaw_filesystems(&mut self, everywhere: bool) -> Result<u64, FreezeError> {
        let (mut count, mut failure) = (0, None);
        let (mut seen, mut stuck) = (Vec::new(), Vec::new());
        for held in std::mem::take(&mut self.held).into_iter().rev() {
            let (outcome, result) = self.engine.thaw_held(&held);
            self.freezing.with_report(|report| note_thaw(report, &held.superblock, outcome));
            match result {
                Ok(thawed) => {
                    count += u64::from(thawed);
                    seen.push(held.superblock.identity());
                }
                Err(error) => {
                    failure.get_or_insert(error);
                    stuck.push(held);
                }
            }
        }
        stuck.reverse();
        self.held = stuck;
        if everywhere {
            match self.engine.thaw_others(&seen) {
                Ok(others) => count += others,
                Err(error) if count == 0 => failure = failure.or(Some(error)),
                Err(error) => log::warning(format_args!("{}", error.text())),
            }
        }
        failure.map_or(Ok(count), Err)
    }

    /// Nothing is frozen any more.
    fn finish(&mut self, cause: Cause) {
        self.tell_watchdog(self.watchdog.thawed(cause));
        let _ = munlockall();
        remove_state_file_at(&self.state_file);
        self.freezing.thawed(cause);
        log::release();
        pidfile::release();
    }

    /// Every hook that was told of the freeze is told of its end. One that fails does not undo the thaw.
    fn run_thaw_hooks(&mut self, all: bool) {
        let mut programs = std::mem::take(&mut self.owed);
        if programs.is_empty() && all {
            // A thaw is unconditional; so is its hook.
            programs = self.hooks.programs();
        }
        self.hooks.thaw(&programs, |run| {
            if let Some(error) = &run.error {
                log::warning(format_args!("{} after the thaw: {}", run.program.display(), error.trim_end()));
            }
            self.freezing.with_report(|report| report.hooks.push(run));
        });
    }

    /// As the reference: readable by its owner, empty, left as it is if it is there.
    fn create_state_file(&self) -> io::Result<()> {
        OpenOptions::new().append(true).create(true).mode(0o600).open(&self.state_file).map(drop)
    }

    /// A watchdog that died is replaced by the main loop.
    fn tell_watchdog(&self, told: io::Result<()>) {
        if let Err(error) = told {
            log::warning(format_args!("Cannot tell the watchdog: {error}"));
        }
    }
}

fn note_thaw(report: &mut Report, superblock: &Superblock, outcome: Thaw) {
    let same = |record: &&mut report::Filesystem| record.identity == superblock.identity();
    if let Some(record) = report.filesystems.iter_mut().find(same)
        && record.outcome == Outcome::Frozen
    {
        record.thaw = Some(outcome);
    }
}

/// Thaws until the kernel says that there is nothing to thaw, or `go_on` says no; whether the kernel said so.
pub(crate) fn thaw_fully(fd: impl AsFd, go_on: impl Fn() -> bool) -> bool {
    for _ in 0..engine::THAWS {
        if !go_on() {
            return false;
        }
        match linux::thaw_once(&fd) {
            Ok(()) => {}
            Err(error) => return matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)),
        }
    }
    false
}

/// Removes the state file of this directory, once nothing is frozen.
pub(crate) fn remove_state_file(statedir: &Path) {
    remove_state_file_at(&statedir.join(STATE_FILE));
}

fn remove_state_file_at(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            log::warning(format_args!("Cannot remove {}: {error}", path.display()));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests;
