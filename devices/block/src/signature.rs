//! Magic numbers of what is certainly not meant to be a raw disk.
//!
//! LUKS is absent on purpose: a guest that encrypts its whole disk leaves exactly such a raw image.

/// How many bytes from the start of an image [`foreign`] wants to see.
pub(crate) const PREFIX: usize = 68;

/// (offset, magic, name)
const SIGNATURES: &[(usize, &[u8], &str)] = &[
    (0, b"QFI\xfb", "a QCOW2 image"),
    (0, b"QED\0", "a QED image"),
    (0, b"KDMV", "a VMDK image"),
    (0, b"COWD", "a VMDK image"),
    (0, b"# Disk DescriptorFile", "a VMDK descriptor"),
    (0, b"vhdxfile", "a VHDX image"),
    (0, b"conectix", "a VHD image"),
    (64, &[0x7f, 0x10, 0xda, 0xbe], "a VDI image"),
    (0, b"\x1f\x8b\x08", "a gzip archive"),
    (0, b"\xfd7zXZ\0", "an xz archive"),
    (0, &[0x28, 0xb5, 0x2f, 0xfd], "a Zstandard archive"),
    (0, b"BZh", "a bzip2 archive"),
    (0, b"PK\x03\x04", "a zip archive"),
];

/// Names the other format that an image beginning with `prefix` seems to have.
pub(crate) fn foreign(prefix: &[u8]) -> Option<&'static str> {
    SIGNATURES
        .iter()
        .find(|(at, magic, _)| prefix.get(*at..).is_some_and(|rest| rest.starts_with(magic)))
        .map(|(_, _, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_formats_are_recognised_and_raw_content_is_not() {
        assert_eq!(foreign(b"QFI\xfb\0\0\0\x03"), Some("a QCOW2 image"));
        let mut vdi = [0; PREFIX];
        vdi[64..].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
        assert_eq!(foreign(&vdi), Some("a VDI image"));
        assert_eq!(foreign(&[0; PREFIX]), None);
        assert_eq!(foreign(b"LUKS\xba\xbe\0\x02"), None);
        assert_eq!(foreign(b""), None);
    }
}
