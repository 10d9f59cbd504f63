//! Questions that overtake the command in flight.
//!
//! An agent that has the command `tarn-fsfreeze-report` answers `{"exec-oob": NAME, "id": ID}` at once,
//! whatever it is working on, with that id; others do not know the member. So whether the agent can is read
//! from its `guest-info`, which the broker asks for before the first command that others may have to wait
//! for, once per opening of the port: what cannot overtake anything costs nothing.
//!
//! ```text
//!             guest-info lists it             no answer in time
//!   Unknown ──────────────────────▶ Present ────────────────────▶ Unknown
//!      │  it does not, or an error     │ it refuses the envelope
//!      └──────────────────────────▶ Absent ◀─┘      the port closes: Unknown, from any
//! ```
//!
//! Ids are as random as tokens: no agent and no client can guess one, so an answer that bears the id of a
//! question belongs to it, whatever came before. One with any other id answers nothing, neither a question
//! nor the command in flight, and does not put the broker out of step. Getting in step again drops what has
//! not been sent, so questions without an answer are asked again then; in turn, so that a guest that is never
//! in step for long cannot keep a client waiting.
//!
//! Questions are few and short, those whose client has left included: a guest that takes none is not sent
//! more.

use std::time::Instant;

use protocol::{Error, Reply};
use serde_json::Value;

use super::Client;
use super::broker::Queued;

/// Questions with the guest at a time.
const QUESTIONS_MAX: usize = 16;
/// The command by which an agent that answers out of band is known.
const SIGN: &str = "tarn-fsfreeze-report";

/// Whether the agent answers out of band.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ability {
    Unknown,
    Absent,
    Present,
}

/// What has been asked out of band.
#[derive(Debug)]
pub(super) struct OutOfBand {
    ability: Ability,
    questions: Vec<Question>,
}

#[derive(Debug)]
struct Question {
    id: i64,
    /// What the client asked; `None`: nobody waits for the answer.
    request: Option<Queued>,
    deadline: Instant,
    /// A freeze or thaw was under way meanwhile, so a status says nothing about what it led to.
    outdated: bool,
}

/// A question with its answer.
#[derive(Debug)]
pub(super) struct Answered {
    /// What the client asked; `None`: it is gone.
    pub(super) request: Option<Queued>,
    pub(super) result: Result<Value, Error>,
    /// The answer tells what was, not what is.
    pub(super) outdated: bool,
}

impl Answered {
    /// The agent does not know how to answer out of band.
    pub(super) fn is_refused(&self) -> bool {
        self.result.as_ref().is_err_and(|error| error.desc.contains("'exec-oob'"))
    }
}

impl OutOfBand {
    pub(super) fn new() -> Self {
        Self { ability: Ability::Unknown, questions: Vec::new() }
    }

    pub(super) fn ability(&self) -> Ability {
        self.ability
    }

    /// The agent's answer to `guest-info`, or that there was none.
    pub(super) fn learn(&mut self, info: Option<&Value>) {
        let commands = info.and_then(|info| info.get("supported_commands")).and_then(Value::as_array);
        let has_sign = commands.into_iter().flatten().any(|command| command["name"] == SIGN);
        self.ability = if has_sign { Ability::Present } else { Ability::Absent };
    }

    /// Whether another question can be asked now.
    pub(super) fn has_room(&self) -> bool {
        self.ability == Ability::Present && self.questions.len() < QUESTIONS_MAX
    }

    pub(super) fn is_empty(&self) -> bool {
        self.questions.is_empty()
    }

    /// An answer with this id is to come.
    pub(super) fn expect(&mut self, id: i64, request: Queued, deadline: Instant, outdated: bool) {
        self.questions.push(Question { id, request: Some(request), deadline, outdated });
    }

    /// The question that `message` answers.
    ///
    /// # Errors
    ///
    /// The message, if it answers none.
    pub(super) fn answered(&mut self, message: Value) -> Result<Answered, Value> {
        let id = message.get("id").and_then(Value::as_i64);
        let index = self.questions.iter().position(|question| Some(question.id) == id);
        let Some(index) = index else { return Err(message) };
        let result = match Reply::parse(message) {
            Ok(Reply::Return { value, .. }) => Ok(value),
            Ok(Reply::Error { error, .. }) => Err(error),
            // An event with an id, say: it answers nothing, and nobody wants to see it.
            Ok(Reply::Event(_) | Reply::Greeting(_)) | Err(_) => return Err(Value::Null),
        };
        let Question { request, outdated, .. } = self.questions.swap_remove(index);
        Ok(Answered { request, result, outdated })
    }

    /// A freeze or thaw is under way from now on.
    pub(super) fn freeze_changes(&mut self) {
        self.questions.iter_mut().for_each(|question| question.outdated = true);
    }

    /// Nobody waits for the answer to this client's question any more.
    pub(super) fn client_gone(&mut self, client: Client) {
        for question in &mut self.questions {
            question.request.take_if(|request| request.client == client);
        }
    }

    /// When the next answer is overdue.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.questions.iter().map(|question| question.deadline).min()
    }

    /// Questions that will not be waited for any longer. The agent has to show again that it answers.
    pub(super) fn take_overdue(&mut self, now: Instant) -> Vec<Queued> {
        let overdue: Vec<_> = self.questions.extract_if(.., |question| question.deadline <= now).collect();
        if !overdue.is_empty() {
            self.ability = Ability::Unknown;
        }
        overdue.into_iter().filter_map(|question| question.request).collect()
    }

    /// What is asked is on its way no more: the requests, to be asked again in turn.
    pub(super) fn take_lost(&mut self) -> Vec<Queued> {
        let questions = std::mem::take(&mut self.questions).into_iter();
        questions.filter_map(|question| question.request).map(Queued::in_turn).collect()
    }

    /// The port is closed: what opens it next may be another agent.
    pub(super) fn forget_agent(&mut self) {
        self.ability = Ability::Unknown;
    }
}
