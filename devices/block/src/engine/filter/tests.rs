//! Over real files, with both engines.

use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use tempfile::NamedTempFile;

use super::fault::{FaultOperation, MAX_DELAY, MAX_RULES};
use super::throttle::{Rate, Rates};
use super::*;
use crate::disk::Disk;
use crate::engine::tests::{buffer, errno, image, kinds};
use crate::engine::{Completion, Engine, EngineKind, EngineOptions};
use crate::options::DiskOptions;

const TIMEOUT: Duration = Duration::from_secs(60);

struct Rig {
    engine: Engine,
    filters: Filters,
    image: NamedTempFile,
    next: u64,
}

impl Rig {
    fn new(kind: EngineKind) -> Self {
        let image = image(1 << 20);
        let disk = Disk::open(DiskOptions::path(image.path())).unwrap();
        let filters = Filters::new().unwrap();
        let options = EngineOptions {
            kind: Some(kind),
            depth: 4,
            filters: Some(filters.clone()),
            ..Default::default()
        };
        Self { engine: Engine::start(disk, &options).unwrap(), filters, image, next: 0 }
    }

    fn queue(&mut self, operation: Operation) -> u64 {
        self.next += 1;
        // SAFETY: every test keeps its buffers until the operation was waited for.
        #[expect(unsafe_code, reason = "the contract of queue")]
        unsafe {
            self.engine.queue(self.next, operation);
        }
        self.next
    }

    /// Waits for so many; fails when the event is readable for nothing all the time.
    fn finish(&mut self, count: usize) -> Vec<Completion> {
        let (deadline, mut rounds) = (Instant::now() + TIMEOUT, 0);
        let mut completions = Vec::new();
        self.engine.submit().unwrap();
        loop {
            self.engine.reap(&mut completions).unwrap();
            if completions.len() >= count {
                return completions;
            }
            assert!(Instant::now() < deadline, "operations are stuck");
            self.engine.wait(Duration::from_secs(5));
            rounds += 1;
            assert!(rounds < 100 * (count + 1), "a busy loop");
        }
    }

    fn run(&mut self, operation: Operation) -> Result<(), Errno> {
        let token = self.queue(operation);
        let completions = self.finish(1);
        assert_eq!((completions.len(), completions[0].token), (1, token));
        assert_eq!(self.engine.in_flight(), 0);
        completions[0].result
    }

    fn write(&mut self, sector: u64, bytes: &mut [u8]) -> Result<(), Errno> {
        self.run(Operation::Write { offset: sector * 512, buffers: vec![buffer(bytes)] })
    }

    fn read(&mut self, sector: u64, bytes: &mut [u8]) -> Result<(), Errno> {
        self.run(Operation::Read { offset: sector * 512, buffers: vec![buffer(bytes)] })
    }

    fn add(&self, operation: FaultOperation, adjust: impl FnOnce(&mut FaultRule)) -> u64 {
        let mut rule = FaultRule::new(operation);
        adjust(&mut rule);
        self.filters.add_fault(rule).unwrap()
    }
}

fn eio(rule: &mut FaultRule) {
    rule.errno = Some(Errno::new(libc::EIO));
}

fn per_second(operations: u64) -> ThrottleLimits {
    let total = Rate { average: operations, ..Rate::default() };
    ThrottleLimits { operations: Rates { total, ..Rates::default() }, ..ThrottleLimits::default() }
}

fn is_quiet(rig: &Rig) -> bool {
    !crate::event::wait_readable(rig.engine.event(), Duration::ZERO)
}

