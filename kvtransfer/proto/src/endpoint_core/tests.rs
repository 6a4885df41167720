//! One row per rule of quiescence: what happens to a reservation that was announced, on the left; what the engine and
//! the driver are told, on the right.

use std::time::Duration;

use super::*;
use crate::layout::{AxisOrder, HeadRange, KvDtype};
use crate::message::{Offer, OnFailure, PROTOCOL};
use crate::units::{BlockId, BlockLen, Epoch, Moment};

/// Nothing is written in these tests.
#[derive(Clone, Debug)]
struct NoSource;

impl WriteSource for NoSource {
    fn memory(&self) -> usize {
        0
    }
    fn offset(&self) -> usize {
        0
    }
    fn len(&self) -> usize {
        0
    }
    fn range(&self, _: usize, _: usize) -> Option<Self> {
        None
    }
    fn read(&self, _: usize, _: &mut [u8]) {}
}

const HANDOFF: HandoffId = HandoffId(7);
const PEER: u64 = 9;

#[test]
fn when_blocks_are_released() {
    use QuietProof::{AccessEnded, Admission, Process};
    #[rustfmt::skip]
    let rows = [
        // what is shown                                              way          what happens                    what is told
        ("admission: given up is quiet",                              Admission,   "cancel",                       "released"),
        ("admission: lost is quiet",                                  Admission,   "lost",                         "sever failed released"),
        ("a mapping: given up is not quiet",                          Process,     "cancel",                       ""),
        ("… until the peer says so",                                  Process,     "cancel quiet",                 "released"),
        ("… or is lost and gone",                                     Process,     "cancel lost gone",             "sever released"),
        ("a mapping: lost is not quiet",                              Process,     "lost",                         "sever failed"),
        ("… also when the peer comes back and is busy",               Process,     "lost up-busy",                 "sever failed"),
        ("… until it is busy no more",                                Process,     "lost up-busy quiet",           "sever failed released"),
        ("… or comes back without it",                                Process,     "lost up",                      "sever failed released"),
        ("… or says goodbye without it",                              Process,     "lost up-busy bye",             "sever failed sever released"),
        ("a device: the peer's word counts on the same link",         AccessEnded, "cancel quiet",                 "released"),
        ("… and a decline too",                                       AccessEnded, "decline",                      "failed released"),
        ("a device: lost is not quiet",                               AccessEnded, "lost",                         "sever failed"),
        ("… the end of the access proves it",                         AccessEnded, "lost access",                  "sever failed released"),
        ("… the peer's word on a later link does not",                AccessEnded, "lost up quiet decline",        "sever failed"),
        ("… nor its goodbye, nor the end of its process",             AccessEnded, "lost up bye gone",             "sever failed sever"),
        ("… nor the end of the access of a later link",               AccessEnded, "lost up lost access-2",        "sever failed sever"),
        ("… but the end of its own access does, whenever it comes",   AccessEnded, "lost up access",               "sever failed released"),
        ("silence beyond the lease is a loss",                        Process,     "silence",                      "sever failed"),
        ("a word within the lease is none",                           Process,     "pause beat pause",             ""),
        ("another peer has no say",                                   Process,     "cancel foreign-quiet",         "odd"),
    ];
    for (name, proof, happenings, expected) in rows {
        let mut scene = Scene::new(proof);
        let told: Vec<String> = happenings.split(' ').flat_map(|word| scene.happens(word)).collect();
        assert_eq!(told.join(" "), expected, "{name}");
    }
}

#[test]
fn who_is_busy_says_so_before_it_connects_anew() {
    let mut scene = Scene::new(QuietProof::Process);
    let core = &mut scene.core;
    core.expect(HandoffId(8), PEER, Duration::from_secs(1), scene.now);
    let reserve = crate::message::Reserve {
        handoff: HandoffId(8),
        tokens: TokenCount(4),
        first_block: 0,
        cached: Vec::new(),
        targets: vec![BlockRef { block: BlockId(3), epoch: Epoch(1) }],
        coverage: Coverage::Full,
    };
    core.hear(PEER, Message::Reserve(reserve), scene.now);
    assert_eq!(core.prepare_link(PEER, scene.now), [HandoffId(8)], "the engine may still compute in place");
    core.abandon(HandoffId(8), "told to".to_owned(), scene.now);
    assert_eq!(core.prepare_link(PEER, scene.now), [], "it has stopped");
}

