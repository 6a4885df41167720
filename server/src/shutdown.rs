//! Signals as events, and what they make of the exit code.

use std::process::ExitCode;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

/// SIGTERM and SIGINT, which mean the same: finish what runs, then end; the second one means now.
#[derive(Debug)]
pub(crate) struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

/// One of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// SIGTERM.
    Terminate,
    /// SIGINT.
    Interrupt,
}

impl Signals {
    /// Takes over both signals; from now on they no longer end the process by themselves.
    ///
    /// # Errors
    ///
    /// When the system refuses a handler.
    pub(crate) fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.terminate.recv() => Signal::Terminate,
            _ = self.interrupt.recv() => Signal::Interrupt,
        }
    }

    /// Waits until what runs has `finished`, within `limit` or until the next signal. The exit code says which: 0; 1
    /// after the limit; 128 and the signal's number, by the custom of shells.
    pub(crate) async fn grace(&mut self, limit: Duration, finished: impl Future<Output = ()>) -> ExitCode {
        tokio::select! {
            () = finished => ExitCode::SUCCESS,
            () = tokio::time::sleep(limit) => {
                tracing::warn!(limit_s = limit.as_secs(), "requests were cut off: they took too long");
                ExitCode::FAILURE
            }
            signal = self.next() => {
                tracing::warn!(signal = signal.name(), "requests were cut off");
                signal.exit_code()
            }
        }
    }
}

impl Signal {
    /// Its name.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Terminate => "SIGTERM",
            Self::Interrupt => "SIGINT",
        }
    }

    fn exit_code(self) -> ExitCode {
        let number = match self {
            Self::Terminate => 15,
            Self::Interrupt => 2,
        };
        ExitCode::from(128 + number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_exit_code_says_how_it_ended() {
        let mut signals = Signals::new().unwrap();
        let (long, at_once) = (Duration::from_secs(3600), Duration::ZERO);
        assert_eq!(signals.grace(long, std::future::ready(())).await, ExitCode::SUCCESS);
        assert_eq!(signals.grace(at_once, std::future::pending()).await, ExitCode::FAILURE);
        assert_eq!(Signal::Interrupt.exit_code(), ExitCode::from(130));
        assert_eq!(Signal::Terminate.exit_code(), ExitCode::from(143));
    }
}
