use std::fs;
use std::os::unix::fs::FileExt;

use super::*;
use crate::record::RECORD_MAX;

struct Lab {
    _base: tempfile::TempDir,
    state: StateDir,
}

impl Lab {
    fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        let state = StateDir::below(&base.path().join("state"), "vm").unwrap();
        Self { _base: base, state }
    }

    fn open(&self) -> Journal {
        Journal::open(&self.state).unwrap()
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.state.journal()).unwrap()
    }

    fn write(&self, bytes: &[u8]) {
        fs::write(self.state.journal(), bytes).unwrap();
    }

    fn error(&self) -> String {
        Journal::open(&self.state).unwrap_err().to_string()
    }
}

fn image(path: &str) -> ImageId {
    ImageId { path: path.into(), device: None, file: Some(FileId { device: 1, inode: 2 }), size: 1 << 30 }
}

fn plan() -> Plan {
    let disk = DiskPlan { disk: "vda".into(), source: image("/img/old.raw"), target: image("/img/new.raw") };
    Plan {
        kind: OperationKind::Pivot,
        protocol: Protocol::A,
        disks: vec![disk],
        witness: Some("/state/witness".into()),
        flags: PlanFlags { freeze: true, ..PlanFlags::default() },
    }
}

fn details(text: &str) -> Map<String, Value> {
    Map::from_iter([("note".to_owned(), text.into())])
}

const TO_THE_END: [Stage; 7] = [
    Stage::Prepared,
    Stage::Mirroring,
    Stage::Ready,
    Stage::PivotIntent,
    Stage::Pivoted,
    Stage::ConfigCommitted,
    Stage::Done,
];

/// A whole operation.
fn pivot(journal: &mut Journal, id: u128) {
    let id = journal.begin(Uuid::from_u128(id), &plan(), Map::new()).unwrap().id;
    for stage in TO_THE_END {
        journal.append(id, stage, Map::new()).unwrap();
    }
}

fn abort(journal: &mut Journal, id: u128) {
    let id = journal.begin(Uuid::from_u128(id), &plan(), Map::new()).unwrap().id;
    for stage in [Stage::Aborted, Stage::Done] {
        journal.append(id, stage, details("no")).unwrap();
    }
}

#[test]
fn a_vm_without_operations_has_no_directory_and_looking_makes_none() {
    let lab = Lab::new();
    assert_eq!(operations(&lab.state).unwrap(), []);
    assert!(Journal::open_existing(&lab.state).unwrap().is_none());
    assert!(!lab.state.base().exists());
}

#[test]
fn what_was_written_is_read_by_the_next_coordinator_whose_epoch_is_higher() {
    let lab = Lab::new();
    let id = Uuid::from_u128(7);
    {
        let mut journal = lab.open();
        assert_eq!((journal.epoch(), journal.generation()), (1, 0));
        let operation = journal.begin(id, &plan(), details("begun")).unwrap();
        assert_eq!(operation, Operation { id, generation: 1, epoch: 1 });
        journal.append(id, Stage::Prepared, details("made")).unwrap();
    }
    let journal = lab.open();
    assert_eq!(journal.epoch(), 2);
    let open = journal.open_operation().unwrap();
    assert_eq!((open.id(), open.stage(), &open.plan), (id, Stage::Prepared, &plan()));
    assert_eq!(open.detail("note"), Some(&"made".into()));
    assert_eq!(open.entries[0].details, details("begun"));
    assert_eq!(open.outcome(), Outcome::Open);
    assert_eq!(operations(&lab.state).unwrap(), journal.operations());
}

#[test]
fn a_generation_is_passed_when_a_disk_has_moved_and_not_when_it_has_not() {
    let lab = Lab::new();
    let mut journal = lab.open();
    abort(&mut journal, 1);
    assert_eq!(journal.generation(), 0);
    pivot(&mut journal, 2);
    assert_eq!(journal.generation(), 1);
    pivot(&mut journal, 3);
    abort(&mut journal, 4);
    drop(journal);
    let journal = lab.open();
    assert_eq!(journal.generation(), 2);
    let outcomes: Vec<_> = journal.operations().iter().map(OperationLog::outcome).collect();
    assert_eq!(outcomes, [Outcome::Aborted, Outcome::Pivoted, Outcome::Pivoted, Outcome::Aborted]);
}

