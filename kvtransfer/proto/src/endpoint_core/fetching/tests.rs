//! Two cores, one of which reads from the other: what frees blocks on either side, and what does not.

use std::collections::VecDeque;
use std::rc::{Rc, Weak};
use std::time::Duration;

use crate::digest::{BlockShape, Coverage, granule_digest};
use crate::endpoint_core::{
    ByDevice, DigestOrder, EndpointAction, EndpointCore, EndpointEvent, EndpointRules, LinkId, LinkUp,
    OFFERS, QuietProof, ReserveOrder, STALL, TargetWrite, WriteSource,
};
use crate::layout::{AxisOrder, HeadRange, KvDtype, KvLayout};
use crate::message::{Commit, Hello, Message, Offer, Offered, OnFailure, PROTOCOL, Piece};
use crate::support::Zeros;
use crate::transport::{Completion, Post, WriteFault, WriteId, stamp};
use crate::units::{BlockId, BlockLen, BlockRef, Epoch, HandoffId, Moment, TokenCount};

const HANDOFF: HandoffId = HandoffId(7);
const PREFILL: u64 = 1;
const DECODE: u64 = 2;
const NOW: Moment = Moment(Duration::from_secs(1));

#[test]
fn when_blocks_are_free_that_are_read() {
    #[rustfmt::skip]
    let rows = [
        // what is shown                                             what happens                                  what is told to either engine
        ("what was read is committed and taken over",                "push push finish read read adopt",           "d:committed p:delivered"),
        ("… not before the last read has ended",                     "push push finish read",                      ""),
        ("… in whichever order they end",                            "push push finish read-last read adopt",      "d:committed p:delivered"),
        ("decode keeps its blocks while it reads",                   "push cancel",                                "p:stop"),
        ("… until that has ended",                                   "push cancel read",                           "p:stop d:released"),
        ("prefill keeps its blocks while they are read",             "push cancel abandon",                        "p:stop"),
        ("… until decode says that it has done",                     "push cancel abandon read",                   "p:stop d:released p:failed"),
        ("what was not posted is never read",                        "full push cancel abandon",                   "d:released p:stop p:failed"),
        ("nor is what was offered too late",                         "hold cancel push release abandon",           "d:released p:stop p:failed"),
        ("prefill loses the link: its blocks are not free",          "push p-lost abandon",                        "p:stop"),
        ("… nor when decode connects anew and is not busy",          "push p-lost abandon p-up",                   "p:stop"),
        ("… nor when decode's process is gone",                      "push p-lost abandon p-gone",                 "p:stop"),
        ("… nor when a later link's access has ended",               "push p-lost abandon p-up p-access-2",        "p:stop"),
        ("… but when that of the link has, which it read over",      "push p-lost abandon p-access",               "p:stop p:failed"),
        ("… also when the engine stops later than that",             "push p-lost p-access abandon",               "p:stop p:failed"),
        ("nothing is offered any more: nothing to wait for",         "push read p-lost abandon",                   "p:stop p:failed"),
        ("decode loses the link: its blocks are not free",           "push d-lost",                                "d:failed"),
        ("… until its own reads have ended",                         "push d-lost read",                           "d:failed d:released"),
        ("… and the end of access ends none of them",                "push d-lost d-access",                       "d:failed"),
        ("decode loses the link and reads nothing",                  "push read d-lost",                           "d:failed d:released"),
        ("a read that fails is a loss",                              "push fail",                                  "d:failed d:released"),
        ("a read that is turned down is one too",                    "push turned-down",                           "d:failed d:released"),
        ("the peer's word that it stopped frees nothing",            "push says-quiet",                            "d:failed"),
        ("… nor does its refusal",                                   "push says-decline",                          "d:failed"),
        ("… the end of the reads does",                              "push says-quiet read",                       "d:failed d:released"),
        ("a commit that comes too early is refused",                 "push says-commit",                           "d:failed p:stop"),
        ("an offer outside the targets ends the link",               "offers-outside",                             "d:failed d:released"),
        ("… and one of another generation",                          "offers-stale",                               "d:failed d:released"),
        ("… and one of bytes that the peer has not",                 "offers-foreign",                             "d:failed d:released"),
        ("… and one that leaves something out",                      "offers-later",                               "d:failed d:released"),
        ("the other way round: who reads may not say it has done",   "push d-says-more",                           "p:odd"),
        ("bytes that are not those that were offered are refused",   "push push corrupt finish read read",         "d:failed d:released p:failed"),
    ];
    for (name, happenings, expected) in rows {
        let mut pair = Pair::new();
        for word in happenings.split(' ') {
            pair.happens(word);
            pair.settle();
        }
        assert_eq!(pair.told.join(" "), expected, "{name}");
    }
}

