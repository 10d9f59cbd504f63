//! Disks: what the guest wrote is in the image, whatever happens to host, guest or VMM.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::json;

use crate::harness::{Lab, Monitor, Vm, eventually, run, sha256};
use crate::payload::{Then, pvh_elf};

const MIB: usize = 1 << 20;

/// The kernel of a guest that does nothing, for tests in which only the VMM matters.
fn idle_kernel(lab: &Lab) -> PathBuf {
    let kernel = lab.path("idle.elf");
    fs::write(&kernel, pvh_elf("idle\n", Then::Halt)).unwrap();
    kernel
}

/// A file of random bytes, and the bytes.
fn random(path: &Path, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    fs::write(path, &bytes).unwrap();
    bytes
}

/// The first bytes of an image.
fn head(image: &Path, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    File::open(image).unwrap().read_exact(&mut bytes).unwrap();
    bytes
}

/// Bytes an image takes on the host.
fn allocated(image: &Path) -> u64 {
    fs::metadata(image).unwrap().blocks() * 512
}

/// Whether every KiB of `data` is somewhere in the image: where, the filesystem decides.
fn holds_blocks_of(image: &Path, data: &[u8]) -> bool {
    const BLOCK: usize = 1024;
    let mut missing: HashMap<&[u8], &[u8]> = data.chunks(BLOCK).map(|block| (&block[..16], block)).collect();
    let all = fs::read(image).unwrap();
    for block in all.chunks(BLOCK).filter(|block| block[..16] != [0; 16]) {
        if missing.get(&block[..16]) == Some(&block) {
            missing.remove(&block[..16]);
        }
    }
    missing.is_empty()
}

/// Whether parts of the image are only in the host's page cache, not yet given a place on its disk. `None` where the
/// host's filesystem does not say.
fn has_unwritten_parts(image: &Path) -> Option<bool> {
    let output = Command::new("filefrag").arg("-v").arg(image).env("LC_ALL", "C").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).contains("delalloc"))
}

/// What the guest calls the disk with this serial.
fn device(vm: &mut Vm<'_>, serial: &str) -> String {
    vm.sh(&format!("cd /sys/block && grep -lx '{serial}' vd*/serial | cut -d / -f 1 | sed s:^:/dev/:"))
}

#[test]
fn every_kind_of_disk_keeps_what_the_guest_writes() {
    let Some(lab) = Lab::new("kinds-of-disks") else { return };
    let source = lab.path("source.raw");
    let data = random(&source, 4 * MIB);
    let modified = fs::metadata(&source).unwrap().modified().unwrap();
    let ext4 = lab.ext4("ext4.raw", 64 << 20);
    let xfs = lab.image("xfs.raw", 320 << 20);
    run(Command::new("mkfs.xfs").arg("-q").arg(&xfs));
    let btrfs = lab.image("btrfs.raw", 160 << 20);
    run(Command::new("mkfs.btrfs").arg("-q").arg(&btrfs));
    let raw = ["uring", "threads", "direct", "through", "unsafe"];
    let images = raw.map(|id| lab.image(&format!("{id}.raw"), 64 << 20));
    let [uring, threads, direct, through, unsafe_] = images.each_ref().map(|path| path.to_str().unwrap());
    let disks = [
        format!("{},serial=TARN-0001,engine=io-uring", ext4.display()),
        format!("{},id=xfs,engine=threads", xfs.display()),
        format!("{},id=btrfs,queues=4", btrfs.display()),
        format!("{},id=source,ro", source.display()),
        format!("{uring},id=uring,engine=io-uring"),
        format!("{threads},id=threads,engine=threads"),
        format!("{direct},id=direct,direct=on"),
        format!("{through},id=through,cache=writethrough"),
        format!("{unsafe_},id=unsafe,cache=unsafe,discard=off"),
    ];
    let mut args = vec!["--cpus", "4", "--mount", "disk0:/ext4:ext4"];
    args.extend(["--mount", "xfs:/xfs:xfs", "--mount", "btrfs:/btrfs:btrfs"]);
    disks.iter().for_each(|disk| args.extend(["--disk", disk]));
    let mut vm = lab.boot("kinds", &args);

    shows_what_was_asked_for(&mut vm);
    let kernel = idle_kernel(&lab);
    let (kernel, shared) = (kernel.to_str().unwrap(), format!("{},ro", source.display()));
    let mut other = lab.launch("reads-too", &["--kernel", kernel, "--disk", &shared, "--console", "serial"]);
    assert_eq!(other.monitor().status(), "running", "readers share an image");
    other.kill();

    filesystems_keep_files(&mut vm, &source, &data, [&ext4, &xfs, &btrfs]);
    raw_disks_keep_bytes(&mut vm, &data, &images);
    flushes_reach_the_hosts_disk(&mut vm, &images);
    discards_make_holes(&mut vm, &ext4, &images);
    a_disk_that_grows_is_seen_to_grow(&mut vm, &images[2]);

    vm.power_off();
    assert!(fs::read(&source).unwrap() == data, "a read-only image has changed");
    assert_eq!(fs::metadata(&source).unwrap().modified().unwrap(), modified);
    run(Command::new("fsck.ext4").args(["-f", "-n"]).arg(&ext4));
    for image in [&ext4, &xfs, &btrfs] {
        assert!(holds_blocks_of(image, &data), "{} lacks the second file", image.display());
    }
}

