use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output};

use tempfile::NamedTempFile;

use super::*;
use crate::options::Format;

fn image(bytes: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

fn open(path: &Path, adjust: impl FnOnce(&mut DiskOptions)) -> Result<Disk, OpenError> {
    let mut options = DiskOptions::path(path);
    adjust(&mut options);
    Disk::open(options)
}

fn message(result: Result<Disk, OpenError>) -> String {
    result.err().expect("an error").to_string()
}

#[test]
fn a_lock_whose_holder_is_known_is_not_waited_for() {
    let image = image(4096);
    let first = Disk::open(DiskOptions::path(image.path())).unwrap();
    let began = Instant::now();
    let second = Disk::open_after_another(|| DiskOptions::path(image.path()), Duration::from_secs(60));
    assert!(matches!(second, Err(OpenError::Locked { holder: Holder::Ourselves, .. })));
    assert!(began.elapsed() < Duration::from_secs(30));
    drop(first);
    Disk::open_after_another(|| DiskOptions::path(image.path()), Duration::ZERO).unwrap();
}

#[test]
fn what_cannot_be_a_disk_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("none.img");
    assert!(message(open(&missing, |_| {})).ends_with("none.img' does not exist"));
    assert!(message(open(dir.path(), |_| {})).contains("is a directory, neither"));
    assert!(message(open(Path::new("/dev/null"), |_| {})).contains("is a character device, neither"));
    let pipe = dir.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    // Would wait for a writer if it were opened.
    assert!(message(open(&pipe, |options| options.read_only = true)).contains("is a pipe, neither"));
}

#[test]
fn a_size_that_is_no_whole_number_of_sectors_is_refused() {
    let text = message(open(image(1000).path(), |_| {}));
    assert!(text.ends_with("has 1000 bytes, not a multiple of 512"), "{text}");
    for size in [0, 512] {
        assert_eq!(open(image(size).path(), |_| {}).unwrap().size(), size);
    }
}

#[test]
fn an_image_of_another_format_is_refused_unless_called_raw() {
    let image = image(4096);
    image.as_file().write_all(b"QFI\xfb\0\0\0\x03").unwrap();
    let text = message(open(image.path(), |_| {}));
    assert!(text.contains("unknown format: it begins like a QCOW2 image"), "{text}");
    assert!(text.contains("format=raw"), "{text}");
    open(image.path(), |options| options.format = Some(Format::Raw)).unwrap();
    let direct = open(image.path(), |options| options.direct = true);
    // The check comes after what the file system may refuse.
    assert!(matches!(direct, Err(OpenError::UnknownFormat { .. } | OpenError::NoDirectIo { .. })));
}

#[test]
fn an_image_without_permission_is_refused() {
    let image = image(4096);
    image.as_file().set_permissions(std::fs::Permissions::from_mode(0o400)).unwrap();
    match File::options().write(true).open(image.path()) {
        Ok(_) => eprintln!("Permissions do not bind this user"),
        Err(_) => assert!(message(open(image.path(), |_| {})).contains("for reading and writing")),
    }
    open(image.path(), |options| options.read_only = true).unwrap();
}

#[test]
fn a_passed_descriptor_must_allow_what_the_disk_does() {
    let image = image(4096);
    let pass = |fd: File, read_only| {
        let fd = OwnedFd::from(fd);
        let mut options = DiskOptions::new(Source::Descriptor { fd, name: "fd:disk0".into() });
        options.read_only = read_only;
        Disk::open(options)
    };
    let read = || File::open(image.path()).unwrap();
    let write = File::options().write(true).open(image.path()).unwrap();
    let append = File::options().read(true).append(true).open(image.path()).unwrap();
    assert_eq!(
        message(pass(read(), false)),
        "The descriptor of disk image 'fd:disk0' is not open for reading and writing"
    );
    assert!(pass(write, true).is_err());
    assert!(pass(append, false).is_err());
    assert_eq!(pass(read(), true).unwrap().name(), "fd:disk0");
    let both = File::options().read(true).write(true).open(image.path()).unwrap();
    assert_eq!(pass(both, false).unwrap().size(), 4096);
}