#[test]
fn an_error_hits_the_sectors_it_is_about_and_no_other() {
    for kind in kinds() {
        let mut rig = Rig::new(kind);
        let id = rig.add(FaultOperation::Write, |rule| {
            eio(rule);
            rule.sectors = Some((100, 101));
        });
        let mut data = [7; 1024];
        assert_eq!(rig.write(98, &mut data), Ok(()));
        assert_eq!(rig.write(99, &mut data), errno(libc::EIO));
        assert_eq!(rig.write(101, &mut data), errno(libc::EIO));
        assert_eq!(rig.write(102, &mut data), Ok(()));
        let mut there = [1; 1024];
        assert_eq!(rig.read(100, &mut there), Ok(()));
        assert_eq!(there, [0; 1024], "nothing was written");
        assert_eq!(rig.run(Operation::Flush), Ok(()));
        let status = rig.filters.faults().remove(0);
        assert_eq!((status.id, status.matched, status.hits), (id, 2, 2));
        assert!(rig.filters.remove_fault(id) && !rig.filters.remove_fault(id));
        assert_eq!(rig.write(100, &mut data), Ok(()));
        assert!(rig.filters.faults().is_empty() && is_quiet(&rig));
    }
}

#[test]
fn every_operation_can_fail_and_the_first_rule_counts() {
    let mut rig = Rig::new(EngineKind::Threads);
    let mut data = [0; 512];
    let buffers = vec![buffer(&mut data)];
    let operations = [
        (FaultOperation::Read, Operation::Read { offset: 0, buffers: buffers.clone() }),
        (FaultOperation::Write, Operation::Write { offset: 0, buffers }),
        (FaultOperation::Flush, Operation::Flush),
        (FaultOperation::Discard, Operation::Discard { offset: 0, length: 4096 }),
        (FaultOperation::Zeroes, Operation::WriteZeroes { offset: 0, length: 4096, unmap: true }),
    ];
    for (kind, operation) in &operations {
        let id = rig.add(*kind, eio);
        for (other, operation) in &operations {
            let expected = if other == kind { errno(libc::EIO) } else { Ok(()) };
            assert_eq!(rig.run(operation.clone()), expected, "{other:?} under a rule for {kind:?}");
        }
        let any = rig.add(FaultOperation::Any, |rule| rule.errno = Some(Errno::new(libc::ENOSPC)));
        assert_eq!(rig.run(operation.clone()), errno(libc::EIO));
        rig.filters.remove_fault(id);
        assert_eq!(rig.run(operation.clone()), errno(libc::ENOSPC));
        rig.filters.remove_fault(any);
    }
}

#[test]
fn a_rule_waits_for_its_turn_and_is_spent() {
    let mut rig = Rig::new(EngineKind::Threads);
    rig.add(FaultOperation::Write, |rule| {
        eio(rule);
        (rule.after, rule.count) = (2, 3);
    });
    let results: Vec<_> = (0..8).map(|_| rig.write(0, &mut [1; 512]).is_ok()).collect();
    assert_eq!(results, [true, true, false, false, false, true, true, true]);
    let status = rig.filters.faults().remove(0);
    assert_eq!((status.matched, status.hits), (5, 3));
}

#[test]
fn of_a_torn_write_only_the_beginning_lands() {
    for kind in kinds() {
        let mut rig = Rig::new(kind);
        let mut data = [9; 2048];
        let torn = |length, errno| {
            move |rule: &mut FaultRule| {
                (rule.torn, rule.errno, rule.count) = (Some(length), errno, 1);
            }
        };
        rig.add(FaultOperation::Write, torn(700, None));
        rig.add(FaultOperation::Write, torn(512, Some(Errno::new(libc::EIO))));
        rig.add(FaultOperation::Write, torn(0, None));
        let [first, second] = data.split_at_mut(600).into();
        let buffers = vec![buffer(first), buffer(second)];
        assert_eq!(rig.run(Operation::Write { offset: 0, buffers }), Ok(()));
        assert_eq!(rig.write(8, &mut data), errno(libc::EIO));
        assert_eq!(rig.write(16, &mut data), Ok(()));
        let mut image = vec![0; 24 * 512];
        rig.image.as_file().read_exact_at(&mut image, 0).unwrap();
        let landed: Vec<_> = (0..image.len()).filter(|at| image[*at] == 9).collect();
        let expected: Vec<_> = (0..700).chain(4096..4608).collect();
        assert_eq!(landed, expected);
    }
}