#[test]
fn a_second_coordinator_is_refused_and_told_who_the_first_is() {
    let lab = Lab::new();
    let first = lab.open();
    let expected = format!("Process {} coordinates VM vm", std::process::id());
    assert_eq!(lab.error(), expected);
    assert_eq!(Journal::open_existing(&lab.state).unwrap_err().to_string(), expected);
    // Who only looks is not in the way.
    assert_eq!(operations(&lab.state).unwrap(), []);
    drop(first);
    lab.open();
}

#[test]
fn a_coordinator_that_was_taken_over_from_writes_nothing_more() {
    let lab = Lab::new();
    let id = Uuid::from_u128(1);
    let mut zombie = lab.open();
    zombie.begin(id, &plan(), Map::new()).unwrap();
    // Somebody has done away with the lock.
    fs::remove_file(lab.state.lock()).unwrap();
    let mut heir = lab.open();
    let before = lab.bytes();
    let refused = zombie.append(id, Stage::Prepared, Map::new()).unwrap_err();
    assert!(matches!(refused, JournalError::Fenced { .. }), "{refused}");
    let refused = zombie.confirm_ours().unwrap_err().to_string();
    let expected =
        format!("Another coordinator has taken over: {} was removed or replaced", lab.state.lock().display());
    assert_eq!(refused, expected);
    // Even if the lock were its own.
    zombie.lock = Lock(fs::File::open(lab.state.lock()).unwrap());
    let refused = zombie.append(id, Stage::Prepared, Map::new()).unwrap_err();
    assert!(matches!(refused, JournalError::Fenced { by: Some(2), .. }), "{refused}");
    let refused = zombie.confirm_ours().unwrap_err();
    assert!(matches!(refused, JournalError::Fenced { by: Some(2), .. }), "{refused}");
    assert_eq!(lab.bytes(), before);
    heir.confirm_ours().unwrap();
    heir.append(id, Stage::Prepared, Map::new()).unwrap();
}

#[test]
fn one_operation_at_a_time_and_each_step_in_its_place() {
    let lab = Lab::new();
    let mut journal = lab.open();
    let (first, second) = (Uuid::from_u128(1), Uuid::from_u128(2));
    journal.begin(first, &plan(), Map::new()).unwrap();
    let before = lab.bytes();
    let open = journal.begin(second, &plan(), Map::new()).unwrap_err();
    assert!(matches!(open, JournalError::Open { id, stage: Stage::Planned } if id == first), "{open}");
    let other = journal.append(second, Stage::Prepared, Map::new()).unwrap_err();
    assert!(matches!(other, JournalError::NotOpen { .. }), "{other}");
    let early = journal.append(first, Stage::Pivoted, Map::new()).unwrap_err();
    assert!(matches!(early, JournalError::Misplaced { .. }), "{early}");
    assert_eq!(lab.bytes(), before);
    journal.append(first, Stage::Aborted, Map::new()).unwrap();
    journal.append(first, Stage::Done, Map::new()).unwrap();
    assert!(journal.append(first, Stage::Done, Map::new()).is_err());
}

#[test]
fn a_plan_that_would_not_fit_later_is_refused_at_once() {
    let lab = Lab::new();
    let mut journal = lab.open();
    let mut long = plan();
    let planned = |n: usize| DiskPlan {
        disk: format!("disk{n}"),
        source: ImageId { path: "/images/source.raw".into(), device: None, file: None, size: 1 },
        target: ImageId { path: "/images/target.raw".into(), device: None, file: None, size: 1 },
    };
    long.disks = (0..20).map(planned).collect();
    let refused = journal.begin(Uuid::from_u128(1), &long, Map::new()).unwrap_err();
    assert!(matches!(refused, JournalError::TooLong(_)), "{refused}");
    assert_eq!(journal.operations(), []);
    long.disks.truncate(8);
    journal.begin(Uuid::from_u128(1), &long, Map::new()).unwrap();
}

