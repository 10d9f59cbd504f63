//! `tarn cp`.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use clap_complete::engine::{ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter};
use coordinator::GuestSession;
use coordinator::recipes::{copy_from_guest, copy_to_guest};
use indicatif::{ProgressBar, ProgressStyle};

use super::interrupt::{self, Interruptible};
use super::output;
use crate::config::check_name;
use crate::run_dir::RunningVm;

/// How long an agent may take to show that it is there.
const AGENT: Duration = Duration::from_secs(30);

/// Copy a file into a guest or out of it, through its agent
///
/// One of the two is NAME:PATH, a file in the guest of VM NAME; the other is a file here, or - for standard input or
/// output. The destination appears when all of it is there; permissions are those of a new file.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  tarn cp web:/var/log/messages .\n  tarn cp site.tar web:/tmp/\n  \
    tar c site | tarn cp - web:/tmp/site.tar")]
pub(super) struct CpArgs {
    /// File to copy: PATH, NAME:PATH or -
    #[arg(add = ArgValueCompleter::new(candidates))]
    source: OsString,
    /// Where to: PATH, NAME:PATH or -; a directory takes the file under its own name
    #[arg(add = ArgValueCompleter::new(candidates))]
    destination: OsString,
}

#[derive(Debug, PartialEq, Eq)]
enum Place {
    Guest { vm: String, path: String },
    Here(PathBuf),
    Stream,
}

pub(super) fn run(args: &CpArgs) -> anyhow::Result<u8> {
    let (source, destination) = (place(&args.source)?, place(&args.destination)?);
    interrupt::only_ask()?;
    match (source, destination) {
        (Place::Guest { vm, path }, Place::Stream) => {
            let result = fetch(&vm, &path, &mut io::stdout().lock());
            result.map_err(|error| if is_broken_pipe(&error) { output::Closed.into() } else { error })?;
        }
        (Place::Guest { vm, path }, Place::Here(here)) => {
            let here = if here.is_dir() { here.join(file_name(&path)?) } else { here };
            let mut file = Incoming::create(&here)?;
            fetch(&vm, &path, &mut file.file)?;
            file.put_in_place()?;
        }
        (Place::Stream, Place::Guest { vm, path }) => {
            if path.ends_with('/') {
                bail!("Standard input has no name that it could have in {path:?}: give one");
            }
            let name = file_name(&path)?.to_owned();
            put(&vm, &mut io::stdin().lock(), &path, &name, None)?;
        }
        (Place::Here(here), Place::Guest { vm, path }) => {
            let mut file = File::open(&here).with_context(|| format!("Cannot open {here:?}"))?;
            let metadata = file.metadata().with_context(|| format!("Cannot examine {here:?}"))?;
            if metadata.is_dir() {
                bail!("{here:?} is a directory; pack it, as in `tar c DIR | tarn cp - NAME:PATH`");
            }
            let name = here.file_name().and_then(OsStr::to_str);
            let name = name.ok_or_else(|| anyhow!("The name of {here:?} is not UTF-8"))?;
            put(&vm, &mut file, &path, name, metadata.is_file().then_some(metadata.len()))?;
        }
        (Place::Guest { .. }, Place::Guest { .. }) => {
            bail!("Copying from guest to guest goes through this host: tarn cp A:PATH - | tarn cp - B:PATH")
        }
        _ => bail!("Neither place is in a guest: write it as NAME:PATH"),
    }
    Ok(0)
}

/// `NAME:PATH` is in a guest unless a `/` or `.` at the beginning makes it a path of this host (`./a:b`).
fn place(text: &OsStr) -> anyhow::Result<Place> {
    if text == "-" {
        return Ok(Place::Stream);
    }
    match text.to_str().and_then(|text| text.split_once(':')) {
        Some((vm, path)) if check_name(vm).is_ok() => {
            if path.is_empty() {
                bail!("{text:?} names no file in the guest");
            }
            Ok(Place::Guest { vm: vm.to_owned(), path: path.to_owned() })
        }
        _ => Ok(Place::Here(text.into())),
    }
}

fn file_name(path: &str) -> anyhow::Result<&str> {
    let name = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    if matches!(name, "" | "." | "..") { Err(anyhow!("{path:?} names no file")) } else { Ok(name) }
}

fn connect(vm: &str) -> anyhow::Result<GuestSession> {
    let mut agent = GuestSession::connect(&RunningVm::open(vm)?.agent_socket())?;
    agent.wait_for_agent(AGENT)?;
    Ok(agent)
}

fn fetch(vm: &str, path: &str, sink: &mut dyn Write) -> anyhow::Result<u64> {
    let mut agent = connect(vm)?;
    let bar = progress_bar(None);
    let copied = copy_from_guest(&mut agent, path, &mut Interruptible(sink), &mut |done, total| {
        if let (Some(total), None) = (total, bar.length()) {
            bar.set_length(total);
            bar.set_style(with_length());
        }
        bar.set_position(done);
    });
    bar.finish_and_clear();
    copied.with_context(|| format!("Cannot copy {path} from VM {vm}"))
}

fn put(vm: &str, source: &mut dyn Read, path: &str, name: &str, len: Option<u64>) -> anyhow::Result<u64> {
    let mut agent = connect(vm)?;
    let bar = progress_bar(len);
    let copied =
        copy_to_guest(&mut agent, &mut Interruptible(source), path, name, &mut |done| bar.set_position(done));
    bar.finish_and_clear();
    copied.with_context(|| format!("Cannot copy to {path} in VM {vm}"))
}

