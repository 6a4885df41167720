//! What the engine does about handoffs: how they begin on either side, and what each piece of news from the endpoint
//! leads to.
//!
//! One rule on each side keeps memory safe. Prefill: blocks, own or the peer's, are touched until `finish` or `abandon`
//! and never after. Decode: blocks that were announced return to the pool only with `Released`, or by adoption.

use std::time::{Duration, Instant};

use tidemill_engine_core::handoff::Cancelled;
use tidemill_engine_core::plan::StepPlan;
use tidemill_engine_core::request::{Part, Request, RequestId};
use tidemill_engine_core::scheduler::SubmitError;
use tidemill_engine_core::sequence::{Sequence, Stage};
use tidemill_kernels::cuda::CudaError;
use tidemill_kvtransfer::{DeviceWay, HandoffEvent, HandoffStats, Reserve, Reserved};
use tidemill_kvtransfer_proto::error::TransferError;
use tidemill_kvtransfer_proto::units::{HandoffId, TokenCount};

use super::FirstToken;
use super::decode::Incoming;
use super::prefill::{Announced, Origin};
use crate::driver::Driver;
use crate::fault;
use crate::handle::{EngineEvent, FaultStage, Peer, Recovery};

impl Driver {
    /// A prompt whose KV cache goes to `peer`. Where its blocks can be computed in directly the prompt waits for them;
    /// otherwise it starts at once.
    pub(crate) fn begin_prefill(
        &mut self,
        handoff: HandoffId,
        peer: &Peer,
        request: Request,
    ) -> Result<(), SubmitError> {
        fault::meet(self.fault.as_ref(), FaultStage::BeforeReserve);
        let id = request.id;
        if self.in_place && self.endpoint.reaches_in_place(peer.instance) {
            self.scheduler.submit_in_place(request)?;
        } else {
            self.scheduler.submit(request)?;
        }
        self.outgoing.begin(handoff, id);
        self.endpoint.expect(handoff, peer.instance, RESERVATION_LIMIT);
        Ok(())
    }

    /// A request whose KV cache comes from `peer`, once there is room for it.
    pub(crate) fn begin_decode(
        &mut self,
        handoff: HandoffId,
        peer: &Peer,
        request: Request,
    ) -> Result<(), SubmitError> {
        let incoming = Incoming { request: request.id, peer: peer.instance, cached: 0 };
        self.scheduler.submit(request)?;
        self.incoming.insert(handoff, incoming);
        Ok(())
    }

    /// Tells prefill workers of the blocks that wait for them.
    pub(crate) fn announce_reservations(&mut self) {
        for reservation in self.scheduler.take_reservations() {
            let incoming = self.incoming.get_mut(&reservation.handoff).expect("a reservation has a peer");
            incoming.cached = reservation.cached.len();
            let link = self.endpoint.link(incoming.peer);
            let by_device = link.is_some_and(|link| link.devices.from_peer == DeviceWay::PeerCopy);
            let prepared = self.pool.as_mut().map_or(Ok(()), |pool| {
                // A peer's device may write into them from now on, and does not know what this one was asked for.
                pool.quiet()?;
                // Nobody computes in a peer's blocks whose device writes into them.
                if by_device { Ok(()) } else { pool.bring_down_cached(&reservation.cached, &self.arena) }
            });
            if let Err(error) = prepared {
                // The worker ends, and its peers hear of that.
                self.failure = Some(error);
                return;
            }
            let first_block = u32::try_from(reservation.cached.len()).expect("a pool numbers blocks in u32");
            self.endpoint.reserve(Reserve {
                handoff: reservation.handoff,
                peer_instance: incoming.peer,
                within: reservation.within(),
                tokens: reservation.tokens,
                first_block,
                cached: reservation.cached,
                targets: reservation.targets,
            });
        }
    }

