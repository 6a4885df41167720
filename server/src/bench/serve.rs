//! `tidemill bench serve`: a load for any server that speaks the OpenAI API, and what its users would have seen.
//!
//! Everything that is asked is decided before the first request is sent; the loop is open; tokens are counted by the
//! server and times by events. The table goes to stdout and all else to stderr.

mod arrivals;
mod client;
mod draws;
mod flags;
mod html;
mod json;
mod load;
mod outcome;
mod prompts;
mod stream;
mod summary;
mod table;
mod trace;
mod workload;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use indicatif::ProgressBar;
use jiff::Zoned;

pub(super) use flags::ServeBenchFlags;

use client::Client;
use flags::DatasetName;
use load::Run;
use outcome::Outcome;
use prompts::{Form, Writer};
use summary::Summary;
use workload::Workload;

use crate::shutdown::Signals;

/// A run and all that is told of it.
#[derive(Debug)]
struct Report<'a> {
    flags: &'a ServeBenchFlags,
    url: &'a str,
    model: &'a str,
    started: Zoned,
    /// Requests that were to be sent.
    planned: usize,
    /// Name and value of what the load was.
    settings: Vec<(String, String)>,
    outcomes: &'a [Outcome],
    summary: Summary,
    interrupted: bool,
    /// What one should know of the load.
    remarks: Vec<String>,
}

/// Runs the load and tells what came of it. Fails when no request was answered.
#[expect(clippy::print_stdout, reason = "the table is the program's output")]
pub(super) fn run(flags: &ServeBenchFlags) -> anyhow::Result<ExitCode> {
    let workload = Workload::plan(&flags.load, &flags.prompts)?;
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build()?;
    let started = Zoned::now();
    let (client, form, run) = runtime.block_on(measure(flags, &workload))?;
    let url = client.url();
    let mut report = Report {
        flags,
        url: &url,
        model: &client.model,
        started,
        planned: workload.requests.len(),
        settings: settings(flags, &workload, form),
        summary: Summary::of(&run, &flags.result.goodput),
        outcomes: &run.outcomes,
        interrupted: run.interrupted,
        remarks: workload.notes.clone(),
    };
    report.remarks.extend(too_long(&workload, &client));
    print!("{}", table::text(&report));
    save(&report)?;
    if report.summary.completed == 0 {
        bail!("no request was answered");
    }
    Ok(ExitCode::SUCCESS)
}

async fn measure(flags: &ServeBenchFlags, workload: &Workload) -> anyhow::Result<(Arc<Client>, String, Run)> {
    let client = Arc::new(Client::connect(&flags.server, &flags.prompts).await?);
    if let Some(warning) = too_long(workload, &client) {
        eprintln!("warning: {warning}");
    }
    let wants_text = flags.prompts.dataset_name == DatasetName::Sonnet;
    let form = client.prompt_form(wants_text).await?;
    let words = match &form {
        Form::Tokens(vocabulary) => format!("token ids, {} different", vocabulary.len()),
        Form::Text(length) => format!("text, {:.2} tokens a word", length.tokens_per_word),
    };
    let writer = Arc::new(Writer::new(flags.load.seed, form));
    for request in workload.requests.iter().cycle().take(flags.load.num_warmups as usize) {
        let body = client.body(&writer.write(&request.parts), request.output_tokens, true);
        let warmed = client.ask(body).await;
        warmed
            .map_err(|failure| anyhow::anyhow!("a warm-up failed: {}: {}", failure.kind, failure.message))?;
    }
    let progress = bar(workload.requests.len(), flags.result.disable_tqdm);
    let (requests, concurrency) = (&workload.requests, flags.load.max_concurrency);
    let mut signals = Signals::new()?;
    let told_to_stop = async {
        signals.next().await;
    };
    let run = load::run(&client, &writer, requests, concurrency, &progress, told_to_stop).await;
    progress.finish_and_clear();
    Ok((client, words, run))
}

