//! The log. While filesystems are frozen a write to a file, or to a pipe whose reader waits for a
//! frozen disk, would hang the agent, so lines are held in memory and written after the thaw.
//!
//! A line is written under the log's lock, so once [`hold`] returns no thread is writing any more.

use std::collections::VecDeque;
use std::fmt::Arguments;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

/// Lines held while frozen; beyond that the oldest go.
const HELD_LINES: usize = 256;

struct Log {
    /// Standard error if absent.
    file: Option<File>,
    /// To be opened after the thaw.
    deferred: Option<PathBuf>,
    verbose: bool,
    /// Present while frozen.
    held: Option<VecDeque<String>>,
}

static LOG: Mutex<Log> = Mutex::new(Log { file: None, deferred: None, verbose: false, held: None });

/// Appends to `path`, or writes to standard error.
pub(crate) fn start(path: Option<&Path>, verbose: bool) -> io::Result<()> {
    let file = path.map(open).transpose()?;
    let mut log = LOG.lock();
    log.file = file;
    log.verbose = verbose;
    Ok(())
}

/// Leaves the opening to [`release`] and holds lines until then: the filesystem of `path`, or of standard error, may be
/// frozen.
pub(crate) fn start_frozen(path: Option<&Path>, verbose: bool) {
    let mut log = LOG.lock();
    log.deferred = path.map(Path::to_owned);
    log.verbose = verbose;
    log.held.get_or_insert_default();
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

/// Something did not work.
pub(crate) fn error(text: Arguments<'_>) {
    LOG.lock().line("error", text);
}

/// Something is not as it should be, and the agent goes on.
pub(crate) fn warning(text: Arguments<'_>) {
    LOG.lock().line("warning", text);
}

/// What happens, for those who asked with `--verbose`.
pub(crate) fn debug(text: Arguments<'_>) {
    let mut log = LOG.lock();
    if log.verbose {
        log.line("debug", text);
    }
}

/// Starts to hold lines in memory.
pub(crate) fn hold() {
    LOG.lock().held.get_or_insert_default();
}

/// Opens the file if that was deferred, writes what was held and goes back to writing at once.
pub(crate) fn release() {
    let mut log = LOG.lock();
    if let Some(path) = log.deferred.take() {
        match open(&path) {
            Ok(file) => log.file = Some(file),
            Err(error) => {
                log.line("error", format_args!("Cannot open the log file {}: {error}", path.display()));
            }
        }
    }
    for line in log.held.take().unwrap_or_default() {
        log.write(&line);
    }
}

impl Log {
    fn line(&mut self, level: &str, text: Arguments<'_>) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let line = format!("{}.{:06}: {level}: {text}\n", now.as_secs(), now.subsec_micros());
        match &mut self.held {
            None => self.write(&line),
            Some(held) => {
                if held.len() == HELD_LINES {
                    held.pop_front();
                }
                held.push_back(line);
            }
        }
    }

    /// A log that cannot be written is no reason to stop serving, and there is nobody to tell.
    fn write(&mut self, line: &str) {
        let _ = match &mut self.file {
            Some(file) => file.write_all(line.as_bytes()),
            None => io::stderr().write_all(line.as_bytes()),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // One test, for there is one log.
    #[test]
    fn lines_are_held_while_frozen_and_written_after() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        start(Some(&path), false).unwrap();
        hold();
        for number in 0..300 {
            error(format_args!("number {number}"));
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
        release();
        debug(format_args!("not shown"));
        warning(format_args!("now"));
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), HELD_LINES + 1);
        assert!(lines[0].ends_with("error: number 44"), "{}", lines[0]);
        assert!(lines[HELD_LINES].ends_with("warning: now"));

        let path = directory.path().join("later");
        start_frozen(Some(&path), false);
        hold();
        error(format_args!("early"));
        assert!(!path.exists(), "opened while frozen");
        release();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.ends_with("error: early\n"), "{text}");
    }
}
