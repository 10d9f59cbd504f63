use block::CopyMode;

use super::*;

fn options() -> JobOptions {
    JobOptions { id: "m0".into(), kind: JobKind::Mirror, speed: 0, auto_finalize: true, auto_dismiss: true }
}

fn job() -> Job {
    Job::start(options()).0
}

fn ready(options: JobOptions) -> Job {
    let (mut job, _) = Job::start(options);
    job.hear(Report::Ready);
    job
}

/// Steps in a line: statuses by name, events in capitals, orders after an arrow.
fn shown(steps: &[Step]) -> String {
    let show = |step: &Step| match step {
        Step::Note(Note::Status(status)) => status.name().to_owned(),
        Step::Note(Note::Ready) => "READY".into(),
        Step::Note(Note::Pending) => "PENDING".into(),
        Step::Note(Note::Completed(None)) => "COMPLETED".into(),
        Step::Note(Note::Completed(Some(error))) => format!("COMPLETED({error})"),
        Step::Note(Note::Cancelled) => "CANCELLED".into(),
        Step::Note(Note::Error { is_read, action }) => {
            format!("ERROR({},{action:?})", if *is_read { "read" } else { "write" })
        }
        Step::Order(order) => format!(">{order:?}"),
    };
    steps.iter().map(show).collect::<Vec<_>>().join(" ")
}

fn asked(job: &mut Job, request: Request) -> String {
    shown(&job.ask(request).unwrap())
}

fn refused(job: &mut Job, request: Request) -> String {
    job.ask(request).unwrap_err().to_string()
}

fn heard(job: &mut Job, report: Report) -> String {
    shown(&job.hear(report))
}

const FORCE: Request = Request::Cancel { force: true };
const SOFT: Request = Request::Cancel { force: false };

#[test]
fn a_mirror_starts_becomes_ready_and_pivots() {
    let (mut job, steps) = Job::start(options());
    assert_eq!(shown(&steps), "created running");
    assert_eq!(heard(&mut job, Report::Ready), "ready READY");
    assert_eq!(asked(&mut job, Request::Complete), ">Quiesce");
    assert_eq!(heard(&mut job, Report::Quiesced), "waiting pending >Switch");
    assert_eq!(heard(&mut job, Report::Switched), "COMPLETED concluded null");
    assert_eq!(heard(&mut job, Report::Ready), "");
}

#[test]
fn a_job_that_is_not_to_finalize_by_itself_waits_with_guest_io_held() {
    let mut job = ready(JobOptions { auto_finalize: false, auto_dismiss: false, ..options() });
    asked(&mut job, Request::Complete);
    assert_eq!(heard(&mut job, Report::Quiesced), "waiting pending PENDING");
    assert_eq!(
        refused(&mut job, Request::Pause),
        "Job 'm0' in state 'pending' cannot accept command verb 'pause'"
    );
    assert_eq!(asked(&mut job, Request::Finalize), ">Switch");
    assert_eq!(heard(&mut job, Report::Switched), "COMPLETED concluded");
    assert_eq!(asked(&mut job, Request::Dismiss), "null");
}

#[test]
fn a_cancel_in_pending_keeps_the_source() {
    let mut job = ready(JobOptions { auto_finalize: false, ..options() });
    asked(&mut job, Request::Complete);
    heard(&mut job, Report::Quiesced);
    assert_eq!(asked(&mut job, SOFT), "aborting >Detach");
    assert_eq!(heard(&mut job, Report::Detached), "CANCELLED concluded null");
    assert_eq!(job.error(), Some("Operation canceled"));
}

#[test]
fn a_soft_cancel_when_ready_finishes_the_copy_without_a_pivot() {
    let mut job = ready(options());
    assert_eq!(asked(&mut job, SOFT), ">Quiesce");
    assert_eq!(asked(&mut job, SOFT), "");
    assert_eq!(heard(&mut job, Report::Quiesced), "waiting pending >Detach");
    assert_eq!(heard(&mut job, Report::Detached), "COMPLETED concluded null");
    assert_eq!(job.error(), None);
}

#[test]
fn a_forced_cancel_when_ready_and_any_cancel_before_abort() {
    for (mut job, request) in [(ready(options()), FORCE), (job(), FORCE), (job(), SOFT)] {
        assert_eq!(asked(&mut job, request), "aborting >Detach");
        assert_eq!(
            refused(&mut job, FORCE),
            "Job 'm0' in state 'aborting' cannot accept command verb 'cancel'"
        );
        assert_eq!(heard(&mut job, Report::Detached), "CANCELLED concluded null");
    }
}

