//! What the watchdog does when: a pure function, every pair of state and input decided.
//!
//! ```text
//!            Begin          Arm               lease over
//!   idle ─────────▶ begun ───────▶ watching ─────────────▶ thawing   tells the agent, tries again until End
//!    ▲                │              │   ▲                    ▲
//!    │ End            │    agent gone│   │ agent back         │ lease over, or the agent does not return
//!    └──(from any)    │              ▼   │                    │
//!                     │           orphaned ───────────────────┘   tries again until all is thawed; then removes the
//!                     │ agent gone                                state file, runs the hooks, and waits a while to
//!                     ▼                                           tell a returning agent
//!                    exit, after the hooks
//! ```

use std::time::{Duration, Instant};

use super::wire::Handover;
use crate::freeze::Cause;

/// How long an agent that died may take to return.
pub(super) const RETURN: Duration = Duration::from_secs(10);
/// Pause between two attempts to thaw: one may be in the way of another's freeze, or of an error.
const RETRY: Duration = Duration::from_secs(1);
/// How long the news of a thaw is kept for an agent that returns.
const NEWS: Duration = Duration::from_secs(600);

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Input {
    Begin {
        number: u64,
        hooks: bool,
    },
    Arm {
        lease: Option<Duration>,
        left: Option<Duration>,
    },
    Renew,
    Thaw {
        number: u64,
        cause: Cause,
    },
    Thawed(Cause),
    End,
    /// The agent's end of the socket is closed.
    AgentGone,
    /// An agent connects.
    AgentBack,
    /// SIGTERM or SIGINT.
    Terminate,
    /// Of everything held the kernel says that it is not frozen.
    AllThawed,
    /// Time has passed.
    Tick,
}

/// What to do about it, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// FITHAW everything held, until [`Input::AllThawed`].
    Thaw,
    /// Tell the agent that it was done.
    Tell { number: u64, cause: Cause },
    /// Close the descriptors held.
    Release,
    /// What the agent would have done after the thaw: remove the state file, and run the hooks if they
    /// want their thaw.
    Finish { hooks: bool },
    /// Tell the agent that returned.
    HandOver,
    /// There is an agent already.
    Refuse,
    /// When the hooks are through.
    Exit,
}

/// The state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Watch {
    orphaned: bool,
    /// A signal said so.
    ending: bool,
    freeze: Option<Freeze>,
    /// When an agent that died counts as lost.
    return_by: Option<Instant>,
    /// When to give up waiting for somebody to tell.
    exit_at: Option<Instant>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Freeze {
    number: u64,
    hooks: bool,
    armed: bool,
    lease: Option<Duration>,
    deadline: Option<Instant>,
    thawed: Option<Cause>,
    retry_at: Option<Instant>,
    /// The agent knows that all is thawed.
    told: bool,
    /// An orphan has done all there is to do.
    finished: bool,
}

impl Watch {
    pub(super) fn on(&mut self, input: Input, now: Instant) -> Vec<Action> {
        match input {
            Input::Begin { number, hooks } => {
                self.freeze = Some(Freeze { number, hooks, ..Freeze::default() });
                vec![Action::Release]
            }
            Input::Arm { lease, left } => {
                if let Some(freeze) = &mut self.freeze {
                    freeze.armed = true;
                    freeze.lease = lease;
                    freeze.deadline = left.and_then(|left| now.checked_add(left));
                }
                vec![]
            }
            Input::Renew => {
                if let Some(freeze) = &mut self.freeze {
                    freeze.deadline = freeze.lease.and_then(|lease| now.checked_add(lease));
                }
                vec![]
            }
            Input::Thaw { number, cause } => match &mut self.freeze {
                Some(freeze) if freeze.number == number => {
                    // No news to who asked for it.
                    freeze.told = true;
                    self.thaw(cause, now)
                }
                _ => vec![],
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
                self.orphaned = false;
                (self.return_by, self.exit_at) = (None, None);
                vec![Action::HandOver]
            }
            Input::Terminate => {
                self.ending = true;
                if self.orphaned { self.end(now) } else { vec![] }
            }
            Input::AllThawed => self.all_thawed(now),
            Input::Tick => self.tick(now),
        }
    }

