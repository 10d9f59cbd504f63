//! Who writes to the witness: a thread of its own, as a disk may take its time to make it durable.

use std::error::Error as StdError;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::Duration;

use coordinator::chain;
use coordinator::record::Record;
use coordinator::record::witness::{Verdict, Witness};
use protocol::Error;
use serde_json::{Value, json};

use super::super::registry::JobDone;
use super::info::{PivotDisk, PivotInfo};

/// How long the end of the VM waits for a witness.
const TIMEOUT: Duration = Duration::from_secs(60);

/// How the thread tells the loop that there is something to [`Scribe::take`].
type Post = Box<dyn FnOnce(JobDone) + Send>;

/// Writes to the witness of one operation. The thread is left to itself when this is dropped: it may hang in a sync.
pub(super) struct Scribe {
    verdicts: Sender<Verdict>,
    written: Receiver<Result<(), String>>,
}

impl Scribe {
    /// Gets ready. It decides, and it may have to revoke: each is posted.
    ///
    /// # Errors
    ///
    /// The witness is that of another operation or cannot hold this one; there is no thread. Nothing was written.
    pub(super) fn start(witness: Witness, info: &PivotInfo, posts: [Post; 2]) -> Result<Self, Error> {
        let operation = info.operation;
        let refused = |error: &dyn StdError| Error::generic(chain(error));
        witness.check_operation(&operation).map_err(|error| refused(&error))?;
        let member = |PivotDisk { device, source, target, .. }: &PivotDisk| json!({"device": device, "source": source, "target": target});
        let details = json!({"disks": info.disks.iter().map(member).collect::<Vec<Value>>()});
        // Found out now, and not when guest I/O is held.
        let record = Record { kind: 0, sequence: 0, operation, payload: details.clone() };
        record.encode().map_err(|error| refused(&error))?;
        let (verdicts, orders) = mpsc::channel();
        let (results, written) = mpsc::channel();
        let (mut posts, mut witness) = (posts.into_iter(), witness);
        let body = move || {
            while let (Ok(verdict), Some(post)) = (orders.recv(), posts.next()) {
                let written = witness.decide(verdict, operation, details.clone());
                if results.send(written.map_err(|error| chain(&error))).is_err() {
                    return;
                }
                post(JobDone::Witnessed);
            }
        };
        let spawned = thread::Builder::new().name("witness".to_owned()).spawn(body);
        spawned
            .map_err(|error| Error::generic(format!("Cannot start the thread of the witness: {error}")))?;
        Ok(Self { verdicts, written })
    }

    /// Has it written. Returns whether it will be tried: the thread may be gone.
    pub(super) fn write(&self, verdict: Verdict) -> bool {
        self.verdicts.send(verdict).is_ok()
    }

    /// What became of what was to be written, if that is known.
    pub(super) fn take(&self) -> Option<Result<(), String>> {
        self.written.try_recv().ok()
    }

    /// The same, and waits for it. `None`: it takes too long.
    pub(super) fn wait(&self) -> Option<Result<(), String>> {
        self.written.recv_timeout(TIMEOUT).ok()
    }
}
