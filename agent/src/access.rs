//! Which commands may be used: the block and allow lists, and what is safe while frozen.

use crate::schema::Command;

/// The lists of the configuration, by command name. Names that no command has do no harm: a list may
/// have been written for a newer agent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Access {
    /// May not be used, whatever the other list says.
    pub(crate) block: Vec<String>,
    /// If present, only these may be used.
    pub(crate) allow: Option<Vec<String>>,
}

impl Access {
    /// Whether the command may be used now. While frozen the lists do not count: a thaw that is blocked
    /// would leave the guest frozen for ever.
    pub(crate) fn permits(&self, command: &Command, frozen: bool) -> bool {
        if frozen {
            return command.while_frozen;
        }
        let lists = |list: &[String]| list.iter().any(|name| name == command.name);
        !lists(&self.block) && self.allow.as_deref().is_none_or(lists)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::schema::Run;

    const SAFE: Command = Command::new("safe", "", Run::Prompt(|_, _| Ok(json!({})))).while_frozen();
    const OTHER: Command = Command::new("other", "", Run::Prompt(|_, _| Ok(json!({}))));

    fn access(block: &[&str], allow: Option<&[&str]>) -> Access {
        let owned = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect();
        Access { block: owned(block), allow: allow.map(owned) }
    }

    #[test]
    fn a_block_wins_over_an_allow_and_an_allow_list_denies_the_rest() {
        assert!(access(&[], None).permits(&OTHER, false));
        assert!(!access(&["other"], None).permits(&OTHER, false));
        assert!(!access(&[], Some(&["safe"])).permits(&OTHER, false));
        assert!(!access(&["other"], Some(&["other"])).permits(&OTHER, false));
        assert!(access(&["unknown"], Some(&["other", "unknown"])).permits(&OTHER, false));
    }

    #[test]
    fn while_frozen_only_what_is_safe_runs_and_no_list_can_block_it() {
        let access = access(&["safe"], Some(&["other"]));
        assert!(access.permits(&SAFE, true));
        assert!(!access.permits(&OTHER, true));
    }
}
