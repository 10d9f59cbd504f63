//! What the main loop's commands work on.

use std::rc::Rc;
use std::sync::Arc;

use crate::access::Access;
use crate::commands::exec::Children;
use crate::freeze::Freezing;
use crate::poller::Poller;
use crate::watchdog::Watchdog;

/// The state of the commands that are answered at once; the main loop owns it.
pub(crate) struct Agent {
    pub(crate) access: Access,
    pub(crate) children: Children,
    /// What the worker's engine is doing.
    pub(crate) freezing: Arc<Freezing>,
    pub(crate) watchdog: Arc<Watchdog>,
}

impl Agent {
    pub(crate) fn new(
        access: Access,
        poller: Rc<Poller>,
        freezing: Arc<Freezing>,
        watchdog: Arc<Watchdog>,
    ) -> Self {
        Self { access, children: Children::new(poller), freezing, watchdog }
    }
}
