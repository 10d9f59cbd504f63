//! Kernel modules.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::Path;

use rustix::system::finit_module;

use super::say;

/// The kernel unpacks the module itself (Linux `include/uapi/linux/module.h`).
const MODULE_INIT_COMPRESSED_FILE: i32 = 4;

/// Modules needed at boot.
const BOOT: &str = "/etc/tarn/modules";
/// Lists of modules needed for one thing each.
const NAMED: &str = "/etc/tarn/modules.d";

/// Loads what the guest needs before it can reach its devices; those on a PCI bus only if there is one.
pub(super) fn load_boot() {
    let has_pci = fs::read_dir("/sys/bus/pci/devices").is_ok_and(|mut devices| devices.next().is_some());
    if has_pci {
        load_named("pci");
    }
    load_list(Path::new(BOOT));
}

/// Loads what is needed for `name`: a filesystem type, or something that can wait.
pub(super) fn load_named(name: &str) {
    load_list(&Path::new(NAMED).join(name));
}

/// Loads the modules a file lists, one path per line, in order. A list that is not there is empty; a
/// module that cannot be loaded is reported, and the others are tried.
fn load_list(list: &Path) {
    let text = match fs::read_to_string(list) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return,
        Err(error) => return say!("cannot read {}: {error}", list.display()),
    };
    for path in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Err(error) = load(Path::new(path)) {
            say!("cannot load {path}: {error}");
        }
    }
}

fn load(path: &Path) -> io::Result<()> {
    let packed = path.extension().is_some_and(|extension| extension != "ko");
    let flags = if packed { MODULE_INIT_COMPRESSED_FILE } else { 0 };
    match finit_module(File::open(path)?, c"", flags) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
