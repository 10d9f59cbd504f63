//! The VM's disks as jobs see them: [`Disks`] of [`BlkBackend`]s.

use std::error::Error as _;
use std::io;
use std::time::Duration;

use block::{Disk, EngineOptions, MirrorAction, MirrorOptions, MirrorStatus};
use devices::virtio::blk::{BlkBackend, BlkError, MirrorOrder, MirrorReport, Ticket};

use super::create::without_number;
use super::disks::{Answer, DiskFacts, Disks, Held, NotDone};
use super::lifecycle::{Action, Order, Report};

/// How long a disk may take to finish what is in flight.
const TIMEOUT: Duration = Duration::from_secs(60);
/// The guest is held once no more bytes than this remain to be copied: a few milliseconds on a fast disk.
const HOLD_BELOW: u64 = 16 << 20;

impl Disks for Vec<BlkBackend> {
    fn count(&self) -> usize {
        self.len()
    }

    fn facts(&self, disk: usize) -> DiskFacts {
        let facts = self[disk].facts();
        DiskFacts {
            device: facts.id.to_string(),
            size: self[disk].size(),
            block_size: self[disk].block_size(),
        }
    }

    fn start_mirror(
        &self,
        disk: usize,
        target: Disk,
        engine: EngineOptions,
        options: MirrorOptions,
    ) -> Result<(), NotDone> {
        begun(&self[disk], self[disk].start_mirror(target, &engine, options))
    }

    fn start_backup(
        &self,
        disk: usize,
        target: Disk,
        engine: EngineOptions,
        options: MirrorOptions,
    ) -> Result<(), NotDone> {
        begun(&self[disk], self[disk].start_backup(target, &engine, options))
    }

    fn hold(&self, disks: &[usize]) -> Result<Held, NotDone> {
        // All of them first: they drain at the same time.
        let (holds, tickets): (Vec<_>, Vec<_>) = disks.iter().map(|disk| self[*disk].hold()).unzip();
        for ticket in tickets {
            ticket.wait(TIMEOUT).map_err(|error| not_done(&error))?;
        }
        Ok(Box::new(holds))
    }

    fn order(&self, disk: usize, order: Order) -> Answer {
        let ticket = self[disk].mirror(match order {
            Order::Pause => MirrorOrder::Pause,
            Order::Resume => MirrorOrder::Resume,
            Order::SetSpeed(speed) => MirrorOrder::SetSpeed(speed),
            Order::SetMode(mode) => MirrorOrder::SetMode(mode),
            Order::Quiesce => MirrorOrder::Quiesce { limit: HOLD_BELOW },
            Order::Switch => MirrorOrder::Switch,
            Order::Detach => MirrorOrder::Detach,
        });
        Box::new(move || ticket.wait(TIMEOUT).map_err(|error| not_done(&error)))
    }

    fn held(&self, disk: usize) -> Option<Duration> {
        self[disk].held()
    }

    fn mirror_status(&self, disk: usize) -> Option<MirrorStatus> {
        self[disk].mirror_status()
    }
}

fn begun(disk: &BlkBackend, ticket: io::Result<Ticket<()>>) -> Result<(), NotDone> {
    let ticket = ticket.map_err(|error| NotDone::Refused(format!("Cannot open the target: {error}")))?;
    ticket.wait(TIMEOUT).map_err(|error| {
        if matches!(error, BlkError::Timeout { .. }) {
            // Should it begin after all, nobody wants it any more.
            drop(disk.mirror(MirrorOrder::Detach));
        }
        not_done(&error)
    })
}

fn not_done(error: &BlkError) -> NotDone {
    let text = error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}"));
    if matches!(error, BlkError::Timeout { .. }) { NotDone::Late(text) } else { NotDone::Refused(text) }
}

impl From<MirrorReport> for Report {
    fn from(report: MirrorReport) -> Self {
        match report {
            MirrorReport::Ready => Self::Ready,
            MirrorReport::Error { is_read, action, nospace } => {
                let action = match action {
                    MirrorAction::Report => Action::Report,
                    MirrorAction::Ignore => Action::Ignore,
                    MirrorAction::Stop => Action::Stop,
                };
                Self::Error { is_read, action, nospace }
            }
            MirrorReport::Failed(error) => Self::Failed(without_number(&error).to_owned()),
            MirrorReport::Quiesced => Self::Quiesced,
            MirrorReport::Switched => Self::Switched,
            MirrorReport::Detached => Self::Detached,
        }
    }
}