    /// News from the endpoint.
    pub(crate) fn handoff(&mut self, event: HandoffEvent) {
        let may_make_room = matches!(
            event,
            HandoffEvent::Fetched { .. } | HandoffEvent::Delivered { .. } | HandoffEvent::SendFailed { .. }
        );
        match event {
            HandoffEvent::Reserved(reserved) => self.reserved(&reserved),
            HandoffEvent::Delivered { handoff, stats } => self.delivered(handoff, &stats),
            HandoffEvent::CancelWanted { handoff } => self.cancel_wanted(handoff),
            HandoffEvent::SendFailed { handoff, error } => {
                self.counters.handoff_failures += u64::from(error.is_failure());
                self.sender_is_quiet(handoff, &error.to_string());
            }
            HandoffEvent::Nearing { .. } => self.watch.begin(Instant::now()),
            HandoffEvent::Committed { handoff, payload, on_device, .. } => {
                self.watch.end();
                self.committed(handoff, &payload, on_device);
            }
            HandoffEvent::ReserveFailed { handoff, error } => {
                self.counters.handoff_failures += u64::from(error.is_failure());
                self.counters.handoff_refusals += u64::from(matches!(error, TransferError::BadCommit(_)));
                self.reservation_failed(handoff, &error.to_string());
            }
            HandoffEvent::Released { handoff } => self.scheduler.quiet(handoff),
            HandoffEvent::DeviceFailed { reason } => {
                let error = CudaError::Call { call: "handoff", code: 0, name: reason };
                self.failure.get_or_insert(error);
            }
            // The endpoint logs two of them, and tells of each handoff by itself.
            HandoffEvent::PeerUp { .. } | HandoffEvent::PeerDown { .. } | HandoffEvent::Fetched { .. } => {}
        }
        if may_make_room {
            self.push_waiting();
        }
    }

    /// Prefill: pushes what waited for room to be converted in, and commits what was complete but for that.
    fn push_waiting(&mut self) {
        let Self { arena, cpu, endpoint, scheduler, .. } = self;
        self.outgoing.push_waiting(&Origin { scheduler, arena, cpu, endpoint });
        self.commit_caught_up();
    }

    fn commit_caught_up(&mut self) {
        for handoff in self.outgoing.take_caught_up() {
            self.commit_if_complete(handoff);
        }
    }

    /// Prefill: the peer's blocks are known.
    fn reserved(&mut self, reserved: &Reserved) {
        let handoff = reserved.handoff;
        let Some(request) = self.outgoing.request(handoff) else { return };
        let stage = self.scheduler.sequence(request).map(Sequence::stage);
        let waits = stage == Some(Stage::AwaitingTargets);
        match self.outgoing.announce(reserved, waits) {
            Announced::ComputeInPlace { cached } => {
                self.scheduler.use_targets(request, cached);
            }
            Announced::ComputeAndPush => {
                self.scheduler.use_own_blocks(request);
                self.push_request(handoff, request);
                self.commit_if_complete(handoff);
            }
            Announced::Unknown => {}
        }
    }

    /// Prefill: the prompt is in the cache and the first token known.
    pub(crate) fn prefill_computed(&mut self, handoff: HandoffId, first_token: FirstToken) {
        self.outgoing.computed(handoff, first_token);
        self.commit_if_complete(handoff);
    }

    /// Pushes what the step has computed and could not be pushed while it ran.
    pub(crate) fn push_computed(&mut self, plan: &StepPlan) {
        for work in &plan.work {
            let part = self.requests.get(&work.request).map(|active| active.request.part);
            if let Some(Part::PrefillFor(handoff)) = part {
                self.push_layers(handoff, work.request, TokenCount(work.first.0 + work.count.0));
            }
        }
        self.commit_caught_up();
    }

    fn push_request(&mut self, handoff: HandoffId, request: RequestId) {
        if let Some(computed) = self.scheduler.sequence(request).map(|sequence| sequence.computed()) {
            self.push_layers(handoff, request, computed);
        }
    }

    fn push_layers(&mut self, handoff: HandoffId, request: RequestId, computed: TokenCount) {
        let layers = self.arena.shape().layers;
        let Self { arena, pool, cpu, endpoint, scheduler, .. } = self;
        let Some(pieces) = self.outgoing.due(handoff, 0..layers, computed) else { return };
        let origin = Origin { scheduler, arena, cpu, endpoint };
        if let Some(pool) = pool {
            if self.outgoing.goes_by_device(handoff) {
                if let Err(error) = self.outgoing.push_from_device(handoff, pieces, &origin, pool) {
                    self.failure = Some(error);
                }
                return;
            }
            let table = scheduler.block_table(request);
            let parts = self.outgoing.parts(handoff, &pieces, table, arena.shape().block_len);
            if let Err(error) = pool.bring_down(&parts, arena) {
                self.failure = Some(error);
                return;
            }
        }
        self.outgoing.push(handoff, pieces, &origin);
    }

    fn commit_if_complete(&mut self, handoff: HandoffId) {
        if self.failure.is_some() {
            // What was due may not have been pushed.
            return;
        }
        if let Some(first_token) = self.outgoing.take_commit(handoff) {
            fault::meet(self.fault.as_ref(), FaultStage::BeforeCommit);
            self.endpoint.finish(handoff, first_token.encode());
        }
    }

