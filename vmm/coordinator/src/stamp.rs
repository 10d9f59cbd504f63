//! A note beside an image which says that it is not to be booted: not complete yet, or not the disk any more.
//!
//! ```text
//!   target   INCOMPLETE{operation} ──── pivoted, durable configuration names it ────▶ no stamp
//!   source   no stamp ─────────────── the same, and it is to be retired ────────────▶ SUPERSEDED{operation, by}
//! ```
//!
//! A target that was there before may have had a stamp of its own. The operation's covers it, and gives it back if the
//! operation ends before anything was written to the image.
//!
//! It is a file `IMAGE.stamp` that holds one record: a raw image has no room of its own. A block device has its stamp in
//! the directory `.stamps` beside the state directories, as `/dev` is in memory: under what the device is
//! ([`crate::device`]), whatever it is called, or else under its number, which may be another one's after the machine has
//! started again. A loop device has that of the file behind it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use uuid::Uuid;

use crate::device;
use crate::durable::{self, Durable, DurableError, Role, with_suffix};
use crate::journal::{self, ImageId};
use crate::record::{Damage, Operation, RECORD_MAX, Record, TooLong};
use crate::state_dir::StateDir;

/// The member of a stamp's payload that has the stamp which it covers.
const COVERS: &str = "covers";

/// Why a stamp cannot be read or set.
#[derive(Debug, thiserror::Error)]
pub enum StampError {
    /// The file cannot be read, written or removed.
    #[error(transparent)]
    File(#[from] DurableError),
    /// It holds no stamp.
    #[error("{} makes no sense as the stamp of an image", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Damage,
    },
    /// The image is another operation's.
    #[error("{} is being made by operation {id} of VM {vm}, says {}", image.display(), path.display())]
    Taken {
        /// The image.
        image: PathBuf,
        /// The operation.
        id: Uuid,
        /// The VM.
        vm: String,
        /// The stamp.
        path: PathBuf,
    },
    /// Names that are too long.
    #[error("The stamp does not fit into a record")]
    TooLong(#[from] TooLong),
}

/// Why an image is not to be booted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StampKind {
    /// An operation is filling it, or was when it ended.
    Incomplete,
    /// Another image has taken its place.
    Superseded {
        /// That one.
        by: PathBuf,
    },
}

impl StampKind {
    fn number(&self) -> u16 {
        match self {
            Self::Incomplete => 1,
            Self::Superseded { .. } => 2,
        }
    }

    fn step(&self) -> &'static str {
        match self {
            Self::Incomplete => "incomplete",
            Self::Superseded { .. } => "superseded",
        }
    }
}

/// The stamp of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// What it says.
    pub kind: StampKind,
    /// Who set it.
    pub operation: Operation,
    /// Whose operation that is.
    pub vm: String,
}

impl Stamp {
    /// The stamp of the image at `image`, if it has one. `state` is that of any VM.
    ///
    /// # Errors
    /// [`StampError`].
    pub fn read(state: &StateDir, image: impl Into<Stamped>) -> Result<Option<Self>, StampError> {
        Ok(Self::read_whole(state, image)?.map(|(stamp, _)| stamp))
    }

