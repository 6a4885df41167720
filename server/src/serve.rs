//! `tidemill serve`: front end and workers of one machine.

mod placement;
mod supervisor;

use std::process::ExitCode;
use std::sync::Arc;

use indicatif::MultiProgress;
use tidemill_engine::handle::{Isa, ModelSource};

use crate::draft_model;
use crate::flags::{DraftName, RoleName, ServeFlags, typed};
use crate::front::{self, Front};
use crate::logging;
use crate::metrics::Metrics;
use crate::model_source::{self, ResolvedModel};
use crate::openai::Serving;
use crate::router::Cluster;
use crate::shutdown::Signals;
use placement::{Placement, place};
use supervisor::{Supervisor, WorkerPlan};

/// Runs front end and workers until told to end.
pub(crate) fn run(flags: &ServeFlags) -> anyhow::Result<ExitCode> {
    let bars = MultiProgress::new();
    logging::start(&flags.log, &bars)?;
    let model = model_source::resolve(&flags.model, &bars)?;
    let text = front::load_text(&model)?;
    let draft_model = draft_model::resolve(&flags.engine, &flags.model, &model, &bars)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(serve(flags, (&model, draft_model.as_ref()), text, &bars))
}

async fn serve(
    flags: &ServeFlags,
    (model, draft_model): (&ResolvedModel, Option<&ModelSource>),
    text: crate::openai::ModelText,
    bars: &MultiProgress,
) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new()?;
    let names = front::served_names(&flags.model, model);
    let metrics = Arc::new(Metrics::new(&names[0]));
    let plans: Vec<WorkerPlan> = place(flags)?
        .into_iter()
        .map(|placement| plan(flags, model, draft_model, placement))
        .collect::<anyhow::Result<_>>()?;
    let (supervisor, slots) = Supervisor::start(plans, bars, &metrics);
    let cluster = Cluster::follow(slots, Arc::clone(&metrics), flags.engine.require_transport);
    let front = Front::start(&flags.front, names, text, &cluster, metrics).await?;
    tracing::info!(address = %front.address, "front end listens; workers are loading");
    let up = tokio::select! {
        () = cluster.all_up() => match cluster.health().serving {
            Serving::Yes { .. } => Ok(true),
            Serving::No { reason } => Err(anyhow::anyhow!(reason)),
        },
        failed = supervisor.first_failure() => Err(failed),
        _ = signals.next() => Ok(false),
    };
    let mut code = ExitCode::SUCCESS;
    if matches!(up, Ok(true)) {
        let isa = flags.engine.cpu_isa.unwrap_or_else(Isa::detect);
        front.print_banner(&format!("{}, cpu {isa}", words(flags)));
        code = front.until_told(&mut signals, &cluster, flags.front.shutdown_timeout).await;
    }
    front.close().await;
    supervisor.stop().await;
    up.map(|_| code)
}

/// The command line of one worker.
fn plan(
    flags: &ServeFlags,
    model: &ResolvedModel,
    draft_model: Option<&ModelSource>,
    placement: Placement,
) -> anyhow::Result<WorkerPlan> {
    let Placement { name, role, cores } = placement;
    let mut arguments: Vec<String> =
        ["worker", "--role", &typed(role), "--name", &name, "--supervised"].map(str::to_owned).into();
    if !cores.is_empty() {
        let cores: Vec<String> = cores.iter().map(usize::to_string).collect();
        arguments.extend(["--cores".to_owned(), cores.join(",")]);
    }
    arguments.extend(["--log-level".into(), flags.log.log_level.clone()]);
    arguments.extend(["--log-format".into(), typed(flags.log.log_format)]);
    let mut engine = flags.engine.for_role(role, &flags.overrides);
    if let Some(config) = &mut engine.speculative_config
        && let Some(source) = draft_model
    {
        // It has been found and fetched: no worker looks again.
        config.draft_model = Some(DraftName { model: draft_model::path(source)?, revision: None });
    }
    arguments.extend(engine.to_arguments());
    arguments.extend(model_source::path(&model.source)?);
    Ok(WorkerPlan { name, role: role.role(), arguments })
}

fn words(flags: &ServeFlags) -> String {
    if flags.deployment.colocated {
        return "one hybrid worker".into();
    }
    let (prefill, decode) = (flags.deployment.prefill, flags.deployment.decode);
    format!("{prefill} prefill and {decode} decode worker{}", if decode == 1 { "" } else { "s" })
}

/// The roles that are served, in the order of their names.
fn roles(flags: &ServeFlags) -> Vec<(RoleName, u32)> {
    if flags.deployment.colocated {
        vec![(RoleName::Hybrid, 1)]
    } else {
        vec![(RoleName::Prefill, flags.deployment.prefill), (RoleName::Decode, flags.deployment.decode)]
    }
}
