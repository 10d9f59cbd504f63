//! The host's verdict on an operation.

use std::fmt;
use std::io;
use std::str::FromStr;

/// Errors that disks have, by name.
const SYMBOLS: [(&str, i32); 19] = [
    ("EIO", libc::EIO),
    ("ENOSPC", libc::ENOSPC),
    ("EDQUOT", libc::EDQUOT),
    ("EAGAIN", libc::EAGAIN),
    ("EBUSY", libc::EBUSY),
    ("EACCES", libc::EACCES),
    ("EPERM", libc::EPERM),
    ("EROFS", libc::EROFS),
    ("EFBIG", libc::EFBIG),
    ("EINVAL", libc::EINVAL),
    ("ENOMEM", libc::ENOMEM),
    ("ENODEV", libc::ENODEV),
    ("ENXIO", libc::ENXIO),
    ("ENODATA", libc::ENODATA),
    ("EOPNOTSUPP", libc::EOPNOTSUPP),
    ("ENOTCONN", libc::ENOTCONN),
    ("ESTALE", libc::ESTALE),
    ("ETIMEDOUT", libc::ETIMEDOUT),
    ("EREMOTEIO", libc::EREMOTEIO),
];

/// An `errno` value, always positive. Small enough to keep beside every request, and what error
/// policies decide on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

impl Errno {
    /// `errno` as the kernel numbers it; anything that is no error number becomes `EIO`.
    pub fn new(errno: i32) -> Self {
        if (1..4096).contains(&errno) { Self(errno) } else { Self(libc::EIO) }
    }

    /// The number.
    pub fn get(self) -> i32 {
        self.0
    }

    /// Its name where it has one, as in `EIO`, else the number; [`Errno::from_str`] reads both.
    pub fn symbol(self) -> String {
        let known = SYMBOLS.iter().find(|(_, number)| *number == self.0);
        known.map_or_else(|| self.0.to_string(), |(name, _)| (*name).to_owned())
    }

    /// There is no room left, on the device or in the quota: waiting for an administrator may help.
    pub fn is_no_space(self) -> bool {
        matches!(self.0, libc::ENOSPC | libc::EDQUOT)
    }

    /// The file system or device cannot do this kind of operation at all.
    pub(crate) fn is_unsupported(self) -> bool {
        matches!(self.0, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::ENODEV)
    }
}

impl FromStr for Errno {
    type Err = UnknownErrno;

    /// A name, or a number from 1 to 4095.
    fn from_str(text: &str) -> Result<Self, UnknownErrno> {
        let number = match SYMBOLS.iter().find(|(name, _)| *name == text) {
            Some((_, number)) => Some(*number),
            None => text.parse().ok().filter(|number| (1..4096).contains(number)),
        };
        number.map(Self).ok_or(UnknownErrno)
    }
}

/// No error number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Unknown error number")]
pub struct UnknownErrno;

impl From<io::Error> for Errno {
    fn from(error: io::Error) -> Self {
        Self::new(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> Self {
        Self::from_raw_os_error(errno.0)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&io::Error::from(*self), f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({self})")
    }
}

impl std::error::Error for Errno {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_and_a_full_quota_are_told_from_other_errors() {
        assert!(Errno::new(libc::ENOSPC).is_no_space());
        assert!(Errno::new(libc::EDQUOT).is_no_space());
        assert!(!Errno::new(libc::EIO).is_no_space());
    }

    #[test]
    fn names_and_numbers_are_read_back() {
        for (name, number) in SYMBOLS {
            assert_eq!(name.parse(), Ok(Errno::new(number)));
            assert_eq!(Errno::new(number).symbol(), name);
        }
        assert_eq!("4095".parse::<Errno>().map(Errno::symbol), Ok("4095".into()));
        for wrong in ["", "0", "-5", "4096", "eio", "EIEIO"] {
            assert_eq!(wrong.parse::<Errno>(), Err(UnknownErrno), "{wrong}");
        }
    }

    #[test]
    fn what_is_no_error_number_becomes_eio() {
        for odd in [0, -5, 4096, i32::MIN, i32::MAX] {
            assert_eq!(Errno::new(odd).get(), libc::EIO, "{odd}");
        }
    }
}
