//! Wrong input: one clear sentence, a status that is not zero, nothing left behind.
//!
//! What is found out before a machine is built is tested without KVM; `--software-kvm` keeps hosts whose KVM has no
//! hardware under it from refusing earlier.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::harness::{Lab, TARN, eventually};
use crate::payload::{Then, pvh_elf};

/// Runs `tarn run ARGS…`, which must fail with one sentence, and returns that.
fn refusal(lab: &Lab, args: &[&str]) -> String {
    let all: Vec<&str> =
        ["run", "--name", "bad", "--software-kvm"].into_iter().chain(args.iter().copied()).collect();
    sentence(lab, &lab.output(&all))
}

fn sentence(lab: &Lab, output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(1), "{:?} {text}", output.status);
    assert_eq!(output.stdout, b"", "standard output is for results");
    assert!(text.starts_with("tarn: ") && text.ends_with('\n') && text.lines().count() == 1, "{text}");
    assert_eq!(lab.leavings(), <[String; 0]>::default(), "left behind after: {text}");
    text
}

/// Every case: a file's name, its content, what the sentence must say.
fn refused_kernels(lab: &Lab, cases: &[(&str, &[u8], &str)]) {
    for (name, content, says) in cases {
        let path = lab.path(name);
        fs::write(&path, content).unwrap();
        let text = refusal(lab, &["--kernel", path.to_str().unwrap()]);
        assert!(text.contains(says) && text.contains(path.to_str().unwrap()), "{name}: {text}");
    }
}

/// An ELF header of a 64-bit executable for `machine`, and nothing else.
fn elf_header(class: u8, machine: u16) -> Vec<u8> {
    let mut elf = pvh_elf("", Then::Halt);
    elf.truncate(64);
    elf[4] = class;
    elf[18..20].copy_from_slice(&machine.to_le_bytes());
    elf
}

fn image_with(len: usize, at: usize, magic: &[u8]) -> Vec<u8> {
    let mut image = vec![0; len];
    image[at..at + magic.len()].copy_from_slice(magic);
    image
}

#[test]
fn what_is_no_kernel_is_said_to_be_what_it_is() {
    let lab = Lab::without_kvm("not-a-kernel");
    let missing = lab.path("missing");
    let text = refusal(&lab, &["--kernel", missing.to_str().unwrap()]);
    assert!(text.contains("Cannot open kernel") && text.contains("No such file"), "{text}");
    let text = refusal(&lab, &["--kernel", lab.path("").to_str().unwrap()]);
    assert!(text.contains("is a directory, not an x86_64 bzImage"), "{text}");
    let pipe = lab.path("pipe");
    crate::harness::run(Command::new("mkfifo").arg(&pipe));
    let text = refusal(&lab, &["--kernel", pipe.to_str().unwrap()]);
    assert!(text.contains("is no regular file"), "{text}");

    let whole = pvh_elf("hello\n", Then::Halt);
    // A boot sector that says version 2.15, 64-bit entry and a megabyte of protected-mode code, without that code.
    let mut bzimage = image_with(0x400, 0x202, b"HdrS");
    bzimage[0x1f1] = 1;
    bzimage[0x1f4..0x1f8].copy_from_slice(&(0x10_0000_u32 / 16).to_le_bytes());
    bzimage[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    bzimage[0x236] = 1;
    let mut old = bzimage.clone();
    old[0x236] = 0;
    refused_kernels(
        &lab,
        &[
            ("empty", b"", "is empty"),
            ("text", b"#!/bin/sh\necho hello\n", "is something else, not an x86_64 bzImage or ELF vmlinux"),
            ("short.elf", &whole[..40], "is truncated: 40 bytes"),
            ("cut.elf", &whole[..whole.len() - 5], "is truncated"),
            ("arm64.elf", &elf_header(2, 183), "is an ELF file of another architecture"),
            ("i386.elf", &elf_header(1, 3), "is an ELF file of another architecture"),
            ("arm64.image", &image_with(0x1000, 56, b"ARM\x64"), "is an arm64 kernel"),
            ("riscv.image", &image_with(0x1000, 0x38, b"RSC\x05"), "is a RISC-V kernel"),
            ("vmlinux.gz", b"\x1f\x8b\x08\0\0\0\0\0", "is a gzip file"),
            ("cut.bzimage", &bzimage, "is truncated: 1024 bytes, its headers speak of 1049600"),
            ("old.bzimage", &old, "without a 64-bit entry point"),
        ],
    );
    let kernel = lab.path("boot.elf");
    fs::write(&kernel, &whole).unwrap();
    let kernel = kernel.to_str().unwrap();
    for (initrd, says) in [(missing.to_str().unwrap(), "No such file"), ("/", "not a regular file")] {
        let text = refusal(&lab, &["--kernel", kernel, "--initrd", initrd]);
        assert!(text.contains("Cannot open initrd") && text.contains(says), "{text}");
    }
    let long = "x".repeat(2100);
    for (cmdline, says) in
        [(long.as_str(), "has 2100 bytes, at most 2047"), ("a\nb", "control character '\\n'")]
    {
        let text = refusal(&lab, &["--kernel", kernel, "--cmdline", cmdline]);
        assert!(text.contains(says), "{text}");
    }
}

#[test]
fn memory_is_a_size_that_the_host_has() {
    let lab = Lab::without_kvm("bad-memory");
    let kernel = lab.payload(Then::Halt);
    let with = |size: &str| refusal(&lab, &["--kernel", &kernel[1], "--memory", size]);
    for size in ["0", "3K", "1023K", "512"] {
        assert!(with(size).contains("is not a multiple of 4 KiB of at least 1 MiB"), "{size}");
    }
    let text = with("1000T");
    assert!(
        text.contains("1048576000 MiB is more than this host has (") && text.contains("--memory"),
        "{text}"
    );
    for size in ["lots", "-1", "99999999999T"] {
        let output = lab.output(&["run", &format!("--memory={size}")]);
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains(size));
    }
}

