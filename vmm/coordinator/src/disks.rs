//! The durable configuration: which image is which disk of a VM, and since when.
//!
//! It is a file of its own, `disks.json`, and not the user's configuration: that may go on naming an image that was
//! replaced long ago. The journal outranks it: what a decision there says and this does not say yet is committed
//! before anything is opened ([`crate::resolve`]).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::durable::{self, DurableError, Role};
use crate::journal::{ImageId, Plan};
use crate::record::Operation;
use crate::state_dir::StateDir;

const VERSION: u32 = 1;

/// Why there is no telling which image is which disk.
#[derive(Debug, thiserror::Error)]
pub enum DisksError {
    /// The file cannot be read or replaced.
    #[error(transparent)]
    File(#[from] DurableError),
    /// It is no such file.
    #[error("The durable configuration {} makes no sense", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// It is from a later version of this program.
    #[error("The durable configuration {} has version {version}, which this program does not know", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// It is newer than an operation that is to be committed.
    #[error("The durable configuration {} is of generation {known} already, and the operation of {asked}", path.display())]
    Ahead {
        /// The file.
        path: PathBuf,
        /// What it has.
        known: u64,
        /// The operation's.
        asked: u64,
    },
    /// It is older than the journal, or gone.
    #[error(
        "The durable configuration {} is of generation {known}, and the journal knows of {expected}: bring back the \
         file as it was, or remove {} to forget all that was decided about this VM's disks",
        path.display(), directory.display()
    )]
    Behind {
        /// The file.
        path: PathBuf,
        /// The state directory.
        directory: PathBuf,
        /// What it has.
        known: u64,
        /// What it should have.
        expected: u64,
    },
}

/// Which image is which disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DurableDisks {
    version: u32,
    /// Of the last operation that moved a disk; 0 if none has.
    pub generation: u64,
    /// By disk id. A disk that never moved is not here.
    pub disks: BTreeMap<String, DurableDisk>,
}

impl Default for DurableDisks {
    fn default() -> Self {
        Self { version: VERSION, generation: 0, disks: BTreeMap::new() }
    }
}

/// The image of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DurableDisk {
    /// It.
    pub image: ImageId,
    /// Since which generation.
    pub generation: u64,
    /// By which operation.
    pub operation: Uuid,
    /// Images that were this disk, oldest first.
    #[serde(default)]
    pub replaced: Vec<Replaced>,
}

/// An image that was a disk, and what took its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Replaced {
    /// The image that was.
    pub image: ImageId,
    /// The one that took its place; it may have been replaced as well.
    pub by: ImageId,
    /// At which generation.
    pub generation: u64,
    /// By which operation.
    pub operation: Uuid,
}

