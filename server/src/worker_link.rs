//! A router's side of the connection to one worker.

use std::time::Duration;

use futures::{Stream, StreamExt};
use tidemill_engine::handle::{EngineEvent, Peer, PeerLink};
use tonic::transport::{Channel, Endpoint};

use crate::convert::{self, Assignment, Introduction, Invalid, WorkerStatus};
use crate::proto;
use crate::proto::worker_client::WorkerClient;
use crate::worker::MAX_MESSAGE_BYTES;

/// Speaks to one worker. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct WorkerLink {
    client: WorkerClient<Channel>,
}

/// Why a worker could not be spoken to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// The address is not one.
    #[error("`{address}` is not an address: {source}")]
    Address {
        /// What was given.
        address: String,
        /// Why it is not an address.
        source: tonic::transport::Error,
    },
    /// The connection cannot be made.
    #[error("no connection: {}", innermost(.0))]
    Connect(#[source] tonic::transport::Error),
    /// The address cannot be resolved.
    #[error("cannot be looked up: {0}")]
    Lookup(#[source] std::io::Error),
    /// The call failed.
    #[error("{}: {}", .0.code(), .0.message())]
    Call(#[from] Box<tonic::Status>),
    /// The worker speaks another version of the protocol, or nonsense.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// It would answer otherwise than the workers that are there.
    #[error("it serves another model than {other}")]
    OtherModel {
        /// One of those.
        other: String,
    },
    /// Nothing was heard for too long.
    #[error("the worker is silent")]
    Silent,
    /// A call that should go on has ended.
    #[error("the worker ended the call")]
    Ended,
}

impl WorkerLink {
    /// Connects to `address`, as host:port, and asks who is there.
    ///
    /// # Errors
    ///
    /// [`LinkError`] when nobody answers in time, or not as a worker of this version.
    pub(crate) async fn connect(address: &str) -> Result<(Self, Introduction), LinkError> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|source| LinkError::Address { address: address.to_owned(), source })?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            // One slow stream must not use up the window that all streams of the connection share.
            .initial_connection_window_size(CONNECTION_WINDOW);
        let channel = endpoint.connect().await.map_err(LinkError::Connect)?;
        let mut client = WorkerClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let description =
            client.describe(timed(proto::DescribeRequest {}, CALL_TIMEOUT)).await.map_err(boxed)?;
        let mut introduction = convert::introduction_from_wire(description.into_inner())?;
        let handoff_address = &mut introduction.engine.handoff_address;
        if handoff_address.ip().is_unspecified() {
            // It listens everywhere and cannot know by which address others reach it; here is one that works.
            let mut found = tokio::net::lookup_host(address).await.map_err(LinkError::Lookup)?;
            handoff_address.set_ip(found.next().ok_or(LinkError::Silent)?.ip());
        }
        Ok((Self { client }, introduction))
    }

    /// Statuses as they come, the first one whole.
    ///
    /// # Errors
    ///
    /// [`LinkError`] when the call cannot be made; the stream has one as its last item.
    pub(crate) async fn watch(
        &self,
    ) -> Result<impl Stream<Item = Result<WorkerStatus, LinkError>> + Unpin + use<>, LinkError> {
        let statuses = self.client.clone().watch(proto::WatchRequest {}).await.map_err(boxed)?.into_inner();
        Ok(statuses
            .map(|status| status.map(convert::status_from_wire).map_err(|status| boxed(status).into())))
    }

    /// Runs a request there. Dropping the stream cancels it.
    ///
    /// # Errors
    ///
    /// [`LinkError`] when the call cannot be made; the stream has one as its last item when it breaks off.
    pub(crate) async fn generate(
        &self,
        assignment: &Assignment,
    ) -> Result<impl Stream<Item = Result<EngineEvent, LinkError>> + Send + Unpin + use<>, LinkError> {
        let request = convert::assignment_to_wire(assignment);
        let events = self.client.clone().generate(request).await.map_err(boxed)?.into_inner();
        Ok(events.filter_map(|event| {
            let event = match event {
                // A newer worker may say more than this version knows.
                Ok(proto::GenerateEvent { event: None }) => None,
                Ok(event) => Some(convert::event_from_wire(event).map_err(LinkError::from)),
                Err(status) => Some(Err(boxed(status).into())),
            };
            std::future::ready(event)
        }))
    }

    /// Tells the worker who its peers are and returns how the handshakes went.
    ///
    /// # Errors
    ///
    /// [`LinkError`] when the call fails as a whole.
    pub(crate) async fn meet_peers(&self, peers: &[Peer]) -> Result<Vec<PeerLink>, LinkError> {
        let request = proto::Peers { peers: peers.iter().map(convert::peer_to_wire).collect() };
        let met = self.client.clone().meet_peers(timed(request, MEET_TIMEOUT)).await.map_err(boxed)?;
        Ok(met.into_inner().links.into_iter().map(convert::link_from_wire).collect())
    }
}

fn timed<T>(message: T, timeout: Duration) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(timeout);
    request
}

fn boxed(status: tonic::Status) -> Box<tonic::Status> {
    Box::new(status)
}

/// The cause that a reader can do something about; the outer ones say "transport error".
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const CALL_TIMEOUT: Duration = Duration::from_secs(2);

/// Handshakes of all peers happen at once, each with its own limit; this is the last resort.
const MEET_TIMEOUT: Duration = Duration::from_secs(15);

const CONNECTION_WINDOW: u32 = 16 << 20;
