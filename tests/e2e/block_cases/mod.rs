//! Block jobs as a client and a guest see them: the same cases against Tarn and, with `TARN_REFERENCE=qemu`, against
//! stock QEMU, so that a difference is seen, not assumed.
//!
//! The guest does its I/O with `disk-io` (tests/clients), past its page cache; the images are compared byte by byte.
//! Where QEMU does something else, the test says so beside what it expects ([`Machine::is_reference`]).
//!
//! | file | about |
//! |---|---|
//! | `phases.rs` | how a job begins, becomes ready, pivots, is held at pending, is cancelled, pauses |
//! | `running.rs` | speed, a VM that stands still, a client of another make |
//! | `refusals.rs` | arguments, sizes, wrong moments |
//! | `writes.rs` | what the guest writes, zeroes and discards while a job runs |
//! | `pivots.rs` | pivots back and forth under loads that check themselves: `disk-io`, and Debian's fio |
//! | `backups.rs` | copies of one moment, of one disk and of two |
//! | `errors.rs` | targets that fail, are full, are slow |
//! | `crashes.rs` | a VMM that is killed while a job holds its guest, and at random moments |

mod backups;
mod crashes;
mod errors;
mod machine;
mod phases;
mod pivots;
mod reference;
mod refusals;
mod running;
mod writes;

use std::path::PathBuf;

pub use self::crashes::{acknowledged, has_all_up_to};
pub use self::machine::Disk;
use self::machine::Machine;
pub use self::reference::Qemu;
use crate::clients::prepared;
use crate::harness::Lab;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A place for a test, and the archive with the guest's program; `None`, loudly, where one is missing.
pub fn place(name: &'static str) -> Option<(Lab, PathBuf)> {
    let lab = Lab::new(name)?;
    let program = prepared("disk-io.cpio")?;
    Some((lab, program))
}

#[test]
fn a_job_goes_through_its_phases_as_clients_know_them() {
    let Some((lab, program)) = place("block-phases") else { return };
    let mut machine = Machine::boot(&lab, &program, "phases", &phases::disks(&lab));
    phases::a_mirror_pivots_when_it_is_told_to(&lab, &mut machine);
    phases::a_cancel_before_ready_leaves_the_source(&lab, &mut machine);
    phases::a_soft_cancel_when_ready_leaves_a_copy(&lab, &mut machine);
    phases::a_forced_cancel_when_ready_leaves_what_was_copied(&lab, &mut machine);
    phases::a_pause_is_one_and_ends(&lab, &mut machine);
    phases::a_job_that_is_not_ready_cannot_complete(&lab, &mut machine);
    phases::at_pending_the_guest_waits_and_the_client_decides(&lab, &mut machine);
    refusals::what_cannot_be_is_refused_in_known_words(&lab, &mut machine);
    running::a_limit_is_kept_and_nothing_waits_for_it(&lab, &mut machine);
    running::a_job_goes_on_while_the_vm_stands_still(&lab, &mut machine);
    running::a_client_of_another_make_mirrors_and_pivots(&lab, machine);
}

#[test]
fn what_the_guest_does_while_a_job_runs_is_in_the_copy() {
    let Some((lab, program)) = place("block-writes") else { return };
    let mut machine = Machine::boot(&lab, &program, "writes", &writes::disks(&lab));
    writes::a_write_blocking_mirror_takes_all_there_is(&lab, &mut machine);
    writes::a_write_smaller_than_a_chunk_does_not_hide_the_rest_of_it(&lab, &mut machine);
    writes::writes_across_one_that_does_not_end_wait_and_then_end(&lab, &mut machine);
    writes::discards_and_zeroes_are_zeroes_in_the_copy(&lab, &mut machine);
    writes::disks_of_odd_sizes_are_mirrored_to_their_last_sector(&lab, &mut machine);
    pivots::a_guest_that_checks_its_data_pivots_back_and_forth(&lab, &mut machine);
}

#[test]
fn fio_finds_what_it_wrote_while_its_disk_moves_again_and_again() {
    let Some((lab, program)) = place("block-fio") else { return };
    let Some(tools) = prepared("fio.ext4") else { return };
    let mut machine = Machine::boot(&lab, &program, "fio", &pivots::disks_for_fio(&lab, tools));
    pivots::fio_verifies_a_disk_that_pivots_back_and_forth(&lab, &mut machine);
}

#[test]
fn a_backup_is_the_disk_at_one_moment_while_the_guest_writes() {
    let Some((lab, program)) = place("block-backups") else { return };
    let mut machine = Machine::boot(&lab, &program, "backups", &backups::disks(&lab));
    backups::prepare(&lab, &mut machine);
    backups::a_copy_is_the_disk_as_of_its_start(&lab, &mut machine);
    backups::two_copies_of_a_transaction_are_of_one_moment(&lab, &mut machine);
    backups::a_transaction_fails_as_a_whole(&lab, &mut machine);
    backups::a_guest_does_not_wait_for_a_copy_that_cannot_be_made(&lab, &mut machine);
    backups::a_copy_that_is_pending_holds_nobody(&lab, &mut machine);
    backups::a_copy_of_changes_alone_ends_when_it_is_cancelled(&lab, &mut machine);
    backups::a_backup_goes_on_while_the_vm_stands_still(&lab, &mut machine);
}

#[test]
fn a_target_that_goes_wrong_is_the_jobs_problem_and_not_the_guests() {
    let Some((lab, program)) = place("block-errors") else { return };
    let mut machine = Machine::boot(&lab, &program, "errors", &errors::disks(&lab));
    errors::a_target_that_fails_ends_its_job_and_nothing_else(&lab, &mut machine);
    errors::a_full_target_waits_for_room(&lab, &mut machine);
    errors::an_error_that_is_ignored_is_made_up_for(&lab, &mut machine);
    errors::a_flush_that_fails_at_the_end_stops_it_until_it_is_resumed_or_given_up(&lab, &mut machine);
    errors::a_vm_ends_whatever_its_jobs_are_at(&lab, machine);
}

#[test]
fn a_vmm_that_is_killed_leaves_every_acknowledged_write() {
    let Some((lab, program)) = place("block-crashes") else { return };
    crashes::every_acknowledged_write_survives(&lab, &program);
}
