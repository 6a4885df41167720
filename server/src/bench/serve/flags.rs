//! Flags of `tidemill bench serve`. Those that `vllm bench serve` has too keep its names and meanings.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::{Map, Value};

use crate::flags::seconds;

/// `tidemill bench serve`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ServeBenchFlags {
    #[command(flatten)]
    pub(super) server: ServerFlags,
    #[command(flatten)]
    pub(super) load: LoadFlags,
    #[command(flatten)]
    pub(super) prompts: PromptFlags,
    #[command(flatten)]
    pub(super) result: ResultFlags,
}

/// Whom to ask.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Server")]
pub(super) struct ServerFlags {
    /// Where the server is
    #[arg(long, env = "TIDEMILL_BASE_URL", value_name = "URL", default_value = "http://127.0.0.1:8000")]
    pub(super) base_url: String,
    /// What to ask there: a path that ends with /completions or /chat/completions
    #[arg(long, env = "TIDEMILL_ENDPOINT", value_name = "PATH", default_value = "/v1/completions")]
    pub(super) endpoint: String,
    /// Model to ask [default: the first that the server lists]
    #[arg(long, env = "TIDEMILL_MODEL")]
    pub(super) model: Option<String>,
    /// Key to send
    #[arg(long, env = "TIDEMILL_API_KEY", value_name = "KEY", hide_env_values = true)]
    pub(super) api_key: Option<String>,
    /// Headers to send besides
    #[arg(long, env = "TIDEMILL_HEADER", value_name = "NAME=VALUE", value_parser = pair)]
    pub(super) header: Vec<(String, String)>,
    /// Fields to add to each request, as a JSON object
    #[arg(long, env = "TIDEMILL_EXTRA_BODY", value_name = "JSON", value_parser = json_object)]
    pub(super) extra_body: Option<Map<String, Value>>,
    /// Seconds until a request that is not answered counts as failed
    #[arg(long, env = "TIDEMILL_REQUEST_TIMEOUT", value_name = "SECONDS", default_value = "3600", value_parser = seconds)]
    pub(super) request_timeout: Duration,
}

/// When requests are sent.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Load")]
pub(super) struct LoadFlags {
    /// Requests to send; of a trace, at most so many
    #[arg(long, env = "TIDEMILL_NUM_PROMPTS", value_name = "N", default_value = "1000", value_parser = positive())]
    pub(super) num_prompts: u32,
    /// Requests per second; inf sends all at once [default: inf, or the times of the trace]
    #[arg(long, env = "TIDEMILL_REQUEST_RATE", value_name = "PER_SECOND")]
    pub(super) request_rate: Option<Rate>,
    /// How evenly they come at that rate: 1 is a Poisson process, less is in bursts, inf is like clockwork; the shape
    /// of a gamma distribution
    #[arg(long, env = "TIDEMILL_BURSTINESS", value_name = "SHAPE", default_value = "1")]
    pub(super) burstiness: Rate,
    /// Requests in flight at most: those that come while so many are wait in the generator [default: no limit]
    #[arg(long, env = "TIDEMILL_MAX_CONCURRENCY", value_name = "N", value_parser = positive())]
    pub(super) max_concurrency: Option<u32>,
    /// Requests to send before, one after the other, that do not count
    #[arg(long, env = "TIDEMILL_NUM_WARMUPS", value_name = "N", default_value = "0")]
    pub(super) num_warmups: u32,
    /// Seed of prompts and arrivals: the same seed asks the same
    #[arg(long, env = "TIDEMILL_SEED", default_value = "0")]
    pub(super) seed: u64,
}

