//! Many prefill workers that write to one decode worker at once: production's cores on both sides, a wire and engines
//! that do things in any order, workers that die in the middle.
//!
//! What is watched: what is under way never exceeds the limit; leave goes to the earliest deadline; each handoff ends;
//! nothing stays lent.

mod support;

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use proptest::prelude::*;
use support::Zeros;
use tidemill_kvtransfer_proto::credit::{Ask, CreditLoad};
use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::endpoint_core::{
    ByDevice, EndpointAction, EndpointCore, EndpointEvent, EndpointRules, LinkId, LinkUp, QuietProof,
    ReserveOrder, TargetWrite,
};
use tidemill_kvtransfer_proto::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::message::{Hello, Message, Offer, OnFailure, PROTOCOL};
use tidemill_kvtransfer_proto::simulated_wire::Chance;
use tidemill_kvtransfer_proto::transport::{Completion, Post, WriteId};
use tidemill_kvtransfer_proto::units::{BlockId, BlockLen, BlockRef, Epoch, HandoffId, Moment, TokenCount};

/// The decode worker's number; prefill workers count from zero.
const DECODE: u64 = 100;
const LAYERS: u16 = 4;

/// A prefill worker and its connection to the decode worker.
struct Prefill {
    core: EndpointCore<Zeros>,
    to_decode: VecDeque<Message>,
    from_decode: VecDeque<Message>,
    /// Posted, not ended.
    under_way: VecDeque<(WriteId, HandoffId, u64)>,
    /// Layers that its engine has yet to push, for each handoff.
    engine: BTreeMap<HandoffId, (u32, u16)>,
    link: LinkId,
    is_alive: bool,
}

struct World {
    proof: QuietProof,
    limit: u64,
    now: Moment,
    chance: Chance,
    decode: EndpointCore<Zeros>,
    prefills: Vec<Prefill>,
    /// Of each handoff that is not over: who fills it.
    open: BTreeMap<HandoffId, u64>,
    deadlines: BTreeMap<HandoffId, Moment>,
    /// Bytes that were asked for and not granted.
    wishes: BTreeMap<HandoffId, u64>,
    granted: BTreeMap<HandoffId, u64>,
    /// As the commits have them: what was written is not the matter here.
    digests: BTreeMap<HandoffId, Vec<u64>>,
    committed: u32,
    released: u32,
}

fn layout() -> Rc<KvLayout> {
    Rc::new(KvLayout {
        model: "test".to_owned(),
        layers: LAYERS,
        kv_heads: 1,
        heads: HeadRange { first: 0, count: 1 },
        head_size: 2,
        dtype: KvDtype::F32,
        block_len: BlockLen::new(4).expect("a power of two"),
        order: AxisOrder::TokenHead,
    })
}

fn core(blocks: u64, credit: u64) -> EndpointCore<Zeros> {
    EndpointCore::new(EndpointRules {
        layout: (*layout()).clone(),
        blocks,
        staging: 0,
        in_place: true,
        coverage: Coverage::Sampled,
        lease: Duration::from_millis(500),
        heartbeat: Duration::from_millis(100),
        patience: Duration::from_secs(30),
        stall: Duration::from_secs(2),
        offers: Duration::from_secs(6),
        credit,
        pulls: false,
    })
}

fn up(instance: u64, blocks: u64, proof: QuietProof) -> LinkUp {
    let hello = Hello {
        protocol: PROTOCOL,
        instance,
        name: format!("worker-{instance}"),
        layout: (*layout()).clone(),
        region_bytes: blocks * layout().block_bytes() as u64,
        staging_bytes: 0,
        listen_port: 1,
        host: String::new(),
        memory_socket: String::new(),
        offer: Offer { shared_memory: true, rdma: true, tcp: true, on_failure: OnFailure::FallBack },
        pulls: false,
        lease: Duration::from_millis(500),
    };
    LinkUp { hello, proof, busy: Vec::new(), by_device: ByDevice::default() }
}