#[test]
fn a_delay_holds_its_operation_alone() {
    for kind in kinds() {
        let mut rig = Rig::new(kind);
        rig.add(FaultOperation::Write, |rule| {
            rule.delay = Duration::from_millis(1000);
            rule.sectors = Some((0, 0));
        });
        rig.add(FaultOperation::Flush, |rule| {
            eio(rule);
            rule.delay = Duration::from_millis(500);
        });
        let (mut slow, mut quick) = ([1; 512], [2; 512]);
        let start = Instant::now();
        let write = |offset, bytes: &mut [u8]| Operation::Write { offset, buffers: vec![buffer(bytes)] };
        let slow = rig.queue(write(0, &mut slow));
        let refused = rig.queue(Operation::Flush);
        let quick = rig.queue(write(512, &mut quick));
        assert_eq!(rig.finish(1)[0].token, quick);
        assert_eq!(rig.engine.in_flight(), 2);
        assert_eq!(rig.finish(1), [Completion { token: refused, result: errno(libc::EIO) }]);
        assert!(start.elapsed() >= Duration::from_millis(500));
        assert_eq!(rig.finish(1), [Completion { token: slow, result: Ok(()) }]);
        assert!(start.elapsed() >= Duration::from_millis(1000));
        assert!(rig.engine.in_flight() == 0 && is_quiet(&rig));
    }
}

#[test]
fn a_limit_is_kept_and_flushes_are_free() {
    for kind in kinds() {
        let mut rig = Rig::new(kind);
        rig.filters.set_limits(per_second(25)).unwrap();
        let mut data = [3; 512];
        let start = Instant::now();
        let tokens: Vec<_> = (0..40)
            .map(|sector| {
                rig.queue(Operation::Write { offset: sector * 512, buffers: vec![buffer(&mut data)] })
            })
            .collect();
        let flush = rig.queue(Operation::Flush);
        assert_eq!(rig.engine.in_flight(), 41);
        let mut done = rig.finish(41);
        let elapsed = start.elapsed();
        // Two at once, and one that makes the bucket full.
        assert!(elapsed >= Duration::from_millis(1400), "{elapsed:?}");
        assert!(elapsed < Duration::from_secs(20), "{elapsed:?}");
        let at = done.iter().position(|completion| completion.token == flush).unwrap();
        assert!(at < 40, "the flush was the last");
        done.remove(at);
        // Those that may go together may come back in any order.
        let mut done: Vec<_> = done.iter().map(|completion| completion.token).collect();
        done.sort_unstable();
        assert_eq!(done, tokens);
        assert!(is_quiet(&rig));
    }
}

#[test]
fn what_waits_goes_in_order_and_directions_take_turns() {
    let handle = Filters::new().unwrap();
    handle.set_limits(per_second(10)).unwrap();
    let mut filter = Filter::new(handle, Scope::Device).unwrap();
    let mut now = Instant::now() + Duration::from_secs(1);
    for token in 0..9 {
        let operation = match token % 3 {
            0 => Operation::Read { offset: 0, buffers: Vec::new() },
            _ => Operation::Write { offset: 0, buffers: Vec::new() },
        };
        filter.offer(Asked { token, operation: Some(operation), aside: false, fails: None }, now);
    }
    let mut passed = Vec::new();
    while filter.held() > 0 {
        passed.extend(filter.ready.drain(..).map(|asked| asked.token));
        now += Duration::from_millis(110);
        filter.release(now);
    }
    // One at once and one that makes the bucket full; then by turns, as long as there are reads.
    assert_eq!(passed, [0, 1, 3, 2, 6, 4, 5, 7, 8]);
}