/// What is asked.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Prompts")]
pub(super) struct PromptFlags {
    /// Where prompts come from
    #[arg(long, env = "TIDEMILL_DATASET_NAME", value_enum, default_value_t)]
    pub(super) dataset_name: DatasetName,
    /// File of the trace
    #[arg(long, env = "TIDEMILL_DATASET_PATH", value_name = "FILE", required_if_eq("dataset_name", "trace"))]
    pub(super) dataset_path: Option<PathBuf>,
    /// Tokens of a random prompt, besides the prefix
    #[arg(long, env = "TIDEMILL_RANDOM_INPUT_LEN", value_name = "TOKENS", default_value = "1024", value_parser = positive())]
    pub(super) random_input_len: u32,
    /// Tokens of its answer at most
    #[arg(long, env = "TIDEMILL_RANDOM_OUTPUT_LEN", value_name = "TOKENS", default_value = "128", value_parser = positive())]
    pub(super) random_output_len: u32,
    /// Both lengths are drawn evenly from len × (1 − ratio) to len × (1 + ratio)
    #[arg(long, env = "TIDEMILL_RANDOM_RANGE_RATIO", value_name = "RATIO", default_value = "0", value_parser = ratio)]
    pub(super) random_range_ratio: f64,
    /// Tokens at the beginning that all random prompts share
    #[arg(long, env = "TIDEMILL_RANDOM_PREFIX_LEN", value_name = "TOKENS", default_value = "0")]
    pub(super) random_prefix_len: u32,
    /// Tokens of a prompt of verses, with the prefix
    #[arg(long, env = "TIDEMILL_SONNET_INPUT_LEN", value_name = "TOKENS", default_value = "550", value_parser = positive())]
    pub(super) sonnet_input_len: u32,
    /// Tokens of its answer at most
    #[arg(long, env = "TIDEMILL_SONNET_OUTPUT_LEN", value_name = "TOKENS", default_value = "150", value_parser = positive())]
    pub(super) sonnet_output_len: u32,
    /// Tokens at the beginning that all prompts of verses share
    #[arg(long, env = "TIDEMILL_SONNET_PREFIX_LEN", value_name = "TOKENS", default_value = "200")]
    pub(super) sonnet_prefix_len: u32,
    /// Form of the trace [default: seen from its first line]
    #[arg(long, env = "TIDEMILL_TRACE_FORMAT", value_enum)]
    pub(super) trace_format: Option<TraceFormat>,
    /// Replay the trace so many times as fast
    #[arg(long, env = "TIDEMILL_TRACE_SPEED", value_name = "FACTOR", default_value = "1", value_parser = factor)]
    pub(super) trace_speed: f64,
    /// Multiply the trace's lengths, for models with a shorter context; shared prefixes stay shared
    #[arg(long, env = "TIDEMILL_TRACE_LENGTH_SCALE", value_name = "FACTOR", default_value = "1", value_parser = factor)]
    pub(super) trace_length_scale: f64,
    /// Ask for answers of the full length, whatever the model says
    #[arg(long, env = "TIDEMILL_IGNORE_EOS")]
    pub(super) ignore_eos: bool,
    /// Randomness of the answers
    #[arg(long, env = "TIDEMILL_TEMPERATURE", value_name = "T", default_value = "0")]
    pub(super) temperature: f64,
}

/// What is told.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Result")]
pub(super) struct ResultFlags {
    /// Limits in milliseconds, such as ttft:300 tpot:50 e2el:5000; requests within all of them are counted as goodput
    #[arg(long, env = "TIDEMILL_GOODPUT", value_name = "METRIC:MS", num_args = 1.., value_delimiter = ',')]
    pub(super) goodput: Vec<Objective>,
    /// Metrics in the table, comma-separated
    #[arg(
        long,
        env = "TIDEMILL_PERCENTILE_METRICS",
        value_enum,
        value_delimiter = ',',
        default_value = "ttft,tpot,itl,e2el"
    )]
    pub(super) percentile_metrics: Vec<Metric>,
    /// Their percentiles, comma-separated
    #[arg(
        long,
        env = "TIDEMILL_METRIC_PERCENTILES",
        value_name = "P",
        value_delimiter = ',',
        default_value = "50,90,99",
        value_parser = percentile
    )]
    pub(super) metric_percentiles: Vec<f64>,
    /// Write the result as JSON, with the field names of vLLM
    #[arg(long, env = "TIDEMILL_SAVE_RESULT")]
    pub(super) save_result: bool,
    /// Add every request's lengths, times and error to the JSON
    #[arg(long, env = "TIDEMILL_SAVE_DETAILED", requires = "save_result")]
    pub(super) save_detailed: bool,
    /// Folder of the JSON [default: the current one]
    #[arg(long, env = "TIDEMILL_RESULT_DIR", value_name = "FOLDER")]
    pub(super) result_dir: Option<PathBuf>,
    /// Name of the JSON [default: from rate, model and time]
    #[arg(long, env = "TIDEMILL_RESULT_FILENAME", value_name = "NAME")]
    pub(super) result_filename: Option<PathBuf>,
    /// What to add to the JSON
    #[arg(long, env = "TIDEMILL_METADATA", value_name = "KEY=VALUE", num_args = 1.., value_parser = pair)]
    pub(super) metadata: Vec<(String, String)>,
    /// Write a page with plots, one HTML file that needs no network
    #[arg(long, env = "TIDEMILL_REPORT", value_name = "FILE")]
    pub(super) report: Option<PathBuf>,
    /// Show no progress bar
    #[arg(long, env = "TIDEMILL_DISABLE_TQDM")]
    pub(super) disable_tqdm: bool,
}

