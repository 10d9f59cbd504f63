//! The thread between `scripts/with-kvm` and the command it runs inside the outer machine.
//!
//! One program, two ends. The host end starts QEMU and owns it; the guest end runs in the outer machine, starts
//! the command and owns it. Between them lies one virtio-serial port, which QEMU connects to a socket pair.
//!
//! ```text
//!   host: with-kvm-relay host                    outer machine: with-kvm-relay guest
//!   stdin  ──▶ ┐                                          ┌ ──▶ pipe ──▶ stdin  ┐
//!   stdout ◀── ┤◀═ socket pair ═ QEMU ═ /dev/vport0p1 ═▶ ├ ◀── pipe ◀── stdout ├ COMMAND
//!   stderr ◀── ┘                                          └ ◀── pipe ◀── stderr ┘
//!   exit status ◀──────────────── Exit ◀───────────────────── wait, drain, sync
//! ```
//!
//! A frame is a kind (one byte), a length (four bytes, little endian) and as many bytes. `Exit` comes last, after
//! everything the command and its children wrote, and after `sync`: whoever has read it has all of it. A reader
//! that left (`with-kvm yes | head`) is told to the guest end, which closes the pipe, so that the command meets the
//! broken pipe it would have met without us. Every stream is a pipe to the command, as in a shell pipeline.
//!
//! Only `std`, so that plain `rustc` builds it in two seconds; no unsafe code.
#![deny(unsafe_code)]
#![expect(
    clippy::disallowed_types,
    reason = "no crates here, hence no parking_lot; a panic aborts, so no lock is poisoned"
)]

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Host to guest: bytes for the command's stdin; an empty frame is the end of it.
const STDIN: u8 = 0;
/// Guest to host: bytes of the command's stdout. Host to guest: nobody reads stdout any more.
const STDOUT: u8 = 1;
/// As [`STDOUT`], for stderr.
const STDERR: u8 = 2;
/// Guest to host: the exit status, one byte; the last frame.
const EXIT: u8 = 3;
/// Guest to host: the command is about to start.
const HELLO: u8 = 4;
/// Host to guest: end the command now; `EXIT` follows as always.
const STOP: u8 = 5;

const HEADER: usize = 5;
/// Largest payload: what a pipe holds.
const CHUNK: usize = 64 * 1024;
/// Host to guest, in answer to `HELLO`: the time, as `@SECONDS.FRACTION`. The clock chip only has whole seconds.
const CLOCK: u8 = 6;

/// Longer than the slowest boot of the outer machine on a loaded host.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// How long the command's last output and `target/` may take after the time limit.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// How much of the outer machine's console belongs into an error message.
const CONSOLE_TAIL: usize = 25;

/// Ends all processes of the control group that holds the command.
const COMMAND_KILL: &str = "/sys/fs/cgroup/command/cgroup.kill";

/// Exit statuses of our own, as in timeout(1) and env(1).
const TIMED_OUT: u8 = 124;
const MACHINE_FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let result = match arguments.split_first() {
        Some((end, rest)) if end == "host" => host(rest),
        Some((end, [port, job])) if end == "guest" => guest(Path::new(port), Path::new(job)),
        _ => Err(io::Error::other(
            "usage: relay host RUN_DIRECTORY SECONDS QEMU… | relay guest PORT JOB_DIRECTORY",
        )),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("with-kvm: {error}");
            ExitCode::from(MACHINE_FAILED)
        }
    }
}

// ---------------------------------------------------------------------------------------------- frames

/// Sends one frame with a single write where the kernel takes it whole.
fn send(port: &mut impl Write, kind: u8, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let mut frame = Vec::with_capacity(HEADER + payload.len());
    frame.push(kind);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    port.write_all(&frame)
}

/// Receives one frame into `payload` and returns its kind.
fn receive(port: &mut impl Read, payload: &mut Vec<u8>) -> io::Result<u8> {
    let mut header = [0; HEADER];
    port.read_exact(&mut header)?;
    let [kind, length @ ..] = header;
    let length = u32::from_le_bytes(length) as usize;
    if length > CHUNK {
        return Err(io::Error::other("broken frame on the relay port"));
    }
    payload.resize(length, 0);
    port.read_exact(payload)?;
    Ok(kind)
}

/// A frame sender shared by threads.
#[derive(Clone)]
struct Sink(Arc<Mutex<File>>);

impl Sink {
    fn new(port: File) -> Self {
        Self(Arc::new(Mutex::new(port)))
    }

