//! When to start a watchdog in place of one that died.

use std::time::{Duration, Instant};

/// First and longest pause before another watchdog is started.
const RESTART_FIRST: Duration = Duration::from_secs(1);
const RESTART_LONGEST: Duration = Duration::from_secs(60);

/// At once, but not again and again.
#[derive(Debug)]
pub(super) struct Restart {
    started: Instant,
    pause: Duration,
    pub(super) due: Option<Instant>,
}

impl Restart {
    pub(super) fn new() -> Self {
        Self { started: Instant::now(), pause: Duration::ZERO, due: None }
    }

    pub(super) fn died(&mut self, now: Instant) {
        let lived = now.saturating_duration_since(self.started);
        self.pause = if self.due.is_none() && lived > RESTART_LONGEST {
            Duration::ZERO
        } else {
            (self.pause * 2).clamp(RESTART_FIRST, RESTART_LONGEST)
        };
        self.due = Some(now + self.pause);
    }

    pub(super) fn succeeded(&mut self, now: Instant) {
        (self.started, self.due) = (now, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watchdog_that_keeps_dying_is_started_less_and_less_often() {
        let mut restart = Restart::new();
        let start = restart.started;
        restart.died(start + 2 * RESTART_LONGEST);
        assert_eq!(restart.due, Some(start + 2 * RESTART_LONGEST), "the first time at once");
        let mut now = start + 2 * RESTART_LONGEST;
        let mut pauses = Vec::new();
        for _ in 0..10 {
            restart.succeeded(now);
            restart.died(now);
            pauses.push(restart.pause);
            now += restart.pause;
        }
        assert_eq!(pauses[..3], [RESTART_FIRST, 2 * RESTART_FIRST, 4 * RESTART_FIRST]);
        assert_eq!(pauses[9], RESTART_LONGEST);
    }
}
