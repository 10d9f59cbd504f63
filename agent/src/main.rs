//! `tarn-agent`: the guest agent, and the init of the guest image.
//!
//! ```text
//!  main ── PID 1 and called init ──▶ init      mounts, modules, ports, reaping, power
//!    │                                │ fork + exec of the same binary
//!    └── otherwise ──▶ server ◀───────┘        one thread, one epoll
//!                        │
//!                        ├─ channel    bytes ⇄ decoder, output queue; hang-up; reopen
//!                        ├─ dispatch   one table: name, handler, allowed while frozen, answers success
//!                        │    └─ commands/*   one verb family per file
//!                        └─ freeze     plan (pure) and engine over the kernel's ioctls
//! ```
//!
//! The agent is one thread. Whatever can take long (children, a host that does not read, a port that
//! is not there) is a descriptor in its epoll, and while nobody is connected it sleeps in the kernel
//! without a timer. Replies leave in the order of the requests.

mod access;
mod agent;
mod channel;
mod commands;
mod dispatch;
mod freeze;
mod guest;
mod inheritance;
mod init;
mod log;
mod options;
mod poller;
mod schema;
mod server;
mod signals;
mod worker;

use std::process::ExitCode;

use options::Parsed;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    if init::is_wanted(&name) {
        return init::run();
    }
    match options::parse(arguments) {
        Ok(Parsed::Print(text)) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Ok(Parsed::Run(options)) => run(options),
        Err(error) => {
            println!("{error}");
            println!("{}", options::HINT);
            ExitCode::FAILURE
        }
    }
}

fn run(options: options::Options) -> ExitCode {
    if let Err(error) = log::start(options.logfile.as_deref(), options.verbose) {
        eprintln!("Cannot open the log file: {error}");
        return ExitCode::FAILURE;
    }
    match server::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error(format_args!("{}", chain(&error)));
            ExitCode::FAILURE
        }
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