    fn send(&self, kind: u8, payload: &[u8]) -> io::Result<()> {
        send(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), kind, payload)
    }
}

// ------------------------------------------------------------------------------------------------ host

/// What the thread that reads the port tells the one that keeps the time.
enum News {
    Started,
    Exit(u8),
    /// The port was closed without an exit status: QEMU is gone.
    Gone,
}

/// Runs QEMU until the command's exit status has arrived, the time is up or QEMU has died.
fn host(arguments: &[OsString]) -> io::Result<u8> {
    let [run, seconds, qemu, qemu_arguments @ ..] = arguments else {
        return Err(io::Error::other("relay host: too few arguments"));
    };
    let run = Path::new(run);
    let limit = seconds.to_str().and_then(|text| text.parse().ok()).map(Duration::from_secs);
    let limit = limit.ok_or_else(|| io::Error::other("WITH_KVM_TIMEOUT is not a number of seconds"))?;

    let begin = Instant::now();
    let (port, qemu_end) = UnixStream::pair()?;
    let mut machine = Command::new(qemu)
        .args(qemu_arguments)
        .stdin(OwnedFd::from(qemu_end)) // `-chardev socket,fd=0`
        .stdout(File::create(run.join("qemu.log"))?)
        .stderr(OpenOptions::new().append(true).open(run.join("qemu.log"))?)
        .spawn()?;

    let (news, arrived) = mpsc::channel();
    let to_guest = Sink::new(File::from(OwnedFd::from(port.try_clone()?)));
    let stop = to_guest.clone();
    thread::spawn(move || relay_output(port, &to_guest, &news));

    let outcome = (|| {
        match arrived.recv_timeout(BOOT_LIMIT.min(limit)) {
            Ok(News::Started) => {}
            Ok(News::Exit(status)) => return Ok(status),
            Ok(News::Gone) => return Err("The outer machine died while booting"),
            Err(_) if limit <= BOOT_LIMIT => return Ok(timed_out(limit)),
            Err(_) => return Err("The outer machine did not come up"),
        }
        if std::env::var_os("WITH_KVM_VERBOSE").is_some() {
            eprintln!("with-kvm: command starts after {:.1} s", begin.elapsed().as_secs_f32());
        }
        match arrived.recv_timeout(limit.saturating_sub(begin.elapsed())) {
            Ok(News::Exit(status)) => Ok(status),
            Err(RecvTimeoutError::Timeout) => {
                thread::spawn(move || stop.send(STOP, &[])); // not here: a stuck guest does not read
                let _ = arrived.recv_timeout(STOP_LIMIT);
                Ok(timed_out(limit))
            }
            Ok(News::Started | News::Gone) | Err(RecvTimeoutError::Disconnected) => {
                Err("The outer machine died")
            }
        }
    })();
    machine.kill()?;
    machine.wait()?;
    outcome.or_else(|what| {
        report_failure(what, run);
        Ok(MACHINE_FAILED)
    })
}

fn timed_out(limit: Duration) -> u8 {
    eprintln!("with-kvm: time limit of {} s reached (WITH_KVM_TIMEOUT), command killed", limit.as_secs());
    TIMED_OUT
}

/// Copies frames to stdout and stderr until the exit status or the end.
fn relay_output(mut port: UnixStream, to_guest: &Sink, news: &Sender<News>) {
    // A receiver that left has made up its mind already: what is told to it then does not matter.
    let (Ok(mut out), Ok(mut err)) = (duplicate(&io::stdout()), duplicate(&io::stderr())) else {
        let _ = news.send(News::Gone);
        return;
    };
    let mut payload = Vec::new();
    loop {
        let broken = match receive(&mut port, &mut payload) {
            Ok(HELLO) => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                let _ =
                    to_guest.send(CLOCK, format!("@{}.{:09}", now.as_secs(), now.subsec_nanos()).as_bytes());
                let to_guest = to_guest.clone();
                thread::spawn(move || relay_input(&to_guest));
                let _ = news.send(News::Started);
                continue;
            }
            Ok(EXIT) => {
                let _ = news.send(News::Exit(payload.first().copied().unwrap_or(MACHINE_FAILED)));
                return;
            }
            Ok(STDOUT) => write_patiently(&mut out, &payload).err().map(|error| (STDOUT, error)),
            Ok(STDERR) => write_patiently(&mut err, &payload).err().map(|error| (STDERR, error)),
            Ok(_) | Err(_) => {
                let _ = news.send(News::Gone);
                return;
            }
        };
        if let Some((stream, error)) = broken {
            if error.kind() != io::ErrorKind::BrokenPipe {
                let _ = writeln!(io::stderr(), "with-kvm: cannot write the command's output: {error}");
            }
            let _ = to_guest.send(stream, &[]);
        }
    }
}

