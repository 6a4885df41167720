//! More handoffs between two endpoints than a transfer library was once reported to survive: what a handoff leaves
//! behind must not add up.

mod support;

use std::time::Duration;

use support::Zeros;
use tidemill_kvtransfer_proto::digest::Coverage;
use tidemill_kvtransfer_proto::endpoint_core::{
    ByDevice, EndpointAction, EndpointCore, EndpointEvent, EndpointRules, LinkUp, OFFERS, QuietProof,
    ReserveOrder, STALL, TargetWrite,
};
use tidemill_kvtransfer_proto::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
use tidemill_kvtransfer_proto::message::{Hello, Offer, OnFailure, PROTOCOL};
use tidemill_kvtransfer_proto::transport::{Completion, Post};
use tidemill_kvtransfer_proto::units::{BlockId, BlockLen, BlockRef, Epoch, HandoffId, Moment, TokenCount};

const PREFILL: u64 = 1;
const DECODE: u64 = 2;

#[test]
fn a_hundred_thousand_handoffs_leave_nothing_behind() {
    let mut pair = Pair::new();
    // The tables of handoffs that have ended are full after that many, and stay as long as they are.
    let mut sizes = Vec::new();
    for number in 0..100_000 {
        // One in ten is given up, by either side, at one of its stages.
        pair.hand_over(number, number % 10);
        if [10_000, 99_999].contains(&number) {
            assert!(pair.prefill.is_idle() && pair.decode.is_idle(), "after {number}");
            sizes.push(pair.size());
        }
    }
    assert_eq!(pair.delivered, 80_000);
    // Numbers grow by a digit or two; an entry that is left behind in each handoff is far more than that.
    let [early, late] = sizes[..] else { panic!("two were taken") };
    assert!(
        late < early + early / 2,
        "{early} bytes when described after 10,000 handoffs, {late} after 100,000"
    );
}

struct Pair {
    prefill: EndpointCore<Zeros>,
    decode: EndpointCore<Zeros>,
    delivered: u32,
    is_reserved: bool,
    is_committed: bool,
}

impl Pair {
    fn new() -> Self {
        let mut pair = Self {
            prefill: EndpointCore::new(rules()),
            decode: EndpointCore::new(rules()),
            delivered: 0,
            is_reserved: false,
            is_committed: false,
        };
        let up = |instance| LinkUp {
            hello: hello(instance),
            proof: QuietProof::Admission,
            busy: Vec::new(),
            by_device: ByDevice::default(),
        };
        pair.prefill.link_up(DECODE, up(DECODE), NOW);
        pair.decode.link_up(PREFILL, up(PREFILL), NOW);
        pair
    }

    /// One handoff of one block. `fate` 0: decode cancels after it was reserved; 1: prefill gives up.
    fn hand_over(&mut self, number: u64, fate: u64) {
        let handoff = HandoffId(number);
        self.is_reserved = false;
        self.is_committed = false;
        self.prefill.expect(handoff, DECODE, Duration::from_secs(60), NOW);
        let targets = vec![BlockRef { block: BlockId(3), epoch: Epoch(number) }];
        let (tokens, cached) = (TokenCount(4), Vec::new());
        let (peer, within) = (PREFILL, Duration::from_secs(1));
        let order = ReserveOrder { handoff, peer, within, tokens, first_block: 0, cached, targets };
        self.decode.reserve(order, NOW);
        self.settle();
        assert!(self.is_reserved, "{number}");
        match fate {
            0 => {
                self.decode.cancel(handoff);
                self.settle();
                self.prefill.abandon(handoff, "told to".to_owned(), NOW);
            }
            1 => self.prefill.abandon(handoff, "the client is gone".to_owned(), NOW),
            _ => {
                let source = Some(Zeros { offset: 0, len: layout().block_bytes() });
                self.prefill.push(handoff, vec![TargetWrite { target_index: 0, offset: 0, source }], NOW);
                self.settle(); // It asks for leave, and is given it.
                let mut posted = Vec::new();
                let post = |id, _: &Zeros, range| {
                    posted.push((id, range));
                    Post::Accepted
                };
                self.prefill.post(DECODE, post, NOW);
                let admit = |(id, range)| {
                    let outcome = self.decode.admit(PREFILL, &range);
                    Completion { id, outcome }
                };
                let done: Vec<Completion> = posted.into_iter().map(admit).collect();
                self.prefill.completed(&done, NOW);
                self.prefill.finish(handoff, Vec::new(), NOW);
                self.settle();
                assert!(self.is_committed, "{number}");
                self.decode.adopt(handoff);
            }
        }
        self.settle();
    }