#[test]
fn nothing_waits_once_limits_are_lifted_changed_or_do_not_apply() {
    for kind in kinds() {
        let mut rig = Rig::new(kind);
        let mut data = [3; 512];
        for lift in 0..3 {
            rig.filters.set_limits(per_second(1)).unwrap();
            rig.engine.set_throttled(true);
            for sector in 0..20 {
                rig.queue(Operation::Read { offset: sector * 512, buffers: vec![buffer(&mut data)] });
            }
            let start = Instant::now();
            assert_eq!(rig.finish(1).len(), 1, "all others wait");
            match lift {
                0 => rig.engine.set_throttled(false),
                1 => {
                    // From another thread, while the engine's owner sleeps.
                    let filters = rig.filters.clone();
                    std::thread::spawn(move || filters.set_limits(ThrottleLimits::default()).unwrap());
                }
                _ => {
                    // What is not the device's own is not limited.
                    let operation = Operation::Read { offset: 0, buffers: vec![buffer(&mut data)] };
                    #[expect(unsafe_code, reason = "the contract of queue_aside")]
                    // SAFETY: the buffer stays until it was waited for.
                    unsafe {
                        rig.engine.queue_aside(1000, operation);
                    }
                    assert_eq!(rig.finish(1)[0].token, 1000);
                    rig.filters.set_limits(per_second(100_000)).unwrap();
                }
            }
            assert_eq!(rig.finish(19).len(), 19);
            assert!(start.elapsed() < Duration::from_secs(2), "lifted at once");
            assert!(rig.engine.in_flight() == 0 && is_quiet(&rig));
        }
    }
}

#[test]
fn an_engine_that_is_dropped_forgets_what_waits() {
    for kind in kinds() {
        let mut rig = Rig::new(kind);
        rig.filters.set_limits(per_second(1)).unwrap();
        rig.add(FaultOperation::Write, |rule| rule.delay = MAX_DELAY);
        let mut data = [3; 512];
        for offset in [0, 512, 1024] {
            rig.queue(Operation::Write { offset, buffers: vec![buffer(&mut data)] });
            rig.queue(Operation::Read { offset, buffers: vec![buffer(&mut data)] });
        }
        rig.engine.submit().unwrap();
        let start = Instant::now();
        drop(rig);
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}

#[test]
fn the_handle_takes_its_limits_to_another_engine() {
    let mut first = Rig::new(EngineKind::Threads);
    first.filters.set_limits(per_second(20)).unwrap();
    let mut second = Rig::new(EngineKind::Threads);
    second.engine.set_filters(Some(first.filters.clone()), None).unwrap();
    first.engine.set_filters(None, None).unwrap();
    let start = Instant::now();
    for _ in 0..10 {
        second.read(0, &mut [0; 512]).unwrap();
        first.read(0, &mut [0; 512]).unwrap();
    }
    assert!(start.elapsed() >= Duration::from_millis(300));
}

#[test]
fn rules_that_make_no_sense_are_refused() {
    let filters = Filters::new().unwrap();
    let refusal = |operation, adjust: &dyn Fn(&mut FaultRule)| {
        let mut rule = FaultRule::new(operation);
        adjust(&mut rule);
        filters.add_fault(rule).unwrap_err()
    };
    assert_eq!(refusal(FaultOperation::Read, &|_| ()), RuleError::NoEffect);
    assert_eq!(refusal(FaultOperation::Read, &|rule| rule.torn = Some(1)), RuleError::Torn);
    assert_eq!(refusal(FaultOperation::Read, &|rule| rule.delay = Duration::from_secs(31)), RuleError::Delay);
    let sectors = |range| {
        move |rule: &mut FaultRule| {
            eio(rule);
            rule.sectors = Some(range);
        }
    };
    assert_eq!(refusal(FaultOperation::Read, &sectors((2, 1))), RuleError::Sectors);
    assert_eq!(refusal(FaultOperation::Flush, &sectors((1, 2))), RuleError::FlushSectors);
    let mut rule = FaultRule::new(FaultOperation::Any);
    eio(&mut rule);
    for id in 1..=MAX_RULES as u64 {
        assert_eq!(filters.add_fault(rule.clone()), Ok(id));
    }
    assert_eq!(filters.add_fault(rule), Err(RuleError::TooMany));
}
