//! In which order filesystems are frozen.
//!
//! A filesystem whose device lies in a file of another one (a loop device, however deep beneath device
//! mapper or RAID) writes there until it is frozen itself: frozen in the wrong order, it waits for the
//! other for ever, and with it the freeze. So who depends on a filesystem is frozen before it; among those
//! that are free, the last mounted comes first.

use super::mounts::{Device, Superblock};

/// What a block device lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// Another block device: a partition's disk, a member of a device mapper or RAID device.
    Device(Device),
    /// A file, reached through the mount with this id.
    File { mount: u64 },
    /// A file that cannot be found.
    Lost,
}

/// Block devices looked at for one filesystem; nobody stacks more.
const DEPTH: usize = 256;

/// The filesystems that one writes to.
#[derive(Debug, Default)]
struct Dependencies {
    known: Vec<usize>,
    /// And others, nobody knows which.
    lost: bool,
}

/// Indices of `superblocks`, which are in the order of mounting, in the order of freezing.
pub(crate) fn freezing_order(
    superblocks: &[Superblock],
    backing: impl Fn(Device) -> Vec<Backing>,
) -> Vec<usize> {
    let dependencies: Vec<Dependencies> =
        superblocks.iter().map(|superblock| dependencies(superblock, superblocks, &backing)).collect();
    let depends = |one: usize, other: usize| {
        let dependencies_of_one = &dependencies[one];
        dependencies_of_one.known.contains(&other) || (dependencies_of_one.lost && !dependencies[other].lost)
    };
    let mut waiting: Vec<usize> = (0..superblocks.len()).collect();
    let mut order = Vec::with_capacity(waiting.len());
    while !waiting.is_empty() {
        let is_free = |&candidate: &usize| {
            waiting.iter().all(|&other| other == candidate || !depends(other, candidate))
        };
        // Without a free one they depend on each other in a circle, and no order is right.
        let next = waiting.iter().rposition(is_free).unwrap_or(waiting.len() - 1);
        order.push(waiting.remove(next));
    }
    order
}

fn dependencies(
    superblock: &Superblock,
    all: &[Superblock],
    backing: &impl Fn(Device) -> Vec<Backing>,
) -> Dependencies {
    let mut found = Dependencies::default();
    let mut devices = vec![superblock.device()];
    let mut next = 0;
    while let Some(&device) = devices.get(next).filter(|_| next < DEPTH) {
        next += 1;
        for backing in backing(device) {
            match backing {
                Backing::Device(device) if devices.contains(&device) => {}
                Backing::Device(device) => devices.push(device),
                Backing::File { mount } => {
                    let holds = |other: &Superblock| other.mounts().any(|other| other.id == mount);
                    match all.iter().position(holds) {
                        Some(index) => found.known.push(index),
                        // An overlay, perhaps, which lies on one of them.
                        None => found.lost = true,
                    }
                }
                Backing::Lost => found.lost = true,
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::mounts::survey;
    use super::*;

    /// The mount points of these devices in the order of freezing; mount ids count from 1.
    fn order(mounts: &[(&str, Device)], backing: &[(Device, Backing)]) -> Vec<String> {
        let line = |(index, (mountpoint, (major, minor))): (usize, &(&str, Device))| {
            format!("{} 0 {major}:{minor} / {mountpoint} rw - ext4 /dev/x rw\n", index + 1)
        };
        let text: String = mounts.iter().enumerate().map(line).collect();
        let superblocks = survey(text.as_bytes(), |_| None).superblocks;
        let backing = |device| {
            let of = backing.iter().filter(|(of, _)| *of == device);
            of.map(|(_, backing)| backing.clone()).collect()
        };
        let order = freezing_order(&superblocks, backing);
        order.into_iter().map(|index| superblocks[index].mountpoint().display().to_string()).collect()
    }

    const VDA: Device = (254, 0);
    const VDB: Device = (254, 16);
    const LOOP: Device = (7, 0);
    const DM: Device = (253, 0);

    #[test]
    fn the_last_mounted_is_frozen_first() {
        assert_eq!(order(&[("/", VDA), ("/a", VDB), ("/b", DM)], &[]), ["/b", "/a", "/"]);
    }

    #[test]
    fn a_loop_is_frozen_before_the_filesystem_of_its_file_whichever_was_mounted_first() {
        let backing = [(LOOP, Backing::File { mount: 2 })];
        assert_eq!(
            order(&[("/loop", LOOP), ("/file", VDA), ("/x", VDB)], &backing),
            ["/x", "/loop", "/file"]
        );
    }

    #[test]
    fn a_loop_deep_below_device_mapper_counts_too() {
        let backing = [
            (DM, Backing::Device((253, 1))),
            ((253, 1), Backing::Device(VDB)),
            ((253, 1), Backing::Device(LOOP)),
            (LOOP, Backing::File { mount: 3 }),
        ];
        assert_eq!(order(&[("/dm", DM), ("/x", VDB), ("/file", VDA)], &backing), ["/x", "/dm", "/file"]);
    }

    #[test]
    fn loops_within_loops_are_frozen_from_the_inside() {
        let inner = (7, 1);
        let backing = [(inner, Backing::File { mount: 2 }), (LOOP, Backing::File { mount: 3 })];
        let mounts = [("/inner", inner), ("/outer", LOOP), ("/file", VDA)];
        assert_eq!(order(&mounts, &backing), ["/inner", "/outer", "/file"]);
    }

    #[test]
    fn a_loop_whose_file_cannot_be_found_is_frozen_before_all_others() {
        let backing = [(LOOP, Backing::Lost)];
        assert_eq!(order(&[("/loop", LOOP), ("/a", VDA), ("/b", VDB)], &backing), ["/loop", "/b", "/a"]);
    }

    #[test]
    fn a_circle_is_cut_and_every_filesystem_is_there_once() {
        let other = (7, 1);
        let backing = [
            (LOOP, Backing::File { mount: 2 }),
            (other, Backing::File { mount: 1 }),
            (DM, Backing::Device(DM)),
        ];
        let mounts = [("/a", LOOP), ("/b", other), ("/c", DM)];
        assert_eq!(order(&mounts, &backing), ["/c", "/b", "/a"]);
    }
}