impl Report<'_> {
    /// What one should know to read the numbers.
    fn notes(&self) -> Vec<String> {
        let mut notes = self.remarks.clone();
        let summary = &self.summary;
        if self.interrupted {
            let ended = self.outcomes.len();
            notes.push(format!(
                "interrupted: {ended} of {} requests had ended, the others do not count",
                self.planned
            ));
        }
        if 0 < summary.uncounted {
            notes.push(format!(
                "{} answers came without usage: their tokens are counted by events, which may hold several",
                summary.uncounted
            ));
        }
        let late = summary.lateness.percentile(99.0);
        if LATE_MS < late {
            notes.push(format!(
                "the generator itself was late by {late:.0} ms at its 99th percentile: what it asked for is less than \
                 was wanted"
            ));
        }
        notes
    }
}

fn settings(flags: &ServeBenchFlags, workload: &Workload, form: String) -> Vec<(String, String)> {
    let mut settings = vec![
        ("prompts", workload.prompts.clone()),
        ("made of", form),
        ("arrivals", workload.arrivals.clone()),
        (
            "most in flight",
            flags.load.max_concurrency.map_or("no limit".to_owned(), |limit| limit.to_string()),
        ),
        ("warm-ups", flags.load.num_warmups.to_string()),
        ("seed", flags.load.seed.to_string()),
        ("ignore end of text", if flags.prompts.ignore_eos { "yes" } else { "no" }.to_owned()),
    ];
    if !flags.result.goodput.is_empty() {
        let limits: Vec<String> = flags.result.goodput.iter().map(ToString::to_string).collect();
        settings.push(("objectives", limits.join(", ")));
    }
    settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// A word about requests that the server will refuse.
fn too_long(workload: &Workload, client: &Client) -> Option<String> {
    let longest = client.max_model_len?;
    let is_long = |one: &&workload::Planned| longest < one.input_tokens() + one.output_tokens;
    let count = workload.requests.iter().filter(is_long).count();
    (0 < count).then(|| {
        let all = workload.requests.len();
        format!("{count} of {all} requests are longer than the server's {longest} tokens")
    })
}

fn save(report: &Report<'_>) -> anyhow::Result<()> {
    let result = &report.flags.result;
    if result.save_result {
        let name = result.result_filename.clone().unwrap_or_else(|| default_name(report));
        let path = result.result_dir.as_deref().unwrap_or(Path::new("")).join(name);
        let text = serde_json::to_string_pretty(&json::value(report)).context("the result as JSON")?;
        write(&path, text + "\n")?;
    }
    if let Some(path) = &result.report {
        write(path, html::page(report))?;
    }
    Ok(())
}

fn write(path: &Path, text: String) -> anyhow::Result<()> {
    let named = || format!("writing {}", path.display());
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(named)?;
    }
    fs::write(path, text).with_context(named)?;
    eprintln!("wrote {}", path.display());
    Ok(())
}

fn default_name(report: &Report<'_>) -> PathBuf {
    let rate = report.flags.load.request_rate.map_or_else(|| "inf".to_owned(), |rate| rate.to_string());
    let model = report.model.rsplit('/').next().unwrap_or(report.model);
    PathBuf::from(format!("openai-{rate}qps-{model}-{}.json", report.started.strftime("%Y%m%d-%H%M%S")))
}

fn bar(requests: usize, hidden: bool) -> ProgressBar {
    if hidden {
        return ProgressBar::hidden();
    }
    ProgressBar::new(requests as u64).with_style(super::bar_style())
}

/// Each request in flight has a connection of its own, and the usual limit of 1024 files is soon reached.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limits = getrlimit(Resource::Nofile);
    // Where it is refused, requests beyond the limit fail and are told so.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limits.maximum, maximum: limits.maximum });
}

/// Threads that send and listen.
const THREADS: usize = 2;
/// Lateness of the generator that is worth a word, in milliseconds.
const LATE_MS: f64 = 20.0;

/// For `--help`.
pub(super) const EXAMPLES: &str = "\
Examples, against a `tidemill serve` on this machine:
  tidemill bench serve --num-prompts 200 --request-rate 4 --random-input-len 512 --random-output-len 64
  tidemill bench serve --request-rate 4 --goodput ttft:300 tpot:50 --report report.html
  tidemill bench serve --max-concurrency 8 --ignore-eos --save-result
  tidemill bench serve --dataset-name trace --dataset-path mooncake_trace.jsonl --trace-speed 10

Names of flags and of the JSON's fields are those of `vllm bench serve`.";

#[cfg(test)]
mod tests;
