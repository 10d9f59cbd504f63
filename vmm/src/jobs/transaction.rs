//! Several things at one moment, or none of them; and jobs that succeed together, or not at all.
//!
//! ```text
//!   stage each ─▶ hold all disks ─▶ attach each ─▶ let go ─▶ begin each         refused anywhere: undo each, the last first
//!
//!   grouped:   waiting: the others wait too ─▶ all pending ─▶ [finalize any] ─▶ all completed
//!              aborting ─▶ the others are cancelled
//! ```
//!
//! While all disks are held, no request of the guest's is in flight on any of them: what their backups hold is one moment
//! of the guest. As in QEMU, what is younger goes first where jobs of a group go on together.

use protocol::Error;

use super::backup::{BackupRequest, Staged};
use super::disks::Disks;
use super::lifecycle::Request;
use super::registry::Jobs;
use super::state::JobStatus;

/// A part of a transaction.
#[derive(Debug)]
pub enum Action {
    /// Nothing of it is to happen.
    Abort,
    /// Begin to make a backup.
    Backup(BackupRequest),
}

impl Jobs {
    /// Does all of it, at one moment. If `grouped`, the jobs succeed together or not at all.
    ///
    /// # Errors
    ///
    /// The first that was refused. Nothing has happened, except that images that were made stay.
    pub fn transact(&mut self, disks: &dyn Disks, actions: &[Action], grouped: bool) -> Result<(), Error> {
        // Of no other group: its first job has this number.
        let group = grouped.then_some(self.numbers);
        let mut staged = Vec::new();
        let mut done = actions.iter().try_for_each(|action| match action {
            Action::Abort => Err(Error::generic("Transaction aborted using Abort action")),
            Action::Backup(request) => self.stage(disks, request, group).map(|backup| staged.push(backup)),
        });
        if done.is_ok() {
            done = self.attach_all(disks, &mut staged);
        }
        match done {
            Ok(()) => staged.iter().for_each(|backup| self.begin_backup(backup)),
            Err(_) => staged.into_iter().rev().for_each(|backup| self.undo(disks, backup)),
        }
        done
    }

    fn attach_all(&mut self, disks: &dyn Disks, staged: &mut [Staged]) -> Result<(), Error> {
        // One is drained when it is attached.
        let together: Vec<_> = staged.iter().map(|backup| backup.disk).collect();
        let _held = match together.len() {
            0 | 1 => None,
            _ => Some(disks.hold(&together).map_err(|error| Error::generic(error.to_string()))?),
        };
        staged.iter_mut().try_for_each(|backup| self.attach(disks, backup))
    }

    /// One of a group has got somewhere.
    pub(super) fn rally(&mut self, group: u64, disks: &dyn Disks) {
        let members = self.members(group);
        let is = |jobs: &Self, number, status| {
            jobs.position(number).is_some_and(|index| jobs.entries[index].job.status() == status)
        };
        if members.iter().any(|number| is(self, *number, JobStatus::Aborting)) {
            for number in members {
                let Some(index) = self.position(number) else { continue };
                self.entries[index].refresh(disks);
                // Those that end already refuse.
                if let Ok(steps) = self.entries[index].job.ask(Request::Cancel { force: true }) {
                    self.carry_out(number, steps, disks, false);
                }
            }
        } else if members.iter().all(|number| is(self, *number, JobStatus::Waiting)) {
            let mut by_itself = true;
            for number in members {
                let Some(index) = self.position(number) else { continue };
                let job = &mut self.entries[index].job;
                by_itself &= job.automatic().0;
                let steps = job.go_together();
                self.publish(number, &steps);
            }
            if by_itself {
                self.finish_group(group, disks);
            }
        }
    }

    /// Ends a group that is pending, one after the other.
    pub(super) fn finish_group(&mut self, group: u64, disks: &dyn Disks) {
        for number in self.members(group) {
            let Some(index) = self.position(number) else { continue };
            if let Ok(steps) = self.entries[index].job.ask(Request::Finalize) {
                self.carry_out(number, steps, disks, true);
            }
        }
    }

    /// Those that are not over, the youngest first.
    fn members(&self, group: u64) -> Vec<u64> {
        let of_group = self.entries.iter().filter(|entry| entry.group == Some(group));
        of_group.filter(|entry| !entry.job.status().is_over()).map(|entry| entry.number).rev().collect()
    }
}
