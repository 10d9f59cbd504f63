//! The guest channel.

use std::time::Duration;

/// How the guest channel is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentStatus {
    /// The guest has opened the port.
    pub connected: bool,
    /// The agent has answered since then.
    pub in_sync: bool,
    /// The guest's filesystems are frozen, as far as this side knows.
    pub frozen: Option<FreezeStatus>,
    /// Freezes that ended because nobody was there to thaw.
    pub automatic_thaws: u64,
    /// Messages from the guest that were no replies.
    pub malformed_replies: u64,
}

/// A freeze in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreezeStatus {
    /// Who froze, while it is connected.
    pub by: Option<String>,
    /// Time until the automatic thaw, once nobody is there to thaw.
    pub thaw_in: Option<Duration>,
}
