//! `tarn completions`.

use anyhow::{Context, bail};
use clap::Args;
use clap_complete::env::Shells;

use super::output;

/// Print what a shell needs to complete tarn's subcommands, options and VM names
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tarn completions bash >> ~/.bashrc")]
pub(super) struct CompletionsArgs {
    /// bash, zsh, fish, elvish or powershell
    #[arg(value_parser = ["bash", "zsh", "fish", "elvish", "powershell"])]
    shell: String,
}

pub(super) fn run(args: &CompletionsArgs) -> anyhow::Result<u8> {
    let shells = Shells::builtins();
    let Some(shell) = shells.completer(&args.shell) else { bail!("No completion for {:?}", args.shell) };
    let mut script = Vec::new();
    // The script calls `tarn` with COMPLETE set, so that names of VMs are those that run at that moment.
    shell
        .write_registration("COMPLETE", "tarn", "tarn", "tarn", &mut script)
        .context("Cannot write the completion script")?;
    output::print(script)?;
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_offered_shell_has_a_script() {
        for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
            assert!(Shells::builtins().completer(shell).is_some(), "{shell}");
        }
    }
}
