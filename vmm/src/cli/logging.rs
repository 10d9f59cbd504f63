//! Log messages: to standard error or a file, warnings unless more is wanted.

use std::fs::OpenOptions;
use std::io::{self, IsTerminal};
use std::sync::Arc;

use anyhow::Context;
use tracing::level_filters::LevelFilter;

use super::Global;

/// Starts logging. Costs one allocation or two as long as nothing is said.
pub(super) fn start(global: &Global) -> anyhow::Result<()> {
    let level = match global.verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let builder = tracing_subscriber::fmt().with_max_level(level).with_target(level >= LevelFilter::DEBUG);
    match &global.log_file {
        None => builder.without_time().with_ansi(io::stderr().is_terminal()).with_writer(io::stderr).init(),
        Some(path) => {
            let file = OpenOptions::new().append(true).create(true).open(path);
            let file = file.with_context(|| format!("Cannot open log file {path:?}"))?;
            // Into a file everything that `-v` would show is written anyway: that is what it is for.
            let level = level.max(LevelFilter::INFO);
            builder.with_max_level(level).with_ansi(false).with_writer(Arc::new(file)).init();
        }
    }
    Ok(())
}