/// Serials, queues, read-only.
fn shows_what_was_asked_for(vm: &mut Vm<'_>) {
    let serials =
        vm.sh("cd /sys/block && for d in vd?; do cat $d/serial; echo; done | grep . | tr '\\n' ' '");
    assert_eq!(serials, "TARN-0001 xfs btrfs source uring threads direct through unsafe");
    assert_eq!(vm.sh("ls /sys/block/vda/mq | wc -l"), "1");
    assert_eq!(vm.sh("ls /sys/block/vdc/mq | wc -l"), "4", "queues=4");
    assert_eq!(vm.sh("cat /sys/block/vda/ro /sys/block/vdd/ro | tr '\\n' ' '"), "0 1");
    let cache = vm.sh("cat /sys/block/vde/queue/write_cache /sys/block/vdh/queue/write_cache");
    assert_eq!(cache, "write back\nwrite through");
    let (status, text) = vm.try_sh("dd if=/dev/zero of=/dev/vdd bs=4k count=1");
    assert_ne!(status, 0, "a write to a read-only disk: {text}");
}

/// The same file on each filesystem, read back from the disk, and found in the image after a sync.
fn filesystems_keep_files(vm: &mut Vm<'_>, source: &Path, data: &[u8], images: [&PathBuf; 3]) {
    let sum = sha256(source);
    for (dir, image) in ["/ext4", "/xfs", "/btrfs"].into_iter().zip(images) {
        vm.sh(&format!("cp /dev/vdd {dir}/file && sync && echo 3 >/proc/sys/vm/drop_caches"));
        assert_eq!(vm.sh(&format!("sha256sum <{dir}/file | cut -d ' ' -f 1")), sum, "{dir}");
        assert!(holds_blocks_of(image, data), "{dir}: the image lacks what was synced");
    }
}

/// Byte for byte, through each engine and cache mode.
fn raw_disks_keep_bytes(vm: &mut Vm<'_>, data: &[u8], images: &[PathBuf]) {
    vm.sh(
        "for d in e f g h i; do dd if=/dev/vdd of=/dev/vd$d bs=256k conv=fsync 2>/dev/null || exit 1; done",
    );
    for image in images {
        assert!(head(image, data.len()) == data, "{} differs", image.display());
    }
    vm.sh("echo 3 >/proc/sys/vm/drop_caches");
    vm.sh("for d in e f g h i; do cmp -n 4194304 /dev/vdd /dev/vd$d || exit 1; done");
}