    fn thaw(&mut self, cause: Cause, now: Instant) -> Vec<Action> {
        let Some(freeze) = &mut self.freeze else { return vec![] };
        freeze.thawed.get_or_insert(cause);
        freeze.retry_at = Some(now + RETRY);
        vec![Action::Thaw]
    }

    /// Whatever call of the agent was under way has ended when its socket closes.
    fn agent_gone(&mut self, now: Instant) -> Vec<Action> {
        if std::mem::replace(&mut self.orphaned, true) {
            return vec![];
        }
        if self.ending {
            return self.end(now);
        }
        let Some(freeze) = &mut self.freeze else { return vec![Action::Exit] };
        if !freeze.armed {
            return vec![Action::Finish { hooks: std::mem::take(&mut freeze.hooks) }, Action::Exit];
        }
        if let Some(cause) = freeze.thawed {
            return self.thaw(cause, now);
        }
        // Without a lease the agent, or who takes its place, has all the time there is.
        self.return_by = freeze.lease.and_then(|_| now.checked_add(RETURN));
        vec![]
    }

    /// Told to end, and there is no agent to see to the freeze.
    fn end(&mut self, now: Instant) -> Vec<Action> {
        match &self.freeze {
            None => vec![Action::Exit],
            Some(freeze) if freeze.finished => vec![Action::Exit],
            Some(_) => self.thaw(Cause::AgentLost, now),
        }
    }

    fn all_thawed(&mut self, now: Instant) -> Vec<Action> {
        let Some(freeze) = &mut self.freeze else { return vec![] };
        let Some(cause) = freeze.thawed else { return vec![] };
        if !self.orphaned {
            // Its first attempt may have failed where this one did not.
            let told = std::mem::replace(&mut freeze.told, true);
            return if told { vec![] } else { vec![Action::Tell { number: freeze.number, cause }] };
        }
        freeze.retry_at = None;
        self.return_by = None;
        self.exit_at = Some(now + NEWS);
        if std::mem::replace(&mut freeze.finished, true) {
            return vec![];
        }
        let mut actions = vec![Action::Release, Action::Finish { hooks: std::mem::take(&mut freeze.hooks) }];
        if self.ending {
            actions.push(Action::Exit);
        }
        actions
    }

