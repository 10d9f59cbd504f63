//! The guest image that is used when no kernel is given.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::bail;

/// A kernel and what it boots into, as `guest-image/build` makes them.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::cli) struct GuestImage {
    pub(in crate::cli) kernel: PathBuf,
    pub(in crate::cli) initrd: PathBuf,
}

impl GuestImage {
    /// The first one of: `TARN_GUEST_IMAGE` alone, where it is set; the build's output beside this executable;
    /// `/usr/share` and `/usr/lib`.
    pub(in crate::cli) fn find() -> anyhow::Result<Self> {
        if let Some(dir) = env::var_os("TARN_GUEST_IMAGE").filter(|dir| !dir.is_empty()) {
            let dir = PathBuf::from(dir);
            return match Self::in_dir(&dir) {
                Some(image) => Ok(image),
                None => bail!(
                    "TARN_GUEST_IMAGE is {dir:?}, and there is no vmlinux or vmlinuz with an initramfs.cpio.zst or .gz"
                ),
            };
        }
        // target/release/tarn, or target/TRIPLE/release/tarn.
        let executable = env::current_exe().unwrap_or_default();
        let beside = executable.ancestors().skip(2).take(2).map(|dir| dir.join("guest-image"));
        let installed = ["/usr/share/tarn/guest-image", "/usr/lib/tarn/guest-image"].map(PathBuf::from);
        match beside.chain(installed).find_map(|dir| Self::in_dir(&dir)) {
            Some(image) => Ok(image),
            None => bail!(
                "No kernel is given and there is no guest image: build it with `guest-image/build`, point \
                 TARN_GUEST_IMAGE to one, or use --kernel FILE"
            ),
        }
    }

    /// The uncompressed kernel first: it needs no decompressing in the guest.
    fn in_dir(dir: &Path) -> Option<Self> {
        let first =
            |names: [&str; 2]| names.map(|name| dir.join(name)).into_iter().find(|path| path.exists());
        let kernel = first(["vmlinux", "vmlinuz"])?;
        Some(Self { kernel, initrd: first(["initramfs.cpio.zst", "initramfs.cpio.gz"])? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_a_kernel_and_an_initramfs_the_quicker_ones_first() {
        let dir = tempfile::tempdir().unwrap();
        let add = |name: &str| std::fs::write(dir.path().join(name), "").unwrap();
        assert_eq!(GuestImage::in_dir(dir.path()), None);
        add("vmlinuz");
        assert_eq!(GuestImage::in_dir(dir.path()), None);
        add("initramfs.cpio.gz");
        let image = GuestImage::in_dir(dir.path()).unwrap();
        assert_eq!(image.kernel, dir.path().join("vmlinuz"));
        add("vmlinux");
        add("initramfs.cpio.zst");
        let image = GuestImage::in_dir(dir.path()).unwrap();
        assert_eq!(
            (image.kernel, image.initrd),
            (dir.path().join("vmlinux"), dir.path().join("initramfs.cpio.zst"))
        );
    }
}