#[test]
fn reads_need_leave_like_writes_of_others() {
    let block = BlockShape::of(&layout()).block as u64;
    let mut pair = Pair::with_credit(block);
    for word in ["push", "push"] {
        pair.happens(word);
        pair.settle();
    }
    assert_eq!(pair.under_way.len(), 1, "the other would be more than is lent");
    let load = pair.decode.credit_load();
    assert_eq!((load.granted_bytes, load.waiting_bytes), (block, block));
    pair.happens("read");
    pair.settle();
    assert_eq!(pair.under_way.len(), 1, "its turn has come");
    pair.happens("read");
    pair.settle();
    assert_eq!(pair.decode.credit_load().granted_bytes, 0, "all of it is back");
}

/// Blocks of another layout are read out of copies.
#[test]
fn when_copies_are_free() {
    #[rustfmt::skip]
    let rows = [
        // what is shown                                     what happens                        copies   what is told to either engine
        ("a copy is kept while it may be read",              "push push",                        2, ""),
        ("… and while another one is, which came with it",   "push push read",                   2, ""),
        ("… until decode says that it has done",             "push push read read",              0, "p:fetched"),
        ("… for that alone of which it says so",             "push read push",                   1, "p:fetched"),
        ("whatever prefill's engine has said",               "push finish",                      1, ""),
        ("the commit follows",                               "push push finish read read",       0, "p:fetched d:committed"),
        ("a loss frees none",                                "push p-lost abandon",              1, "p:stop"),
        ("… nor the end of decode's process",                "push p-lost abandon p-gone",       1, "p:stop"),
        ("… nor a new link and the end of its access",       "push p-lost p-up p-access-2",      1, "p:stop"),
        ("the end of the link's own access does",            "push p-lost p-access",             0, "p:stop p:fetched"),
        ("… once",                                           "push p-lost p-access p-access",    0, "p:stop p:fetched"),
        ("what decode has given up is free when it says so", "push cancel",                      1, "p:stop"),
        ("… which it does when its reads have ended",        "push cancel read",                 0, "p:stop d:released p:fetched"),
        ("what came too late for it is free at once",        "hold cancel push release",         0, "d:released p:stop p:fetched"),
        ("a word of more than was offered frees none",       "push d-says-more",                 1, "p:odd"),
        ("a reader may take its time",                       "push p-30s",                       1, ""),
        ("… but no longer than that: its link is broken",    "push p-31s",                       1, "p:stop"),
        ("… and with its access it has lost the copy",       "push p-31s p-access",              0, "p:stop p:fetched"),
        ("… though it reads others meanwhile",               "push push p-20s read p-31s",       2, "p:stop"),
        ("time in which this side did not run is not its",   "push p-late p-31s",                1, ""),
    ];
    let staging = BlockShape::of(&layout()).granule as u64;
    for (name, happenings, copies, expected) in rows {
        let mut pair = Pair::between(u64::MAX, KvLayout { dtype: KvDtype::Bf16, ..layout() }, staging);
        pair.settle();
        for word in happenings.split(' ') {
            pair.happens(word);
            pair.settle();
        }
        assert_eq!((pair.copies(), pair.told.join(" ").as_str()), (copies, expected), "{name}");
    }
}