/// After the guest's fsync, or each of its writes where the cache writes through, no part of the image is in the host's
/// page cache alone. Without a flush it is: the test can tell.
fn flushes_reach_the_hosts_disk(vm: &mut Vm<'_>, images: &[PathBuf]) {
    let [uring, threads, _, through, unsafe_] = images else { unreachable!("five raw disks") };
    let write = |seek: usize, sync: &str| format!("bs=256k count=4 seek={seek} {sync} 2>/dev/null");
    let mut seek = 20;
    let tells = eventually("bytes that nobody flushed", || {
        // Now and then the host's kernel is quicker.
        vm.sh(&format!("dd if=/dev/vdd of=/dev/vdi {}", write(seek, "conv=fsync")));
        seek += 4;
        match has_unwritten_parts(unsafe_) {
            Some(false) => None,
            state => Some(state.is_some()),
        }
    });
    if !tells {
        eprintln!(
            "SKIPPED: whether flushes reach the disk: this filesystem does not say what it has not written"
        );
        return;
    }
    for (name, image) in [("vde", uring), ("vdf", threads)] {
        for round in 0..3 {
            vm.sh(&format!("dd if=/dev/vdd of=/dev/{name} {}", write(20 + 4 * round, "conv=fsync")));
            assert_eq!(has_unwritten_parts(image), Some(false), "{name} after fsync");
        }
    }
    vm.sh(&format!("dd if=/dev/vdd of=/dev/vdh {}", write(20, "oflag=direct")));
    assert_eq!(has_unwritten_parts(through), Some(false), "writethrough needs no flush");
}

/// DISCARD and WRITE_ZEROES give the host its space back; `discard=off` does not.
fn discards_make_holes(vm: &mut Vm<'_>, ext4: &Path, images: &[PathBuf]) {
    let [uring, threads, _, _, unsafe_] = images else { unreachable!("five raw disks") };
    let before = allocated(uring);
    assert!(before >= 4 << 20, "{before}");
    vm.sh("blkdiscard /dev/vde");
    assert!(allocated(uring) < 64 << 10, "{} bytes after a discard of all", allocated(uring));

    // On a block device, a loop device turns discards into zeroes that may be holes.
    vm.sh("modprobe loop && losetup /dev/loop0 /dev/vdf && blkdiscard /dev/loop0 && losetup -d /dev/loop0");
    assert!(allocated(threads) < 64 << 10, "{} bytes after zeroes over all", allocated(threads));
    vm.sh("dd if=/dev/vdf bs=1M count=8 2>/dev/null | cmp -n 8388608 - /dev/zero");

    let before = allocated(ext4);
    vm.sh("rm /ext4/file && sync && fstrim /ext4");
    assert!(allocated(ext4) + (3 << 20) < before, "{before} → {} after fstrim", allocated(ext4));
    vm.sh("cp /dev/vdd /ext4/again && sync");

    let before = allocated(unsafe_);
    assert_ne!(vm.try_sh("blkdiscard /dev/vdi").0, 0, "discard=off is not on offer");
    assert_eq!(allocated(unsafe_), before);
}

/// The host makes the disk larger while the guest has it.
fn a_disk_that_grows_is_seen_to_grow(vm: &mut Vm<'_>, image: &Path) {
    let size = 96 << 20;
    let mut monitor = vm.monitor();
    monitor.run_with("block_resize", &json!({"device": "direct", "size": size}));
    assert_eq!(fs::metadata(image).unwrap().len(), size);
    let sectors = (size / 512).to_string();
    eventually("the new size", || (vm.sh("cat /sys/block/vdg/size") == sectors).then_some(()));
    vm.sh("dd if=/dev/vdd of=/dev/vdg bs=1M seek=92 conv=fsync 2>/dev/null && dd if=/dev/vdg bs=1M skip=92 2>/dev/null | cmp - /dev/vdd");
}

