//! `tidemill chat`: a conversation in the terminal with any server that speaks the OpenAI API.
//!
//! What the model says goes to stdout and all else to stderr, so that `tidemill chat "…" > answer.txt` holds the
//! answer alone.

mod client;
mod editor;
mod session;

use std::io::{IsTerminal, Read};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use rustyline::error::ReadlineError;

use client::Client;
use editor::{editor, meant};
use session::{Next, Session, Turn};

/// `tidemill chat`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ChatFlags {
    /// Question to ask; without one, and on a terminal, the conversation goes on until /quit
    #[arg(value_name = "PROMPT")]
    pub(crate) prompt: Vec<String>,
    /// Where the server is
    #[arg(long, env = "TIDEMILL_URL", default_value = "http://127.0.0.1:8000")]
    pub(crate) url: String,
    /// Model to ask [default: the first that the server lists]
    #[arg(long, env = "TIDEMILL_MODEL")]
    pub(crate) model: Option<String>,
    /// Key to send
    #[arg(long, env = "TIDEMILL_API_KEY", value_name = "KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// What the model is told before the conversation
    #[arg(long, env = "TIDEMILL_SYSTEM", value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Tokens of an answer at most [default: as many as fit]
    #[arg(long, env = "TIDEMILL_MAX_TOKENS", value_name = "N")]
    pub(crate) max_tokens: Option<u32>,
    /// Randomness of the answers, 0 for none [default: the model's own]
    #[arg(long, env = "TIDEMILL_TEMPERATURE", value_name = "T")]
    pub(crate) temperature: Option<f64>,
    /// Say after each answer how long it took
    #[arg(long, env = "TIDEMILL_STATS")]
    pub(crate) stats: bool,
}

/// Talks until the user has enough.
pub(crate) fn run(flags: &ChatFlags) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let client = Client::new(&flags.url, flags.api_key.clone())?;
    let model = match &flags.model {
        Some(model) => model.clone(),
        None => runtime.block_on(client.first_model())?,
    };
    let mut session = Session::new(client, model, flags);
    if !flags.prompt.is_empty() {
        return runtime.block_on(ask_once(&mut session, &flags.prompt.join(" ")));
    }
    if !std::io::stdin().is_terminal() {
        let mut prompt = String::new();
        std::io::stdin().read_to_string(&mut prompt).context("the question on stdin cannot be read")?;
        anyhow::ensure!(!prompt.trim().is_empty(), "there is no question: give one as argument or on stdin");
        return runtime.block_on(ask_once(&mut session, prompt.trim_end()));
    }
    converse(&runtime, &mut session)
}

async fn ask_once(session: &mut Session, prompt: &str) -> anyhow::Result<ExitCode> {
    let turn = session.ask(prompt, interrupt(), &mut std::io::stdout(), &mut std::io::stderr()).await?;
    Ok(match turn {
        Turn::Complete => ExitCode::SUCCESS,
        Turn::Stopped => ExitCode::from(INTERRUPTED),
    })
}

fn converse(runtime: &tokio::runtime::Runtime, session: &mut Session) -> anyhow::Result<ExitCode> {
    let mut editor = editor().context("the terminal cannot be used")?;
    eprintln!("{} — /help for what else there is, Ctrl-D to leave", session.model());
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(ExitCode::SUCCESS),
            Err(error) => return Err(error).context("the terminal cannot be read"),
        };
        if line.trim().is_empty() {
            continue;
        }
        // What cannot be remembered can still be asked.
        let _ = editor.add_history_entry(line.as_str());
        let line = meant(&line);
        match session.next(&line, &mut std::io::stderr())? {
            Next::Quit => return Ok(ExitCode::SUCCESS),
            Next::Listen => {}
            Next::Ask => {
                let (mut out, mut notes) = (std::io::stdout(), std::io::stderr());
                if let Err(error) = runtime.block_on(session.ask(&line, interrupt(), &mut out, &mut notes)) {
                    eprintln!("error: {error:#}");
                }
            }
        }
    }
}

/// Ends when Ctrl-C is pressed.
async fn interrupt() {
    if tokio::signal::ctrl_c().await.is_err() {
        // Without a handler the signal ends the program by itself.
        std::future::pending::<()>().await;
    }
}

/// Exit code of a program that Ctrl-C ended, by the custom of shells.
const INTERRUPTED: u8 = 130;
