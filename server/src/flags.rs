//! The command line: what may be typed, with its environment twins and its help.
//!
//! Flags that vLLM has too keep its names. Every flag has a twin `TIDEMILL_<FLAG>`, which a test checks, so that
//! a container needs no argument list. What the values mean together is decided where they are used.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand};
use tidemill_engine::handle::Isa;

mod engine;
mod front;
mod speculative;
mod values;

pub(crate) use engine::{DeploymentFlags, EngineFlags, ModelFlags, RoleOverrides, cpu_isa, device};
pub(crate) use front::{FrontFlags, LogFlags};
pub(crate) use speculative::DraftName;
pub(crate) use values::{CoreList, LoadFormatName, LogFormat, RoleName, TransportName, typed};

/// Everything that can be typed.
#[derive(Debug, Parser)]
#[command(
    name = "tidemill",
    about = "Serves large language models with prefill and decode on separate workers",
    version = crate::VERSION,
    propagate_version = true,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "Start here:\n  tidemill serve                 the demo model on http://127.0.0.1:8000/v1\n  \
                  tidemill serve ./my-model      a Hugging Face folder\n  \
                  tidemill chat                  talk to it\n  \
                  tidemill doctor                what this machine offers",
    max_term_width = 110
)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What the binary can be.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a model on this machine: front end and workers
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(Box<ServeFlags>),
    /// Run one worker alone, for deployments over several machines
    #[command(after_help = WORKER_EXAMPLES)]
    Worker(Box<WorkerFlags>),
    /// Run the front end alone, over workers that run elsewhere
    #[command(after_help = ROUTE_EXAMPLES)]
    Route(Box<RouteFlags>),
    /// Talk to a model in the terminal, over any OpenAI-compatible URL
    Chat(crate::chat::ChatFlags),
    /// Measure how fast a server is
    #[command(subcommand, arg_required_else_help = true)]
    Bench(crate::bench::BenchCommand),
    /// Say what this machine offers and what Tidemill would use
    Doctor(DoctorFlags),
    /// Print a completion script for a shell
    #[command(
        after_help = "Example:\n  tidemill completions bash > ~/.local/share/bash-completion/completions/tidemill"
    )]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Prints the completion script for `shell`.
pub(crate) fn print_completions(shell: clap_complete::Shell) {
    clap_complete::generate(shell, &mut Cli::command(), "tidemill", &mut std::io::stdout());
}

/// `tidemill serve`.
#[derive(Args, Debug)]
pub(crate) struct ServeFlags {
    #[command(flatten)]
    pub(crate) model: ModelFlags,
    #[command(flatten)]
    pub(crate) deployment: DeploymentFlags,
    #[command(flatten)]
    pub(crate) engine: EngineFlags,
    #[command(flatten)]
    pub(crate) overrides: RoleOverrides,
    #[command(flatten)]
    pub(crate) front: FrontFlags,
    #[command(flatten)]
    pub(crate) log: LogFlags,
}

/// `tidemill worker`.
#[derive(Args, Debug)]
pub(crate) struct WorkerFlags {
    /// What the router prefers this worker for; each can do all parts of a request
    #[arg(long, env = "TIDEMILL_ROLE", value_enum)]
    pub(crate) role: RoleName,
    /// Name in logs, metrics and peers' messages [default: role and process id]
    #[arg(long, env = "TIDEMILL_NAME")]
    pub(crate) name: Option<String>,
    /// Where routers reach this worker; port 0 picks one
    #[arg(long, env = "TIDEMILL_LISTEN", value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0")]
    pub(crate) listen: SocketAddr,
    /// Where other workers hand KV caches over; give an address that they can reach
    #[arg(long, env = "TIDEMILL_HANDOFF_LISTEN", value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0")]
    pub(crate) handoff_listen: SocketAddr,
    /// Cores to compute on, such as 0-3,6 [default: all, without pinning]
    #[arg(long, env = "TIDEMILL_CORES", value_name = "LIST", conflicts_with = "threads")]
    pub(crate) cores: Option<CoreList>,
    /// Seconds that running requests get to finish after SIGTERM
    #[arg(long, env = "TIDEMILL_SHUTDOWN_TIMEOUT", value_name = "SECONDS", default_value = "30", value_parser = seconds)]
    pub(crate) shutdown_timeout: Duration,
    /// Report to a parent process by JSON lines on stdout, and end when stdin does
    #[arg(long, env = "TIDEMILL_SUPERVISED", hide = true)]
    pub(crate) supervised: bool,
    #[command(flatten)]
    pub(crate) model: ModelFlags,
    #[command(flatten)]
    pub(crate) engine: EngineFlags,
    #[command(flatten)]
    pub(crate) log: LogFlags,
}

/// `tidemill route`.
#[derive(Args, Debug)]
pub(crate) struct RouteFlags {
    /// Workers, as host:port, comma-separated
    #[arg(
        long,
        env = "TIDEMILL_WORKERS",
        value_name = "HOST:PORT,…",
        value_delimiter = ',',
        required = true
    )]
    pub(crate) workers: Vec<String>,
    #[command(flatten)]
    pub(crate) model: ModelFlags,
    /// Refuse to be ready while a prefill and a decode worker have no connection to hand KV caches over
    #[arg(long, env = "TIDEMILL_REQUIRE_TRANSPORT")]
    pub(crate) require_transport: bool,
    #[command(flatten)]
    pub(crate) front: FrontFlags,
    #[command(flatten)]
    pub(crate) log: LogFlags,
}

