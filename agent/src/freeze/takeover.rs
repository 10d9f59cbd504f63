//! Taking over from a former agent: from its watchdog, which knows everything, or from the file it left.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::Freezer;
use super::engine::{Held, Kernel};
use super::progress::Phase;
use super::report::Outcome;
use crate::log;
use crate::watchdog::Inheritance;

impl<K: Kernel> Freezer<K>
where
    K::Handle: AsFd + From<OwnedFd> + Send + Sync + 'static,
{
    /// The former agent's watchdog is alive and now this agent's.
    pub(super) fn inherit(&mut self, Inheritance { handover, held }: Inheritance) {
        if handover.hooks {
            self.owed = self.hooks.programs();
        }
        if !handover.armed {
            self.tell_watchdog(self.watchdog.end());
            self.look_for_state_file();
            return;
        }
        self.freezing.begin_again(handover.number, handover.lease);
        let held = held
            .into_iter()
            .map(|(label, fd)| Held { superblock: label.into(), handle: Arc::new(fd.into()) });
        self.held = held.collect();
        self.freezing.with_report(|report| {
            report.filesystems = self.held.iter().map(Held::record).collect();
            for record in &mut report.filesystems {
                record.outcome = Outcome::Frozen;
            }
        });
        self.arm(handover.left);
        match handover.thawed {
            None => log::warning(format_args!(
                "A former agent left filesystems frozen; guest-fsfreeze-thaw thaws them"
            )),
            Some(cause) => {
                log::warning(format_args!("The watchdog thawed for a former agent: {}", cause.name()));
                self.unfinished = Some(cause);
            }
        }
        log::hold();
        self.freezing.enter(Phase::Frozen);
        if let Some(cause) = self.unfinished {
            self.freezing.lost(cause);
        }
    }

    /// No watchdog is left, but perhaps the file that the reference agent leaves, too. If it cannot be told
    /// whether it is there, a thaw does no harm.
    pub(super) fn look_for_state_file(&mut self) {
        let age = match fs::symlink_metadata(&self.state_file) {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return,
            Err(_) => Duration::ZERO,
            Ok(metadata) => {
                let since = metadata.modified().ok().and_then(|at| SystemTime::now().duration_since(at).ok());
                since.unwrap_or_default()
            }
        };
        log::warning(format_args!(
            "{} is there: filesystems may be frozen; guest-fsfreeze-thaw thaws them",
            self.state_file.display()
        ));
        log::hold();
        let number = self.freezing.begin(self.lease);
        self.freezing.enter(Phase::Frozen);
        self.freezing.with_report(|report| report.unwatched = true);
        // Those that can be opened, in case they are frozen.
        if let Ok(survey) = self.engine.survey() {
            self.held = self.engine.open_any(&survey.superblocks);
        }
        let left = self.lease.map(|lease| lease.saturating_sub(age));
        self.owed = self.hooks.programs();
        self.arm(left);
        let armed = self.watchdog.begin(number, !self.owed.is_empty()).and_then(|()| {
            let mut held = self.held.iter();
            held.try_for_each(|held| self.watchdog.hold(held.superblock.label(), held.handle.as_fd()))?;
            self.watchdog.arm(self.lease, left)
        });
        self.tell_watchdog(armed);
    }
}
