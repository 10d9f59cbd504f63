//! What an operation is about, as its records carry it.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::stage::{OperationKind, Protocol};
use crate::device;

/// An image, so that it can be told from another one of the same name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ImageId {
    /// Of a file: canonical, absolute and without symbolic links. Of a block device: absolute, and as it was given; what
    /// the links in /dev lead to is a name that may be another device's tomorrow.
    pub path: PathBuf,
    /// What a block device is, where that can be told ([`device::identity`]). Absent for files, and in records of before
    /// there were any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
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
        if !metadata.file_type().is_block_device() {
            return Self { device: metadata.dev(), inode: metadata.ino() };
        }
        // A loop device and the file that it shows are one image.
        let identity = device::identity(metadata.rdev());
        let file = identity.as_deref().and_then(device::file_behind).and_then(|file| fs::metadata(file).ok());
        match file.filter(fs::Metadata::is_file) {
            Some(file) => Self::of(&file),
            None => Self { device: metadata.rdev(), inode: 0 },
        }
    }
}

/// An image is not where it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Displaced {
    /// Something else has its name.
    #[error("{} was the block device {expected}, and now it is {found}{}", path.display(), elsewhere(others))]
    Another {
        /// The name.
        path: PathBuf,
        /// What it was.
        expected: String,
        /// What it is.
        found: String,
        /// Names under which the kernel has the one that was there.
        others: Vec<PathBuf>,
    },
    /// Nothing but its size tells the device that has its name from the one that was there.
    #[error("{} was a block device of {expected} bytes, and now it is {found}", path.display())]
    Size {
        /// The name.
        path: PathBuf,
        /// Bytes it had.
        expected: u64,
        /// What it is.
        found: String,
    },
}

fn elsewhere(others: &[PathBuf]) -> String {
    match others {
        [] => "; that one is not attached".to_owned(),
        others => {
            let names: Vec<_> = others.iter().map(|path| path.display().to_string()).collect();
            format!("; that one is {}, and it cannot be told which", names.join(" and "))
        }
    }
}

impl ImageId {
    /// Of an image that is there.
    ///
    /// # Errors
    /// It is not, or cannot be looked at.
    pub fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        let file = Some(FileId::of(&metadata));
        if metadata.file_type().is_block_device() {
            let path = std::path::absolute(path)?;
            let size = size_of_device(&path)?;
            return Ok(Self { device: device::identity(metadata.rdev()), path, file, size });
        }
        Ok(Self { path: fs::canonicalize(path)?, device: None, file, size: metadata.len() })
    }

    /// Of an image that will be made, in a directory that is there.
    ///
    /// # Errors
    /// There is no such directory, or `path` has no last name.
    pub fn planned(path: &Path, size: u64) -> io::Result<Self> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Ok(Self { path: fs::canonicalize(parent)?.join(name), device: None, file: None, size })
    }

    /// Whether it was a block device when this was written.
    pub fn is_device(&self) -> bool {
        self.device.is_some() || self.file.is_some_and(|file| file.inode == 0)
    }

    /// Where the image is now. A block device that has another name by now is found by what it is.
    ///
    /// # Errors
    /// [`Displaced`]: its name leads to another device, and it is not found elsewhere.
    pub fn locate(&self) -> Result<PathBuf, Displaced> {
        let path = self.path.clone();
        let Some(expected) = &self.device else {
            return match fs::metadata(&path) {
                Ok(now) if self.is_device() => self.check_size(&now).map(|()| path),
                _ => Ok(path),
            };
        };
        if device::identity_at(&path).as_ref() == Some(expected) {
            return Ok(path);
        }
        let mut others = device::find(expected);
        if others.len() == 1 {
            return Ok(others.remove(0));
        }
        Err(Displaced::Another { found: what_is_at(&path), path, expected: expected.clone(), others })
    }

    fn check_size(&self, now: &fs::Metadata) -> Result<(), Displaced> {
        let (path, expected) = (self.path.clone(), self.size);
        if !now.file_type().is_block_device() {
            let found = what_is_at(&path);
            return Err(Displaced::Size { path, expected, found });
        }
        match size_of_device(&path) {
            Ok(size) if size != expected => {
                Err(Displaced::Size { path, expected, found: format!("one of {size} bytes") })
            }
            // Whoever opens it will say why it cannot be opened.
            _ => Ok(()),
        }
    }

    /// Whether `path` leads to this image, as far as that can be told without opening it: of a block device that is told
    /// from others, by what it is; of anything else, by name, be it there or not. A loop device is the file behind it.
    pub fn is(&self, path: &Path) -> bool {
        let now = device::identity_at(path);
        let shown = |identity: &Option<String>, file: &Path| {
            identity.as_deref().and_then(device::file_behind).is_some_and(|behind| behind == file)
        };
        match &self.device {
            Some(_) if now.is_some() => now == self.device,
            Some(_) => fs::canonicalize(path).is_ok_and(|path| shown(&self.device, &path)),
            None => self.has_name(path) || shown(&now, &self.path),
        }
    }

    /// The same, or `path` is how it was called, whatever has that name now.
    pub fn is_named(&self, path: &Path) -> bool {
        self.is(path) || self.has_name(path)
    }

    fn has_name(&self, path: &Path) -> bool {
        if std::path::absolute(path).is_ok_and(|path| path == self.path) {
            return true;
        }
        let canonical = fs::canonicalize(path).or_else(|_| Self::planned(path, 0).map(|image| image.path));
        // The links to a device lead elsewhere tomorrow.
        self.device.is_none() && canonical.is_ok_and(|path| path == self.path)
    }

    /// Whether both are records of one image.
    pub fn is_same(&self, other: &Self) -> bool {
        match (&self.device, &other.device) {
            (Some(a), Some(b)) => a == b,
            _ => self.path == other.path,
        }
    }

    /// Whether the file at `path` is the one that this image was.
    pub(crate) fn is_file(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|metadata| self.file == Some(FileId::of(&metadata)))
    }

    /// Whether `path` leads to this image, by whatever name: also a hard link, another node of a block device or another way
    /// to it, or the file behind it. Inodes and device numbers are used again, so this is for images that are open.
    pub fn is_at(&self, path: &Path) -> bool {
        match (&self.device, device::identity_at(path)) {
            (Some(device), Some(now)) => *device == now,
            (Some(_), None) => self.is_file(path),
            (None, _) => fs::canonicalize(path).is_ok_and(|path| path == self.path) || self.is_file(path),
        }
    }
}

