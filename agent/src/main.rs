//! `tarn-agent`: the guest agent, and the init of the guest image.
//!
//! ```text
//!  main ── PID 1 and called init ──▶ init        mounts, modules, ports, reaping, power
//!    │                                │ fork + exec of the same binary
//!    ├── called by its name ──▶ watchdog ◀──┐    holds what is frozen, thaws when the lease is over
//!    │                                │     │ the same
//!    └── otherwise ──▶ options ──▶ server ──┘    main loop: one epoll; a worker for what may take long
//!                        │           │
//!           background,  │           ├─ channel    bytes ⇄ decoder, output queue; hang-up; reopen
//!           log, pid file            ├─ dispatch   one table: name, handler, when it may run, what it answers
//!                                    │    └─ commands/*   one verb family per file
//!                                    └─ freeze     plan (pure) and engine over the kernel's ioctls
//! ```
//!
//! What the main loop waits for (children, a host that does not read, a port that is not there, a command on
//! the worker) is a descriptor in its epoll, and while nobody is connected it sleeps in the kernel without a
//! timer. Replies leave in the order of the requests.

mod access;
mod activation;
mod agent;
mod channel;
mod commands;
mod daemon;
mod dispatch;
mod freeze;
mod guest;
mod inheritance;
mod init;
mod log;
mod options;
mod pidfile;
mod poller;
mod schema;
mod server;
mod signals;
mod watchdog;
mod worker;

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use daemon::Fork;
use options::{Options, OptionsError, Parsed};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    if init::is_wanted(&name) {
        return init::run();
    }
    if name == watchdog::NAME {
        return watchdog::run();
    }
    match options::parse(arguments, std::env::var_os("QGA_CONF")) {
        Ok(Parsed::Print(text)) => match io::stdout().write_all(&text) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Ok(Parsed::Run(options)) => match run(*options) {
            Ok(code) => code,
            Err(error) => {
                log::error(format_args!("{}", chain(&error)));
                ExitCode::FAILURE
            }
        },
        Err(error) => {
            eprintln!("tarn-agent: {}", chain(&error));
            if let OptionsError::CommandLine(_) = error {
                println!("Unknown option, try 'tarn-agent --help' for more information.");
            }
            ExitCode::FAILURE
        }
    }
}

/// Why the agent does not run, or ran to a bad end.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("Cannot go to the background")]
    Daemon(#[source] io::Error),
    #[error("Failed to load persistent state: {0}")]
    State(PathBuf, #[source] io::Error),
    #[error("Unable to open specified log file {0}")]
    Log(PathBuf, #[source] io::Error),
    #[error("Cannot create the pid file {0}")]
    PidFile(PathBuf, #[source] io::Error),
    #[error(transparent)]
    Activation(#[from] activation::ActivationError),
    #[error(transparent)]
    Serve(#[from] server::ServeError),
}

fn run(mut options: Options) -> Result<ExitCode, RunError> {
    let socket = activation::socket()?;
    let mut daemon = None;
    if options.daemon {
        options.make_absolute().map_err(RunError::Daemon)?;
        match daemon::fork().map_err(RunError::Daemon)? {
            Fork::Parent(code) => return Ok(code),
            Fork::Daemon(child) => daemon = Some(child),
        }
    }
    open_files(&options)?;
    let server = server::start(options, socket)?;
    if let Some(daemon) = daemon {
        daemon.ready().map_err(RunError::Daemon)?;
    }
    // A filesystem that is still frozen may be the pid file's.
    if server.run()? {
        pidfile::remove();
    }
    Ok(ExitCode::SUCCESS)
}

/// Log and pid file: now, or after the thaw if a former agent has left filesystems frozen.
fn open_files(options: &Options) -> Result<(), RunError> {
    let Options { statedir, logfile, verbose, daemon, pidfile, .. } = options;
    let pidfile = Some(pidfile).filter(|_| *daemon);
    if is_left_frozen(statedir)? {
        log::start_frozen(logfile.as_deref(), *verbose);
        pidfile.into_iter().for_each(|path| pidfile::defer(path));
        return Ok(());
    }
    if let Some(path) = pidfile {
        pidfile::create(path).map_err(|error| RunError::PidFile(path.clone(), error))?;
    }
    let named = || logfile.clone().unwrap_or_default();
    log::start(logfile.as_deref(), *verbose).map_err(|error| RunError::Log(named(), error))
}

/// Whether a former agent ended in the frozen state. Nothing but stat(2) is safe to find out.
fn is_left_frozen(statedir: &Path) -> Result<bool, RunError> {
    fs::metadata(statedir).map_err(|error| RunError::State(statedir.to_owned(), error))?;
    match fs::symlink_metadata(statedir.join(freeze::STATE_FILE)) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(false),
        // If it cannot be told, a thaw does no harm.
        _ => Ok(true),
    }
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    line
}