    fn delivered(&mut self, handoff: HandoffId, stats: &HandoffStats) {
        self.counters.handoffs += 1;
        self.counters.handoff_bytes += stats.bytes;
        self.counters.handoff_writes += stats.writes;
        self.counters.handoff_in_place += u64::from(stats.writes == 0);
        self.counters.handoff_head_start_seconds += stats.head_start.as_secs_f64();
        self.counters.handoff_seconds += stats.took.as_secs_f64();
        let Some(request) = self.outgoing.end(handoff) else { return };
        self.scheduler.pushed(request);
        if let Some(mut active) = self.requests.remove(&request) {
            (active.events)(EngineEvent::HandedOver);
        }
    }

    /// Prefill: the decode side does not want it any more, or is gone.
    fn cancel_wanted(&mut self, handoff: HandoffId) {
        if let Some(request) = self.outgoing.request(handoff) {
            // What comes back says only how far the request was; the sender's end is told below in any case.
            let (Cancelled::Unknown | Cancelled::Done | Cancelled::Pushing(_) | Cancelled::Quarantined(_)) =
                self.scheduler.cancel(request);
        }
        self.outgoing.give_up(handoff);
        self.endpoint.abandon(handoff, "the decode side withdrew".into());
    }

    /// Prefill: nothing touches the blocks any more, and they were not adopted.
    fn sender_is_quiet(&mut self, handoff: HandoffId, reason: &str) {
        let Some(request) = self.outgoing.end(handoff) else { return };
        let active = self.requests.remove(&request);
        if self.scheduler.sequence(request).is_some() {
            // It may still have been computing in blocks of its own, for a peer that never reserved any.
            if let Cancelled::Pushing(_) = self.scheduler.cancel(request) {
                self.scheduler.pushed(request);
            }
        }
        if let Some(mut active) = active {
            let message = format!("handoff {handoff} failed: {reason}");
            (active.events)(EngineEvent::Failed { recovery: Recovery::Reroute, message });
        }
    }

    /// Decode: the KV cache is here and verified.
    fn committed(&mut self, handoff: HandoffId, payload: &[u8], on_device: bool) {
        let Some(Incoming { request, cached, .. }) = self.incoming.get(&handoff).copied() else {
            return self.endpoint.refuse(handoff, "the request is gone".into());
        };
        let Some(first) = FirstToken::decode(payload) else {
            self.endpoint.refuse(handoff, "the commit's payload cannot be read".into());
            return self.reservation_failed(handoff, "the commit's payload cannot be read");
        };
        let known = self.scheduler.tokens(request).len();
        let full = (known / self.arena.shape().block_len).saturating_sub(cached);
        if let Some(pool) = &mut self.pool
            && !on_device
            && let Some(targets) = self.scheduler.block_table(request).get(cached..)
            && let Err(error) = pool.bring_up(targets, full, &self.arena)
        {
            self.endpoint.refuse(handoff, format!("the device failed: {error}"));
            self.failure = Some(error);
            return self.reservation_failed(handoff, "the device failed");
        }
        match self.scheduler.adopt(request, first.id) {
            Some(outcome) => {
                self.incoming.remove(&handoff);
                if let Some(active) = self.requests.get_mut(&request) {
                    active.request.part = Part::Whole;
                    active.prompt_logprobs = first.prompt_logprobs;
                }
                self.endpoint.adopt(handoff);
                self.repeat_later(outcome, first.logprobs);
            }
            None => self.endpoint.refuse(handoff, "the request is gone".into()),
        }
    }

    /// Decode: the KV cache will not come. The blocks stay in quarantine until the endpoint says `Released`.
    fn reservation_failed(&mut self, handoff: HandoffId, reason: &str) {
        let Some(Incoming { request, .. }) = self.incoming.remove(&handoff) else { return };
        // Quarantined or not, the endpoint knows already: it is where the news comes from.
        let (Cancelled::Unknown | Cancelled::Done | Cancelled::Pushing(_) | Cancelled::Quarantined(_)) =
            self.scheduler.reservation_failed(request);
        if let Some(mut active) = self.requests.remove(&request) {
            let message = format!("handoff {handoff} failed: {reason}");
            (active.events)(EngineEvent::Failed { recovery: Recovery::Reroute, message });
        }
    }
}

/// How long a prefill waits for the decode side to have room. The router ends it earlier when the request ends; this
/// only bounds what a router leaves behind that dies at the wrong moment.
const RESERVATION_LIMIT: Duration = Duration::from_secs(600);
