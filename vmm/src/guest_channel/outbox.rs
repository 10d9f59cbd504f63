//! What is on its way to the guest.

/// Bytes for the guest, requests all of them: one command, and around it what may overtake it.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    bytes: Vec<u8>,
    sent: usize,
    /// Where in `bytes` the command ends.
    command_end: usize,
}

impl Outbox {
    /// Adds a command.
    pub(super) fn command(&mut self, line: Vec<u8>) {
        self.append(line);
        self.command_end = self.bytes.len();
    }

    /// Adds a request that the guest may answer when it likes.
    pub(super) fn append(&mut self, line: Vec<u8>) {
        if self.bytes.is_empty() {
            self.bytes = line;
        } else {
            self.bytes.extend_from_slice(&line);
        }
    }

    /// What the guest has not taken yet.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.sent..]
    }

    /// The guest has taken so many bytes.
    pub(super) fn advance(&mut self, count: usize) {
        self.sent = self.bytes.len().min(self.sent + count);
        if self.sent == self.bytes.len() {
            self.clear();
        }
    }

    /// Whether the guest has not got the whole command yet.
    pub(super) fn holds_command(&self) -> bool {
        self.sent < self.command_end
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_with_the_guest_when_its_last_byte_is_whatever_comes_behind_it() {
        let mut outbox = Outbox::default();
        outbox.append(b"ask\n".to_vec());
        assert!(!outbox.holds_command());
        outbox.command(b"command\n".to_vec());
        outbox.append(b"ask\n".to_vec());
        assert_eq!(outbox.bytes(), b"ask\ncommand\nask\n");
        outbox.advance(11);
        assert!(outbox.holds_command());
        outbox.advance(1);
        assert!(!outbox.holds_command());
        assert_eq!(outbox.bytes(), b"ask\n");
        outbox.advance(100);
        assert!(outbox.bytes().is_empty());
        outbox.command(b"next\n".to_vec());
        assert!(outbox.holds_command());
        outbox.clear();
        assert!(!outbox.holds_command() && outbox.bytes().is_empty());
    }
}
