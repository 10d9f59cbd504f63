//! Clients that know nothing of the operation, or too much.

use std::error::Error;
use std::thread;
use std::time::{Duration, Instant};

use coordinator::{MonitorSession, journal};
use serde_json::{Map, Value, json};

use crate::cells::Stranger;
use crate::process::PATIENCE;
use crate::setup::Setup;

/// For an answer that may wait for somebody who sleeps.
const BRIEF: Duration = Duration::from_millis(50);
const LOOK: Duration = Duration::from_millis(5);

/// A client does something on the monitor; whether it is refused is the VMM's affair.
pub(crate) fn interfere(setup: &Setup, stranger: Stranger) -> Result<(), Box<dyn Error>> {
    let mut session = MonitorSession::connect(&setup.monitor(), PATIENCE)?;
    let mut ask = |command: &str, arguments: Value| {
        let arguments: Option<Map<String, Value>> = arguments.as_object().cloned();
        // Nobody sleeps who would have to answer a question.
        let limit = if command.contains("query-") || command == "drive-reopen" { PATIENCE } else { BRIEF };
        session.execute(command, arguments.map(|arguments| arguments.into_iter().collect()), limit)
    };
    match stranger {
        Stranger::Cont => drop(ask("cont", Value::Null)),
        Stranger::Cancel => {
            let jobs = ask("query-jobs", Value::Null)?;
            for job in jobs.as_array().into_iter().flatten() {
                let _ = ask("job-cancel", json!({"id": job["id"]}));
                let _ = ask("block-job-cancel", json!({"device": job["id"], "force": true}));
            }
        }
        Stranger::Complete | Stranger::CompleteOne => {
            let count = if stranger == Stranger::Complete { setup.recipe.disks } else { 1 };
            let began = Instant::now();
            let is = |job: &Value, states: &[&str]| states.iter().any(|state| job["status"] == *state);
            let jobs = ask("query-jobs", Value::Null)?.as_array().cloned().unwrap_or_default();
            if jobs.len() != setup.recipe.disks || !jobs.iter().all(|job| is(job, &["ready", "pending"])) {
                return Ok(());
            }
            let mut chosen: Vec<Value> = jobs.iter().map(|job| job["id"].clone()).collect();
            chosen.truncate(count);
            let is_chosen = |job: &&Value| chosen.contains(&job["id"]);
            for job in jobs.iter().filter(is_chosen).filter(|job| is(job, &["ready"])) {
                let _ = ask("job-complete", json!({"id": job["id"]}));
            }
            loop {
                let jobs = ask("query-jobs", Value::Null)?.as_array().cloned().unwrap_or_default();
                for job in jobs.iter().filter(is_chosen).filter(|job| is(job, &["pending"])) {
                    let _ = ask("job-finalize", json!({"id": job["id"]}));
                }
                if jobs.iter().filter(is_chosen).all(|job| is(job, &["concluded"]))
                    || began.elapsed() > PATIENCE
                {
                    return Ok(());
                }
                thread::sleep(LOOK);
            }
        }
        Stranger::Reopen => {
            let target = setup.target(0);
            // Refused while the pivot is under way; answered when it is over.
            let _ = ask("drive-reopen", json!({"device": Setup::disk(0), "new-image-file": target}));
        }
        Stranger::Pivot => {
            let operations = journal::operations(&setup.state())?;
            let Some(last) = operations.last() else { return Ok(()) };
            let info = ask("tarn-query-pivot", json!({"op": last.id()}))?;
            // What was not begun is not a stranger's to begin.
            if info["state"] == "none" {
                return Ok(());
            }
            let disks = info["disks"].as_array().into_iter().flatten();
            let jobs: Vec<&Value> = disks.map(|disk| &disk["job"]).collect();
            let generation = last.operation.generation;
            for op in [last.id(), uuid::Uuid::from_u128(1)] {
                let arguments = json!({"op": op, "gen": generation, "epoch": info["epoch"], "jobs": jobs});
                let _ = ask("tarn-pivot", arguments);
            }
        }
        Stranger::Coordinator | Stranger::Successor => {}
    }
    Ok(())
}
