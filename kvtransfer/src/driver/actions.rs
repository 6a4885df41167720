//! Carries out what the core decides.

use std::sync::Arc;

use tidemill_kvtransfer_proto::endpoint_core::{
    Delivery, DigestOrder, EndpointAction, EndpointEvent, LinkId, ReservedHandoff, TargetWrite,
};
use tidemill_kvtransfer_proto::error::TransferError;
use tidemill_kvtransfer_proto::message::Message;
use tidemill_kvtransfer_proto::units::HandoffId;

use super::Driver;
use super::peers::DataPath;
use super::rdma::Rdma;
use crate::event::{HandoffEvent, Path, PushWrite, Reserved, Source};
use crate::shm::Region;
use crate::source::{Memory, SourceRange};
use crate::verification::DigestJob;

impl Driver {
    /// Does everything that the core has asked for. Called after each input to it: what it says about a link is
    /// carried out before anything more can happen to that link.
    pub(super) fn act(&mut self) {
        while let Some(action) = self.core.next_action() {
            match action {
                EndpointAction::Send { peer, message } => self.send(peer, &message),
                EndpointAction::Sever { peer, link, reason } => self.sever(peer, link, &reason),
                EndpointAction::TakeDigests(order) => self.begin_digests(order),
                EndpointAction::Tell(event) => self.tell_engine(event),
                EndpointAction::Log { peer, handoff, what } => {
                    tracing::warn!(%handoff, peer, what, "a handoff was misused");
                }
            }
        }
    }

    fn send(&mut self, instance: u64, message: &Message) {
        let Some(link) = self.link_mut(instance) else { return };
        let id = link.id;
        // Whoever hears of it can go on while this turn comes to its end.
        let is_awaited = matches!(message, Message::Commit(_));
        let sent = link.connection.send(message);
        let sent = sent.and_then(|()| if is_awaited { link.connection.flush() } else { Ok(()) });
        if let Err(loss) = sent {
            self.doomed.push((instance, id, loss));
        }
    }

    fn sever(&mut self, instance: u64, link: LinkId, reason: &str) {
        let Some(peer) = self.peers.get_mut(&instance) else { return };
        let Some(mut severed) = peer.link.take_if(|it| it.id == link) else { return };
        tracing::warn!(peer = peer.name, reason, "peer lost");
        peer.idle_since = self.now;
        peer.contact.link_lost(self.turn);
        self.links.set(instance, None);
        if let DataPath::SharedMemory(transport) = &mut severed.path {
            // The device makes them whatever becomes of the link: they are heard of when they have ended.
            self.orphans.extend(transport.take_copies());
        }
        severed.path.sever();
        let mut done = Vec::new();
        severed.path.transport().poll(&mut done);
        if let DataPath::Rdma(transport) = &mut severed.path
            && let Some(Rdma { registrar, .. }) = &self.rdma
        {
            registrar.revoke(instance, link, transport.take_access());
        }
        drop(severed); // From here on nothing of it can be received.
        self.core.completed(&done, self.moment());
    }

    fn begin_digests(&mut self, order: DigestOrder) {
        if order.on_device {
            return self.begin_device_digests(order);
        }
        let memory = match order.owner {
            None => Some(Arc::clone(&self.config.region)),
            Some(peer) => self.arena_of(peer),
        };
        // Without the peer's memory its link is gone, and the handoff with it.
        if let Some(memory) = memory {
            self.digesting.push_back(DigestJob::new(order, memory));
        }
    }

    /// Goes on with digests, for one handoff at a time and not for long.
    pub(super) fn take_digests(&mut self) {
        let Some(mut job) = self.digesting.pop_front() else { return };
        let (handoff, ticket) = job.name();
        if !self.core.wants_digests(handoff, ticket) {
            return;
        }
        match job.advance() {
            Some(digests) => {
                self.core.digested(handoff, ticket, digests);
                self.act();
            }
            None => self.digesting.push_back(job),
        }
    }

