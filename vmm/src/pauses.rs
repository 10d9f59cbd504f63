//! Who has stopped the VM, and who may therefore let it go on. No I/O.
//!
//! The run state says that the VM is paused, not why. A coordinator that has stopped it in order to change its disks
//! must not find it running because somebody else thought it was time; and when it has died and comes back, it must know
//! its own pause from that of a user. So a `stop` may carry the name of an operation, and then only a `cont` with the
//! same name takes it back, or one that is forced.

use std::collections::BTreeSet;

use uuid::Uuid;

/// Operations that stop one VM at a time.
const OPERATIONS_MAX: usize = 64;

/// Who stops a VM or lets it go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// Whoever does not say.
    User,
    /// An operation.
    Operation(Uuid),
}

/// All who have stopped the VM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pauses {
    user: bool,
    operations: BTreeSet<Uuid>,
}

/// A request that is refused; nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PauseRefused {
    /// It would run under the hands of somebody else.
    #[error(
        "The VM is paused by operation {0}, which lets it go on when it is done; 'cont' with 'tarn-force': true does so now"
    )]
    Held(Uuid),
    /// A client makes names up.
    #[error("More than {OPERATIONS_MAX} operations have paused the VM")]
    TooMany,
}

impl Pauses {
    /// Somebody has stopped the VM, be it stopped already.
    ///
    /// # Errors
    ///
    /// [`PauseRefused::TooMany`].
    pub fn add(&mut self, holder: Holder) -> Result<(), PauseRefused> {
        match holder {
            Holder::User => self.user = true,
            Holder::Operation(id) if self.operations.contains(&id) => {}
            Holder::Operation(_) if self.operations.len() == OPERATIONS_MAX => {
                return Err(PauseRefused::TooMany);
            }
            Holder::Operation(id) => {
                self.operations.insert(id);
            }
        }
        Ok(())
    }

    /// Somebody lets the VM go on. Returns whether it does: an operation takes back its own pause and no other, and one
    /// that has none changes nothing, so that it may be told twice.
    ///
    /// # Errors
    ///
    /// [`PauseRefused::Held`].
    pub fn remove(&mut self, holder: Holder, force: bool) -> Result<bool, PauseRefused> {
        match (holder, self.operations.first()) {
            _ if force => {}
            (Holder::User, Some(operation)) => return Err(PauseRefused::Held(*operation)),
            (Holder::User, None) => {}
            (Holder::Operation(id), _) => {
                return Ok(self.operations.remove(&id) && self.operations.is_empty() && !self.user);
            }
        }
        *self = Self::default();
        Ok(true)
    }

    /// All of them.
    pub fn list(&self) -> Vec<Holder> {
        let user = self.user.then_some(Holder::User);
        user.into_iter().chain(self.operations.iter().copied().map(Holder::Operation)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Holder = Holder::Operation(Uuid::from_u128(1));
    const TWO: Holder = Holder::Operation(Uuid::from_u128(2));

    fn paused(by: &[Holder]) -> Pauses {
        let mut pauses = Pauses::default();
        by.iter().for_each(|holder| pauses.add(*holder).unwrap());
        pauses
    }

    #[test]
    fn who_may_let_it_go_on_is_decided_for_every_set_of_holders() {
        type Expected = Result<bool, PauseRefused>;
        let held = Err(PauseRefused::Held(Uuid::from_u128(1)));
        let table: [(&[Holder], Expected, Expected); 6] = [
            // By a user, and by operation 1.
            (&[], Ok(true), Ok(false)),
            (&[Holder::User], Ok(true), Ok(false)),
            (&[ONE], held, Ok(true)),
            (&[Holder::User, ONE], held, Ok(false)),
            (&[ONE, TWO], held, Ok(false)),
            (&[TWO], Err(PauseRefused::Held(Uuid::from_u128(2))), Ok(false)),
        ];
        for (by, user, operation) in table {
            let mut pauses = paused(by);
            assert_eq!(pauses.remove(Holder::User, false), user, "{by:?}");
            if user.is_err() {
                assert_eq!(pauses, paused(by), "a refusal changes nothing");
            }
            let mut pauses = paused(by);
            assert_eq!(pauses.remove(ONE, false), operation, "{by:?}");
            assert!(!pauses.list().contains(&ONE));
            assert_eq!(paused(by).remove(Holder::User, true), Ok(true));
        }
    }

    #[test]
    fn a_pause_outlives_that_of_another() {
        let mut pauses = paused(&[Holder::User, ONE, ONE]);
        assert_eq!(pauses.remove(ONE, false), Ok(false));
        assert_eq!(pauses.list(), [Holder::User]);
        let mut pauses = paused(&[ONE, TWO]);
        assert_eq!(pauses.remove(ONE, false), Ok(false));
        assert_eq!(pauses.remove(TWO, false), Ok(true));
    }

    #[test]
    fn names_are_not_endless() {
        let mut pauses = Pauses::default();
        for id in 0..OPERATIONS_MAX as u128 {
            pauses.add(Holder::Operation(Uuid::from_u128(id))).unwrap();
        }
        pauses.add(ONE).unwrap();
        let more = Holder::Operation(Uuid::from_u128(1 << 64));
        assert_eq!(pauses.add(more), Err(PauseRefused::TooMany));
    }
}
