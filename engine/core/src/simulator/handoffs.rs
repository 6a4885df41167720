//! What the engine thread does about handoffs, on both sides.

use std::ops::Range;

use tidemill_kvtransfer_proto::endpoint_core::{
    Delivery, EndpointEvent, QuietProof, ReserveOrder, ReservedHandoff, TargetWrite,
};
use tidemill_kvtransfer_proto::layout::Bridge;
use tidemill_kvtransfer_proto::message::Filled;
use tidemill_kvtransfer_proto::units::{BlockId, BlockRef, HandoffId, TokenCount};

use super::Mischief;
use super::endpoint::Order;
use super::engine::{Capture, OutgoingHandoff, Target, expect};
use super::model::{LAYERS, Shape};
use super::world::{Process, World};
use crate::events::{EngineEvent, Recovery};
use crate::handoff::Cancelled;
use crate::plan::StepPlan;
use crate::pushes::{Due, Pushes};
use crate::request::{Part, TokenId};
use crate::sequence::{Sequence, Stage};
use crate::staging::Piece;

impl World<'_> {
    pub(super) fn announce_reservations(&mut self, process: Process) {
        let life = self.life(process).expect("it runs");
        for reservation in life.scheduler.take_reservations() {
            let within = reservation.within();
            let (handoff, mut targets) = (reservation.handoff, reservation.targets);
            let life = self.life(process).expect("it runs");
            let (_, peer) = life.incoming[&handoff];
            if let Some((&other, _)) = life.lent.first_key_value() {
                let lent = targets[0];
                if self.plants(Mischief::ReuseBlock) {
                    targets[0] = BlockRef { block: other, ..lent };
                }
            }
            let life = self.life(process).expect("it runs");
            life.lent.extend(targets.iter().map(|it| (it.block, handoff)));
            let first_block = u32::try_from(reservation.cached.len()).expect("few");
            let order = ReserveOrder {
                handoff,
                peer,
                within,
                tokens: reservation.tokens,
                first_block,
                cached: reservation.cached,
                targets,
            };
            self.order(process, Order::Reserve(order));
        }
    }

    pub(super) fn handoff(&mut self, process: Process, event: EndpointEvent) {
        match event {
            EndpointEvent::Reserved(reserved) => self.reserved(process, &reserved),
            EndpointEvent::Delivered { handoff, stats } => {
                let life = self.life(process).expect("it runs");
                let Some(outgoing) = life.outgoing.remove(&handoff) else { return };
                assert!(life.scheduler.pushed(outgoing.request), "a delivered prefill waits for it");
                if life.requests.remove(&outgoing.request).is_some() {
                    self.reply(process, outgoing.request, EngineEvent::HandedOver);
                }
                self.summary.in_place += u64::from(stats.writes == 0);
                self.push_staged(process);
            }
            EndpointEvent::CancelWanted { handoff } => {
                let life = self.life(process).expect("it runs");
                if let Some(request) = life.outgoing.get(&handoff).map(|it| it.request) {
                    let _ = life.scheduler.cancel(request);
                }
                self.give_up(process, handoff);
                self.order(process, Order::Abandon(handoff));
                if self.plants(Mischief::FreeOffered) {
                    self.sender_is_quiet(process, handoff, "it is not wanted any more");
                }
            }
            EndpointEvent::SendFailed { handoff, error } => {
                self.sender_is_quiet(process, handoff, &error.to_string());
                self.push_staged(process);
            }
            EndpointEvent::Fetched { .. } => self.push_staged(process),
            EndpointEvent::Committed { handoff, payload, .. } => self.committed(process, handoff, &payload),
            EndpointEvent::ReserveFailed { handoff, error } => {
                self.reservation_failed(process, handoff, &error.to_string());
                if self.plants(Mischief::FreeOnTimeout) {
                    self.released(process, handoff);
                }
            }
            EndpointEvent::Released { handoff } => self.released(process, handoff),
            EndpointEvent::PeerDown { peer, .. } => self.free_offered(process, peer),
        }
    }

    /// A planted bug: what a peer may read counts as free once the link to it is gone.
    fn free_offered(&mut self, process: Process, peer: u64) {
        if !self.plants(Mischief::FreeOffered) {
            return;
        }
        let life = self.life(process).expect("it runs");
        let offered: Vec<HandoffId> =
            life.outgoing.iter().filter(|(_, it)| it.peer == peer).map(|(&handoff, _)| handoff).collect();
        for handoff in offered {
            self.sender_is_quiet(process, handoff, "its peer is gone");
        }
    }

    pub(super) fn released(&mut self, process: Process, handoff: HandoffId) {
        let life = self.life(process).expect("it runs");
        life.lent.retain(|_, it| *it != handoff);
        life.scheduler.quiet(handoff);
    }

    pub(super) fn reserved(&mut self, process: Process, reserved: &ReservedHandoff) {
        let life = self.life(process).expect("it runs");
        let Some(request) = life.outgoing.get(&reserved.handoff).map(|it| it.request) else { return };
        let waits = life.scheduler.sequence(request).map(Sequence::stage) == Some(Stage::AwaitingTargets);
        self.announce(process, reserved, waits);
    }

    pub(super) fn announce(&mut self, process: Process, reserved: &ReservedHandoff, waits: bool) {
        let handoff = reserved.handoff;
        let memory = self.workers[process.place]
            .life
            .as_ref()
            .and_then(|life| self.peer_memory(life, reserved.peer))
            .filter(|_| reserved.delivery == Delivery::InPlace && waits);
        let life = self.life(process).expect("it runs");
        let Some(outgoing) = life.outgoing.get_mut(&handoff) else { return };
        let request = outgoing.request;
        if let Some(memory) = memory {
            let blocks = reserved.cached.iter().chain(&reserved.targets).map(|it| it.block).collect();
            outgoing.target = Target::InPlace { blocks, memory, owner: reserved.peer };
            let cached = TokenCount(reserved.first_block * reserved.layout.block_len.tokens());
            life.scheduler.use_targets(request, cached);
            return;
        }
        let targets = u32::try_from(reserved.targets.len()).expect("few");
        let shape = Shape::of(&reserved.layout);
        let pushes = Pushes::new(shape.block_len, reserved.first_block, targets, reserved.tokens, LAYERS);
        let is_read = reserved.delivery == Delivery::Read;
        outgoing.target = Target::Pushed { pushes, bridge: reserved.bridge, shape, is_read };
        if life.step.is_some() {
            return; // It is computed now: the layers that are done go with the next one.
        }
        life.scheduler.use_own_blocks(request);
        if let Some(computed) = life.scheduler.sequence(request).map(Sequence::computed) {
            self.push_layers(process, handoff, 0..LAYERS, computed);
        }
        self.commit_if_complete(process, handoff);
    }

    pub(super) fn push_computed(&mut self, process: Process, plan: &StepPlan) {
        for work in &plan.work {
            let part = self.life(process).expect("it runs").requests.get(&work.request).map(|it| it.part);
            if let Some(Part::PrefillFor(handoff)) = part {
                self.push_layers(process, handoff, 0..LAYERS, TokenCount(work.first.0 + work.count.0));
            }
        }
    }

    /// Some more of prompts is computed, or all of one, though its first token is not known.
    pub(super) fn tell_computed(&mut self, process: Process, plan: &StepPlan) {
        for work in &plan.work {
            let life = self.life(process).expect("it runs");
            let part = life.requests.get(&work.request).map(|it| it.part);
            let Some(Part::PrefillFor(handoff)) = part else { continue };
            let target = life.outgoing.get(&handoff).map(|it| &it.target);
            if matches!(target, Some(Target::InPlace { .. })) {
                let computed = TokenCount(work.first.0 + work.count.0);
                self.order(process, Order::Filled(handoff, computed));
            }
            if work.samples {
                self.order(process, Order::Computed(handoff));
            }
        }
    }

    /// A planted bug: blocks are called final before they are computed.
    pub(super) fn name_early(&mut self, process: Process, plan: &StepPlan) {
        if self.plants(Mischief::NameEarly) {
            self.tell_computed(process, plan);
        }
    }

    /// A planted bug: the device stores into what a step before has computed, and called final.
    pub(super) fn store_again(&self, capture: &Capture, layer: usize) {
        if self.plants(Mischief::StoreAgain)
            && let Some(before) = (capture.work.first.0 as usize).checked_sub(1)
        {
            capture.memory.write(&capture.table, layer, before, 0);
        }
    }

    /// A peer says that blocks are final: they hold what the request's own tokens make.
    pub(super) fn check_filled(&mut self, process: Process, filled: &Filled) {
        let life = self.life(process).expect("it runs");
        let Some(&(request, _)) = life.incoming.get(&filled.handoff) else { return };
        let Some(job) = life.requests.get(&request).map(|it| it.job) else { return };
        let table: Vec<BlockId> = life.scheduler.block_table(request).iter().map(|it| it.block).collect();
        let memory = life.memory.clone();
        let known = life.scheduler.tokens(request).len();
        let named = |block: &BlockId| filled.targets.iter().any(|it| it.block == *block);
        let block_len = memory.shape().tokens();
        for (index, _) in table.iter().enumerate().filter(|(_, block)| named(block)) {
            let positions = index * block_len..known.min((index + 1) * block_len);
            expect(&memory, &table, positions, &self.front.job(job).contents, "who is told of a final block");
        }
        self.summary.named_ahead += filled.targets.len() as u64;
    }

    pub(super) fn push_layers(
        &mut self,
        process: Process,
        handoff: HandoffId,
        layers: std::ops::Range<usize>,
        computed: TokenCount,
    ) {
        let life = self.life(process).expect("it runs");
        let Some(outgoing) = life.outgoing.get_mut(&handoff) else { return };
        let Target::Pushed { pushes, bridge, shape, is_read } = &mut outgoing.target else { return };
        let due = pushes.take_due(layers, computed);
        if outgoing.ended || due.is_empty() {
            return;
        }
        if *is_read && *bridge != Bridge::Identical {
            let piece = |Due { layers, targets }| targets.map(move |target| (Range::clone(&layers), target));
            life.waiting.add(handoff, due.into_iter().flat_map(piece).collect());
            return self.push_staged(process);
        }
        let table: Vec<BlockId> =
            life.scheduler.block_table(outgoing.request).iter().map(|it| it.block).collect();
        let mut writes = Vec::new();
        for Due { layers, targets } in due {
            for target in targets {
                let (layers, tokens) = (layers.clone(), pushes.tokens_of(target));
                let offset = layers.start * shape.layer_bytes();
                let source = match bridge {
                    Bridge::Identical => {
                        life.memory.piece(table[tokens.start as usize / shape.tokens()], layers)
                    }
                    Bridge::Convert { .. } => life.memory.converted(*shape, &table, layers, tokens),
                };
                writes.push(TargetWrite { target_index: target, offset, source: Some(source) });
            }
        }
        self.order(process, Order::Push(handoff, writes));
    }

    /// Pushes what waits for room to be converted in, as far as there is some.
    fn push_staged(&mut self, process: Process) {
        let (forsakes, now) = (self.plants(Mischief::ReuseStaging), self.now);
        let mut finished = Vec::new();
        while let Some((handoff, pieces)) = self.take_waiting(process) {
            let life = self.life(process).expect("it runs");
            let outgoing = &life.outgoing[&handoff];
            let Target::Pushed { pushes, shape, .. } = &outgoing.target else { panic!("it is pushed") };
            let table: Vec<BlockId> =
                life.scheduler.block_table(outgoing.request).iter().map(|it| it.block).collect();
            let write = |(layers, target): Piece| {
                let offset = layers.start * shape.layer_bytes();
                let copy = life.memory.converted(*shape, &table, layers, pushes.tokens_of(target));
                let copy = life.memory.staged(&copy, handoff, now);
                let source = Some(if forsakes { copy.forsaken() } else { copy });
                TargetWrite { target_index: target, offset, source }
            };
            let writes: Vec<_> = pieces.into_iter().map(write).collect();
            if !life.waiting.has(handoff) {
                finished.push(handoff);
            }
            self.summary.staged += writes.len() as u64;
            self.order(process, Order::Push(handoff, writes));
        }
        for handoff in finished {
            self.commit_if_complete(process, handoff);
        }
    }

    fn take_waiting(&mut self, process: Process) -> Option<(HandoffId, Vec<Piece>)> {
        let life = self.life(process).expect("it runs");
        let layer_bytes = |handoff| match &life.outgoing[&handoff].target {
            Target::Pushed { shape, .. } => shape.layer_bytes(),
            Target::Unknown | Target::InPlace { .. } => panic!("only what is pushed waits"),
        };
        let taken = life.waiting.take(life.memory.room(), layer_bytes);
        if taken.is_none() && !life.waiting.is_empty() {
            self.summary.short_of_room += 1;
        }
        taken
    }

    pub(super) fn commit_if_complete(&mut self, process: Process, handoff: HandoffId) {
        let life = self.life(process).expect("it runs");
        let Some(outgoing) = life.outgoing.get_mut(&handoff) else { return };
        let is_complete = match &outgoing.target {
            Target::Unknown => false,
            Target::InPlace { .. } => true,
            Target::Pushed { pushes, .. } => pushes.is_complete() && !life.waiting.has(handoff),
        };
        if let Some(token) = outgoing.first_token.take_if(|_| is_complete && !outgoing.ended) {
            outgoing.ended = true;
            self.order(process, Order::Finish(handoff, token.to_le_bytes().to_vec()));
        }
    }

    /// True when the endpoint has not been told of the end.
    pub(super) fn give_up(&mut self, process: Process, handoff: HandoffId) -> bool {
        let life = self.life(process).expect("it runs");
        life.waiting.remove(handoff);
        let outgoing = life.outgoing.get_mut(&handoff);
        outgoing.is_some_and(|it| !std::mem::replace(&mut it.ended, true))
    }

    pub(super) fn sender_is_quiet(&mut self, process: Process, handoff: HandoffId, reason: &str) {
        let life = self.life(process).expect("it runs");
        let Some(OutgoingHandoff { request, .. }) = life.outgoing.remove(&handoff) else { return };
        life.waiting.remove(handoff);
        let was_active = life.requests.remove(&request).is_some();
        if life.scheduler.sequence(request).is_some()
            && let Cancelled::Pushing(_) = life.scheduler.cancel(request)
        {
            life.scheduler.pushed(request);
        }
        if was_active {
            let message = format!("handoff {handoff} failed: {reason}");
            self.reply(process, request, EngineEvent::Failed { recovery: Recovery::Reroute, message });
        }
    }

    pub(super) fn committed(&mut self, process: Process, handoff: HandoffId, payload: &[u8]) {
        let life = self.life(process).expect("it runs");
        let Some(&(request, peer)) = life.incoming.get(&handoff) else {
            return self.order(process, Order::Refuse(handoff));
        };
        let first = TokenId::from_le_bytes(payload.try_into().expect("a token"));
        let table: Vec<BlockId> = life.scheduler.block_table(request).iter().map(|it| it.block).collect();
        let memory = life.memory.clone();
        let active = life.requests.get(&request).copied();
        let known = life.scheduler.tokens(request).len();
        let Some(outcome) = life.scheduler.adopt(request, first) else {
            return self.order(process, Order::Refuse(handoff));
        };
        life.incoming.remove(&handoff);
        life.lent.retain(|_, it| *it != handoff);
        if let Some(active) = life.requests.get_mut(&request) {
            active.part = Part::Whole;
        }
        if let Some(active) = active {
            let contents = &self.front.job(active.job).contents;
            expect(&memory, &table, 0..known, contents, "an adoption");
        }
        let place = self.front.place_of(peer);
        if let Some(place) = place {
            let pair = (place.min(process.place), place.max(process.place));
            let proof = self.proofs[&pair];
            let is_read = proof == QuietProof::AccessEnded && self.workers[process.place].pulls;
            self.summary.handoffs[proof as usize + usize::from(is_read)] += 1;
            let is_converted = self.workers[place].shape != self.workers[process.place].shape;
            self.summary.converted += u64::from(is_converted);
        }
        self.order(process, Order::Adopt(handoff));
        self.deliver(process, outcome);
    }

    pub(super) fn reservation_failed(&mut self, process: Process, handoff: HandoffId, reason: &str) {
        let life = self.life(process).expect("it runs");
        let Some((request, _)) = life.incoming.remove(&handoff) else { return };
        if let Cancelled::Quarantined(_) = life.scheduler.reservation_failed(request) {
            self.summary.quarantines += 1;
        }
        if self.life(process).expect("it runs").requests.remove(&request).is_some() {
            let message = format!("handoff {handoff} failed: {reason}");
            self.reply(process, request, EngineEvent::Failed { recovery: Recovery::Reroute, message });
        }
    }
}