#[test]
fn a_forced_cancel_overtakes_a_completion() {
    let mut job = ready(options());
    asked(&mut job, Request::Complete);
    assert_eq!(asked(&mut job, FORCE), "aborting >Detach");
    assert_eq!(heard(&mut job, Report::Quiesced), "");
    assert_eq!(heard(&mut job, Report::Detached), "CANCELLED concluded null");
}

#[test]
fn a_pause_holds_until_it_is_taken_back() {
    let mut job = job();
    assert_eq!(refused(&mut job, Request::Resume), "Can't resume a job that was not paused");
    assert_eq!(asked(&mut job, Request::Pause), ">Pause paused");
    assert_eq!(refused(&mut job, Request::Pause), "Job is already paused");
    assert_eq!(refused(&mut job, SOFT), "The block job for device 'm0' is currently paused");
    assert_eq!(asked(&mut job, Request::Resume), ">Resume running");
    assert!(job.is_busy());
}

#[test]
fn a_completion_in_standby_happens_on_resume() {
    let mut job = ready(options());
    assert_eq!(asked(&mut job, Request::Pause), ">Pause standby");
    assert_eq!(asked(&mut job, Request::Complete), "");
    assert_eq!(asked(&mut job, Request::Resume), ">Resume ready >Quiesce");
    assert_eq!(heard(&mut job, Report::Quiesced), "waiting pending >Switch");
}

#[test]
fn a_forced_cancel_ends_a_paused_job() {
    let mut job = ready(options());
    asked(&mut job, Request::Pause);
    assert_eq!(asked(&mut job, FORCE), "ready aborting >Detach");
}

#[test]
fn a_job_that_becomes_ready_while_it_is_paused_is_in_standby() {
    let mut job = job();
    asked(&mut job, Request::Pause);
    assert_eq!(heard(&mut job, Report::Ready), "running ready READY standby");
}

#[test]
fn errors_are_told_with_what_was_done_about_them() {
    let mut job = job();
    let error = |action, nospace| Report::Error { is_read: false, action, nospace };
    assert_eq!(heard(&mut job, error(Action::Ignore, false)), "ERROR(write,Ignore)");
    assert_eq!(heard(&mut job, error(Action::Stop, true)), "ERROR(write,Stop) paused");
    assert_eq!(job.io_status(), IoStatus::NoSpace);
    assert_eq!(refused(&mut job, Request::Pause), "Job is already paused");
    job.forget_error();
    assert_eq!(job.io_status(), IoStatus::Ok);
    assert_eq!(asked(&mut job, Request::Resume), ">Resume running");
    assert_eq!(heard(&mut job, error(Action::Report, false)), "ERROR(write,Report)");
    assert_eq!(heard(&mut job, Report::Failed("Input/output error".into())), "aborting >Detach");
    assert_eq!(heard(&mut job, Report::Detached), "COMPLETED(Input/output error) concluded null");
}

#[test]
fn a_completion_at_the_wrong_time_is_refused_and_changes_nothing() {
    let mut running = job();
    assert_eq!(
        refused(&mut running, Request::Complete),
        "Job 'm0' in state 'running' cannot accept command verb 'complete'"
    );
    assert_eq!(running.status(), JobStatus::Running);
    let mut ready = ready(options());
    asked(&mut ready, Request::Complete);
    assert_eq!(refused(&mut ready, Request::Complete), "The active block job 'm0' cannot be completed");
}

#[test]
fn the_speed_is_kept_for_who_asks() {
    let mut job = job();
    assert_eq!(asked(&mut job, Request::SetSpeed(1 << 20)), ">SetSpeed(1048576)");
    assert_eq!(asked(&mut job, Request::SetMode(CopyMode::WriteBlocking)), ">SetMode(WriteBlocking)");
    assert_eq!(job.speed(), 1 << 20);
}

