//! What became of a request.

use std::fmt;
use std::time::Duration;

/// A request, looked back at.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    /// When it was to be sent, from the start of the run.
    pub(super) planned: Duration,
    /// When the generator came to it; later than planned where the generator itself was late.
    pub(super) issued: Duration,
    /// When it was sent; later than issued where so many as allowed were in flight.
    pub(super) sent: Duration,
    /// When its answer ended or failed.
    pub(super) ended: Duration,
    /// Tokens that were wanted of prompt and answer.
    pub(super) wanted: (u32, u32),
    pub(super) result: Result<Answer, Failure>,
}

/// A whole answer; times count from when the request was sent.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Answer {
    /// When the first token came.
    pub(super) first: Duration,
    /// Times between events with tokens. A token whose character is not whole yet shares an event with the next.
    pub(super) gaps: Vec<Duration>,
    /// When the last event came.
    pub(super) last: Duration,
    /// As the server counted.
    pub(super) usage: Option<Usage>,
}

/// Tokens as the server counted them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u32,
    pub(super) completion_tokens: u32,
}

/// Why there is no whole answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) kind: FailureKind,
    /// What exactly was said or seen.
    pub(super) message: String,
}

/// Kinds of failures, by which they are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum FailureKind {
    /// No connection, or it was lost before the answer began.
    Unreachable,
    /// An HTTP status that is no success.
    Status(u16),
    /// The server reported an error within the stream.
    Reported,
    /// The stream ended before the answer did.
    Cut,
    /// What came is no stream of the API.
    Malformed,
    /// It took longer than `--request-timeout`.
    TimedOut,
}

impl Outcome {
    /// Tokens of the prompt, by the server's count where there is one.
    pub(super) fn prompt_tokens(&self) -> u32 {
        match &self.result {
            Ok(Answer { usage: Some(usage), .. }) => usage.prompt_tokens,
            _ => self.wanted.0,
        }
    }
}

impl Answer {
    /// Tokens of the answer: as the server counted them, otherwise as many as there were events.
    pub(super) fn output_tokens(&self) -> u32 {
        match self.usage {
            Some(usage) => usage.completion_tokens,
            None => u32::try_from(self.gaps.len() + 1).unwrap_or(u32::MAX),
        }
    }

    /// Time per output token after the first. `None` where there was but one.
    ///
    /// Tokens are counted by the server and not by events, which can hold several.
    pub(super) fn per_output_token(&self) -> Option<Duration> {
        let after_first = self.output_tokens().checked_sub(1).filter(|&tokens| 0 < tokens)?;
        Some((self.last - self.first) / after_first)
    }
}

impl Failure {
    pub(super) fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable => f.write_str("no connection"),
            Self::Status(status) => write!(f, "HTTP {status}"),
            Self::Reported => f.write_str("error within the stream"),
            Self::Cut => f.write_str("stream cut off"),
            Self::Malformed => f.write_str("not the API's stream"),
            Self::TimedOut => f.write_str("timed out"),
        }
    }
}
