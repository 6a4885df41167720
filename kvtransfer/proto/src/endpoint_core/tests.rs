//! One row per rule: what happens to a reservation that was announced, or to writes that were posted, on the left; what
//! the engine and the driver are told, on the right.

use std::time::Duration;

use super::*;
use crate::digest::Seal;
use crate::layout::{AxisOrder, HeadRange, KvDtype};
use crate::message::{Offer, OnFailure, PROTOCOL};
use crate::support::Zeros;
use crate::transport::{Completion, Post};
use crate::units::{BlockId, BlockLen, Epoch, Moment};

pub(super) const HANDOFF: HandoffId = HandoffId(7);
/// Another one, in the other direction.
const OTHER: HandoffId = HandoffId(8);
pub(super) const PEER: u64 = 9;

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
        ("… nor is time in which this side did not run",              Process,     "pause late look",              ""),
        ("… but what comes after that is",                            Process,     "pause late pause",             "sever failed"),
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
    scene.is_asked();
    assert_eq!(scene.core.prepare_link(PEER, scene.now), [OTHER], "the engine may still compute in place");
    scene.core.abandon(OTHER, "told to".to_owned(), scene.now);
    assert_eq!(scene.core.prepare_link(PEER, scene.now), [], "it has stopped");
}

/// The end comes while there is no link over which it could be told.
#[test]
fn what_ends_between_a_handshake_and_its_link_is_said_to_be_quiet() {
    #[rustfmt::skip]
    let rows = [
        // what is shown                                    what happens                     how often it is said
        ("what was busy, and is not when the link is up",   "prepare abandon up",            1),
        ("… is said once",                                  "prepare abandon up prepare up", 1),
        ("what ends with the link up says so itself",       "prepare up abandon",            1),
        ("nobody asks for what had ended before",           "lose abandon prepare up",       0),
        ("nor is it said of what is busy",                  "prepare up",                    0),
    ];
    for (name, happenings, expected) in rows {
        let mut scene = Scene::new(QuietProof::Process);
        scene.is_asked();
        let mut said = 0;
        for word in happenings.split(' ') {
            let now = scene.now;
            match word {
                "prepare" => drop(scene.core.prepare_link(PEER, now)),
                "abandon" => scene.core.abandon(OTHER, "told to".to_owned(), now),
                "lose" => scene.core.link_lost(PEER, "why", now),
                "up" => {
                    let (hello, proof, busy) = (hello(), scene.proof, Vec::new());
                    scene.core.link_up(
                        PEER,
                        LinkUp { hello, proof, busy, by_device: ByDevice::default() },
                        now,
                    );
                }
                other => panic!("`{other}` is no happening"),
            }
            let actions = std::iter::from_fn(|| scene.core.next_action());
            let is_said = |action: &EndpointAction| {
                matches!(action, EndpointAction::Send { message: Message::Quiet { handoff: OTHER, .. }, .. })
            };
            said += actions.filter(is_said).count();
        }
        assert_eq!(said, expected, "{name}");
    }
}

/// A way for data that fails in silence, while the peer's messages keep the lease alive.
#[test]
fn a_link_whose_writes_stand_still_is_lost() {
    #[rustfmt::skip]
    let rows = [
        // what is shown                                       what happens, "s" being a second in which the peer speaks   what is told
        ("nothing is under way, for as long as one likes",     "s s s s s s s s s s s s s s",                              ""),
        ("a write may take its time",                          "post s s s s s s s s s s",                                 ""),
        ("… but no longer than that",                          "post s s s s s s s s s s s",                               "sever stop"),
        ("each one that completes begins the count anew",      "post post s s s s s s s s done s s s s s s s s s s",       ""),
        ("… and that runs out as well",                        "post post s s s s s s s s done s s s s s s s s s s s",     "sever stop"),
        ("none is under way after the last one",               "post s s s s s s s s done s s s s s s s s s s s s s s s",  ""),
        ("idle time counts for nothing",                       "s s s s s s s s s s s s post s s s s s s s s s s",         ""),
    ];
    for (name, happenings, expected) in rows {
        let mut scene = Scene::new(QuietProof::Admission);
        scene.is_asked();
        let told: Vec<String> = happenings.split(' ').flat_map(|word| scene.happens(word)).collect();
        // The link's own reservation is of no interest here.
        let told: Vec<&str> =
            told.iter().map(String::as_str).filter(|it| !["failed", "released"].contains(it)).collect();
        assert_eq!(told.join(" "), expected, "{name}");
    }
}

