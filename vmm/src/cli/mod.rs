//! The command line: one subcommand per file. `run` is the only one that starts a VM; all others are clients of the
//! sockets in a VM's run-time directory.

mod agent;
mod completions;
mod console;
mod cp;
mod doctor;
mod exec;
mod guest_state;
mod interrupt;
mod kill;
mod lines;
mod logging;
mod operation;
mod output;
mod pause;
mod process;
mod ps;
mod qmp;
mod resume;
mod run;
mod stop;
mod vm_name;

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::CompleteEnv;

/// Exit status when `tarn` itself failed.
const FAILURE: u8 = 1;
/// Exit status for a command line that makes no sense.
const USAGE: u8 = 2;

const AFTER_HELP: &str = "\
Exit status:
  0      success
  1      tarn failed; one line on standard error says why
  2      the command line is wrong
  3      an operation on disks was aborted, and all is as before (pivot, mirror, backup, op)
  4      it is not settled: `tarn recover` finds out what became of it, and settles it
  70     the guest panicked (tarn run; see --on-guest-panic)
  74     the command succeeded, but wrote more than the 16 MiB that are kept of each output (exec, run --exec)
  other  that of the command in the guest (exec, run --exec; 128+N after signal N), or of --on-guest-…

Files:
  $XDG_RUNTIME_DIR/tarn/NAME/ (root: /run/tarn/NAME/; TARN_RUN_DIR overrides the part before NAME):
  monitor.sock (QMP), agent.sock (guest agent), console.sock, pid, config.json, log
  $XDG_STATE_HOME/tarn/NAME/ (root: /var/lib/tarn/NAME/; TARN_STATE_DIR overrides the part before NAME), once a disk
  was moved or copied: journal, disks.json, lock, witness-…; beside such an image: IMAGE.stamp; those of block
  devices are in .stamps/ beside NAME

Example:
  tarn run --name web --disk data.img --mount /dev/vda:/data:ext4 --detach
  tarn exec web -- uname -r
  tarn stop web";

/// A KVM microVM monitor whose guests can be frozen, paused, copied and asked
#[derive(Debug, Parser)]
#[command(name = "tarn", version, after_help = AFTER_HELP, max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every subcommand.
#[derive(Debug, Clone, Default, Args)]
struct Global {
    /// Tell more on standard error; twice for debugging
    #[arg(short, long, action = clap::ArgAction::Count, global = true, help_heading = "Messages")]
    verbose: u8,
    /// Append log messages to FILE instead
    #[arg(long, value_name = "FILE", global = true, help_heading = "Messages")]
    log_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::RunArgs>),
    Ps(ps::PsArgs),
    Exec(exec::ExecArgs),
    Cp(cp::CpArgs),
    Console(console::ConsoleArgs),
    Pause(pause::PauseArgs),
    Resume(resume::ResumeArgs),
    Stop(stop::StopArgs),
    Kill(kill::KillArgs),
    Pivot(operation::PivotArgs),
    Mirror(operation::MirrorArgs),
    Backup(operation::BackupArgs),
    Freeze(operation::FreezeArgs),
    Thaw(operation::ThawArgs),
    Op(operation::OpArgs),
    Recover(operation::RecoverArgs),
    Qmp(qmp::QmpArgs),
    Agent(agent::AgentArgs),
    Doctor(doctor::DoctorArgs),
    Completions(completions::CompletionsArgs),
}

/// Does what the command line says; its result is the process's exit status.
pub fn main() -> ExitCode {
    // The shell asks for completions by an environment variable; then this does not return.
    if env::var_os("COMPLETE").is_some() {
        CompleteEnv::with_factory(Cli::command).complete();
    }
    let cli = match parse(&env::args_os().collect::<Vec<_>>()) {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to standard output, and its reader may have left.
            let _ = error.print();
            return if error.use_stderr() { USAGE.into() } else { ExitCode::SUCCESS };
        }
    };
    match logging::start(&cli.global).and_then(|()| dispatch(cli)) {
        Ok(status) => status.into(),
        Err(error) if error.is::<output::Closed>() => ExitCode::SUCCESS,
        Err(error) => {
            output::complain(&format!("{error:#}"));
            FAILURE.into()
        }
    }
}

/// Parses a command line. Describing all subcommands to the parser takes longer than parsing, and a VM is to start at
/// once: `tarn run …` is tried alone first. Whatever is wrong with it, the full parser tells.
fn parse(args: &[OsString]) -> Result<Cli, clap::Error> {
    if args.get(1).is_some_and(|word| word == "run")
        && let Ok(OnlyRun { global, command: RunCommand::Run(args) }) = OnlyRun::try_parse_from(args)
    {
        return Ok(Cli { global, command: Command::Run(args) });
    }
    Cli::try_parse_from(args)
}

/// [`Cli`] without its other subcommands.
#[derive(Debug, Parser)]
struct OnlyRun {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: RunCommand,
}

#[derive(Debug, Subcommand)]
enum RunCommand {
    Run(Box<run::RunArgs>),
}

fn dispatch(cli: Cli) -> anyhow::Result<u8> {
    match cli.command {
        Command::Run(args) => run::run(*args, &cli.global),
        Command::Ps(args) => ps::run(&args),
        Command::Exec(args) => exec::run(args),
        Command::Cp(args) => cp::run(&args),
        Command::Console(args) => console::run(&args),
        Command::Pause(args) => pause::run(&args),
        Command::Resume(args) => resume::run(&args),
        Command::Stop(args) => stop::run(&args),
        Command::Kill(args) => kill::run(&args),
        Command::Pivot(args) => operation::pivot(&args),
        Command::Mirror(args) => operation::mirror(&args),
        Command::Backup(args) => operation::backup(&args),
        Command::Freeze(args) => operation::freeze(&args),
        Command::Thaw(args) => operation::thaw(&args),
        Command::Op(args) => operation::op(&args),
        Command::Recover(args) => operation::recover(&args),
        Command::Qmp(args) => qmp::run(&args),
        Command::Agent(args) => agent::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completions(args) => completions::run(&args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_subcommand_shows_an_example() {
        let mut command = Cli::command();
        for subcommand in command.get_subcommands_mut().filter(|sub| sub.get_name() != "help") {
            let name = subcommand.get_name().to_owned();
            let help = subcommand.render_long_help().to_string();
            assert!(help.contains(&format!("\n  tarn {name}")), "{name}: {help}");
        }
    }

    #[test]
    fn the_shortcut_for_run_parses_the_same_and_leaves_errors_to_the_full_parser() {
        for line in ["tarn run", "tarn run -v --cpus 2 --disk a,ro --exec true", "tarn -v run --cpus 2"] {
            let args: Vec<_> = line.split(' ').map(OsString::from).collect();
            let full = Cli::try_parse_from(&args).unwrap();
            assert_eq!(format!("{:?}", parse(&args).unwrap()), format!("{full:?}"));
        }
        for line in ["tarn run --cpu", "tarn run --help", "tarn run extra"] {
            let args: Vec<_> = line.split(' ').map(OsString::from).collect();
            let full = Cli::try_parse_from(&args).unwrap_err().to_string();
            assert_eq!(parse(&args).unwrap_err().to_string(), full);
        }
    }

    #[test]
    fn global_options_go_anywhere() {
        for line in ["tarn -vv ps", "tarn ps -v --verbose"] {
            assert_eq!(Cli::try_parse_from(line.split(' ')).unwrap().global.verbose, 2);
        }
    }
}
