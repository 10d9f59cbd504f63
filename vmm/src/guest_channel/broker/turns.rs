//! Whose turn it is: what is sent next, what overtakes it, and what has waited for too long.

use std::time::Instant;

use protocol::Error;

use super::super::Client;
use super::super::command::{Command, Kind};
use super::super::in_flight::{Asker, Ending, InFlight};
use super::super::out_of_band::Ability;
use super::{Broker, Link, Outcome, Queued};

impl Broker {
    /// Sends what the guest can take now.
    pub(super) fn pump(&mut self, now: Instant) {
        if !self.is_ready() {
            return;
        }
        self.overtake(now);
        let thaw = self.queue.iter().position(|queued| queued.command.kind == Kind::Thaw);
        match &self.link {
            Link::Idle => {}
            Link::Busy(freeze) if thaw.is_some() && self.can_cancel(freeze) => {
                let text = format!("A thaw was asked for before '{}' was answered", freeze.name);
                return self.finish(Ending::Unknown(Error::generic(text)), now);
            }
            _ => return,
        }
        if self.freezes.is_due(self.guest_time(now)) {
            if let Some(Queued { client, command, .. }) = thaw.and_then(|index| self.queue.remove(index)) {
                return self.dispatch(Asker::Client(client), command, now);
            }
            tracing::warn!("Nobody answers for the freeze any more, thawing");
            return self.dispatch(Asker::Broker, Command::thaw(), now);
        }
        // A thaw that would cancel a freeze goes before it.
        let thaw = thaw.filter(|_| self.out_of_band.ability() == Ability::Present);
        let first = || self.queue.iter().position(|queued| !self.overtakes(queued));
        let Some(next) = thaw.or_else(first) else { return };
        if self.needs_ability(&self.queue[next]) {
            self.dispatch(Asker::Broker, Command::info(), now);
        } else if let Some(Queued { client, command, .. }) = self.queue.remove(next) {
            self.dispatch(Asker::Client(client), command, now);
        }
    }

    /// Sends what does not wait for the command in flight.
    fn overtake(&mut self, now: Instant) {
        while self.out_of_band.has_room()
            && let Some(next) = self.queue.iter().position(|queued| self.overtakes(queued))
            && let Some(request) = self.queue.remove(next)
        {
            let id = self.token();
            self.outbox.append(request.command.out_of_band_line(id));
            let deadline = self.guest_time(now) + self.config.timeout;
            self.out_of_band.expect(id, request, deadline, self.is_freezing_or_thawing());
        }
    }

    /// Whether a request is asked out of band. The owner's status is not: it renews the agent's lease.
    fn overtakes(&self, queued: &Queued) -> bool {
        let renews = queued.command.kind == Kind::Status && self.freezes.is_owner(queued.client);
        let present = self.out_of_band.ability() == Ability::Present;
        present && queued.command.overtaking.is_some() && !renews
    }

    /// Whether the agent has to be known before a request is sent: others may have to wait for it, or it would
    /// renew the lease of a freeze that its client did not make.
    fn needs_ability(&self, queued: &Queued) -> bool {
        let is_status = queued.command.kind == Kind::Status;
        let meddles = is_status && self.freezes.is_frozen() && !self.freezes.is_owner(queued.client);
        let slow = queued.command.overtaking.is_none();
        self.out_of_band.ability() == Ability::Unknown && (slow || meddles)
    }

    fn is_freezing_or_thawing(&self) -> bool {
        matches!(&self.link, Link::Busy(command) if matches!(command.kind, Kind::Freeze | Kind::Thaw))
    }

    /// Whether the agent ends this command when it is told to thaw, as soon as the kernel lets it. Others thaw when
    /// the freeze is done.
    fn can_cancel(&self, command: &InFlight) -> bool {
        command.kind == Kind::Freeze && self.out_of_band.ability() == Ability::Present
    }

    /// Nobody waits for the answer to this client's command any more.
    pub(super) fn orphan_command(&mut self, client: Client, now: Instant) {
        let Link::Busy(command) = &mut self.link else { return };
        if command.asker != Asker::Client(client) {
            return;
        }
        command.asker = Asker::Nobody;
        if let Link::Busy(command) = &self.link
            && self.can_cancel(command)
        {
            self.finish(Ending::Unknown(Error::generic("Nobody waits for the freeze any more")), now);
        }
    }

    /// A client synchronises and so waits for nothing it asked before. True if that makes a difference: the command
    /// may take long, and the agent can be asked beside it. Otherwise its answer comes first, as ever.
    pub(in super::super) fn start_afresh(&mut self, client: Client, now: Instant) -> bool {
        if self.out_of_band.ability() != Ability::Present {
            return false;
        }
        let is_given_up = |queued: &Queued| queued.client == client && queued.command.kind.may_take_long();
        if let Some(index) = self.queue.iter().position(is_given_up) {
            self.queue.remove(index);
            return true;
        }
        let is_working = matches!(&self.link, Link::Busy(command)
            if command.asker == Asker::Client(client) && command.kind.may_take_long());
        if is_working {
            self.orphan_command(client, now);
        }
        is_working
    }

    /// What was asked out of band is lost.
    pub(super) fn ask_again_in_turn(&mut self) {
        for request in self.out_of_band.take_lost() {
            self.queue.push_front(request);
        }
    }

    /// Whether the guest is there: in step, and running.
    fn is_ready(&self) -> bool {
        matches!(self.link, Link::Idle | Link::Busy(_)) && self.stopped_since.is_none()
    }

    /// How long a request may wait for the guest to be there; `None` while it is.
    pub(super) fn held_until(&self, queued: &Queued) -> Option<Instant> {
        if self.is_ready() {
            return None;
        }
        let since = self.unready_since.map_or(queued.arrived, |since| since.max(queued.arrived));
        Some(since + self.config.hold)
    }

    pub(super) fn refuse_held(&mut self, now: Instant) {
        let text = match self.link {
            Link::Closed => "Guest agent is not connected",
            _ if self.stopped_since.is_some() => "Guest agent cannot answer: the virtual machine is stopped",
            _ => "Guest agent is not responding",
        };
        for queued in std::mem::take(&mut self.queue) {
            if self.held_until(&queued).is_some_and(|until| until <= now) {
                let result = Some(Err(Error::generic(text)));
                self.outcomes.push(Outcome { client: queued.client, result });
            } else {
                self.queue.push_back(queued);
            }
        }
    }
}
