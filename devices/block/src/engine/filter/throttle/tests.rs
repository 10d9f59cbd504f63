#![expect(clippy::cast_precision_loss, reason = "small numbers")]

use super::*;
use crate::engine::tests::{Random, seed};

const MIB: u64 = 1 << 20;

fn bytes(total: Rate) -> ThrottleLimits {
    ThrottleLimits { bytes: Rates { total, ..Rates::default() }, ..ThrottleLimits::default() }
}

fn average(average: u64) -> Rate {
    Rate { average, ..Rate::default() }
}

/// A user who always has another request: when each goes through, in seconds.
fn greedy(limits: ThrottleLimits, direction: Direction, size: u64, requests: usize) -> Vec<f64> {
    let start = Instant::now();
    let (mut account, mut now) = (Account::new(limits, start), start);
    let request = |_| {
        now += account.wait(direction, now);
        assert_eq!(account.wait(direction, now), Duration::ZERO, "who has waited as told may go");
        account.pour(direction, size);
        (now - start).as_secs_f64()
    };
    (0..requests).map(request).collect()
}

#[test]
fn without_limits_nothing_waits() {
    assert!(!ThrottleLimits::default().is_limited());
    assert!(greedy(ThrottleLimits::default(), Direction::Write, 1 << 30, 100).iter().all(|at| *at == 0.0));
}

#[test]
fn the_average_is_kept_and_reached() {
    // A tenth of a second's worth at once, and the request that makes it full.
    let times = greedy(bytes(average(MIB)), Direction::Read, 64 << 10, 161);
    let at_once = times.iter().filter(|at| **at == 0.0).count();
    assert_eq!(at_once, 2);
    let last = times[160];
    assert!((9.85..=10.0).contains(&last), "{last}");
}

#[test]
fn a_request_larger_than_the_bucket_goes_and_is_paid_for_afterwards() {
    let times = greedy(bytes(average(MIB)), Direction::Write, 4 * MIB, 3);
    assert_eq!(times[0], 0.0);
    assert!((3.8..4.0).contains(&times[1]) && (7.8..8.0).contains(&times[2]), "{times:?}");
}

#[test]
fn a_burst_lasts_as_long_as_it_may_and_then_the_average_holds() {
    let rate = Rate { average: 100, burst: 1000, burst_length: 5 };
    let limits =
        ThrottleLimits { operations: Rates { total: rate, ..Rates::default() }, ..Default::default() };
    let times = greedy(limits, Direction::Read, 4096, 8000);
    let until = |second: f64| times.iter().filter(|at| **at < second).count();
    // 1000/s, of which 100/s leak away: 5000 fill the bucket within 5.6 s.
    assert!((1900..=2200).contains(&until(2.0)), "{}", until(2.0));
    assert!((5300..=5800).contains(&until(6.0)), "{}", until(6.0));
    let late = until(20.0) - until(10.0);
    assert!((990..=1010).contains(&late), "{late}");
}

#[test]
fn directions_have_limits_of_their_own() {
    let rates = Rates { read: average(1000), write: average(10), ..Rates::default() };
    let limits = ThrottleLimits { operations: rates, ..ThrottleLimits::default() };
    assert!(*greedy(limits, Direction::Read, 512, 1000).last().unwrap() < 1.0);
    assert!(*greedy(limits, Direction::Write, 512, 100).last().unwrap() > 9.0);
}

#[test]
fn large_requests_count_as_several_operations_where_a_size_is_given() {
    let rates = Rates { total: average(100), ..Rates::default() };
    let limits = ThrottleLimits { operations: rates, operation_size: 4096, ..ThrottleLimits::default() };
    let (small, large) =
        (greedy(limits, Direction::Read, 1, 201), greedy(limits, Direction::Read, 16384, 201));
    assert!(
        (1.85..2.0).contains(&small[200]) && (7.85..8.0).contains(&large[200]),
        "{} {}",
        small[200],
        large[200]
    );
}

#[test]
fn in_no_window_does_more_than_bucket_and_average_get_through() {
    let mut random = Random(seed());
    for _ in 0..300 {
        let rate = 1 + random.below(10_000) as u64;
        let burst = if random.below(2) == 0 { 0 } else { rate + random.below(20_000) as u64 };
        let burst_length = if burst == 0 { 1 } else { 1 + random.below(5) as u64 };
        let limits = bytes(Rate { average: rate, burst, burst_length });
        limits.validate().unwrap();
        let size = if burst == 0 { rate as f64 / 10.0 } else { (burst * burst_length) as f64 };
        let start = Instant::now();
        let (mut account, mut now) = (Account::new(limits, start), start);
        let mut passed: Vec<(f64, u64)> = vec![];
        for _ in 0..200 {
            // Sometimes it rests, sometimes it asks too early, mostly it comes as soon as it may.
            match random.below(8) {
                0 => now += Duration::from_millis(random.below(2000) as u64),
                1 => {}
                _ => now += account.wait(Direction::Write, now),
            }
            if account.wait(Direction::Write, now).is_zero() {
                let bytes = 1 + random.below(4096) as u64;
                account.pour(Direction::Write, bytes);
                passed.push(((now - start).as_secs_f64(), bytes));
            }
        }
        for (first, (from, _)) in passed.iter().enumerate() {
            let mut sum = 0;
            for (to, bytes) in &passed[first..] {
                // The last one may lift the level beyond the bucket.
                let bound = size + rate as f64 * (to - from) + 1.0;
                assert!(sum as f64 <= bound, "{sum} bytes in {} s under {limits:?}", to - from);
                sum += bytes;
            }
        }
    }
}

#[test]
fn a_clock_that_goes_backwards_or_far_ahead_does_no_harm() {
    let start = Instant::now() + Duration::from_secs(1000);
    let mut account = Account::new(bytes(average(1)), start);
    account.pour(Direction::Read, u64::MAX);
    assert!(account.wait(Direction::Read, start - Duration::from_secs(10)) > Duration::from_secs(1_000_000));
    assert!(
        account.wait(Direction::Read, start + Duration::from_secs(1 << 40))
            <= Duration::from_secs(3_000_000_001)
    );
}

#[test]
fn limits_that_contradict_themselves_are_refused_in_qemus_words() {
    let of = |average, burst, burst_length| bytes(Rate { average, burst, burst_length }).validate();
    assert_eq!(of(1, 0, 1), Ok(()));
    assert_eq!(of(10, 20, 60), Ok(()));
    assert_eq!(of(MAX_RATE + 1, 0, 1), Err(LimitsError::Range));
    assert_eq!(of(1, 2, 0), Err(LimitsError::NoLength));
    assert_eq!(of(1, 0, 2), Err(LimitsError::LengthWithoutBurst));
    assert_eq!(of(1, MAX_RATE, 2), Err(LimitsError::Length));
    assert_eq!(of(0, 5, 1), Err(LimitsError::BurstWithoutRate));
    assert_eq!(of(5, 4, 1), Err(LimitsError::SlowBurst));
    let rates = Rates { total: average(1), read: average(1), ..Rates::default() };
    let limits = ThrottleLimits { operations: rates, ..ThrottleLimits::default() };
    assert_eq!(limits.validate(), Err(LimitsError::TotalAndDirection));
    let limits = ThrottleLimits { operation_size: 1, ..bytes(average(1)) };
    assert_eq!(limits.validate(), Err(LimitsError::SizeWithoutRate));
    assert_eq!(LimitsError::Range.to_string(), "bps/iops/max values must be within [0, 1000000000000000]");
}