/// Copies our stdin to the command's until its end.
fn relay_input(to_guest: &Sink) {
    let Ok(mut input) = duplicate(&io::stdin()) else { return };
    let mut chunk = vec![0; CHUNK];
    loop {
        let length = match input.read(&mut chunk) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(5)); // someone else made our stdin non-blocking
                continue;
            }
            Err(_) => 0,
        };
        if to_guest.send(STDIN, &chunk[..length]).is_err() || length == 0 {
            return;
        }
    }
}

/// The file behind a standard stream, without std's buffering.
fn duplicate(stream: &impl AsFd) -> io::Result<File> {
    stream.as_fd().try_clone_to_owned().map(File::from)
}

/// `write_all` for a file description that somebody else may have made non-blocking.
fn write_patiently(file: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Says what happened, with the last words of QEMU and of the outer machine's kernel.
fn report_failure(what: &str, run: &Path) {
    eprintln!("with-kvm: {what}.");
    for (title, file) in [("QEMU says", "qemu.log"), ("Last lines of its console", "console.log")] {
        let text = fs::read(run.join(file)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
        // A panic says first what is wrong, and then much else.
        let panic = lines.iter().rposition(|line| line.contains("Kernel panic"));
        let from = panic.unwrap_or(lines.len().saturating_sub(CONSOLE_TAIL));
        if !lines.is_empty() {
            eprintln!("with-kvm: {title}:");
            lines[from..].iter().take(CONSOLE_TAIL).for_each(|line| eprintln!("  {line}"));
        }
    }
}

// ----------------------------------------------------------------------------------------------- guest

/// Runs the command described in `job` and sends what becomes of it through `port`.
///
/// `job` holds `argv`, `environ` (both NUL-terminated strings), `directory` and `ids` (uid, gid, groups); the
/// control group `command` in `/sys/fs/cgroup` is there to hold the command and everything it starts.
fn guest(port: &Path, job: &Path) -> io::Result<u8> {
    let mut port = OpenOptions::new().read(true).write(true).open(port)?;
    let to_host = Sink::new(port.try_clone()?);
    to_host.send(HELLO, &[])?; // waits until the host end is connected
    let mut clock = Vec::new();
    receive(&mut port, &mut clock)?;
    Command::new("date").arg("-s").arg(OsStr::from_bytes(&clock)).stdout(Stdio::null()).status()?;

    let status = match start(job) {
        Ok(child) => attend(child, port, &to_host)?,
        Err((status, message)) => {
            to_host.send(STDERR, message.as_bytes())?;
            status
        }
    };
    Command::new("sync").status()?;
    to_host.send(EXIT, &[status])?;
    Ok(status)
}

/// Starts the command, or says why that is impossible.
fn start(job: &Path) -> Result<Child, (u8, String)> {
    let failed = |error: io::Error| (MACHINE_FAILED, format!("with-kvm: cannot read the job: {error}\n"));
    let argv = strings(&job.join("argv")).map_err(failed)?;
    let environ = strings(&job.join("environ")).map_err(failed)?;
    let directory = fs::read(job.join("directory")).map_err(failed)?;
    let ids = fs::read_to_string(job.join("ids")).map_err(failed)?;
    let [uid, gid, groups] = ids.split_whitespace().collect::<Vec<_>>()[..] else {
        return Err(failed(io::Error::other("malformed ids")));
    };

    // The shell enters the control group and becomes the command; setpriv(1) drops to the caller's user. Not busybox's
    // shell: that one would run its own applets in place of the programs asked for.
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "echo 0 >/sys/fs/cgroup/command/cgroup.procs && exec \"$@\"", "with-kvm"]);
    if uid != "0" {
        command.args([
            "setpriv",
            "--reuid",
            uid,
            "--regid",
            gid,
            "--groups",
            groups,
            "--inh-caps=-all",
            "--",
        ]);
    }
    let program = argv.first().ok_or_else(|| failed(io::Error::other("empty argv")))?;
    let environ: Vec<(OsString, OsString)> = environ.iter().filter_map(|entry| variable(entry)).collect();
    let path = environ.iter().find(|(name, _)| name == "PATH").map(|(_, value)| value.as_os_str());
    let directory = OsStr::from_bytes(&directory);
    executable(program, path, directory)?;

    command.args(&argv).env_clear().envs(environ).current_dir(directory);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().map_err(|error| {
        (NOT_EXECUTABLE, format!("with-kvm: {} in {}: {error}\n", program.display(), directory.display()))
    })
}