#[test]
fn a_full_journal_forgets_what_is_over_and_keeps_generation_and_epoch() {
    let lab = Lab::new();
    let (mut generation, mut count) = (0, 0);
    for round in 0..60_u128 {
        let mut journal = lab.open();
        assert_eq!(journal.generation(), generation);
        assert_eq!(journal.epoch(), u64::try_from(round).unwrap() + 1);
        if round % 3 == 0 {
            abort(&mut journal, round);
        } else {
            pivot(&mut journal, round);
            generation += 1;
        }
        count = journal.operations().len();
        assert_eq!(journal.last().unwrap().id(), Uuid::from_u128(round));
        assert_eq!(lab.bytes().len(), log::CAPACITY * RECORD_MAX);
    }
    assert!((5..30).contains(&count), "{count}");
    // Coordinators that come and go and do nothing do not fill it either.
    for _ in 0..log::CAPACITY * 2 {
        lab.open();
    }
    assert_eq!(lab.open().generation(), generation);
}

#[test]
fn a_generation_that_the_durable_configuration_is_ahead_by_survives_forgetting() {
    let lab = Lab::new();
    pivot(&mut lab.open(), 1);
    fs::write(lab.state.disks(), r#"{"version": 1, "generation": 9, "disks": {}}"#).unwrap();
    for id in 2..40 {
        let mut journal = lab.open();
        abort(&mut journal, id);
        assert_eq!(journal.generation(), 9);
        assert_eq!(journal.last().unwrap().operation.generation, 10);
    }
}

#[test]
fn an_open_operation_is_never_forgotten() {
    let lab = Lab::new();
    let id = Uuid::from_u128(77);
    let mut journal = lab.open();
    pivot(&mut journal, 1);
    journal.begin(id, &plan(), details("mine")).unwrap();
    drop(journal);
    for _ in 0..log::CAPACITY * 2 {
        lab.open();
    }
    let mut journal = lab.open();
    assert_eq!(journal.open_operation().unwrap().detail("note"), Some(&"mine".into()));
    assert_eq!(journal.generation(), 1);
    for stage in TO_THE_END {
        journal.append(id, stage, Map::new()).unwrap();
    }
    assert_eq!(journal.generation(), 2);
}

#[test]
fn an_operation_that_fills_the_journal_alone_is_told_so_and_can_still_be_read() {
    let lab = Lab::new();
    let mut journal = lab.open();
    let id = journal.begin(Uuid::from_u128(1), &plan(), Map::new()).unwrap().id;
    journal.append(id, Stage::Prepared, Map::new()).unwrap();
    let full = loop {
        if let Err(error) = journal.append(id, Stage::Mirroring, Map::new()) {
            break error;
        }
    };
    assert!(matches!(full, JournalError::Full { .. }), "{full}");
    drop(journal);
    assert_eq!(operations(&lab.state).unwrap()[0].stage(), Stage::Mirroring);
}

#[test]
fn a_torn_end_does_not_count_and_is_written_over() {
    let lab = Lab::new();
    let mut journal = lab.open();
    let id = journal.begin(Uuid::from_u128(1), &plan(), Map::new()).unwrap().id;
    let before = lab.bytes();
    journal.append(id, Stage::Prepared, details(&"long ".repeat(300))).unwrap();
    drop(journal);
    let after = lab.bytes();
    let slot = 2 * RECORD_MAX;
    let length = Record::decode(&after[slot..]).unwrap().1;
    for end in (0..length).step_by(7) {
        let mut torn = before.clone();
        torn[slot..slot + end].copy_from_slice(&after[slot..slot + end]);
        lab.write(&torn);
        let stage = operations(&lab.state).unwrap()[0].stage();
        assert_eq!(stage, Stage::Planned, "torn at {end}");
    }
    // Sectors in any order.
    let mut torn = before;
    torn[slot + 512..slot + length].copy_from_slice(&after[slot + 512..slot + length]);
    lab.write(&torn);
    let mut journal = lab.open();
    assert_eq!(journal.last().unwrap().stage(), Stage::Planned);
    journal.append(id, Stage::Prepared, Map::new()).unwrap();
    drop(journal);
    assert_eq!(lab.open().last().unwrap().stage(), Stage::Prepared);
}

#[test]
fn damage_is_an_error_that_says_where() {
    let lab = Lab::new();
    let mut journal = lab.open();
    pivot(&mut journal, 1);
    drop(journal);
    let whole = lab.bytes();
    let path = lab.state.journal();
    for slot in 0..=8 {
        let offset = slot * RECORD_MAX;
        let expected = format!("{} is damaged at byte {offset}: ", path.display());
        // In its payload; all of it; replaced by the next one.
        let mut flipped = whole.clone();
        flipped[offset + 60] ^= 4;
        lab.write(&flipped);
        assert!(lab.error().starts_with(&expected), "{}", lab.error());
        if slot < 8 {
            let mut erased = whole.clone();
            erased[offset..offset + RECORD_MAX].fill(0);
            lab.write(&erased);
            assert!(lab.error().starts_with(&expected), "{}", lab.error());
            let mut doubled = whole.clone();
            doubled.copy_within(offset..offset + RECORD_MAX, offset + RECORD_MAX);
            lab.write(&doubled);
            assert!(
                lab.error().contains(&format!("at byte {}: Record ", offset + RECORD_MAX)),
                "{}",
                lab.error()
            );
        }
    }
    lab.write(b"something else");
    assert!(lab.error().contains("damaged at byte 0"), "{}", lab.error());
    lab.write(b"");
    assert!(lab.error().contains("damaged at byte 0"), "{}", lab.error());
}

#[test]
fn a_record_of_a_later_version_is_not_taken_for_a_torn_one() {
    let lab = Lab::new();
    drop(lab.open());
    let mut record = epoch_record(2, 2, 0).encode().unwrap();
    record[4] = 9;
    let end = record.len() - 4;
    let checksum = crc32c::crc32c(&record[..end]).to_le_bytes();
    record[end..].copy_from_slice(&checksum);
    let file = fs::OpenOptions::new().write(true).open(lab.state.journal()).unwrap();
    file.write_all_at(&record, RECORD_MAX as u64).unwrap();
    assert!(lab.error().contains("version 9"), "{}", lab.error());
}

/// A small generator of numbers that look random (xorshift64*), so that a failure can be repeated.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(number).unwrap() % limit
    }
}