#[test]
fn an_image_belongs_to_one_writer() {
    let Some(lab) = Lab::new("image-locks") else { return };
    let image = lab.image("one.raw", 16 << 20);
    let kernel = idle_kernel(&lab);
    let (image, kernel) = (image.to_str().unwrap(), kernel.to_str().unwrap());
    let args = ["--kernel", kernel, "--disk", image, "--console", "serial"];
    let refused = |what: &str, holder: u32| {
        let mut run = vec!["run", "--name", "second"];
        run.extend(args);
        let output = lab.output(&run);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{what} and a VM on one image");
        assert!(text.contains(&holder.to_string()) && text.contains("one.raw"), "{what}: {text}");
        assert!(!lab.path("run/second/pid").exists(), "a VM that did not start leaves nothing behind");
    };

    let mut first = lab.launch("first", &args);
    assert_eq!(first.monitor().status(), "running");
    refused("a VM", first.pid());
    let qemu_io = |command: &str| {
        Command::new("qemu-io").args(["-f", "raw", "-c", command, image]).output().expect("qemu-utils")
    };
    let text = String::from_utf8_lossy(&qemu_io("write 0 512").stderr).into_owned();
    assert!(text.contains("lock"), "qemu-io on the image of a VM: {text}");
    let resize = Command::new("qemu-img").args(["resize", "-f", "raw", image, "32M"]).output().unwrap();
    assert!(!resize.status.success(), "qemu-img resize on the image of a VM");
    assert_eq!(fs::metadata(image).unwrap().len(), 16 << 20);
    let mut monitor = first.monitor();
    monitor.run("quit");
    assert!(first.wait().success());
    assert!(qemu_io("write 0 512").status.success(), "the image is free again");

    // The other way round.
    let mut holder = Command::new("qemu-io")
        .args(["-f", "raw", image])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = holder.stdin.take().unwrap();
    let mut output = BufReader::new(holder.stdout.take().unwrap());
    input.write_all(b"read 0 512\n").unwrap();
    let mut line = String::new();
    while !line.contains("read 512/512") {
        line.clear();
        assert_ne!(output.read_line(&mut line).unwrap(), 0, "qemu-io ended");
    }
    refused("qemu-io", holder.id());
    drop(input);
    // Its last words must find a reader.
    std::io::copy(&mut output, &mut std::io::sink()).unwrap();
    holder.wait().unwrap();
    let mut third = lab.launch("third", &args);
    assert_eq!(third.monitor().status(), "running");
    // A VMM that was killed holds nothing.
    third.kill();
    assert!(qemu_io("write 0 512").status.success());
}

/// A small filesystem of its own; gone when dropped.
pub struct SmallFilesystem(PathBuf);

impl SmallFilesystem {
    /// `None`, loudly, where this user may not mount.
    pub fn mount(lab: &Lab, mib: usize) -> Option<Self> {
        let dir = lab.path("small");
        fs::create_dir_all(&dir).unwrap();
        let option = format!("size={mib}m");
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", &option, "tmpfs"]).arg(&dir).status();
        if done.is_ok_and(|status| status.success()) {
            return Some(Self(dir));
        }
        eprintln!("SKIPPED: full disks: this user cannot mount a small filesystem");
        None
    }

    pub fn image(&self, name: &str, size: u64) -> PathBuf {
        let path = self.0.join(name);
        File::create(&path).and_then(|file| file.set_len(size)).unwrap();
        path
    }

    pub fn resize(&self, mib: usize) {
        run(Command::new("mount").args(["-o", &format!("remount,size={mib}m")]).arg(&self.0));
    }
}

