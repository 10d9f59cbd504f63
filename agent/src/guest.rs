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
    pub(crate) fn new(statedir: &Path) -> Self {
        Self { files: Files::new(statedir), freezer: Freezer::new(Linux, statedir) }
    }
}
