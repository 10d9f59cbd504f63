//! `/dev/virtio-ports/NAME`: the names that udev gives the ports of virtio-serial devices elsewhere.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::say;

const CLASS: &str = "/sys/class/virtio-ports";
const DIRECTORY: &str = "/dev/virtio-ports";

/// Makes the links what they should be now. The kernel announces a port before it knows its name, and
/// announces the name later; both are uevents, after which this is called.
pub(super) fn refresh() {
    let wanted = ports(Path::new(CLASS));
    if let Err(error) = update(Path::new(DIRECTORY), &wanted) {
        say!("cannot keep {DIRECTORY}: {error}");
    }
}

/// Names of ports and the links' targets. A name comes from the host: one that is no file name is
/// left out.
fn ports(class: &Path) -> BTreeMap<String, PathBuf> {
    let Ok(entries) = fs::read_dir(class) else { return BTreeMap::new() };
    let named = |entry: fs::DirEntry| {
        let name = fs::read_to_string(entry.path().join("name")).ok()?;
        let name = name.trim_end_matches('\n');
        let is_file_name = !matches!(name, "" | "." | "..") && !name.contains(['/', '\0']);
        is_file_name.then(|| (name.to_owned(), Path::new("..").join(entry.file_name())))
    };
    entries.filter_map(Result::ok).filter_map(named).collect()
}

fn update(directory: &Path, wanted: &BTreeMap<String, PathBuf>) -> io::Result<()> {
    if !wanted.is_empty() {
        fs::create_dir_all(directory)?;
    }
    let Ok(links) = fs::read_dir(directory) else { return Ok(()) };
    for link in links.filter_map(Result::ok) {
        let target = fs::read_link(link.path()).ok();
        let name = link.file_name();
        if target.is_none() || name.to_str().and_then(|name| wanted.get(name)) != target.as_ref() {
            fs::remove_file(link.path())?;
        }
    }
    for (name, target) in wanted {
        match symlink(target, directory.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_follow_the_ports() {
        let root = tempfile::tempdir().unwrap();
        let class = root.path().join("class");
        let directory = root.path().join("virtio-ports");
        let port = |device: &str, name: &str| {
            fs::create_dir_all(class.join(device)).unwrap();
            fs::write(class.join(device).join("name"), name).unwrap();
        };
        port("vport0p0", "");
        port("vport0p1", "org.qemu.guest_agent.0\n");
        port("vport0p2", "../evil\n");
        let expected = [("org.qemu.guest_agent.0".to_owned(), PathBuf::from("../vport0p1"))];
        assert_eq!(ports(&class), BTreeMap::from(expected));
        update(&directory, &ports(&class)).unwrap();
        let link = directory.join("org.qemu.guest_agent.0");
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("../vport0p1"));
        port("vport0p1", "");
        port("vport1p1", "org.qemu.guest_agent.0\n");
        update(&directory, &ports(&class)).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("../vport1p1"));
        fs::remove_dir_all(&class).unwrap();
        update(&directory, &ports(&class)).unwrap();
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
    }
}
