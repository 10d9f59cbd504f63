//! What the disk's thread waits for, as epoll carries it.

/// What wakes the thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    Command,
    Engine,
    /// Of the mirror's target.
    Target,
    /// Of a queue.
    Doorbell(usize),
}

impl From<Token> for u64 {
    fn from(token: Token) -> Self {
        match token {
            Token::Command => 0,
            Token::Engine => 1,
            Token::Target => 2,
            Token::Doorbell(queue) => 3 + queue as u64,
        }
    }
}

impl From<u64> for Token {
    fn from(data: u64) -> Self {
        match data {
            0 => Self::Command,
            1 => Self::Engine,
            2 => Self::Target,
            queue => Self::Doorbell(usize::try_from(queue - 3).unwrap_or(usize::MAX)),
        }
    }
}
