//! The initial RAM disk: several files, one after the other, each at a 4-byte boundary, as the kernel's
//! unpacker wants them (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::PathBuf;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{BootError, open_file};
use crate::machine::layout::PAGE_SIZE;

/// Where an initrd is in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// First byte.
    pub start: GuestAddress,
    /// Bytes.
    pub len: u64,
}

/// The files of an initrd, opened.
pub struct Initrd {
    parts: Vec<(PathBuf, File, u64)>,
}

impl Initrd {
    /// Opens all of `paths`.
    ///
    /// # Errors
    ///
    /// A file is missing, unreadable or a directory.
    pub fn open(paths: &[PathBuf]) -> Result<Self, BootError> {
        let open = |path: &PathBuf| {
            let fail = |source| BootError::Open { what: "initrd", path: path.clone(), source };
            let file = open_file("initrd", path)?;
            let metadata = file.metadata().map_err(fail)?;
            if !metadata.is_file() {
                return Err(fail(std::io::Error::other("not a regular file")));
            }
            Ok((path.clone(), file, metadata.len()))
        };
        paths.iter().map(open).collect::<Result<_, _>>().map(|parts| Self { parts })
    }

    /// Copies them to the highest place below `end`, and above `kernel_end`.
    ///
    /// # Errors
    ///
    /// It does not fit, or a file has become shorter.
    pub fn load(
        &self,
        memory: &GuestMemoryMmap,
        kernel_end: u64,
        end: u64,
    ) -> Result<Option<Loaded>, BootError> {
        let len: u64 = self.parts.iter().map(|(_, _, len)| len.next_multiple_of(4)).sum();
        if len == 0 {
            return Ok(None);
        }
        let floor = kernel_end.next_multiple_of(PAGE_SIZE);
        let room = end.saturating_sub(floor);
        if len > room {
            return Err(BootError::InitrdTooLarge { size: len, room });
        }
        let start = (end - len) & !(PAGE_SIZE - 1);
        if start < floor {
            return Err(BootError::InitrdTooLarge { size: len, room });
        }
        let mut at = start;
        for (path, file, len) in &self.parts {
            let fail = |source| BootError::Read { what: "initrd", path: path.clone(), source };
            let mut file = file;
            file.seek(SeekFrom::Start(0)).map_err(fail)?;
            let bytes = usize::try_from(*len).map_err(|e| fail(std::io::Error::other(e)))?;
            memory
                .read_exact_volatile_from(GuestAddress(at), &mut file, bytes)
                .map_err(|e| fail(std::io::Error::other(e)))?;
            at += len.next_multiple_of(4);
        }
        Ok(Some(Loaded { start: GuestAddress(start), len }))
    }
}
