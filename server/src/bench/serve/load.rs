//! The open loop: every request is sent at its time, whatever became of those before it.
//!
//! A generator that waits for answers measures a server that is never asked more than it can do. So requests wait for
//! nothing but the clock, and for a place among `--max-concurrency` where that is wanted; by how much the generator
//! itself was late is kept with each of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::client::Client;
use super::outcome::Outcome;
use super::prompts::Writer;
use super::workload::Planned;

/// A run of requests.
#[derive(Debug)]
pub(super) struct Run {
    /// Of requests that ended, in the order of their ends.
    pub(super) outcomes: Vec<Outcome>,
    /// From the start to the last end.
    pub(super) duration: Duration,
    /// Whether it was stopped before all requests had ended.
    pub(super) interrupted: bool,
}

/// Sends `requests` at their times, at most `concurrency` at once, until all have ended or `stop` does.
pub(super) async fn run(
    client: &Arc<Client>,
    writer: &Arc<Writer>,
    requests: &[Planned],
    concurrency: Option<u32>,
    progress: &ProgressBar,
    stop: impl Future<Output = ()>,
) -> Run {
    let places = concurrency.map(|limit| Arc::new(Semaphore::new(limit as usize)));
    let start = Instant::now();
    let mut running = JoinSet::new();
    let mut outcomes = Vec::with_capacity(requests.len());
    let mut to_come = requests.iter();
    let mut next = to_come.next();
    let mut failed = 0_u64;
    let mut stop = std::pin::pin!(stop);
    let interrupted = loop {
        let due = next.map(|request| start.checked_add(request.at).unwrap_or(start + FAR));
        if due.is_none() && running.is_empty() {
            break false;
        }
        tokio::select! {
            biased;
            () = &mut stop => break true,
            // Requests that are due come before answers that came: the loop is open.
            () = until(due), if due.is_some() => {
                let request = next.take().expect("it is due").clone();
                next = to_come.next();
                let (client, writer, places) = (Arc::clone(client), Arc::clone(writer), places.clone());
                running.spawn(async move { one(&client, &writer, &request, places, start).await });
            }
            Some(outcome) = running.join_next() => {
                // A panic in there is a bug of ours.
                let outcome = outcome.expect("no request panics");
                failed += u64::from(outcome.result.is_err());
                outcomes.push(outcome);
                progress.inc(1);
            }
        }
        progress.set_message(match failed {
            0 => format!("{} in flight", running.len()),
            failed => format!("{} in flight, {failed} failed", running.len()),
        });
    };
    let duration = outcomes.iter().map(|outcome| outcome.ended).max().unwrap_or_default();
    Run { outcomes, duration, interrupted }
}

async fn one(
    client: &Client,
    writer: &Writer,
    request: &Planned,
    places: Option<Arc<Semaphore>>,
    start: Instant,
) -> Outcome {
    let body = client.body(&writer.write(&request.parts), request.output_tokens, true);
    let issued = start.elapsed();
    let _place = match &places {
        Some(places) => Some(places.acquire().await.expect("the semaphore is never closed")),
        None => None,
    };
    let sent = start.elapsed();
    let result = client.ask(body).await;
    let wanted = (request.input_tokens(), request.output_tokens);
    Outcome { planned: request.at, issued, sent, ended: start.elapsed(), wanted, result }
}

async fn until(due: Option<Instant>) {
    if let Some(due) = due
        && Instant::now() < due
    {
        tokio::time::sleep_until(due.into()).await;
    }
}

/// Later than any run lasts.
const FAR: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
