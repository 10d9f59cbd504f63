//! The files in which the kernel tells about itself, below a root that tests can put elsewhere.
//!
//! Nothing that is read is trusted: files are read up to a limit, directories listed up to a limit, and
//! what is not as documented counts as absent.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Most bytes read of a file.
const LENGTH: u64 = 1 << 20;
/// Most entries of a directory that are looked at.
const ENTRIES: usize = 16 << 10;

/// Where `/proc`, `/sys`, `/run`, `/etc` and `/dev` are.
#[derive(Clone, Debug)]
pub(super) struct Root(PathBuf);

impl Root {
    /// The guest's own.
    pub(super) fn guest() -> Self {
        Self("/".into())
    }

    #[cfg(test)]
    pub(super) fn at(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// The place of an absolute path below this root.
    pub(super) fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.0.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// A file's first bytes.
    pub(super) fn read(&self, path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(self.join(path))?.take(LENGTH).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// A file's text; what is no UTF-8 is replaced.
    pub(super) fn text(&self, path: impl AsRef<Path>) -> io::Result<String> {
        self.read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A file's text without the white space around it; `None` if there is none.
    pub(super) fn line(&self, path: impl AsRef<Path>) -> Option<String> {
        let text = self.text(path).ok()?;
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    }

    /// Writes to a file that is there already.
    pub(super) fn write(&self, path: impl AsRef<Path>, text: &str) -> io::Result<()> {
        fs::OpenOptions::new().write(true).open(self.join(path))?.write_all(text.as_bytes())
    }

    /// The names in a directory, sorted.
    pub(super) fn names(&self, directory: impl AsRef<Path>) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(self.join(directory))?.take(ENTRIES).flatten();
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// The numbers of a directory's entries whose names are `prefix` and a number, ascending.
    pub(super) fn numbered<N: FromStr + Ord>(
        &self,
        directory: impl AsRef<Path>,
        prefix: &str,
    ) -> io::Result<Vec<N>> {
        let names = self.names(directory)?;
        let mut numbers: Vec<N> =
            names.iter().filter_map(|name| digits(name.strip_prefix(prefix)?)).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Whether there is such a file or directory.
    pub(super) fn has(&self, path: impl AsRef<Path>) -> bool {
        self.join(path).exists()
    }

    /// The last component of where a symbolic link points to.
    pub(super) fn link_name(&self, path: impl AsRef<Path>) -> Option<String> {
        fs::read_link(self.join(path)).ok()?.file_name()?.to_str().map(str::to_owned)
    }

    /// A path with all symbolic links resolved, again as seen from this root.
    pub(super) fn resolve(&self, path: impl AsRef<Path>) -> io::Result<PathBuf> {
        let root = self.0.canonicalize()?;
        let path = self.join(path).canonicalize()?;
        Ok(Path::new("/").join(path.strip_prefix(root).unwrap_or(&path)))
    }
}

/// A number that consists of digits only.
pub(super) fn digits<N: FromStr>(text: &str) -> Option<N> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_looked_for_below_the_root() {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::at(directory.path());
        fs::create_dir_all(root.join("/sys/cpu3/x")).unwrap();
        fs::create_dir(root.join("/sys/cpu10")).unwrap();
        fs::create_dir(root.join("/sys/cpufreq")).unwrap();
        fs::write(root.join("/sys/online"), " 1\n").unwrap();
        std::os::unix::fs::symlink("../sys/cpu3", root.join("/sys/link")).unwrap();
        assert_eq!(root.line("/sys/online").unwrap(), "1");
        assert_eq!(root.numbered::<u64>("/sys", "cpu").unwrap(), [3, 10]);
        assert_eq!(root.link_name("/sys/link").unwrap(), "cpu3");
        assert_eq!(root.resolve("/sys/link/x").unwrap(), Path::new("/sys/cpu3/x"));
        assert!(root.text("/sys/none").is_err());
        assert!(root.write("/sys/none", "1").is_err(), "nothing is created");
    }

    #[test]
    fn a_file_without_an_end_is_read_up_to_the_limit() {
        assert_eq!(Root::guest().read("/dev/zero").unwrap().len() as u64, LENGTH);
    }
}