/// One handoff: who computes it, how many blocks it has and how soon it is wanted, in milliseconds.
type Job = (u64, u32, u64);

impl World {
    fn new(proof: QuietProof, limit: u64, prefills: u64, jobs: &[Job], seed: u64) -> Self {
        let now = Moment::default();
        let blocks: u32 = jobs.iter().map(|(_, blocks, _)| blocks).sum();
        let mut decode = core(blocks.into(), limit);
        let prefills = (0..prefills)
            .map(|instance| {
                let mut core = core(blocks.into(), limit);
                core.link_up(DECODE, up(DECODE, blocks.into(), proof), now);
                let link = decode.link_up(instance, up(instance, blocks.into(), proof), now);
                Prefill {
                    core,
                    to_decode: VecDeque::new(),
                    from_decode: VecDeque::new(),
                    under_way: VecDeque::new(),
                    engine: BTreeMap::new(),
                    link,
                    is_alive: true,
                }
            })
            .collect();
        let mut world = Self {
            proof,
            limit,
            now,
            chance: Chance::new(seed),
            decode,
            prefills,
            open: BTreeMap::new(),
            deadlines: BTreeMap::new(),
            wishes: BTreeMap::new(),
            granted: BTreeMap::new(),
            digests: BTreeMap::new(),
            committed: 0,
            released: 0,
        };
        let mut first = 0;
        for (number, &(peer, blocks, milliseconds)) in (1..).zip(jobs) {
            let (handoff, within) = (HandoffId(number), Duration::from_millis(milliseconds));
            world.open.insert(handoff, peer);
            world.deadlines.insert(handoff, now.plus(within));
            let targets = (first..first + blocks)
                .map(|block| BlockRef { block: BlockId(block), epoch: Epoch(1) })
                .collect();
            first += blocks;
            let tokens = TokenCount(blocks * 4);
            let order =
                ReserveOrder { handoff, peer, within, tokens, first_block: 0, cached: Vec::new(), targets };
            world.decode.reserve(order, now);
            world.prefills[peer as usize].core.expect(handoff, DECODE, Duration::from_secs(60), now);
        }
        world.act();
        world
    }

    /// Something happens somewhere.
    fn turn(&mut self) {
        let which = self.chance.below(self.prefills.len());
        match self.chance.below(8) {
            _ if !self.prefills[which].is_alive => {}
            0 | 1 => self.compute(which),
            2 | 3 => {
                if let Some(message) = self.prefills[which].from_decode.pop_front() {
                    self.prefills[which].core.hear(DECODE, message, self.now);
                }
            }
            4 | 5 => {
                if let Some(message) = self.prefills[which].to_decode.pop_front() {
                    self.note(&message);
                    self.decode.hear(which as u64, message, self.now);
                }
            }
            _ => self.land(which),
        }
        self.act();
        self.post();
    }

    fn note(&mut self, message: &Message) {
        match message {
            Message::Ask { handoff, ask } => {
                let has = self.granted.get(handoff).copied().unwrap_or(0);
                self.wishes.insert(*handoff, ask.wanted - has);
                self.wishes.retain(|_, wish| 0 < *wish);
            }
            Message::Commit(commit) => {
                self.digests.insert(commit.handoff, commit.digests.clone());
            }
            _ => {}
        }
    }

    /// An engine computes a layer of one of its prompts.
    fn compute(&mut self, which: usize) {
        let prefill = &mut self.prefills[which];
        let Some((&handoff, &(blocks, done))) = prefill.engine.first_key_value() else { return };
        if done == LAYERS {
            prefill.engine.remove(&handoff);
            return prefill.core.finish(handoff, Vec::new(), self.now);
        }
        let layer = layout().block_bytes() / usize::from(LAYERS);
        let offset = usize::from(done) * layer;
        let write = |target_index| {
            // No two of them are neighbours at the source.
            let source = Some(Zeros { offset: target_index as usize * 100 * layer, len: layer });
            TargetWrite { target_index, offset, source }
        };
        prefill.engine.insert(handoff, (blocks, done + 1));
        prefill.core.push(handoff, (0..blocks).map(write).collect(), self.now);
    }