/// A positive number or `inf`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rate(pub(super) f64);

/// Where prompts come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum DatasetName {
    /// Random tokens
    #[default]
    Random,
    /// Made-up verses, sent as text, that begin alike
    Sonnet,
    /// Lengths and times of real traffic, with random tokens
    Trace,
}

/// Form of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum TraceFormat {
    /// JSON lines with `hash_ids`, which say which prompts begin alike
    Mooncake,
    /// CSV with TIMESTAMP, ContextTokens, GeneratedTokens
    Azure,
    /// CSV with Timestamp, Request tokens, Response tokens
    Burstgpt,
}

/// What is measured of a request, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(super) enum Metric {
    /// Time to the first token
    Ttft,
    /// Time per output token after the first
    Tpot,
    /// Time between two events with tokens
    Itl,
    /// Time to the end of the answer
    E2el,
}

/// A limit that a request is to keep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Objective {
    pub(super) metric: Metric,
    pub(super) at_most_ms: f64,
}

impl Metric {
    /// All, in the order of tables.
    pub(super) const ALL: [Self; 4] = [Self::Ttft, Self::Tpot, Self::Itl, Self::E2el];

    /// Its short name, which is also that of the JSON's fields.
    pub(super) const fn key(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tpot => "tpot",
            Self::Itl => "itl",
            Self::E2el => "e2el",
        }
    }

    /// Its name for people.
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Ttft => "Time to first token",
            Self::Tpot => "Time per output token",
            Self::Itl => "Inter-token latency",
            Self::E2el => "End-to-end latency",
        }
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse::<f64>() {
            Ok(rate) if 0.0 < rate => Ok(Self(rate)),
            _ => Err(format!("`{text}` is neither a positive number nor inf")),
        }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl FromStr for Objective {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || format!("`{text}` is no limit: try ttft:300, tpot:50 or e2el:5000, in milliseconds");
        let (name, limit) = text.split_once(':').ok_or_else(form)?;
        let metric = match Metric::from_str(name, true) {
            Ok(Metric::Itl) => return Err("a request has many itl: give a limit for its tpot".to_owned()),
            Ok(metric) => metric,
            Err(_) => return Err(form()),
        };
        match limit.parse::<f64>() {
            Ok(at_most_ms) if 0.0 <= at_most_ms && at_most_ms.is_finite() => Ok(Self { metric, at_most_ms }),
            _ => Err(form()),
        }
    }
}

impl fmt::Display for Objective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ≤ {} ms", self.metric.key().to_uppercase(), self.at_most_ms)
    }
}

fn positive() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=MAX_COUNT)
}

fn ratio(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(ratio) if (0.0..1.0).contains(&ratio) => Ok(ratio),
        _ => Err(format!("`{text}` is no ratio from 0 up to, but not, 1")),
    }
}

fn factor(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(factor) if 0.0 < factor && factor.is_finite() => Ok(factor),
        _ => Err(format!("`{text}` is no positive number")),
    }
}

fn percentile(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(percentile) if (0.0..=100.0).contains(&percentile) => Ok(percentile),
        _ => Err(format!("`{text}` is no number from 0 to 100")),
    }
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("`{text}` has no name and value: write NAME=VALUE")),
    }
}

fn json_object(text: &str) -> Result<Map<String, Value>, String> {
    match serde_json::from_str(text) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err("it is JSON, but no object".to_owned()),
        Err(error) => Err(format!("it is no JSON: {error}")),
    }
}

/// Requests and tokens that a flag may ask for: a bound for memory, far above what is sensible.
const MAX_COUNT: i64 = 10_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_or_refused() {
        let rows = [
            ("ttft:300", Some((Metric::Ttft, 300.0))),
            ("TPOT:0.5", Some((Metric::Tpot, 0.5))),
            ("e2el:0", Some((Metric::E2el, 0.0))),
            ("itl:5", None),
            ("ttft", None),
            ("ttft:", None),
            ("ttft:-1", None),
            ("ttft:inf", None),
            ("speed:1", None),
        ];
        for (text, expected) in rows {
            let found = text.parse::<Objective>().ok().map(|found| (found.metric, found.at_most_ms));
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn rates_are_positive() {
        for (text, expected) in [
            ("2.5", Some(2.5)),
            ("inf", Some(f64::INFINITY)),
            ("0", None),
            ("-1", None),
            ("nan", None),
            ("fast", None),
        ] {
            assert_eq!(text.parse::<Rate>().ok().map(|rate| rate.0), expected, "{text}");
        }
    }
}