#[test]
fn a_journal_that_is_cut_anywhere_holds_its_beginning_or_is_refused() {
    let lab = Lab::new();
    let mut journal = lab.open();
    abort(&mut journal, 1);
    pivot(&mut journal, 2);
    drop(journal);
    let whole = lab.bytes();
    let all = log::parse(&whole, Path::new("j")).unwrap();
    let mut numbers = Numbers(0x7461_726e);
    for _ in 0..2000 {
        let end = numbers.below((all.len() + 1) * RECORD_MAX);
        let mut cut = whole[..end].to_vec();
        if numbers.below(2) == 0 {
            cut.resize(whole.len(), 0);
        }
        match log::parse(&cut, Path::new("j")) {
            Ok(records) => {
                assert_eq!(records, all[..records.len()], "cut at {end}");
                assert!(records.len() >= end / RECORD_MAX || records.len() == all.len(), "cut at {end}");
            }
            Err(error) => assert!(end < RECORD_MAX, "cut at {end}: {error}"),
        }
    }
}

#[test]
fn a_flipped_bit_never_changes_what_a_journal_says() {
    let lab = Lab::new();
    let mut journal = lab.open();
    abort(&mut journal, 1);
    pivot(&mut journal, 2);
    drop(journal);
    let whole = lab.bytes();
    let all = log::parse(&whole, Path::new("j")).unwrap();
    let mut numbers = Numbers(0x6a6f_7572);
    let (mut refused, mut forgotten) = (0, 0);
    for _ in 0..3000 {
        let slot = numbers.below(all.len());
        let length = all[slot].encode().unwrap().len();
        let bit = slot * RECORD_MAX * 8 + numbers.below(length * 8);
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        match log::parse(&flipped, Path::new("j")) {
            Err(_) => refused += 1,
            // Only the last record can be taken for one that was being written.
            Ok(records) => {
                assert_eq!(records, all[..all.len() - 1], "bit {bit}");
                forgotten += 1;
            }
        }
    }
    assert!(refused > 2900, "{refused} refused, {forgotten} forgotten");
}

#[cfg(feature = "failpoints")]
mod failures {
    use super::*;
    use crate::failpoint;
    use crate::lose_power;

    const ID: Uuid = Uuid::from_u128(0xF);

    /// What a power loss leaves, seen by the next coordinator.
    fn after_power_loss(lab: &Lab) -> Journal {
        lose_power(&lab.state.path());
        lab.open()
    }