#[test]
fn without_room_to_convert_them_blocks_of_another_layout_are_declined() {
    let layer = BlockShape::of(&layout()).granule as u64;
    let mut pair = Pair::between(u64::MAX, KvLayout { dtype: KvDtype::Bf16, ..layout() }, layer - 1);
    pair.settle();
    assert_eq!(pair.told, ["p:failed", "d:failed", "d:released"]);
    let (ours, theirs) = (pair.prefill.directions(DECODE), pair.decode.directions(PREFILL));
    assert_eq!(ours.map(|it| it.to_peer), Some(Err("handoff")), "both know");
    assert_eq!(theirs.map(|it| it.from_peer), Some(Err("handoff")));
}

/// A prefill side and a decode side that reads from it, the first with two granules to offer.
struct Pair {
    prefill: EndpointCore<Source>,
    decode: EndpointCore<Source>,
    to_prefill: VecDeque<Message>,
    to_decode: VecDeque<Message>,
    under_way: Vec<WriteId>,
    pushed: u32,
    /// What was pushed, for as long as somebody keeps it.
    sources: Vec<Weak<()>>,
    is_full: bool,
    /// Whether decode's messages stay where they are.
    holds: bool,
    /// Whether decode's memory is not what was read.
    is_corrupt: bool,
    told: Vec<String>,
}

impl Pair {
    fn new() -> Self {
        Self::with_credit(u64::MAX)
    }

    fn with_credit(credit: u64) -> Self {
        let mut pair = Self::between(credit, layout(), 0);
        pair.settle();
        assert!(pair.told.is_empty(), "{:?}", pair.told);
        pair
    }

    fn between(credit: u64, theirs: KvLayout, staging: u64) -> Self {
        let core = |layout: &KvLayout, pulls| {
            EndpointCore::new(EndpointRules {
                layout: layout.clone(),
                blocks: 8,
                staging,
                in_place: true,
                coverage: Coverage::Full,
                lease: Duration::from_secs(60),
                heartbeat: Duration::from_secs(10),
                patience: Duration::from_secs(60),
                stall: STALL,
                offers: OFFERS,
                credit,
                pulls,
            })
        };
        let mut pair = Self {
            prefill: core(&theirs, false),
            decode: core(&layout(), true),
            to_prefill: VecDeque::new(),
            to_decode: VecDeque::new(),
            under_way: Vec::new(),
            pushed: 0,
            sources: Vec::new(),
            is_full: false,
            holds: false,
            is_corrupt: false,
            told: Vec::new(),
        };
        pair.prefill.link_up(DECODE, up(DECODE, layout(), 0, true), NOW);
        pair.decode.link_up(PREFILL, up(PREFILL, theirs, staging, false), NOW);
        pair.prefill.expect(HANDOFF, DECODE, Duration::from_secs(60), NOW);
        let order = ReserveOrder {
            handoff: HANDOFF,
            peer: PREFILL,
            within: Duration::from_secs(1),
            tokens: TokenCount(8),
            first_block: 0,
            cached: Vec::new(),
            targets: targets(),
        };
        pair.decode.reserve(order, NOW);
        pair
    }