    /// The stamp, and the one that it covers.
    fn read_whole(
        state: &StateDir,
        image: impl Into<Stamped>,
    ) -> Result<Option<(Self, Option<Self>)>, StampError> {
        let path = path_of(state, image);
        let file = match Durable::open_to_read(Role::Stamp, &path) {
            Ok(file) => file,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut bytes = vec![0; RECORD_MAX];
        file.read_at(&mut bytes, 0)?;
        let damaged = |source| StampError::Damaged { path: path.clone(), source };
        let (record, _) = Record::decode(&bytes).map_err(damaged)?;
        let covered =
            record.payload.get(COVERS).map(|covered| Self::from_json(covered).ok_or(Damage::Checksum));
        let covered = covered.transpose().map_err(damaged)?;
        let Record { kind, operation, payload, .. } = record;
        let stamp = Self::of(kind, operation, &payload).ok_or_else(|| damaged(Damage::Checksum))?;
        Ok(Some((stamp, covered)))
    }

    fn of(kind: u16, operation: Operation, payload: &Value) -> Option<Self> {
        let vm = payload.get("vm")?.as_str()?.to_owned();
        let by = || payload.get("by").and_then(Value::as_str).map(PathBuf::from);
        let kind = match kind {
            1 => StampKind::Incomplete,
            2 => StampKind::Superseded { by: by()? },
            _ => return None,
        };
        Some(Self { kind, operation, vm })
    }

    /// As another stamp covers it.
    fn to_json(&self) -> Value {
        let Operation { id, generation, epoch } = self.operation;
        let mut value = self.payload();
        value["kind"] = self.kind.number().into();
        value["operation"] = json!({"id": id, "generation": generation, "epoch": epoch});
        value
    }

    fn from_json(value: &Value) -> Option<Self> {
        let kind = value.get("kind")?.as_u64()?.try_into().ok()?;
        let operation = value.get("operation")?;
        let number = |name: &str| operation.get(name)?.as_u64();
        let id = operation.get("id")?.as_str()?.parse().ok()?;
        let operation = Operation { id, generation: number("generation")?, epoch: number("epoch")? };
        Self::of(kind, operation, value)
    }

    /// Stamps the image at `image`, in place of what stamp it has. It lasts when this returns.
    ///
    /// # Errors
    /// [`StampError`].
    pub fn write(&self, state: &StateDir, image: impl Into<Stamped>) -> Result<(), StampError> {
        self.put(state, image, None, durable::replace)
    }

    /// Stamps an image that is there, over the stamp that it has, until [`uncover`](Self::uncover) brings that back. Once
    /// more by the same operation changes nothing of what is covered.
    ///
    /// # Errors
    /// [`StampError`]; [`StampError::Damaged`]: what would have to be brought back cannot be read.
    pub(crate) fn cover(&self, state: &StateDir, image: impl Into<Stamped>) -> Result<(), StampError> {
        let image = image.into();
        let covered = match Self::read_whole(state, image.clone())? {
            Some((known, covered)) if known.operation.id == self.operation.id => covered,
            known => known.map(|(known, _)| known),
        };
        self.put(state, image, covered.as_ref(), durable::replace)
    }

    /// Takes back the stamp of an operation that has left the image as it was: what it covered is there again. It lasts
    /// when this returns. A stamp that is not the operation's stays.
    ///
    /// # Errors
    /// [`StampError`].
    pub(crate) fn uncover(
        state: &StateDir,
        image: impl Into<Stamped>,
        operation: &Operation,
    ) -> Result<(), StampError> {
        let image = image.into();
        match Self::read_whole(state, image.clone())? {
            Some((stamp, Some(covered))) if stamp.operation.id == operation.id => covered.write(state, image),
            // Who brought it back may have died before that was to last.
            Some((stamp, _)) if stamp.operation.id != operation.id => {
                let file = Durable::open_to_read(Role::Stamp, &path_of(state, image))?;
                Ok(file.sync_name()?)
            }
            _ => Self::remove(state, image, operation).map(drop),
        }
    }

    /// Stamps an image that is to be made, and tells whether its operation had done so before.
    ///
    /// # Errors
    /// [`StampError::Taken`]: another operation has, and may be making it.
    pub(crate) fn claim(&self, state: &StateDir, image: &Path) -> Result<bool, StampError> {
        let is_ours = |stamp: &Self| stamp.operation.id == self.operation.id;
        let taken = |stamp: Self| {
            let (id, vm) = (stamp.operation.id, stamp.vm);
            StampError::Taken { image: image.to_owned(), id, vm, path: path_of(state, image) }
        };
        let found = Self::read(state, image)?;
        let had = found.as_ref().is_some_and(is_ours);
        match found {
            None => self.put(state, image, None, durable::place_new)?,
            Some(stamp) if had || stamp.is_stale(state, image) => self.write(state, image)?,
            Some(stamp) => return Err(taken(stamp)),
        }
        match Self::read(state, image)? {
            // Somebody else was there between the two.
            Some(stamp) if !is_ours(&stamp) => Err(taken(stamp)),
            _ => Ok(had),
        }
    }

    /// Whether it is a note beside an image that is gone, of an operation that is over.
    fn is_stale(&self, state: &StateDir, image: &Path) -> bool {
        let is_over = || {
            let of = StateDir::below(state.base(), &self.vm).ok().filter(|of| of.journal().exists());
            let operations = of.and_then(|of| journal::operations(&of).ok());
            operations.is_some_and(|all| {
                all.last().is_none_or(|last| last.id() != self.operation.id || !last.is_open())
            })
        };
        !image.exists() && (matches!(self.kind, StampKind::Superseded { .. }) || is_over())
    }

    fn put(
        &self,
        state: &StateDir,
        image: impl Into<Stamped>,
        covered: Option<&Self>,
        put: impl FnOnce(Role, &Path, &[u8], &str) -> Result<(), DurableError>,
    ) -> Result<(), StampError> {
        let mut payload = self.payload();
        if let Some(covered) = covered {
            payload[COVERS] = covered.to_json();
        }
        let record = Record { kind: self.kind.number(), sequence: 1, operation: self.operation, payload };
        let path = path_of(state, image);
        if path.starts_with(state.base())
            && let Some(directory) = path.parent()
        {
            durable::make_directory(directory)?;
        }
        Ok(put(Role::Stamp, &path, &record.encode()?, self.kind.step())?)
    }

    fn payload(&self) -> Value {
        let mut payload = json!({"vm": self.vm});
        if let StampKind::Superseded { by } = &self.kind {
            payload["by"] = by.to_string_lossy().into();
        }
        payload
    }

    /// Removes the stamp of an image, durably, if it is one of this operation. Tells whether it was. That it has none
    /// lasts when this returns.
    ///
    /// # Errors
    /// [`StampError`].
    pub fn remove(
        state: &StateDir,
        image: impl Into<Stamped>,
        operation: &Operation,
    ) -> Result<bool, StampError> {
        let image = image.into();
        match Self::read(state, image.clone())? {
            Some(stamp) if stamp.operation.id != operation.id => Ok(false),
            _ => Ok(durable::remove(Role::Stamp, &path_of(state, image))?),
        }
    }
}

/// An image that may have a stamp: one that is there, by its path, or one that an operation has written down, which a
/// path may not lead to any more.
#[derive(Clone, Debug)]
pub struct Stamped {
    path: PathBuf,
    device: Option<String>,
}

impl From<&Path> for Stamped {
    fn from(path: &Path) -> Self {
        Self { path: path.to_owned(), device: device::identity_at(path) }
    }
}

impl From<&PathBuf> for Stamped {
    fn from(path: &PathBuf) -> Self {
        path.as_path().into()
    }
}

impl From<&ImageId> for Stamped {
    fn from(image: &ImageId) -> Self {
        Self { path: image.path.clone(), device: image.device.clone() }
    }
}

/// Where the stamp of an image is.
pub fn path_of(state: &StateDir, image: impl Into<Stamped>) -> PathBuf {
    let Stamped { path, device } = image.into();
    let numbered = || {
        let number = device::number(&path).ok().flatten()?;
        Some(format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number)))
    };
    match device.as_deref().map(|identity| (identity, device::file_behind(identity))) {
        Some((_, Some(file))) => return with_suffix(file, ".stamp"),
        Some((identity, None)) => return of_device(state, identity),
        None => {}
    }
    if let Some(number) = numbered() {
        return of_device(state, &number);
    }
    let canonical = fs::canonicalize(&path).or_else(|_| ImageId::planned(&path, 0).map(|image| image.path));
    with_suffix(&canonical.unwrap_or(path), ".stamp")
}

