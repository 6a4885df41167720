//! `tidemill worker`: one engine behind gRPC, alone or under `tidemill serve`.
//!
//! A supervised worker reports on stdout and lives exactly as long as its parent holds its stdin open, so that no worker
//! outlives a front end that was killed.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use indicatif::MultiProgress;
use tidemill_engine::engine::EngineHandle;
use tidemill_engine::handle::{DeviceChoice, EngineConfig, LoadFormat, LoadProgress};
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;

use crate::draft_model;
use crate::flags::{LoadFormatName, WorkerFlags, typed};
use crate::logging;
use crate::model_source::{self, ResolvedModel};
use crate::report::Report;
use crate::shutdown::Signals;
use crate::worker::{StatusFeed, WorkerService};

/// Runs a worker until it is told to end.
pub(crate) fn run(flags: &WorkerFlags) -> anyhow::Result<ExitCode> {
    let bars = MultiProgress::new();
    logging::start(&flags.log, &bars)?;
    set_process_name(&typed(flags.role));
    let model = model_source::resolve(&flags.model, &bars)?;
    let draft_model = draft_model::resolve(&flags.engine, &flags.model, &model, &bars)?;
    let mut progress = ProgressReport { supervised: flags.supervised, stage: "" };
    let device = flags.engine.open_device()?;
    let config = EngineConfig { draft_model, ..engine_config(flags, &model, device) };
    let engine = EngineHandle::start(config, &mut |step| progress.report(step))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let served = runtime.block_on(serve(flags, &model.name, engine));
    // Nothing that still waits matters any more.
    runtime.shutdown_timeout(Duration::from_millis(100));
    served
}

async fn serve(flags: &WorkerFlags, model: &str, engine: EngineHandle) -> anyhow::Result<ExitCode> {
    let listener = TcpListener::bind(flags.listen)
        .await
        .with_context(|| format!("cannot listen on {}", flags.listen))?;
    let address = listener.local_addr()?;
    let service = WorkerService::new(engine.clone(), model, flags.engine.require_transport);
    let feed = service.feed();
    let closed = CancellationToken::new();
    let server = tonic::transport::Server::builder()
        // Clients that leave reset their streams, in crowds when a load test ends; the default of twenty would take
        // that for an attack and close the connection on everybody.
        .http2_max_pending_accept_reset_streams(Some(RESETS_AT_ONCE))
        .add_service(service.into_server())
        .serve_with_incoming_shutdown(prompt_incoming(listener), closed.clone().cancelled_owned());
    let server = tokio::spawn(server);
    if flags.supervised {
        Report::Ready { address }.print();
    }
    let description = engine.describe();
    tracing::info!(worker = %description.name, %address, handoff = %description.handoff_address, "listening");
    let code = tokio::select! {
        code = until_told(flags, &engine, &feed) => code?,
        () = until_dead(&engine) => {
            tracing::error!("the engine has stopped");
            ExitCode::FAILURE
        }
        ended = server => {
            ended??;
            ExitCode::FAILURE
        }
    };
    closed.cancel();
    engine.shutdown();
    Ok(code)
}

/// Connections whose small messages leave at once: a token that waits for the acknowledgement of the one before it comes
/// some 40 ms late. The builder's own setting concerns only listeners that it opens itself.
fn prompt_incoming(listener: TcpListener) -> TcpIncoming {
    TcpIncoming::from(listener).with_nodelay(Some(true))
}

/// Waits for the end: a signal, or the parent's end.
async fn until_told(
    flags: &WorkerFlags,
    engine: &EngineHandle,
    feed: &StatusFeed,
) -> anyhow::Result<ExitCode> {
    if flags.supervised {
        // The parent drains this worker by gRPC and then lets go of its stdin.
        let mut rest = Vec::new();
        let _ = tokio::io::stdin().read_to_end(&mut rest).await;
        return Ok(ExitCode::SUCCESS);
    }
    let mut signals = Signals::new()?;
    let signal = signals.next().await.name();
    tracing::info!(signal, limit_s = flags.shutdown_timeout.as_secs(), "draining");
    engine.drain();
    Ok(signals.grace(flags.shutdown_timeout, feed.idle()).await)
}

/// Shows the role in `top` and in the kernel's messages; the arguments show it in `ps`.
fn set_process_name(role: &str) {
    let name = std::ffi::CString::new(format!("tide {role}")).expect("a role's name has no zero byte");
    // Not worth failing for.
    let _ = rustix::thread::set_name(&name);
}

async fn until_dead(engine: &EngineHandle) {
    let mut look = tokio::time::interval(Duration::from_millis(50));
    while engine.is_alive() {
        look.tick().await;
    }
}

fn engine_config(flags: &WorkerFlags, model: &ResolvedModel, device: DeviceChoice) -> EngineConfig {
    let engine = &flags.engine;
    let default_name = || format!("{}-{}", typed(flags.role), std::process::id());
    EngineConfig {
        name: flags.name.clone().unwrap_or_else(default_name),
        role: flags.role.role(),
        model: model.source.clone(),
        device,
        tensor_parallel: engine.tensor_parallel_size,
        cuda_graphs: engine.cuda_graphs(),
        async_scheduling: !engine.no_async_scheduling,
        batch_invariant: engine.batch_invariant,
        load_format: match engine.load_format {
            LoadFormatName::Safetensors => LoadFormat::Safetensors,
            LoadFormatName::Dummy => LoadFormat::Dummy { seed: engine.seed },
        },
        quantization: engine.quantization,
        max_model_len: engine.max_model_len,
        max_num_seqs: engine.max_num_seqs,
        max_num_batched_tokens: engine.max_num_batched_tokens.max(engine.max_num_seqs),
        max_waiting: engine.max_queue,
        kv_cache_memory: engine.kv_cache_memory.map(|size| size.0),
        kv_cache_dtype: engine.kv_cache_dtype.dtype(),
        block_len: engine.block_size,
        axis_order: engine.axis_order.order(),
        prefix_cache: !engine.no_enable_prefix_caching,
        cores: flags.cores.as_ref().map(|cores| cores.0.clone()).unwrap_or_default(),
        threads: engine.threads.map(|threads| threads as usize),
        isa: engine.cpu_isa,
        handoff_listen: flags.handoff_listen,
        transport: engine.transport.choice(),
        handoff: engine.handoff.mode(),
        require_transport: engine.require_transport,
        rdma_devices: engine.rdma_devices.clone(),
        rdma_gid_index: engine.rdma_gid_index,
        huge_pages: engine.huge_pages,
        digest: engine.digest.coverage(),
        in_place: !engine.no_in_place,
        speculation: engine.speculative_config.as_ref().map(|config| config.settings),
        draft_model: None,
        fault: engine.fault_point.as_ref().map(|point| point.0.clone()),
    }
}

/// Passes progress on: to the parent, or to the log when a stage begins.
struct ProgressReport {
    supervised: bool,
    stage: &'static str,
}

impl ProgressReport {
    fn report(&mut self, LoadProgress { stage, done, total }: LoadProgress) {
        if self.supervised {
            Report::Progress { stage: stage.to_owned(), done, total }.print();
        } else if self.stage != stage {
            tracing::info!(stage, total, "starting");
        }
        self.stage = stage;
    }
}

/// Streams that may be reset before they were looked at.
const RESETS_AT_ONCE: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpStream;
    use tokio_stream::StreamExt;

    #[tokio::test]
    async fn tokens_do_not_wait_for_acknowledgements() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let accepted = prompt_incoming(listener).next().await.unwrap().unwrap();
        assert!(accepted.nodelay().unwrap());
    }
}
