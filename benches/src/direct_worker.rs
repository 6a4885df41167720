//! A worker that is asked without a router.

use anyhow::{Context, bail};
use tonic::transport::{Channel, Endpoint};

use wire::worker_client::WorkerClient;
use wire::{GenerateRequest, Sampling, Stop, Whole, generate_event::Event, generate_request::Part};

mod wire {
    #![allow(missing_docs, unreachable_pub, missing_debug_implementations, clippy::all, clippy::use_self)]

    tonic::include_proto!("tidemill.worker.v1");
}

/// A connection to the worker of a deployment that has only one.
pub(crate) struct DirectWorker {
    client: WorkerClient<Channel>,
    next: u64,
}

impl DirectWorker {
    /// Connects to where the worker listens, as the log of its front end tells.
    pub(crate) async fn connect(log: &str) -> anyhow::Result<Self> {
        let serves = log.lines().find(|line| line.contains("worker serves"));
        let words = serves.context("no worker serves")?.split_whitespace();
        let address = words.filter_map(|word| word.strip_prefix("address=")).next().context("no address")?;
        let channel = Endpoint::from_shared(format!("http://{address}"))?.tcp_nodelay(true).connect().await?;
        Ok(Self { client: WorkerClient::new(channel), next: 1 })
    }

    /// Has the worker answer a prompt of one token with another, until its last word.
    pub(crate) async fn first_token(&mut self) -> anyhow::Result<()> {
        let request = GenerateRequest {
            request: self.next,
            tokens: vec![5],
            prompt_len: 1,
            sampling: Some(Sampling { top_p: 1.0, repetition_penalty: 1.0, ..Sampling::default() }),
            stop: Some(Stop { max_tokens: 1, ignore_eos: true, ..Stop::default() }),
            part: Some(Part::Whole(Whole::default())),
        };
        self.next += 1;
        let mut events = self.client.generate(request).await?.into_inner();
        let mut tokens = 0;
        while let Some(event) = events.message().await? {
            match event.event {
                Some(Event::Token(_)) => tokens += 1,
                Some(Event::Failed(failed)) => bail!("the worker failed: {failed:?}"),
                _ => {}
            }
        }
        anyhow::ensure!(tokens == 1, "{tokens} tokens");
        Ok(())
    }
}