    fn happens(&mut self, word: &str) {
        let say = |message| (PREFILL, message);
        let reason = || "why".to_owned();
        let block = BlockShape::of(&layout()).block as u64;
        let good = Piece { source: 0, target: 2 * block, len: 64, stamp: stamp(&targets()[..1]) };
        let offer = |before, piece| Message::Offer(Offered { handoff: HANDOFF, before, pieces: vec![piece] });
        let hostile = match word {
            "says-quiet" => Some(say(Message::Quiet { handoff: HANDOFF, reason: reason() })),
            "says-decline" => Some(say(Message::Decline { handoff: HANDOFF, reason: reason() })),
            "says-commit" => Some(say(Message::Commit(Commit {
                handoff: HANDOFF,
                tokens: TokenCount(8),
                first: 0,
                targets: targets(),
                digests: vec![0, 0],
                seal: 0,
                payload: Vec::new(),
                in_place: false,
            }))),
            "offers-outside" => Some(say(offer(0, Piece { target: 7 * block, ..good }))),
            "offers-stale" => Some(say(offer(0, Piece { stamp: 1, ..good }))),
            "offers-foreign" => Some(say(offer(0, Piece { source: 8 * block, ..good }))),
            "offers-later" => Some(say(offer(1, good))),
            _ => None,
        };
        if let Some((peer, message)) = hostile {
            return self.decode.hear(peer, message, NOW);
        }
        match word {
            "push" => {
                let len = BlockShape::of(&layout()).granule;
                let life = Rc::new(());
                self.sources.push(Rc::downgrade(&life));
                let zeros = Zeros { offset: 2 * len * self.pushed as usize, len };
                let source = Some(Source { zeros, life });
                let write = TargetWrite { target_index: self.pushed, offset: 0, source };
                self.prefill.push(HANDOFF, vec![write], NOW);
                self.pushed += 1;
            }
            "finish" => self.prefill.finish(HANDOFF, Vec::new(), NOW),
            "abandon" => self.prefill.abandon(HANDOFF, reason(), NOW),
            "cancel" => self.decode.cancel(HANDOFF),
            "adopt" => self.decode.adopt(HANDOFF),
            "read" => self.end_read(0, Ok(())),
            "read-last" => self.end_read(self.under_way.len() - 1, Ok(())),
            "fail" => self.end_read(0, Err(WriteFault::Severed)),
            "turned-down" => self.end_read(0, Err(WriteFault::Outside)),
            "p-lost" => self.prefill.link_lost(DECODE, "why", NOW),
            "p-late" => {
                self.prefill.stood_still(Duration::from_secs(5), Moment(NOW.0 + Duration::from_secs(5)))
            }
            "p-20s" | "p-30s" | "p-31s" => {
                let seconds = word[2..4].parse().expect("two digits");
                let now = Moment(NOW.0 + Duration::from_secs(seconds));
                self.prefill.heard(DECODE, now);
                self.prefill.tick(now);
            }
            "p-up" => drop(self.prefill.link_up(DECODE, up(DECODE, layout(), 0, true), NOW)),
            "p-gone" => self.prefill.process_gone(DECODE, NOW),
            "p-access" => self.prefill.access_ended(DECODE, LinkId(0), NOW),
            "p-access-2" => self.prefill.access_ended(DECODE, LinkId(1), NOW),
            "d-lost" => self.decode.link_lost(PREFILL, "why", NOW),
            "d-access" => self.decode.access_ended(PREFILL, LinkId(0), NOW),
            "d-says-more" => {
                self.prefill.hear(DECODE, Message::Fetched { handoff: HANDOFF, pieces: 2 }, NOW);
            }
            "full" => self.is_full = true,
            "hold" => self.holds = true,
            "release" => self.holds = false,
            "corrupt" => self.is_corrupt = true,
            other => panic!("`{other}` is no happening"),
        }
    }

    /// How many of the sources somebody keeps.
    fn copies(&self) -> usize {
        self.sources.iter().filter(|it| 0 < it.strong_count()).count()
    }

    fn end_read(&mut self, index: usize, outcome: Result<(), WriteFault>) {
        let id = self.under_way.remove(index);
        self.decode.completed(&[Completion { id, outcome }], NOW);
    }

    /// Carries out what both say, and lets messages arrive, until nothing is left to do.
    fn settle(&mut self) {
        loop {
            let (is_full, under_way) = (self.is_full, &mut self.under_way);
            let take = |id, _, _| {
                if is_full {
                    return Post::QueueFull;
                }
                under_way.push(id);
                Post::Accepted
            };
            self.decode.fetch(PREFILL, take, NOW);
            self.prefill.post(DECODE, |_, _, _| panic!("nobody may write"), NOW);
            if let Some(action) = self.prefill.next_action() {
                self.act("p", action);
            } else if let Some(action) = self.decode.next_action() {
                self.act("d", action);
            } else if let Some(message) = self.to_decode.pop_front() {
                self.decode.hear(PREFILL, message, NOW);
            } else if let Some(message) = self.to_prefill.front().cloned().filter(|_| !self.holds) {
                self.to_prefill.pop_front();
                self.prefill.hear(DECODE, message, NOW);
            } else {
                return;
            }
        }
    }