/// A core with one announced reservation, and the moment.
struct Scene {
    core: EndpointCore<NoSource>,
    proof: QuietProof,
    now: Moment,
}

impl Scene {
    fn new(proof: QuietProof) -> Self {
        let rules = EndpointRules {
            layout: layout(),
            blocks: 8,
            in_place: true,
            coverage: Coverage::Full,
            lease: Duration::from_millis(500),
            heartbeat: Duration::from_millis(100),
            patience: Duration::from_secs(3),
            stall: Duration::from_secs(2),
        };
        let mut scene = Self { core: EndpointCore::new(rules), proof, now: Moment::default() };
        scene.happens("up");
        let targets = vec![BlockRef { block: BlockId(2), epoch: Epoch(5) }];
        let (tokens, cached) = (TokenCount(3), Vec::new());
        scene.core.reserve(ReserveOrder {
            handoff: HANDOFF,
            peer: PEER,
            tokens,
            first_block: 0,
            cached,
            targets,
        });
        assert!(scene.told().is_empty());
        scene
    }

    fn happens(&mut self, word: &str) -> Vec<String> {
        let (core, now) = (&mut self.core, self.now);
        let quiet = || Message::Quiet { handoff: HANDOFF, reason: "why".to_owned() };
        let up = |proof, busy| LinkUp { hello: hello(), proof, busy };
        match word {
            "up" => drop(core.link_up(PEER, up(self.proof, Vec::new()), now)),
            "up-busy" => drop(core.link_up(PEER, up(self.proof, vec![HANDOFF]), now)),
            "cancel" => core.cancel(HANDOFF),
            "lost" => core.link_lost(PEER, "why", now),
            "gone" => core.process_gone(PEER, now),
            "access" => core.access_ended(PEER, LinkId(0)),
            "access-2" => core.access_ended(PEER, LinkId(1)),
            "quiet" => core.hear(PEER, quiet(), now),
            "decline" => {
                core.hear(PEER, Message::Decline { handoff: HANDOFF, reason: "why".to_owned() }, now)
            }
            "bye" => core.hear(PEER, Message::Bye { busy: Vec::new() }, now),
            "beat" => core.hear(PEER, Message::Heartbeat { seq: 1 }, now),
            "foreign-quiet" => {
                core.link_up(PEER + 1, up(self.proof, Vec::new()), now);
                core.hear(PEER + 1, quiet(), now);
            }
            "pause" | "silence" => {
                self.now = now.plus(Duration::from_millis(if word == "pause" { 400 } else { 501 }));
                core.tick(self.now);
            }
            other => panic!("`{other}` is no happening"),
        }
        self.told()
    }

    fn told(&mut self) -> Vec<String> {
        let mut told = Vec::new();
        while let Some(action) = self.core.next_action() {
            told.extend(match action {
                EndpointAction::Sever { .. } => Some("sever".to_owned()),
                EndpointAction::Log { .. } => Some("odd".to_owned()),
                EndpointAction::Tell(EndpointEvent::ReserveFailed { .. }) => Some("failed".to_owned()),
                EndpointAction::Tell(EndpointEvent::Released { .. }) => Some("released".to_owned()),
                _ => None,
            });
        }
        told
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
        block_len: BlockLen::new(4).unwrap(),
        order: AxisOrder::TokenHead,
    }
}

fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL,
        instance: PEER,
        name: "peer".to_owned(),
        layout: layout(),
        region_bytes: 8 * layout().block_bytes() as u64,
        listen_port: 1,
        host: String::new(),
        memory_socket: String::new(),
        offer: Offer { shared_memory: true, rdma: false, tcp: true, on_failure: OnFailure::FallBack },
        lease: Duration::from_millis(500),
    }
}
