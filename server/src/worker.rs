//! The gRPC service of a worker: the engine, spoken to over the network.
//!
//! The service decides nothing. A stream that a router drops cancels its request, because dropping the stream's
//! state is the one thing that happens on every way out, a broken connection included.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use futures::Stream;
use tidemill_engine::engine::EngineHandle;
use tidemill_engine::handle::{EngineEvent, Peer, PeerLink, Role};
use tidemill_engine_core::request::RequestId;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tonic::{Request, Response, Status};

use crate::convert::{self, Introduction, Invalid};
use crate::proto;
use crate::proto::worker_server::{Worker, WorkerServer};

mod feed;
mod samples;

pub(crate) use feed::StatusFeed;

/// Largest message either side accepts: prompt log-probabilities of a long prompt are the longest.
pub(crate) const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Serves one engine.
#[derive(Debug)]
pub(crate) struct WorkerService {
    engine: EngineHandle,
    introduction: Introduction,
    feed: StatusFeed,
    links: Arc<Mutex<Vec<PeerLink>>>,
    /// Whether a peer without a connection is an error and not just a reason to compute elsewhere.
    require_transport: bool,
}

impl WorkerService {
    /// A service for `engine`, which serves the model called `model`. Needs a running tokio runtime.
    pub(crate) fn new(engine: EngineHandle, model: &str, require_transport: bool) -> Self {
        let introduction = Introduction {
            engine: engine.describe().clone(),
            model: model.to_owned(),
            version: crate::VERSION.to_owned(),
        };
        let links = Arc::new(Mutex::new(Vec::new()));
        let feed = StatusFeed::start(engine.clone(), Arc::clone(&links));
        Self { engine, introduction, feed, links, require_transport }
    }

    /// The engine's status, for who waits for it to be idle.
    pub(crate) fn feed(&self) -> StatusFeed {
        self.feed.clone()
    }

    /// The same as a tonic service.
    pub(crate) fn into_server(self) -> WorkerServer<Self> {
        WorkerServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    fn report_link(&self, link: &PeerLink) {
        let (worker, peer) = (&self.introduction.engine.name, &link.name);
        match &link.transport {
            Ok(transport) => {
                let speed = format_args!("{:.1} GB/s", link.bytes_per_second / 1e9);
                tracing::info!(%worker, %peer, %transport, speed, "linked for handoffs");
                // What a worker's role never does needs nobody's attention.
                let intended = match self.introduction.engine.role {
                    Role::Prefill => &link.to_peer,
                    Role::Decode => &link.from_peer,
                    Role::Hybrid => &Ok(()),
                };
                match intended {
                    Ok(()) => {}
                    Err(error) if self.require_transport => {
                        tracing::error!(%worker, %peer, %error, "no handoffs, and --require-transport is set");
                    }
                    Err(error) => {
                        tracing::warn!(%worker, %peer, %error, "no handoffs: requests will not be split over this pair");
                    }
                }
            }
            Err(error) if self.require_transport => {
                tracing::error!(%worker, %peer, %error, "no link, and --require-transport is set");
            }
            Err(error) => {
                tracing::warn!(%worker, %peer, %error, "no link: requests will not be split over this pair")
            }
        }
    }
}

#[tonic::async_trait]
impl Worker for WorkerService {
    type GenerateStream = Events;
    type WatchStream = Pin<Box<dyn Stream<Item = Result<proto::Status, Status>> + Send>>;

    async fn describe(
        &self,
        _: Request<proto::DescribeRequest>,
    ) -> Result<Response<proto::Description>, Status> {
        Ok(Response::new(convert::introduction_to_wire(&self.introduction)))
    }

    async fn meet_peers(&self, request: Request<proto::Peers>) -> Result<Response<proto::PeersMet>, Status> {
        let peers = request.into_inner().peers.into_iter().map(convert::peer_from_wire);
        let peers: Vec<Peer> = peers.collect::<Result<_, _>>().map_err(|invalid| refused(&invalid))?;
        let engine = self.engine.clone();
        let links = tokio::task::spawn_blocking(move || engine.meet_peers(peers))
            .await
            .map_err(|error| Status::internal(format!("meeting peers: {error}")))?;
        links.iter().for_each(|link| self.report_link(link));
        let met = links.iter().map(convert::link_to_wire).collect();
        *self.links.lock().unwrap_or_else(PoisonError::into_inner) = links;
        Ok(Response::new(proto::PeersMet { links: met }))
    }

    async fn generate(
        &self,
        request: Request<proto::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let assignment =
            convert::assignment_from_wire(request.into_inner()).map_err(|invalid| refused(&invalid))?;
        let id = assignment.request.id;
        if !assignment.reason.is_empty() {
            tracing::debug!(request = id.0, reason = assignment.reason, "not split");
        }
        // Bounded by the request's own `max_tokens`; a bounded queue would make the engine wait for one slow reader.
        let (sender, events) = unbounded_channel();
        let sink = Box::new(move |event| {
            // Nobody reads once the router has hung up, and then the drop of `Events` cancels.
            let _ = sender.send(event);
        });
        self.engine.generate(assignment.request, assignment.peer, sink);
        Ok(Response::new(Events { engine: self.engine.clone(), id, events, ended: false }))
    }

    async fn watch(&self, _: Request<proto::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Ok(Response::new(Box::pin(self.feed.watch())))
    }

    async fn drain(&self, _: Request<proto::DrainRequest>) -> Result<Response<proto::DrainReply>, Status> {
        self.engine.drain();
        self.feed.idle().await;
        Ok(Response::new(proto::DrainReply {}))
    }
}

/// The events of one request; dropped before the last one, it cancels the request.
#[derive(Debug)]
pub(crate) struct Events {
    engine: EngineHandle,
    id: RequestId,
    events: UnboundedReceiver<EngineEvent>,
    ended: bool,
}

impl Stream for Events {
    type Item = Result<proto::GenerateEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.events.poll_recv(context).map(|event| {
            let Some(event) = event else {
                // The engine drops its end without a last event only when its thread is gone.
                self.ended = true;
                return Some(Err(Status::unavailable("the engine has stopped")));
            };
            self.ended = is_last(&event);
            Some(Ok(convert::event_to_wire(event)))
        })
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if !self.ended {
            self.engine.cancel(self.id);
        }
    }
}

/// Whether nothing follows this event on the same worker.
pub(crate) fn is_last(event: &EngineEvent) -> bool {
    match event {
        EngineEvent::HandedOver | EngineEvent::Finished { .. } | EngineEvent::Failed { .. } => true,
        EngineEvent::Begun | EngineEvent::PromptLogprobs(_) | EngineEvent::Token { .. } => false,
    }
}

fn refused(invalid: &Invalid) -> Status {
    Status::invalid_argument(invalid.to_string())
}

#[cfg(test)]
pub(crate) mod tests;