#[test]
fn the_lock_ends_with_the_disk_even_if_its_descriptor_lives_on() {
    let image = image(4096);
    let ours = File::options().read(true).write(true).open(image.path()).unwrap();
    let fd = OwnedFd::from(ours.try_clone().unwrap());
    let disk = Disk::open(DiskOptions::new(Source::Descriptor { fd, name: "passed".into() })).unwrap();
    let refused = open(image.path(), |_| {});
    assert!(matches!(refused, Err(OpenError::Locked { holder: Holder::Ourselves, .. })));
    drop(disk);
    open(image.path(), |_| {}).unwrap();
    drop(ours);
}

#[test]
fn sizes_change_only_when_asked() {
    let image = image(4096);
    let mut disk = open(image.path(), |_| {}).unwrap();
    image.as_file().set_len(8192 + 100).unwrap();
    assert_eq!(disk.size(), 4096);
    assert_eq!(disk.refresh_size().unwrap(), 8192);
    disk.resize(1024).unwrap();
    assert_eq!((disk.size(), image.as_file().metadata().unwrap().len()), (1024, 1024));
    for odd in [1000, u64::MAX - 511] {
        assert!(matches!(disk.resize(odd), Err(ResizeError::OddSize { .. })), "{odd}");
    }
    assert_eq!(disk.size(), 1024);
    drop(disk);
    let mut disk = open(image.path(), |options| options.read_only = true).unwrap();
    assert!(matches!(disk.resize(512), Err(ResizeError::ReadOnly { .. })));
}

/// A run of one of QEMU's tools; `None` where it is not installed.
fn qemu(tool: &str, arguments: &[&str], image: &Path) -> Option<Output> {
    match Command::new(tool).args(arguments).arg(image).output() {
        Ok(output) => Some(output),
        Err(error) => {
            eprintln!("QEMU's locks are not tested: cannot run {tool}: {error}");
            None
        }
    }
}

#[test]
fn qemus_tools_keep_off_an_image_in_use() {
    let image = image(1 << 20);
    let run = |tool, arguments: &[&str]| qemu(tool, arguments, image.path());
    let writes: [(&str, &[&str]); 3] = [
        ("qemu-io", &["-f", "raw", "-c", "write -P 7 0 512"]),
        ("qemu-img", &["resize", "-f", "raw", "--shrink"]),
        ("qemu-img", &["bench", "-f", "raw", "-w", "-c", "1"]),
    ];
    for read_only in [false, true] {
        let disk = open(image.path(), |options| options.read_only = read_only).unwrap();
        for (tool, arguments) in writes {
            // `resize` takes the new size after the image.
            let output = match arguments[0] {
                "resize" => {
                    let mut command = Command::new(tool);
                    command.args(arguments).arg(image.path()).arg("512K").output().ok()
                }
                _ => run(tool, arguments),
            };
            let Some(output) = output else { return };
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(text.contains("Is another process using the image"), "{tool} {arguments:?}: {text}");
        }
        // Readers that can live with changes are welcome.
        for arguments in [&["info", "-f", "raw"][..], &["info", "-U", "-f", "raw"]] {
            assert!(run("qemu-img", arguments).unwrap().status.success());
        }
        assert_eq!(image.as_file().metadata().unwrap().len(), 1 << 20);
        drop(disk);
    }
    assert!(run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 512"]).unwrap().status.success());
}

#[test]
fn an_image_that_qemu_uses_is_refused_with_its_name() {
    use std::io::{BufRead as _, BufReader};
    use std::process::Stdio;

    let image = image(1 << 20);
    // qemu-io keeps the image open until its input ends, and answers each command.
    let mut command = Command::new("qemu-io");
    let command = command.args(["-f", "raw"]).arg(image.path());
    let Ok(mut child) = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() else {
        eprintln!("QEMU's locks are not tested: cannot run qemu-io");
        return;
    };
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"length\n").unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("1 MiB")));

    for read_only in [false, true] {
        let text = message(open(image.path(), |options| options.read_only = read_only));
        assert!(text.contains(&format!("in use by process {} (qemu-io)", child.id())), "{text}");
    }
    open(image.path(), |options| options.lock = false).unwrap();
    drop(input);
    assert!(child.wait().unwrap().success());
    open(image.path(), |_| {}).unwrap();
}
