//! What the watchdog does when: a pure function, every pair of state and input decided.
//!
//! ```text
//!            Begin          Arm               lease over
//!   idle ─────────▶ begun ───────▶ watching ─────────────▶ thawed   tells the agent, tries again until End
//!    ▲                │              │   ▲                   ▲
//!    │ End            │    agent gone│   │ agent back        │ lease over, or the agent does not return
//!    └──(from any)    │              ▼   │                   │
//!                     │           orphaned ──────────────────┘   runs the hooks, removes the state file,
//!                     │ agent gone                               waits a while to tell a returning agent
//!                     ▼
//!                    exit, after the hooks
//! ```

use std::time::{Duration, Instant};

use super::wire::Handover;
use crate::freeze::Cause;

/// How long an agent that died may take to return.
pub(super) const RETURN: Duration = Duration::from_secs(10);
/// Pause between two attempts to thaw what is being frozen while the lease runs out.
const RETRY: Duration = Duration::from_secs(1);
/// How long the news of a thaw is kept for an agent that returns.
const NEWS: Duration = Duration::from_secs(600);

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Input {
    Begin {
        hooks: bool,
    },
    Arm {
        lease: Option<Duration>,
    },
    Renew,
    Thaw(Cause),
    Thawed(Cause),
    End,
    /// The agent's end of the socket is closed.
    AgentGone,
    /// An agent connects.
    AgentBack,
    /// SIGTERM or SIGINT.
    Terminate,
    /// Time has passed.
    Tick,
}

/// What to do about it, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// FITHAW everything held.
    Thaw,
    /// Tell the agent that it was done.
    Tell(Cause),
    /// Close the descriptors held.
    Release,
    /// What the agent would have done after the thaw: remove the state file, and run the hooks if they
    /// want their thaw.
    Finish {
        hooks: bool,
    },
    /// Tell the agent that returned.
    HandOver,
    /// There is an agent already.
    Refuse,
    Exit,
}

/// The state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Watch {
    orphaned: bool,
    freeze: Option<Freeze>,
    /// When an agent that died counts as lost.
    return_by: Option<Instant>,
    /// When to give up waiting for somebody to tell.
    exit_at: Option<Instant>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Freeze {
    hooks: bool,
    armed: bool,
    lease: Option<Duration>,
    deadline: Option<Instant>,
    thawed: Option<Cause>,
    retry_at: Option<Instant>,
}

impl Watch {
    pub(super) fn on(&mut self, input: Input, now: Instant) -> Vec<Action> {
        match input {
            Input::Begin { hooks } => {
                self.freeze = Some(Freeze { hooks, ..Freeze::default() });
                vec![Action::Release]
            }
            Input::Arm { lease } => {
                let freeze = self.freeze.get_or_insert_default();
                freeze.armed = true;
                freeze.lease = lease;
                freeze.deadline = lease.and_then(|lease| now.checked_add(lease));
                vec![]
            }
            Input::Renew => {
                if let Some(freeze) = &mut self.freeze {
                    freeze.deadline = freeze.lease.and_then(|lease| now.checked_add(lease));
                }
                vec![]
            }
            Input::Thaw(cause) => match &mut self.freeze {
                Some(freeze) => {
                    freeze.thawed.get_or_insert(cause);
                    freeze.retry_at = Some(now + RETRY);
                    vec![Action::Thaw]
                }
                None => vec![],
            },
            Input::Thawed(cause) => {
                if let Some(freeze) = &mut self.freeze {
                    freeze.thawed.get_or_insert(cause);
                    freeze.retry_at = None;
                }
                vec![]
            }
            Input::End => {
                self.freeze = None;
                vec![Action::Release]
            }
            Input::AgentGone => self.agent_gone(now),
            Input::AgentBack if !self.orphaned => vec![Action::Refuse],
            Input::AgentBack => {
                *self = Self { orphaned: false, return_by: None, exit_at: None, freeze: self.freeze.take() };
                vec![Action::HandOver]
            }
            Input::Terminate if !self.orphaned => vec![],
            Input::Terminate => match &self.freeze {
                Some(freeze) if freeze.thawed.is_none() => {
                    vec![Action::Thaw, Action::Finish { hooks: freeze.hooks }, Action::Exit]
                }
                _ => vec![Action::Exit],
            },
            Input::Tick => self.tick(now),
        }
    }

    /// Whatever call of the agent was under way has ended when its socket closes: one thaw is enough.
    fn agent_gone(&mut self, now: Instant) -> Vec<Action> {
        if std::mem::replace(&mut self.orphaned, true) {
            return vec![];
        }
        let Some(freeze) = &mut self.freeze else { return vec![Action::Exit] };
        if !freeze.armed {
            return vec![Action::Finish { hooks: freeze.hooks }, Action::Exit];
        }
        if freeze.thawed.is_some() {
            return self.finish(now);
        }
        // Without a lease the agent, or who takes its place, has all the time there is.
        self.return_by = freeze.lease.and_then(|_| now.checked_add(RETURN));
        vec![]
    }