    /// Carries out what both sides want, until neither wants anything.
    fn settle(&mut self) {
        loop {
            if let Some(action) = self.prefill.next_action() {
                self.act(PREFILL, action);
            } else if let Some(action) = self.decode.next_action() {
                self.act(DECODE, action);
            } else {
                return;
            }
        }
    }

    fn act(&mut self, side: u64, action: EndpointAction) {
        match action {
            EndpointAction::Send { message, .. } if side == PREFILL => {
                self.decode.hear(PREFILL, message, NOW)
            }
            EndpointAction::Send { message, .. } => self.prefill.hear(DECODE, message, NOW),
            EndpointAction::TakeDigests(order) => {
                let zeros = digest_of_zeros(&order);
                self.decode.digested(order.handoff, order.ticket, zeros);
            }
            EndpointAction::Tell(EndpointEvent::Reserved(_)) => self.is_reserved = true,
            EndpointAction::Tell(EndpointEvent::Committed { .. }) => self.is_committed = true,
            EndpointAction::Tell(EndpointEvent::Delivered { .. }) => self.delivered += 1,
            EndpointAction::Tell(EndpointEvent::PeerDown { .. }) | EndpointAction::Sever { .. } => {
                panic!("no link is lost")
            }
            EndpointAction::Tell(_) | EndpointAction::Log { .. } => {}
        }
    }

    /// Of all that both sides remember, as text.
    fn size(&self) -> usize {
        format!("{:?}{:?}", self.prefill, self.decode).len()
    }
}

/// What the decode side finds in its block, which is what was written.
fn digest_of_zeros(order: &tidemill_kvtransfer_proto::endpoint_core::DigestOrder) -> Vec<u64> {
    use tidemill_kvtransfer_proto::digest::granule_digest;
    let of_block = |position: usize| {
        (0..order.shape.block / order.shape.granule).fold(0u64, |sum, index| {
            let granule = order.shape.granule_of(order.handoff, position, index);
            let read = |_: usize, buffer: &mut [u8]| buffer.fill(0);
            sum.wrapping_add(granule_digest(order.coverage, granule, order.shape.granule, read))
        })
    };
    (0..order.targets.len()).map(of_block).collect()
}

fn rules() -> EndpointRules {
    EndpointRules {
        layout: layout(),
        blocks: 8,
        staging: 0,
        in_place: false,
        coverage: Coverage::Full,
        lease: Duration::from_millis(500),
        heartbeat: Duration::from_millis(100),
        patience: Duration::from_secs(3),
        stall: STALL,
        offers: OFFERS,
        credit: 1 << 20,
        pulls: false,
    }
}

fn layout() -> KvLayout {
    KvLayout {
        model: "test".to_owned(),
        layers: 1,
        kv_heads: 1,
        heads: HeadRange { first: 0, count: 1 },
        head_size: 2,
        dtype: KvDtype::F32,
        block_len: BlockLen::new(4).expect("a power of two"),
        order: AxisOrder::TokenHead,
    }
}

fn hello(instance: u64) -> Hello {
    Hello {
        protocol: PROTOCOL,
        instance,
        name: "peer".to_owned(),
        layout: layout(),
        region_bytes: 8 * layout().block_bytes() as u64,
        staging_bytes: 0,
        listen_port: 1,
        host: String::new(),
        memory_socket: String::new(),
        offer: Offer { shared_memory: false, rdma: false, tcp: true, on_failure: OnFailure::FallBack },
        pulls: false,
        lease: Duration::from_millis(500),
    }
}

const NOW: Moment = Moment(Duration::ZERO);
