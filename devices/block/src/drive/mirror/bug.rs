//! Mistakes that one could make here, for the random test to find: each is made in one place, and never outside of
//! tests.

use super::Mirror;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(not(test), expect(dead_code, reason = "made in tests only"))]
pub(in crate::drive) enum Bug {
    /// A mirror is attached while requests are in flight.
    AttachWithoutDrain,
    /// A tracked write marks when it begins instead of when it is over.
    MarkAtSubmit,
    /// A copy takes its chunks when it is over instead of when it begins.
    TakeAfterCopy,
    /// An active write takes its chunks when it is over instead of when it begins.
    TakeAfterActiveWrite,
    /// Takes chunks that a write covers in part.
    TakeTouched,
    /// An extent is asked for before the chunks are taken.
    StaleExtent,
    /// Nothing is copied after the guest was held.
    NoLastPass,
    /// The target is not synced in the end.
    NoLastSync,
    /// An end is reached while requests are in flight.
    FinishWithoutDrain,
    /// A write that failed on the source is believed to have changed nothing.
    SourceFailureNotMarked,
    /// A write that failed on the target is believed to have reached it.
    TargetFailureNotMarked,
    /// A sync of the target that failed is believed to have lost nothing.
    SyncFailureNotMarked,
    /// A sync covers what is written while it is under way.
    SyncCoversTheFuture,
    /// Copies make no claims.
    CopyWithoutClaim,
    /// Active writes make no claims.
    ActiveWithoutClaim,
    /// The guest's memory is sent twice instead of a copy of it.
    NoBounce,
    /// A target that was zero once is zero for ever.
    ZeroForEver,
    /// A discard is believed to leave zeroes.
    DiscardAsZeroes,
    /// A backup lets a write go before what it changes is copied.
    WriteBeforeCopy,
    /// A backup lets a write go while what it changes is being copied.
    WriteDuringCopy,
}

impl Mirror {
    #[cfg(test)]
    pub(super) fn has_bug(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, reason = "as in tests")]
    pub(super) const fn has_bug(&self, _: Bug) -> bool {
        false
    }
}
