//! The state directory of a VM: what it must not forget when its machine dies.
//!
//! ```text
//!  $TARN_STATE_DIR, /var/lib/tarn (root), $XDG_STATE_HOME/tarn, ~/.local/state/tarn
//!    └── NAME/                0700; there once an operation has begun, on a disk
//!         ├── lock            flock of who writes here; its process, as text
//!         ├── journal         operations, step by step                        (crate::journal)
//!         ├── disks.json      which image is which disk, and since when       (crate::disks)
//!         └── witness-UUID    of a pivot: written by the VMM                   (crate::record::witness)
//! ```

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::durable::{self, DurableError};

/// Why a VM can have no state directory.
#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    /// The name would lead elsewhere.
    #[error("{name:?} is no name of a VM")]
    Name {
        /// It.
        name: String,
    },
    /// Nowhere to put it.
    #[error("There is no place for what has to last: set TARN_STATE_DIR, XDG_STATE_HOME or HOME")]
    NoBase,
}

/// Where the durable state of a VM is; it need not be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDir {
    name: String,
    base: PathBuf,
}

impl StateDir {
    /// Of the VM `name` of this user. Looks at nothing but the environment.
    ///
    /// # Errors
    /// [`StateDirError`].
    pub fn of(name: &str) -> Result<Self, StateDirError> {
        let uid = rustix::process::getuid().as_raw();
        let base = base_for(|name| env::var_os(name).filter(|value| !value.is_empty()), uid);
        Self::below(&base.ok_or(StateDirError::NoBase)?, name)
    }

    /// Of the VM `name` below another base directory.
    ///
    /// # Errors
    /// [`StateDirError::Name`].
    pub fn below(base: &Path, name: &str) -> Result<Self, StateDirError> {
        // The rest of the rules for names is the VMM's; this is what keeps it inside.
        let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        if !plain || name.is_empty() || name.starts_with(['.', '-']) {
            return Err(StateDirError::Name { name: name.to_owned() });
        }
        Ok(Self { name: name.to_owned(), base: base.to_owned() })
    }

    /// The VM's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory above: of all VMs.
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// The directory itself.
    pub fn path(&self) -> PathBuf {
        self.base.join(&self.name)
    }

    /// The journal.
    pub fn journal(&self) -> PathBuf {
        self.path().join("journal")
    }

    /// The lock of who writes.
    pub fn lock(&self) -> PathBuf {
        self.path().join("lock")
    }

    /// The durable configuration.
    pub fn disks(&self) -> PathBuf {
        self.path().join("disks.json")
    }

    /// The witness of an operation.
    pub fn witness(&self, operation: Uuid) -> PathBuf {
        self.path().join(format!("witness-{operation}"))
    }

    /// Makes the directory, with those above it, so that it lasts.
    ///
    /// # Errors
    /// It cannot be made, or would be in memory.
    pub fn create(&self) -> Result<(), DurableError> {
        durable::make_directory(&self.path())
    }
}

fn base_for(env: impl Fn(&str) -> Option<OsString>, uid: u32) -> Option<PathBuf> {
    if let Some(dir) = env("TARN_STATE_DIR") {
        return Some(dir.into());
    }
    if uid == 0 {
        return Some("/var/lib/tarn".into());
    }
    let of_user = env("XDG_STATE_HOME").map(PathBuf::from);
    let of_user = of_user.or_else(|| Some(Path::new(&env("HOME")?).join(".local/state")));
    Some(of_user?.join("tarn"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_follows_the_environment() {
        let env = |set: &'static [(&str, &str)]| {
            move |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value))
        };
        let home = [("HOME", "/home/u")];
        let all = [("HOME", "/home/u"), ("XDG_STATE_HOME", "/xdg"), ("TARN_STATE_DIR", "/x")];
        let base = |set: &[(&'static str, &'static str)], uid| base_for(env(set.to_vec().leak()), uid);
        assert_eq!(base(&home, 7), Some("/home/u/.local/state/tarn".into()));
        assert_eq!(base(&all[..2], 7), Some("/xdg/tarn".into()));
        assert_eq!(base(&all[..2], 0), Some("/var/lib/tarn".into()));
        assert_eq!(base(&all, 0), Some("/x".into()));
        assert_eq!(base(&[], 7), None);
    }

    #[test]
    fn no_name_leads_out_of_the_base() {
        for name in ["", ".", "..", "a/b", "../x", ".hidden", "-x", "a b"] {
            assert!(StateDir::below(Path::new("/b"), name).is_err(), "{name}");
        }
        let dir = StateDir::below(Path::new("/b"), "web-1.x").unwrap();
        assert_eq!(dir.journal(), Path::new("/b/web-1.x/journal"));
        let witness = dir.witness(Uuid::nil());
        assert_eq!(witness, Path::new("/b/web-1.x/witness-00000000-0000-0000-0000-000000000000"));
    }
}