    /// One of the writes under way ends.
    fn land(&mut self, which: usize) {
        let prefill = &mut self.prefills[which];
        if prefill.under_way.is_empty() {
            return;
        }
        let at = self.chance.below(prefill.under_way.len());
        let (id, ..) = prefill.under_way.remove(at).expect("just counted");
        prefill.core.completed(&[Completion { id, outcome: Ok(()) }], self.now);
    }

    fn post(&mut self) {
        let Self { prefills, now, .. } = self;
        for prefill in prefills.iter_mut().filter(|it| it.is_alive) {
            let Prefill { core, under_way, .. } = prefill;
            core.post(
                DECODE,
                |id, source, range| {
                    if 3 <= under_way.len() {
                        return Post::QueueFull;
                    }
                    under_way.push_back((id, range.handoff, source.len as u64));
                    Post::Accepted
                },
                *now,
            );
        }
        let flights: Vec<_> = self.prefills.iter().flat_map(|it| &it.under_way).collect();
        let bytes: u64 = flights.iter().map(|(_, _, len)| len).sum();
        let is_alone = flights.iter().all(|(_, handoff, _)| *handoff == flights[0].1);
        if self.proof.takes_credit() {
            assert!(bytes <= self.limit || is_alone, "{bytes} bytes are under way, {} may be", self.limit);
            assert!(self.decode.credit_load().granted_bytes <= self.limit || is_alone);
        } else {
            assert_eq!(self.decode.credit_load().granted_bytes, 0, "it takes no credit");
        }
    }

    fn act(&mut self) {
        for which in 0..self.prefills.len() {
            while let Some(action) = self.prefills[which].core.next_action() {
                self.act_for_prefill(which, action);
            }
        }
        while let Some(action) = self.decode.next_action() {
            self.act_for_decode(action);
        }
    }

    fn act_for_prefill(&mut self, which: usize, action: EndpointAction) {
        let prefill = &mut self.prefills[which];
        match action {
            EndpointAction::Send { message, .. } => prefill.to_decode.push_back(message),
            EndpointAction::Tell(EndpointEvent::Reserved(reserved)) => {
                prefill.engine.insert(reserved.handoff, (reserved.targets.len() as u32, 0));
            }
            EndpointAction::Tell(EndpointEvent::Delivered { .. }) => {}
            other => panic!("nothing goes wrong here: {other:?}"),
        }
    }

    fn act_for_decode(&mut self, action: EndpointAction) {
        match action {
            EndpointAction::Send { peer, message } => {
                if let Message::Grant { handoff, bytes } = &message {
                    let deadline = (self.deadlines[handoff], *handoff);
                    let first = self.wishes.keys().map(|it| (self.deadlines[it], *it)).min();
                    assert_eq!(Some(deadline), first, "the earliest deadline comes first");
                    self.wishes.remove(handoff);
                    self.granted.insert(*handoff, *bytes);
                }
                self.prefills[peer as usize].from_decode.push_back(message);
            }
            EndpointAction::TakeDigests(order) => {
                let digests = self.digests.remove(&order.handoff).expect("a commit came");
                self.decode.digested(order.handoff, order.ticket, digests);
            }
            EndpointAction::Tell(EndpointEvent::Committed { handoff, .. }) => {
                self.committed += 1;
                self.open.remove(&handoff);
                self.decode.adopt(handoff);
            }
            EndpointAction::Tell(EndpointEvent::Released { handoff }) => {
                self.released += 1;
                self.open.remove(&handoff);
            }
            EndpointAction::Tell(EndpointEvent::ReserveFailed { .. } | EndpointEvent::PeerDown { .. })
            | EndpointAction::Sever { .. } => {}
            other => panic!("nothing goes wrong here: {other:?}"),
        }
    }

