//! Where log lines go: stderr, as text or JSON, between progress bars without tearing them.

use std::io::{IsTerminal, Write};

use indicatif::MultiProgress;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::flags::{LogFlags, LogFormat};

/// Starts logging as the flags say. Lines make room for `bars`.
///
/// # Errors
///
/// When the filter is not understood.
pub(crate) fn start(flags: &LogFlags, bars: &MultiProgress) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&flags.log_level)
        .map_err(|error| anyhow::anyhow!("--log-level `{}`: {error}", flags.log_level))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(flags.log_format == LogFormat::Text && std::io::stderr().is_terminal())
        .with_writer(BesideBars(bars.clone()));
    // A second subscriber in one process is a test's own; the first one stays.
    let _ = match flags.log_format {
        LogFormat::Text => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    Ok(())
}

/// Writes to stderr while the bars are hidden.
#[derive(Clone, Debug)]
struct BesideBars(MultiProgress);

impl<'a> MakeWriter<'a> for BesideBars {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Write for BesideBars {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.suspend(|| std::io::stderr().write_all(bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}