    fn tick(&mut self, now: Instant) -> Vec<Action> {
        let is_over = |time: Option<Instant>| time.is_some_and(|time| time <= now);
        if is_over(self.exit_at) {
            return vec![Action::Exit];
        }
        let Some(freeze) = &mut self.freeze else { return vec![] };
        if freeze.thawed.is_some() {
            if is_over(freeze.retry_at) {
                freeze.retry_at = Some(now + RETRY);
                return vec![Action::Thaw];
            }
            return vec![];
        }
        let cause = match (is_over(freeze.deadline), is_over(self.return_by)) {
            (true, _) => Cause::Lease,
            (false, true) => Cause::AgentLost,
            (false, false) => return vec![],
        };
        freeze.thawed = Some(cause);
        if self.orphaned {
            return self.finish(now);
        }
        freeze.retry_at = Some(now + RETRY);
        vec![Action::Thaw, Action::Tell(cause)]
    }

    fn finish(&mut self, now: Instant) -> Vec<Action> {
        let hooks = self.freeze.as_mut().is_some_and(|freeze| {
            freeze.retry_at = None;
            std::mem::take(&mut freeze.hooks)
        });
        self.return_by = None;
        self.exit_at = Some(now + NEWS);
        vec![Action::Thaw, Action::Finish { hooks }]
    }

    /// When [`Input::Tick`] is next needed.
    pub(super) fn next_tick(&self) -> Option<Instant> {
        let freeze = self.freeze.as_ref();
        let waiting = freeze.filter(|freeze| freeze.thawed.is_none());
        let times = [
            self.exit_at,
            self.return_by.filter(|_| waiting.is_some()),
            waiting.and_then(|freeze| freeze.deadline),
            freeze.and_then(|freeze| freeze.retry_at),
        ];
        times.into_iter().flatten().min()
    }