#[test]
fn the_clock_rings_when_a_standstill_has_lasted_too_long() {
    let mut scene = Scene::new(QuietProof::Admission);
    scene.is_asked();
    scene.happens("post");
    let posted = scene.now;
    // The next heartbeat and the end of the lease are further away.
    let shortly_before = posted.plus(STALL - Duration::from_millis(50));
    scene.core.heard(PEER, shortly_before);
    scene.core.tick(shortly_before);
    assert_eq!(scene.core.next_tick(), Some(posted.plus(STALL)));
}

/// Blocks that are computed in place are hashed and named as soon as the engine says that they are final; the commit names
/// the rest.
#[test]
fn when_what_was_computed_in_place_is_named() {
    use QuietProof::{Admission, Process};
    #[rustfmt::skip]
    let rows = [
        // what is shown                                   way         what happens                            what is asked for or said, of which blocks
        ("at the end, if nothing was said before",         Process,    "finish hashed",                        "hash:0+2 commit:0+2"),
        ("as soon as it is computed",                      Process,    "8 hashed finish",                      "hash:0+2 filled:0+2 commit:2+0"),
        ("… and only once",                                Process,    "8 8 hashed 8 finish",                  "hash:0+2 filled:0+2 commit:2+0"),
        ("… though the end may come before the digests",   Process,    "8 finish hashed",                      "hash:0+2 commit:0+2"),
        ("full blocks ahead of the others",                Process,    "4 hashed 8 hashed finish",             "hash:0+1 filled:0+1 hash:1+1 filled:1+1 commit:2+0"),
        ("… one piece of work after the other",            Process,    "4 8 hashed hashed finish",             "hash:0+1 filled:0+1 hash:1+1 filled:1+1 commit:2+0"),
        ("… even if the end comes before its digests",     Process,    "4 finish hashed hashed",               "hash:0+1 filled:0+1 hash:1+1 commit:1+1"),
        ("… or nothing is said of the others",             Process,    "5 hashed finish hashed",               "hash:0+1 filled:0+1 hash:1+1 commit:1+1"),
        ("not while a block has room",                     Process,    "3 finish hashed",                      "hash:0+2 commit:0+2"),
        ("not after it was given up",                      Process,    "cancelled 8",                          "stop"),
        ("… nor when that was while digests were taken",   Process,    "4 cancelled hashed",                   "hash:0+1 stop"),
        ("nothing is written where it was computed",       Process,    "4 hashed push",                        "hash:0+1 filled:0+1 stop"),
        ("a peer that turns it down has the engine stop",  Process,    "4 hashed refused",                     "hash:0+1 filled:0+1 stop"),
        ("the peer is roused for the commit alone",        Process,    "4 hashed rouse 8 rouse hashed rouse",  "hash:0+1 filled:0+1 hash:1+1 filled:1+1 beat"),
        ("not if the peer's memory is out of reach",       Admission,  "4 8 rouse finish",                     "commit:0+2"),
    ];
    for (name, proof, happenings, expected) in rows {
        let mut scene = Scene::new(proof);
        scene.is_asked();
        let mut ordered: VecDeque<DigestOrder> = VecDeque::new();
        let mut seen = Vec::new();
        for word in happenings.split(' ') {
            let (core, now) = (&mut scene.core, scene.now);
            match word {
                "finish" => core.finish(OTHER, vec![1], now),
                "rouse" => core.rouse(OTHER),
                "cancelled" => core.hear(PEER, Message::Cancel { handoff: OTHER }, now),
                "refused" => {
                    core.hear(PEER, Message::Refused { handoff: OTHER, reason: "why".to_owned() }, now);
                }
                "push" => {
                    let source = Some(Zeros { offset: 0, len: core.shape.granule });
                    core.push(OTHER, vec![TargetWrite { target_index: 0, offset: 0, source }], now);
                }
                "hashed" => {
                    let order = ordered.pop_front().expect("digests were asked for");
                    let digests = [5, 6][order.first..order.first + order.targets.len()].to_vec();
                    core.digested(OTHER, order.ticket, digests);
                }
                tokens => {
                    let tokens = TokenCount(tokens.parse().expect("a number of tokens"));
                    core.filled(OTHER, tokens);
                }
            }
            while let Some(action) = core.next_action() {
                seen.extend(match action {
                    EndpointAction::TakeDigests(order) => {
                        let word = format!("hash:{}+{}", order.first, order.targets.len());
                        assert_eq!((order.all, order.owner), (2, Some(PEER)), "{name}");
                        ordered.push_back(order);
                        Some(word)
                    }
                    EndpointAction::Send { message: Message::Filled(filled), .. } => {
                        let (first, count) = (filled.first as usize, filled.targets.len());
                        assert_eq!(filled.digests, [5, 6][first..first + count], "{name}");
                        Some(format!("filled:{first}+{count}"))
                    }
                    EndpointAction::Send { message: Message::Commit(commit), .. } => {
                        let digests = if proof == Process { [5, 6] } else { [0, 0] };
                        let (first, count) = (commit.first as usize, commit.targets.len());
                        assert_eq!(
                            (commit.digests, commit.payload),
                            (digests[first..].to_vec(), vec![1]),
                            "{name}"
                        );
                        let mut seal = Seal::new(OTHER);
                        seal.add(&other_targets(), &digests);
                        assert_eq!(commit.seal, seal.value(), "{name}: it stands for all");
                        Some(format!("commit:{first}+{count}"))
                    }
                    EndpointAction::Send { message: Message::Heartbeat { .. }, .. } => {
                        Some("beat".to_owned())
                    }
                    EndpointAction::Tell(EndpointEvent::CancelWanted { .. }) => Some("stop".to_owned()),
                    _ => None,
                });
            }
        }
        assert_eq!(seen.join(" "), expected, "{name}");
    }
}