    #[test]
    fn a_step_that_failed_is_in_doubt_until_the_journal_is_read_again() {
        for (point, stage) in
            [("before", Stage::Planned), ("written", Stage::Prepared), ("synced", Stage::Prepared)]
        {
            let lab = Lab::new();
            let mut journal = lab.open();
            journal.begin(ID, &plan(), Map::new()).unwrap();
            let failed = failpoint::with(&format!("journal.prepared.{point}=eio"), || {
                journal.append(ID, Stage::Prepared, Map::new())
            });
            assert!(matches!(failed, Err(JournalError::File(_))), "{failed:?}");
            // It is nobody else's all the same.
            journal.confirm_ours().unwrap();
            let refused = journal.append(ID, Stage::Aborted, Map::new()).unwrap_err();
            assert!(matches!(refused, JournalError::Doubtful { .. }), "{refused}");
            journal.reopen().unwrap();
            assert_eq!(journal.last().unwrap().stage(), stage, "{point}");
            // What was read again lasts.
            drop(journal);
            let mut journal = after_power_loss(&lab);
            assert_eq!(journal.last().unwrap().stage(), stage, "{point}");
            journal.append(ID, Stage::Aborted, Map::new()).unwrap();
        }
    }

    #[test]
    fn a_record_whose_sync_failed_lasts_once_somebody_may_act_on_it() {
        let lab = Lab::new();
        let mut journal = lab.open();
        journal.begin(ID, &plan(), Map::new()).unwrap();
        let failed =
            failpoint::with("journal.aborted.written=eio", || journal.append(ID, Stage::Aborted, Map::new()));
        failed.unwrap_err();
        drop(journal);
        let journal = Journal::open_existing(&lab.state).unwrap().unwrap();
        assert_eq!(journal.last().unwrap().stage(), Stage::Aborted);
        drop(journal);
        assert_eq!(after_power_loss(&lab).last().unwrap().stage(), Stage::Aborted);
    }

    #[test]
    fn making_room_may_fail_anywhere_and_loses_nothing() {
        for point in ["before", "written", "synced", "renamed", "done"] {
            let lab = Lab::new();
            let mut journal = lab.open();
            let (mut count, mut generation) = (0, 0);
            let failed = loop {
                count += 1;
                let begun = failpoint::with(&format!("journal.compact.{point}=enospc"), || {
                    journal.begin(Uuid::from_u128(count), &plan(), Map::new())
                });
                if let Err(error) = begun {
                    break error;
                }
                for stage in TO_THE_END {
                    journal.append(Uuid::from_u128(count), stage, Map::new()).unwrap();
                }
                generation += 1;
            };
            assert!(matches!(failed, JournalError::File(_)), "{failed}");
            let before = journal.last().unwrap().clone();
            drop(journal);
            let mut journal = lab.open();
            assert_eq!((journal.generation(), journal.last()), (generation, Some(&before)), "{point}");
            journal.begin(ID, &plan(), Map::new()).unwrap();
            journal.append(ID, Stage::Prepared, Map::new()).unwrap();
            drop(journal);
            let journal = after_power_loss(&lab);
            assert_eq!(journal.generation(), generation, "{point}");
            let last = journal.last().unwrap();
            assert_eq!((last.id(), last.stage()), (ID, Stage::Prepared), "{point}");
        }
    }

    #[test]
    fn a_journal_that_could_not_be_made_or_taken_over_is_made_the_next_time() {
        for point in ["before", "written", "synced", "renamed", "done"] {
            let lab = Lab::new();
            let made = failpoint::with(&format!("journal.create.{point}=eio"), || Journal::open(&lab.state));
            made.unwrap_err();
            lab.open().begin(ID, &plan(), Map::new()).unwrap();
            assert_eq!(after_power_loss(&lab).last().unwrap().id(), ID, "{point}");
        }
        for point in ["before", "written", "synced"] {
            let lab = Lab::new();
            lab.open().begin(ID, &plan(), Map::new()).unwrap();
            let taken = failpoint::with(&format!("journal.epoch.{point}=eio"), || Journal::open(&lab.state));
            taken.unwrap_err();
            let epoch = lab.open().epoch();
            assert!(after_power_loss(&lab).epoch() > epoch, "{point}");
        }
    }
}