/// `tidemill doctor`.
#[derive(Args, Debug)]
pub(crate) struct DoctorFlags {
    /// Print JSON instead of text
    #[arg(long, env = "TIDEMILL_JSON")]
    pub(crate) json: bool,
    /// Instructions to compute with, such as avx2 or portable [default: the fastest there are]
    #[arg(long, env = "TIDEMILL_CPU_ISA", value_name = "NAME", value_parser = engine::cpu_isa)]
    pub(crate) cpu_isa: Option<Isa>,
    /// Measure the way to another host, on which `tidemill doctor --serve` runs
    #[arg(long, env = "TIDEMILL_PEER", value_name = "HOST[:PORT]", conflicts_with = "serve")]
    pub(crate) peer: Option<String>,
    /// Answer measurements at this address, and at the port after it, until interrupted
    #[arg(long, env = "TIDEMILL_SERVE", value_name = "ADDRESS", num_args = 0..=1, default_missing_value = DOCTOR_ADDRESS)]
    pub(crate) serve: Option<SocketAddr>,
    /// Which way to measure; on the answering side, which ways it has
    #[arg(long, env = "TIDEMILL_TRANSPORT", value_enum, default_value_t)]
    pub(crate) transport: TransportName,
}

/// Where `doctor --serve` listens.
const DOCTOR_ADDRESS: &str = "0.0.0.0:18515";
/// Its port.
pub(crate) const DOCTOR_PORT: u16 = 18515;

impl FrontFlags {
    /// Whether other machines can reach this address.
    pub(crate) fn is_open(&self) -> bool {
        let host: Result<IpAddr, _> = self.host.parse();
        host.map_or(self.host != "localhost", |host| !host.is_loopback())
    }
}

/// A whole or fractional number of seconds.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("`{text}` is not a number of seconds"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| format!("`{text}` seconds: {error}"))
}

/// The name of a file that must exist.
fn existing_file(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_file() { Ok(path) } else { Err(format!("there is no file `{text}`")) }
}

const SERVE_EXAMPLES: &str = "\
Examples:
  tidemill serve                                      the demo model; prefill and decode in two processes
  tidemill serve ./Qwen3-0.6B                         a Hugging Face folder
  tidemill serve Qwen/Qwen3-0.6B --port 9000          a model of the hub, downloaded once
  tidemill serve --colocated                          one worker does both: best for short prompts
  tidemill serve --prefill 2 --decode 1 --cores 0-7   three workers share eight cores
  TIDEMILL_API_KEY=secret tidemill serve --host 0.0.0.0

Every flag can be given as an environment variable: --max-model-len is TIDEMILL_MAX_MODEL_LEN.
The demo model is inside the binary; other models are never downloaded unless you name them.";

const WORKER_EXAMPLES: &str = "\
Examples, for a machine 10.0.0.2 that prefills and a machine 10.0.0.3 that decodes:
  tidemill worker --role prefill --listen 10.0.0.2:7000 --handoff-listen 10.0.0.2:7001 ./my-model
  tidemill worker --role decode  --listen 10.0.0.3:7000 --handoff-listen 10.0.0.3:7001 ./my-model
  tidemill route  --workers 10.0.0.2:7000,10.0.0.3:7000 ./my-model

The ports of a worker have no authentication: keep them inside a network that you trust.";

const ROUTE_EXAMPLES: &str = "\
Examples:
  tidemill route --workers 10.0.0.2:7000,10.0.0.3:7000 ./my-model
  tidemill route --workers prefill:7000,decode:7000 --host 0.0.0.0 --api-key-file /run/secrets/key Qwen/Qwen3-0.6B

The model is needed for its tokenizer and chat template alone; no weights are read.";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_has_its_environment_twin_and_help() {
        let cli = Cli::command();
        let is_group = |command: &&clap::Command| command.has_subcommands();
        let (groups, alone): (Vec<_>, Vec<_>) = cli.get_subcommands().partition(is_group);
        for command in alone.into_iter().chain(groups.into_iter().flat_map(clap::Command::get_subcommands)) {
            for argument in command.get_arguments() {
                let Some(long) = argument.get_long().filter(|&long| long != "help" && long != "version")
                else {
                    continue;
                };
                let twin = format!("TIDEMILL_{}", long.replace('-', "_").to_uppercase());
                let found = argument.get_env().map(|env| env.to_string_lossy().into_owned());
                assert_eq!(found.as_deref(), Some(twin.as_str()), "{} --{long}", command.get_name());
                assert!(argument.get_help().is_some(), "{} --{long} has help", command.get_name());
            }
        }
    }

    #[test]
    fn a_model_can_be_named_either_way() {
        let model = |arguments: &[&str]| match Cli::parse_from(arguments).command {
            Command::Serve(serve) => serve.model.name().map(str::to_owned),
            other => panic!("serve was parsed as {other:?}"),
        };
        assert_eq!(model(&["tidemill", "serve"]), None);
        assert_eq!(model(&["tidemill", "serve", "a/b"]).as_deref(), Some("a/b"));
        assert_eq!(model(&["tidemill", "serve", "--model", "a/b"]).as_deref(), Some("a/b"));
    }

    #[test]
    fn only_loopback_is_closed() {
        let is_open = |host: &str| match Cli::parse_from(["tidemill", "serve", "--host", host]).command {
            Command::Serve(serve) => serve.front.is_open(),
            other => panic!("serve was parsed as {other:?}"),
        };
        for (host, open) in [
            ("127.0.0.1", false),
            ("localhost", false),
            ("::1", false),
            ("0.0.0.0", true),
            ("10.0.0.1", true),
        ] {
            assert_eq!(is_open(host), open, "{host}");
        }
    }
}