/// Whether a shell would find `program`; 127 and 126 as a shell has them.
fn executable(program: &OsStr, path: Option<&OsStr>, directory: &OsStr) -> Result<(), (u8, String)> {
    use std::os::unix::fs::PermissionsExt;
    let program_path = Path::new(program);
    let candidates: Vec<_> = if program.as_bytes().contains(&b'/') {
        vec![Path::new(directory).join(program_path)]
    } else {
        std::env::split_paths(path.unwrap_or(OsStr::new("/usr/bin:/bin")))
            .map(|dir| dir.join(program_path))
            .collect()
    };
    let mut problem = (NOT_FOUND, "command not found");
    for candidate in candidates {
        match fs::metadata(&candidate) {
            Ok(found) if found.is_file() && found.permissions().mode() & 0o111 != 0 => return Ok(()),
            Ok(found) if found.is_dir() && program.as_bytes().contains(&b'/') => {
                problem = (NOT_EXECUTABLE, "is a directory");
            }
            Ok(found) if found.is_file() => problem = (NOT_EXECUTABLE, "permission denied"),
            Ok(_) | Err(_) => {}
        }
    }
    Err((problem.0, format!("with-kvm: {}: {}\n", program.display(), problem.1)))
}

/// Relays until the command has ended and nobody is left who could write more; returns its exit status.
fn attend(mut child: Child, mut port: File, to_host: &Sink) -> io::Result<u8> {
    let left = [Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false))];
    let [out_left, err_left] = left.clone();
    let mut writers = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        let to_host = to_host.clone();
        writers.push(thread::spawn(move || relay_stream(stdout, STDOUT, &to_host, &out_left)));
    }
    if let Some(stderr) = child.stderr.take() {
        let to_host = to_host.clone();
        writers.push(thread::spawn(move || relay_stream(stderr, STDERR, &to_host, &err_left)));
    }
    let mut stdin = child.stdin.take();
    thread::spawn(move || {
        let [out_left, err_left] = left;
        let mut payload = Vec::new();
        while let Ok(kind) = receive(&mut port, &mut payload) {
            match kind {
                STDIN if payload.is_empty() => stdin = None,
                // A command that does not read its input is no error; the rest is discarded.
                STDIN => stdin = stdin.take().filter(|pipe| (&*pipe).write_all(&payload).is_ok()),
                STDOUT => out_left.store(true, Ordering::Relaxed),
                STDERR => err_left.store(true, Ordering::Relaxed),
                STOP => drop(fs::write(COMMAND_KILL, "1")),
                _ => return,
            }
        }
    });

    let status = child.wait()?;
    // The command's end is the end, as it is for a shell: what it left behind in the background goes too, and with it
    // the last writers of the pipes.
    fs::write(COMMAND_KILL, "1")?;
    for writer in writers {
        let _ = writer.join();
    }
    Ok(exit_code(status))
}

/// Copies one output of the command into frames until its end, or until its reader has left.
fn relay_stream(mut stream: impl Read, kind: u8, to_host: &Sink, left: &AtomicBool) {
    let mut chunk = vec![0; CHUNK];
    while let Ok(length @ 1..) = stream.read(&mut chunk) {
        if left.load(Ordering::Relaxed) || to_host.send(kind, &chunk[..length]).is_err() {
            return; // closes the pipe: the command meets a broken pipe
        }
    }
}

/// As a shell reports it: the status itself, or 128 plus the signal.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code & 0xff).ok()).unwrap_or(MACHINE_FAILED)
}

/// Reads NUL-terminated strings.
fn strings(file: &Path) -> io::Result<Vec<OsString>> {
    let mut bytes = fs::read(file)?;
    if bytes.pop().is_none() {
        return Ok(Vec::new());
    }
    Ok(bytes.split(|&byte| byte == 0).map(|text| OsString::from_vec(text.to_vec())).collect())
}

/// Splits `NAME=value`.
fn variable(entry: &OsStr) -> Option<(OsString, OsString)> {
    let bytes = entry.as_bytes();
    let at = bytes.iter().position(|&byte| byte == b'=').filter(|&at| at > 0)?;
    Some((OsString::from_vec(bytes[..at].to_vec()), OsString::from_vec(bytes[at + 1..].to_vec())))
}