impl DurableDisks {
    /// Reads it; none is one without disks.
    ///
    /// # Errors
    /// [`DisksError`].
    pub fn load(state: &StateDir) -> Result<Self, DisksError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let path = state.disks();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(Role::Disks.failed("read", &path)(error).into()),
        };
        let damaged = |source| DisksError::Damaged { path: path.clone(), source };
        let Versioned { version } = serde_json::from_slice(&text).map_err(damaged)?;
        if version != VERSION {
            return Err(DisksError::Version { path, version });
        }
        serde_json::from_slice(&text).map_err(damaged)
    }

    /// Refuses one that is older than what the journal says.
    ///
    /// # Errors
    /// [`DisksError::Behind`].
    pub fn check_generation(&self, state: &StateDir, expected: u64) -> Result<(), DisksError> {
        if self.generation >= expected {
            return Ok(());
        }
        let (path, directory) = (state.disks(), state.path());
        Err(DisksError::Behind { path, directory, known: self.generation, expected })
    }

    /// Makes the targets of an operation the disks, durably. To do it again changes nothing that can be read.
    ///
    /// The decision has to be in the journal before.
    ///
    /// # Errors
    /// [`DisksError`]: what is on the disk is the old one or the new one.
    pub fn commit(state: &StateDir, operation: Operation, plan: &Plan) -> Result<Self, DisksError> {
        let mut disks = Self::load(state)?;
        if disks.generation > operation.generation {
            let (known, asked) = (disks.generation, operation.generation);
            return Err(DisksError::Ahead { path: state.disks(), known, asked });
        }
        // One that says so already is written again: who wrote it may have died before it was to last.
        if disks.generation < operation.generation {
            disks.check_generation(state, operation.generation - 1)?;
            for disk in &plan.disks {
                disks.replace(&disk.disk, &disk.source, &disk.target, operation);
            }
            disks.generation = operation.generation;
        }
        let path = state.disks();
        let damaged = |source| DisksError::Damaged { path: path.clone(), source };
        let mut text = serde_json::to_vec_pretty(&disks).map_err(damaged)?;
        text.push(b'\n');
        durable::replace(Role::Disks, &path, &text, "commit")?;
        Ok(disks)
    }

    fn replace(&mut self, disk: &str, source: &ImageId, target: &ImageId, operation: Operation) {
        let Operation { id, generation, .. } = operation;
        let mut replaced = self.disks.remove(disk).map(|known| known.replaced).unwrap_or_default();
        // One that was the disk before and is it again; and one that was replaced twice.
        replaced.retain(|known| !known.image.is_same(target) && !known.image.is_same(source));
        if !source.is_same(target) {
            replaced.push(Replaced { image: source.clone(), by: target.clone(), generation, operation: id });
        }
        let known = DurableDisk { image: target.clone(), generation, operation: id, replaced };
        self.disks.insert(disk.to_owned(), known);
    }

    /// What took the place of the image at `path` as the disk `disk`, in the end; `None` if nothing did. Of a block device
    /// counts what it is, and then how it was called when it was the disk: a configuration that names it may be as old.
    pub fn successor(&self, disk: &str, path: &Path) -> Option<&Replaced> {
        self.in_the_end(disk, |image| image.is(path))
            .or_else(|| self.in_the_end(disk, |image| image.is_named(path)))
    }

    /// The same for an image whose disk is not known: by what it is alone.
    pub fn successor_of_any(&self, path: &Path) -> Option<&Replaced> {
        self.disks.keys().find_map(|disk| self.in_the_end(disk, |image| image.is(path)))
    }

    fn in_the_end(&self, disk: &str, is_it: impl Fn(&ImageId) -> bool) -> Option<&Replaced> {
        let known = self.disks.get(disk)?;
        // Another device may have the name of one that was replaced.
        if is_it(&known.image) && known.image.device.is_some() {
            return None;
        }
        let mut found = known.replaced.iter().find(|known| is_it(&known.image))?;
        // No image is in the list twice; were it so, this ends all the same.
        for _ in &known.replaced {
            match known.replaced.iter().find(|next| next.image.is_same(&found.by)) {
                Some(next) => found = next,
                None => break,
            }
        }
        Some(found)
    }

    /// Whether the image at `path` is the disk that an operation made it.
    pub fn is_current(&self, path: &Path, operation: Uuid) -> bool {
        self.disks.values().any(|disk| disk.operation == operation && disk.image.is(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{DiskPlan, OperationKind, PlanFlags, Protocol};

    struct Lab {
        base: tempfile::TempDir,
        state: StateDir,
        generation: u64,
    }

    impl Lab {
        fn new() -> Self {
            let base = tempfile::tempdir().unwrap();
            let state = StateDir::below(base.path(), "vm").unwrap();
            state.create().unwrap();
            Self { base, state, generation: 0 }
        }

        fn path(&self, name: &str) -> PathBuf {
            fs::canonicalize(self.base.path()).unwrap().join(name)
        }

        fn image(&self, name: &str) -> ImageId {
            ImageId::planned(&self.path(name), 512).unwrap()
        }

        fn pivot(&mut self, disk: &str, source: &str, target: &str) -> DurableDisks {
            let committed = self.commit(disk, source, target).unwrap();
            let before = fs::read(self.state.disks()).unwrap();
            self.generation -= 1;
            assert_eq!(self.commit(disk, source, target).unwrap(), committed);
            assert_eq!(fs::read(self.state.disks()).unwrap(), before);
            assert_eq!(DurableDisks::load(&self.state).unwrap(), committed);
            committed
        }

        fn commit(&mut self, disk: &str, source: &str, target: &str) -> Result<DurableDisks, DisksError> {
            self.generation += 1;
            let generation = self.generation;
            let operation = Operation { id: Uuid::from_u128(generation.into()), generation, epoch: 1 };
            let disk = DiskPlan { disk: disk.into(), source: self.image(source), target: self.image(target) };
            let plan = Plan {
                kind: OperationKind::Pivot,
                protocol: Protocol::A,
                disks: vec![disk],
                witness: None,
                flags: PlanFlags::default(),
            };
            DurableDisks::commit(&self.state, operation, &plan)
        }

        fn successor(&self, disks: &DurableDisks, disk: &str, image: &str) -> Option<String> {
            let found = disks.successor(disk, &self.path(image))?;
            Some(found.by.path.file_name().unwrap().to_str().unwrap().to_owned())
        }
    }

    #[test]
    fn an_image_leads_to_what_took_its_place_in_the_end() {
        let mut lab = Lab::new();
        lab.pivot("vda", "a", "b");
        let disks = lab.pivot("vda", "b", "c");
        assert_eq!(disks.disks["vda"].image.path, lab.path("c"));
        for image in ["a", "b"] {
            assert_eq!(lab.successor(&disks, "vda", image).as_deref(), Some("c"));
        }
        assert_eq!(lab.successor(&disks, "vda", "c"), None);
        assert_eq!(lab.successor(&disks, "vda", "z"), None);
        assert_eq!(lab.successor(&disks, "vdb", "a"), None);
        assert!(disks.is_current(&lab.path("c"), Uuid::from_u128(2)));
        assert!(!disks.is_current(&lab.path("c"), Uuid::from_u128(1)));
    }

    #[test]
    fn a_disk_may_go_back_to_an_image_it_had() {
        let mut lab = Lab::new();
        lab.pivot("vda", "a", "b");
        let disks = lab.pivot("vda", "b", "a");
        lab.generation = 0;
        let stale = lab.commit("vda", "x", "y").unwrap_err();
        assert!(matches!(stale, DisksError::Ahead { known: 2, asked: 1, .. }), "{stale}");
        lab.generation = 2;
        assert_eq!(lab.successor(&disks, "vda", "b").as_deref(), Some("a"));
        assert_eq!(lab.successor(&disks, "vda", "a"), None);
        let disks = lab.pivot("vda", "a", "c");
        assert_eq!(lab.successor(&disks, "vda", "b").as_deref(), Some("c"));
    }

    #[test]
    fn a_generation_is_not_skipped() {
        let mut lab = Lab::new();
        lab.pivot("vda", "a", "b");
        let before = DurableDisks::load(&lab.state).unwrap();
        let operation = Operation { id: Uuid::nil(), generation: 3, epoch: 1 };
        let plan = Plan {
            kind: OperationKind::Pivot,
            protocol: Protocol::A,
            disks: vec![],
            witness: None,
            flags: PlanFlags::default(),
        };
        let refused = DurableDisks::commit(&lab.state, operation, &plan).unwrap_err();
        assert!(matches!(refused, DisksError::Behind { known: 1, expected: 2, .. }), "{refused}");
        assert_eq!(DurableDisks::load(&lab.state).unwrap(), before);
    }
}