    /// A prefill worker is gone, in the middle of whatever it does.
    fn kill(&mut self, which: usize) {
        let prefill = &mut self.prefills[which];
        prefill.is_alive = false;
        prefill.to_decode.clear();
        prefill.from_decode.clear();
        prefill.engine.clear();
        prefill.under_way.clear();
        let link = prefill.link;
        let open = &self.open;
        self.wishes.retain(|handoff, _| open.get(handoff) != Some(&(which as u64)));
        self.decode.link_lost(which as u64, "it died", self.now);
        self.act();
        if self.proof == QuietProof::AccessEnded {
            self.decode.access_ended(which as u64, link, self.now);
        } else {
            self.decode.process_gone(which as u64, self.now);
        }
        self.act();
    }
}

/// Runs until nothing is left; the turn at which a prefill worker dies, if one does.
fn run(mut world: World, dies: Option<(usize, u32)>) -> World {
    for turn in 0..100_000 {
        if let Some((which, at)) = dies
            && at == turn
        {
            world.kill(which);
        }
        if world.open.is_empty() {
            let load = world.decode.credit_load();
            assert_eq!(load, CreditLoad::default(), "nothing stays lent and nobody waits");
            return world;
        }
        world.turn();
    }
    panic!("handoffs that never end: {:?}, {:?}", world.open, world.decode.credit_load());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn every_handoff_ends_and_the_limit_holds(
        proof in prop::sample::select(vec![QuietProof::Admission, QuietProof::AccessEnded, QuietProof::Process]),
        // From less than one write to everything at once.
        limit in prop::sample::select(vec![1, 100, 300, 1 << 30]),
        jobs in prop::collection::vec((0..4u64, 1..5u32, 0..50u64), 1..12),
        dies in prop::option::of((0..4usize, 0..300u32)),
        seed: u64,
    ) {
        let count = jobs.len() as u32;
        let world = run(World::new(proof, limit, 4, &jobs, seed), dies);
        prop_assert_eq!(world.committed + world.released, count);
        prop_assert!(dies.is_some() || world.committed == count, "without a death all are delivered");
    }
}

/// A peer that lets its leave lie keeps the others waiting, but not for ever.
#[test]
fn leave_that_is_not_used_is_taken_back_with_the_link() {
    let mut world = World::new(QuietProof::Admission, 1, 2, &[(0, 1, 5), (1, 1, 9)], 3);
    let size = layout().block_bytes() as u64;
    let (first, second) = (HandoffId(1), HandoffId(2));
    let ask = |handoff| Message::Ask { handoff, ask: Ask { ended: 0, wanted: size } };
    for (peer, handoff) in [(0, first), (1, second)] {
        world.wishes.insert(handoff, size);
        world.decode.hear(peer, ask(handoff), world.now);
        world.act();
    }
    assert_eq!(world.granted.keys().copied().collect::<Vec<_>>(), [first]);
    // Both say that they are there, the first one writes nothing: twice the stall of two seconds.
    for _ in 0..42 {
        world.now = world.now.plus(Duration::from_millis(100));
        for peer in 0..2 {
            world.decode.hear(peer, Message::Heartbeat { seq: 1 }, world.now);
        }
        world.decode.tick(world.now);
        world.act();
    }
    assert!(!world.open.contains_key(&first), "its reservation is over");
    assert_eq!(world.granted.get(&second), Some(&size), "and the other one's turn has come");
}

#[test]
fn asking_for_what_cannot_be_ends_the_link() {
    for (name, ended, wanted) in [("more than there is", 0, u64::MAX), ("what it never had ends", 1, 1)] {
        let mut world = World::new(QuietProof::AccessEnded, 1000, 1, &[(0, 2, 5)], 3);
        let message = Message::Ask { handoff: HandoffId(1), ask: Ask { ended, wanted } };
        world.decode.hear(0, message, world.now);
        let severed = std::iter::from_fn(|| world.decode.next_action()).any(
            |action| matches!(action, EndpointAction::Sever { reason, .. } if reason.contains("credit")),
        );
        assert!(severed, "{name}");
    }
}
