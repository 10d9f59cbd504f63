//! New image files: `blockdev-create`, and the targets that `drive-mirror` makes.
//!
//! A file that exists is emptied first, unless somebody uses it. Writing zeroes into a large file takes its time, so a
//! job does it on a thread of its own, which looks at `stop` every mebibyte.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use block::{Disk, DiskOptions, Format, OpenError, Source};
use rustix::fs::FallocateFlags;

/// How much of a new file is reserved (QEMU's `PreallocMode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing: the file is one hole.
    Off,
    /// All blocks.
    Falloc,
    /// All blocks, written with zeroes.
    Full,
}

/// Makes a raw image of `size` bytes.
///
/// # Errors
///
/// Why not, in words. A file that was there is untouched if it is in use; else it may be there in part.
pub fn create(path: &Path, size: u64, preallocation: Preallocation, stop: &AtomicBool) -> Result<(), String> {
    let could_not =
        |what: &str, why: &dyn std::fmt::Display| format!("Could not {what} '{}': {why}", path.display());
    let open = File::options().read(true).write(true).create(true).truncate(false).open(path);
    let file = open.map_err(|error| could_not("create", &plain(&error)))?;
    let mut data = file.try_clone().map_err(|error| could_not("create", &plain(&error)))?;
    let _lock = lock(file, path)?;
    data.set_len(0).map_err(|error| could_not("resize", &plain(&error)))?;
    let fill = |data: &mut File| match preallocation {
        Preallocation::Off => data.set_len(size),
        Preallocation::Falloc if size == 0 => Ok(()),
        Preallocation::Falloc => Ok(rustix::fs::fallocate(&*data, FallocateFlags::empty(), 0, size)?),
        Preallocation::Full => write_zeroes(data, size, stop),
    };
    fill(&mut data).map_err(|error| could_not("resize", &plain(&error)))
}

/// Locks the image while it is made. A file whose size is none of an image is nobody's disk.
fn lock(file: File, path: &Path) -> Result<Option<Disk>, String> {
    let source = Source::Descriptor { fd: file.into(), name: path.display().to_string() };
    match Disk::open(DiskOptions { format: Some(Format::Raw), ..DiskOptions::new(source) }) {
        Ok(disk) => Ok(Some(disk)),
        Err(OpenError::OddSize { .. } | OpenError::NoLocks { .. }) => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

fn write_zeroes(file: &mut File, size: u64, stop: &AtomicBool) -> io::Result<()> {
    let zeroes = vec![0; 1 << 20];
    let mut left = size;
    while left > 0 {
        if stop.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::ECANCELED));
        }
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(zeroes.len());
        file.write_all(&zeroes[..length])?;
        left -= length as u64;
    }
    file.sync_data()
}

/// The host's words alone, as QEMU has them.
pub fn plain(error: &io::Error) -> String {
    without_number(&error.to_string()).to_owned()
}

/// The same of its text.
pub(super) fn without_number(text: &str) -> &str {
    text.split(" (os error").next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    fn make(path: &Path, size: u64, preallocation: Preallocation) -> Result<(), String> {
        create(path, size, preallocation, &AtomicBool::new(false))
    }

    #[test]
    fn a_new_image_has_its_size_and_is_empty() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        std::fs::write(&path, [1; 700]).unwrap();
        for (preallocation, allocated) in
            [(Preallocation::Off, false), (Preallocation::Falloc, true), (Preallocation::Full, true)]
        {
            make(&path, 3 << 20, preallocation).unwrap();
            let metadata = std::fs::metadata(&path).unwrap();
            assert_eq!(metadata.len(), 3 << 20);
            assert_eq!(metadata.blocks() * 512 >= 3 << 20, allocated, "{preallocation:?}");
            assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
        }
        make(&path, 0, Preallocation::Falloc).unwrap();
    }

    #[test]
    fn an_image_that_is_used_stays_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        std::fs::write(&path, [1; 1024]).unwrap();
        let used = Disk::open(DiskOptions::path(&path)).unwrap();
        assert!(make(&path, 512, Preallocation::Off).unwrap_err().contains("in use"));
        drop(used);
        assert_eq!(std::fs::read(&path).unwrap(), [1; 1024]);
    }

    #[test]
    fn failures_have_qemus_words_and_a_stop_ends_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("none/a");
        let error = make(&path, 512, Preallocation::Off).unwrap_err();
        assert_eq!(error, format!("Could not create '{}': No such file or directory", path.display()));
        let path = directory.path().join("a");
        let stopped = create(&path, 1 << 40, Preallocation::Full, &AtomicBool::new(true));
        assert!(stopped.unwrap_err().contains("canceled"));
    }
}
