//! `tidemill route`: the front end alone, over workers that run elsewhere.

use std::process::ExitCode;

use indicatif::MultiProgress;
use tidemill_engine::handle::Role;
use tokio::sync::watch;

use crate::flags::RouteFlags;
use crate::front::{self, Front};
use crate::logging;
use crate::metrics::Metrics;
use crate::model_source;
use crate::router::{Cluster, Slot};
use crate::shutdown::Signals;

/// Runs the front end until it is told to end.
pub(crate) fn run(flags: &RouteFlags) -> anyhow::Result<ExitCode> {
    let bars = MultiProgress::new();
    logging::start(&flags.log, &bars)?;
    let model = model_source::resolve(&flags.model, &bars)?;
    let text = front::load_text(&model)?;
    let names = front::served_names(&flags.model, &model);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut signals = Signals::new()?;
        let metrics = std::sync::Arc::new(Metrics::new(&names[0]));
        let (slots, addresses): (Vec<Slot>, Vec<_>) =
            flags.workers.iter().map(|address| slot(address)).unzip();
        let cluster = Cluster::follow(slots, std::sync::Arc::clone(&metrics), flags.require_transport);
        let front = Front::start(&flags.front, names, text, &cluster, metrics).await?;
        let told = tokio::select! {
            () = cluster.all_up() => false,
            _ = signals.next() => true,
        };
        let mut code = ExitCode::SUCCESS;
        if !told {
            let count = flags.workers.len();
            front.print_banner(&format!("{count} worker{}", if count == 1 { "" } else { "s" }));
            // The workers are not ours to drain or end: only what this front end sent them is finished.
            code = front.until_told(&mut signals, &cluster, flags.front.shutdown_timeout).await;
        }
        front.close().await;
        drop(addresses);
        Ok(code)
    })
}

/// A worker at an address that does not change. The sender keeps the slot alive.
fn slot(address: &str) -> (Slot, watch::Sender<Option<String>>) {
    let (sender, receiver) = watch::channel(Some(address.to_owned()));
    // Name and role are the worker's to tell; until then it goes by its address.
    (Slot { name: address.to_owned(), role: Role::Hybrid, address: receiver }, sender)
}