#[test]
fn whatever_happens_in_whatever_order_a_job_keeps_to_the_table_and_detaches_once() {
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
    for _ in 0..20_000 {
        let mut job = Job::start(JobOptions {
            auto_finalize: random(2) == 0,
            auto_dismiss: random(2) == 0,
            ..options()
        })
        .0;
        let (mut ends, mut quiescing, mut leaving) = (0, false, None);
        for _ in 0..30 {
            let before = job.clone();
            let steps = match random(16) {
                0 => job.ask(Request::Pause).unwrap_or_default(),
                1 => job.ask(Request::Resume).unwrap_or_default(),
                2 => job.ask(SOFT).unwrap_or_default(),
                3 if random(4) == 0 => job.ask(FORCE).unwrap_or_default(),
                4 | 5 => job.ask(Request::Complete).unwrap_or_default(),
                6 => job.ask(Request::Finalize).unwrap_or_default(),
                7 => job.ask(Request::Dismiss).unwrap_or_default(),
                8 | 9 => job.hear(Report::Ready),
                10 if random(4) == 0 && leaving.is_none() => job.hear(Report::Failed("x".into())),
                11 if leaving.is_none() => {
                    job.hear(Report::Error { is_read: true, action: Action::Stop, nospace: false })
                }
                12 if quiescing && leaving.is_none() => {
                    quiescing = false;
                    job.hear(Report::Quiesced)
                }
                13 | 14 => match leaving.take() {
                    Some(report) => job.hear(report),
                    None => vec![],
                },
                _ => vec![],
            };
            let mut status = before.status();
            for step in &steps {
                match step {
                    Step::Note(Note::Status(next)) => {
                        assert!(status.may_become(*next), "{status:?} to {next:?}: {}", shown(&steps));
                        status = *next;
                    }
                    Step::Order(Order::Quiesce) => quiescing = true,
                    Step::Order(Order::Switch) => {
                        assert!(!before.cancelled, "a cancelled job pivots");
                        leaving = Some(Report::Switched);
                    }
                    Step::Order(Order::Detach) => leaving = Some(Report::Detached),
                    Step::Note(Note::Completed(_) | Note::Cancelled) => ends += 1,
                    _ => {}
                }
            }
            assert_eq!(status, job.status());
        }
        assert!(ends <= 1, "it ended {ends} times");
        assert_eq!(ends == 1, job.status().is_over());
    }
}

#[test]
fn once_the_disk_is_told_how_to_end_it_a_job_cannot_be_cancelled() {
    let mut job = ready(options());
    asked(&mut job, Request::Complete);
    assert_eq!(heard(&mut job, Report::Quiesced), "waiting pending >Switch");
    for request in [FORCE, SOFT, Request::Finalize] {
        assert!(refused(&mut job, request).starts_with("Job 'm0' in state 'pending' cannot accept"));
    }
    assert_eq!(heard(&mut job, Report::Failed("x".into())), "aborting >Detach");
    assert_eq!(heard(&mut job, Report::Detached), "COMPLETED(x) concluded null");
}

#[test]
fn a_job_without_a_disk_is_simply_done() {
    let create = JobOptions { kind: JobKind::Create, auto_dismiss: false, ..options() };
    let mut job = Job::start(create.clone()).0;
    assert_eq!(heard(&mut job, Report::Done), "waiting pending COMPLETED concluded");
    assert_eq!(asked(&mut job, Request::Dismiss), "null");
    let mut job = Job::start(create).0;
    assert_eq!(asked(&mut job, FORCE), "aborting >Detach");
    assert_eq!(heard(&mut job, Report::Done), "CANCELLED concluded");
    assert_eq!(job.error(), Some("Operation canceled"));
}

fn backup() -> JobOptions {
    JobOptions { id: "b0".into(), kind: JobKind::Backup, ..options() }
}

#[test]
fn a_backup_has_no_ready_and_ends_by_itself() {
    let (mut job, steps) = Job::start(backup());
    assert_eq!(shown(&steps), "created running");
    assert_eq!(heard(&mut job, Report::Ready), "waiting pending >Detach");
    assert_eq!(refused(&mut job, FORCE), "Job 'b0' in state 'pending' cannot accept command verb 'cancel'");
    assert_eq!(heard(&mut job, Report::Detached), "COMPLETED concluded null");
    let (mut job, _) = Job::start(JobOptions { auto_finalize: false, ..backup() });
    assert_eq!(heard(&mut job, Report::Ready), "waiting pending PENDING");
    assert_eq!(asked(&mut job, FORCE), "aborting >Detach");
    assert_eq!(heard(&mut job, Report::Detached), "CANCELLED concluded null");
}

#[test]
fn a_job_of_a_group_waits_until_it_is_told_that_the_others_wait_too() {
    for (auto_finalize, together) in [(true, "pending"), (false, "pending PENDING")] {
        let (mut job, steps) = Job::create(JobOptions { auto_finalize, ..backup() });
        job.join();
        assert_eq!((shown(&steps), shown(&job.begin())), ("created".into(), "running".into()));
        assert_eq!(heard(&mut job, Report::Ready), "waiting");
        assert_eq!(heard(&mut job, Report::Ready), "");
        assert_eq!(shown(&job.go_together()), together);
        assert_eq!(asked(&mut job, Request::Finalize), ">Detach");
        assert_eq!(heard(&mut job, Report::Detached), "COMPLETED concluded null");
    }
}

#[test]
fn a_job_that_never_begins_leaves_nothing() {
    let (mut job, _) = Job::create(JobOptions { auto_dismiss: false, ..backup() });
    assert_eq!(shown(&job.discard()), "aborting concluded null");
}