    pub(super) fn handover(&self, now: Instant) -> Handover {
        let Some(freeze) = &self.freeze else { return Handover::default() };
        Handover {
            armed: freeze.armed,
            lease: freeze.lease,
            left: freeze.deadline.map(|deadline| deadline.saturating_duration_since(now)),
            hooks: freeze.hooks,
            thawed: freeze.thawed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(60);

    struct Clock {
        watch: Watch,
        now: Instant,
    }

    impl Clock {
        fn new() -> Self {
            Self { watch: Watch::default(), now: Instant::now() }
        }

        fn on(&mut self, input: Input) -> Vec<Action> {
            self.watch.on(input, self.now)
        }

        /// Lets time pass as the process would; what was done meanwhile.
        fn pass(&mut self, time: Duration) -> Vec<Action> {
            let end = self.now + time;
            let mut actions = Vec::new();
            while let Some(tick) = self.watch.next_tick().filter(|tick| *tick <= end) {
                assert!(tick > self.now || !actions.is_empty() || tick == self.now, "time runs backwards");
                self.now = self.now.max(tick);
                let done = self.on(Input::Tick);
                assert!(!done.is_empty(), "woken for nothing");
                let over = done.contains(&Action::Exit);
                actions.extend(done);
                if over {
                    break;
                }
            }
            self.now = end;
            actions
        }

        fn frozen(lease: Option<Duration>) -> Self {
            let mut clock = Self::new();
            clock.on(Input::Begin { hooks: true });
            clock.on(Input::Arm { lease });
            clock
        }
    }

    #[test]
    fn a_lease_that_runs_out_thaws_and_says_so_until_the_agent_has_seen_to_it() {
        let mut clock = Clock::frozen(Some(LEASE));
        assert_eq!(clock.pass(LEASE - Duration::from_millis(1)), []);
        assert_eq!(clock.pass(Duration::from_millis(1)), [Action::Thaw, Action::Tell(Cause::Lease)]);
        assert_eq!(clock.pass(Duration::from_secs(2)), [Action::Thaw, Action::Thaw]);
        assert_eq!(clock.on(Input::End), [Action::Release]);
        assert_eq!(clock.watch.next_tick(), None);
    }

    #[test]
    fn a_renewed_lease_begins_anew_and_no_lease_never_ends() {
        let mut clock = Clock::frozen(Some(LEASE));
        for _ in 0..5 {
            assert_eq!(clock.pass(LEASE / 2), []);
            clock.on(Input::Renew);
        }
        assert_eq!(Clock::frozen(None).pass(Duration::from_secs(1 << 20)), []);
    }

    #[test]
    fn an_agent_that_returns_in_time_goes_on_and_one_that_does_not_is_replaced() {
        let mut clock = Clock::frozen(Some(LEASE));
        assert_eq!(clock.on(Input::AgentGone), []);
        clock.pass(RETURN / 2);
        assert_eq!(clock.on(Input::AgentBack), [Action::HandOver]);
        let handover = clock.watch.handover(clock.now);
        assert_eq!((handover.lease, handover.left), (Some(LEASE), Some(LEASE - RETURN / 2)));
        assert_eq!(clock.pass(RETURN * 2), []);
        clock.on(Input::AgentGone);
        assert_eq!(clock.pass(RETURN), [Action::Thaw, Action::Finish { hooks: true }]);
        assert_eq!(clock.watch.handover(clock.now).thawed, Some(Cause::AgentLost));
        assert_eq!(clock.pass(NEWS), [Action::Exit]);
    }

    #[test]
    fn a_lease_shorter_than_the_wait_for_the_agent_wins() {
        let mut clock = Clock::frozen(Some(Duration::from_secs(1)));
        clock.on(Input::AgentGone);
        assert_eq!(clock.pass(Duration::from_secs(1)), [Action::Thaw, Action::Finish { hooks: true }]);
        assert_eq!(clock.on(Input::AgentBack), [Action::HandOver]);
        let handover = clock.watch.handover(clock.now);
        assert_eq!((handover.thawed, handover.hooks), (Some(Cause::Lease), false));
    }

    #[test]
    fn without_a_lease_an_orphaned_freeze_waits_for_whoever_comes() {
        let mut clock = Clock::frozen(None);
        clock.on(Input::AgentGone);
        assert_eq!(clock.pass(Duration::from_secs(1 << 20)), []);
        assert_eq!(clock.on(Input::AgentBack), [Action::HandOver]);
    }

    #[test]
    fn an_agent_that_dies_thawed_by_the_lease_has_its_hooks_run_for_it() {
        let mut clock = Clock::frozen(Some(LEASE));
        clock.pass(LEASE);
        assert_eq!(clock.on(Input::AgentGone), [Action::Thaw, Action::Finish { hooks: true }]);
    }

    #[test]
    fn an_agent_that_dies_within_its_hooks_has_frozen_nothing() {
        let mut clock = Clock::new();
        clock.on(Input::Begin { hooks: true });
        assert_eq!(clock.on(Input::AgentGone), [Action::Finish { hooks: true }, Action::Exit]);
        let mut clock = Clock::frozen(Some(LEASE));
        clock.on(Input::Thawed(Cause::Command));
        assert_eq!(clock.on(Input::AgentGone), [Action::Thaw, Action::Finish { hooks: true }]);
    }

    #[test]
    fn a_cancelled_freeze_is_thawed_again_and_again_until_the_agent_says_it_is_over() {
        let mut clock = Clock::frozen(Some(LEASE));
        assert_eq!(clock.on(Input::Thaw(Cause::Failure)), [Action::Thaw]);
        assert_eq!(clock.pass(Duration::from_secs(1)), [Action::Thaw]);
        clock.on(Input::Thawed(Cause::Failure));
        assert_eq!(clock.pass(Duration::from_secs(1)), []);
        clock.on(Input::End);
        assert_eq!(clock.pass(LEASE), []);
    }

    #[test]
    fn idle_it_leaves_with_the_agent_and_does_nothing_it_is_not_asked_for() {
        let mut clock = Clock::new();
        for input in [Input::Thaw(Cause::Failure), Input::Thawed(Cause::Lease), Input::Renew, Input::Tick] {
            assert_eq!(clock.on(input), [], "{input:?}");
        }
        assert_eq!(clock.on(Input::AgentBack), [Action::Refuse]);
        assert_eq!(clock.on(Input::Terminate), []);
        assert_eq!(clock.on(Input::AgentGone), [Action::Exit]);
    }

    #[test]
    fn a_signal_ends_an_orphan_after_a_thaw() {
        let mut clock = Clock::frozen(None);
        assert_eq!(clock.on(Input::Terminate), []);
        clock.on(Input::AgentGone);
        assert_eq!(clock.on(Input::Terminate), [Action::Thaw, Action::Finish { hooks: true }, Action::Exit]);
    }

    #[test]
    fn however_inputs_follow_each_other_a_freeze_with_a_lease_ends_within_it() {
        use std::hash::{BuildHasher, Hasher, RandomState};
        let seed = RandomState::new().build_hasher().finish();
        println!("seed {seed:#x}");
        let mut state = seed | 1;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        for _ in 0..2000 {
            let mut clock = Clock::frozen(Some(LEASE));
            let (mut since, mut thawed) = (clock.now, false);
            for _ in 0..20 {
                let actions = match random(7) {
                    0 => clock.on(Input::AgentGone),
                    1 => clock.on(Input::AgentBack),
                    2 => {
                        if !clock.watch.orphaned {
                            clock.on(Input::Renew);
                            since = clock.now;
                        }
                        vec![]
                    }
                    3 => clock.on(Input::Terminate),
                    4 => clock.on(Input::Tick),
                    _ => clock.pass(Duration::from_millis(random(20_000))),
                };
                thawed |= actions.contains(&Action::Thaw);
                assert!(thawed || !actions.contains(&Action::Exit), "left frozen");
                assert!(thawed || clock.now < since + LEASE, "frozen beyond the lease");
                if actions.contains(&Action::Exit) {
                    break;
                }
            }
        }
    }
}
