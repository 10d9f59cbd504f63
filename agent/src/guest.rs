//! What the worker's commands work on.

use std::path::Path;

use crate::commands::file::Files;
use crate::freeze::{Freezer, Linux};

/// The state of the commands that may take long; the worker owns it.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) files: Files,
    pub(crate) freezer: Freezer<Linux>,
}

impl Guest {
    pub(crate) fn new(statedir: &Path, freezer: Freezer<Linux>) -> Self {
        Self { files: Files::new(statedir), freezer }
    }
}

#[cfg(test)]
impl Guest {
    /// One that does not freeze: this machine is a real one.
    pub(crate) fn for_test(statedir: &Path) -> Self {
        let (watchdog, _) = crate::watchdog::Watchdog::fake();
        let freezer = Freezer::new(
            Linux,
            statedir,
            Default::default(),
            None,
            (watchdog.into(), crate::watchdog::Past::Elsewhere),
        );
        Self::new(statedir, freezer.expect("an eventfd"))
    }
}