/// When a word of the peer may mean that its commit comes now.
#[test]
fn when_a_commit_is_all_that_is_awaited() {
    let mut scene = Scene::new(QuietProof::Process);
    assert!(!scene.core.awaits_commit(PEER), "nothing was named");
    let targets = vec![BlockRef { block: BlockId(2), epoch: Epoch(5) }];
    let filled = crate::message::Filled { handoff: HANDOFF, first: 0, targets, digests: vec![7] };
    scene.core.hear(PEER, Message::Filled(filled), scene.now);
    assert!(scene.core.awaits_commit(PEER), "everything was");
    assert!(!scene.core.awaits_commit(PEER + 1), "by this one");
    scene.core.cancel(HANDOFF);
    assert!(!scene.core.awaits_commit(PEER), "it was given up");
}

fn other_targets() -> Vec<BlockRef> {
    [3, 4].map(|block| BlockRef { block: BlockId(block), epoch: Epoch(1) }).to_vec()
}

/// A core with one announced reservation, and the moment.
struct Scene {
    core: EndpointCore<Zeros>,
    proof: QuietProof,
    now: Moment,
    /// Targets of [`OTHER`] that were written to.
    written: u32,
}

impl Scene {
    fn new(proof: QuietProof) -> Self {
        let mut scene = Self { core: EndpointCore::new(rules()), proof, now: Moment::default(), written: 0 };
        scene.happens("up");
        let targets = vec![BlockRef { block: BlockId(2), epoch: Epoch(5) }];
        let (tokens, cached) = (TokenCount(3), Vec::new());
        let within = Duration::from_secs(1);
        let order =
            ReserveOrder { handoff: HANDOFF, peer: PEER, within, tokens, first_block: 0, cached, targets };
        scene.core.reserve(order, scene.now);
        assert!(scene.told().is_empty());
        scene
    }