fn of_device(state: &StateDir, identity: &str) -> PathBuf {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._:-".contains(c) { c } else { '_' };
    let name: String = identity.chars().map(plain).take(200).collect();
    // Two paths may look alike by now.
    let mark = identity.contains('/').then(|| format!("-{:08x}", crc32c::crc32c(identity.as_bytes())));
    state.base().join(".stamps").join(format!("block-{name}{}.stamp", mark.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(id: u128) -> Operation {
        Operation { id: Uuid::from_u128(id), generation: 3, epoch: 1 }
    }

    #[test]
    fn an_image_has_the_last_stamp_it_was_given_until_its_operation_removes_it() {
        let base = tempfile::tempdir().unwrap();
        let state = StateDir::below(&base.path().join("state"), "vm").unwrap();
        let image = base.path().join("a.raw");
        fs::write(&image, "").unwrap();
        let link = base.path().join("link");
        std::os::unix::fs::symlink(&image, &link).unwrap();
        assert_eq!(Stamp::read(&state, &image).unwrap(), None);
        let incomplete = Stamp { kind: StampKind::Incomplete, operation: operation(1), vm: "vm".into() };
        incomplete.write(&state, &link).unwrap();
        assert_eq!(Stamp::read(&state, &image).unwrap().as_ref(), Some(&incomplete));
        assert!(base.path().join("a.raw.stamp").exists());
        let kind = StampKind::Superseded { by: "/img/b.raw".into() };
        let superseded = Stamp { kind, ..incomplete };
        superseded.write(&state, &image).unwrap();
        assert_eq!(Stamp::read(&state, &link).unwrap(), Some(superseded));
        assert!(!Stamp::remove(&state, &image, &operation(2)).unwrap());
        assert!(Stamp::remove(&state, &image, &operation(1)).unwrap());
        assert_eq!(Stamp::read(&state, &image).unwrap(), None);
        assert!(!state.base().exists());
    }

    #[test]
    fn a_block_device_keeps_its_stamp_when_it_gets_another_name() {
        let base = tempfile::tempdir().unwrap();
        let state = StateDir::below(&base.path().join("state"), "vm").unwrap();
        let image = |path: &str, device: &str| ImageId {
            path: path.into(),
            device: Some(device.into()),
            file: None,
            size: 512,
        };
        let stamp = Stamp { kind: StampKind::Incomplete, operation: operation(1), vm: "vm".into() };
        stamp.write(&state, &image("/dev/sdb", "naa.5001-part2")).unwrap();
        assert!(state.base().join(".stamps/block-naa.5001-part2.stamp").exists());
        assert_eq!(Stamp::read(&state, &image("/dev/sdc", "naa.5001-part2")).unwrap(), Some(stamp.clone()));
        assert_eq!(Stamp::read(&state, &image("/dev/sdb", "naa.5002-part2")).unwrap(), None);
        // A loop device and the file that it shows have one; of parts of a file, each has its own.
        let file = base.path().join("a b.raw");
        let whole = format!("loop:{}@0", file.display());
        stamp.write(&state, &image("/dev/loop0", &whole)).unwrap();
        assert_eq!(Stamp::read(&state, &file).unwrap(), Some(stamp));
        let [a, b] =
            ["a b", "a_b"].map(|name| path_of(&state, &image("/dev/loop0", &format!("loop:/{name}@512"))));
        assert!(a != b && a.starts_with(state.base()), "{a:?}");
        assert!(Stamp::remove(&state, &image("/dev/loop1", &whole), &operation(1)).unwrap());
        assert_eq!(Stamp::read(&state, &file).unwrap(), None);
    }

    #[test]
    fn an_image_that_is_to_be_made_is_one_operations_alone() {
        let base = tempfile::tempdir().unwrap();
        let state = StateDir::below(&base.path().join("state"), "vm").unwrap();
        let image = base.path().join("new.raw");
        let stamp = |id| Stamp { kind: StampKind::Incomplete, operation: operation(id), vm: "vm".into() };
        assert!(!stamp(1).claim(&state, &image).unwrap());
        assert!(stamp(1).claim(&state, &image).unwrap());
        let error = stamp(2).claim(&state, &image).unwrap_err();
        assert!(matches!(error, StampError::Taken { .. }), "{error}");
        assert_eq!(Stamp::read(&state, &image).unwrap(), Some(stamp(1)));
        // One that was a disk once, and is gone, is in nobody's way.
        let kind = StampKind::Superseded { by: "/img/b.raw".into() };
        Stamp { kind, ..stamp(1) }.write(&state, &image).unwrap();
        assert!(!stamp(2).claim(&state, &image).unwrap());
    }

    #[test]
    fn a_stamp_comes_back_from_under_that_of_an_operation_which_has_left_the_image_as_it_was() {
        let base = tempfile::tempdir().unwrap();
        let state = StateDir::below(&base.path().join("state"), "vm").unwrap();
        let image = base.path().join("a.raw");
        fs::write(&image, "").unwrap();
        let ours = |id| Stamp { kind: StampKind::Incomplete, operation: operation(id), vm: "vm".into() };
        let read = || Stamp::read(&state, &image).unwrap();
        ours(1).cover(&state, &image).unwrap();
        Stamp::uncover(&state, &image, &operation(1)).unwrap();
        assert_eq!(read(), None);
        let kind = StampKind::Superseded { by: "/img/b.raw".into() };
        let former = Stamp { kind, operation: operation(7), vm: "db".into() };
        former.write(&state, &image).unwrap();
        // A second coordinator of the same operation stamps it again.
        for epoch in 1..=2 {
            let operation = Operation { epoch, ..operation(1) };
            Stamp { operation, ..ours(1) }.cover(&state, &image).unwrap();
            assert_eq!(read().unwrap().operation, operation);
        }
        Stamp::uncover(&state, &image, &operation(2)).unwrap();
        assert_eq!(read().unwrap().operation.id, operation(1).id);
        for _ in 0..2 {
            Stamp::uncover(&state, &image, &operation(1)).unwrap();
            assert_eq!(read(), Some(former.clone()));
        }
        // What could not be brought back is not covered.
        fs::write(base.path().join("a.raw.stamp"), "something else").unwrap();
        assert!(matches!(ours(1).cover(&state, &image), Err(StampError::Damaged { .. })));
    }

    #[test]
    fn a_stamp_that_cannot_be_read_is_not_taken_for_none() {
        let base = tempfile::tempdir().unwrap();
        let state = StateDir::below(base.path(), "vm").unwrap();
        let image = base.path().join("a.raw");
        for content in ["", "something else"] {
            fs::write(base.path().join("a.raw.stamp"), content).unwrap();
            let error = Stamp::read(&state, &image).unwrap_err();
            assert!(matches!(error, StampError::Damaged { .. }), "{error}");
        }
    }
}
