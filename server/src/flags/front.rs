//! Flags of the HTTP front end and of logs.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::values::{ByteSize, LogFormat};
use super::{existing_file, seconds};

/// The HTTP front end.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "HTTP")]
pub(crate) struct FrontFlags {
    /// Address to listen on; anything but loopback should come with an API key
    #[arg(long, env = "TIDEMILL_HOST", default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// Port to listen on; 0 picks a free one and prints it
    #[arg(long, env = "TIDEMILL_PORT", default_value = "8000")]
    pub(crate) port: u16,
    /// Key or keys that clients must send as bearer token, comma-separated
    #[arg(long, env = "TIDEMILL_API_KEY", value_name = "KEY", value_delimiter = ',', hide_env_values = true)]
    pub(crate) api_key: Vec<String>,
    /// File with one such key per line
    #[arg(long, env = "TIDEMILL_API_KEY_FILE", value_name = "FILE", value_parser = existing_file)]
    pub(crate) api_key_file: Option<PathBuf>,
    /// Largest request body
    #[arg(long, env = "TIDEMILL_MAX_BODY_SIZE", value_name = "SIZE", default_value = "8MiB")]
    pub(crate) max_body_size: ByteSize,
    /// Requests in flight before the front end answers 429
    #[arg(long, env = "TIDEMILL_MAX_REQUESTS", value_name = "N", default_value = "1024")]
    pub(crate) max_requests: usize,
    /// Origins that browsers may call from, comma-separated; * for all [default: none]
    #[arg(long, env = "TIDEMILL_CORS_ALLOWED_ORIGINS", value_name = "ORIGIN", value_delimiter = ',')]
    pub(crate) cors_allowed_origins: Vec<String>,
    /// Methods that browsers may use, comma-separated
    #[arg(
        long,
        env = "TIDEMILL_CORS_ALLOWED_METHODS",
        value_name = "METHOD",
        value_delimiter = ',',
        default_value = "*"
    )]
    pub(crate) cors_allowed_methods: Vec<String>,
    /// Headers that browsers may send, comma-separated
    #[arg(
        long,
        env = "TIDEMILL_CORS_ALLOWED_HEADERS",
        value_name = "HEADER",
        value_delimiter = ',',
        default_value = "*"
    )]
    pub(crate) cors_allowed_headers: Vec<String>,
    /// Seconds that running requests get to finish after SIGTERM
    #[arg(long, env = "TIDEMILL_SHUTDOWN_TIMEOUT", value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub(crate) shutdown_timeout: Duration,
}

/// Logs, on stderr.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Logs")]
pub(crate) struct LogFlags {
    /// How log lines look
    #[arg(long, env = "TIDEMILL_LOG_FORMAT", value_enum, default_value_t)]
    pub(crate) log_format: LogFormat,
    /// What is logged: error, warn, info, debug, trace, or a filter such as info,tidemill=debug
    #[arg(long, env = "TIDEMILL_LOG_LEVEL", value_name = "LEVEL", default_value = "info")]
    pub(crate) log_level: String,
}
