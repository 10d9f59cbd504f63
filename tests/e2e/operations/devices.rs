//! Disks that are block devices: loop devices, whose numbers go from one file to another as those of other devices do
//! when a machine starts again.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::{coordinate, fails, files, json, slow_down, stage, to};
use crate::block_cases::{acknowledged, has_all_up_to, place};
use crate::harness::{Lab, Vm, eventually, run};

const SIZE: u64 = 8 << 20;
const THREADS: u64 = 2;

/// A loop device, given back when dropped.
pub(super) struct Loop(pub(super) PathBuf);

impl Loop {
    pub(super) fn of(file: &Path) -> Self {
        Self::with(file, &["--find"])
    }

    fn with(file: &Path, options: &[&str]) -> Self {
        let attached = run(Command::new("losetup").args(options).arg("--show").arg(file));
        Self(attached.trim().into())
    }

    /// The same device with another file.
    fn at(device: &Path, file: &Path) -> Self {
        run(Command::new("losetup").arg(device).arg(file));
        Self(device.to_owned())
    }

    /// Gives it back, whoever still has it open for a moment.
    fn detach(self) -> PathBuf {
        let device = self.0.clone();
        drop(self);
        let attribute = Path::new("/sys/block").join(device.file_name().unwrap()).join("loop");
        eventually("the end of a loop device", || (!attribute.exists()).then_some(()));
        device
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// A mounted filesystem.
pub(super) struct Mount(PathBuf);

impl Mount {
    pub(super) fn of(device: &Path, at: PathBuf) -> Self {
        fs::create_dir(&at).unwrap();
        run(Command::new("mount").args([device, &at]));
        Self(at)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// What udev would do: a name that stays.
fn name(lab: &Lab, name: &str, device: &Path) -> PathBuf {
    let link = lab.path(name);
    let _ = fs::remove_file(&link);
    symlink(device, &link).unwrap();
    link
}

pub(super) fn has_loop_devices() -> bool {
    let has = rustix::process::geteuid().is_root() && Path::new("/dev/loop-control").exists();
    if !has {
        eprintln!("SKIPPED: block devices: only root can make loop devices, with the kernel's module `loop`");
    }
    has
}

fn write(vm: &mut Vm<'_>) {
    vm.sh(&format!("disk-io /dev/vda count {THREADS} 16 >/dev/console 2>&1 </dev/null &"));
}

fn check(console: &str, image: &Path) {
    let written = acknowledged(console);
    for thread in 0..THREADS {
        has_all_up_to(image, thread, written[&("vda".to_owned(), thread)]);
    }
}

#[test]
fn a_disk_moves_to_block_devices_which_are_found_whatever_the_kernel_calls_them() {
    let Some((lab, program)) = place("operations-devices") else { return };
    if !has_loop_devices() {
        return;
    }
    let a = lab.image("a.raw", SIZE);
    let (b, c, d) = (lab.image("b.raw", SIZE), lab.image("c.raw", SIZE), lab.image("d.raw", SIZE));
    let (loop_b, loop_c, loop_d) = (Loop::of(&b), Loop::of(&c), Loop::of(&d));
    let wide = Loop::with(&lab.image("wide.raw", SIZE), &["--find", "--sector-size", "4096"]);
    let [link_b, link_c] =
        [("disk-b", &loop_b), ("disk-c", &loop_c)].map(|(link, of)| name(&lab, link, &of.0));
    let old = [format!("{},id=d0", a.display()), format!("{},id=d1,direct=on", wide.0.display())];
    let old = ["--initrd", program.to_str().unwrap(), "--disk", &old[0], "--disk", &old[1]];
    let mut vm = lab.boot("dev", &old);
    what_is_no_target_is_refused_and_nothing_has_changed(&lab, &mut vm, &a, &wide);
    write(&mut vm);

    let report = json(&lab, &["pivot", "dev", &to("d0", &link_b)]);
    assert_eq!(report["outcome"], "pivoted", "{report}");
    assert_eq!(files(&mut vm)[0], link_b);
    assert!(lab.path("a.raw.stamp").exists() && !lab.path("b.raw.stamp").exists());
    json(
        &lab,
        &["pivot", "dev", &to("d0", &link_c), "--keep-source", "--pause", "--copy-mode", "write-blocking"],
    );
    assert_eq!(files(&mut vm)[0], link_c);
    assert!(!lab.path("b.raw.stamp").exists());
    a_device_of_large_blocks_moves_to_one_of_small_ones_and_back(&lab, &mut vm, &wide, &loop_d);

    // Coordinator and VM end in the middle of the next one, and the machine starts again: the devices change places.
    slow_down(&mut vm);
    let mut coordinator = coordinate(&lab, &["pivot", "dev", &to("d0", &link_b)]);
    eventually("mirroring", || (stage(&lab, "dev") == "mirroring").then_some(()));
    coordinator.kill().unwrap();
    coordinator.wait().unwrap();
    vm.kill();
    let console = vm.console();
    let (at_b, at_c) = (loop_b.detach(), loop_c.detach());
    let (loop_b, loop_c) = (Loop::at(&at_c, &b), Loop::at(&at_b, &c));
    let recovered = json(&lab, &["recover", "dev"]);
    assert_eq!(recovered["operation"]["outcome"], "aborted", "{recovered}");
    let story = recovered["story"].to_string();
    assert!(
        story.contains(&format!("disk 'd0' is {} (now {})", link_c.display(), loop_c.0.display())),
        "{story}"
    );
    // What it was copying to is marked, wherever it is, and nothing else.
    assert!(lab.path("b.raw.stamp").exists() && !lab.path("c.raw.stamp").exists());

    // Nobody has made the stable names anew: the device is found by what it is.
    {
        let mut again = lab.launch("dev", &old);
        assert_eq!(files(&mut again)[0], loop_c.0);
        assert!(again.log().contains("which replaced"), "{}", again.log());
        again.kill();
    }
    check(&console, &loop_c.0);
    // It is not there, and a stranger has its name: nothing is booted.
    let at_c = loop_c.detach();
    name(&lab, "disk-c", &loop_b.0);
    let refused = fails(&lab, &[&["run", "--name", "dev"], &old[..]].concat(), 1);
    let expected = format!(
        "{} was the block device loop:{}@0, and now it is loop:{}@0; that one is not attached",
        link_c.display(),
        c.display(),
        b.display()
    );
    assert!(refused.contains(&expected) && refused.contains("--force-stale-source=d0"), "{refused}");
    let loop_c = Loop::at(&at_c, &c);
    name(&lab, "disk-c", &loop_c.0);
    back_to_a_file(&lab, &old, &link_c);
}

fn back_to_a_file(lab: &Lab, old: &[&str], link_c: &Path) {
    let mut vm = lab.boot("dev", old);
    assert_eq!(files(&mut vm)[0], link_c);
    write(&mut vm);
    let back = lab.path("back.raw");
    json(lab, &["pivot", "dev", &to("d0", &back)]);
    assert_eq!(files(&mut vm)[0], back);
    assert!(lab.path("c.raw.stamp").exists(), "a loop device and the file behind it are one image");
    vm.kill();
    check(&vm.console(), &back);
    // The device and its file: neither is the disk any more.
    for image in [link_c, &lab.path("c.raw")] {
        let disk = format!("{},id=other", image.display());
        let refused = fails(lab, &["run", "--name", "other", "--disk", &disk], 1);
        assert!(refused.contains("was replaced by") && refused.contains("back.raw"), "{refused}");
    }
}

fn what_is_no_target_is_refused_and_nothing_has_changed(lab: &Lab, vm: &mut Vm<'_>, a: &Path, wide: &Loop) {
    let of = |file: &str, size: u64| Loop::of(&lab.image(file, size));
    let small = of("small.raw", SIZE / 2);
    let mounted = Loop::of(&lab.ext4("mounted.raw", SIZE));
    let mount = Mount::of(&mounted.0, lab.path("mnt"));
    let claimed = of("claimed.raw", SIZE);
    // open(2): "if the block device is in use by the system, open() fails with the error EBUSY".
    let excl = i32::try_from(rustix::fs::OFlags::EXCL.bits()).unwrap();
    let claim = File::options().read(true).custom_flags(excl).open(&claimed.0);
    let itself = Loop::of(a);
    let volatile = Path::new("/dev/shm").join(format!("tarn-e2e-{}", std::process::id()));
    File::create(&volatile).and_then(|file| file.set_len(SIZE)).unwrap();
    let memory = Loop::of(&volatile);
    fs::remove_file(&volatile).unwrap();
    let at = format!("is in use by the host, which has it mounted at {}", mount.0.display());
    let cases = [
        (&small, "has 4194304 bytes, and the disk has 8388608"),
        (wide, "is the image of disk 'd1'"),
        (&mounted, &at),
        (&claimed, "is in use by another process"),
        (&itself, "is the image of disk 'd0'"),
        (&memory, "does not survive a crash of this machine"),
    ];
    for (target, why) in cases {
        let error = fails(lab, &["pivot", "dev", &to("d0", &target.0)], 1);
        assert!(error.contains(why), "{}: {error}", target.0.display());
    }
    drop(claim);
    let wide = Loop::with(&lab.image("wider.raw", SIZE), &["--find", "--sector-size", "4096"]);
    let error = fails(lab, &["pivot", "dev", &to("d0", &wide.0)], 1);
    assert!(error.contains("has blocks of 4096 bytes, and disk 'd0' of 512"), "{error}");
    let mut monitor = vm.monitor();
    let mirror = |target: &Loop, mode: &str| json!({"device": "d0", "target": target.0, "sync": "full", "format": "raw", "mode": mode});
    for mode in ["existing", "absolute-paths"] {
        let error = monitor.refusal("drive-mirror", &mirror(&wide, mode));
        assert_eq!(error, "The target's blocks of 4096 bytes are larger than the disk's of 512");
        let error = monitor.refusal("drive-mirror", &mirror(&mounted, mode));
        assert!(error.contains(&at), "{error}");
    }
    assert_eq!(json(lab, &["op", "list", "dev"]), json!([]));
    assert_eq!(monitor.run("query-named-block-nodes").as_array().unwrap().len(), 2);
    assert!(!lab.path("state/.stamps").exists());
    drop(mount);
}

fn a_device_of_large_blocks_moves_to_one_of_small_ones_and_back(
    lab: &Lab,
    vm: &mut Vm<'_>,
    wide: &Loop,
    small: &Loop,
) {
    let inserted = |vm: &mut Vm<'_>| -> Value { vm.monitor().run("query-block")[1].take() };
    assert_eq!(inserted(vm)["tarn-block-size"], 4096);
    let operations = "w:5:0:256K z:4K:8K d:64K:64K r:5:0:4K r:0:4K:8K r:5:12K:4K r:5:128K:4K f";
    vm.sh(&format!("disk-io /dev/vdb run {operations}"));
    let output = lab.output(&["pivot", "dev", &to("d1", &small.0)]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("Disk 'd1' has blocks of 4096 bytes until the VM is started anew"), "{said}");
    let now = inserted(vm);
    assert_eq!(
        (&now["tarn-block-size"], &now["inserted"]["image"]["virtual-size"]),
        (&json!(4096), &json!(SIZE))
    );
    assert_eq!(vm.sh("cat /sys/block/vdb/queue/logical_block_size"), "4096");
    vm.sh("disk-io /dev/vdb run r:5:0:4K r:0:4K:8K r:5:12K:4K r:5:128K:4K");
    vm.sh(&format!("disk-io /dev/vdb run {}", operations.replace(":5:", ":6:").replace("w:5", "w:6")));
    // The guest still has large blocks.
    json(lab, &["pivot", "dev", &to("d1", &wide.0)]);
    assert_eq!(files(vm)[1], wide.0);
    vm.sh("disk-io /dev/vdb run r:6:0:4K r:0:4K:8K r:6:12K:4K r:6:128K:4K");
    another_node_of_a_device_is_no_way_around(lab, vm.pid(), wide);
}

fn another_node_of_a_device_is_no_way_around(lab: &Lab, user: u32, device: &Loop) {
    let number = fs::metadata(&device.0).unwrap().rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let node = lab.path("node");
    run(Command::new("mknod").arg(&node).args(["b", &major.to_string(), &minor.to_string()]));
    let error = fails(lab, &["pivot", "dev", &to("d0", &node)], 1);
    assert!(error.contains("is the image of disk 'd1'"), "{error}");
    let refused = fails(lab, &["run", "--name", "other", "--disk", &node.display().to_string()], 1);
    assert!(refused.contains(&format!("is in use by process {user} (")), "{refused}");
}