#[test]
fn a_disk_that_cannot_be_one_is_left_as_it_is() {
    let lab = Lab::without_kvm("bad-disk");
    let kernel = lab.payload(Then::Halt);
    let with = |disk: &str| refusal(&lab, &["--kernel", &kernel[1], "--disk", disk]);
    let path = |name: &str| lab.path(name).to_str().unwrap().to_owned();
    assert!(with(&path("missing")).contains("does not exist"));
    assert!(with("/").contains("is a directory"));
    assert!(with("/dev/null").contains("character device"), "{}", with("/dev/null"));
    lab.image("odd.raw", 1000);
    assert!(with(&path("odd.raw")).contains("has 1000 bytes, not a multiple of 512"));
    let mut qcow2 = image_with(1 << 20, 0, b"QFI\xfb\0\0\0\x03");
    qcow2[5000] = 7;
    fs::write(lab.path("image.qcow2"), &qcow2).unwrap();
    let before = fs::metadata(lab.path("image.qcow2")).unwrap();
    let text = with(&path("image.qcow2"));
    assert!(
        text.contains("unknown format") && text.contains("qcow2") && text.contains("format=raw"),
        "{text}"
    );
    let after = fs::metadata(lab.path("image.qcow2")).unwrap();
    assert_eq!((before.mtime_nsec(), before.ctime_nsec()), (after.mtime_nsec(), after.ctime_nsec()));
    assert!(fs::read(lab.path("image.qcow2")).unwrap() == qcow2);
    for (disk, says) in [
        ("", "PATH"),
        ("a.raw,color=red", "color"),
        ("a.raw,queues=0", "queues"),
        ("a.raw,format=qcow2", "qcow2"),
    ] {
        let output = lab.output(&["run", "--kernel", &kernel[1], "--disk", disk]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(matches!(output.status.code(), Some(1 | 2)) && text.contains(says), "{disk}: {text}");
    }
}

#[test]
fn names_and_socket_paths_have_their_limits() {
    let lab = Lab::without_kvm("bad-names");
    let kernel = lab.payload(Then::Halt);
    for name in ["", ".", "a/b", "../up", "a b", "-x", "x\n", "ümlaut", &"x".repeat(64)] {
        let output =
            lab.output(&["run", "--software-kvm", &format!("--name={name}"), "--kernel", &kernel[1]]);
        assert!(sentence(&lab, &output).contains("is not 1 to 63 letters"), "{name:?}");
    }
    let deep = lab.path(&"deep/".repeat(25));
    let mut command = lab.tarn(&["run", "--software-kvm", "--name", "bad", "--kernel", &kernel[1]]);
    let output = command.env("TARN_RUN_DIR", &deep).output().unwrap();
    assert!(sentence(&lab, &output).contains("would exceed the 107 bytes of a socket path"));
    assert!(!deep.exists(), "nothing is made for a VM that cannot be");
    let socket = format!("name=port,socket=/tmp/{}", "x".repeat(103));
    assert!(
        refusal(&lab, &["--kernel", &kernel[1], "--channel", &socket]).contains("has 108 bytes, at most 107")
    );
    let unknown = lab.path("vm.json");
    fs::write(&unknown, r#"{"cpu": 2}"#).unwrap();
    let text = refusal(&lab, &["--config", unknown.to_str().unwrap()]);
    assert!(text.contains("unknown field `cpu`"), "{text}");
    assert!(refusal(&lab, &["--config", "/nonexistent.json"]).contains("Cannot read configuration"));
    for verb in
        [&["stop"][..], &["kill"], &["pause"], &["resume"], &["console"], &["qmp"], &["agent"], &["exec"]]
    {
        let mut args = vec![verb[0], "nobody"];
        if verb[0] == "exec" {
            args.extend(["--", "true"]);
        }
        assert!(sentence(&lab, &lab.output(&args)).contains("No VM named nobody is running"), "{verb:?}");
    }
}

/// Runs `tarn run` with another file in place of /dev/kvm (or, without one, with an empty /dev), and no privileges.
fn with_device(lab: &Lab, device: Option<&Path>, kernel: &str) -> Output {
    let replace = match device {
        Some(device) => format!("mount --bind {} /dev/kvm", device.display()),
        None => "mount -t tmpfs none /dev".to_owned(),
    };
    let script = format!(
        "{replace} && exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs \
         {TARN} run --software-kvm --name bad --kernel {kernel}"
    );
    let mut command = Command::new("unshare");
    // Whoever is not root may have a mount namespace in a user namespace only.
    if !rustix::process::geteuid().is_root() {
        command.arg("--map-root-user");
    }
    command.args(["--mount", "sh", "-c", &script]).env("TARN_RUN_DIR", lab.path("run"));
    command.stdin(Stdio::null()).output().unwrap()
}

#[test]
fn without_kvm_there_is_advice() {
    let lab = Lab::without_kvm("no-kvm");
    let kernel = lab.payload(Then::Halt)[1].clone();
    let text = sentence(&lab, &with_device(&lab, None, &kernel));
    assert!(text.contains("There is no /dev/kvm; ") && text.contains("modprobe"), "{text}");
    // Only what is there can be replaced.
    if Path::new("/dev/kvm").exists() {
        let locked = lab.image("locked", 0);
        fs::set_permissions(&locked, std::os::unix::fs::PermissionsExt::from_mode(0o000)).unwrap();
        let text = sentence(&lab, &with_device(&lab, Some(&locked), &kernel));
        assert!(
            text.contains("No permission to open /dev/kvm; ") && text.contains("usermod -aG kvm"),
            "{text}"
        );
        let text = sentence(&lab, &with_device(&lab, Some(Path::new("/dev/null")), &kernel));
        assert!(text.contains("/dev/kvm is not KVM; "), "{text}");
    }
}

#[test]
fn a_kvm_without_hardware_is_not_used_by_mistake() {
    let lab = Lab::without_kvm("software-kvm");
    let kernel = lab.payload(Then::Halt)[1].clone();
    if vmm::host::hardware_virtualization().is_some() || !Path::new("/dev/kvm").exists() {
        eprintln!("SKIPPED: software-kvm: this machine has hardware virtualization, or no KVM at all");
        return;
    }
    let text = sentence(&lab, &lab.output(&["run", "--kernel", &kernel]));
    for part in ["is a software KVM", "with-kvm", "--software-kvm"] {
        assert!(text.contains(part), "{text}");
    }
    let doctor = lab.output(&["doctor"]);
    assert_eq!(doctor.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&doctor.stdout).contains("FAILED   hardware virtualization"));
}

#[test]
fn a_vm_that_runs_keeps_its_name_its_disk_and_its_sockets_to_itself() {
    let Some(lab) = Lab::for_payloads("taken") else { return };
    let disk = lab.image("disk.raw", 1 << 20);
    let disk = disk.to_str().unwrap();
    let kernel = lab.payload(Then::Halt);
    let mut args: Vec<&str> = kernel.iter().map(String::as_str).collect();
    args.extend(["--disk", disk]);
    let mut vm = lab.launch("first", &args);
    vm.monitor().run("query-status");
    for detach in [&[][..], &["--detach"]] {
        let again = [&["run", "--name", "first", "--software-kvm", "--kernel", &kernel[1]], detach].concat();
        let output = lab.output(&again);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        let says = format!("A VM named first is already running (process {})", vm.pid());
        assert!(
            text.contains(&says) && text.contains("tarn kill first") && text.lines().count() == 1,
            "{text}"
        );

        let other =
            [&["run", "--name", "other", "--software-kvm", "--kernel", &kernel[1], "--disk", disk], detach]
                .concat();
        let output = lab.output(&other);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("is in use by") && text.lines().count() == 1, "{text}");
    }
    // The channel's socket belongs to somebody who answers.
    let socket = lab.path("channel.sock");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let channel = format!("name=port,socket={}", socket.display());
    let output = lab.output(&[
        "run",
        "--name",
        "other",
        "--software-kvm",
        "--kernel",
        &kernel[1],
        "--channel",
        &channel,
    ]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && text.contains("channel.sock\": somebody else does"), "{text}");
    drop(listener);

    assert_eq!(vm.monitor().status(), "running", "none of it concerned the first VM");
    assert_eq!(lab.leavings(), ["first"]);
    vm.monitor().run("quit");
    assert!(vm.wait().success());
    assert_eq!(lab.leavings(), <[String; 0]>::default());
}