    /// The engine has bytes for the peer.
    pub(super) fn take_writes(&mut self, handoff: HandoffId, writes: Vec<PushWrite>) {
        let region = &self.config.region;
        let device_bytes = region.len() - self.config.staging_bytes;
        let target_write = |PushWrite { target_index, offset, len, source }| {
            let is_foreign =
                matches!(&source, Source::Tail(piece, _) if !Arc::ptr_eq(piece.region(), region));
            let (memory, from) = match source {
                Source::Region { offset } => (Memory::Arena(Arc::clone(region)), offset),
                Source::Slab(slab, offset) => (Memory::Staged(slab), offset),
                Source::Device { offset } => (Memory::Device(device_bytes), offset),
                // One that would lie beyond the address space is outside too.
                Source::Tail(piece, offset) => {
                    let from = piece.offset().saturating_add(offset);
                    (Memory::Tail(piece), from)
                }
            };
            let source = SourceRange::new(memory, from, len).filter(|_| !is_foreign);
            TargetWrite { target_index, offset, source }
        };
        let writes = writes.into_iter().map(target_write).collect();
        self.core.push(handoff, writes, self.moment());
    }

    /// Posts what the transports take, writes and reads, and hears what has completed.
    pub(super) fn push(&mut self) {
        let instances: Vec<u64> = self.peers.keys().copied().collect();
        for instance in instances {
            let now = self.moment();
            let Self { core, peers, config, .. } = self;
            let Some(link) = peers.get_mut(&instance).and_then(|peer| peer.link.as_mut()) else { continue };
            if let DataPath::Rdma(transport) = &mut link.path {
                let arena = &config.region;
                core.fetch(instance, |id, source, at| transport.post_fetch(id, source, arena, at), now);
            }
            let transport = link.path.transport();
            core.post(instance, |id, source, range| transport.post_write(id, source.clone(), range), now);
            let mut done = Vec::new();
            transport.poll(&mut done);
            core.completed(&done, now);
            self.act();
            self.follow_paths(instance);
        }
    }

    fn arena_of(&self, instance: u64) -> Option<Arc<Region>> {
        self.peers.get(&instance)?.link.as_ref()?.path.arena().cloned()
    }

    fn tell_engine(&mut self, event: EndpointEvent) {
        match event {
            EndpointEvent::Reserved(reserved) => self.tell_reserved(reserved),
            EndpointEvent::Delivered { handoff, stats } => {
                self.tell(HandoffEvent::Delivered { handoff, stats });
            }
            EndpointEvent::SendFailed { handoff, error } => {
                log_end(handoff, &error);
                self.tell(HandoffEvent::SendFailed { handoff, error });
            }
            EndpointEvent::Fetched { handoff } => self.tell(HandoffEvent::Fetched { handoff }),
            EndpointEvent::CancelWanted { handoff } => self.tell(HandoffEvent::CancelWanted { handoff }),
            EndpointEvent::Committed { handoff, tokens, payload, on_device } => {
                self.tell(HandoffEvent::Committed { handoff, tokens, payload, on_device });
            }
            EndpointEvent::ReserveFailed { handoff, error } => {
                log_end(handoff, &error);
                self.tell(HandoffEvent::ReserveFailed { handoff, error });
            }
            EndpointEvent::Released { handoff } => self.tell(HandoffEvent::Released { handoff }),
            EndpointEvent::PeerDown { name, peer: instance, reason } => {
                self.tell(HandoffEvent::PeerDown { name, instance, reason });
            }
        }
    }

    fn tell_reserved(&mut self, reserved: ReservedHandoff) {
        let ReservedHandoff { handoff, peer, layout, bridge, tokens, first_block, cached, targets, delivery } =
            reserved;
        // Pushing is always allowed, so that a peer whose memory is gone already needs no case of its own.
        let path = match delivery {
            Delivery::InPlace => self.arena_of(peer).map_or(Path::Write, Path::InPlace),
            Delivery::Written => Path::Write,
            Delivery::ByDevice => Path::Device,
            Delivery::Read => Path::Read,
        };
        self.tell(HandoffEvent::Reserved(Reserved {
            handoff,
            peer_instance: peer,
            layout,
            bridge,
            tokens,
            first_block,
            cached,
            targets,
            path,
        }));
    }
}

/// A handoff that nobody wants any more is no trouble.
fn log_end(handoff: HandoffId, error: &TransferError) {
    if error.is_failure() {
        tracing::warn!(%handoff, %error, "handoff failed");
    } else {
        tracing::debug!(%handoff, %error, "handoff ended early");
    }
}