    /// The peer has blocks that this side is to fill.
    fn is_asked(&mut self) {
        let reserve = crate::message::Reserve {
            handoff: OTHER,
            tokens: TokenCount(8),
            first_block: 0,
            cached: Vec::new(),
            targets: other_targets(),
            coverage: Coverage::Full,
        };
        self.core.expect(OTHER, PEER, Duration::from_secs(1), self.now);
        self.core.hear(PEER, Message::Reserve(reserve), self.now);
        self.told();
    }

    fn happens(&mut self, word: &str) -> Vec<String> {
        let (core, now) = (&mut self.core, self.now);
        let quiet = || Message::Quiet { handoff: HANDOFF, reason: "why".to_owned() };
        let up = |proof, busy| LinkUp { hello: hello(), proof, busy, by_device: ByDevice::default() };
        match word {
            "up" => drop(core.link_up(PEER, up(self.proof, Vec::new()), now)),
            "up-busy" => drop(core.link_up(PEER, up(self.proof, vec![HANDOFF]), now)),
            "cancel" => core.cancel(HANDOFF),
            "lost" => core.link_lost(PEER, "why", now),
            "gone" => core.process_gone(PEER, now),
            "access" => core.access_ended(PEER, LinkId(0), now),
            "access-2" => core.access_ended(PEER, LinkId(1), now),
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
            "post" => {
                let source = Some(Zeros { offset: 0, len: core.shape.granule });
                core.push(OTHER, vec![TargetWrite { target_index: self.written, offset: 0, source }], now);
                // The peer gives leave at once, where it is asked for.
                while let Some(action) = core.next_action() {
                    if let EndpointAction::Send { message: Message::Ask { handoff, ask }, .. } = action {
                        core.hear(PEER, Message::Grant { handoff, bytes: ask.wanted }, now);
                    }
                }
                core.post(PEER, |_, _, _| Post::Accepted, now);
                self.written += 1;
                assert!(!core.has_writes_for(PEER), "it is posted");
            }
            "done" => {
                let id = *core.writes.keys().next().expect("one is under way");
                core.completed(&[Completion { id, outcome: Ok(()) }], now);
            }
            "s" => {
                self.now = now.plus(Duration::from_secs(1));
                core.heard(PEER, self.now);
                core.tick(self.now);
            }
            "late" => {
                self.now = now.plus(Duration::from_millis(300));
                core.stood_still(Duration::from_millis(300), self.now);
            }
            "look" => core.tick(now),
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
                EndpointAction::Tell(EndpointEvent::CancelWanted { .. }) => Some("stop".to_owned()),
                _ => None,
            });
        }
        told
    }
}

pub(super) fn layout() -> KvLayout {
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

pub(super) fn rules() -> EndpointRules {
    EndpointRules {
        layout: layout(),
        blocks: 8,
        staging: 0,
        in_place: true,
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

pub(super) fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL,
        instance: PEER,
        name: "peer".to_owned(),
        layout: layout(),
        region_bytes: 8 * layout().block_bytes() as u64,
        staging_bytes: 0,
        listen_port: 1,
        host: String::new(),
        memory_socket: String::new(),
        offer: Offer { shared_memory: true, rdma: false, tcp: true, on_failure: OnFailure::FallBack },
        pulls: false,
        lease: Duration::from_millis(500),
    }
}