#[test]
fn what_a_killed_vm_leaves_is_nobodys_vm_and_goes_with_the_next() {
    let Some(lab) = Lab::for_payloads("stale") else { return };
    let kernel = lab.payload(Then::Halt);
    let args: Vec<&str> = kernel.iter().map(String::as_str).collect();
    let mut vm = lab.launch("phoenix", &args);
    vm.monitor().run("query-status");
    let agent_socket = vm.socket("agent.sock");
    vm.kill();
    assert!(agent_socket.exists(), "SIGKILL leaves sockets");
    assert_eq!(lab.output(&["ps", "--json"]).stdout, b"[]\n");
    let text = String::from_utf8(lab.output(&["qmp", "phoenix", "query-status"]).stderr).unwrap();
    assert!(text.contains("No VM named phoenix is running"), "{text}");
    drop(vm);

    let mut vm = lab.launch("phoenix", &args);
    eventually("the same name again", || {
        let rows = lab.output(&["ps", "--json"]).stdout;
        String::from_utf8_lossy(&rows).contains(&format!("\"pid\": {}", vm.pid())).then_some(())
    });
    vm.monitor().run("quit");
    assert!(vm.wait().success());
    assert_eq!(lab.leavings(), <[String; 0]>::default());
}

#[test]
fn what_does_not_fit_into_guest_memory_is_refused_with_numbers() {
    let Some(lab) = Lab::for_payloads("too-large") else { return };
    let kernel = lab.payload(Then::Halt);
    let initrd = lab.image("huge.cpio", 100 << 20);
    let text =
        refusal(&lab, &["--kernel", &kernel[1], "--memory", "64M", "--initrd", initrd.to_str().unwrap()]);
    assert!(text.contains("Initrd of 104857600 bytes does not fit"), "{text}");
    // A kernel whose segment asks for more memory than the guest has.
    let mut elf = pvh_elf("hello\n", Then::Halt);
    elf[64 + 40..64 + 48].copy_from_slice(&(1_u64 << 30).to_le_bytes());
    let path = lab.path("wide.elf");
    fs::write(&path, elf).unwrap();
    let text = refusal(&lab, &["--kernel", path.to_str().unwrap(), "--memory", "64M"]);
    assert!(text.contains("Cannot load kernel") && text.contains("64 MiB of memory"), "{text}");
}

#[test]
fn a_run_that_is_told_to_end_while_it_starts_leaves_nothing() {
    let Some(lab) = Lab::for_payloads("early-end") else { return };
    let kernel = lab.payload(Then::Halt);
    let args: Vec<&str> = kernel.iter().map(String::as_str).collect();
    for delay in 0..8 {
        let mut command = lab.tarn(&["run", "--name", "brief"]);
        command.args(&args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(delay * 3));
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = child.wait().unwrap();
        assert!(status.code() == Some(143) || status.signal() == Some(15), "{status}");
        // Before the signal is taken over it ends the process as signals do; the next run sweeps.
        if status.code() == Some(143) {
            assert_eq!(lab.leavings(), <[String; 0]>::default());
        }
    }
}