fn size_of_device(path: &Path) -> io::Result<u64> {
    Ok(rustix::fs::seek(fs::File::open(path)?, rustix::fs::SeekFrom::End(0))?)
}

fn what_is_at(path: &Path) -> String {
    match device::number(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => "not there".to_owned(),
        Err(error) => format!("not to be looked at ({error})"),
        Ok(None) => "no block device".to_owned(),
        Ok(Some(number)) => {
            device::identity(number).unwrap_or_else(|| "one that nothing tells from others".to_owned())
        }
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

    fn device(path: &str, device: Option<&str>) -> ImageId {
        let file = Some(FileId { device: 0x700, inode: 0 });
        ImageId { path: path.into(), device: device.map(str::to_owned), file, size: 512 }
    }

    #[test]
    fn a_block_device_is_not_what_has_its_name_by_now() {
        let base = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(base.path()).unwrap().join("a.raw");
        let text = path.to_str().unwrap().to_owned();
        let known = device(&text, Some("naa.none"));
        let lost = known.locate().unwrap_err().to_string();
        let because = "was the block device naa.none, and now it is not there; that one is not attached";
        assert_eq!(lost, format!("{text} {because}"));
        fs::write(&path, [0; 512]).unwrap();
        assert!(known.locate().unwrap_err().to_string().contains("now it is no block device;"));
        assert!(known.is_named(&path) && !known.is(&path) && !known.is_at(&path));
        // Without an identity there is its kind and its size; without even that, the name.
        let unknown = device(&text, None).locate().unwrap_err().to_string();
        assert_eq!(unknown, format!("{text} was a block device of 512 bytes, and now it is no block device"));
        let file = ImageId { file: None, ..device(&text, None) };
        assert_eq!(file.locate().unwrap(), path);
        assert_eq!(device("/nowhere/x", None).locate().unwrap(), Path::new("/nowhere/x"));
        assert!(known.is_same(&device("/dev/other", Some("naa.none"))));
        assert!(!known.is_same(&device(&text, Some("naa.other"))) && known.is_same(&device(&text, None)));
    }

    #[test]
    fn a_loop_device_is_the_file_behind_it() {
        let base = tempfile::tempdir().unwrap();
        let path = fs::canonicalize(base.path()).unwrap().join("a.raw");
        fs::write(&path, [0; 512]).unwrap();
        let whole = format!("loop:{}@0", path.display());
        assert!(device("/dev/loop7", Some(&whole)).is(&path));
        let part = format!("loop:{}@512", path.display());
        assert!(!device("/dev/loop7", Some(&part)).is(&path));
    }

    #[test]
    fn records_of_before_devices_were_told_apart_are_read() {
        let old = r#"{"path":"/dev/dm-4","file":{"device":64772,"inode":0},"size":512}"#;
        let image: ImageId = serde_json::from_str(old).unwrap();
        assert!(image.is_device() && image.device.is_none());
        assert_eq!(serde_json::to_string(&image).unwrap(), old);
    }
}
