//! What an operation is about, as its records carry it.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::stage::{OperationKind, Protocol};

/// An image, so that it can be told from another one of the same name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ImageId {
    /// Canonical: absolute, without symbolic links.
    pub path: PathBuf,
    /// Device and inode; of a block device its own number and 0. Absent for what is not made yet. Device numbers may
    /// change when the machine starts again, so this only ever supports the path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<FileId>,
    /// Bytes.
    #[serde(default)]
    pub size: u64,
}

/// Which file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FileId {
    /// `st_dev`, or `st_rdev` of a block device.
    pub device: u64,
    /// `st_ino`, or 0.
    pub inode: u64,
}

impl FileId {
    fn of(metadata: &fs::Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            Self { device: metadata.rdev(), inode: 0 }
        } else {
            Self { device: metadata.dev(), inode: metadata.ino() }
        }
    }
}

impl ImageId {
    /// Of an image that is there.
    ///
    /// # Errors
    /// It is not, or cannot be looked at.
    pub fn of(path: &Path) -> io::Result<Self> {
        let path = fs::canonicalize(path)?;
        let metadata = fs::metadata(&path)?;
        let size = if metadata.file_type().is_block_device() {
            rustix::fs::seek(fs::File::open(&path)?, rustix::fs::SeekFrom::End(0))?
        } else {
            metadata.len()
        };
        Ok(Self { file: Some(FileId::of(&metadata)), path, size })
    }

    /// Of an image that will be made, in a directory that is there.
    ///
    /// # Errors
    /// There is no such directory, or `path` has no last name.
    pub fn planned(path: &Path, size: u64) -> io::Result<Self> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Ok(Self { path: fs::canonicalize(parent)?.join(name), file: None, size })
    }

    /// Whether `path` is a name of this image, be it there or not.
    pub fn is_named(&self, path: &Path) -> bool {
        let canonical = fs::canonicalize(path).or_else(|_| Self::planned(path, 0).map(|image| image.path));
        canonical.is_ok_and(|path| path == self.path)
    }

    /// Whether the file at `path` is the one that this image was.
    pub(crate) fn is_file(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|metadata| self.file == Some(FileId::of(&metadata)))
    }

    /// Whether `path` leads to this image, by whatever name: also a hard link. Inodes are used again, so this is for
    /// images that are open.
    pub fn is_at(&self, path: &Path) -> bool {
        let canonical = fs::canonicalize(path);
        canonical.is_ok_and(|path| path == self.path)
            || self.file.is_some_and(|file| fs::metadata(path).is_ok_and(|other| FileId::of(&other) == file))
    }
}

/// A disk and its images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DiskPlan {
    /// Its id in the VM.
    pub disk: String,
    /// Its image so far.
    pub source: ImageId,
    /// The other one.
    pub target: ImageId,
}

/// What is done on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct PlanFlags {
    /// The guest's filesystems are frozen.
    pub freeze: bool,
    /// The vCPUs are stopped.
    pub pause: bool,
    /// Afterwards the sources are stamped as superseded.
    pub retire_source: bool,
}

/// What an operation is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Plan {
    /// What it does.
    pub kind: OperationKind,
    /// Who decides.
    pub protocol: Protocol,
    /// The disks, all of which move or none.
    pub disks: Vec<DiskPlan>,
    /// Protocol A: the witness, absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub witness: Option<PathBuf>,
    /// What is done on the way.
    #[serde(default)]
    pub flags: PlanFlags,
}

impl Plan {
    /// The same with every number as long as it can become.
    pub(super) fn longest(&self) -> Self {
        let mut plan = self.clone();
        for image in plan.disks.iter_mut().flat_map(|disk| [&mut disk.source, &mut disk.target]) {
            image.file = Some(FileId { device: u64::MAX, inode: u64::MAX });
            image.size = u64::MAX;
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_known_by_any_of_its_names() {
        let base = tempfile::tempdir().unwrap();
        let (a, b) = (base.path().join("a.raw"), base.path().join("b.raw"));
        fs::write(&a, [0; 512]).unwrap();
        let planned = ImageId::planned(&b, 512).unwrap();
        fs::write(&b, [0; 512]).unwrap();
        let (link, hard) = (base.path().join("link"), base.path().join("hard"));
        std::os::unix::fs::symlink(&a, &link).unwrap();
        fs::hard_link(&a, &hard).unwrap();
        let image = ImageId::of(&link).unwrap();
        assert_eq!(image, ImageId::of(&a).unwrap());
        assert_eq!(image.size, 512);
        assert!(image.is_at(&a) && image.is_at(&link) && image.is_at(&hard));
        assert!(image.is_named(&link) && !image.is_named(&hard));
        assert!(!image.is_at(&b) && !image.is_at(&base.path().join("none")));
        assert!(planned.is_at(&b) && !planned.is_at(&a));
        fs::remove_file(&b).unwrap();
        assert!(planned.is_named(&b) && !planned.is_at(&b));
        assert!(ImageId::planned(&base.path().join("no/c.raw"), 0).is_err());
    }
}