/// On standard error, and only where that is a terminal.
fn progress_bar(len: Option<u64>) -> ProgressBar {
    match len {
        Some(len) => ProgressBar::new(len).with_style(with_length()),
        None => ProgressBar::no_length().with_style(style("{spinner} {bytes} {bytes_per_sec}")),
    }
}

fn with_length() -> ProgressStyle {
    style("{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants of this file; a test renders them.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .last()
        .and_then(|cause| cause.downcast_ref::<io::Error>())
        .is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}

/// A file that is being received: under a temporary name beside its destination, gone unless put in place.
#[derive(Debug)]
struct Incoming {
    file: File,
    destination: PathBuf,
    /// `None` once it is in place, and for what is written directly: devices, pipes.
    temporary: Option<PathBuf>,
}

impl Incoming {
    fn create(destination: &Path) -> anyhow::Result<Self> {
        let cannot = || format!("Cannot create {destination:?}");
        // Follows symbolic links: a link to a file is replaced at its end, not by a file.
        let real = fs::canonicalize(destination).unwrap_or_else(|_| destination.to_owned());
        let existing = fs::metadata(&real).ok();
        if existing.is_some_and(|metadata| !metadata.is_file()) {
            let file = OpenOptions::new().write(true).open(&real).with_context(cannot)?;
            return Ok(Self { file, destination: real, temporary: None });
        }
        let mut name = OsString::from(".");
        name.push(real.file_name().ok_or_else(|| anyhow!("{destination:?} names no file"))?);
        name.push(format!(".{}", std::process::id()));
        let temporary = real.with_file_name(name);
        let file = OpenOptions::new().write(true).create_new(true).open(&temporary).with_context(cannot)?;
        Ok(Self { file, destination: real, temporary: Some(temporary) })
    }

    fn put_in_place(mut self) -> anyhow::Result<()> {
        if let Some(temporary) = &self.temporary {
            fs::rename(temporary, &self.destination).with_context(|| {
                format!("Cannot rename the file that was received to {:?}", self.destination)
            })?;
            self.temporary = None;
        }
        Ok(())
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            let _ = fs::remove_file(temporary);
        }
    }
}

/// Names of running VMs with their colon, and files of this host.
fn candidates(typed: &OsStr) -> Vec<CompletionCandidate> {
    let text = typed.to_string_lossy();
    let vms = RunningVm::list().unwrap_or_default();
    let names = vms.iter().map(|vm| format!("{}:", vm.name())).filter(|name| name.starts_with(&*text));
    let mut found: Vec<_> = names.map(CompletionCandidate::new).collect();
    found.extend(PathCompleter::any().complete(typed));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_and_a_colon_mean_a_guest() {
        let guest = |vm: &str, path: &str| Place::Guest { vm: vm.into(), path: path.into() };
        let at = |text: &str| place(OsStr::new(text)).unwrap();
        assert_eq!(at("web:/tmp/a"), guest("web", "/tmp/a"));
        assert_eq!(at("web:a:b"), guest("web", "a:b"));
        assert_eq!(at("./web:a"), Place::Here("./web:a".into()));
        assert_eq!(at("/tmp/a:b"), Place::Here("/tmp/a:b".into()));
        assert_eq!(at("file"), Place::Here("file".into()));
        assert_eq!(at("-"), Place::Stream);
        assert!(place(OsStr::new("web:")).is_err());
    }

    #[test]
    fn places_that_make_no_sense_are_refused() {
        for (source, destination, part) in [
            ("a", "b", "Neither place"),
            ("a:/x", "b:/y", "guest to guest"),
            ("-", "a:/x/", "has no name"),
            ("/", "a:/x", "is a directory"),
            ("/nonexistent", "a:/x", "Cannot open"),
        ] {
            let error = run(&CpArgs { source: source.into(), destination: destination.into() }).unwrap_err();
            assert!(format!("{error:#}").contains(part), "{error:#}");
        }
    }

    #[test]
    fn a_received_file_appears_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let count = || fs::read_dir(dir.path()).unwrap().count();
        fs::write(&path, "old").unwrap();
        let mut failed = Incoming::create(&path).unwrap();
        failed.file.write_all(b"ne").unwrap();
        drop(failed);
        assert_eq!((fs::read(&path).unwrap().as_slice(), count()), (&b"old"[..], 1));
        let mut good = Incoming::create(&path).unwrap();
        good.file.write_all(b"new").unwrap();
        good.put_in_place().unwrap();
        assert_eq!((fs::read(&path).unwrap().as_slice(), count()), (&b"new"[..], 1));
    }

    #[test]
    fn devices_are_written_in_place_and_missing_directories_are_named() {
        let null = Incoming::create(Path::new("/dev/null")).unwrap();
        assert!(null.temporary.is_none());
        let error = Incoming::create(Path::new("/nonexistent/a")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/a"));
    }

    #[test]
    fn progress_templates_are_well_formed() {
        for template in
            ["{spinner} {bytes} {bytes_per_sec}", "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}"]
        {
            ProgressStyle::with_template(template).unwrap();
        }
    }
}