    fn tick(&mut self, now: Instant) -> Vec<Action> {
        let is_over = |time: Option<Instant>| time.is_some_and(|time| time <= now);
        if is_over(self.exit_at) {
            return vec![Action::Exit];
        }
        let Some(freeze) = &self.freeze else { return vec![] };
        if let Some(cause) = freeze.thawed {
            return if is_over(freeze.retry_at) { self.thaw(cause, now) } else { vec![] };
        }
        let cause = match (is_over(freeze.deadline), is_over(self.return_by)) {
            (true, _) => Cause::Lease,
            (false, true) => Cause::AgentLost,
            (false, false) => return vec![],
        };
        let number = freeze.number;
        let mut actions = self.thaw(cause, now);
        if !self.orphaned {
            actions.push(Action::Tell { number, cause });
        }
        actions
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
            number: freeze.number,
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
    const FINISH: [Action; 2] = [Action::Release, Action::Finish { hooks: true }];

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
            clock.on(Input::Begin { number: 1, hooks: true });
            clock.on(Input::Arm { lease, left: lease });
            clock
        }
    }

    #[test]
    fn a_lease_that_runs_out_thaws_and_says_so_until_the_agent_has_seen_to_it() {
        let mut clock = Clock::frozen(Some(LEASE));
        assert_eq!(clock.pass(LEASE - Duration::from_millis(1)), []);
        assert_eq!(
            clock.pass(Duration::from_millis(1)),
            [Action::Thaw, Action::Tell { number: 1, cause: Cause::Lease }]
        );
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
        assert_eq!(clock.pass(RETURN), [Action::Thaw]);
        assert_eq!(clock.pass(Duration::from_secs(1)), [Action::Thaw], "it hangs");
        assert_eq!(clock.on(Input::AllThawed), FINISH);
        assert_eq!(clock.on(Input::AllThawed), []);
        assert_eq!(clock.watch.handover(clock.now).thawed, Some(Cause::AgentLost));
        assert_eq!(clock.pass(NEWS), [Action::Exit]);
    }

    #[test]
    fn a_lease_shorter_than_the_wait_for_the_agent_wins() {
        let mut clock = Clock::frozen(Some(Duration::from_secs(1)));
        clock.on(Input::AgentGone);
        assert_eq!(clock.pass(Duration::from_secs(1)), [Action::Thaw]);
        assert_eq!(clock.on(Input::AllThawed), FINISH);
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
        assert_eq!(clock.on(Input::AllThawed), [Action::Tell { number: 1, cause: Cause::Lease }]);
        assert_eq!(clock.on(Input::AllThawed), [], "the agent sees to the rest");
        assert_eq!(clock.on(Input::AgentGone), [Action::Thaw]);
        assert_eq!(clock.on(Input::AllThawed), FINISH);
    }

    #[test]
    fn an_agent_that_dies_within_its_hooks_has_frozen_nothing() {
        let mut clock = Clock::new();
        clock.on(Input::Begin { number: 1, hooks: true });
        assert_eq!(clock.on(Input::AgentGone), [Action::Finish { hooks: true }, Action::Exit]);
        let mut clock = Clock::frozen(Some(LEASE));
        clock.on(Input::Thawed(Cause::Command));
        assert_eq!(clock.on(Input::AgentGone), [Action::Thaw]);
        assert_eq!(clock.on(Input::AllThawed), FINISH);
    }

    #[test]
    fn a_cancelled_freeze_is_thawed_again_and_again_until_the_agent_says_it_is_over() {
        let mut clock = Clock::frozen(Some(LEASE));
        assert_eq!(clock.on(Input::Thaw { number: 1, cause: Cause::Failure }), [Action::Thaw]);
        assert_eq!(clock.pass(Duration::from_secs(1)), [Action::Thaw]);
        clock.on(Input::Thawed(Cause::Failure));
        assert_eq!(clock.pass(Duration::from_secs(1)), []);
        clock.on(Input::End);
        assert_eq!(clock.pass(LEASE), []);
    }

    #[test]
    fn idle_it_leaves_with_the_agent_and_does_nothing_it_is_not_asked_for() {
        let mut clock = Clock::new();
        let thaw = Input::Thaw { number: 1, cause: Cause::Failure };
        for input in [thaw, Input::Thawed(Cause::Lease), Input::Renew, Input::Tick] {
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
        assert_eq!(clock.on(Input::Terminate), [Action::Thaw]);
        let end = [Action::Release, Action::Finish { hooks: true }, Action::Exit];
        assert_eq!(clock.on(Input::AllThawed), end);
    }

    #[test]
    fn a_signal_that_came_while_the_agent_lived_is_not_forgotten() {
        let mut clock = Clock::frozen(Some(LEASE));
        clock.on(Input::Terminate);
        assert_eq!(clock.on(Input::AgentGone), [Action::Thaw]);
        assert!(clock.on(Input::AllThawed).contains(&Action::Exit));
    }

    #[test]
    fn a_thaw_of_another_freeze_does_nothing_and_one_that_was_asked_for_is_no_news() {
        let mut clock = Clock::frozen(Some(LEASE));
        assert_eq!(clock.on(Input::Thaw { number: 2, cause: Cause::Failure }), []);
        assert_eq!(clock.on(Input::Thaw { number: 1, cause: Cause::Failure }), [Action::Thaw]);
        assert_eq!(clock.on(Input::AllThawed), []);
    }

    #[test]
    fn an_agent_that_returns_to_the_news_and_dies_again_leaves_nothing_to_do() {
        let mut clock = Clock::frozen(Some(LEASE));
        clock.on(Input::AgentGone);
        clock.pass(RETURN);
        clock.on(Input::AllThawed);
        clock.on(Input::AgentBack);
        assert_eq!(clock.on(Input::AgentGone), [Action::Thaw]);
        assert_eq!(clock.on(Input::AllThawed), []);
        assert_eq!(clock.pass(NEWS), [Action::Exit]);
    }

    #[test]
    fn what_belongs_to_no_freeze_begins_none() {
        let mut clock = Clock::new();
        clock.on(Input::Arm { lease: Some(LEASE), left: Some(LEASE) });
        assert_eq!(clock.pass(LEASE * 2), []);
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
                let actions = match random(8) {
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
                    5 if thawed => clock.on(Input::AllThawed),
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