    fn act(&mut self, who: &str, action: EndpointAction) {
        let word = match action {
            EndpointAction::Send { message, .. } => {
                let queue = if who == "p" { &mut self.to_decode } else { &mut self.to_prefill };
                return queue.push_back(message);
            }
            EndpointAction::TakeDigests(order) => {
                let digests = self.digests(&order);
                return self.decode.digested(order.handoff, order.ticket, digests);
            }
            EndpointAction::Sever { .. } => return,
            EndpointAction::Log { .. } => "odd",
            EndpointAction::Tell(event) => match event {
                EndpointEvent::Reserved(_) | EndpointEvent::PeerDown { .. } => return,
                EndpointEvent::Delivered { .. } => "delivered",
                EndpointEvent::SendFailed { .. } | EndpointEvent::ReserveFailed { .. } => "failed",
                EndpointEvent::CancelWanted { .. } => "stop",
                EndpointEvent::Fetched { .. } => "fetched",
                EndpointEvent::Committed { .. } => "committed",
                EndpointEvent::Released { .. } => "released",
            },
        };
        self.told.push(format!("{who}:{word}"));
    }

    /// What decode finds in its blocks: what was read, which is nothing but zeros.
    fn digests(&self, order: &DigestOrder) -> Vec<u64> {
        let value = u8::from(self.is_corrupt);
        let digest = |position| {
            let granule = order.shape.granule_of(order.handoff, position, 0);
            let read = |_: usize, buffer: &mut [u8]| buffer.fill(value);
            let is_read = (position as u32) < self.pushed;
            if is_read { granule_digest(order.coverage, granule, order.shape.granule, read) } else { 0 }
        };
        (0..order.targets.len()).map(digest).collect()
    }
}

/// Zeros, and whether anybody keeps them.
#[derive(Clone, Debug)]
struct Source {
    zeros: Zeros,
    life: Rc<()>,
}

impl WriteSource for Source {
    fn memory(&self) -> usize {
        Rc::as_ptr(&self.life).addr()
    }
    fn offset(&self) -> usize {
        self.zeros.offset
    }
    fn len(&self) -> usize {
        self.zeros.len
    }
    fn range(&self, offset: usize, len: usize) -> Option<Self> {
        Some(Self { zeros: Zeros { offset, len }, ..self.clone() })
    }
    fn in_region(&self) -> Option<u64> {
        self.zeros.in_region()
    }
    fn read(&self, at: usize, buffer: &mut [u8]) {
        self.zeros.read(at, buffer);
    }
}

fn targets() -> Vec<BlockRef> {
    [2, 5].map(|block| BlockRef { block: BlockId(block), epoch: Epoch(3) }).to_vec()
}

fn up(instance: u64, layout: KvLayout, staging_bytes: u64, pulls: bool) -> LinkUp {
    let hello = Hello {
        protocol: PROTOCOL,
        instance,
        name: "peer".to_owned(),
        region_bytes: 8 * layout.block_bytes() as u64 + staging_bytes,
        staging_bytes,
        layout,
        listen_port: 1,
        host: String::new(),
        memory_socket: String::new(),
        offer: Offer { shared_memory: false, rdma: true, tcp: true, on_failure: OnFailure::FallBack },
        pulls,
        lease: Duration::from_secs(60),
    };
    LinkUp { hello, proof: QuietProof::AccessEnded, busy: Vec::new(), by_device: ByDevice::default() }
}

fn layout() -> KvLayout {
    KvLayout {
        model: "test".to_owned(),
        layers: 1,
        kv_heads: 1,
        heads: HeadRange { first: 0, count: 1 },
        head_size: 2,
        dtype: KvDtype::F32,
        block_len: BlockLen::new(4).unwrap(),
        order: AxisOrder::TokenHead,
    }
}