impl Drop for SmallFilesystem {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Continues a VM that will meet the same error again, and waits until it has.
fn continue_in_vain(monitor: &mut Monitor) {
    monitor.run("cont");
    monitor.await_event("RESUME");
    monitor.await_event("STOP");
    assert_eq!(monitor.status(), "io-error");
}

fn io_status(monitor: &mut Monitor, device: &str) -> String {
    let all = monitor.run("query-block");
    let info = all.as_array().unwrap().iter().find(|info| info["device"] == device).expect("the disk");
    info["io-status"].as_str().unwrap().to_owned()
}

/// The disk's image has no room for what the guest writes, before `make_room`.
fn holds_a_write_until_there_is_room(
    vm: &mut Vm<'_>,
    monitor: &mut Monitor,
    id: &str,
    make_room: impl FnOnce(),
) {
    let target = device(vm, id);
    monitor.forget_events();
    vm.sh(&format!("(dd if=/tmp/data of={target} bs=1M conv=fsync; echo $? >/tmp/{id}) >/dev/null 2>&1 &"));
    let error = monitor.await_event("BLOCK_IO_ERROR");
    assert_eq!(error.data["device"], id);
    assert_eq!(error.data["action"], "stop");
    assert_eq!(error.data["operation"], "write");
    assert_eq!(error.data["nospace"], true);
    monitor.await_event("STOP");
    assert_eq!(monitor.status(), "io-error");
    assert_eq!(io_status(monitor, id), "nospace");
    // Still full.
    continue_in_vain(monitor);
    // A stop on top of it keeps what is held.
    monitor.run("stop");
    assert_eq!(monitor.status(), "paused");
    continue_in_vain(monitor);
    make_room();
    monitor.run("cont");
    eventually("the write's end", || vm.sh(&format!("cat /tmp/{id} 2>/dev/null; true")).parse::<u8>().ok());
    assert_eq!(vm.sh(&format!("cat /tmp/{id}")), "0");
    assert_eq!(monitor.status(), "running");
    assert_eq!(io_status(monitor, id), "ok");
}

#[test]
fn a_full_host_stops_the_guest_and_loses_no_byte() {
    let Some(lab) = Lab::new("full-host") else { return };
    let Some(small) = SmallFilesystem::mount(&lab, 8) else { return };
    let policies = [
        ("stops", "engine=threads"),
        ("uring", "engine=io-uring"),
        ("tells", "werror=report"),
        ("hides", "werror=ignore"),
    ];
    let images = policies.map(|(id, _)| small.image(id, 64 << 20));
    let disk =
        |((id, option), image): (&(&str, &str), &PathBuf)| format!("{},id={id},{option}", image.display());
    let disks: Vec<_> = policies.iter().zip(&images).map(disk).collect();
    let mut args = vec![];
    disks.iter().for_each(|disk| args.extend(["--disk", disk]));
    let mut vm = lab.boot("full", &args);
    let mut monitor = vm.monitor();
    let sum = vm.sh(
        "dd if=/dev/urandom of=/tmp/data bs=1M count=16 2>/dev/null; sha256sum </tmp/data | cut -d ' ' -f 1",
    );

    for (id, image, room) in [("stops", &images[0], 25), ("uring", &images[1], 42)] {
        holds_a_write_until_there_is_room(&mut vm, &mut monitor, id, || small.resize(room));
        let copy = lab.path("copy");
        fs::write(&copy, head(image, 16 * MIB)).unwrap();
        assert_eq!(sha256(&copy), sum, "{id}: what was held is written");
    }

    // Told, or not told; the VM runs on.
    monitor.forget_events();
    for (id, action) in [("tells", "report"), ("hides", "ignore")] {
        let target = device(&mut vm, id);
        let (status, text) = vm.try_sh(&format!("dd if=/tmp/data of={target} bs=1M oflag=direct 2>&1"));
        assert_eq!(status == 0, action == "ignore", "{id}: {text}");
        let error = monitor.await_event("BLOCK_IO_ERROR");
        assert_eq!(error.data["device"], id);
        assert_eq!(error.data["action"], action);
        assert_eq!(monitor.status(), "running");
        monitor.forget_events();
    }

    // A reset forgets what the old guest wanted written, and the disks with it.
    let target = device(&mut vm, "stops");
    vm.sh(&format!("(dd if=/tmp/data of={target} bs=1M seek=32 oflag=direct) >/dev/null 2>&1 &"));
    monitor.await_event("STOP");
    assert_eq!(monitor.status(), "io-error");
    monitor.run("system_reset");
    assert_eq!(monitor.status(), "prelaunch");
    assert_eq!(io_status(&mut monitor, "stops"), "ok");
    small.resize(256);
    monitor.run("cont");
    vm.wait_for_agent();
    let copy = vm.sh(&format!("dd if={target} bs=1M count=16 2>/dev/null | sha256sum | cut -d ' ' -f 1"));
    assert_eq!(copy, sum);
    vm.power_off();
}

#[test]
fn a_pause_finds_disks_at_rest_and_a_crash_keeps_what_was_synced() {
    let Some(lab) = Lab::new("pause-and-crash") else { return };
    let image = lab.image("load.raw", 64 << 20);
    let journal = lab.image("journal.raw", 16 << 20);
    let files = lab.ext4("files.raw", 64 << 20);
    let disks = [
        format!("{},id=load", image.display()),
        format!("{},id=journal", journal.display()),
        format!("{},id=files", files.display()),
    ];
    let mut args = vec!["--memory", "384M", "--cpus", "2", "--mount", "files:/files:ext4"];
    disks.iter().for_each(|disk| args.extend(["--disk", disk]));
    let mut vm = lab.boot("busy", &args);
    let mut monitor = vm.monitor();

    // Two writers that never rest while the VM is paused and resumed under them.
    vm.sh("dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null");
    vm.sh("for n in 0 1; do (i=0; while [ ! -e /tmp/enough ]; do \
           dd if=/tmp/data of=/dev/vda bs=128k oflag=direct seek=$((64 * (2 * (i % 4) + n))) 2>/dev/null || touch /tmp/failed; \
           i=$((i + 1)); done; echo $i >/tmp/rounds$n) >/dev/null 2>&1 & done");
    for round in 0..5 {
        let writes = |vm: &mut Vm<'_>| vm.sh("awk '{print $5}' /sys/block/vda/stat").parse::<u64>().unwrap();
        let before = writes(&mut vm);
        eventually("more writes", || (writes(&mut vm) > before + 50).then_some(()));
        monitor.run("stop");
        let quiet = fs::read(&image).unwrap();
        assert_eq!(monitor.status(), "paused");
        assert!(
            fs::read(&image).unwrap() == quiet,
            "the image changed under a paused guest in round {round}"
        );
        assert!(!has_unwritten_parts(&image).unwrap_or(false), "a pause ends with a flush");
        monitor.run("cont");
        vm.sh("true");
    }
    vm.sh("touch /tmp/enough");
    eventually("the writers' end", || vm.sh("ls /tmp/rounds* 2>/dev/null | wc -l").eq("2").then_some(()));
    assert_eq!(vm.sh("ls /tmp/failed 2>/dev/null | wc -l"), "0");
    let sum = vm.sh("sha256sum </tmp/data | cut -d ' ' -f 1");
    let written = fs::read(&image).unwrap();
    let (first, copy) = (&written[..8 * MIB], lab.path("copy"));
    fs::write(&copy, first).unwrap();
    assert_eq!(sha256(&copy), sum);
    let untouched = |part: &[u8]| part.iter().all(|byte| *byte == 0);
    for (at, part) in written.chunks(8 * MIB).enumerate() {
        assert!(part == first || untouched(part), "part {at} was written around the pauses, and differs");
    }

    // What the guest says after an fsync is true, whatever happens to the process then.
    vm.sh("(i=1; while :; do printf 'record %08d\\n' $i | dd of=/dev/vdb bs=512 seek=$i conv=fsync 2>/dev/null; \
           echo \"line $i\" >>/files/log; sync /files/log; echo \"acknowledged $i\" >/dev/hvc0; i=$((i + 1)); done) >/dev/null 2>&1 &");
    let last = |vm: &Vm<'_>| {
        let text = vm.console();
        text.lines().rev().find_map(|line| line.trim().strip_prefix("acknowledged ")?.parse::<usize>().ok())
    };
    eventually("thirty synced records", || last(&vm).filter(|last| *last >= 30));
    vm.kill();
    let last = last(&vm).unwrap();
    let journal = fs::read(&journal).unwrap();
    for record in 1..=last {
        let expected = format!("record {record:08}\n");
        assert!(
            journal[record * 512..].starts_with(expected.as_bytes()),
            "record {record} of {last} is lost"
        );
    }
    // The filesystem recovers as after a power cut.
    let recovered = Command::new("fsck.ext4").args(["-f", "-y"]).arg(&files).output().unwrap();
    assert!(recovered.status.code().is_some_and(|code| code <= 1), "{recovered:?}");
    let log = run(Command::new("debugfs").args(["-R", "cat /log"]).arg(&files));
    let lines: HashSet<_> = log.lines().collect();
    assert!(
        (1..=last).all(|line| lines.contains(format!("line {line}").as_str())),
        "{last} lines, but {log}"
    );
}
